"""Output folders, and folders that are whole or absent: written beside their place and renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..formats.atomic import name_beside, remove_stale, written_beside

REPLACED_SUFFIX = ".replaced"
"""Ends the name of a folder while its successor takes its place."""


def prepare_output(folder: Path) -> None:
    """Makes the folder and writes a file to it that is gone again; OSError that names a folder that refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as probe:
            probe.write(b"kronafuse")
            probe.flush()
    except OSError as error:
        raise OSError(
            error.errno, f"output folder {folder} cannot be written to: {error.strerror or error}"
        ) from error


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
