"""`kronafuse train` from configuration to files, on both kinds of base model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kronafuse import formats
from kronafuse.train import loop, run
from kronafuse.train.checkpoint import checkpoints
from kronafuse.train.config import TrainConfig
from PIL import Image

Configure = Callable[..., TrainConfig]
Losses = Callable[[TrainConfig], list[float]]


def test_files(configure: Configure, losses_of: Losses) -> None:
    config = configure(validate_every=2, validation_count=3)
    path = run.train(config)
    assert path == config.output / "adapter.safetensors"
    file = formats.load(path)
    assert any(tensor.abs().max() > 0 for name, tensor in file.tensors.items() if name.endswith("lokr_b"))
    assert len(losses_of(config)) == config.steps
    assert sorted(checkpoints(config.output)) == [2, 4]
    drawn = sorted((config.output / "validation").iterdir())
    assert [each.name for each in drawn] == ["step-000002.png", "step-000004.png"]
    with Image.open(drawn[0]) as image:
        assert image.size == (3 * 65 + 1, 2 * 65 + 1)
    with Image.open(config.output / run.CURVE) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("adapter", "options"), [("lokr", {"factor": 4, "rank": 2}), ("lora", {"rank": 2, "alpha": 4})]
)
def test_other_adapters(configure: Configure, adapter: str, options: dict[str, Any]) -> None:
    config = configure(adapter=adapter, factors=None, targets="to_q, to_k, to_v", steps=1, **options)
    file = formats.load(run.train(config))
    assert {name.rsplit(".", 1)[1] for name in file.modules} == {"to_q", "to_k", "to_v"}


@pytest.mark.parametrize(
    "options",
    [
        {"width": 8, "activation": "gelu", "scale": 0.5},
        {"budget": 15.0, "source": "res_in", "sink": "res_out", "init": "paper"},
        {"source": "ff_in", "sink": "block_out", "form": "krona_res", "factors": (4, 2)},
        {"form": "compacter", "terms": 2, "rank": 1, "width": 8},
    ],
    ids=["dense", "budget", "krona_res", "compacter"],
)
def test_bottlenecks(configure: Configure, options: dict[str, Any]) -> None:
    """Trained, saved, resumed from and read again, in every form."""
    config = configure(adapter="bottleneck", **{"factors": None, **options})
    file = formats.load(run.train(config))
    assert [name for name, tensor in file.tensors.items() if tensor.abs().max() == 0] == []
    for name, value in options.items():
        assert getattr(file.spec, name) == (None if name == "budget" else value)
    again = configure(adapter="bottleneck", **{"factors": None, **options, "steps": 6, "resume": "latest"})
    resumed = formats.load(run.train(again))
    assert any(not torch.equal(resumed.tensors[name], each) for name, each in file.tensors.items())


def test_rejects_keys_of_another_adapter(configure: Configure) -> None:
    with pytest.raises(
        ValueError, match="adapter 'lora' does not take factors; its keys are: rank, alpha, scale"
    ):
        run.train(configure(adapter="lora"))


def test_rejects_factors_that_do_not_divide(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"N1 = 64 does not divide N = 16"):
        run.train(configure(factors=(64, 4)))


def test_rejects_unknown_targets(configure: Configure) -> None:
    with pytest.raises(ValueError, match="to_query"):
        run.train(configure(targets="to_query"))


def test_rejects_missing_base(configure: Configure, class_base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"base model .*absent does not exist"):
        run.train(configure(base=tmp_path / "absent"))
    shutil.copytree(class_base / "unet", tmp_path / "half" / "unet")
    with pytest.raises(
        FileNotFoundError, match=r"half lacks scheduler, tokenizer, text_encoder; .*it has unet"
    ):
        run.train(configure(base=tmp_path / "half"))


def test_rejects_damaged_class_tokens(configure: Configure, class_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(class_base, broken)
    (broken / "class_names.json").write_text("{")
    with pytest.raises(ValueError, match=r"class tokens of base model .*broken cannot be read"):
        run.train(configure(base=broken))


def test_rejects_unknown_classes(configure: Configure, class_folder: Path) -> None:
    with pytest.raises(ValueError, match="has no class 'bird'; its classes are: cat, dog"):
        run.train(configure(validation="bird"))
    (class_folder / "dog").rename(class_folder / "wolf")
    with pytest.raises(ValueError, match="has no class 'wolf'; its classes are: cat, dog"):
        run.train(configure())


def test_rejects_odd_resolutions(configure: Configure) -> None:
    with pytest.raises(ValueError, match="resolution must be a multiple of 2 for this base model; got 9"):
        run.train(configure(resolution=9))


def test_captions_and_latents(
    configure: Configure, text_base: Path, captioned_folder: Path, losses_of: Losses
) -> None:
    """A Stable Diffusion in miniature, v-prediction included, in bf16 mixed precision."""
    config = configure(
        base=text_base, data=captioned_folder, mixed_precision="bf16", validate_every=4, validation_count=1
    )
    file = formats.load(run.train(config))
    assert all(tensor.dtype == torch.float32 for tensor in file.tensors.values())
    assert all(loss == loss and loss < 10 for loss in losses_of(config))
    with Image.open(config.output / "validation" / "step-000004.png") as image:
        assert image.mode == "RGB"


def test_two_text_encoders(
    configure: Configure, sdxl_base: Path, captioned_folder: Path, tmp_path: Path, losses_of: Losses
) -> None:
    """A Stable Diffusion XL in miniature, at a resolution of its own, with gradient checkpointing."""
    options = {"base": sdxl_base, "data": captioned_folder, "resolution": 32}
    plain = configure(**options, validate_every=4, validation_count=1)
    saving = configure(**options, gradient_checkpointing=True, output=tmp_path / "saving")
    run.train(plain)
    run.train(saving)
    assert losses_of(saving) == losses_of(plain)


def test_rejects_output_of_a_run_before(configure: Configure) -> None:
    run.train(configure())
    with pytest.raises(ValueError, match="has checkpoints of a run before; go on with resume = 'latest'"):
        run.train(configure())


def test_loss_that_is_no_number_stops_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it stays, and no other is written."""
    loss, calls = loop.noise_prediction_loss, []

    def diverge(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*arguments) * (float("inf") if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "noise_prediction_loss", diverge)
    with pytest.raises(
        FloatingPointError, match=r"the loss is inf at step 4: the learning rate 0\.01 is too high"
    ):
        run.train(configure())
    assert list(checkpoints(configure().output)) == [2]


def test_factors_that_are_no_numbers_are_not_saved(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step that broke them was still finite."""
    step = loop.Trainer.take_step

    def spoil(trainer: loop.Trainer, batches: Any) -> float:
        loss = step(trainer, batches)
        if trainer.step == 4:
            trainer.parameters[-1].data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(loop.Trainer, "take_step", spoil)
    with pytest.raises(FloatingPointError, match="the parameters are not finite after step 4"):
        run.train(configure())
    assert [each.name for each in configure().output.iterdir()] == ["checkpoint-000002"]


def test_rejects_output_before_reading_the_model(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"output folder .*out cannot be written to: File exists"):
        run.train(configure(base=tmp_path / "absent"))


def test_validation_is_drawn_in_batches_of_the_training(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, draw = [], run.sample
    monkeypatch.setattr(
        run, "sample", lambda *each, **keys: (sizes.append(keys["batch_size"]), draw(*each, **keys))[1]
    )
    run.train(configure(validate_every=4, batch_size=3))
    assert sizes == [3]


def test_rejects_text_encoders_that_do_not_fit(configure: Configure, sdxl_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sdxl_base, broken)
    shutil.rmtree(broken / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="has text_encoder_2/ and lacks tokenizer_2/"):
        run.train(configure(base=broken))
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ValueError, match="addition_embed_type 'text_time' and one text encoders is neither"):
        run.train(configure(base=broken))


def test_reading_in_other_processes(configure: Configure, tmp_path: Path, losses_of: Losses) -> None:
    alone, beside = configure(), configure(workers=1, output=tmp_path / "workers")
    run.train(alone)
    run.train(beside)
    assert losses_of(beside) == losses_of(alone)


def test_rejects_fewer_steps_than_are_done(configure: Configure) -> None:
    run.train(configure())
    before = sorted(configure().output.rglob("*"))
    with pytest.raises(
        ValueError,
        match=r"checkpoint .*checkpoint-000004 has 4 steps behind it, and steps = 3 are fewer; to go on",
    ):
        run.train(configure(resume="latest", steps=3))
    assert sorted(configure().output.rglob("*")) == before
    run.train(configure(resume="latest", steps=4))


def test_validation_images_that_cannot_be_drawn_do_not_end_a_training(
    configure: Configure,
    losses_of: Losses,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuses(*_: Any, **__: Any) -> torch.Tensor:
        raise FloatingPointError("image 0 has NaN in it")

    monkeypatch.setattr(run, "sample", refuses)
    config = configure(validate_every=2)
    run.train(config)
    assert len(losses_of(config)) == 4
    assert "no validation images after step 2: image 0 has NaN in it" in capsys.readouterr().err


def test_a_training_in_another_thread_takes_no_signals(configure: Configure, losses_of: Losses) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(run.train, configure()).result()
    assert len(losses_of(configure())) == 4
