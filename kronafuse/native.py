"""The compiled libraries: what was built, why something cannot run here, and the operators, loaded at first use."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import env

LIBRARIES = Path(__file__).parent / "lib"
CPU = "libkronafuse_cpu.so"
CUDA = "libkronafuse_cuda.so"
RECORD = "build.json"
EMULATED = Path(__file__).parents[1] / ".cache" / "emulated" / "libkronafuse_emulated.so"
"""The CUDA kernels compiled for the host, in a clone: `python -m csrc.rules emulated` makes it."""


@cache
def build_record() -> dict[str, Any]:
    """What the build wrote: "torch", and for "cpu" and "cuda" whether "built", why not ("reason"), and with what."""
    path = LIBRARIES / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def cpu_reasons() -> list[str]:
    """Why the CPU library cannot run here; empty means that it can, and that it is loaded."""
    return list(_library_reasons("cpu", CPU))


def cuda_reasons(device: torch.device) -> list[str]:
    """Why the CUDA library cannot serve tensors of this device; empty means that it can, and that it is loaded."""
    if device.type == "cuda":
        return list(_cuda_device_reasons(device.index if device.index is not None else -1))
    if device.type == "cpu" and env.emulates_cuda():
        return list(_load(EMULATED)) if EMULATED.is_file() else [_unbuilt_emulation()]
    return [f"its kernels run on CUDA devices, and the tensors are on {device.type}", *_unbuilt("cuda", CUDA)]


def cpu() -> Any:
    """torch.ops.kronafuse_cpu; raises RuntimeError with the reasons where it cannot run."""
    _raise("CPU", cpu_reasons())
    return torch.ops.kronafuse_cpu


def cuda(device: torch.device) -> Any:
    """torch.ops.kronafuse_cuda, or kronafuse_emulated for CPU tensors; raises RuntimeError with the reasons."""
    _raise("CUDA", cuda_reasons(device))
    return torch.ops.kronafuse_cuda if device.type == "cuda" else torch.ops.kronafuse_emulated


def emulated() -> Any:
    """torch.ops.kronafuse_emulated: the CUDA kernels on CPU tensors, for tests of the kernels themselves."""
    _raise("emulated CUDA", list(_load(EMULATED)) if EMULATED.is_file() else [_unbuilt_emulation()])
    return torch.ops.kronafuse_emulated


def runs_on(archs: list[str], ptx: str | None, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a device of this capability.

    Machine code runs on its own major version from its own minor one on, PTX on everything not older; code for
    sm_90a accompanies the plain kernels and does not stand for them.
    """
    plain = [divmod(int(arch), 10) for arch in archs if arch.isdecimal()]
    machine_code = any(major == capability[0] and minor <= capability[1] for major, minor in plain)
    return machine_code or (ptx is not None and divmod(int(ptx), 10) <= capability)


@cache
def _library_reasons(key: str, name: str) -> tuple[str, ...]:
    return _unbuilt(key, name) or _load(LIBRARIES / name)


@cache
def _cuda_device_reasons(index: int) -> tuple[str, ...]:
    if torch.version.cuda is None:
        return ("torch was built without CUDA",)
    unbuilt = _unbuilt("cuda", CUDA)
    if unbuilt:
        return unbuilt
    built = build_record().get("cuda", {})
    capability = env.cuda_capability(index if index >= 0 else torch.cuda.current_device())
    if built and not runs_on(built["archs"], built["ptx"], capability):
        return (
            f"{CUDA} was built for {', '.join(built['archs'])} (KRONAFUSE_CUDA_ARCHS), and this device is "
            f"sm_{capability[0]}{capability[1]}",
        )
    if built:
        needed, driver = int(built["nvcc"].split(".")[0]), env.cuda_driver()
        if driver is not None and driver[0] < needed:
            return (
                f"{CUDA} was built by CUDA {built['nvcc']}, whose run time needs a driver of CUDA {needed} or later; "
                f"this one's is {driver[0]}.{driver[1]}",
            )
    return _load(LIBRARIES / CUDA)


def _unbuilt(key: str, name: str) -> tuple[str, ...]:
    """Why a library is not in the package; empty where it is."""
    if (LIBRARIES / name).is_file():
        return ()
    reason = build_record().get(key, {}).get("reason")
    return (f"{name} is not built: {reason or 'kronafuse was not installed by its setup.py'}",)


def _unbuilt_emulation() -> str:
    return f"{EMULATED} is not built: run python -m csrc.rules emulated in a clone"


@cache
def _load(path: Path) -> tuple[str, ...]:
    """Loads a library, whose operators register themselves; the reason where that fails."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return (f"{path.name} does not load: {error}",)
    return ()


def _raise(what: str, reasons: list[str]) -> None:
    if reasons:
        raise RuntimeError("\n    ".join([f"kronafuse: the {what} kernels cannot run here:", *reasons]))
