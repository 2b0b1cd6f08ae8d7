"""Forward and backward of a group of adapted layers, in four primitives.

A backend (`eager.py`, `kernels.py`) supplies the primitives; the order of multiplication, what is saved and
which gradient comes from which product are decided here, once for all of them.

    shrink(x, maps)  -> T of each map     the first product, scaled; low rank: P = B_down x, scaled if A is absent
    mix(p, a, scale) -> scale · A p       (M, I1, R) -> (M, O1, R)
    linear(x, weight, bias, base, maps, inners) -> x Wᵀ + bias + base + Σ second products of the inners
    reduce(p, q, ...) -> Σ over m and g of p[m, g, :]ᵀ q[m, g, :]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .maps import KronMap
from .terms import FrozenLinear


class Primitives(Protocol):
    """What a backend supplies; every result is a new tensor and every one of its elements is written."""

    def shrink(self, x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
        """T (M, inner) of each map of the same x (M, in), from one read of x where the backend can."""
        ...

    def mix(self, p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
        """scale · A p[m] for every token: p (M, I1, R), a (O1, I1) -> (M, O1, R)."""
        ...

    def linear(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        maps: Sequence[KronMap],
        inners: Sequence[Tensor],
    ) -> Tensor:
        """x Wᵀ + bias + base + Σ up(inner), (M, out); weight (out, in) in any strides. Not all four absent."""
        ...

    def reduce(
        self, p: Tensor, q: Tensor, scale: float | Tensor, dtype: torch.dtype, p_scale: Tensor | None = None
    ) -> Tensor:
        """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: p (M, G, P), q (M, G, Q), p_scale (G, P) -> (P, Q)."""
        ...


def _tokens(part: Tensor, first: int, second: int) -> Tensor:
    """(M, first·second) seen as (M, first, second)."""
    return part.view(part.shape[0], first, second)


def inner_of(kron: KronMap, shrunk: Tensor, primitives: Primitives) -> Tensor:
    """What the up map takes: the shrunk T itself, or scale · A P for a low-rank term with a left factor."""
    if kron.order != "low_rank" or kron.a is None:
        return shrunk
    rank = kron.b.shape[1]
    p = _tokens(shrunk, kron.left[1], rank)
    return primitives.mix(p, kron.a, kron.scale).flatten(1)


def forward(
    x: Tensor, layers: Sequence[FrozenLinear], primitives: Primitives
) -> tuple[list[Tensor], list[Tensor]]:
    """(y of each layer, saved T of each term); the T of a fat term is saved as an empty tensor.

    x: (M, K), layers with `base` as (M, N)
    """
    maps = [[KronMap.of(term, x.dtype) for term in layer.terms] for layer in layers]
    flat = [kron for group in maps for kron in group]
    shrunk = iter(primitives.shrink(x, flat) if flat else [])
    ys, saved = [], []
    for layer, group in zip(layers, maps, strict=True):
        parts = [next(shrunk) for _ in group]
        inners = [inner_of(kron, part, primitives) for kron, part in zip(group, parts, strict=True)]
        ys.append(primitives.linear(x, layer.weight, layer.bias, layer.base, group, inners))
        saved += [part if kron.thin else x.new_empty(0) for kron, part in zip(group, parts, strict=True)]
    return ys, saved


LAYER_GRADIENTS = 2
"""Gradients per layer in the flat list: weight, bias (that of base is dy itself)."""
TERM_GRADIENTS = 5
"""Gradients per term in the flat list: a, b, b_down, scale, row_scale."""


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layers: Sequence[FrozenLinear],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    primitives: Primitives,
) -> list[Tensor]:
    """dx, then weight and bias of each layer, then a, b, b_down, scale, row_scale of each term.

    `needs` says, in that order, which are computed; the others are empty tensors.
    """
    empty = x.new_empty(0)
    dx: Tensor | None = None
    layer_grads: list[Tensor] = []
    term_grads: list[Tensor] = []
    flags = iter(needs)
    need_x = next(flags)
    needs_layer = [[next(flags) for _ in range(LAYER_GRADIENTS)] for _ in layers]
    needs_term = [[[next(flags) for _ in range(TERM_GRADIENTS)] for _ in layer.terms] for layer in layers]
    parts = iter(saved)
    for dy, layer, (need_weight, need_bias), needs_group in zip(
        dys, layers, needs_layer, needs_term, strict=True
    ):
        maps = [KronMap.of(term, x.dtype) for term in layer.terms]
        adjoints = [kron.adjoint() for kron in maps]
        downs = primitives.shrink(dy, adjoints) if adjoints and (need_x or any(map(any, needs_group))) else []
        if need_x:
            inners = [
                inner_of(adjoint, down, primitives) for adjoint, down in zip(adjoints, downs, strict=True)
            ]
            if layer.weight is not None or inners:
                weight = None if layer.weight is None else layer.weight.t()
                dx = primitives.linear(dy, weight, None, dx, adjoints, inners)
        for index, (kron, term, needed) in enumerate(zip(maps, layer.terms, needs_group, strict=True)):
            part = next(parts)
            if any(needed):
                dtypes = [None if each is None else each.dtype for each in (term.a, term.b, term.b_down)]
                term_grads += term_gradients(kron, dy, x, part, downs[index], needed, dtypes, primitives)
            else:
                term_grads += [empty] * TERM_GRADIENTS
        layer_grads.append(dy.t() @ x if need_weight else empty)
        layer_grads.append(dy.sum(0) if need_bias else empty)
    return [dx if dx is not None else empty, *layer_grads, *term_grads]


def term_gradients(
    kron: KronMap,
    dy: Tensor,
    x: Tensor,
    part: Tensor,
    down: Tensor,
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
    primitives: Primitives,
) -> list[Tensor]:
    """Gradients of a, b, b_down, scale and row_scale of one term.

    part: what forward saved of it, empty for a fat term; down: the first product of dy on the adjoint map
    """
    empty = x.new_empty(0)
    need_a, need_b, need_b_down, need_scale, need_row_scale = needs
    if part.numel() == 0 and (need_row_scale or need_b or (need_a and kron.order != "a_first")):
        part = primitives.shrink(x, [kron])[0]
    da = db = db_down = dscale = drow_scale = empty
    if need_a or need_b or need_b_down:
        factor = factor_gradients(kron, dy, x, part, down, (need_a, need_b, need_b_down), dtypes, primitives)
        da, db, db_down = (empty if each is None else each for each in factor)
    if need_scale:
        dscale = scale_gradient(kron.unscaled(), dy, x, primitives)
    if need_row_scale:
        assert kron.out_scale is not None
        drow_scale = row_scale_gradient(kron, dy, x, part, primitives)
    return [da, db, db_down, dscale, drow_scale]


def factor_gradients(
    kron: KronMap,
    dy: Tensor,
    x: Tensor,
    part: Tensor,
    down: Tensor,
    needs: tuple[bool, bool, bool],
    dtypes: Sequence[torch.dtype | None],
    primitives: Primitives,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA, dB and dB_down, each in its factor's dtype; the scale is in `part` or in `down`, once in each product."""
    need_a, need_b, need_b_down = needs
    grads, inputs = kron.out_view(dy), kron.in_view(x)  # (M, N1, N2), (M, K1, K2)
    row_scale = None
    if kron.out_scale is not None:
        row_scale = kron_row_view(kron.out_scale, kron)
    transposed = None if row_scale is None else row_scale.t()
    da = db = db_down = None
    dtype_a, dtype_b, dtype_down = dtypes
    if kron.order == "a_first":  # part U (M, N1, K2), down S (M, N1, K2)
        if need_a:
            s = _tokens(down, *kron.inner)
            da = primitives.reduce(s.mT, inputs.mT, 1.0, dtype_a or x.dtype)
        if need_b:
            u = _tokens(part, *kron.inner)
            db = primitives.reduce(grads, u, 1.0, dtype_b or x.dtype, row_scale)
    elif kron.order == "b_first":  # part V (M, K1, N2), down Q (M, K1, N2)
        if need_a:
            v = _tokens(part, *kron.inner)
            da = primitives.reduce(grads.mT, v.mT, 1.0, dtype_a or x.dtype, transposed)
        if need_b:
            q = _tokens(down, *kron.inner)
            db = primitives.reduce(q, inputs, 1.0, dtype_b or x.dtype)
    else:
        (n1, k1), rank = kron.left, kron.b.shape[1]
        if need_a and kron.a is not None:  # down F (M, N1, R), part P (M, K1, R), both unscaled
            f, p = _tokens(down, n1, rank), _tokens(part, k1, rank)
            da = primitives.reduce(f.mT, p.mT, kron.scale, dtype_a or x.dtype)
        if need_b:
            h = _tokens(inner_of(kron, part, primitives), n1, rank)
            db = primitives.reduce(grads, h, 1.0, dtype_b or x.dtype, row_scale)
        if need_b_down:
            e = _tokens(inner_of(kron.adjoint(), down, primitives), k1, rank)
            db_down = primitives.reduce(e, inputs, 1.0, dtype_down or x.dtype)
    return da, db, db_down


def kron_row_view(row_scale: Tensor, kron: KronMap) -> Tensor:
    """(N,) seen as (N1, N2)."""
    return kron.out_view(row_scale.unsqueeze(0)).squeeze(0)


def scale_gradient(kron: KronMap, dy: Tensor, x: Tensor, primitives: Primitives) -> Tensor:
    """Σ dy ⊙ (delta at scale 1), as the inner product of one factor with its own gradient."""
    part = primitives.shrink(x, [kron])[0]
    down = primitives.shrink(dy, [kron.adjoint()])[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    through_a = kron.a is not None
    needs = (through_a, not through_a, False)
    da, db, _ = factor_gradients(kron, dy, x, part, down, needs, (wide, wide, wide), primitives)
    factor, grad = (kron.a, da) if through_a else (kron.b, db)
    assert factor is not None
    assert grad is not None
    return (factor.to(wide) * grad).sum()


def row_scale_gradient(kron: KronMap, dy: Tensor, x: Tensor, part: Tensor, primitives: Primitives) -> Tensor:
    """Σ_m dy[m] ⊙ (delta[m] without row_scale), (N,)."""
    assert kron.out_scale is not None
    plain = replace(kron, out_scale=None)
    delta = primitives.linear(x, None, None, None, [plain], [inner_of(plain, part, primitives)])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (dy.to(wide) * delta.to(wide)).sum(0).to(kron.out_scale.dtype)
