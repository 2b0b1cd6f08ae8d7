"""`kronafuse sample`: images from folders and files to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .adapter import attach_file
from .base import load_base
from .files import prepare_output
from .images import FORMATS, grid, save_each, save_picture
from .options import hold
from .sampling import sample

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def draw_images(
    base: Path,
    adapter: Path | None,
    conditions: Sequence[str],
    output: Path,
    *,
    count: int,
    batch_size: int,
    steps: int,
    guidance: float,
    seed: int,
    scale: float | None = None,
    resolution: int | None = None,
    precision: str = "fp32",
) -> list[Path]:
    """Writes `count` images for each condition and returns their paths.

    scale:      multiplies the adapter's delta, instead of the scale in its file
    batch_size: images denoised at once
    precision:  of the base model
    output:     a path that ends in .png, .jpg, .jpeg or .webp for one grid with a row for each condition, otherwise
                a folder, in which image J of condition I is I-J.png, both counted from 0

    Raises ValueError for the suffix of another kind of file, FloatingPointError for images that are not finite.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if adapter is None and scale is not None:
        raise ValueError(f"scale multiplies an adapter's delta; got scale {scale} without an adapter file")
    for name, value in (("scale", scale), ("guidance", guidance)):
        hold(name, value, {})
    format = picture_format(output)
    prepare_output(output.parent if format else output)
    model = load_base(base, PRECISIONS[precision])
    if adapter is not None:
        attachment = attach_file(model, adapter)
        if scale is not None:
            attachment.scale = scale
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    each = [condition for condition in conditions for _ in range(count)]
    images = sample(
        model, each,
        steps=steps, guidance=guidance, seed=seed, batch_size=batch_size, resolution=resolution,
    )  # fmt: skip
    if format is not None:
        save_picture(output, grid(images, count, zoom=max(1, 64 // images.shape[-1])), format)
        return [output]
    names = [f"{row}-{column}" for row in range(len(conditions)) for column in range(count)]
    return save_each(output, names, images)


def picture_format(output: Path) -> str | None:
    """PIL's name of the format that an output's suffix stands for; None for a folder.

    A suffix that begins with a letter is that of a file, unless a folder of that name exists: "out.bmp" is refused
    and "sd1.5" is a folder. Raises ValueError for a suffix that is none of `FORMATS`.
    """
    suffix = output.suffix.lower()
    if output.is_dir() or not suffix[1:2].isalpha():
        return None
    if suffix not in FORMATS:
        raise ValueError(
            f"sample: output must be a folder or end in {', '.join(FORMATS)}; got {output} (a folder of that name"
            " must exist already)"
        )
    return FORMATS[suffix]
