"""Output folders, and names that users chose as names of files."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..formats.atomic import replace_folder, write_json

__all__ = ["file_name", "prepare_output", "replace_folder", "write_json"]

LONGEST_BYTES = 100
"""Of a name before its digest; systems take 255 bytes, with what comes before and after it."""

DIGEST_DIGITS = 10

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices, whatever their suffix."""


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


def file_name(name: str, among: Iterable[str] = ()) -> str:
    """`name` as the name of a file or folder on every system, different for different names.

    Letters, digits, "-", "_" and inner "." stay; anything else becomes "_", and then "~" and a digest of the whole
    name follow, as they do for a name that is reserved, long, or not in ASCII. "lr" is "lr"; "optim/lr" is
    "optim_lr~" and ten hex digits.

    among: other names in the same folder; one that differs in nothing but its letters' case has a digest too
    """
    plain = "".join(each if each.isalnum() or each in "-_." else "_" for each in name)
    plain = re.sub(r"^\.|\.$", "_", plain)
    plain = plain.encode()[:LONGEST_BYTES].decode(errors="ignore")
    if RESERVED.fullmatch(plain):
        plain = f"_{plain}"
    alike = any(other != name and other.casefold() == name.casefold() for other in among)
    if plain == name and name and name.isascii() and not alike:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_DIGITS]
    return f"{plain}~{digest}"
