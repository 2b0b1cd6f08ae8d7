"""What compiled libraries contain, read with cuobjdump and nvdisasm of the Triton wheel and with nm and readelf."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from csrc.rules.ptxas import demangled
from kronafuse import native


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture; registers, stack and local bytes are per thread."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


ABSENT = re.compile(r"was 0$|^no C\+\+ compiler was found|^nvcc was not found|on Linux only")
"""Reasons for which a machine lawfully has no library."""


def built_library(key: str) -> Path:
    """The library "cpu" or "cuda" in the package; skips where it was not to be built, fails where its build failed."""
    entry = native.build_record().get(key, {})
    if not entry.get("built"):
        reason = entry.get("reason")
        assert reason is None or ABSENT.search(reason), reason
        pytest.skip(reason or "nothing was built: make native")
    return native.LIBRARIES / (native.CPU if key == "cpu" else native.CUDA)


def cuda_tool(name: str) -> str:
    """Path of a CUDA binary tool; skips the test where neither the Triton wheel nor PATH has it."""
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither in the Triton wheel nor on PATH")
    return found


def output(*command: str | Path) -> str:
    """What a tool prints; fails with what it said instead."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def resources(library: Path) -> list[Resources]:
    """Every kernel of every architecture in a library."""
    text = output(cuda_tool("cuobjdump"), "--dump-resource-usage", library)
    rows: list[tuple[str, str, str]] = []
    arch = ""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        named = re.match(r"arch = sm_(\w+)", line)
        if named:
            arch = named[1]
        function = re.match(r"\s*Function (\S+):$", line)
        if function:
            rows.append((function[1], arch, lines[index + 1]))
    names = demangled([row[0] for row in rows])
    return [
        Resources(
            name,
            arch,
            _value("REG", text),
            _value("STACK", text),
            _value("LOCAL", text),
            _value("SHARED", text),
        )
        for name, (_, arch, text) in zip(names, rows, strict=True)
    ]


def _value(name: str, text: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    assert found, f"{name} is not in {text!r}"
    return int(found[1])


def sass(library: Path, arch: str, pattern: str) -> dict[str, str]:
    """Kernel -> its machine code for sm_`arch`, of kernels whose mangled names the pattern finds."""
    text = output(cuda_tool("cuobjdump"), "--dump-sass", "--gpu-architecture", f"sm_{arch}", library)
    found = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name, _, code = part.partition("\n")
        if re.search(pattern, name):
            found[name.strip()] = code
    return found


def instructions(code: str) -> list[str]:
    """Mnemonics with their modifiers and operands, in order, without addresses and encodings."""
    return [each.strip() for each in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", code)]


def loops(code: str) -> list[list[str]]:
    """The instructions between each backward branch and its target, smaller loops first."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", code)
    position = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    found = []
    for index, (address, text) in enumerate(lines):
        branch = re.search(r"\bBRA(?:\.\w+)*\s.*?(?:`\([^)]*\)|0x([0-9a-f]+))", text)
        if branch and branch[1] and int(branch[1], 16) < int(address, 16):
            found.append([each for _, each in lines[position[int(branch[1], 16)] : index + 1]])
    return sorted(found, key=len)


def undefined_symbols(library: Path) -> set[str]:
    """Names that a library takes from others, without their versions."""
    lines = output(_binutil("nm"), "-D", "--undefined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def exported_symbols(library: Path) -> set[str]:
    """Names that a library shows others."""
    lines = output(_binutil("nm"), "-D", "--defined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def needed_libraries(library: Path) -> set[str]:
    """Names of the libraries that must be loaded with this one."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output(_binutil("readelf"), "-d", library)))


def _binutil(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here")
    return found
