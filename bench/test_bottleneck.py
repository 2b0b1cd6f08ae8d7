"""Forward, and forward and backward, of one bottleneck on this CPU beside plain torch.

    pytest bench/test_bottleneck.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

These are contributors' runs: compare the arms of one group, and only within one run. `ratio_to_chain` in a saved run
comes from turns of both arms in alternation and is what travels between machines. `chain` is two F.linear, the
activation, a multiplication by the scale and an addition; `minimal` leaves the up bias out, so that scale and residual
go through one addmm: the least that torch's own operators can do, for a smaller problem.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.testing.bottleneck import SCALE, bottleneck_chain, call
from kronafuse.testing.bottleneck_cases import CASES
from kronafuse.testing.inputs import bottleneck_inputs
from torch import Tensor

TURNS = 15
NAMES = (
    "sd15_320-width_60",
    "sd15_320-width_256",
    "sd15_640-width_60",
    "sd15_640-width_256",
    "sd15_1280-width_60",
    "sd15_1280-width_256",
    "sdxl_640-width_160",
    "dit_xl_1152-width_4",
    "sd15_context-width_60",
)
DTYPES = (torch.float32, torch.bfloat16)


def minimal(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor,
    up_bias: Tensor,
    **_: object,
) -> Tensor:
    """relu and the case's scale, without the up bias."""
    assert residual is not None
    hidden = torch.relu(torch.nn.functional.linear(x, down, down_bias))
    return torch.addmm(residual, hidden, up.t(), alpha=SCALE)


ARMS: dict[str, Callable[..., Tensor]] = {
    "chain": bottleneck_chain,
    "minimal": minimal,
    "eager": partial(bottleneck, impl="eager"),
}


def forward(arm: str, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One forward where nothing has a gradient."""
    tensors = bottleneck_inputs(CASES[name], dtype)

    def step() -> Tensor:
        with torch.no_grad():
            return call(ARMS[arm], CASES[name], tensors)

    return step


def training_step(arm: str, name: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, dx and the gradients of factors and biases."""
    tensors = {key: value.requires_grad_() for key, value in bottleneck_inputs(CASES[name], dtype).items()}
    leaves = [value for key, value in tensors.items() if arm != "minimal" or key != "up_bias"]
    dy = torch.randn(tensors["x"].shape).to(dtype)
    return lambda: torch.autograd.grad(call(ARMS[arm], CASES[name], tensors), leaves, dy)


MODES: dict[str, Callable[[str, str, torch.dtype], Callable[[], object]]] = {
    "forward": forward,
    "forward + backward": training_step,
}


def ratio(step: Callable[[], object], other: Callable[[], object]) -> float:
    """Median time of one over the other's, in alternation."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 * TURNS):
        for each, spent in zip((step, other), seconds, strict=True):
            started = time.perf_counter()
            each()
            spent.append(time.perf_counter() - started)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_bottleneck(benchmark, name, dtype, mode, arm):
    step = MODES[mode](arm, name, dtype)
    benchmark.group = f"{name}-{str(dtype).removeprefix('torch.')}, {CASES[name].tokens} tokens, {mode}"
    results = benchmark.pedantic(step, rounds=TURNS, warmup_rounds=3)
    if arm != "chain":
        benchmark.extra_info["ratio_to_chain"] = round(ratio(step, MODES[mode]("chain", name, dtype)), 3)
    assert all(torch.isfinite(each).all() for each in results)
