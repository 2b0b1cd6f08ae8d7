"""`kronafuse train`: the keys of `TrainConfig` as flags over a TOML file."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import typer

from ..train import require_libraries
from ..train.config import LoopSettings, TrainConfig
from ..train.options import build, read_toml


def train(config: Path | None, **flags: Any) -> None:
    """Train an adapter on an image folder.

    CONFIG is a TOML file with the names of the flags as keys (batch_size for --batch-size); a flag counts
    instead of its key. Also runs under `accelerate launch -m kronafuse train`. Ctrl-C or SIGTERM
    finishes the step and saves a checkpoint; --resume latest goes on from it, with the losses that an uninterrupted
    run would have.
    """
    require_libraries()
    from ..train.run import train as run

    values = read_toml(config) if config is not None else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    run(build(TrainConfig, values))


def _signature() -> inspect.Signature:
    """`train`'s signature with one flag for each field of `TrainConfig`; None stands for "not given"."""
    config = typer.Argument(None, metavar="[CONFIG]", help="TOML file.", show_default=False)
    parameters = [
        inspect.Parameter(
            "config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=config, annotation=Path | None
        )
    ]
    hints = get_type_hints(TrainConfig)
    inherited = {each.name for each in fields(LoopSettings)}
    for each in sorted(fields(TrainConfig), key=lambda each: each.name in inherited):
        text = each.metadata["help"]
        if "choices" in each.metadata:
            text += f": {', '.join(each.metadata['choices'])}"
        if each.default is not MISSING and each.default is not None:
            text += f" (default: {each.default})"
        flag = typer.Option(None, help=text[0].upper() + text[1:], show_default=False)
        parameters.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=flag,
                annotation=_flag_type(hints[each.name]),
            )
        )
    return inspect.Signature(parameters)


def _flag_type(hint: Any) -> Any:
    """What the command line reads for a field: tuples come as text, and `build` takes them apart."""
    kind = (
        next((each for each in get_args(hint) if each is not type(None)), hint)
        if type(None) in get_args(hint)
        else hint
    )
    return str | None if get_origin(kind) is tuple else kind | None


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: each.annotation for name, each in _signature().parameters.items()}
