"""What `ptxas -v` says about kernels: registers, stack, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; bytes are per thread but for the shared ones, per block."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\w+)'")
PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def usages(text: str) -> list[Usage]:
    """Every kernel in what nvcc printed, in its order, with names as in the source."""
    found: list[Usage] = []
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", text):
        entry = ENTRY.search(block)
        if entry is None:
            continue
        properties, used = PROPERTIES.search(block), USED.search(block)
        if properties is None or used is None:
            raise ValueError(f"ptxas names {entry[1]} for sm_{entry[2]} but not what it uses:\n{block}")
        shared = SHARED.search(block)
        stack, stores, loads = (int(each) for each in properties.groups())
        found.append(
            Usage(
                kernel=entry[1],
                arch=entry[2],
                registers=int(used[1]),
                stack_bytes=stack,
                spill_store_bytes=stores,
                spill_load_bytes=loads,
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    names = demangled([each.kernel for each in found])
    return [Usage(**{**vars(each), "kernel": name}) for each, name in zip(found, names, strict=True)]


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names without return types and parameters; as they are where c++filt is missing."""
    if not names:
        return []
    try:
        done = subprocess.run(
            ["c++filt", "-p", *names], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return list(names)
    return [re.sub(r"^void |kronafuse::cuda::|\(anonymous namespace\)::", "", name) for name in done]
