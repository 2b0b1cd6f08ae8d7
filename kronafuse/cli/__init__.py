"""The `kronafuse` command. Its libraries come with the `train` and `bench` extras and are imported at first use."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from types import FrameType

from ..train.streams import replace_unprintable

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main() -> None:
    """Runs the command line.

    Exit codes: 0, 1 (a target missed), 2 (a wrong call), 130 (Ctrl-C), 143 (SIGTERM). Characters that the
    terminal cannot print are replaced.
    """
    replace_unprintable()
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        from ..env import install_extra

        print(
            f"kronafuse: the command line needs {' and '.join(missing)}; {install_extra('train', 'bench')}",
            file=sys.stderr,
        )
        sys.exit(2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    try:
        from .app import app

        app(prog_name="kronafuse")
    finally:
        end_of_imports()


def end_of_imports() -> None:
    """Ctrl-C raises KeyboardInterrupt again: a command begins, which has something to close."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_at_once(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C while libraries are imported: nothing is open, and an exception would come out of their middle."""
    print("kronafuse: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
