"""The loop, its objective and its randomness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from kronafuse.train.base import Base, load_base
from kronafuse.train.config import LoopSettings
from kronafuse.train.data import TensorExamples
from kronafuse.train.loop import Trainer, learning_rate_factor, new_accelerator
from kronafuse.train.objective import noise_prediction_loss, prediction_target
from kronafuse.train.rng import generator_for

SETTINGS = LoopSettings(steps=3, batch_size=4, learning_rate=1e-2)


def examples() -> TensorExamples:
    pixels = torch.randn(6, 1, 8, 8, generator=generator_for("examples")).clamp(-1, 1)
    return TensorExamples(pixels, ["cat", "dog"] * 3)


def trainer_of(folder: Path, settings: LoopSettings) -> Trainer:
    base = load_base(folder)
    base.unet.requires_grad_(True)
    return Trainer(base, list(base.unet.parameters()), examples(), settings, new_accelerator(settings))


def test_losses_repeat(class_base: Path) -> None:
    first = trainer_of(class_base, SETTINGS).run()
    torch.manual_seed(123)
    assert trainer_of(class_base, SETTINGS).run() == first
    assert trainer_of(class_base, dataclasses.replace(SETTINGS, seed=1)).run() != first


def test_global_random_state_is_left_alone(class_base: Path) -> None:
    trainer = trainer_of(class_base, SETTINGS)
    before = torch.random.get_rng_state()
    trainer.run()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_forward_pass_has_its_own_noise(class_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def record(*arguments: Any) -> torch.Tensor:
        seeds.append(arguments[-1].initial_seed())
        return noise_prediction_loss(*arguments)

    monkeypatch.setattr("kronafuse.train.loop.noise_prediction_loss", record)
    trainer_of(class_base, dataclasses.replace(SETTINGS, accumulation=2)).run()
    assert len(set(seeds)) == len(seeds) == 6


def test_loss_falls_on_one_batch(class_base: Path) -> None:
    trainer = trainer_of(class_base, dataclasses.replace(SETTINGS, steps=60, batch_size=6))
    losses = trainer.run()
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_accumulated_gradients_are_the_mean(class_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves accumulated step as far as the whole batch, given the same noise for each image."""

    def loss_of_pixels(unet, _scheduler, clean, condition, _generator):
        steps = torch.zeros(len(clean), dtype=torch.int64)
        return unet(clean, steps, **condition).sample.square().mean()

    monkeypatch.setattr("kronafuse.train.loop.noise_prediction_loss", loss_of_pixels)
    whole = trainer_of(class_base, dataclasses.replace(SETTINGS, clip=0.1))
    halves = trainer_of(class_base, dataclasses.replace(SETTINGS, clip=0.1, batch_size=2, accumulation=2))
    for module in (*whole.unet.modules(), *halves.unet.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(torch.tensor(whole.run()), torch.tensor(halves.run()))
    for left, right in zip(whole.parameters, halves.parameters, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_clipping_bounds_the_gradient(class_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(class_base, dataclasses.replace(SETTINGS, clip=1e-3))
    norms = []

    def record(*_: object, **__: object) -> None:
        norms.append(torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None]).norm())

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.run()
    assert len(norms) == SETTINGS.steps
    assert max(norms) <= 1.001e-3


def test_dropped_conditions_are_unconditional(class_base: Path) -> None:
    trainer = trainer_of(class_base, dataclasses.replace(SETTINGS, condition_dropout=1.0))
    seen: list[str] = []
    encode = trainer.base.conditioning.encode
    trainer.base.conditioning.encode = lambda each, side: (seen.extend(each), encode(each, side))[1]  # type: ignore[method-assign]
    trainer.run()
    assert seen == [""] * 12


def test_flip_mirrors_some_images(class_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def encode_images(_base: Base, pixels: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        seen.extend(pixels)
        return pixels

    monkeypatch.setattr(Base, "encode_images", encode_images)
    trainer_of(class_base, dataclasses.replace(SETTINGS, flip=True)).run()
    originals = [examples()[i][0] for i in range(6)]
    straight = sum(any(torch.equal(each, one) for one in originals) for each in seen)
    mirrored = sum(any(torch.equal(each.flip(-1), one) for one in originals) for each in seen)
    assert straight + mirrored == 12
    assert straight
    assert mirrored


def test_rejects_half_precision_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("accelerate takes the GPU")
    with pytest.raises(
        ValueError, match="mixed_precision 'fp16' needs a GPU, and this is a CPU; use bf16 or no"
    ):
        new_accelerator(dataclasses.replace(SETTINGS, mixed_precision="fp16"))


def test_parameters_that_are_no_numbers_end_the_run(class_base: Path) -> None:
    """The last step can break them after its loss was still finite."""

    def spoil(trainer: Trainer) -> None:
        if trainer.step == SETTINGS.steps:
            trainer.parameters[0].data.view(-1)[0] = float("nan")

    with pytest.raises(
        FloatingPointError, match=r"parameters are not finite after step 3: the learning rate"
    ):
        trainer_of(class_base, SETTINGS).run(spoil)


def test_rejects_examples_of_unknown_classes(class_base: Path) -> None:
    base = load_base(class_base)
    foreign = TensorExamples(torch.zeros(1, 1, 8, 8), ["bird"])
    with pytest.raises(ValueError, match="has no class 'bird'; its classes are: cat, dog"):
        Trainer(base, [], foreign, SETTINGS, new_accelerator(SETTINGS))


def test_learning_rate() -> None:
    constant = LoopSettings(steps=10, warmup=4)
    assert [learning_rate_factor(step, constant) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = LoopSettings(steps=11, warmup=1, decay="cosine")
    factors = [learning_rate_factor(step, cosine) for step in range(12)]
    assert factors[0] == factors[1] == 1.0
    assert factors[6] == pytest.approx(0.5)
    assert factors[11] == pytest.approx(0.0)
    assert factors[1:] == sorted(factors[1:], reverse=True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_the_right_prediction(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    clean = torch.randn(3, 1, 4, 4, generator=generator_for("clean"))

    class Oracle(torch.nn.Module):
        def forward(self, noisy, steps):
            alpha = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
            noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            return type("Output", (), {"sample": noise if kind == "epsilon" else velocity})

    loss = noise_prediction_loss(Oracle(), scheduler, clean, {}, generator_for("noise"))
    assert float(loss) < 1e-6


def test_rejects_other_prediction_types() -> None:
    scheduler = DDPMScheduler(prediction_type="sample")
    zeros = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"must be epsilon or v_prediction; .* 'sample'"):
        prediction_target(scheduler, zeros, zeros, torch.zeros(1, dtype=torch.int64))
