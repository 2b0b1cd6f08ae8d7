"""Ctrl-C and SIGTERM without loss: the step is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what a scheduler or `kill` sends."""

WORKER_SECONDS = 30
"""How long a process that reads images outlives a SIGTERM: its main process still finishes a step."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came and everything that was asked to be saved has been; `number` is the signal's."""

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = int(number)


class InterruptFlag:
    """While open, the first SIGINT or SIGTERM sets `raised` and a second SIGINT raises KeyboardInterrupt as usual.

    A save that is running when the signal comes is finished; the second Ctrl-C breaks it, and the files before it
    stay whole. A second SIGTERM changes nothing: launchers pass on what their processes get themselves. The
    handlers that were there before come back at the end. Outside the main thread, where Python has no signals,
    nothing happens.

    number: the signal that came first
    """

    def __init__(self) -> None:
        self.raised, self.number = False, int(signal.SIGINT)
        self._pressed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            put_handler(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._pressed:
            raise KeyboardInterrupt
        self._pressed = self._pressed or number == signal.SIGINT
        if not self.raised:
            self.raised, self.number = True, number


@contextmanager
def termination_raises() -> Iterator[None]:
    """The block's first SIGTERM raises `Interrupted` in it, so that what it opened is closed; later ones do nothing.

    A SIGTERM that this process was started to ignore stays ignored. Outside the main thread nothing happens.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    came = False

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise Interrupted("stopped by SIGTERM", number)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        put_handler(signal.SIGTERM, before)


def put_handler(number: int, handler: Any) -> None:
    """Set what `signal.getsignal` returned; a handler of C code, which it returns as None, cannot be set."""
    if handler is not None:
        signal.signal(number, handler)


def ignore_in_worker(_worker: int) -> None:
    """For processes that read images: Ctrl-C and SIGTERM are the main process's to handle.

    Signals to a whole group reach them too, and a step whose images do not come cannot be finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda _number, _frame: signal.alarm(WORKER_SECONDS) and None)
