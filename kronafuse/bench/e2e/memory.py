"""Peak memory of one training step."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes to start a new maximum of the resident set."""


def allocated_bytes(device: torch.device) -> int:
    """Bytes of tensors that live on a GPU now; 0 on a CPU, where nothing counts them."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(step: Callable[[], object], device: torch.device, not_counted: int) -> tuple[int | None, str]:
    """The peak during one call of `step`, and what the figure is.

    On a GPU: allocated bytes, model included, without the `not_counted` ones that belong to other arms. On
    Linux's CPU: how far the resident set grew during the step. Elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - not_counted, "peak: allocated, model included"
    if sys.platform != "linux" or not CLEAR.exists():
        step()
        return None, "peak memory not measured: the system does not report it"
    _give_back_freed_memory()
    CLEAR.write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before), "peak: growth of the resident set in a step"


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 2**10


def _give_back_freed_memory() -> None:
    """What glibc keeps of freed memory would hide the next step's growth; other C libraries keep little."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
