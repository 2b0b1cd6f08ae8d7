"""Which files a library is made of and how each is compiled: the file's place and name say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .paths import CSRC

LEVELS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ),
}  # fmt: skip
"""Instruction sets that `*_kernels.cpp` are compiled for, with the compiler's options."""

KERNELS = "_kernels.cpp"
SPECIFIC = "_sm90a.cu"
"""Files for one architecture alone, whose instructions no other has."""


@dataclass(frozen=True)
class Unit:
    """One object: a source, and what its file name adds."""

    source: Path
    level: str | None = None

    @property
    def name(self) -> str:
        """The object's name, unique within a library."""
        stem = ".".join(self.source.relative_to(CSRC).parts)
        return f"{stem}.{self.level}.o" if self.level else f"{stem}.o"


def levels(x86: bool) -> tuple[str, ...]:
    """Levels that the CPU library holds, of which it takes the best at run time."""
    return tuple(LEVELS) if x86 else ("scalar",)


def cpu_units(x86: bool) -> list[Unit]:
    """csrc/cpu: kernels once for each level, the rest once."""
    found = []
    for path in sorted((CSRC / "cpu").rglob("*.cpp")):
        found += [Unit(path, level) for level in levels(x86)] if path.name.endswith(KERNELS) else [Unit(path)]
    return found


def cuda_units(archs: tuple[str, ...]) -> list[Unit]:
    """csrc/cuda without the emulation; files for sm_90a only where it is among the architectures."""
    return [
        Unit(path)
        for path in _cuda_files()
        if "emulation" not in path.parts and (not is_specific(path) or "90a" in archs)
    ]


def emulated_units() -> list[Unit]:
    """csrc/cuda with the emulation, every file compiled for the host."""
    return [Unit(path) for path in _cuda_files()]


def is_specific(path: Path) -> bool:
    """Whether a file is compiled for sm_90a and nothing else."""
    return path.name.endswith(SPECIFIC)


def _cuda_files() -> list[Path]:
    return sorted(path for path in (CSRC / "cuda").rglob("*") if path.suffix in (".cu", ".cpp"))
