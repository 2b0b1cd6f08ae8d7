"""The one place where kernels get the memory that they write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_poison: ContextVar[bool] = ContextVar("poison", default=False)


def new_output(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor on `like`'s device (and in its dtype); the caller's kernel writes every element."""
    out = torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    return out.fill_(float("nan")) if _poison.get() else out


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it every new output is filled with NaN first, so that an element left unwritten shows."""
    token = _poison.set(True)
    try:
        yield
    finally:
        _poison.reset(token)
