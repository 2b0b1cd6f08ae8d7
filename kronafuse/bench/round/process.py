"""A command in a process group of its own: its output in a log, its time limited, its children ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 5.0
"""Between asking a command to stop, as Ctrl-C does, and ending it."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """How a command ended. `exit_status` is None where it was stopped."""

    exit_status: int | None
    seconds: float


def run_command(
    words: Sequence[str],
    log: Path,
    limit_seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> Ended:
    """Run a command for at most `limit_seconds`, appending what it prints to `log`.

    At the limit the whole group is interrupted, and killed `grace_seconds` later; SIGINT interrupts the command
    although this process may have been started to ignore it. Nothing of the group is left behind in any case, an
    exception that a signal raises here included. What Python prints there is UTF-8.
    """
    started = time.monotonic()
    with open(log, "ab") as output, _interruptible_children():
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(environment or {})},
        )
        try:
            status = process.wait(max(0.0, limit_seconds))
        except subprocess.TimeoutExpired:
            _signal(process.pid, signal.SIGINT)
            _wait_for_group(process, grace_seconds)
            status = None
        finally:
            _signal(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status, time.monotonic() - started)


@contextmanager
def _interruptible_children() -> Iterator[None]:
    """Processes that the block starts end on SIGINT, also where this one ignores it, as under nohup.

    A process inherits that a signal is ignored, but no handler, so that one that does nothing stands in for it.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_for_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the command has ended, or time is up."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
