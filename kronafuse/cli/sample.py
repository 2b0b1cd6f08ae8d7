"""`kronafuse sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..train import require_libraries


def sample(
    prompt: Annotated[list[str], typer.Argument(help="Captions or class names, one image row each.")],
    base: Annotated[Path, typer.Option(help="Base model: a diffusers folder with unet/ and scheduler/.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter file; the base model alone if absent.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="A .png, .jpg or .webp for one grid, otherwise a folder of images.")
    ] = Path("runs/sample"),
    count: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.0, help="Classifier-free guidance; 1 for none.")] = 2.0,
    scale: Annotated[
        float | None, typer.Option(help="Multiplies the adapter's delta instead of its own scale.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the images; the base model's own if absent.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images denoised at once.")] = 4,
    precision: Annotated[str, typer.Option(help="Of the base model: fp32, fp16 or bf16.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Decides the starting noise.")] = 0,
) -> None:
    """Draw images from a base model and an adapter file."""
    require_libraries()
    from ..train.draw import draw_images

    paths = draw_images(
        base, adapter, prompt, output,
        count=count, steps=steps, guidance=guidance, scale=scale, resolution=resolution, seed=seed,
        batch_size=batch_size, precision=precision,
    )  # fmt: skip
    for path in paths:
        print(path)
