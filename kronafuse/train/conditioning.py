"""From conditions (captions or class names) to what a U-Net is given beside its noisy input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..formats.tensors import save_tensors
from .files import write_json
from .rng import generator_for

UNCONDITIONAL = ""
"""The condition that stands for none, as classifier-free guidance needs it."""

CLASS_TOKENS = "class_tokens.safetensors"
CLASS_NAMES = "class_names.json"


class Conditioning(Protocol):
    """Encodes conditions; `check` raises ValueError for those it does not know.

    `encode` gives the keyword arguments of the U-Net for images of `resolution` pixels a side, of which
    `encoder_hidden_states`, (batch, L, width), is what cross-attention reads.
    """

    def check(self, conditions: Sequence[str]) -> None: ...

    def encode(self, conditions: Sequence[str], resolution: int) -> dict[str, Any]: ...

    def to(self, device: torch.device) -> None: ...


class ClassTokens:
    """Frozen tokens for each class.

    names: the classes, in the order of the table's rows
    table: (classes + 1, L, width); the last row is the unconditional one
    """

    def __init__(self, names: Sequence[str], table: Tensor) -> None:
        if len(table) != len(names) + 1:
            raise ValueError(
                f"class tokens of {len(names)} classes need {len(names) + 1} rows; got {tuple(table.shape)}"
            )
        self.names, self.table = tuple(names), table
        self._rows = {name: row for row, name in enumerate((*self.names, UNCONDITIONAL))}

    @classmethod
    def random(cls, names: Sequence[str], length: int, width: int, seed: int) -> ClassTokens:
        """Tokens drawn from a normal distribution."""
        generator = generator_for(seed, "class tokens")
        return cls(names, torch.randn(len(names) + 1, length, width, generator=generator))

    def check(self, conditions: Sequence[str]) -> None:
        unknown = sorted({each for each in conditions if each not in self._rows})
        if unknown:
            raise ValueError(
                f"the base model has no class {', '.join(map(repr, unknown))};"
                f" its classes are: {', '.join(self.names)}"
            )

    def encode(self, conditions: Sequence[str], resolution: int) -> dict[str, Any]:
        self.check(conditions)
        return {"encoder_hidden_states": self.table[[self._rows[each] for each in conditions]]}

    def to(self, device: torch.device) -> None:
        self.table = self.table.to(device)

    def save(self, folder: Path) -> None:
        """Writes the table in float32 and the names; OSError where the disk refuses."""
        save_tensors({"tokens": self.table.float().cpu()}, folder / CLASS_TOKENS)
        write_json(folder / CLASS_NAMES, self.names)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> ClassTokens:
        try:
            names = json.loads((folder / CLASS_NAMES).read_text(encoding="utf-8"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{CLASS_NAMES} must be a list of names; got {names!r}")
            return cls(names, load_file(folder / CLASS_TOKENS)["tokens"].to(dtype))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"class tokens of base model {folder} cannot be read: {error}") from error
