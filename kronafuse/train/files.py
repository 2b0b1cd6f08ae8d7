"""Files and folders that are whole or absent: written beside their place and renamed into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"
"""Ends the name of everything that is still being written."""

REPLACED_SUFFIX = ".replaced"
"""Ends the name of a folder while its successor takes its place."""


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{suffix}")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` when the block ends, and is removed when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, PARTIAL_SUFFIX)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder; it becomes `path` when the block ends, and is removed when the block raises.

    A folder that was there before stays whole until then, and comes back if the rename fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = _beside(path, PARTIAL_SUFFIX), _beside(path, REPLACED_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            os.replace(path, replaced)
        try:
            os.replace(partial, path)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, path)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
