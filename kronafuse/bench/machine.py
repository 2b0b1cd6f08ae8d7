"""What a run says of the machine and the versions: enough to repeat it, without the machine's name or a path."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path, PurePath

import torch

from ..env import package_version
from ..ops import tuned
from ..version import VERSION
from .records import Clocks, Cpu, Gpu, Machine

COMMIT = "KRONAFUSE_COMMIT"
"""Environment variable that names the commit of a copy without a repository."""
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
"""What nvidia-smi is asked for, in the order of `Clocks`."""


def describe(command: Sequence[str] | None = None) -> Machine:
    """The machine as it is now; `command` is this process's own where None."""
    commit, dirty = _commit()
    return Machine(
        commit=commit,
        dirty=dirty,
        kronafuse=VERSION,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=package_version("triton"),
        peft=package_version("peft"),
        lycoris=package_version("lycoris-lora"),
        diffusers=package_version("diffusers"),
        gpu=_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else None,
        cpu=Cpu(
            _cpu_brand(), _cores(), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(),
            last_level_cache_bytes(),
        ),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command=command_text(sys.argv if command is None else command),
        tuned=tuned_digest(),
    )  # fmt: skip


def tuned_digest() -> str:
    """Which tuned table the kernels read: the beginning of the SHA-256 of its rows, or "empty"."""
    rows = sorted(json.dumps(asdict(row), sort_keys=True) for row in tuned.read(tuned.in_use()))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:12] if rows else "empty"


def with_clocks(machine: Machine) -> Machine:
    """The machine with its clocks as they are now; called behind a large GEMM, not on an idle GPU."""
    if machine.gpu is None:
        return machine
    return replace(machine, gpu=_gpu(torch.cuda.current_device()))


def command_text(words: Sequence[str]) -> str:
    """The command as one line; absolute paths are cut to their last part."""
    program, *rest = words or ("",)
    name = PurePath(program).name
    name = "kronafuse" if name in ("__main__.py", "") else name
    return shlex.join([name, *(PurePath(each).name if os.path.isabs(each) else each for each in rest)])


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache that the first core sees; None where the system does not say."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = []
    for entry in folder.glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", entry.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])
    return max(sizes, default=None)


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the source tree that this package lies in, and whether it was changed since.

    Where there is no repository: what COMMIT says, if anything.
    """
    root = Path(__file__).parents[2]
    if shutil.which("git") is None or not (root / ".git").exists():
        return os.environ.get(COMMIT) or None, None
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changes = _output(["git", "-C", str(root), "status", "--porcelain"])
    return commit or None, None if changes is None else bool(changes)


def _output(command: Sequence[str]) -> str | None:
    """What a command prints; None where it fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_brand() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    answer = _nvidia_smi(str(getattr(properties, "uuid", index)))
    return Gpu(
        properties.name,
        f"{properties.major}.{properties.minor}",
        properties.multi_processor_count,
        properties.total_memory,
        properties.L2_cache_size,
        torch.version.cuda,
        answer[0] if answer else None,
        clocks_of(answer[1:]) if answer else None,
    )


def _nvidia_smi(device: str) -> list[str] | None:
    """Driver version and clocks, read only; None where nvidia-smi is absent or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    name = device if device.isdecimal() or device.startswith("GPU-") else f"GPU-{device}"
    query = f"--query-gpu={','.join(('driver_version', *CLOCKS))}"
    text = _output(["nvidia-smi", f"--id={name}", query, "--format=csv,noheader,nounits"])
    return [each.strip() for each in text.splitlines()[0].split(",")] if text else None


def clocks_of(answer: Sequence[str]) -> Clocks:
    """Clocks from nvidia-smi's answer; None for what it does not say."""
    sm, sm_max, memory, memory_max = (int(each) if each.isdecimal() else None for each in answer)
    return Clocks(sm, sm_max, memory, memory_max)
