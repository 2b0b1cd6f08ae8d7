"""Images drawn from a base model, with or without adapters on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Base, sampling_scheduler
from .conditioning import UNCONDITIONAL
from .rng import generator_for


@torch.no_grad()
def sample(
    base: Base,
    conditions: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    resolution: int | None = None,
) -> Tensor:
    """DDIM images (count, channels, height, width) in [-1, 1], one for each condition, on the CPU.

    guidance:   ε = ε(∅) + guidance·(ε(c) − ε(∅)); 1 evaluates the conditional model alone
    seed:       image i starts from noise that depends on seed and i alone
    batch_size: images denoised at once; with guidance the model sees twice as many

    Raises FloatingPointError that names the first image with values that are not finite.

    Source: Song et al. 2021, arXiv 2010.02502; Ho and Salimans 2022, arXiv 2207.12598.
    """
    resolution = resolution or base.resolution
    base.check_resolution(resolution)
    base.conditioning.check(conditions)
    training, side = base.unet.training, resolution // base.reduction
    shape = (int(base.unet.config["in_channels"]), side, side)
    base.unet.eval()
    try:
        batches = []
        for first in range(0, len(conditions), batch_size):
            part = conditions[first : first + batch_size]
            noise = [
                torch.randn(shape, generator=generator_for(seed, "start", first + i))
                for i in range(len(part))
            ]
            latents = _denoise(base, torch.stack(noise), part, steps, guidance)
            check_finite("denoised", latents, part, first, base, guidance)
            images = base.decode_images(latents)
            check_finite("decoded by the VAE", images, part, first, base, guidance)
            batches.append(images)
        return torch.cat(batches)
    finally:
        base.unet.train(training)


def _denoise(base: Base, noise: Tensor, conditions: Sequence[str], steps: int, guidance: float) -> Tensor:
    scheduler = sampling_scheduler(base)
    scheduler.set_timesteps(steps)
    latents = noise.to(base.unet.device, torch.float32)
    guided = guidance != 1.0
    both = [*([UNCONDITIONAL] * len(conditions) if guided else []), *conditions]
    condition = base.conditioning.encode(both, noise.shape[-1] * base.reduction)
    dtype = base.unet.conv_in.weight.dtype
    for step in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        prediction = base.unet(inputs.to(dtype), step, **condition).sample.float()
        if guided:
            without, towards = prediction.chunk(2)
            prediction = without + guidance * (towards - without)
        (latents,) = scheduler.step(prediction, int(step), latents, return_dict=False)[:1]
    return latents


def check_finite(
    what: str, images: Tensor, conditions: Sequence[str], first: int, base: Base, guidance: float
) -> None:
    """FloatingPointError that names an image with NaN or inf, of which a picture would show black or white.

    first: the number of `images[0]` among all that are drawn
    """
    wrong = ~images.isfinite().flatten(1).all(1).cpu()
    if not wrong.any():
        return
    dtype = base.unet.conv_in.weight.dtype
    advice = f"the base model, the adapter, its scale or the guidance {guidance:g} makes values too large"
    if dtype == torch.float16:
        advice = f"float16 ends at 65504, which many models exceed: use bf16 or fp32; otherwise {advice}"
    place = int(wrong.nonzero()[0])
    raise FloatingPointError(
        f"sample: image {first + place}, {conditions[place]!r}, has NaN or inf in it where it is {what}"
        f" ({int(wrong.sum())} of {len(wrong)} images of its batch; base model in {str(dtype).removeprefix('torch.')}):"
        f" {advice}"
    )
