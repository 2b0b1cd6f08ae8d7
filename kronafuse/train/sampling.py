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
            batches.append(base.decode_images(_denoise(base, torch.stack(noise), part, steps, guidance)))
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
