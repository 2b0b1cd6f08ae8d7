"""What is learnt from: images in [-1, 1], each with its condition (a caption or a class name)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Sampler

from .images import flatten, to_pixels
from .rng import generator_for

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""Names that count as images, in lower case."""

METADATA = ("metadata.jsonl", "metadata.csv")
"""Caption tables, as Hugging Face's image folders have them: columns `file_name` and `text`."""

LABEL = "{label}"
"""Stands for the class folder's name in a caption."""


class Examples(Protocol):
    """A training set. `conditions` lists what its images are conditioned on, without repeats."""

    @property
    def conditions(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, str]: ...


class TensorExamples:
    """Images in memory: (count, channels, height, width) in [-1, 1], and one condition each."""

    def __init__(self, pixels: Tensor, conditions: Sequence[str]) -> None:
        if len(pixels) != len(conditions) or len(pixels) == 0:
            raise ValueError(
                f"examples need as many conditions as images, and one at least; got {len(pixels)} images"
                f" and {len(conditions)} conditions"
            )
        self._pixels, self._each = pixels, list(conditions)
        self.conditions = sorted(set(conditions))

    def __len__(self) -> int:
        return len(self._each)

    def __getitem__(self, index: int, /) -> tuple[Tensor, str]:
        return self._pixels[index], self._each[index]


class ImageFolder:
    """The images of a folder.

    The condition of an image is, in this order: its row in `metadata.jsonl` or `metadata.csv`; the text of
    `NAME.txt` beside it; `caption`, in which {label} stands for the class folder; the class folder's name.

    folder:     images, or one folder of images for each class
    resolution: side of the squares that images are scaled and cut to
    channels:   1 or 3
    caption:    condition of images that have none of their own

    Raises FileNotFoundError (no folder, a listed file that is absent), PermissionError (a folder that may not be
    read), ValueError (no images, images in deeper folders, an image that cannot be read or has no condition, an
    empty caption, a text that is not UTF-8); decodes every image to know.
    """

    def __init__(self, folder: Path, resolution: int, channels: int, caption: str | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder {folder} does not exist or is not a folder")
        self.folder, self.resolution, self.channels = folder, resolution, channels
        try:
            table = _metadata(folder)
            self.paths = [folder / name for name in table] if table else _images(folder)
        except PermissionError as error:
            raise PermissionError(
                error.errno, f"image folder {folder} cannot be read: {error.strerror}"
            ) from error
        if not self.paths:
            raise ValueError(
                f"image folder {folder} has no images;"
                f" names that count end in {', '.join(sorted(EXTENSIONS))}"
            )
        for path in self.paths:
            _read(path)
        self._each = (
            list(table.values()) if table else [_condition(folder, path, caption) for path in self.paths]
        )
        self.conditions = sorted(set(self._each))

    @property
    def identity(self) -> str:
        """The number of images and a digest of their names and conditions, equal for equal training sets."""
        names = [Path(os.path.relpath(path, self.folder)).as_posix() for path in self.paths]
        digest = hashlib.sha256(json.dumps([names, self._each]).encode()).hexdigest()[:12]
        return f"{len(self)} images, {digest}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> tuple[Tensor, str]:
        return to_pixels(_read(self.paths[index]), self.resolution, self.channels), self._each[index]


class StepBatches(Sampler[list[int]]):
    """The indices of each forward pass, an endless row of permutations cut into batches.

    Batch `n` depends on nothing but the arguments, so that a run can start at any `start`.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, start: int, stop: int, rank: int, ranks: int
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start, self.stop, self.rank, self.ranks = start, stop, rank, ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for batch in range(self.start, self.stop):
            first = (batch * self.ranks + self.rank) * self.batch_size
            indices = []
            for position in range(first, first + self.batch_size):
                if position // self.count != epoch:
                    epoch = position // self.count
                    generator = generator_for(self.seed, "order", epoch)
                    order = torch.randperm(self.count, generator=generator).tolist()
                indices.append(order[position % self.count])
            yield indices


def collate(examples: Sequence[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """A batch of pixels (batch, channels, height, width) and its conditions."""
    return torch.stack([pixels for pixels, _ in examples]), [condition for _, condition in examples]


def _images(folder: Path) -> list[Path]:
    inside = [
        folder,
        *sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")),
    ]
    found = [path for each in inside for path in sorted(each.iterdir()) if _is_image(path)]
    deeper = sorted({
        str(path.parent.relative_to(folder))
        for each in inside[1:]
        for path in each.glob("*/**/*")
        if _is_image(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    })  # fmt: skip
    if deeper:
        raise ValueError(
            f"image folder {folder} has images deeper than one folder of each class, in {', '.join(deeper[:8])}"
            f"{', ...' if len(deeper) > 8 else ''}; move them up, or list them in {METADATA[0]}"
        )
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return flatten(ImageOps.exif_transpose(image), image.format).copy()
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def _condition(folder: Path, path: Path, caption: str | None) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return _caption(beside, _text(beside))
    label = path.parent.name if path.parent != folder else None
    if caption is not None and (LABEL not in caption or label is not None):
        return caption.replace(LABEL, label or "")
    if label is None:
        raise ValueError(
            f"image {path} has no condition: put it into a class folder, write its caption to {beside.name}"
            f" beside it or to {METADATA[0]}, or give one caption for all images"
        )
    return label


def _metadata(folder: Path) -> dict[str, str]:
    """file_name -> text of the caption table, empty where there is none."""
    present = [folder / name for name in METADATA if (folder / name).is_file()]
    if not present:
        return {}
    path, text = present[0], _text(present[0])
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        pairs = [(row["file_name"], row["text"]) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: every row needs file_name and text; {error!r}") from error
    if not pairs:
        raise ValueError(f"{path} lists no images")
    if any(not isinstance(each, str) for pair in pairs for each in pair):
        raise ValueError(f"{path}: file_name and text of every row must be text")
    table = {name: _caption(f"{path}, {name}", caption) for name, caption in pairs}
    if len(table) < len(pairs):
        raise ValueError(f"{path} lists an image more than once")
    return table


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; save it as UTF-8") from error


def _caption(where: Path | str, text: str) -> str:
    caption = text.strip()
    if not caption:
        raise ValueError(f"{where}: the caption is empty; write one, or take the image out")
    return caption
