"""What goes wrong on a CUDA device: captures that fail, and errors behind which nothing runs any more."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

CUDA_ERRORS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")
"""One of them is in the text of every error of the device, whichever library reports it."""
FATAL = (
    "illegal memory access", "illegal address", "misaligned address", "illegal instruction",
    "invalid program counter", "invalid address space", "hardware stack error", "device-side assert",
    "unspecified launch failure", "launch timed out", "uncorrectable",
)  # fmt: skip
"""What the device calls errors that end the context of a process; others, as of a capture, end one call."""
DEVICE_LOST = 3
"""Exit code of a run that such an error ended."""


class DeviceLostError(RuntimeError):
    """Nothing more can run on the device in this process."""


def is_fatal(error: BaseException) -> bool:
    """Whether the error says that nothing more can run on the device in this process."""
    text = str(error)
    return any(each in text for each in CUDA_ERRORS) and any(each in text for each in FATAL)


def is_lost(device: torch.device) -> bool:
    """Whether nothing more can run: behind such an error every synchronisation fails too."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def end_allocation(device: torch.device, pool: Any) -> None:
    """Ends a graph's allocations to its pool, which torch does not where ending the capture fails.

    Until then the allocator would take a capture to be under way. Where this version ended them, nothing happens.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with suppress(RuntimeError):  # it is not allocating to this pool
            end(device.index or 0, pool)
