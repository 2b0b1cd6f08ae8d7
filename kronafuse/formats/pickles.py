"""Tensors from torch.save files, of which nothing is executed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor


def load_tensors(op: str, path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU. Raises ValueError for a file that is truncated or holds anything else, OSError."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about protocols of pickles that torch.save did not write: refused below
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise ValueError(
                f"{op}: {path} is no torch.save file of tensors alone; it has not been executed"
            ) from error
        except Exception as error:  # torch's readers raise whatever a damaged file leads them to
            raise ValueError(f"{op}: {path} is not a whole torch.save file: {error!r}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{op}: {path} must hold named tensors; got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{op}: {path} must hold named tensors; got {name!r}: {type(value).__name__}")
    return dict(found)
