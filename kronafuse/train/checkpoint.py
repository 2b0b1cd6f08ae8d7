"""A trainer's state on disk: a folder that is whole or absent, without pickle.

adapter.safetensors     the adapter, in kronafuse's own format
optimizer.safetensors   AdamW's moments, as PARAMETER.NAME
trainer.json            step, losses, configuration, the names of the moments, the loss scaler's state, versions,
                        `digests` of the tensors in the other two, and `digest`, of everything else in this file

The digests are those of `formats.digest`, compared before anything is resumed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..formats.digest import digest
from ..formats.reading import parse_once
from ..formats.tensors import open_tensors, save_tensors
from ..models.attach import Attachment
from ..version import VERSION
from .config import FREE_ON_RESUME
from .files import replace_folder, write_json
from .loop import Trainer
from .moments import check_moments, moments_of, put_moments

ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"
PARTS = (ADAPTER, OPTIMIZER, STATE)
LATEST = "latest"
DIGEST, DIGESTS = "digest", "digests"

KINDS = {"step": int, "config": dict, "losses": list, "moments": list, "scaler": (dict, type(None))}
"""What `restore` reads from trainer.json."""

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
    moments, adapter = moments_of(trainer.optimizer), attachment.adapter_file()
    scaler = trainer.accelerator.scaler
    state = {
        "kronafuse": VERSION,
        "torch": str(torch.__version__),
        "step": trainer.step,
        "config": dict(config),
        "scaler": None if scaler is None else scaler.state_dict(),
        "moments": list(moments),
        "losses": trainer.losses,
        DIGESTS: {ADAPTER: digest({}, adapter.tensors), OPTIMIZER: digest({}, moments)},
    }
    try:
        with replace_folder(folder) as partial:
            formats.save(partial / ADAPTER, adapter)
            save_tensors(moments, partial / OPTIMIZER)
            write_json(partial / STATE, sealed(state))
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
    checkpoint that is damaged or not as it was written; nothing is changed then. Warns for one that was written
    before checkpoints had digests.
    """
    with _damage_named(folder):
        state = _read_state(folder / STATE)
    _check_settings(folder, state["config"], json.loads(json.dumps(dict(config))))
    scaler = trainer.accelerator.scaler
    with _damage_named(folder):
        moments = open_tensors("train", folder / OPTIMIZER).read()
        check_moments(moments, trainer.parameters, state["moments"])
        _check_digest(state, OPTIMIZER, moments)
        factors = formats.load(folder / ADAPTER).tensors
        _check_digest(state, ADAPTER, factors)
        if (state["scaler"] or {}).keys() != (scaler.state_dict() if scaler is not None else {}).keys():
            raise ValueError(f"{STATE} has the state of another loss scaler")
        attachment.load_state_dict(factors)
    put_moments(trainer.optimizer, moments)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.losses = state["step"], state["losses"]


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error


def _read_state(path: Path) -> dict[str, Any]:
    state = parse_once(path.read_bytes())
    if not isinstance(state, dict):
        raise ValueError(
            f"{path.name} must be an object with {', '.join(KINDS)}; it is {type(state).__name__}"
        )
    wrong = [key for key, kind in KINDS.items() if key not in state or not isinstance(state[key], kind)]
    if wrong:
        raise ValueError(f"{path.name} has no {', '.join(wrong)}, or another kind of value there")
    losses = state["losses"]
    if len(losses) != state["step"] or not all(isinstance(loss, float) for loss in losses):
        raise ValueError(
            f"{path.name} must have a loss for each of {state['step']} steps; it has {len(losses)}"
        )
    if DIGESTS not in state and DIGEST not in state:
        warnings.warn(
            f"checkpoint {path.parent} has no digests, so that damage to it may go unnoticed; those written now have",
            UserWarning,
            stacklevel=4,
        )
    elif sealed({key: value for key, value in state.items() if key != DIGEST}) != state:
        raise ValueError(f"{path.name} is not as it was written: its digest is another than it says")
    elif not isinstance(state.get(DIGESTS), dict) or set(state[DIGESTS]) != {ADAPTER, OPTIMIZER}:
        raise ValueError(f"{path.name} must have the digests of {ADAPTER} and {OPTIMIZER}")
    return state


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as JSON values, with the digest of itself."""
    values = json.loads(json.dumps(dict(state)))
    return {**values, DIGEST: digest(values, {})}


def _check_digest(state: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where a file of a checkpoint holds other tensors than those that were written."""
    if DIGESTS in state and digest({}, tensors) != state[DIGESTS][name]:
        raise ValueError(
            f"{name} is not as it was written: the digest of its tensors is another than {STATE} says"
        )


def _check_settings(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    free = FREE_ON_RESUME - ({"steps"} if saved.get("decay") == "cosine" else set())
    differing = [key for key in {**saved, **now} if key not in free and saved.get(key) != now.get(key)]
    if differing:
        pairs = "\n".join(
            f"    {key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in differing
        )
        raise ValueError(f"checkpoint {folder} was trained with other settings or data:\n{pairs}")
