"""The timer and the suites on a GPU: captures, what a failed one leaves behind, and cold caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kronafuse.bench.arms import ARMS
from kronafuse.bench.arms.arm import step_of
from kronafuse.bench.ceilings import measure_ceilings
from kronafuse.bench.problems import KronProblem, Spec
from kronafuse.bench.records import Mode
from kronafuse.bench.suites import NOT_COVERED, copies_of, run_spec
from kronafuse.bench.timing import CudaTimer
from kronafuse.testing.cases import CASES

pytestmark = pytest.mark.gpu
NAMES = ("frozen", "einsum", "ours_triton")
BY_NAME = {arm.name: arm for arm in ARMS["kron_linear"]}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def spec_of(mode: Mode = "forward_backward") -> Spec:
    case = CASES["sd15_1280-krona_64x4"]
    return Spec("kron_linear", case, 1, case.tokens, torch.bfloat16, mode, device(), torch.bfloat16)


def steps_of(copies: int = 1) -> dict[str, list[Callable[[], object]]]:
    problem = spec_of().make()
    each = [problem, *(problem.copy() for _ in range(copies - 1))]
    return {name: [step_of(BY_NAME[name].build(copy), copy) for copy in each] for name in NAMES}


def test_training_steps_are_captured():
    found = CudaTimer(device()).measure(steps_of(), 1.0)
    for name in NAMES:
        timing = found[name]
        assert timing.notes == ()
        assert timing.device_us is not None
        assert timing.wall_us is not None
        assert timing.host_us is not None
        assert 0 < timing.device_us.median < 1.5 * timing.wall_us.median


def test_the_arms_behind_a_failed_capture_are_captured():
    """It synchronises, which no capture allows; allocating and capturing go on as before."""
    size = torch.randn(512, 512, device=device())

    def synchronises() -> float:
        return size.mm(size).sum().item()

    stream = torch.cuda.current_stream()
    steps = {"synchronises": [synchronises], **steps_of()}
    found = CudaTimer(device()).measure(steps, 1.0)
    assert torch.cuda.current_stream() == stream
    assert found["synchronises"].device_us is None
    assert found["synchronises"].wall_us is not None
    assert "capture failed" in found["synchronises"].notes[0]
    assert all(found[name].device_us is not None and found[name].notes == () for name in NAMES)
    assert torch.randn(8, device=device()).isfinite().all()


def test_cold_is_slower_than_warm():
    """A copy of a quarter of the L2, once in the cache and once past it."""
    timer = CudaTimer(device())
    size_bytes = timer.cold_bytes() // 8

    def call(source: torch.Tensor) -> Callable[[], object]:
        return lambda: source.sum()

    sources = [torch.randn(size_bytes // 4, device=device()) for _ in range(9)]
    assert sum(each.nbytes for each in sources) > timer.cold_bytes()
    found = timer.measure({"sum": [call(each) for each in sources]}, 1.0)["sum"]
    assert found.device_us is not None
    assert found.device_cold_us is not None
    assert found.device_cold_us.median > found.device_us.median


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_a_case_runs_whole(mode):
    timer, spec = CudaTimer(device()), spec_of(mode)
    problem = spec.make()
    assert isinstance(problem, KronProblem)
    assert copies_of(problem, timer.cold_bytes())[1] == ()
    ceilings = measure_ceilings(timer, [spec.dtype], seconds=0.5, copy_bytes=2**28, gemm_size=4096)
    rows = {row.arm: row for row in run_spec(spec, [BY_NAME[name] for name in NAMES], timer, ceilings, 0.5)}
    assert tuple(rows) == NAMES
    for row in rows.values():
        assert row.error is None or row.error.startswith(NOT_COVERED), row.error
        if row.error is None:
            assert row.device_us is not None
            assert row.device_cold_us is not None
            assert row.launches
            assert row.peak_bytes
            assert row.percent_of_floor is not None
            assert row.floor_us is not None
            assert row.percent_of_floor == pytest.approx(100 * row.floor_us / row.device_cold_us.median)
    assert rows["frozen"].error is rows["einsum"].error is None
