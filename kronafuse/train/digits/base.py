"""The demo's base model: a small U-Net that draws digits 0 to 4, trained once and cached."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from ..base import Base, load_base
from ..conditioning import ClassTokens
from ..files import replace_folder, write_json
from ..loop import Trainer, new_accelerator
from .data import CLASSES, OLD, Digits
from .recipe import SCHEDULER, TOKEN_WIDTH, TOKENS, UNET, Recipe, base_key

LOSSES = "losses.json"


def base_folder(cache: Path, recipe: Recipe) -> Path:
    """Where the base model of a recipe lies."""
    return cache / f"base-{base_key(recipe)}"


def prepare_base(cache: Path, recipe: Recipe, digits: Digits) -> tuple[Path, bool]:
    """The folder of the base model, and whether it was there before; otherwise it is trained and saved."""
    folder = base_folder(cache, recipe)
    if folder.is_dir():
        return folder, True
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        unet = UNet2DConditionModel(**UNET)
    tokens = ClassTokens.random(CLASSES, TOKENS, TOKEN_WIDTH, recipe.seed)
    base = Base(unet, DDPMScheduler(**SCHEDULER), tokens)
    accelerator = new_accelerator(recipe.base)
    base.to(accelerator.device)
    trainer = Trainer(
        base, list(unet.parameters()), digits.learnt.of(OLD).examples(), recipe.base, accelerator
    )
    losses = trainer.run(title=f"base on {OLD[0]} to {OLD[-1]}")
    with replace_folder(folder) as partial:
        base.save(partial)
        write_json(partial / LOSSES, losses)
    return folder, False


def read_base(folder: Path) -> tuple[Base, list[float]]:
    """A fresh copy of the base model, and the losses of its training; ValueError where the cache is damaged."""
    try:
        return load_base(folder), json.loads((folder / LOSSES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the cached base model {folder} cannot be used: {error}; delete that folder, and the demo trains it again"
        ) from error
