"""`kronafuse train` from configuration to files: resume, Ctrl-C, full disks, both kinds of base model."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kronafuse import formats
from kronafuse.train import checkpoint as checkpoint_module
from kronafuse.train import loop, run
from kronafuse.train.checkpoint import PARTS, checkpoints, find_checkpoint
from kronafuse.train.config import TrainConfig
from kronafuse.train.interrupt import Interrupted
from kronafuse.train.options import build
from PIL import Image
from safetensors.torch import load_file

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(class_base: Path, class_folder: Path, tmp_path: Path) -> Configure:
    """A configuration of four steps in `tmp_path / "out"`, and what differs from it."""

    def make(**values: Any) -> TrainConfig:
        standard = {
            "base": class_base,
            "data": class_folder,
            "output": tmp_path / "out",
            "factors": (4, 2),
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "warmup": 2,
            "condition_dropout": 0.3,
            "flip": True,
            "checkpoint_every": 2,
            "sampling_steps": 2,
        }
        return build(TrainConfig, standard | values)

    return make


def losses_of(config: TrainConfig) -> list[float]:
    return json.loads((config.output / run.LOSSES).read_text())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Ctrl-C while the loss of this step, counted from 1, is computed."""
    loss, calls = loop.noise_prediction_loss, []

    def pressed(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(loop, "noise_prediction_loss", pressed)


def test_files(configure: Configure) -> None:
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
    "options", [{}, {"accumulation": 2, "decay": "cosine"}], ids=["plain", "accumulated"]
)
def test_resumed_run_is_bit_for_bit_the_whole_run(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = configure(**options)
    run.train(whole)
    part = configure(**options, output=tmp_path / "part")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run.train(part)
    assert max(checkpoints(part.output)) < whole.steps
    run.train(configure(**options, output=tmp_path / "part", resume="latest"))
    assert losses_of(part) == losses_of(whole)
    left, right = (load_file(each.output / "adapter.safetensors") for each in (whole, part))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_ctrl_c_finishes_the_step_and_saves(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config, before = configure(checkpoint_every=0), signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(Interrupted, match="stopped after step 3; go on with --resume latest"):
        run.train(config)
    assert list(checkpoints(config.output)) == [3]
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    interrupt_at(monkeypatch, 3, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        run.train(config)
    assert not isinstance(caught.value, Interrupted)
    assert list(checkpoints(config.output)) == [2]


def save_that(effect: Callable[[], None], at_step: int) -> Callable[..., None]:
    """`save_file` for the optimizer that writes half a file and has this effect, once."""
    save, count = checkpoint_module.save_file, []

    def broken(tensors: Any, path: Path) -> None:
        count.append(1)
        if len(count) == at_step:
            path.write_bytes(b"half")
            effect()
        save(tensors, path)

    return broken


def test_ctrl_c_during_a_save_finishes_it(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    press = save_that(lambda: signal.raise_signal(signal.SIGINT), at_step=1)
    monkeypatch.setattr(checkpoint_module, "save_file", press)
    with pytest.raises(Interrupted):
        run.train(config)
    assert find_checkpoint(config.output, "latest").name == "checkpoint-000003"
    assert sorted(checkpoints(config.output)) == [2, 3]


def test_broken_save_leaves_the_checkpoint_before(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second Ctrl-C during the save at step 4: nothing half-written, and the run goes on from step 2."""
    whole = configure(output=tmp_path / "whole")
    run.train(whole)
    config = configure()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", save_that(twice, at_step=2))
        with pytest.raises(KeyboardInterrupt):
            run.train(config)
    assert [each.name for each in config.output.iterdir()] == ["checkpoint-000002"]
    run.train(configure(resume="latest"))
    assert losses_of(config) == losses_of(whole)


def test_full_disk_at_a_checkpoint(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", save_that(full, at_step=2))
    with pytest.raises(OSError, match="checkpoint-000004 could not be saved: No space left on device"):
        run.train(config)
    assert [each.name for each in config.output.iterdir()] == ["checkpoint-000002"]
    assert sorted(each.name for each in (config.output / "checkpoint-000002").iterdir()) == sorted(PARTS)


def test_resume_rejects_other_settings(configure: Configure) -> None:
    run.train(configure())
    with pytest.raises(
        ValueError, match=r"(?s)other settings:.*learning_rate: 0\.01 in the checkpoint, 0\.02 now"
    ):
        run.train(configure(resume="latest", steps=6, learning_rate=0.02))
    run.train(configure(resume="latest", steps=6))
    assert sorted(checkpoints(configure().output)) == [2, 4, 6]


def test_resume_rejects_other_steps_where_they_decide_the_learning_rate(configure: Configure) -> None:
    run.train(configure(decay="cosine"))
    with pytest.raises(ValueError, match="steps: 4 in the checkpoint, 6 now"):
        run.train(configure(decay="cosine", resume="latest", steps=6))


@pytest.mark.parametrize("name", PARTS)
def test_resume_rejects_a_truncated_checkpoint(configure: Configure, name: str) -> None:
    config = configure()
    run.train(config)
    part = config.output / "checkpoint-000004" / name
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-000004.* (is damaged|is not a whole safetensors file)"):
        run.train(configure(resume="latest"))


def test_resume_rejects_what_is_not_there(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run.train(configure(resume="latest"))
    config = configure()
    run.train(config)
    broken = tmp_path / "checkpoint-000002"
    shutil.copytree(config.output / "checkpoint-000002", broken)
    (broken / "optimizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-000002 lacks optimizer\.safetensors"):
        run.train(configure(resume=str(broken)))


@pytest.mark.parametrize(
    ("adapter", "options"), [("lokr", {"factor": 4, "rank": 2}), ("lora", {"rank": 2, "alpha": 4})]
)
def test_other_adapters(configure: Configure, adapter: str, options: dict[str, Any]) -> None:
    config = configure(adapter=adapter, factors=None, targets="to_q, to_k, to_v", steps=1, **options)
    file = formats.load(run.train(config))
    assert {name.rsplit(".", 1)[1] for name in file.modules} == {"to_q", "to_k", "to_v"}


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


def test_captions_and_latents(configure: Configure, text_base: Path, captioned_folder: Path) -> None:
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
    configure: Configure, sdxl_base: Path, captioned_folder: Path, tmp_path: Path
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


def test_rejects_text_encoders_that_do_not_fit(configure: Configure, sdxl_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sdxl_base, broken)
    shutil.rmtree(broken / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="has text_encoder_2/ and lacks tokenizer_2/"):
        run.train(configure(base=broken))
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ValueError, match="addition_embed_type 'text_time' and one text encoders is neither"):
        run.train(configure(base=broken))


def test_reading_in_other_processes(configure: Configure, tmp_path: Path) -> None:
    alone, beside = configure(), configure(workers=1, output=tmp_path / "workers")
    run.train(alone)
    run.train(beside)
    assert losses_of(beside) == losses_of(alone)
