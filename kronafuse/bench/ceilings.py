"""What this machine reaches at most: a copy of large buffers, a large square GEMM on random data, empty launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .records import Ceilings, Spread
from .timing import Call, CpuTimer, CudaTimer, Timer, interleave

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
"""Size of one buffer: far beyond any cache."""
GEMM_SIZE = {"cuda": 8192, "cpu": 1536}
"""M = N = K."""


def dtype_name(dtype: torch.dtype) -> str:
    """As in records and on the command line: float32."""
    return str(dtype).removeprefix("torch.")


def measure_ceilings(
    timer: Timer,
    dtypes: Sequence[torch.dtype],
    *,
    seconds: float = 4.0,
    copy_bytes: int | None = None,
    gemm_size: int | None = None,
) -> Ceilings:
    """Copy bandwidth, read and write counted, and GEMM rate of each dtype: the faster fifth of the rounds."""
    device = timer.device
    size_bytes = copy_bytes or COPY_BYTES[device.type]
    size = gemm_size or GEMM_SIZE[device.type]
    part = seconds / (2 + len(dtypes))
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    copy = _spread(timer, partial(target.copy_, source), part)
    del source, target
    launch_us = _launch_us(timer, part)
    # Last, so that clocks that are read now are those of a busy GPU.
    rates = {dtype_name(dtype): _gemm_rate(timer, dtype, size, part) for dtype in dtypes}
    return Ceilings(1e6 * moved / copy.low, rates, launch_us)


def _launch_us(timer: Timer, seconds: float) -> float | None:
    """Of the smallest kernel, within a graph of many; None where nothing is launched."""
    if timer.device.type != "cuda":
        return None
    one = torch.zeros(1, device=timer.device)
    return _spread(timer, partial(one.add_, 1.0), seconds).low


def _gemm_rate(timer: Timer, dtype: torch.dtype, size: int, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    spread = _spread(timer, lambda: torch.mm(left, right, out=out), seconds)
    return 1e6 * 2 * size**3 / spread.low


def _spread(timer: Timer, call: Call, seconds: float) -> Spread:
    """Time of one call, the only arm."""
    if isinstance(timer, CudaTimer):
        timer.warm_up([call])
        return timer.device_times({"ceiling": [call]}, seconds)[0]["ceiling"]
    assert isinstance(timer, CpuTimer)
    return interleave({"ceiling": call}, seconds, clock=timer.clock)["ceiling"]
