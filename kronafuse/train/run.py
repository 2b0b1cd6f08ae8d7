"""`kronafuse train`: an adapter on a base model, from a configuration to files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import formats
from ..models.attach import Attachment, attach
from .adapter import adapter_spec
from .base import Base, load_base
from .checkpoint import ADAPTER, LATEST, checkpoints, find_checkpoint, restore, save_checkpoint
from .config import TrainConfig
from .data import ImageFolder
from .files import prepare_output, write_json
from .images import grid, save_png
from .interrupt import Interrupted, InterruptFlag
from .loop import Trainer, new_accelerator
from .plots import save_loss_curves
from .sampling import sample

LOSSES = "losses.json"
CURVE = "loss.png"

VALIDATED = 8
"""Conditions drawn where the configuration names none."""

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The frozen weights' dtype for each mixed precision; the adapter's own stays float32."""


def train(config: TrainConfig) -> Path:
    """Trains what `config` says and returns the adapter file.

    Written to `config.output`: checkpoint-STEP/ folders, validation/step-STEP.png, adapter.safetensors,
    losses.json and loss.png. Ctrl-C finishes the step, saves a checkpoint and raises `Interrupted`.
    """
    spec = adapter_spec(config)
    if config.resume is None and checkpoints(config.output):
        raise ValueError(
            f"output folder {config.output} has checkpoints of a run before; go on with resume = {LATEST!r} or give"
            " another output folder"
        )
    prepare_output(config.output)
    accelerator = new_accelerator(config)
    base = load_base(config.base, DTYPES[config.mixed_precision])
    resolution = config.resolution or base.resolution
    base.check_resolution(resolution)
    examples = ImageFolder(config.data, resolution, base.channels, config.caption)
    validation = list(config.validation or examples.conditions[:VALIDATED])
    base.conditioning.check(validation)

    base.to(accelerator.device)
    torch.manual_seed(config.seed)
    attachment = attach(base.unet, spec)
    accelerator.print(str(attachment.report).splitlines()[0])
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    trainer = Trainer(base, list(attachment.parameters()), examples, config, accelerator)
    values = {**configuration(config), "images": examples.identity}
    if config.resume is not None:
        restore(find_checkpoint(config.output, config.resume), trainer, attachment, values)

    with InterruptFlag() as interrupt:

        def on_step(trainer: Trainer) -> None:
            finished, stop = trainer.step >= config.steps, _anywhere(trainer, interrupt)
            due = config.checkpoint_every and trainer.step % config.checkpoint_every == 0
            if due or finished or stop:
                trainer.check_finite()
                if accelerator.is_main_process:
                    save_checkpoint(config.output, trainer, attachment, values)
            if stop and not finished:
                raise Interrupted(f"stopped after step {trainer.step}; go on with --resume latest")
            if (
                accelerator.is_main_process
                and config.validate_every
                and trainer.step % config.validate_every == 0
            ):
                draw_validation(base, config, validation, trainer.step, resolution)

        trainer.run(on_step, title=config.adapter)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_results(config.output, attachment, trainer.losses)
    accelerator.print(f"Adapter: {config.output / ADAPTER}")
    accelerator.end_training()
    return config.output / ADAPTER


def configuration(config: TrainConfig) -> Mapping[str, Any]:
    """The configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def draw_validation(
    base: Base, config: TrainConfig, conditions: list[str], step: int, resolution: int
) -> Path:
    """A PNG with a row of images for each condition, from the same noise at every step."""
    each = [condition for condition in conditions for _ in range(config.validation_count)]
    images = sample(
        base,
        each,
        steps=config.sampling_steps,
        guidance=config.guidance,
        seed=config.seed,
        resolution=resolution,
        batch_size=config.batch_size,
    )
    path = config.output / "validation" / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    save_png(path, grid(images, config.validation_count, zoom=max(1, 64 // resolution)))
    return path


def write_results(output: Path, attachment: Attachment, losses: list[float]) -> None:
    """The adapter file, the losses and their curve."""
    formats.save(output / ADAPTER, attachment)
    write_json(output / LOSSES, losses)
    save_loss_curves(output / CURVE, {"noise prediction": losses})


def _anywhere(trainer: Trainer, interrupt: InterruptFlag) -> bool:
    """Whether Ctrl-C reached any process; all of them must stop at the same step."""
    return trainer.over_processes(float(interrupt.raised)) > 0
