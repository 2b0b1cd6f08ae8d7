"""How Triton kernels are launched, on the device of their tensors; or recorded, to be compiled without a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Architecture:
    """Compute capability as 90 for sm_90, the number of multiprocessors, and the GPU's name where there is one."""

    capability: int
    multiprocessors: int
    name: str = ""


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
    """Within it this thread's kernels are recorded instead of run, as they would run on `architecture`.

    Tensors may be on meta; a backward that autograd runs on another device than the CPU has a thread of its own.
    """
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
    capability = 10 * properties.major + properties.minor
    return Architecture(capability, properties.multi_processor_count, properties.name)


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
    """Runs `programs` programs of the kernel, in one grid dimension: the others end at 65,535.

    Arguments, then constants, are quickest in the order of the kernel's parameters.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, programs, arguments, constants, warps, stages))
        return
    values = positional(kernel, arguments, constants)
    if device.type == "cuda":
        current = torch.cuda.current_device()
        if device.index not in (None, current):
            with torch.cuda.device(device):
                bind_context(device.index)
                kernel[(programs,)](*values, num_warps=warps, num_stages=stages, **OPTIONS)
            return
        bind_context(current)
    kernel[(programs,)](*values, num_warps=warps, num_stages=stages, **OPTIONS)


class _Bound(threading.local):
    """The CUDA devices whose contexts `bind_context` has made current on this thread."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()


def bind_context(current: int) -> None:
    """Make the context of the current CUDA device current on this thread too, once for each thread and device.

    A thread that has called nothing of CUDA yet has a current device, 0, but no context: autograd's, for one, if a
    backward begins with a kernel of ours. Triton encodes the tensor maps of a descriptor launch before it looks for a
    context, and that encoding fails without one.
    """
    if current not in _bound.devices:
        # It calls CUDA for the device that is current already, too, and CUDA binds the context then.
        torch.cuda.set_device(current)
        _bound.devices.add(current)


def positional(kernel: Any, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> list[Any]:
    """The values in the order of the kernel's parameters: Triton binds 44 names in 13 µs, as many positions in 8."""
    if [*arguments, *constants] == kernel.arg_names:
        return [*arguments.values(), *constants.values()]
    named = {**arguments, **constants}
    return [named[name] for name in kernel.arg_names]
