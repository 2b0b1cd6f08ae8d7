"""`impl="reference"`: the definition's forward, and its backward written out through the dense dW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ref import delta_weight, kron_linear_group_ref
from .terms import FrozenLinear, KronTerm


def forward(
    x: Tensor, layers: Sequence[FrozenLinear], _small_bytes: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(y of each layer, nothing saved); x (M, K)."""
    terms = sum(len(layer.terms) for layer in layers)
    return kron_linear_group_ref(x, layers), [x.new_empty(0) for _ in range(terms)]


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[FrozenLinear],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `algorithm.backward`, in its order; those not needed are computed all the same."""
    dx = x.new_zeros(x.shape)
    layer_grads: list[Tensor] = []
    term_grads: list[Tensor] = []
    for dy, layer in zip(dys, layers, strict=True):
        d_weight = dy.t() @ x
        total = [] if layer.weight is None else [layer.weight]
        total += [delta_weight(term, x.dtype) for term in layer.terms]
        for each in total:
            dx = dx + dy @ each
        layer_grads += [d_weight, dy.sum(0)]
        for term in layer.terms:
            term_grads += _term_backward(d_weight, term)
    return [dx, *layer_grads, *term_grads]


def _term_backward(d_weight: Tensor, term: KronTerm) -> list[Tensor]:
    """Gradients of a, b, b_down, scale and row_scale from dW = dyᵀ x (N, K)."""
    dtype, empty = d_weight.dtype, d_weight.new_empty(0)
    b = term.b.to(dtype)
    whole = b if term.b_down is None else b @ term.b_down.to(dtype)
    a = whole.new_ones((1, 1)) if term.a is None else term.a.to(dtype)
    plain = delta_weight(term._replace(scale=1.0, row_scale=None), dtype)
    rows = d_weight.new_ones(d_weight.shape[0]) if term.row_scale is None else term.row_scale.to(dtype)
    scaled = (term.scale * rows)[:, None] * d_weight
    (n1, k1), (n2, k2) = a.shape, whole.shape
    sides = scaled.unflatten(0, (n2, n1)).transpose(0, 1) if term.shuffled else scaled.unflatten(0, (n1, n2))
    blocks = sides.unflatten(2, (k1, k2))  # (N1, N2, K1, K2)
    da = empty if term.a is None else torch.einsum("ipjq,pq->ij", blocks, whole).to(term.a.dtype)
    d_whole = torch.einsum("ipjq,ij->pq", blocks, a)
    db, db_down = d_whole, empty
    if term.b_down is not None:
        db, db_down = d_whole @ term.b_down.to(dtype).t(), (b.t() @ d_whole).to(term.b_down.dtype)
    dscale = (d_weight * rows[:, None] * plain).sum()
    drow_scale = empty
    if term.row_scale is not None:
        drow_scale = (term.scale * (d_weight * plain).sum(1)).to(term.row_scale.dtype)
    return [da, db.to(term.b.dtype), db_down, dscale, drow_scale]
