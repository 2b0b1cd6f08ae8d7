"""What goes wrong on a CUDA device: captures that fail, and errors behind which nothing runs any more."""

from __future__ import annotations

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
