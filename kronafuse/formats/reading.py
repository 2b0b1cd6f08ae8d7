"""Files that others may have written: regular files of bounded headers, and JSON that says everything once."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

MAX_HEADER_BYTES = 8 * 2**20
"""Bytes of a header that are written and read: some 12,000 adapted layers, ten times what large models have."""

MAX_COMMAS = 300_000
"""Commas in a header, which bound how many values it has and with them the memory for them."""

KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISDIR: "a folder",
}


def check_regular(op: str, path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a pipe, a device or a folder, which is not opened; OSError if nothing is there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((text for is_one, text in KINDS.items() if is_one(mode)), "something else")
        raise ValueError(f"{op}: {path} must be a regular file; it is {kind}")


def read_small(op: str, path: str | os.PathLike[str]) -> bytes:
    """Read a file of at most MAX_HEADER_BYTES. Raise ValueError for a longer one and one that is not regular."""
    check_regular(op, path)
    size = os.path.getsize(path)
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"{op}: {path} must have at most {MAX_HEADER_BYTES:,} bytes; it has {size:,}")
    with open(path, "rb") as file:
        return file.read(size)


def check_header_size(size: int) -> None:
    """Raise ValueError for a header that is too long to be written or read."""
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header must have at most {MAX_HEADER_BYTES:,} bytes; it has {size:,}")


def check_header(text: bytes) -> None:
    """Raise ValueError for a header that is too long, or has too many values, to be written or read."""
    check_header_size(len(text))
    commas = text.count(b",")
    if commas > MAX_COMMAS:
        raise ValueError(f"its header must have at most {MAX_COMMAS:,} commas; it has {commas:,}")


def parse_json(text: bytes) -> Any:
    """Parse the JSON of a header. Raise ValueError for a key that is there twice, and for too much of anything."""
    check_header(text)
    return parse_once(text)


def parse_once(text: bytes) -> Any:
    """Parse JSON. Raise ValueError for a key that is there twice and for values nested too deep."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found
