"""The eager chain: what a careful user writes in plain torch. The yardstick of accuracy and a baseline of speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.kron_linear.maps import kron_view
from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from ..planner import choose
from ..shapes import KronShape


def eager_chain(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    """F.linear, plus scale times the einsums of the planned order, all in x's dtype and through autograd."""
    ys = []
    for layer in layers:
        parts = [] if layer.weight is None else [torch.nn.functional.linear(x, layer.weight, layer.bias)]
        parts += [_delta(x, term) for term in layer.terms]
        if layer.weight is None and layer.bias is not None:
            parts.append(layer.bias)
        if layer.base is not None:
            parts.append(layer.base)
        ys.append(sum(parts[1:], start=parts[0]))
    return ys


def _delta(x: Tensor, term: KronTerm) -> Tensor:
    shape = KronShape.of(term.a, term.b, term.b_down)
    b = term.b.to(x.dtype)
    a = b.new_ones((1, 1)) if term.a is None else term.a.to(x.dtype)
    view = kron_view(x.reshape(-1, shape.k), shape.k1, shape.k2, shuffled=False)
    order = choose(shape).order
    if order == "a_first":
        delta = torch.einsum("mik,pk->mip", torch.einsum("ij,mjk->mik", a, view), b)
    elif order == "b_first":
        delta = torch.einsum("ij,mjp->mip", a, torch.einsum("pk,mjk->mjp", b, view))
    else:
        assert term.b_down is not None
        down = torch.einsum("rk,mjk->mjr", term.b_down.to(x.dtype), view)
        delta = torch.einsum("mir,pr->mip", torch.einsum("ij,mjr->mir", a, down), b)
    delta = (delta.transpose(1, 2) if term.shuffled else delta).reshape(*x.shape[:-1], shape.n)
    scale = term.scale.to(x.dtype) if isinstance(term.scale, Tensor) else term.scale
    delta = scale * delta
    return delta if term.row_scale is None else term.row_scale.to(x.dtype) * delta
