"""The compilers and tools at hand: found once, named with their versions, or missing for a stated reason."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


class Missing(Exception):
    """A tool that a library needs is not here; the message says which."""


def output(*command: str | Path) -> str:
    """What a command prints; raises subprocess.CalledProcessError or OSError where it fails."""
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout.strip()


@dataclass(frozen=True)
class Cxx:
    """A C++ compiler that takes g++'s options."""

    path: str
    version: str

    @property
    def x86(self) -> bool:
        """Whether it compiles for x86-64, where there are AVX2 and AVX-512 levels."""
        return platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Nvcc:
    """nvcc, and the capabilities it compiles for, as ("80", "90")."""

    path: str
    version: str
    archs: tuple[str, ...]

    home: Path
    """The toolkit's folder; nvcc may be reached through a link or a script elsewhere."""


@cache
def cxx() -> Cxx:
    """The compiler named by CXX, else g++, else clang++."""
    if sys.platform != "linux":
        raise Missing(f"native libraries are built on Linux only; this is {sys.platform}")
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++"):
        path = shutil.which(name)
        if path:
            try:
                return Cxx(path, output(path, "--version").splitlines()[0])
            except (OSError, subprocess.CalledProcessError) as error:
                raise Missing(f"the C++ compiler {path} does not run: {error}") from error
    raise Missing(f"no C++ compiler was found ({named or 'g++, clang++'} on PATH; CXX names another)")


OLDEST_NVCC = (12, 5)
"""The first whose run time finds the driver's functions by version (cudaGetDriverEntryPointByVersion)."""


@cache
def nvcc() -> Nvcc:
    """The nvcc of CUDA_HOME where that is set, else the one on PATH, else the one under /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (f"{home}/bin/nvcc",) if home else ("nvcc", "/usr/local/cuda/bin/nvcc")
    path = next((found for place in places if (found := shutil.which(place))), None)
    if path is None:
        raise Missing(f"nvcc was not found ({places[0] if home else 'CUDA_HOME, PATH, /usr/local/cuda'})")
    try:
        release = re.search(r"V(\d+\.\d+\.\d+)", output(path, "--version"))
        listed = output(path, "--list-gpu-arch")
        steps = [path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        dry_run = subprocess.run(steps, capture_output=True, text=True, check=False).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"{path} does not run: {error}") from error
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.M)
    if release is None or top is None:
        raise Missing(f"{path} does not say its version or where its toolkit lies")
    if tuple(int(part) for part in release[1].split(".")[:2]) < OLDEST_NVCC:
        raise Missing(f"nvcc must be 12.5 or later; {path} is {release[1]}")
    archs = tuple(re.findall(r"compute_(\d+)", listed))
    return Nvcc(path, release[1], archs, Path(top[1]).resolve())


@cache
def ninja() -> str:
    """ninja of the environment, else the one on PATH, where pip's build isolation has its own."""
    places = [str(Path(sys.executable).parent / "ninja")]
    if importlib.util.find_spec("ninja") is not None:
        from ninja import BIN_DIR  # pyright: ignore[reportMissingImports]

        places += [f"{BIN_DIR}/ninja"] if BIN_DIR else []  # that of `pip install --user`
    places.append("ninja")
    path = next((found for place in places if (found := shutil.which(place))), None)
    if path is None:
        raise Missing("ninja was not found: pip install ninja")
    return path


@dataclass(frozen=True)
class Torch:
    """The torch whose headers are compiled against."""

    folder: Path
    version: str

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def library(self) -> Path:
        return self.folder / "lib"


@cache
def torch() -> Torch:
    """torch of the running Python, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Missing(f"torch is not installed where the build runs ({sys.executable})")
    folder = Path(spec.origin).parent
    found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    version = found[1] if found else "0"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        raise Missing(f"torch must be 2.11 or later to build against; this one is {version}")
    return Torch(folder, version)
