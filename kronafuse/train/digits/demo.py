"""The demo from scans to figures: base model, adapter, images before and after, judgement."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import formats
from ...models.attach import attach
from ...models.report import Report
from ...nn.specs import LoRA
from ..adapter import attach_file
from ..base import Base
from ..files import prepare_output, write_json
from ..lock import held
from ..loop import Trainer, new_accelerator
from ..plots import save_loss_curves
from ..sampling import sample
from .base import prepare_base, read_base
from .data import NEW, OLD, Digits, read_digits
from .judge import COMPONENTS, Judge
from .pictures import save_comparison
from .recipe import AFTER_AT_LEAST, BEFORE_BELOW, LORA_RANK, Recipe
from .timing import time_steps

ADAPTER = "adapter.safetensors"
FIGURES = "figures.json"
SAMPLES = "samples.png"
LOSS = "loss.png"


@dataclass(frozen=True)
class Drawn:
    """Generated images and what they should show."""

    pixels: Tensor
    labels: np.ndarray


def run_demo(output: Path, recipe: Recipe) -> dict[str, Any]:
    """Runs the whole demo, writes its files to `output` and returns its figures.

    Written: samples.png, loss.png, adapter.safetensors, figures.json and the cached base model's folder. Raises
    BlockingIOError where another process is at work in `output`.
    """
    prepare_output(output)
    with held(output, "demo"):
        return _run(output, recipe)


def _run(output: Path, recipe: Recipe) -> dict[str, Any]:
    started = time.perf_counter()
    digits = read_digits(recipe.seed)
    folder, cached = prepare_base(output, recipe, digits)
    base, base_losses = read_base(folder)
    before = draw_both(base, recipe)
    parameters = count_parameters(base, recipe)
    adapter_losses, report = adapt(base, recipe, digits, output / ADAPTER)

    adapted, _ = read_base(folder)
    attach_file(adapted, output / ADAPTER)
    after = draw_both(adapted, recipe)

    save_pictures(output / SAMPLES, digits, before, after)
    curves = {
        f"base, digits {OLD[0]} to {OLD[-1]}": base_losses,
        f"KronA, digits {NEW[0]} to {NEW[-1]}": adapter_losses,
    }
    save_loss_curves(output / LOSS, curves)
    figures = {
        **judged(digits, before, after),
        "images_per_new_class": recipe.per_new_class,
        "images_per_old_class": recipe.per_old_class,
        "adapter": {
            "factors": recipe.spec.factors,
            "layers": len(report.layers),
            "fused_layers": report.fused,
            "shared_reads": len(report.sharing),
        },
        "trainable_parameters": parameters,
        "step_time": time_steps(folder, recipe, digits),
        "base_was_cached": cached,
        "threads": torch.get_num_threads(),
        "gated": recipe.gated,
        "seconds": time.perf_counter() - started,
    }
    write_json(output / FIGURES, figures)
    return figures


def draw_both(base: Base, recipe: Recipe) -> tuple[Drawn, Drawn]:
    """Images of the new classes and of the old ones; from the same starting noise before and after."""
    drawn = []
    for classes, count in ((NEW, recipe.per_new_class), (OLD, recipe.per_old_class)):
        labels = [each for each in classes for _ in range(count)]
        pixels = sample(
            base, labels,
            steps=recipe.sampling_steps, guidance=recipe.guidance, seed=recipe.seed, batch_size=len(labels),
        )  # fmt: skip
        drawn.append(Drawn(pixels, np.array(labels)))
    return drawn[0], drawn[1]


def judged(digits: Digits, before: tuple[Drawn, Drawn], after: tuple[Drawn, Drawn]) -> dict[str, Any]:
    """Accuracy of the classifier and Fréchet distance, beside what they are on real scans."""
    judge = Judge(digits.judging)
    real, learnt = digits.judging.of(NEW), digits.learnt.of(NEW)
    accuracy = {"real_held_out": judge.accuracy(digits.learnt.pixels, digits.learnt.labels)}
    for when, (new, old) in {"before": before, "after": after}.items():
        accuracy |= {f"new_{when}": judge.accuracy(new.pixels, new.labels)}
        accuracy |= {f"old_{when}": judge.accuracy(old.pixels, old.labels)}
    return {
        "data": {
            "scans": len(digits.learnt.labels) + len(digits.judging.labels),
            "learnt_from": len(digits.learnt.labels),
            "judging": len(digits.judging.labels),
            "old_classes": OLD,
            "new_classes": NEW,
        },
        "classifier_accuracy": accuracy,
        f"frechet_pca{COMPONENTS}_new": {
            "before": judge.frechet(before[0].pixels, real.pixels),
            "after": judge.frechet(after[0].pixels, real.pixels),
            "real_other_half": judge.frechet(learnt.pixels, real.pixels),
        },
    }


def save_pictures(
    path: Path, digits: Digits, before: tuple[Drawn, Drawn], after: tuple[Drawn, Drawn]
) -> None:
    """The new classes: scans that were learnt from, images before and images after."""
    learnt = digits.learnt.of(NEW)
    sets = {
        "real": (learnt.pixels, learnt.labels),
        "before: base model": (before[0].pixels, before[0].labels),
        "after: with KronA": (after[0].pixels, after[0].labels),
    }
    save_comparison(path, NEW, sets)


def count_parameters(base: Base, recipe: Recipe) -> dict[str, int]:
    """Trainable parameters of KronA, of LoRA on the same layers, and of the whole U-Net."""
    counts = {}
    for name, spec in {"krona": recipe.spec, f"lora_rank_{LORA_RANK}": LoRA(LORA_RANK)}.items():
        with attach(base.unet, spec) as attachment:
            counts[name] = sum(parameter.numel() for parameter in attachment.parameters())
    return {**counts, "full": sum(parameter.numel() for parameter in base.unet.parameters())}


def adapt(base: Base, recipe: Recipe, digits: Digits, path: Path) -> tuple[list[float], Report]:
    """Trains the recipe's adapter on the new classes, saves it and takes it off again."""
    accelerator = new_accelerator(recipe.adapter)
    base.to(accelerator.device)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.adapter.seed)
        attachment = attach(base.unet, recipe.spec)
    with attachment:
        examples = digits.learnt.of(NEW).examples()
        trainer = Trainer(base, list(attachment.parameters()), examples, recipe.adapter, accelerator)
        losses = trainer.run(title=f"KronA on {NEW[0]} to {NEW[-1]}")
        formats.save(path, attachment)
        return losses, attachment.report


def shortfalls(figures: dict[str, Any]) -> list[str]:
    """Which of the demo's targets its figures miss; none for a demo that is not gated."""
    if not figures["gated"]:
        return []
    accuracy = figures["classifier_accuracy"]
    missed = []
    if not accuracy["new_before"] < BEFORE_BELOW:
        missed.append(
            f"accuracy on new classes before must be below {BEFORE_BELOW:.0%};"
            f" got {accuracy['new_before']:.1%}"
        )
    if not accuracy["new_after"] >= AFTER_AT_LEAST:
        missed.append(
            f"accuracy on new classes after must be at least {AFTER_AT_LEAST:.0%};"
            f" got {accuracy['new_after']:.1%}"
        )
    return missed
