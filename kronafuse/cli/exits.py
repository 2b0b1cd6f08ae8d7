"""Exit codes and messages, decided in one place for every command."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from ..train.interrupt import Interrupted, termination_raises
from . import INTERRUPTED, end_of_imports

MISSED, USAGE, STOPPED = 1, 2, 128
"""Exit codes: a result that misses its target, a call or a machine that cannot work; `STOPPED` plus the number of
the signal that ended the command, as `INTERRUPTED` after Ctrl-C."""

TRACEBACK = "KRONAFUSE_TRACEBACK"
"""Environment variable: "1" shows where an error was raised, beside its message."""

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError)
"""What the package raises for wrong input, absent libraries and a machine that cannot go on."""


class Missed(Exception):
    """The command ran, and its result misses what it promises."""


def reported(command: Callable[..., Any]) -> Callable[..., None]:
    """`command` with its errors as a message on stderr and an exit code; other exceptions are bugs.

    SIGTERM ends it as Ctrl-C does: what it opened is closed, and the processes that it started are ended.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        end_of_imports()
        try:
            with termination_raises():
                command(*arguments, **options)
        except Missed as error:
            raise _exit(MISSED, error) from error
        except USER_ERRORS as error:
            raise _exit(USAGE, error) from error
        except Interrupted as error:
            raise _exit(STOPPED + error.number, error) from error
        except KeyboardInterrupt as error:
            raise _exit(INTERRUPTED, error) from error

    return run


def _exit(code: int, error: BaseException) -> typer.Exit:
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    print(f"kronafuse: {error}" if str(error) else "kronafuse: interrupted", file=sys.stderr)
    return typer.Exit(code)
