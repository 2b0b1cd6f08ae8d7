"""Tensors as one safetensors file, whole or not there."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from ..checks import check_dtype, check_tensor
from .atomic import written_beside


def check_values(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises TypeError for what is no floating tensor, ValueError for one with NaN or infinity in it."""
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor)
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite; got NaN or infinity in it")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors with `metadata`, beside the place and renamed (`written_beside`).

    Raises OSError with the path where the disk refuses; nothing half-written is left. The same tensors give
    the same bytes with at most one entry of metadata: safetensors writes several in a changing order.
    """
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with written_beside(path) as beside:
        try:
            safetensors_torch.save_file(whole, beside, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot write the tensors: {error}", str(path)) from error
