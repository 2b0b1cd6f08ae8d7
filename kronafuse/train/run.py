"""`kronafuse train`: an adapter on a base model, from a configuration to files."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .. import formats
from ..models.attach import Attachment, attach
from ..nn.bottleneck_spec import Bottleneck
from ..nn.specs import KronA, LoKr, LoRA
from .adapter import adapter_spec
from .base import Base, load_base
from .checkpoint import ADAPTER, LATEST, checkpoints, find_checkpoint, restore, save_checkpoint
from .config import TrainConfig
from .data import ImageFolder
from .files import prepare_output, write_json
from .images import grid, save_png
from .interrupt import Interrupted, InterruptFlag
from .lock import held
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
    losses.json and loss.png. Ctrl-C or SIGTERM finishes the step, saves a checkpoint and raises `Interrupted`.
    Raises BlockingIOError where another process is at work in that folder; of the processes of one run only the
    main one holds it.
    """
    spec = adapter_spec(config)
    prepare_output(config.output)
    accelerator = new_accelerator(config)
    with held(config.output, "train") if accelerator.is_main_process else nullcontext():
        return _train(config, spec, accelerator)


def _train(config: TrainConfig, spec: KronA | LoKr | LoRA | Bottleneck, accelerator: Accelerator) -> Path:
    """The run, in a folder that is this process's or its main process's."""
    if config.resume is None and checkpoints(config.output):
        raise ValueError(
            f"output folder {config.output} has checkpoints of a run before; go on with resume = {LATEST!r} or give"
            " another output folder"
        )
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
        folder = find_checkpoint(config.output, config.resume)
        restore(folder, trainer, attachment, values)
        if trainer.step > config.steps:
            raise ValueError(
                f"checkpoint {folder} has {trainer.step} steps behind it, and steps = {config.steps} are fewer; to"
                f" go on give more steps than {trainer.step}, or name an earlier checkpoint"
            )

    with InterruptFlag() as interrupt:

        def on_step(trainer: Trainer) -> None:
            finished, stop = trainer.step >= config.steps, _anywhere(trainer, interrupt)
            due = config.checkpoint_every and trainer.step % config.checkpoint_every == 0
            if due or finished or stop:
                trainer.check_finite()
                if accelerator.is_main_process:
                    save_checkpoint(config.output, trainer, attachment, values)
            if stop and not finished:
                raise Interrupted(
                    f"stopped after step {trainer.step}; go on with --resume latest", interrupt.number
                )
            if (
                accelerator.is_main_process
                and config.validate_every
                and trainer.step % config.validate_every == 0
            ):
                try:
                    draw_validation(base, config, validation, trainer.step, resolution)
                except FloatingPointError as error:  # pictures are no reason to end a training
                    tqdm.write(f"no validation images after step {trainer.step}: {error}", file=sys.stderr)

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
    """A PNG with a row of images for each condition, from the same noise at every step.

    Raises FloatingPointError where an image is not finite.
    """
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
    """Whether Ctrl-C or SIGTERM reached any process; all of them must stop at the same step."""
    return trainer.over_processes(float(interrupt.raised)) > 0
