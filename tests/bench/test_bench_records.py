"""What a benchmark writes: read back unchanged, refused with the place and the rule where it is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from kronafuse.bench.compare import compare_results
from kronafuse.bench.machine import clocks_of, command_text, describe, tuned_digest
from kronafuse.bench.records import (
    SCHEMA,
    Accuracy,
    Ceilings,
    Clocks,
    Gpu,
    Machine,
    Results,
    Row,
    Spread,
    StepRow,
    joined,
)
from kronafuse.bench.running import continued
from kronafuse.ops import tuned

ROW = Row("kron_linear", "sdxl_1280-krona_64x4", 1, 1024, "float32", "forward", "frozen")


@pytest.fixture
def results() -> Results:
    row = replace(
        ROW,
        wall_us=Spread(3.0, 2.5, 4.0, 6, (3.0, 3.1)),
        accuracy=Accuracy(1e-7, 1e-6, None, None),
        kernels=("aten::mm",),
        verdict="met",
    )
    step = StepRow("sd15", 1, "frozen", "eager", Spread(1.0, 1.0, 1.0, 3), notes=("latents 8x8",))
    return Results(describe(["kronafuse", "bench"]), Ceilings(1e10, {"float32": 1e11}), (row,), (step,))


def test_results_come_back_unchanged(results, tmp_path):
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == SCHEMA


def test_a_machine_is_described_without_its_name_or_paths(results):
    text = json.dumps(asdict(results.machine))
    assert str(Path.cwd()) not in text
    machine = results.machine
    assert machine.command == "kronafuse bench"
    assert machine.cpu.cores >= 1
    assert machine.torch


def test_commands_are_shown_without_folders():
    words = ["/opt/somewhere/bin/kronafuse", "bench", "run", "--out", "/home/someone/a b.json"]
    assert command_text(words) == "kronafuse bench run --out 'a b.json'"
    assert command_text(["/opt/kronafuse/__main__.py", "bench"]) == "kronafuse bench"


def test_clocks_that_are_not_told_are_none():
    assert clocks_of(["1980", "1980", "[N/A]", "3201"]) == Clocks(1980, 1980, None, 3201)


def wrong(results: Results, change: Any) -> dict[str, Any]:
    value = {"schema": SCHEMA, **json.loads(json.dumps(asdict(results)))}
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v: v.pop("schema"), ValueError, "r.json: not the results of kronafuse bench"),
        (lambda v: v.update(schema=99), ValueError, "r.json: schema must be 1"),
        (lambda v: v["rows"][0].pop("arm"), ValueError, r"r.json.rows\[0\]: Row needs arm; got suite, case"),
        (lambda v: v["rows"][0].update(speed=1), ValueError, r"r.json.rows\[0\]: Row has no 'speed'"),
        (
            lambda v: v["rows"][0].update(tokens="many"),
            TypeError,
            r"r.json.rows\[0\].tokens: must be int; got str 'many'",
        ),
        (lambda v: v["rows"][0].update(tokens=True), TypeError, "tokens: must be int; got bool True"),
        (
            lambda v: v["rows"][0].update(mode="sideways"),
            ValueError,
            r"mode: must be one of forward, forward_backward; got 'sideways'",
        ),
        (
            lambda v: v["rows"][0]["wall_us"].update(median="fast"),
            TypeError,
            r"r.json.rows\[0\].wall_us.median: must be a number; got str 'fast'",
        ),
        (lambda v: v.update(rows={}), TypeError, "r.json.rows: must be a list; got dict"),
        (
            lambda v: v["ceilings"].update(gemm_flops_per_s=3),
            TypeError,
            "ceilings.gemm_flops_per_s: must be an object; got int 3",
        ),
        (lambda v: v.update(machine=None), TypeError, "machine: must be an object of Machine; got NoneType"),
    ],
)
def test_wrong_files_are_refused(results, tmp_path, change, error, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(wrong(results, change)))
    with pytest.raises(error, match=message):
        Results.read(path)


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"r\.json: not JSON"):
        Results.read(path)


def test_a_row_takes_the_place_of_its_predecessor(results):
    again = replace(ROW, wall_us=Spread(9.0, 9.0, 9.0, 1))
    other = replace(ROW, arm="einsum")
    changed = results.with_row(again).with_row(other)
    assert [row.arm for row in changed.rows] == ["frozen", "einsum"]
    assert changed.rows[0].wall_us == again.wall_us
    step = StepRow("sd15", 1, "frozen", "eager", error="out of memory")
    assert results.with_step(step).steps == (step,)


def test_times_are_equal_where_their_intervals_overlap():
    slow, fast = Spread(10.0, 9.0, 11.0, 5), Spread(8.0, 7.5, 8.5, 5)
    assert not slow.equals(fast)
    assert not fast.equals(slow)
    assert slow.equals(Spread(8.0, 7.5, 8.5, 5, (8.0, 9.5)))
    assert slow.equals(slow)


def test_runs_of_one_machine_join(results):
    later = replace(
        results,
        ceilings=Ceilings(9.0, {"bfloat16": 5.0}),
        rows=(replace(ROW, error="gone"), replace(ROW, mode="forward_backward")),
    )
    whole = joined([results, later])
    assert [(row.mode, row.error) for row in whole.rows] == [("forward", "gone"), ("forward_backward", None)]
    assert whole.ceilings == Ceilings(1e10, {"float32": 1e11, "bfloat16": 5.0})
    gpu = Gpu("H200", "9.0", 132, 2**37, 2**26, "13.0", "580", None)
    elsewhere = replace(results, machine=replace(results.machine, gpu=gpu))
    with pytest.raises(ValueError, match="different machines make no one report: GPU None, then H200"):
        joined([results, elsewhere])


def test_the_floor_is_the_larger_of_both():
    ceilings = Ceilings(1e9, {"float32": 1e12})
    assert ceilings.floor_us(2_000_000, 1000, "float32") == pytest.approx(2.0)
    assert ceilings.floor_us(2_000_000, 5000, "float32") == pytest.approx(5.0)
    assert ceilings.floor_us(1, 1, "float16") is None


def test_machines_have_every_field_of_a_row_of_versions():
    assert {"commit", "dirty", "torch", "triton", "gpu", "cpu", "command"} <= set(
        Machine.__dataclass_fields__
    )


def test_a_copy_without_a_repository_is_told_its_commit(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("KRONAFUSE_COMMIT", raising=False)
    assert describe(["kronafuse"]).commit is None
    monkeypatch.setenv("KRONAFUSE_COMMIT", "0123456789ab")
    machine = describe(["kronafuse"])
    assert (machine.commit, machine.dirty) == ("0123456789ab", None)


def test_the_tuned_table_is_named(tmp_path, monkeypatch):
    """By its rows: their order and the note say nothing of what runs."""
    row = tuned.Row(
        "shrink",
        "NVIDIA H200",
        {"rows": 64},
        {"block_m": 64},
        1.0,
        None,
        "2026-01-01",
        "kronafuse",
        "c",
        "3.6.0",
    )
    other = replace(row, gpu="NVIDIA A10")
    monkeypatch.setattr(tuned, "in_use", lambda: tmp_path / "table.json")
    digests = []
    for rows in ([], [row], [row, other], [other, row]):
        monkeypatch.setattr(tuned, "read", lambda _path, rows=rows: rows)
        digests.append(tuned_digest())
    assert digests[0] == "empty"
    assert len(digests[1]) == 12
    assert digests[1] != digests[2] == digests[3]
    results = Results(describe(["kronafuse"]))
    before, after = (replace(results, machine=replace(results.machine, tuned=each)) for each in (None, "abc"))
    assert "tuned table: unknown, then abc" in compare_results(before, after, relative=False).different


def test_files_from_before_the_tuned_table_was_named_are_read(tmp_path):
    path = tmp_path / "old.json"
    Results(describe(["kronafuse"])).write(path)
    value = json.loads(path.read_text())
    del value["machine"]["tuned"]
    path.write_text(json.dumps(value))
    assert Results.read(path).machine.tuned is None
    assert continued(Results.read(path), describe(["kronafuse"]), path).machine.tuned is None


def test_clocks_are_read_behind_the_ceilings(monkeypatch):
    from kronafuse.bench import machine, running

    gpu = Gpu("H200", "9.0", 132, 2**37, 2**26, "13.0", "580", None)
    busy = replace(gpu, clocks=Clocks(1980, 1980, 3201, 3201))
    monkeypatch.setattr(machine, "_gpu", lambda index: busy)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    idle = replace(describe(["kronafuse"]), gpu=gpu)
    assert running.with_clocks(idle).gpu == busy
    assert running.with_clocks(replace(idle, gpu=None)).gpu is None
