"""Commands as processes of their own: started, looked into, killed, and their descendants waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE_SECONDS = 120
"""On a machine that does other things too."""


@contextlib.contextmanager
def command(*arguments: object, installed_in: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """`kronafuse ARGUMENTS`; killed with all its descendants where the block leaves it running.

    installed_in: a folder to run the installed command in, which does not know the tests' jobs
    """
    program = [sys.executable, "-m", "kronafuse"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    if installed_in is not None:
        program = [str(Path(sys.executable).with_name("kronafuse"))]
        del environment["PYTHONPATH"]
    process = subprocess.Popen(
        [*program, *map(str, arguments)], cwd=installed_in,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            left = descendants(process.pid)
            for each in (process.pid, *left):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything printed."""
    printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, printed


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Fails where the condition does not come true in time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_SECONDS} s"
        time.sleep(0.05)


def descendants(process: int) -> set[int]:
    """Ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [process]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def alive(processes: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    running = set()
    for each in processes:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.add(each)
    return running


def name_of(process: int) -> str:
    """The process's title."""
    return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
