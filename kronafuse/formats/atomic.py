"""Files and folders that are either whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".partial"
"""Ends the name of everything that is still being written."""

REPLACED_SUFFIX = ".replaced"
"""Ends the name of a folder while its successor takes its place."""

LONGEST_NAME = 255
"""Bytes that a file's name may have where the system does not say."""

ADDED_BYTES = 40
"""Bytes that a temporary name has at most in addition to its target's: dots, process, random digits, suffix."""


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new name in the same folder, to write to; renamed to `path` when the block ends without an error.

    After an error or an interrupt the new file is gone and what was at `path` before is untouched. The data
    is on the disk before the rename. A symbolic link at `path` keeps pointing to the file that is replaced.
    What a killed process left half-written for this `path` is removed. Raises FileNotFoundError if the folder
    does not exist, IsADirectoryError if `path` is one, and FileExistsError if it is a device, a pipe or
    anything else that is not a regular file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(Path(path).parent))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is there, not a file", os.fspath(path))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "what is there is not a regular file", os.fspath(path))
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
    partial, replaced = name_beside(path), path.with_name(f".{_stem(path)}{REPLACED_SUFFIX}")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
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
    """A new name for what will become `target`: hidden, in the same folder, of this process and this call."""
    return target.with_name(f".{_stem(target)}.{os.getpid()}.{secrets.token_hex(4)}{SUFFIX}")


def _stem(target: Path) -> str:
    """The target's name in its temporary names: a digest of it if they would be longer than the system takes."""
    name = os.fsencode(target.name)
    if len(name) + ADDED_BYTES <= _longest_name(target.parent):
        return target.name
    return hashlib.sha256(name).hexdigest()[:32]


def _longest_name(folder: Path) -> int:
    """Bytes that the name of a file in this folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, ValueError, OSError):  # no such call outside POSIX; some file systems do not say
        return LONGEST_NAME


def remove_stale(target: Path) -> None:
    """Remove the half-written files and folders of this target whose process is gone."""
    temporary = re.compile(
        rf"\.{re.escape(_stem(target))}\.([0-9]{{1,10}})(\.[0-9a-f]{{8}})?{re.escape(SUFFIX)}"
    )
    try:
        entries = list(os.scandir(target.parent))
    except PermissionError:
        return  # a folder that may be written to but not listed
    for entry in entries:
        match = temporary.fullmatch(entry.name)
        if match is None or runs(int(match[1])):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def runs(process: int) -> bool:
    """Whether a process of this machine exists; True where that cannot be asked."""
    if os.name != "posix":
        return True  # elsewhere signal 0 is not a question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
