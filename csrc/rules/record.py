"""What was built, with what, and why something was not: build.json beside the libraries, and a table for C++."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import sources, toolchain
from .libraries import Library
from .ninja_file import locked
from .paths import BUILD, LIBRARIES
from .ptxas import Usage, usages
from .switches import Switches

NAME = "build.json"


def built(library: Library, switches: Switches) -> dict[str, Any]:
    """Entry of a library that was built."""
    cxx = toolchain.cxx()
    common = {"built": True, "compiler": cxx.version, "torch": toolchain.torch().version}
    if not library.archs:
        return {**common, "levels": list(sources.levels(cxx.x86))}
    return {
        **common,
        "nvcc": toolchain.nvcc().version,
        "archs": list(library.archs),
        "ptx": library.ptx,
        "instances": "one" if switches.one else "all",
    }


def absent(reason: str) -> dict[str, Any]:
    """Entry of a library that is not there."""
    return {"built": False, "reason": reason}


def write(entries: dict[str, dict[str, Any]], folder: Path = LIBRARIES) -> dict[str, dict[str, Any]]:
    """Puts entries for "cpu" and "cuda" into the folder's record, leaves the others as they are, returns all."""
    with locked(BUILD):
        folder.mkdir(parents=True, exist_ok=True)
        path, scratch = folder / NAME, folder / f".{NAME}.{os.getpid()}"
        known = json.loads(path.read_text()) if path.is_file() else {}
        merged = {**known, **entries}
        scratch.write_text(json.dumps(merged, indent=2) + "\n")
        os.replace(scratch, path)
        return merged


def kernel_usages(library: Library) -> list[Usage]:
    """What ptxas said of every kernel of a library; none for the CPU's."""
    logs = [obj.with_name(f"{obj.name}.ptxas") for obj in library.objects]
    return [usage for log in logs if log.is_file() for usage in usages(log.read_text())]


def write_table(path: Path, entries: dict[str, dict[str, Any]], kernels: list[Usage]) -> None:
    """The record as C++, for csrc/python/module.cpp; an unchanged file is left alone."""
    cpu, cuda = entries.get("cpu", {}), entries.get("cuda", {})
    facts = {
        "torch": cpu.get("torch") or cuda.get("torch") or "",
        "compiler": cpu.get("compiler") or cuda.get("compiler") or "",
        "levels": " ".join(cpu.get("levels", ())),
        "nvcc": cuda.get("nvcc", ""),
        "archs": " ".join(cuda.get("archs", ())),
        "ptx": cuda.get("ptx") or "",
        "instances": cuda.get("instances", ""),
    }
    rows = [
        f"{{{json.dumps(each.kernel)}, {json.dumps(each.arch)}, {each.registers}, {each.stack_bytes}, "
        f"{each.spill_store_bytes}, {each.spill_load_bytes}, {each.shared_bytes}}},"
        for each in kernels
    ]
    lines = [
        "// Written by csrc/rules/record.py.",
        "constexpr const char* build_facts[][2] = {",
        *(f"    {{{json.dumps(name)}, {json.dumps(value)}}}," for name, value in facts.items()),
        "};",
        f"constexpr int usage_count = {len(kernels)};",
        f"constexpr Usage usage_rows[{max(1, len(kernels))}] = {{",
        *(f"    {row}" for row in rows),
        "};",
    ]
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
