"""`kronafuse bench`: what its commands print and write, and their exit codes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from kronafuse.bench import require_libraries
from kronafuse.bench.arms import ARMS
from kronafuse.bench.device import DEVICE_LOST
from kronafuse.bench.records import Results
from kronafuse.bench.selection import SETS, Options, specs
from kronafuse.cli.app import app
from kronafuse.testing.cases import CASES
from typer.testing import CliRunner, Result

QUICK = ("--tokens", "16", "--seconds", "0.02", "--arm", "ours_eager")


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture
def small_ceilings(monkeypatch):
    """The machine's ceilings are measured on small buffers."""
    monkeypatch.setattr("kronafuse.bench.ceilings.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("kronafuse.bench.ceilings.GEMM_SIZE", {"cpu": 64})


def test_a_suite_runs_whole(small_ceilings, tmp_path):
    out = tmp_path / "new" / "results.json"
    result = bench("kron_linear", "--case", "sd15_320-lokr_f8", *QUICK, "--out", str(out))
    assert result.exit_code == 0, result.output
    results = Results.read(out)
    assert {row.mode for row in results.rows} == {"forward", "forward_backward"}
    assert {row.arm for row in results.rows} == {"frozen", "einsum", "ours_eager"}
    assert all(row.error is None for row in results.rows)
    assert {row.tokens for row in results.rows} == {16}
    assert results.ceilings is not None
    assert "ours_eager" in result.stdout
    assert "target" in result.stdout
    assert "Written:" in result.stdout


def test_several_suites_run_into_one_file(small_ceilings, tmp_path):
    out = tmp_path / "results.json"
    words = ["--set", "quick", "--mode", "forward", "--dtype", "bf16", "--factors", "float32", *QUICK]
    result = bench("run", *words, "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = Results.read(out).rows
    assert {row.suite for row in rows} == set(ARMS)
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert "parameters in float32" in result.stdout


def test_a_run_adds_to_results_of_its_machine(small_ceilings, tmp_path):
    out = tmp_path / "results.json"
    first = ["kron_linear", "--case", "sd15_320-lokr_f8", "--mode", "forward", *QUICK, "--out", str(out)]
    second = ["kron_linear", "--case", "sd15_320-lora_r16", "--dtype", "bf16", "--mode", "forward", *QUICK]
    assert bench(*first).exit_code == 0
    before = Results.read(out)
    assert bench(*second, "--add", "--out", str(out)).exit_code == 0
    after = Results.read(out)
    assert after.rows[: len(before.rows)] == before.rows
    assert {row.case for row in after.rows} == {"sd15_320-lokr_f8", "sd15_320-lora_r16"}
    assert after.ceilings is not None
    assert before.ceilings is not None
    assert after.ceilings.copy_bytes_per_s == before.ceilings.copy_bytes_per_s
    assert set(after.ceilings.gemm_flops_per_s) == {"float32", "bfloat16"}
    replace(after, machine=replace(after.machine, torch="2.11.0")).write(out)
    kept = out.read_bytes()
    refused = bench(*second, "--add", "--out", str(out))
    assert refused.exit_code == 2
    assert "results.json cannot be added to: it is of torch '2.11.0', here '2.13" in refused.output
    assert out.read_bytes() == kept


def test_the_budget_ends_a_run_and_keeps_what_is_there(small_ceilings, tmp_path):
    out = tmp_path / "results.json"
    words = ["--case", "sd15_320-lokr_f8", "--case", "sd15_320-lora_r16", *QUICK, "--budget", "1e-6"]
    result = bench("kron_linear", *words, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Not run, the budget was used up") == 4
    assert Results.read(out).rows == ()


def test_a_lost_device_ends_a_run_which_another_process_goes_on_with(small_ceilings, tmp_path, monkeypatch):
    def fatal(_problem):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    arms = ARMS["kron_linear"]
    broken = tuple(replace(arm, build=fatal) if arm.name == "merge_gemm" else arm for arm in arms)
    monkeypatch.setitem(ARMS, "kron_linear", broken)
    out = tmp_path / "results.json"
    words = ["kron_linear", "--case", "sd15_320-lokr_f8", *QUICK, "--arm", "merge_gemm", "--out", str(out)]
    lost = bench(*words)
    assert lost.exit_code == DEVICE_LOST
    assert "the device was lost by merge_gemm: RuntimeError: CUDA error: an illegal" in lost.stderr
    (row,) = Results.read(out).rows
    assert (row.arm, row.mode) == ("merge_gemm", "forward")
    monkeypatch.setitem(ARMS, "kron_linear", arms)
    assert bench(*words, "--add", "--missing").exit_code == 0
    rows = Results.read(out).rows
    assert {row.arm for row in rows if row.error is None and row.mode == "forward"} == {
        "frozen", "einsum", "ours_eager",
    }  # fmt: skip
    assert len([row for row in rows if row.error is None]) == 3 + 4
    before = out.read_bytes()
    again = bench(*words, "--add", "--missing")
    assert again.exit_code == 0
    assert out.read_bytes() == before


def test_a_wrong_implementation_ends_with_1(small_ceilings, tmp_path, monkeypatch):
    arms = tuple(
        replace(arm, evidence=lambda: ("never_seen",)) if arm.name == "ours_eager" else arm
        for arm in ARMS["kron_linear"]
    )
    monkeypatch.setitem(ARMS, "kron_linear", arms)
    out = tmp_path / "results.json"
    words = ["--case", "sd15_320-lokr_f8", "--mode", "forward", *QUICK]
    result = bench("kron_linear", *words, "--out", str(out))
    assert result.exit_code == 1
    assert "wrong or not run: ours_eager on sd15_320-lokr_f8" in result.stderr
    (row,) = [row for row in Results.read(out).rows if row.arm == "ours_eager"]
    assert row.error is not None
    assert "did not run" in row.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("kron_linear", "--case", "sdxl_9"),
            "no case of kron_linear matches --case sdxl_9; cases are LAYER-ADAPTER",
        ),
        (("kron_linear", "--set", "most"), "--set must be one of core, quick, all; got 'most'"),
        (("kron_linear", "--dtype", "int8"), "--dtype must be one of float32, fp32"),
        (("kron_linear", "--mode", "back"), "--mode must be one of forward, forward_backward; got 'back'"),
        (("kron_linear", "--arm", "best"), "no arm of kron_linear matches 'best'; there are frozen"),
        (("kron_linear", "--factors", "half"), "--factors must be compute or float32; got 'half'"),
        (("kron_linear", "--tokens", "0"), "--tokens must be at least 1; got 0"),
        (("kron_linear", "--batch", "0"), "--batch must be at least 1; got 0"),
        (("kron_linear", "--batch", "2", "--tokens", "3"), "give it or --batch, not both"),
        (("kron_linear", "--seconds", "0"), "--seconds and --budget must be above 0; got 0.0 and None"),
        (("kron_linear", "--device", "tpu"), "--device must be cpu or cuda; got 'tpu'"),
        (
            ("run", "--suite", "conv"),
            "--suite must be one of kron_linear, kron_linear_group, bottleneck; got 'conv'",
        ),
    ],
)
def test_wrong_words_are_named(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr("kronafuse.bench.running.measure_ceilings", None)  # nothing may be measured
    result = bench(*words, "--out", str(tmp_path / "r.json"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "r.json").exists()


def test_cases_are_chosen_by_layer_and_adapter():
    found = specs(
        ["kron_linear"], Options(layers=("sdxl_*",), adapters=("lora_r16",), batches=(1, 4), device="cpu")
    )
    assert {spec.case.name for spec in found} == {
        name for name in CASES if name.startswith("sdxl") and "lora" in name
    }
    assert {spec.tokens / spec.batch for spec in found} == {77, 1024, 4096}
    assert len(found) == 4 * 2 * 2


def test_core_has_every_kind_of_case():
    from kronafuse.planner import choose

    chosen = [CASES[name] for name in SETS["core"]["kron_linear"]]
    assert len(chosen) == 12
    kinds = {(choose(case.shape).order, choose(case.shape).thin) for case in chosen}
    assert {("a_first", True), ("b_first", True), ("low_rank", True), ("b_first", False)} <= kinds | {
        ("b_first", not choose(case.shape).thin) for case in chosen if not choose(case.shape).thin
    }
    assert {case.shape.n for case in chosen} >= {320, 640, 1280, 3072, 10240}
    assert any(case.shuffled for case in chosen)
    assert any(not case.has_a for case in chosen)


@pytest.fixture
def two_runs(small_ceilings, tmp_path) -> tuple[Path, Path]:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    words = ["--case", "sd15_320-lora_r16", "--mode", "forward", *QUICK]
    assert bench("kron_linear", *words, "--out", str(before)).exit_code == 0
    results = Results.read(before)
    rows = []
    for row in results.rows:
        assert row.wall_us is not None
        low, high = row.wall_us.interval
        slow = replace(row.wall_us, median=10 * high, low=10 * high, high=10 * high, passes=())
        rows.append(replace(row, wall_us=slow) if row.arm == "ours_eager" else row)
        assert low > 0
    replace(results, rows=tuple(rows)).write(after)
    return before, after


def test_compare_fails_above_a_limit(two_runs):
    before, after = map(str, two_runs)
    assert bench("compare", before, after).exit_code == 0
    same = bench("compare", before, before, "--fail-above", "0")
    assert same.exit_code == 0
    assert "equal" in same.stdout
    slower = bench("compare", before, after, "--fail-above", "5")
    assert slower.exit_code == 1
    assert "more than 5 %" in slower.stderr
    assert bench("compare", after, before, "--fail-above", "5").exit_code == 0
    wrong = bench("compare", before, after, "--fail-above", "-1")
    assert wrong.exit_code == 2
    assert "--fail-above must be at least 0; got -1" in wrong.stderr


def test_compare_needs_something_in_common(two_runs, tmp_path):
    before, _ = two_runs
    empty = tmp_path / "empty.json"
    replace(Results.read(before), rows=()).write(empty)
    result = bench("compare", str(before), str(empty))
    assert result.exit_code == 2
    assert "no arm of a case in common" in result.stderr


def test_report_and_markdown(two_runs, tmp_path):
    before, _ = two_runs
    result = bench("report", str(before), "--out", str(tmp_path / "report"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report" / "report.html").exists()
    printed = bench("markdown", str(before))
    assert printed.stdout.startswith("| case | tokens |")
    document = tmp_path / "TABLES.md"
    document.write_text("<!-- table: kron_linear from a.json -->\n<!-- end -->\n")
    stale = bench("markdown", "--into", str(document), "--check")
    assert stale.exit_code == 1
    assert "are not those of the results" in stale.stderr
    assert bench("markdown", "--into", str(document)).exit_code == 0
    assert printed.stdout.strip() in document.read_text()
    assert bench("markdown", "--into", str(document), "--check").exit_code == 0
    for words, message in (
        ((), "give either results to print a table of, or --into"),
        ((str(before), "--check"), "--check is about a document"),
    ):
        result = bench("markdown", *words)
        assert result.exit_code == 2
        assert message in result.stderr


def test_absent_libraries_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(
        ImportError, match=r'needs jinja2; install with: pip install "\.\[bench\]" in a clone'
    ):
        require_libraries()


def test_results_are_json_with_a_schema(two_runs):
    value = json.loads(two_runs[0].read_text())
    assert value["schema"] == 1
    assert set(value) == {"schema", "machine", "ceilings", "rows", "steps"}
