"""What training minimises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn


def noise_prediction_loss(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    clean: Tensor,
    condition: Mapping[str, Any],
    generator: torch.Generator,
) -> Tensor:
    """mean ‖ε − unet(√ᾱ_t·z + √(1 − ᾱ_t)·ε, t, c)‖², with ε and t drawn from `generator`.

    clean:     (batch, channels, height, width), z: images or latents
    condition: the U-Net's other keyword arguments, c

    A scheduler with prediction type "v_prediction" has √ᾱ_t·ε − √(1 − ᾱ_t)·z as its target instead of ε.
    Source: Ho et al. 2020, arXiv 2006.11239, equation 14; Salimans and Ho 2022, arXiv 2202.00512, section 4.
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    count = int(scheduler.config["num_train_timesteps"])
    steps = torch.randint(count, (len(clean),), generator=generator).to(clean.device)
    target = prediction_target(scheduler, clean, noise, steps)
    noisy = scheduler.add_noise(clean, noise, steps)  # pyright: ignore[reportArgumentType]
    prediction = unet(noisy, steps, **condition).sample
    return F.mse_loss(prediction.float(), target.float())


def prediction_target(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """What the U-Net has to predict under this scheduler."""
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, steps)  # pyright: ignore[reportArgumentType]
    raise ValueError(
        f"prediction_type must be epsilon or v_prediction; the base model's scheduler has {kind!r}"
    )
