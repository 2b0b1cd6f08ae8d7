"""Output folders."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..formats.atomic import replace_folder, write_json

__all__ = ["prepare_output", "replace_folder", "write_json"]


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
