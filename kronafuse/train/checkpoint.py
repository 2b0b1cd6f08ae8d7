"""A trainer's state on disk: a folder that is whole or absent, without pickle.

adapter.safetensors     the adapter, in kronafuse's own format
optimizer.safetensors   AdamW's moments, as PARAMETER.NAME
trainer.json            step, losses, configuration, the loss scaler's state, versions
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import formats
from ..models.attach import Attachment
from ..version import VERSION
from .config import FREE_ON_RESUME
from .files import replace_folder
from .loop import Trainer

ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"
PARTS = (ADAPTER, OPTIMIZER, STATE)
LATEST = "latest"

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies."""
    return output / f"checkpoint-{step:06d}"


def save_checkpoint(
    output: Path, trainer: Trainer, attachment: Attachment, config: Mapping[str, Any]
) -> Path:
    """Writes everything that `restore` needs to go on exactly; for the main process alone.

    Raises OSError (a full disk and the like) with nothing half-written; earlier checkpoints stay.
    """
    folder = checkpoint_folder(output, trainer.step)
    moments = {
        f"{parameter}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for parameter, each in trainer.optimizer.state_dict()["state"].items()
        for name, value in each.items()
    }
    scaler = trainer.accelerator.scaler
    state = {
        "kronafuse": VERSION,
        "torch": str(torch.__version__),
        "step": trainer.step,
        "config": dict(config),
        "scaler": None if scaler is None else scaler.state_dict(),
        "losses": trainer.losses,
    }
    try:
        with replace_folder(folder) as partial:
            formats.save(partial / ADAPTER, attachment)
            save_file(moments, partial / OPTIMIZER)
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno, f"checkpoint {folder} could not be saved: {error.strerror or error}"
        ) from error
    return folder


def find_checkpoint(output: Path, resume: str) -> Path:
    """The folder that `resume` names: a path, or "latest" for the one with the most steps in `output`.

    Raises FileNotFoundError where there is none, or where it lacks a part.
    """
    if resume == LATEST:
        steps = checkpoints(output)
        if not steps:
            raise FileNotFoundError(
                f"no checkpoint to resume from in {output}; they are named checkpoint-STEP"
            )
        folder = steps[max(steps)]
    else:
        folder = Path(resume)
    absent = [name for name in PARTS if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"checkpoint {folder} lacks {', '.join(absent)}")
    return folder


def checkpoints(output: Path) -> dict[int, Path]:
    """The checkpoints of a run, by step."""
    found = {each: _NAME.fullmatch(each.name) for each in output.glob("checkpoint-*")}
    return {int(match[1]): folder for folder, match in found.items() if match}


def restore(folder: Path, trainer: Trainer, attachment: Attachment, config: Mapping[str, Any]) -> None:
    """Puts a checkpoint into a new trainer: factors, moments, step, losses and loss scaler.

    Raises ValueError where a key that decides the losses differs from the checkpoint's, listing both, and for a
    damaged checkpoint.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / OPTIMIZER)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    _check_settings(folder, state["config"], json.loads(json.dumps(dict(config))))
    attachment.load_state_dict(formats.load(folder / ADAPTER).tensors)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.split(".", 1)
        moments.setdefault(int(parameter), {})[name] = value
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.losses = state["step"], list(state["losses"])


def _check_settings(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    free = FREE_ON_RESUME - ({"steps"} if saved["decay"] == "cosine" else set())
    differing = [key for key in {**saved, **now} if key not in free and saved.get(key) != now.get(key)]
    if differing:
        pairs = "\n".join(
            f"    {key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in differing
        )
        raise ValueError(f"checkpoint {folder} was trained with other settings:\n{pairs}")
