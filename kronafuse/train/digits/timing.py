"""Step time of our adapters beside PEFT's, on the same layers, in one process."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ...models.attach import attach
from ...nn.specs import DEFAULT, LoKr
from ..base import Base, load_base
from ..loop import Batch, Trainer, new_accelerator
from .data import NEW, Digits
from .recipe import LOKR_FACTOR, Recipe

PEFT = "PEFT LoKr"
KRONA = "kronafuse KronA"
LOKR = "kronafuse LoKr"


def time_steps(folder: Path, recipe: Recipe, digits: Digits) -> dict[str, Any]:
    """Median seconds of a training step for each arm, taken in turn, and their ratios to PEFT's LoKr.

    Every arm is the same base model with an adapter on q, k, v and o, stepped by the demo's own loop. Without
    the peft library that arm is absent and `missing` says so.
    """
    arms: dict[str, Callable[[Base], list[nn.Parameter]]] = {
        KRONA: lambda base: list(attach(base.unet, recipe.spec).parameters()),
        LOKR: lambda base: list(attach(base.unet, LoKr(LOKR_FACTOR)).parameters()),
    }
    missing = None
    if importlib.util.find_spec("peft") is None:
        missing = "PEFT is not installed: pip install peft"
    else:
        arms[PEFT] = _peft_lokr
    trainers: dict[str, tuple[Trainer, Iterator[Batch]]] = {}
    for name, put_on in arms.items():
        base, accelerator = load_base(folder), new_accelerator(recipe.adapter)
        base.to(accelerator.device)
        trainer = Trainer(base, put_on(base), digits.learnt.of(NEW).examples(), recipe.adapter, accelerator)
        trainers[name] = trainer, trainer.batches()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(recipe.timed_steps + 1):
        for name, (trainer, batches) in trainers.items():
            started = time.perf_counter()
            trainer.take_step(batches)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "turns": recipe.timed_steps,
        "median_step_s": medians,
        "ratio_to_peft_lokr": {name: each / medians[PEFT] for name, each in medians.items()}
        if PEFT in arms
        else None,
        "parameters": {
            name: sum(p.numel() for p in trainer.parameters) for name, (trainer, _) in trainers.items()
        },
        "missing": missing,
    }


def _peft_lokr(base: Base) -> list[nn.Parameter]:
    """PEFT's LoKr with the same factor and a full right factor, as it has from half the width in rank on."""
    from peft import LoKrConfig

    rank = max(
        module.in_features + module.out_features
        for module in base.unet.modules()
        if isinstance(module, nn.Linear)
    )
    config = LoKrConfig(r=rank, alpha=rank, decompose_factor=LOKR_FACTOR, target_modules=list(DEFAULT))
    base.unet.add_adapter(config)
    return [parameter for parameter in base.unet.parameters() if parameter.requires_grad]
