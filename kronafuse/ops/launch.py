"""How Triton kernels are launched, on the device of their tensors; or recorded, to be compiled without a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Architecture:
    """Compute capability as 90 for sm_90, and the number of multiprocessors."""

    capability: int
    multiprocessors: int


INTERPRETER = Architecture(80, 1)
"""What configurations are chosen for where the interpreter runs the kernels, one program after the other."""


@dataclass(frozen=True)
class Launch:
    """One kernel, the number of its programs, its arguments, its constants, and its warps and pipeline stages."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Recorder:
    """What was launched while recording, and the architecture that it was meant for."""

    architecture: Architecture
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(architecture: Architecture) -> Iterator[list[Launch]]:
    """Within it kernels are recorded instead of run, as they would run on `architecture`; tensors may be on meta."""
    recorder = Recorder(architecture)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def architecture_of(device: torch.device) -> Architecture:
    """The architecture that kernels on this device are configured for."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.architecture
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_architecture(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # Untested: the tiles with the least shared memory, and pointers.
        return Architecture(86, properties.multi_processor_count)
    return Architecture(10 * properties.major + properties.minor, properties.multi_processor_count)


OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every kernel. Products fuse with sums: Triton's default is about to change."""


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
) -> None:
    """Runs `programs` programs of the kernel, in one grid dimension: the others end at 65,535."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, programs, arguments, constants, warps, stages))
    elif device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments, **constants, num_warps=warps, num_stages=stages, **OPTIONS)
    else:
        kernel[(programs,)](**arguments, **constants, num_warps=warps, num_stages=stages, **OPTIONS)
