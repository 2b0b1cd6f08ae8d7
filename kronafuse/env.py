"""What this machine and this process offer: looked up once, imported never before it is needed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from functools import cache

import torch

TRITON_INTERPRET = "TRITON_INTERPRET"
"""Environment variable under which Triton runs kernels on the CPU, one NumPy operation at a time."""
EMULATED = "KRONAFUSE_EMULATED"
"""Environment variable under which the CUDA kernels, compiled for the host, serve CPU tensors."""


@cache
def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_extra(*extras: str) -> str:
    """How one of these extras is installed, as the end of a message: the package's name is not on an index."""
    commands = " or ".join(f'pip install ".[{extra}]"' for extra in extras)
    return f"install with: {commands} in a clone of kronafuse's repository"


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None


@cache
def triton_interprets() -> bool:
    """Whether kernels run in Triton's interpreter: read once, as Triton does when a kernel is defined."""
    return os.environ.get(TRITON_INTERPRET, "0") == "1"


def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run kernels with the installed NumPy, or None."""
    triton, numpy = package_version("triton"), package_version("numpy")
    if numpy is None:
        return "Triton's interpreter needs NumPy, which is not installed"
    if triton is not None and _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} needs NumPy before 2.4, and {numpy} is installed "
            "(pip install 'numpy<2.4', or Triton 3.7 or later)"
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


@cache
def emulates_cuda() -> bool:
    """Whether `impl="cuda"` serves CPU tensors by emulation: read once."""
    return os.environ.get(EMULATED, "0") == "1"


@cache
def cuda_capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device, as (9, 0)."""
    return torch.cuda.get_device_capability(index)


@cache
def cuda_driver() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver knows, as (13, 0); None without a driver.

    The driver's own library is asked: torch 2.11 to 2.15 do not tell it.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
