"""The shipped job: an adapter brings the digits 5 to 9 to the demo's base model, and a judge says how well."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from ..models.attach import attach
from ..train.base import Base
from ..train.config import LoopSettings
from ..train.digits.base import base_folder, prepare_base, read_base
from ..train.digits.data import NEW, OLD, read_digits
from ..train.digits.judge import Judge
from ..train.digits.recipe import BASE, FULL, SMOKE, UNET, Recipe
from ..train.loop import Trainer, new_accelerator
from ..train.options import option
from ..train.sampling import sample
from .families import adapter_spec, describe
from .job import Job

LAST_LOSSES = 20
"""Steps whose mean is the last loss."""


@dataclass(frozen=True, kw_only=True)
class DigitsSettings:
    """What all runs of a study share."""

    steps: int = option("optimizer steps of the adapter", 200, least=1)
    batch_size: int = option("images per step", 16, least=1)
    learning_rate: float = option("peak learning rate", 5e-3, above=0)
    warmup: int = option("steps over which the learning rate rises from 0", 20, least=0)
    decay: str = option("learning rate after the warm-up", "cosine", choices=("constant", "cosine"))
    images_per_new_class: int = option("images drawn of each new class", 20, least=5)
    images_per_old_class: int = option("images drawn of each old class", 10, least=1)
    sampling_steps: int = option("denoising steps", 10, least=1)
    guidance: float = option("classifier-free guidance", 2.0, least=0)
    base_steps: int = option("optimizer steps of the base model", BASE.steps, least=1)
    base_batch_size: int = option("images per step of the base model", BASE.batch_size, least=1)


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The demo's recipe with the base model that the settings describe."""
    base = replace(BASE, steps=settings["base_steps"], batch_size=settings["base_batch_size"])
    return replace(FULL, base=base)


def check(settings: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> None:
    """ValueError for a warm-up longer than the training, and for an adapter that the base model cannot have."""
    if settings["warmup"] > settings["steps"]:
        raise ValueError(
            "sweep: the digits job's warmup must be at most its steps; got"
            f" warmup={settings['warmup']}, steps={settings['steps']}"
        )
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    for config in {json.dumps({**each, "seed": 0}): each for each in configs}.values():
        try:
            attach(unet, adapter_spec(config)).remove()
        except ValueError as error:
            raise ValueError(f"sweep: the digits job cannot train {describe(config)}: {error}") from error


def prepare(settings: Mapping[str, Any], folder: Path) -> None:
    """Trains the base model into the sweep's folder, unless it is there."""
    recipe = recipe_of(settings)
    prepare_base(folder, recipe, read_digits(recipe.seed))


def run(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Trains one adapter and judges its images; the seed decides its start, the order of images and the noise."""
    recipe, seed = recipe_of(config), config["seed"]
    digits = read_digits(recipe.seed)
    base, _ = read_base(base_folder(folder, recipe))
    loop = LoopSettings(
        steps=config["steps"], batch_size=config["batch_size"], learning_rate=config["learning_rate"],
        warmup=config["warmup"], decay=config["decay"], weight_decay=BASE.weight_decay,
        condition_dropout=BASE.condition_dropout, seed=seed,
    )  # fmt: skip
    accelerator = new_accelerator(loop)
    base.to(accelerator.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attachment = attach(base.unet, adapter_spec(config))
    parameters = list(attachment.parameters())
    started = time.perf_counter()
    losses = Trainer(base, parameters, digits.learnt.of(NEW).examples(), loop, accelerator).run()
    trained = time.perf_counter()
    judge, real = Judge(digits.judging), digits.judging.of(NEW)
    new, labels = draw(base, NEW, config["images_per_new_class"], config)
    old, old_labels = draw(base, OLD, config["images_per_old_class"], config)
    return {
        "accuracy_new": judge.accuracy(new, labels),
        "accuracy_old": judge.accuracy(old, old_labels),
        "frechet_new": judge.frechet(new, real.pixels),
        "last_loss": float(np.mean(losses[-LAST_LOSSES:])),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "training_seconds": trained - started,
        "sampling_seconds": time.perf_counter() - trained,
    }


def draw(
    base: Base, classes: Sequence[str], count: int, config: Mapping[str, Any]
) -> tuple[Tensor, np.ndarray]:
    """`count` images of each class, and what they should show."""
    labels = [each for each in classes for _ in range(count)]
    pixels = sample(
        base, labels,
        steps=config["sampling_steps"], guidance=config["guidance"], seed=config["seed"], batch_size=len(labels),
    )  # fmt: skip
    return pixels, np.array(labels)


JOB = Job(
    "digits",
    run,
    DigitsSettings,
    smoke={
        "steps": SMOKE.adapter.steps, "batch_size": SMOKE.adapter.batch_size, "warmup": 1,
        "images_per_new_class": 5, "images_per_old_class": 2, "sampling_steps": SMOKE.sampling_steps,
        "base_steps": SMOKE.base.steps, "base_batch_size": SMOKE.base.batch_size,
    },
    check=check,
    prepare=prepare,
)  # fmt: skip
