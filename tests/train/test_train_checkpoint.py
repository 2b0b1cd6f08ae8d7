"""Checkpoints: exact resume, Ctrl-C, full disks, damaged files, other settings and other data."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kronafuse import formats
from kronafuse.models.attach import Attachment
from kronafuse.train import checkpoint as checkpoint_module
from kronafuse.train import loop, run
from kronafuse.train.base import load_base
from kronafuse.train.checkpoint import PARTS, checkpoints, find_checkpoint, sealed
from kronafuse.train.config import TrainConfig
from kronafuse.train.interrupt import Interrupted
from safetensors.torch import load_file, save_file

Configure = Callable[..., TrainConfig]
Losses = Callable[[TrainConfig], list[float]]
Limit = Callable[[int], AbstractContextManager[None]]


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


@pytest.mark.parametrize(
    "options", [{}, {"accumulation": 2, "decay": "cosine"}], ids=["plain", "accumulated"]
)
def test_resumed_run_is_bit_for_bit_the_whole_run(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, Any],
    losses_of: Losses,
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
    """`save_tensors` for the optimizer that writes half a file and has this effect, once."""
    save, count = checkpoint_module.save_tensors, []

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
    monkeypatch.setattr(checkpoint_module, "save_tensors", press)
    with pytest.raises(Interrupted):
        run.train(config)
    assert find_checkpoint(config.output, "latest").name == "checkpoint-000003"
    assert sorted(checkpoints(config.output)) == [2, 3]


def test_broken_save_leaves_the_checkpoint_before(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, losses_of: Losses
) -> None:
    """A second Ctrl-C during the save at step 4: nothing half-written, and the run goes on from step 2."""
    whole = configure(output=tmp_path / "whole")
    run.train(whole)
    config = configure()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_tensors", save_that(twice, at_step=2))
        with pytest.raises(KeyboardInterrupt):
            run.train(config)
    assert [each.name for each in config.output.iterdir()] == ["checkpoint-000002"]
    run.train(configure(resume="latest"))
    assert losses_of(config) == losses_of(whole)


def test_full_disk_at_a_checkpoint(configure: Configure, file_limit: Limit) -> None:
    """The system's own refusal of the optimizer's file."""
    config = configure(steps=2)
    run.train(config)
    sizes = [(config.output / "checkpoint-000002" / name).stat().st_size for name in PARTS]
    limit = (sizes[0] + sizes[1]) // 2
    assert sizes[0] < limit < sizes[1]
    with (
        file_limit(limit),
        pytest.raises(OSError, match=r"checkpoint-000004 could not be saved: .*File too large"),
    ):
        run.train(configure(resume="latest"))
    assert list(checkpoints(config.output)) == [2]
    assert not [each.name for each in config.output.iterdir() if each.name.startswith(".")]
    assert sorted(each.name for each in (config.output / "checkpoint-000002").iterdir()) == sorted(PARTS)


@pytest.mark.parametrize("room", [100, 10_000], ids=["class_tokens", "unet"])
def test_full_disk_at_a_base_model(class_base: Path, tmp_path: Path, file_limit: Limit, room: int) -> None:
    base = load_base(class_base)
    save = base.conditioning.save if room == 100 else base.save  # type: ignore[union-attr]
    with file_limit(room), pytest.raises(OSError, match="File too large"):
        save(tmp_path)


def test_resume_rejects_other_settings(configure: Configure) -> None:
    run.train(configure())
    with pytest.raises(
        ValueError, match=r"(?s)other settings or data:.*learning_rate: 0\.01 in the checkpoint, 0\.02 now"
    ):
        run.train(configure(resume="latest", steps=6, learning_rate=0.02))
    run.train(configure(resume="latest", steps=6))
    assert sorted(checkpoints(configure().output)) == [2, 4, 6]


def test_resume_rejects_other_data(configure: Configure) -> None:
    config = configure()
    run.train(config)
    (config.data / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)or data:.*images: '6 images, \w+' in .*, '5 images, \w+' now"):
        run.train(configure(resume="latest", steps=6))


def test_resume_rejects_other_steps_where_they_decide_the_learning_rate(configure: Configure) -> None:
    run.train(configure(decay="cosine"))
    with pytest.raises(ValueError, match="steps: 4 in the checkpoint, 6 now"):
        run.train(configure(decay="cosine", resume="latest", steps=6))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{}", "trainer.json has no step, config, losses, moments, scaler"),
        ("[]", "trainer.json must be an object with .*; it is list"),
        ({"step": "4"}, "trainer.json has no step, or another kind of value there"),
        ({"step": 3}, "trainer.json must have a loss for each of 3 steps; it has 4"),
        ({"losses": ["1", "2", "3", "4"]}, "trainer.json must have a loss for each of 4 steps"),
        ({"scaler": {"scale": 1.0}}, "trainer.json has the state of another loss scaler"),
        ({"moments": [[1]]}, "unhashable type: 'list'"),
        (
            {"digests": {}},
            "trainer.json must have the digests of adapter.safetensors and optimizer.safetensors",
        ),
        ('{"step": 1, "step": 1}', "the key 'step' is there twice"),
        ("[" * 100_000, "its JSON is nested too deep"),
    ],
)
def test_resume_rejects_a_damaged_state(
    configure: Configure, state: str | dict[str, Any], message: str
) -> None:
    path = configure().output / "checkpoint-000004" / "trainer.json"
    run.train(configure())
    whole = json.loads(path.read_text())
    del whole["digest"]
    path.write_text(state if isinstance(state, str) else json.dumps(sealed(whole | state)))
    with pytest.raises(ValueError, match=f"checkpoint-000004 is damaged: {message}"):
        run.train(configure(resume="latest", steps=6))


def changed_tensor(path: Path) -> None:
    """One number less in the last tensor; an adapter file also gets the digest of what it holds then."""
    if path.name == "adapter.safetensors":
        file = formats.load(path)
        name = list(file.tensors)[-1]
        formats.save(path, replace(file, tensors={**file.tensors, name: file.tensors[name] - 1}))
        return
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file({**tensors, name: tensors[name] - 1}, path)


def changed_config(path: Path) -> None:
    """A configuration that nobody trained with, and which the run that goes on does have."""
    path.write_text(path.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trainer.json", changed_config),
        (
            "trainer.json",
            lambda path: path.write_text(path.read_text().replace('"losses"', '"more": 1,\n"losses"')),
        ),
        ("optimizer.safetensors", changed_tensor),
        ("adapter.safetensors", changed_tensor),
    ],
    ids=["configuration", "another key", "moments", "factors"],
)
def test_resume_rejects_what_is_not_as_it_was_written(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None]
) -> None:
    """Files that are right in themselves, also an adapter that was trained on with another library."""
    run.train(configure())
    path = configure().output / "checkpoint-000004" / name
    before = path.read_bytes()
    change(path)
    assert path.read_bytes() != before
    monkeypatch.setattr(Attachment, "load_state_dict", lambda *_: pytest.fail("factors were changed"))
    with pytest.raises(ValueError, match=f"checkpoint-000004 is damaged: {name} is not as it was written"):
        run.train(
            configure(resume="latest", steps=6, learning_rate=0.02 if change is changed_config else 0.01)
        )


def test_resume_of_a_checkpoint_without_digests_warns(
    configure: Configure, tmp_path: Path, losses_of: Losses
) -> None:
    whole = configure(output=tmp_path / "whole")
    run.train(whole)
    part = configure()
    run.train(configure(steps=2))
    path = part.output / "checkpoint-000002" / "trainer.json"
    state = json.loads(path.read_text())
    del state["digest"], state["digests"]
    path.write_text(json.dumps(state))
    with pytest.warns(
        UserWarning, match=r"checkpoint-000002 has no digests, so that damage to it may go unnoticed"
    ):
        run.train(configure(resume="latest"))
    assert losses_of(part) == losses_of(whole)


def spoiled_moments(moments: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    if how == "foreign":
        return {"foo": torch.ones(2)}
    if how == "empty":
        return {}
    if how == "lacking":
        return {name: each for name, each in moments.items() if name != "1.exp_avg"}
    return moments | {"1.exp_avg": torch.ones(3)}


@pytest.mark.parametrize("how", ["foreign", "empty", "lacking", "reshaped"])
def test_resume_rejects_other_moments(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Before anything is changed: the factors are still those of a new adapter."""
    path = configure().output / "checkpoint-000004" / "optimizer.safetensors"
    run.train(configure())
    save_file(spoiled_moments(load_file(path), how), path)
    monkeypatch.setattr(Attachment, "load_state_dict", lambda *_: pytest.fail("factors were changed"))
    with pytest.raises(
        ValueError, match=r"checkpoint-000004 is damaged: \d+ of the optimizer's tensors differ"
    ):
        run.train(configure(resume="latest", steps=6))


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
