"""One process at a time in an output folder."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..formats.atomic import runs, write_json

LOCK, HOLDER = ".kronafuse.lock", ".kronafuse.lock.json"
"""The lock, which the system takes back from a process that ends however it ends, and who holds it."""

ORPHAN_SECONDS = 15.0
"""How long the children of a killed process, which inherit its lock, may take to notice and end."""


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Holds the folder for this process while the block runs; what a killed process held is free again.

    what: the command, as "train"; it begins the message

    No file stays behind. Whoever has opened the removed lock file in that moment sees that it has no name any more
    (filelock >= 3.25), and starts over.

    Raises BlockingIOError that names the process which holds the folder. Where the file system knows no locks, a
    warning says so and the block runs without one.
    """
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder, what)
    except NotImplementedError as error:
        warnings.warn(
            f"{what}: output folder {folder} is not locked against other processes: {error}", stacklevel=3
        )
        yield
        return
    try:
        write_json(folder / HOLDER, {
            "process": os.getpid(), "host": socket.gethostname(), "command": what,
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        })  # fmt: skip
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        with suppress(PermissionError):  # Windows, where filelock does it
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, folder: Path, what: str) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        holder = _holder(folder)
        if _has_ended(holder):
            try:
                lock.acquire(timeout=ORPHAN_SECONDS)
                return
            except Timeout:
                holder = _holder(folder)
        raise BlockingIOError(
            f"{what}: {_named(holder)} is at work in the output folder {folder};"
            " wait for it, stop it, or give another output folder"
        ) from error


def _holder(folder: Path) -> dict[str, Any]:
    """Return what the holder wrote; empty in the moment before it does."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    host = "" if holder.get("host") == socket.gethostname() else f" on {holder.get('host')}"
    ended = " (which has ended; a child of it runs)" if _has_ended(holder) else ""
    return (
        f"another kronafuse {holder.get('command')}, process {holder.get('process')}{host}{ended}"
        f" since {holder.get('since')},"
    )


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be gone: a process of this machine that does not exist."""
    process = holder.get("process")
    return type(process) is int and holder.get("host") == socket.gethostname() and not runs(process)
