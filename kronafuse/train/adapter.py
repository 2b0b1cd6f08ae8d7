"""From the keys of a configuration, or from an adapter file, to an adapter on a base model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import formats
from ..models.attach import Attachment, attach
from ..nn.bottleneck_spec import Bottleneck
from ..nn.specs import KronA, LoKr, LoRA
from .base import Base
from .config import TrainConfig

AdapterKind = type[KronA] | type[LoKr] | type[LoRA] | type[Bottleneck]
KINDS: dict[str, AdapterKind] = {"krona": KronA, "lokr": LoKr, "lora": LoRA, "bottleneck": Bottleneck}
"""The values of the key `adapter`."""

KEYS = (
    "factors", "factor", "rank", "alpha", "scale", "shuffled", "targets", "source", "sink", "width", "budget",
    "activation", "form", "terms", "init",
)  # fmt: skip
"""The keys that describe an adapter; which of them count depends on its kind."""


def adapter_spec(config: TrainConfig) -> KronA | LoKr | LoRA | Bottleneck:
    """The spec that a configuration describes; ValueError for a key that its kind does not have."""
    kind = KINDS[config.adapter]
    given: dict[str, Any] = {key: getattr(config, key) for key in KEYS if getattr(config, key) is not None}
    taken = [key for key in KEYS if key in {each.name for each in fields(kind)}]
    foreign = [key for key in given if key not in taken]
    if foreign:
        raise ValueError(
            f"adapter {config.adapter!r} does not take {', '.join(foreign)}; its keys are: {', '.join(taken)}"
        )
    if "budget" in given:
        given.setdefault("width", None)
    return kind(**given)


def attach_file(base: Base, path: Path) -> Attachment:
    """Puts the adapter of a file on the base model; the errors are those of `formats.load` and `attach`."""
    if not path.exists():
        raise FileNotFoundError(f"adapter file {path} does not exist")
    return attach(base.unet, formats.load(path))
