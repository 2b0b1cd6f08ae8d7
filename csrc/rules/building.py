"""What an installation builds: each library that its switch and the tools at hand allow, and the record of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import libraries, record, toolchain
from .ninja_file import BuildError
from .paths import BUILD, LIBRARIES
from .switches import BUILD_CPU, BUILD_CUDA, Switches

NAMES = {"cpu": "libkronafuse_cpu.so", "cuda": "libkronafuse_cuda.so"}
TABLE = "build_record.inc"
"""The record as C++ that csrc/python/module.cpp includes."""


def record_folder(libraries_folder: Path) -> Path:
    """Where the TABLE of libraries in this folder lies; a wheel's is not that of the tree."""
    return BUILD / "record" / ("tree" if libraries_folder == LIBRARIES else "wheel")


def refusal(key: str, switches: Switches) -> str | None:
    """Why a library ("cpu" or "cuda") is not even tried; None where everything it needs is here."""
    if (switches.cpu if key == "cpu" else switches.cuda) == "0":
        return f"{BUILD_CPU if key == 'cpu' else BUILD_CUDA} was 0"
    try:
        toolchain.cxx()
        if key == "cuda":
            libraries.architectures(switches.archs, toolchain.nvcc())
        toolchain.torch()
        toolchain.ninja()
    except toolchain.Missing as missing:
        return str(missing)
    return None


def build(folder: Path, switches: Switches) -> None:
    """Builds both libraries into a folder, says what came of each and records it there.

    Raises BuildError where a library that was asked for with "1" cannot be built. With "auto" a library that fails
    is left out, and the record, `kronafuse doctor` and the operators' own errors give the reason.
    """
    entries, kernels = {}, []
    asked = {"cpu": switches.cpu, "cuda": switches.cuda}
    reasons = {key: refusal(key, switches) for key in NAMES}
    for key, reason in reasons.items():
        if reason is not None and asked[key] == "1":
            raise BuildError(refused(key, reason))
    for key, reason in reasons.items():
        if reason is None:
            try:
                library = build_one(key, switches, folder)
            except BuildError as error:
                print(error, flush=True)
                reason = f"it did not compile: {error.brief}"
            else:
                entries[key] = record.built(library, switches)
                kernels += record.kernel_usages(library)
        if reason is not None:
            if asked[key] == "1":
                raise BuildError(refused(key, reason))
            (folder / NAMES[key]).unlink(missing_ok=True)
            entries[key] = record.absent(reason)
        print(f"kronafuse: {NAMES[key]} {described(entries[key])}", flush=True)
    record.write(entries, folder)
    record.write_table(record_folder(folder) / TABLE, entries, kernels)


def refused(key: str, reason: str) -> str:
    return f"{NAMES[key]} was asked for and cannot be built: {reason}"


def build_one(key: str, switches: Switches, folder: Path, verbose: bool = False) -> libraries.Library:
    """Builds a library and puts it into a folder; raises BuildError, or Missing for a tool."""
    library = libraries.cpu() if key == "cpu" else libraries.cuda(switches)
    library.build(switches.jobs, verbose)
    libraries.install(library, folder)
    return library


def described(entry: dict[str, Any]) -> str:
    """The rest of a sentence about a library."""
    if not entry["built"]:
        return f"is not built: {entry['reason']}"
    if "nvcc" in entry:
        return f"is built for {' '.join(entry['archs'])} by nvcc {entry['nvcc']}"
    return f"is built for {' '.join(entry['levels'])} by {entry['compiler']}"
