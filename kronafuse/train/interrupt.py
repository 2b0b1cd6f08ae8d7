"""Ctrl-C without loss: the step is finished and saved before the run ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed and everything that was asked to be saved has been."""


class InterruptFlag:
    """While open, the first SIGINT sets `raised` and the second raises KeyboardInterrupt as usual.

    A save that is running when Ctrl-C comes is finished; the second Ctrl-C breaks it, and the files before it
    stay whole. The handler that was there before comes back at the end.
    """

    def __init__(self) -> None:
        self.raised = False
        self._before: Any = None

    def __enter__(self) -> InterruptFlag:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True


def ignore_in_worker(_worker: int) -> None:
    """For processes that read images: Ctrl-C is the main process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
