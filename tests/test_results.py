"""Figures in documents are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def kron_linear_rows() -> list[str]:
    """One table row an adapter and dtype: the frozen layer's ms, then the ratios to it."""
    saved = json.loads((RESULTS / "cpu/kron_linear.json").read_text())
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in saved["benchmarks"]:
        adapter, dtype, arm = each["name"].split("[")[1].rstrip("]").rsplit("-", 2)
        ratio = each["extra_info"].get("ratio_to_frozen")
        text = f"{1e3 * each['stats']['median']:.0f} ms" if ratio is None else f"{ratio:.2f}"
        found.setdefault((adapter, dtype), {})[arm] = text
    arms = ("frozen", "eager", "chain", "peft")
    return [
        f"| `{adapter}` | {dtype} | " + " | ".join(each.get(arm, "") for arm in arms) + " |"
        for (adapter, dtype), each in found.items()
    ]


def test_the_table_of_results_is_the_committed_run():
    rows, text = kron_linear_rows(), (RESULTS / "README.md").read_text()
    assert len(rows) == 12
    for row in rows:
        assert row in text, row


def test_the_readme_quotes_the_committed_demo():
    figures = json.loads((RESULTS / "cpu/demo.json").read_text())
    accuracy, ratios = figures["classifier_accuracy"], figures["step_time"]["ratio_to_peft_lokr"]
    quoted = [
        f"{100 * accuracy['new_before']:.1f} %",
        f"{100 * accuracy['new_after']:.1f} %",
        f"{100 * accuracy['old_after']:.0f} %",
        f"{figures['seconds']:.0f} s",
        f"{figures['trainable_parameters']['krona']:,}",
        f"{ratios['kronafuse KronA']:.2f}",
    ]
    text = " ".join((ROOT / "README.md").read_text().split())
    for figure in quoted:
        assert figure in text, figure
    assert figures["gated"]


def test_the_readme_quotes_the_committed_ratios():
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {
        tuple(cell.strip(" `") for cell in row.split("|")[1:3]): row.split("|") for row in kron_linear_rows()
    }
    for adapter, column in (("krona_64x4", 4), ("lokr_f8", 4), ("lokr_f8", 6)):
        assert rows[adapter, "float32"][column].strip() in text
