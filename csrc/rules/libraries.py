"""The three libraries: which compiler makes them, with which options, into which file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import sources, toolchain
from .ninja_file import NinjaFile
from .paths import BUILD, CSRC, EMULATED, LIBRARIES
from .switches import DEFAULT_ARCHS, Switches

TARGET = "0x020b000000000000"
"""TORCH_TARGET_VERSION: torch 2.11, the oldest that the libraries load in."""

COMMON = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas",
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """One library and all that its build needs to know."""

    file: Path
    objects: tuple[Path, ...]
    ninja: NinjaFile
    archs: tuple[str, ...] = ()

    @property
    def ptx(self) -> str | None:
        """The architecture whose PTX is carried for GPUs to come."""
        return max(_plain(self.archs), key=int, default=None)

    def build(self, jobs: int, verbose: bool = False) -> None:
        """Brings the library up to date; raises BuildError with what the compilers said."""
        self.ninja.run(jobs, verbose)


def _includes() -> list[str]:
    headers = toolchain.torch().include
    api = headers / "torch" / "csrc" / "api" / "include"
    return [f"-I{CSRC}", "-isystem", str(headers), "-isystem", str(api), f"-DTORCH_TARGET_VERSION={TARGET}"]


def _link(ninja: NinjaFile, file: Path, objects: Sequence[Path], more: Sequence[str] = ()) -> None:
    """One shared library that needs libtorch_cpu and the system's libraries, and shows no symbol."""
    ninja.link(
        file,
        objects,
        [
            toolchain.cxx().path, "-shared", "-o", "$out", "$in", *more,
            f"-L{toolchain.torch().library}", "-Wl,--as-needed", "-ltorch_cpu",
            f"-Wl,-soname,{file.name}", f"-Wl,--version-script={CSRC / 'rules' / 'hidden.map'}",
            "-Wl,--no-undefined", "-Wl,--allow-shlib-undefined", "-Wl,--build-id=none",
        ],
    )  # fmt: skip


def cpu(folder: Path = BUILD / "cpu") -> Library:
    """libkronafuse_cpu.so: g++, kernels once for each instruction set."""
    cxx, ninja = toolchain.cxx(), NinjaFile(folder)
    objects = []
    for unit in sources.cpu_units(cxx.x86):
        level = [f"-DKRONAFUSE_LEVEL={unit.level}", *sources.LEVELS[unit.level]] if unit.level else []
        obj = folder / unit.name
        optimised = ["-O3" if level else "-O2", *COMMON, *level]
        ninja.compile(
            obj,
            unit.source,
            [cxx.path, *optimised, *_includes(), "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"],
        )
        objects.append(obj)
    file = folder / "libkronafuse_cpu.so"
    _link(ninja, file, objects)
    return Library(file, tuple(objects), ninja)


def emulated(folder: Path = EMULATED, only: str = "") -> Library:
    """libkronafuse_emulated.so: the CUDA sources compiled for the host, every thread of a block a fiber.

    only: a pattern that paths under csrc must contain, for work on one kernel while another does not compile
    """
    cxx, ninja = toolchain.cxx(), NinjaFile(folder)
    objects = []
    for unit in sources.emulated_units():
        if not re.search(only, str(unit.source.relative_to(CSRC))):
            continue
        obj = folder / unit.name
        command = [
            cxx.path,
            "-O1",
            "-g1",
            *COMMON,
            "-DKRONAFUSE_EMULATED",
            *_includes(),
            "-MD",
            "-MF",
            "$out.d",
        ]
        ninja.compile(obj, unit.source, [*command, "-x", "c++", "-c", "$in", "-o", "$out"])
        objects.append(obj)
    file = folder / "libkronafuse_emulated.so"
    _link(ninja, file, objects, ["-pthread"])
    return Library(file, tuple(objects), ninja)


def cuda(switches: Switches, folder: Path | None = None) -> Library:
    """libkronafuse_cuda.so: nvcc for the architectures, the CUDA runtime linked statically and hidden."""
    cxx, nvcc = toolchain.cxx(), toolchain.nvcc()
    folder = folder or BUILD / ("cuda-one" if switches.one else "cuda")
    archs, ninja, objects = architectures(switches.archs, nvcc), NinjaFile(folder), []
    one = ["-DKRONAFUSE_ONE_INSTANCE"] if switches.one else []
    units = sources.cuda_units(archs)
    at_a_time = max(2, switches.jobs // max(1, len(units)))
    for unit in units:
        obj = folder / unit.name
        if unit.source.suffix == ".cu":
            targets = generate(archs, sources.is_specific(unit.source))
            command = [
                nvcc.path,
                *nvcc_options(cxx),
                *one,
                *targets,
                "--threads",
                str(at_a_time),
                *_includes(),
            ]
            log = folder / f"{unit.name}.ptxas"
        else:
            command = [cxx.path, "-O2", *COMMON, *one, *_includes(), "-isystem", str(nvcc.home / "include")]
            log = None
        ninja.compile(obj, unit.source, [*command, "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], log)
        objects.append(obj)
    file = folder / "libkronafuse_cuda.so"
    runtime = [
        "-L",
        str(nvcc.home / "lib64"),
        "-L",
        str(nvcc.home / "lib"),
        "-lcudart_static",
        "-lrt",
        "-lpthread",
        "-ldl",
    ]
    _link(ninja, file, objects, runtime)
    return Library(file, tuple(objects), ninja, archs)


def nvcc_options(cxx: toolchain.Cxx) -> list[str]:
    """What every .cu file is compiled with; ptxas says what each kernel takes."""
    return [
        "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-ccbin", cxx.path,
        "-Xcompiler", "-fPIC,-fvisibility=hidden",
    ]  # fmt: skip


def architectures(asked: tuple[str, ...] | None, nvcc: toolchain.Nvcc) -> tuple[str, ...]:
    """The asked ones, each of which nvcc must know, or those of the defaults that it knows."""
    if asked is None:
        return tuple(arch for arch in DEFAULT_ARCHS if arch.rstrip("a") in nvcc.archs)
    unknown = [arch for arch in asked if arch.rstrip("a") not in nvcc.archs]
    if unknown:
        raise toolchain.Missing(
            f"nvcc {nvcc.version} does not know {', '.join(unknown)} of KRONAFUSE_CUDA_ARCHS; "
            f"it knows {', '.join(nvcc.archs)}"
        )
    if not _plain(asked):
        raise toolchain.Missing(
            f"KRONAFUSE_CUDA_ARCHS must name an architecture beside {', '.join(asked)}: most kernels are plain ones"
        )
    return asked


def generate(archs: tuple[str, ...], specific: bool) -> list[str]:
    """nvcc's -gencode options: machine code for each architecture, and PTX of the newest for those to come."""
    if specific:
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    plain = sorted(_plain(archs), key=int)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in plain]
    return [*codes, f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}"]


def _plain(archs: Sequence[str]) -> list[str]:
    return [arch for arch in archs if arch.isdecimal()]


def install(library: Library, folder: Path = LIBRARIES) -> Path:
    """The library's copy in the package, replaced at once for whoever loads it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    target, scratch = folder / library.file.name, folder / f".{library.file.name}.{os.getpid()}"
    try:
        shutil.copyfile(library.file, scratch)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return target
