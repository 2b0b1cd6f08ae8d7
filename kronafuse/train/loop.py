"""The training loop: one for whole models and for adapters, for the demo and for `kronafuse train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .base import Base
from .conditioning import UNCONDITIONAL
from .config import LoopSettings
from .data import Examples, StepBatches, collate
from .interrupt import ignore_in_worker
from .objective import noise_prediction_loss
from .rng import generator_for

Batch = tuple[Tensor, list[str]]


def learning_rate_factor(step: int, settings: LoopSettings) -> float:
    """The share of the peak learning rate at `step`: a linear rise, then constant or half a cosine to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.decay == "constant":
        return 1.0
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def new_accelerator(settings: LoopSettings) -> Accelerator:
    """Accelerate's view of this process: device, precision, the processes beside it.

    Raises ValueError for fp16 on a CPU, which accelerate leaves without autocast and loss scaler.
    """
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulation
    )
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision 'fp16' needs a GPU, and this is a CPU; use bf16 or no")
    return accelerator


class Trainer:
    """AdamW on `parameters` of `base.unet`, under accelerate.

    base:        on the accelerator's device
    parameters:  the trainable ones; every other parameter of the U-Net is frozen by the caller
    accelerator: from `new_accelerator`
    losses:      the mean loss of each optimizer step so far, over the processes
    step:        optimizer steps taken

    All randomness of a step depends on (seed, step, process) alone, so that a trainer whose state was
    restored goes on exactly as the one that was saved.
    """

    def __init__(
        self,
        base: Base,
        parameters: Sequence[nn.Parameter],
        examples: Examples,
        settings: LoopSettings,
        accelerator: Accelerator,
    ) -> None:
        base.conditioning.check(examples.conditions)
        self.settings, self.base, self.examples, self.accelerator = settings, base, examples, accelerator
        self.parameters = list(parameters)
        optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
        )
        self.unet, self.optimizer = accelerator.prepare(base.unet, optimizer)
        self.step, self.losses = 0, list[float]()

    def run(self, on_step: Callable[[Trainer], None] | None = None, *, title: str = "train") -> list[float]:
        """Steps until `settings.steps`; `on_step` is called after each and may raise to stop."""
        steps = self.settings.steps
        per_step = self.settings.batch_size * self.settings.accumulation * self.accelerator.num_processes
        started, first = time.perf_counter(), self.step
        progress = tqdm(
            total=steps,
            initial=self.step,
            desc=title,
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        with progress, torch.random.fork_rng():
            batches = self.batches()
            while self.step < steps:
                loss = self.take_step(batches)
                rate = per_step * (self.step - first) / (time.perf_counter() - started)
                progress.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{rate:.1f}"}, refresh=False)
                progress.update()
                if on_step is not None:
                    on_step(self)
        self.check_finite()
        return self.losses

    def check_finite(self) -> None:
        """FloatingPointError where a trained parameter is no finite number, so that it is not saved."""
        largest = nn.utils.get_total_norm([parameter.detach() for parameter in self.parameters], math.inf)
        if not largest.isfinite():
            raise FloatingPointError(
                f"the parameters are not finite after step {self.step}: {self._advice()}"
            )

    def take_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step: `accumulation` forward and backward passes, clipping, AdamW; returns the loss.

        Raises FloatingPointError for a loss that is no finite number.
        """
        self.unet.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * learning_rate_factor(self.step, self.settings)
        total = torch.zeros((), device=self.accelerator.device)
        for forward_pass in range(self.settings.accumulation):
            last = forward_pass == self.settings.accumulation - 1
            with self._gradients_stay_here() if not last else nullcontext():
                loss = self._loss(next(batches), forward_pass)
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.settings.clip:
            self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        loss = self.over_processes(float(total) / self.settings.accumulation)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: {self._advice()}")
        self.losses.append(loss)
        return loss

    def over_processes(self, value: float) -> float:
        """The mean of a number over the processes of this run."""
        if self.accelerator.num_processes == 1:
            return value
        mean = self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), reduction="mean")
        assert isinstance(mean, Tensor)
        return float(mean)

    def _advice(self) -> str:
        return (
            f"the learning rate {self.settings.learning_rate} is too high,"
            f" or mixed precision {self.settings.mixed_precision!r} overflows"
        )

    def _gradients_stay_here(self) -> AbstractContextManager[None]:
        return self.accelerator.no_sync(self.unet)

    def _loss(self, batch: Batch, forward_pass: int) -> Tensor:
        pixels, conditions = batch
        settings = self.settings
        generator = generator_for(
            settings.seed, "step", self.step, forward_pass, self.accelerator.process_index
        )
        torch.manual_seed(generator.initial_seed())  # for dropout inside the model
        dropped = torch.rand(len(conditions), generator=generator) < settings.condition_dropout
        mirrored = torch.rand(len(conditions), generator=generator) < 0.5 * settings.flip
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels).to(
            self.accelerator.device
        )
        kept = [
            UNCONDITIONAL if drop else each for each, drop in zip(conditions, dropped.tolist(), strict=True)
        ]
        clean = self.base.encode_images(pixels, generator)
        condition = self.base.conditioning.encode(kept, pixels.shape[-1])
        return noise_prediction_loss(self.unet, self.base.scheduler, clean, condition, generator)

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left."""
        settings = self.settings
        sampler = StepBatches(
            len(self.examples),
            settings.batch_size,
            settings.seed,
            start=self.step * settings.accumulation,
            stop=settings.steps * settings.accumulation,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        loader = DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=settings.workers,
            worker_init_fn=ignore_in_worker if settings.workers else None,
        )
        return iter(loader)
