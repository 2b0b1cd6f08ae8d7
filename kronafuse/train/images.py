"""Images between tensors in [-1, 1] and picture files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..formats.atomic import written_beside

MODES = {1: "L", 3: "RGB"}
"""PIL's image mode for each number of channels."""


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""The suffixes of pictures that are written -> PIL's name of the format."""

QUALITY = 95
"""Of JPEG and WebP, from 0 to 100; PNG loses nothing and has none."""


def image_mode(channels: int) -> str:
    """PIL's mode for images of this many channels."""
    if channels not in MODES:
        raise ValueError(f"images must have 1 or 3 channels; got {channels}")
    return MODES[channels]


def flatten(image: Image.Image, format: str | None) -> Image.Image:
    """An image of 8 bits a channel without transparency: 16 bits are scaled, what shines through is white.

    format: of the file; the 32-bit numbers that PIL reads from a PNG have 16 bits

    Raises ValueError for pixels whose white nobody knows.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and format == "PNG"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode!r}); save it with 8 or 16 bits")
    if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image


def to_pixels(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """(channels, resolution, resolution) in [-1, 1]: the shorter side scaled, the centre cut out."""
    square = ImageOps.fit(
        image.convert(image_mode(channels)), (resolution, resolution), Image.Resampling.BICUBIC
    )
    array = np.asarray(square, dtype=np.float32).reshape(resolution, resolution, channels)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """One image (channels, height, width) in [-1, 1] as a PIL image; values outside are clamped."""
    levels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = levels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_png(path: Path, image: Image.Image) -> None:
    """A PNG file, whole or not at all."""
    save_picture(path, image, "PNG")


def save_picture(path: Path, image: Image.Image, format: str) -> None:
    """A file of one of `FORMATS`, whole or not at all; what loses detail does so at high quality."""
    with written_beside(path) as partial:
        image.save(partial, format=format, quality=QUALITY)


def grid(pixels: Tensor, columns: int, *, zoom: int = 1, gap: int = 1) -> Image.Image:
    """Images (count, channels, height, width) side by side, `columns` in a row, `gap` pixels apart."""
    count, channels, height, width = pixels.shape
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    step_x, step_y = width * zoom + gap, height * zoom + gap
    sheet = Image.new(image_mode(channels), (columns * step_x + gap, rows * step_y + gap), color="gray")
    for index, each in enumerate(pixels):
        enlarged = to_image(each).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (gap + index % columns * step_x, gap + index // columns * step_y))
    return sheet


def save_each(folder: Path, names: Sequence[str], pixels: Tensor) -> list[Path]:
    """One PNG for every image, under these names; returns their paths."""
    paths = [folder / f"{name}.png" for name in names]
    for path, each in zip(paths, pixels, strict=True):
        save_png(path, to_image(each))
    return paths
