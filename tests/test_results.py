"""Figures in documents are those of the committed results."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kronafuse.bench.markdown import filled
from kronafuse.bench.records import Results
from kronafuse.bench.targets import targets
from kronafuse.nn.positions import PAIRS, SOURCES
from kronafuse.study.anova.analysis import analyse
from kronafuse.testing.cases import LAYERS
from kronafuse.train.options import read_toml
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


@pytest.mark.parametrize("document", ["README.md", "bench/results/README.md"])
def test_tables_are_those_of_the_committed_results(document):
    path = ROOT / document
    text = path.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") >= 2
    assert filled(text, path.parent) == text


WIDE = {("flux2_3072", "krona_64x4"), ("flux2_3072", "lokr_f8"), ("ff_in", "krona_64x4")}
"""Of the widest layers, what the first of the runs has; the second has none."""


@pytest.mark.parametrize(
    ("name", "ours", "wide"),
    [("bench", ["ours_eager"], WIDE), ("native", ["ours_eager", "ours_cpu"], set())],
)
def test_the_committed_runs_are_whole(name, ours, wide):
    """A clean commit; every layer with every kind of adapter; ours without an error."""
    results = Results.read(RESULTS / "cpu" / f"{name}.json")
    assert results.machine.commit
    assert results.machine.dirty is False
    assert results.machine.gpu is None
    for arm in ours:
        rows = [row for row in results.rows if row.arm == arm]
        assert all(row.error is None for row in rows)
        measured = {tuple(row.case.rsplit("-", 1)) for row in rows if row.suite == "kron_linear"}
        for layer, adapter in product(LAYERS, ("krona_64x4", "lokr_f8", "lokr_square", "lora_r16")):
            assert (layer, adapter) in measured or layer in ("ff_in", "ff_out", "flux2_3072")
        assert wide <= measured


def test_every_baseline_of_a_cpu_is_in_a_committed_run():
    results = Results.read(RESULTS / "cpu" / "bench.json")
    arms = {row.arm for row in results.rows if row.tokens == 2048 and row.error is None}
    assert arms >= {"frozen", "peft_lokr", "peft_lora_r16", "lycoris_rebuild", "lycoris_bypass", "einsum"}
    assert arms >= {"einsum_compiled", "merge_gemm", "concat_gemm"}


def test_the_targets_of_a_cpu_are_met():
    """But for single cases that are slower than the plain chain, which the documents name."""
    for target in targets(Results.read(RESULTS / "cpu" / "native.json")):
        assert target.verdict == "met" or "nowhere slower" in target.limit, target


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


STUDY = RESULTS / "cpu" / "digits_study"
TRANSFORMER = "source!=res_in,res_out,attn2_context"
ANALYSES = {
    "pairs": {"where": ["activation=relu", "scale=1"]},
    "transformer": {"where": ["activation=relu", "scale=1", TRANSFORMER]},
    "form": {"where": ["pair=ff_in -> ff_in"], "interactions": True},
}
"""Folder of an analysis -> what it was made with."""


def analysis_of(name: str) -> dict[str, Any]:
    return json.loads((STUDY / name / "anova.json").read_text())


def one_way_of(name: str, over: str) -> dict[str, dict[str, Any]]:
    return {each["factor"]: each for each in analysis_of(name)[f"one_way_{over}"]}


def rows_of(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    tables = (analysis["one_way_configurations"], analysis["one_way_runs"], analysis["type_two"]["terms"])
    return [row for table in tables for row in table]


@pytest.mark.parametrize("name", ANALYSES)
def test_the_committed_analyses_are_of_the_committed_runs(name, tmp_path):
    analyse(STUDY / "results.csv", tmp_path, **ANALYSES[name])
    committed, now = analysis_of(name), json.loads((tmp_path / "anova.json").read_text())
    assert len(rows_of(committed)) >= 6
    for row, other in zip(rows_of(committed), rows_of(now), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            same = pytest.approx(value, rel=1e-6, abs=1e-12) if isinstance(value, float) else value
            assert other[key] == same, (row, key)
    assert committed["missing"] == []
    for plot in committed["plots"].values():
        with Image.open(STUDY / name / plot) as image:
            assert image.format == "PNG"


def test_the_committed_study_is_whole():
    """All pairs and all forms, three seeds each, none failed; CSV and Parquet alike; the studies' settings."""
    table = pd.read_csv(STUDY / "results.csv")
    assert set(table["status"]) == {"finished"}
    assert table["id"].is_unique
    pairs = table[(table["activation"] == "relu") & (table["scale"] == 1)]
    assert set(zip(pairs["source"], pairs["sink"], strict=True)) == set(PAIRS)
    assert (pairs.groupby(["source", "sink"])["seed"].nunique() == 3).all()
    best = table[(table["source"] == "ff_in") & (table["sink"] == "ff_in")]
    assert (best.groupby(["activation", "scale"])["seed"].nunique() == 3).all()
    assert len(best.groupby(["activation", "scale"])) == 16
    parquet = pd.read_parquet(STUDY / "results.parquet")
    assert parquet["accuracy_new"].tolist() == table["accuracy_new"].tolist()
    for name in ("digits_pairs", "digits_form"):
        settings = read_toml(ROOT / "bench" / "studies" / f"{name}.toml")["settings"]
        for key, value in settings.items():
            assert set(table[key]) == {value}, key


def test_the_readme_quotes_the_committed_study():
    text = " ".join((ROOT / "README.md").read_text().split())
    pairs, form = one_way_of("pairs", "configurations"), one_way_of("form", "configurations")
    quoted = [
        f"F({each['df_between']}, {each['df_within']}) = {each['f']:.{digits}g}"
        for each, digits in (
            (pairs["source"], 4), (pairs["sink"], 2), (form["activation"], 3), (form["scale"], 3),
        )
    ]  # fmt: skip
    runs = one_way_of("pairs", "runs")
    quoted.append(f"over runs {runs['source']['f']:.0f} and {runs['sink']['f']:.1f}")
    terms = {each["factor"]: each for each in analysis_of("pairs")["type_two"]["terms"]}
    effects = [terms[name]["partial_eta_squared"] for name in ("source", "sink")]
    quoted.append(f"partial η² = {effects[0]:.2f} and {effects[1]:.2f}")

    table = pd.read_csv(STUDY / "results.csv")
    quoted.append(f"{len(table)} runs of {table['steps'].iloc[0]} steps")
    relu = table[(table["activation"] == "relu") & (table["scale"] == 1)]
    means = relu.groupby(["source", "sink"])["accuracy_new"].mean()
    for pair in (means.idxmax(), ("attn2_out", "ff_in"), ("attn2_context", "attn2_context")):
        quoted.append(f"`{pair[0]} -> {pair[1]}` {100 * means[pair]:.0f} %")
    quoted.append(f"{relu['parameters'].min():,} to {relu['parameters'].max():,} parameters")
    by_source = {name: means[means.index.get_level_values("source") == name] for name in SOURCES}
    before = pd.concat([by_source[name] for name in ("attn1_in", "attn1_out", "attn2_in")])
    resnets = pd.concat([by_source[name] for name in ("res_in", "res_out")])
    behind = pd.concat([by_source[name] for name in ("attn2_context", "attn2_out", "ff_in", "block_out")])
    assert before.max() < by_source["ff_out"].max() < behind.min()
    assert before.max() < resnets.min() < resnets.max() < behind.min()
    for values, text_of in (
        (by_source["attn1_out"], "stays at {:.0f} % to {:.0f} %"),
        (before, "do worst ({:.0f} % to {:.0f} %)"),
        (resnets, "come between the two, {:.0f} % to {:.0f} %"),
    ):
        quoted.append(text_of.format(100 * values.min(), 100 * values.max()))
    quoted.append(f"`ff_out` is the exception, with {100 * by_source['ff_out'].iloc[0]:.0f} %")
    distances = relu.groupby("source")["frechet_new"].mean()
    by_pair = relu.groupby(["source", "sink"])["frechet_new"].mean()
    best = by_pair[[source.startswith("res") for source, _ in by_pair.index]]
    assert set(distances.nsmallest(2).index) == {"res_in", "res_out"}
    quoted.append(f"{best.min():.2f} to {best.max():.2f}")
    published = pd.read_csv(ROOT / "tests/study/published.csv").set_index(["source", "sink"])[
        "clip_similarity"
    ]
    cells = {name: published[published.index.get_level_values("source") == name].mean() for name in SOURCES}
    early = np.mean([cells[name] for name in ("attn1_in", "attn1_out", "attn2_in")])
    assert early < np.mean([cells["res_in"], cells["res_out"]]) < cells["attn2_out"]
    terms = {each["factor"]: each["partial_eta_squared"] for each in analysis_of("form")["type_two"]["terms"]}
    quoted.append(f"partial η² = {terms['activation']:.2f} and {terms['scale']:.2f}")
    for method, digits in (("pearson", "by {:.2f}"), ("spearman", "(Spearman {:.2f})")):
        quoted.append(digits.format(means.corr(published, method=method)))
    at_best = table[
        (table["source"] == "ff_in") & (table["sink"] == "ff_in") & (table["activation"] == "relu")
    ]
    old = at_best.groupby("scale")["accuracy_old"].mean()
    quoted.append(f"{100 * old[1]:.0f} % of them stay right with ReLU at scale 1, {100 * old[4]:.0f} % at 4")
    for each in quoted:
        assert each in text, each
