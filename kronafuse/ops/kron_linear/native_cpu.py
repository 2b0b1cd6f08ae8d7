"""The primitives on the native CPU kernels, around torch's own GEMMs: never N×K, nothing (M, N) beside y.

The kernels do what no GEMM does well, in one pass over memory: the left factor beside an identity, what is added to
y with it (bias, base, row scale, a shuffled order), and sums over tokens. Large products are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ...planner import SMALL_BYTES
from .. import scales
from ..outputs import new_output
from . import composed
from .eager import weight_last
from .maps import KronMap, first_rows, first_scale, inner_rows
from .native_cpu_products import (
    add_by_gemm,
    add_in_chunks,
    add_product,
    add_sums,
    add_up,
    adds_by_gemm,
    as_factor,
    chunks,
    first_product,
    inner_width,
    mix_tokens,
    number,
    plus,
    rows_of,
    torch_sums,
    up_by_gemm,
)

CASTS_FACTORS: bool = True
"""Kernels read a factor in its own dtype; what torch multiplies is cast here, by them."""

_ops = native.cpu()
_reduce, _column_sums = _ops.reduce.default, _ops.column_sums.default
_ONE = torch.ones((1, 1))


def one(_like: Tensor) -> Tensor:
    """The 1×1 identity."""
    return _ONE


def shrink(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """The first product of each map of x (M, in), scaled; low rank with a left factor: P, unscaled."""
    return [first_product(x, kron) for kron in maps]


def mix(p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
    """scale · A p[m]: (M, I1, R), (O1, I1) -> (M, O1, R)."""
    return mix_tokens(p, a, scale)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    maps: Sequence[KronMap],
    inners: Sequence[Tensor | None],
    owns_base: bool = False,
) -> Tensor:
    """x Wᵀ + bias + base + Σ up(inner), (M, out); a base that it owns becomes the sum."""
    y, last = None, weight is not None and weight_last(x, maps)
    after = None
    if last and not owns_base:
        base, after = None, base
    if owns_base and base is not None:
        y, base = base if weight is None or last else base.addmm_(x, weight.t()), None
    elif weight is not None and not last:
        y, bias = torch.nn.functional.linear(x, weight, bias), None
    # Terms that a kernel adds come first: with them it adds bias and base.
    tails = sorted(zip(maps, inners, strict=True), key=lambda tail: adds_by_gemm(tail[0]))
    for kron, inner in tails:
        if inner is not None and adds_by_gemm(kron):
            if y is None and bias is None and base is None:
                y = up_by_gemm(kron, inner)
                continue
            if y is None or bias is not None or base is not None:
                y, bias, base = plus(y, x, kron.left[0] * kron.right[0], bias, base), None, None
            add_by_gemm(y, kron, inner)
            continue
        accumulate = y is not None
        if y is None:
            y = new_output(x, (x.shape[0], kron.left[0] * kron.right[0]))
        if inner is None:
            add_in_chunks(y, kron, x, bias, base, accumulate)
        else:
            add_product(y, kron, inner, bias, base, accumulate)
        bias = base = None
    if y is None or bias is not None or base is not None:
        source = bias if base is None else base
        y = plus(y, x, 0 if source is None else source.shape[-1], bias, base)
    if last:
        assert weight is not None
        y.addmm_(x, weight.t())
    return y if after is None else plus(y, x, y.shape[1], None, after)


def in_one_pass(
    x: Tensor, _weight: Tensor | None, maps: Sequence[KronMap], kept: Sequence[bool] | None = None
) -> list[bool]:
    """The fat maps whose T nobody else takes: it exists for some tokens at a time, in a cache."""
    kept = [False] * len(maps) if kept is None else kept
    return [
        not kron.thin and not keep and x.shape[0] * inner_width(kron) * x.element_size() > SMALL_BYTES
        for kron, keep in zip(maps, kept, strict=True)
    ]


def second_stages() -> None:
    """Nothing is put off here."""


def reduce(
    p: Tensor,
    q: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    p_scale: Tensor | None = None,
    stages: None = None,
) -> Tensor:
    """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: (M, G, P), (M, G, Q) -> (P, Q) in `dtype`."""
    if p_scale is None and dtype == p.dtype and torch_sums(p, q):
        return scales.product(rows_of(p).t(), rows_of(q), scale)
    out = new_output(p, (p.shape[2], q.shape[2]), dtype)
    _reduce(p, q, p_scale, number(scale), False, out)
    return out


def takes_in_parts(dy: Tensor, kron: KronMap) -> bool:
    """A fat term of more than one chunk: neither T leaves the cache."""
    width = max(inner_width(kron), inner_width(kron.adjoint()))
    return len(list(chunks(dy.shape[0], width * dy.element_size()))) > 1


def backward_in_parts(
    dy: Tensor, x: Tensor, kron: KronMap, dtypes: Sequence[torch.dtype | None], dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that contract dy and x, and the term's part of dx, from both T of some tokens at a time."""
    adjoint = kron.adjoint()
    sums: list[Tensor | None] = [None, None]
    width = max(inner_width(kron), inner_width(adjoint))
    for part in chunks(x.shape[0], width * x.element_size()):
        own_x, own_dy = x[part], dy[part]
        if dtypes[0] is not None:
            rows, inner = first_rows(adjoint, own_dy), inner_rows(adjoint, first_product(own_x, kron))
            sums[0] = add_sums(sums[0], rows, inner, first_scale(adjoint))
        down = first_product(own_dy, adjoint)
        if dx is not None:
            add_up(dx[part], adjoint, down)
        if dtypes[1] is not None:
            sums[1] = add_sums(sums[1], inner_rows(kron, down), first_rows(kron, own_x), None)
    from_dy, from_x = (
        None if each is None or dtype is None else as_factor(each, dtype)
        for each, dtype in zip(sums, dtypes, strict=True)
    )
    return from_dy, from_x


def sum_tokens(dy: Tensor) -> Tensor:
    """Σ over tokens of dy (M, N), (N,)."""
    out = new_output(dy, (dy.shape[1],))
    _column_sums(dy, None, False, out)
    return out


def dot(factor: Tensor, gradient: Tensor) -> Tensor:
    """Σ factor ⊙ gradient of two matrices, 0-d in the gradient's dtype."""
    out = new_output(gradient, (1, 1))
    _reduce(as_factor(factor, gradient.dtype).unsqueeze(2), gradient.unsqueeze(2), None, 1.0, False, out)
    return out.view(())


def row_dots(dy: Tensor, x: Tensor, kron: KronMap, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over tokens of dy ⊙ up(inner), (N,) in `dtype`; the sum is in float32."""
    out = new_output(dy, (dy.shape[1],), torch.float32)
    width = dy.shape[1] * dy.element_size()
    for index, part in enumerate(chunks(dy.shape[0], width)):
        delta = linear(x[part], None, None, None, [kron], [inner[part]])
        _column_sums(dy[part], delta, index > 0, out)
    return as_factor(out.unsqueeze(0), dtype).squeeze(0)


shrink_reduce, reduce_shared = composed.shrink_reduce_of(shrink, reduce), composed.reduce_shared_of(reduce)
