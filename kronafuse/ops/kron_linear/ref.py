"""The definition: the dense update, one product, any dtype and device. What every kernel is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .terms import FrozenLinear, KronTerm


def delta_weight(term: KronTerm, dtype: torch.dtype) -> Tensor:
    """scale · row_scale ⊙ (A ⊗ B), (N, K); shuffled: row n2·N1 + n1 holds what row n1·N2 + n2 of A ⊗ B holds."""
    # The scale comes first: at 0 no product of finite factors overflows.
    b = (term.scale.to(dtype) if isinstance(term.scale, Tensor) else term.scale) * term.b.to(dtype)
    if term.b_down is not None:
        b = b @ term.b_down.to(dtype)
    a = b.new_ones((1, 1)) if term.a is None else term.a.to(dtype)
    product = torch.einsum("ij,pq->ipjq", a, b)
    if term.shuffled:
        product = product.transpose(0, 1)
    delta = product.flatten(2).flatten(0, 1)
    return delta if term.row_scale is None else term.row_scale.to(dtype)[:, None] * delta


def kron_linear_group_ref(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    """y = x Wᵀ + bias + base + Σ x ΔWᵀ of each layer, by the definition."""
    return [_layer_ref(x, layer) for layer in layers]


def _layer_ref(x: Tensor, layer: FrozenLinear) -> Tensor:
    parts = [] if layer.weight is None else [x @ layer.weight.t()]
    parts += [x @ delta_weight(term, x.dtype).t() for term in layer.terms]
    parts += [part for part in (layer.bias, layer.base) if part is not None]
    y = parts[0]
    for part in parts[1:]:
        y = y + part
    return y


def kron_linear_ref(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    *,
    b_down: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
) -> Tensor:
    """y = x Wᵀ + bias + scale · x (A ⊗ B)ᵀ, by the definition; arguments as `kron_linear`."""
    term = KronTerm(a, b, b_down, scale, shuffled)
    return _layer_ref(x, FrozenLinear(weight, (term,), bias))


def kron_delta_ref(
    x: Tensor,
    a: Tensor | None,
    b: Tensor,
    *,
    b_down: Tensor | None = None,
    base: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
) -> Tensor:
    """y = base + scale · x (A ⊗ B)ᵀ, by the definition; arguments as `kron_delta`."""
    term = KronTerm(a, b, b_down, scale, shuffled)
    return _layer_ref(x, FrozenLinear(None, (term,), None, base))
