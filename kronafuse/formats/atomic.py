"""Files and folders that are either whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".partial"
"""Ends the name of everything that is still being written."""

REPLACED_SUFFIX = ".replaced"
"""Ends the name of a folder while its successor takes its place."""


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new name in the same folder, to write to; renamed to `path` when the block ends without an error.

    After an error or an interrupt the new file is gone and what was at `path` before is untouched. The data
    is on the disk before the rename. A symbolic link at `path` keeps pointing to the file that is replaced.
    What a killed process left half-written for this `path` is removed. Raises FileNotFoundError where the
    folder does not exist, IsADirectoryError where `path` is one.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(Path(path).parent))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is there, not a file", os.fspath(path))
    remove_stale(target)
    beside = name_beside(target)
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder; it becomes `path` when the block ends, and is removed when the block raises.

    A folder that was there before stays whole until then, and comes back if anything stops the renames.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    partial, replaced = name_beside(path), path.with_name(f".{path.name}{REPLACED_SUFFIX}")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
    finally:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def name_beside(target: Path) -> Path:
    """Where this process writes what will become `target`: hidden, in the same folder."""
    return target.with_name(f".{target.name}.{os.getpid()}{SUFFIX}")


def remove_stale(target: Path) -> None:
    """Remove the half-written files and folders of this target whose process is gone."""
    before = f".{target.name}."
    for entry in os.scandir(target.parent):
        writer = entry.name[len(before) : -len(SUFFIX)]
        if entry.name != f"{before}{writer}{SUFFIX}" or not writer.isdecimal() or _runs(int(writer)):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 is not a question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
