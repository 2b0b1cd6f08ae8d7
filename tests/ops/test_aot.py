"""Every Triton kernel compiled for every supported architecture, without a GPU, under two Tritons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kronafuse import env
from kronafuse.ops.costs import LAUNCH_US, shared_limit
from kronafuse.ops.kron_linear.tuning import LinearConfig
from kronafuse.ops.launch import Architecture
from kronafuse.testing.aot import TOLERATED_SPILL, Record, csv_path, launches, read_csv, row
from kronafuse.testing.aot_problems import ARCHITECTURES, groups
from kronafuse.testing.cases import CASES

ROOT = Path(__file__).parents[2]
OLDEST = "3.6.0"
"""The Triton that the oldest supported torch brings; `make aot` puts it beside the environment's own."""
OLDEST_PATH = ROOT / ".cache" / f"triton-{OLDEST}"
KERNELS = {
    "shrink", "sum", "mix", "reduce", "shrink_reduce", "dense", "linear", "one_pass", "merge", "bottleneck_forward",
    "bottleneck_backward",
}  # fmt: skip
RECORDED = ROOT / "bench" / "results" / "aot"
"""What the pinned Triton makes of every shipped configuration: `python -m kronafuse.testing.aot --record --output`."""


KNOWN_SPILLS = {
    ("3.9.0", 86, "shrink", "krona_64x4-row_scale"): 8,
    ("3.9.0", 89, "shrink", "krona_64x4-row_scale"): 8,
    ("3.9.0", 100, "linear", "krona_64x4-layers_3"): 40,
    ("3.6.0", 80, "shrink", "krona_64x4-row_scale"): 8,
    ("3.6.0", 120, "shrink", "krona_64x4-row_scale"): 32,
    ("3.6.0", 100, "linear", "krona_64x4-layers_3"): 64,
}
"""Bytes a thread that ptxas spills in the fast set, by Triton, architecture, kernel and problem: these alone."""


def run(*command: str, path: Path | None = None, cache: Path) -> str:
    """What a Python process prints in which kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != env.TRITON_INTERPRET}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return done.stdout


def compiled(*options: str, path: Path | None = None, cache: Path) -> list[Record]:
    workers = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    text = run(
        "-m", "kronafuse.testing.aot", "--json", "--workers", workers, *options, path=path, cache=cache
    )
    return [Record(**record) for record in json.loads(text)]


def assert_shippable(records: list[Record], kernels: set[str]) -> None:
    """Every kernel on every architecture within the limits, tensor cores by the right instruction."""
    assert {(record.architecture, record.kernel) for record in records} == {
        (architecture, kernel) for architecture in ARCHITECTURES for kernel in kernels
    }
    faults = [
        f"sm_{record.architecture} {record.kernel} {record.dtype} {record.problem} {record.constants}: {problem}"
        for record in records
        for problem in record.problems()
    ]
    assert faults == []
    for record in records:
        if record.kernel in ("linear", "one_pass") and record.dtype != "fp32":
            assert_linear_instructions(record)
        if record.kernel.startswith("bottleneck") and record.dtype != "fp32":
            counts = record.instructions
            assert counts["mma"] + counts["wgmma"] + counts["tcgen05"] > 0, record
            if record.constants["BLOCK_M"] >= 64 and record.architecture == 90:
                assert counts["wgmma"] > 0, record


def assert_linear_instructions(record: Record) -> None:
    """Tiles with 64 rows or more use wgmma on sm_90 and tcgen05 on sm_100, those of descriptors the bulk copy."""
    counts, large = record.instructions, record.constants["BLOCK_M"] >= 64
    has_dots = record.constants["DESCRIPTORS"] or record.constants.get("TAIL", 1) == 1
    where = f"sm_{record.architecture} {record.problem}: {counts}"
    if large and record.constants["DESCRIPTORS"]:
        expected = {90: "wgmma", 100: "tcgen05"}.get(record.architecture, "mma")
        assert counts[expected] > 0, where
    elif has_dots:
        assert counts["mma"] + counts["wgmma"] + counts["tcgen05"] > 0, where
    assert (counts["tma"] > 0) == record.constants["DESCRIPTORS"], where
    assert record.architecture >= 90 or counts["tma"] == 0, where


@pytest.mark.parametrize("version", ["pinned", OLDEST])
def test_kernels_compile(version, tmp_path):
    """Every kernel on each architecture: bf16 with fp32 parameters, a thin and a fat adapter, one layer and three."""
    if version == OLDEST and not OLDEST_PATH.is_dir():
        pytest.skip(f"no Triton {OLDEST} in {OLDEST_PATH.relative_to(ROOT)}: run `make aot`")
    records = compiled(path=OLDEST_PATH if version == OLDEST else None, cache=tmp_path)
    expected = OLDEST if version == OLDEST else env.package_version("triton")
    assert {record.triton for record in records} == {expected}
    assert_shippable(records, KERNELS)
    tiles = {each.constants["BLOCK_M"] for each in records if each.kernel == "bottleneck_forward"}
    assert max(tiles) == 64, "the rows of a whole batch are not among the problems"
    found = [((each.triton, each.architecture, each.kernel, each.problem), each.spilled) for each in records]
    assert [(key, spilled) for key, spilled in found if spilled > KNOWN_SPILLS.get(key, 0)] == []
    descriptors = {record.architecture for record in records if record.constants.get("DESCRIPTORS")}
    assert descriptors == {architecture for architecture in ARCHITECTURES if architecture >= 90}
    if version == "pinned":
        assert_recorded(records)


def test_the_fast_set_is_what_is_trained():
    """Parameters in fp32 beside bf16 activations, one layer and three that share x; every kernel is reached."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _, launch in launches(Architecture(90, 132), torch.bfloat16, "fast"):
        name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        found.setdefault(name, []).append({**launch.arguments, **launch.constants})
    assert set(found) == KERNELS
    factors = [
        [each[f"d{slot}_ptr"] for slot in range(3) if each[f"d{slot}_ptr"] is not None]
        for each in found["shrink"]
    ]
    assert {len(each) for each in factors} == {1, 3}
    assert all(factor.dtype == torch.float32 for each in factors for factor in each)
    assert {each["COUNT"] for each in found["reduce"]} == {1, 3}
    assert all(each["a_ptr"].dtype == torch.float32 for each in found["one_pass"])


def test_groups_of_the_case_list_are_compiled():
    """One, three and four layers of every layer of the case list with --all; one and three of one that is recorded."""
    names = {extent: [name for name, _ in groups(torch.bfloat16, extent)] for extent in ("record", "all")}
    assert len(names["all"]) == 3 * len(CASES)
    assert {"sdxl_1280-krona_64x4-layers_1", "sdxl_1280-krona_64x4-layers_3"} < set(names["record"])
    assert set(names["record"]) < set(names["all"])


def assert_recorded(records: list[Record]) -> None:
    """Each of them is in the committed files as it is now, registers, stack, shared memory and prediction."""
    for architecture in ARCHITECTURES:
        recorded = read_csv(csv_path(RECORDED, architecture, "bf16"))
        fresh = [row(record) for record in records if record.architecture == architecture]
        stale = [each for each in fresh if {name: str(value) for name, value in each.items()} not in recorded]
        assert stale == [], f"{len(stale)} of {len(fresh)} kernels are not as recorded: write the files anew"


def test_recorded_kernels_are_shippable():
    """No line of the committed files spills or needs more shared memory than there is; all have a prediction."""
    for architecture in ARCHITECTURES:
        for each in read_csv(csv_path(RECORDED, architecture, "bf16")):
            assert int(each["spilled"]) <= TOLERATED_SPILL, each
            assert int(each["shared"]) <= shared_limit(architecture), each
            assert float(each["predicted_us"]) > LAUNCH_US, each


@pytest.mark.slow
def test_shipped_configurations_compile(tmp_path):
    """Every tile with every kind of tail, W in both layouts, odd sizes, in all dtypes."""
    assert_shippable(compiled("--all", cache=tmp_path), KERNELS)


SPILLING = """
from kronafuse.ops.kron_linear import linear_kernel, tuning
from kronafuse.ops.launch import Architecture, recording
from kronafuse.testing.aot import compile_launch
from kronafuse.testing.aot_problems import meta
import torch

config = tuning.LinearConfig(128, 256, 64, 32, 8, 4, 3, True)
with recording(Architecture(90, 132)) as recorded:
    operands = (meta(size, 1280, dtype=torch.bfloat16) for size in (1024, 1280))
    linear_kernel.linear_with_tails(*operands, None, None, 1280, [], None, config)
(launch,) = recorded
print(*compile_launch("spilling", launch, "bf16", 90).problems(), sep="\\n")
"""


def test_spills_are_found(tmp_path):
    """A tile of 128×256 on four warps has no registers left; the predicate and the compiled code both say so."""
    text = run("-c", SPILLING, cache=tmp_path)
    assert "registers spill" in text
    reasons = LinearConfig(128, 256, 64, 32, 8, 4, 3, True).reasons(Architecture(90, 132), torch.bfloat16)
    assert reasons == ["256 accumulators a thread, more than 128 spill"]


def test_a_record_names_its_problems():
    counts = {"wgmma": 0, "tcgen05": 0, "mma": 1, "tma": 0, "cp_async": 0, "atomic": 0}
    good = Record("linear", "x", "bf16", 86, {}, 4, 3, 100, 0, 4096, counts, 0.1, OLDEST)
    assert good.problems() == []
    assert replace(good, spilled=64).problems() == []
    bad = replace(good, spilled=72, shared=102400, instructions={**counts, "atomic": 2})
    assert bad.problems() == [
        "registers spill 72 bytes a thread",
        "102400 bytes of shared memory, sm_86 has 101376",
        "atomics: the result would not repeat",
    ]


def test_refuses_the_interpreter():
    environment = {**os.environ, env.TRITON_INTERPRET: "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kronafuse.testing.aot"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
