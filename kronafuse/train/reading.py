"""Parts of a base model, read by libraries that raise whatever they stumble over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading(part: Path) -> Iterator[None]:
    """Every error of the block becomes a ValueError that names the file or folder that is read."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"base model part {part} cannot be read: {error}") from error
