"""Factors that fully_shard has distributed over processes, as whole tensors and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every process of its mesh; any other tensor as it is."""
    return tensor.full_tensor() if _distributed(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` distributed as `parameter` is, from the mesh's first process; as it is for a plain parameter."""
    if not _distributed(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def _distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
