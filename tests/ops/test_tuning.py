"""Configurations: the rules' candidates, and the table of measured ones before them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kronafuse.bench.tune_problems import faults
from kronafuse.ops import costs, kernel_costs, tuned
from kronafuse.ops.bottleneck import tuning as bottleneck_tuning
from kronafuse.ops.kron_linear import one_pass_tuning, reduction_tuning, tuning
from kronafuse.ops.launch import Architecture
from kronafuse.testing.bottleneck_cases import CASES as BOTTLENECKS
from kronafuse.testing.cases import LAYERS

BF16, FP32 = torch.bfloat16, torch.float32
H200 = Architecture(90, 132, "NVIDIA H200")
KEY = {"dtype": "bfloat16", "rows": 4096, "width": 20, "features": 320}
SHRINK = {
    "block_m": 32,
    "block_w": 32,
    "block_k": 64,
    "split": 1,
    "k_per_split": 320,
    "warps": 4,
    "stages": 4,
}
ROW: dict[str, Any] = {
    "kernel": "shrink",
    "gpu": "NVIDIA H200",
    "key": KEY,
    "config": SHRINK,
    "time_us": 4.5,
    "runner_up": {"config": {**SHRINK, "stages": 3}, "time_us": 4.75},
    "date": "2026-01-31",
    "command": "kronafuse bench tune --cases core",
    "commit": "0123456789ab",
    "triton": "3.6.0",
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test puts into the table does not stay."""
    tuned.reload()
    yield
    tuned.reload()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes rows into a table that is used from then on."""

    def write(*rows: Any, **others: Any) -> Path:
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps({"schema": tuned.SCHEMA, "rows": list(rows), **others}))
        monkeypatch.setenv(tuned.VARIABLE, str(path))
        tuned.reload()
        return path

    return write


def shrink_choice(rows: int = 4096, architecture: Architecture = H200) -> reduction_tuning.ShrinkConfig:
    return reduction_tuning.shrink_choice(architecture, BF16, rows, 20, 320)


def test_the_shipped_table_is_read():
    """Its rows are whole, on GPUs that `Architecture` names, with configurations that run there."""
    rows = tuned.read(tuned.PATH)
    assert tuned.PATH.read_text() == tuned.written(rows, json.loads(tuned.PATH.read_text())["note"])
    assert rows or "Empty" in json.loads(tuned.PATH.read_text())["note"]


def test_shipped_rows_can_run():
    """Each row's configuration is built and asked for its reasons on the architecture of its GPU."""
    rows = tuned.read(tuned.PATH)
    for gpu in sorted({row.gpu for row in rows}):
        assert faults([row for row in rows if row.gpu == gpu], named(gpu)) == []


def named(gpu: str) -> Architecture:
    """The architecture of a GPU whose peaks the cost model has, as "NVIDIA H200"."""
    (capability,) = [key for key, peaks in costs.PEAKS.items() if gpu.endswith(peaks.gpu)]
    return Architecture(capability, costs.PEAKS[capability].multiprocessors, gpu)


def test_rows_that_cannot_run_are_named():
    """As the test of the shipped rows would: whose shared memory, fields or form are wrong; a good one is passed."""
    large = {**ROW, "config": {**SHRINK, "block_m": 1024, "stages": 9}}
    base_key = dict(
        zip(tuned.KEYS["base_route"], ("bfloat16", 4096, 1280, 1280, False, 1, "block"), strict=True)
    )
    base = {**ROW, "kernel": "base_route", "key": base_key, "config": {"form": "cublas"}}
    one_pass_key = dict(
        zip(tuned.KEYS["one_pass"], ("bfloat16", 4096, 8, 8, 160, 160, True, False, True), strict=True)
    )
    config = one_pass_tuning.OnePassConfig(128, 128, 64, 8, 8, 4, 1, 1280, True)
    one_pass = {**ROW, "kernel": "one_pass", "key": one_pass_key, "config": asdict(config)}
    rows = [tuned.Row(**each) for each in (ROW, large, {**ROW, "config": {"block": 16}}, base, one_pass)]
    found = faults(rows, named("NVIDIA H200"))
    assert len(found) == 4
    assert re.match(
        r"shrink of NVIDIA H200 \{'dtype': 'bfloat16', .*\}: .*cannot run there:\n .* sm_90 has", found[0]
    )
    assert re.search(r"the configuration must have block_m, .*; got block", found[1])
    assert "route base must be one of fused, torch; got 'cublas'" in found[2]
    assert re.match(r"one_pass of NVIDIA H200 .*a tile touches 2 groups of 160", found[3], re.DOTALL)


def test_the_row_of_this_gpu_and_problem_is_taken(table):
    table(ROW)
    assert asdict(shrink_choice()) == SHRINK
    rule = reduction_tuning.shrink_config(BF16, 4096, 20, 320)
    assert rule != reduction_tuning.ShrinkConfig(**SHRINK)
    assert shrink_choice(architecture=replace(H200, name="NVIDIA H100")) == rule
    assert shrink_choice(architecture=replace(H200, name="")) == rule
    assert reduction_tuning.shrink_choice(H200, BF16, 4096, 20, 640) == reduction_tuning.shrink_config(
        BF16, 4096, 20, 640
    )
    assert reduction_tuning.shrink_choice(H200, torch.float16, 4096, 20, 320) == rule


@pytest.mark.parametrize(("rows", "taken"), [(2048, False), (2049, True), (4096, True), (4097, False)])
def test_tokens_share_a_row_up_to_the_power_of_two(table, rows, taken):
    table(ROW)
    assert (asdict(shrink_choice(rows)) == SHRINK) == taken


def test_buckets():
    assert [tuned.bucket(size) for size in (0, 1, 2, 3, 77, 128, 129)] == [1, 1, 2, 4, 128, 128, 256]


def test_the_table_is_read_once_and_at_first_use(table, monkeypatch):
    table(ROW)
    reads = []
    read = tuned.read
    monkeypatch.setattr(tuned, "read", lambda path: reads.append(path) or read(path))
    for _ in range(3):
        shrink_choice()
        assert tuned.lookup("shrink", "NVIDIA H200", KEY) == SHRINK
    assert len(reads) == 1
    assert tuned.lookup("shrink", "NVIDIA H200", {**KEY, "rows": 8192}) is None
    assert tuned.lookup("shrink", "NVIDIA A10", KEY) is None


def test_without_a_gpu_the_table_is_not_read(monkeypatch):
    """The interpreter and recorded launches name no GPU."""
    monkeypatch.setattr(tuned, "read", lambda path: pytest.fail("the table was read"))
    shrink_choice(architecture=Architecture(90, 132))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "gemm"}, r"row 1: kernel must be one of linear, shrink, .*; got 'gemm'"),
        ({"date": ""}, r"row 1: date must say something"),
        ({"command": " ", "commit": None}, r"row 1: command, commit must say something"),
        ({"date": "31.1.2026"}, r"row 1: date must be as 2026-01-31; got '31.1.2026'"),
        ({"key": {"rows": 4096}}, r"row 1: the key of shrink must name dtype, rows, width, features; got"),
        ({"key": {**KEY, "rows": 4095}}, r"row 1: rows must be a power of two, for those up to it; got 4095"),
        ({"config": {}}, r"row 1: config must be an object with the fields of one; got \{\}"),
        ({"time_us": 0}, r"row 1: time_us must be above 0; got 0"),
        ({"speed": 1}, r"row 1 must have kernel, gpu, .*; absent: \[\], unknown: \['speed'\]"),
    ],
)
def test_rejects_rows(table, change, message):
    path = table({**ROW, "gpu": "NVIDIA A10"}, {**ROW, **change})
    with pytest.raises(ValueError, match=message) as raised:
        tuned.read(path)
    assert str(path) in str(raised.value)


def test_rejects_absent_fields_and_other_objects(table):
    absent = {name: value for name, value in ROW.items() if name != "date"}
    with pytest.raises(ValueError, match=r"row 0 must have .*; absent: \['date'\], unknown: \[\]"):
        tuned.read(table(absent))
    with pytest.raises(ValueError, match=r"row 0 must be an object with kernel, .*; got 3"):
        tuned.read(table(3))


def test_rejects_two_rows_for_one_problem(table):
    with pytest.raises(ValueError, match="rows 0 and 1 are for the same shrink problem"):
        tuned.read(table(ROW, {**ROW, "time_us": 3.0}))


def test_rejects_other_files(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        tuned.read(path)
    path.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ValueError, match=r'must be \{"schema": 1, "rows": \[...\]\}; got'):
        tuned.read(path)


def test_rejects_a_configuration_that_cannot_run_there(table):
    table({**ROW, "config": {**SHRINK, "block_m": 1024, "stages": 9}})
    with pytest.raises(ValueError, match="the configuration cannot run there") as raised:
        shrink_choice()
    assert re.search(r"\d+ bytes of shared memory, sm_90 has 232448", str(raised.value))
    assert "tuned.json: shrink of NVIDIA H200 {'dtype': 'bfloat16', 'rows': 4096" in str(raised.value)
    assert "256 accumulators a thread, more than 128 spill" in str(raised.value)


def test_rejects_a_configuration_with_other_fields(table):
    table({**ROW, "config": {"block": 16}})
    with pytest.raises(ValueError, match=r"the configuration must have block_m, .*; got block"):
        shrink_choice()


def test_written_tables_are_read_back(tmp_path):
    rows = [tuned.Row(**ROW), tuned.Row(**{**ROW, "gpu": "NVIDIA A10", "runner_up": None})]
    path = tmp_path / "table.json"
    path.write_text(tuned.written(rows, "a note"))
    assert sorted(tuned.read(path), key=str) == sorted(rows, key=str)
    assert json.loads(path.read_text())["note"] == "a note"


def test_decisions_hold_in_every_thread(table):
    """A backward on a GPU runs in a thread of autograd's own."""
    other = reduction_tuning.ShrinkConfig(16, 16, 16, 1, 320, 4, 2)
    with tuned.deciding(lambda _choice: other), ThreadPoolExecutor(1) as pool:
        assert pool.submit(shrink_choice).result() is other
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(shrink_choice).result() is not other


def test_decisions_nest(table):
    """The innermost decides; what it leaves is the table's and the rule's, and after it the outer one decides again."""
    first, second = (reduction_tuning.ShrinkConfig(16, 16, 16, 1, 320, 4, stages) for stages in (2, 3))
    with tuned.deciding(lambda _choice: first):
        with tuned.deciding(lambda _choice: second):
            assert shrink_choice() is second
        with tuned.deciding(lambda _choice: None):
            assert shrink_choice() == reduction_tuning.shrink_config(BF16, 4096, 20, 320)
        assert shrink_choice() is first
    assert shrink_choice() is not first


def test_every_choice_can_be_decided_from_outside(table):
    """Before table and rule; None leaves it to them. Each kernel names its sizes as the table does."""
    table(ROW)
    asked: list[tuned.Choice] = []
    with tuned.deciding(asked.append):
        assert asdict(shrink_choice(3000)) == SHRINK
        tuning.linear_choice(H200, BF16, 4096, 1280, 1280, False, 80, 128, True)
        one_pass_tuning.one_pass_choice(H200, BF16, 4096, (8, 8), (160, 160), True, False, True)
        reduction_tuning.mix_choice(H200, BF16, 4096, 8, 8)
        reduction_tuning.reduce_choice(H200, BF16, 4096, 20, 320)
        bottleneck_tuning.bottleneck_choice(H200, BF16, BF16, 4096, 640, 160, 640)
    assert {choice.kernel for choice in asked} <= set(tuned.KEYS)
    assert asked[0].key == KEY
    assert asked[0].values == (BF16, 3000, 20, 320)
    for choice in asked:
        assert list(choice.key) == list(tuned.KEYS[choice.kernel])
    other = reduction_tuning.ShrinkConfig(16, 16, 16, 1, 320, 4, 2)
    with tuned.deciding(lambda choice: other):
        assert shrink_choice() is other
    assert asdict(shrink_choice()) == SHRINK


@pytest.mark.parametrize("capability", tuning.SHARED_BYTES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_every_candidate_of_a_rule_can_run(capability, dtype):
    """Of the case list's sizes, on every architecture; the rule takes the one of the least predicted time."""
    architecture = Architecture(capability, 100)
    for tokens, n, k in LAYERS.values():
        shrinks = list(reduction_tuning.shrink_candidates(dtype, tokens, 80, k))
        reduces = list(reduction_tuning.reduce_candidates(dtype, tokens, 20, n))
        linears = tuning.linear_candidates(architecture, dtype, 80, 128, capability >= 90)
        for config in (*shrinks, *reduces, *linears, *reduction_tuning.mix_candidates(dtype, n // 64, 8)):
            assert config.reasons(architecture, dtype) == []
        assert reduction_tuning.shrink_config(dtype, tokens, 80, k) in shrinks
        assert reduction_tuning.reduce_config(dtype, tokens, 20, n) in reduces
        for config in shrinks:
            assert (config.split - 1) * config.k_per_split < k <= config.split * config.k_per_split
            assert config.k_per_split % config.block_k == 0
    for case in BOTTLENECKS.values():
        sizes = (dtype, dtype, case.tokens, case.in_features, case.width, case.out_features)
        configs = list(bottleneck_tuning.bottleneck_candidates(architecture, *sizes))
        assert bottleneck_tuning.bottleneck_config(architecture, *sizes) in configs
        for config in configs:
            assert config.reasons(architecture, dtype, dtype) == []


def test_sums_have_one_order_on_every_machine():
    """Without rows of the table, what splits a sum depends on sizes and dtype alone."""
    for architecture in (Architecture(80, 108, "A"), Architecture(120, 170, "B")):
        assert reduction_tuning.shrink_choice(
            architecture, BF16, 256, 80, 5120
        ) == reduction_tuning.shrink_config(BF16, 256, 80, 5120)
        assert reduction_tuning.reduce_choice(
            architecture, BF16, 4096, 20, 320
        ) == reduction_tuning.reduce_config(BF16, 4096, 20, 320)


def test_the_linear_rule_takes_the_least_predicted_time():
    from kronafuse.ops.kernel_costs import LinearSizes, linear_us

    for tokens, n, k in LAYERS.values():
        for capability, peaks in costs.PEAKS.items():
            architecture = Architecture(capability, peaks.multiprocessors)
            candidates = tuning.linear_candidates(architecture, BF16, 80, 128, capability >= 90)
            times = [
                linear_us(architecture, BF16, LinearSizes(tokens, n, k, 80), each) for each in candidates
            ]
            chosen = tuning.linear_config(architecture, BF16, tokens, n, k, False, 80, 128, capability >= 90)
            assert chosen == candidates[times.index(min(times))]


def test_the_bottleneck_rule_predicts_for_the_gpu_at_hand():
    """Not for the reference: columns are shared among as many programs as this GPU's multiprocessors gain from."""
    others = 0
    for case, (capability, peaks) in product(BOTTLENECKS.values(), costs.PEAKS.items()):
        architecture = Architecture(capability, peaks.multiprocessors)
        values = (BF16, BF16, case.tokens, case.in_features, case.width, case.out_features)
        sizes = kernel_costs.BottleneckSizes(*values[2:])
        candidates = list(bottleneck_tuning.bottleneck_candidates(architecture, *values))

        def best(gpu: Architecture, candidates: Any = candidates, sizes: Any = sizes) -> Any:
            return min(candidates, key=lambda each: kernel_costs.bottleneck_us(gpu, BF16, BF16, sizes, each))

        assert bottleneck_tuning.bottleneck_config(architecture, *values) == best(architecture)
        others += best(architecture) != best(costs.REFERENCE)
    assert others > 0


def test_a_second_choice_costs_nothing():
    """The rule's work is done once; what is asked again comes from a cache."""
    reduction_tuning.shrink_config.cache_clear()
    for _ in range(5):
        shrink_choice()
    assert reduction_tuning.shrink_config.cache_info().misses == 1
