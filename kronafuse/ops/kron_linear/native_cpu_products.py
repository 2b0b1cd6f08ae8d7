"""What the CPU primitives are made of: first products, second products into y, sums; by kernels and torch's GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import native
from .. import scales
from ..outputs import new_output
from .maps import KronMap, down_scale, first_factor

CHUNK_BYTES = 1 << 22
"""Of the rows that are rearranged, or of a fat T, at a time: what a shared cache holds beside its sources."""
LEAST_CHUNK = 64
"""Tokens of a chunk, at least: fewer make a GEMM slow."""
TORCH_SUMS = 1 << 8
"""Elements of a sum over tokens from which on torch's GEMM is the faster; below, its blocks are mostly empty."""

TORCH_MIX = 16
"""Rows and columns of a left factor from which on torch's batched GEMM multiplies bf16 faster, on AVX-512."""

_ops = native.cpu()
AVX512 = 2
"""The level at which torch has bf16 GEMMs in hardware."""
_mix, _reduce, _cast = _ops.mix.default, _ops.reduce.default, _ops.cast.default


def mix_tokens(p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
    """scale · A p[m]: (M, I1, R), (O1, I1) -> (M, O1, R)."""
    out = new_output(p, (p.shape[0], a.shape[0], p.shape[2]))
    _mix(p, a, None, None, None, None, number(scale), False, out)
    return out


def add_sums(sums: Tensor | None, p: Tensor, q: Tensor, p_scale: Tensor | None) -> Tensor:
    """[sums +] Σ (p_scale ⊙ p)ᵀ q, in float32: partial sums are never rounded to 16 bits."""
    first = sums is None
    if sums is None:
        sums = new_output(p, (p.shape[2], q.shape[2]), torch.float32)
    if p.dtype == torch.float32 and p_scale is None and torch_sums(p, q):
        if first:
            return torch.mm(rows_of(p).t(), rows_of(q))
        return sums.addmm_(rows_of(p).t(), rows_of(q))
    _reduce(p, q, p_scale, 1.0, not first, sums)
    return sums


def add_up(y: Tensor, kron: KronMap, inner: Tensor) -> None:
    """y += up(inner)"""
    if adds_by_gemm(kron):
        add_by_gemm(y, kron, inner)
    else:
        add_product(y, kron, inner, None, None, True)


def first_product(x: Tensor, kron: KronMap) -> Tensor:
    """T (M, inner) of one map."""
    if kron.order == "a_first":
        assert kron.a is not None
        if kron.right[1] == 1 and kron.in_scale is None:
            return scales.product(x, as_factor(kron.a, x.dtype).t(), kron.scale)
        if kron.in_scale is None and not kron.in_shuffled and torch_mixes(kron.a, x):
            left = as_factor(kron.a, x.dtype)
            return scales.batched_product(left, kron.in_view(x), kron.scale).flatten(1)
        out = new_output(x, (x.shape[0], kron.left[0] * kron.right[1]))
        target = out.view(x.shape[0], kron.left[0], kron.right[1])
        in_scale = None if kron.in_scale is None else kron.in_view(kron.in_scale.unsqueeze(0)).squeeze(0)
        _mix(kron.in_view(x), kron.a, in_scale, None, None, None, number(kron.scale), False, target)
        return out
    right = as_factor(first_factor(kron), x.dtype).t()
    scale = number(down_scale(kron))
    view = kron.in_view(x)
    if kron.in_scale is None and rows_merge(view):
        return scales.product(rows_of(view), right, scale).view(x.shape[0], kron.left[1] * right.shape[1])
    return _first_of_copies(view, kron, right, scale)


def _first_of_copies(view: Tensor, kron: KronMap, right: Tensor, scale: float) -> Tensor:
    """T where the rows of x (M, I1, I2) must be scaled or laid side by side first."""
    tokens, left, features = view.shape
    out = new_output(view, (tokens * left, right.shape[1]))
    in_scale = None if kron.in_scale is None else kron.in_view(kron.in_scale.unsqueeze(0)).squeeze(0)
    for part in chunks(tokens, left * features * view.element_size()):
        rows = view[part]
        copy = new_output(view, rows.shape)
        _mix(rows, None, in_scale, None, None, None, scale, False, copy)
        torch.mm(copy.flatten(0, 1), right, out=out[part.start * left : part.stop * left])
    return out.view(tokens, left * right.shape[1])


def adds_by_gemm(kron: KronMap) -> bool:
    """Whether torch's GEMM adds the second product into y where it lies."""
    if kron.out_scale is not None or kron.out_shuffled:
        return False
    return kron.order != "b_first" or kron.b.shape[0] == 1


def up_by_gemm(kron: KronMap, inner: Tensor) -> Tensor:
    """up(inner), (M, out), where nothing else is added."""
    if kron.order == "b_first":
        assert kron.a is not None
        return torch.mm(inner, as_factor(kron.a, inner.dtype).t())
    out = torch.mm(_inner_rows(kron, inner), as_factor(kron.b, inner.dtype).t())
    return out.view(inner.shape[0], kron.left[0] * kron.b.shape[0])


def add_by_gemm(y: Tensor, kron: KronMap, inner: Tensor) -> None:
    if kron.order == "b_first":
        assert kron.a is not None
        y.addmm_(inner, as_factor(kron.a, y.dtype).t())
    else:
        y.view(y.shape[0] * kron.left[0], kron.b.shape[0]).addmm_(
            _inner_rows(kron, inner), as_factor(kron.b, y.dtype).t()
        )


def _inner_rows(kron: KronMap, inner: Tensor) -> Tensor:
    return inner.view(inner.shape[0] * kron.left[0], kron.b.shape[1])


def add_product(
    y: Tensor, kron: KronMap, inner: Tensor, bias: Tensor | None, base: Tensor | None, accumulate: bool
) -> None:
    """y = [y +] bias + base + out_scale ⊙ up(inner), inner (M, inner), by one pass over y."""
    target = kron.out_view(y)
    bias = None if bias is None else kron.out_view(bias.unsqueeze(0)).squeeze(0)
    base = None if base is None else kron.out_view(base)
    out_scale = None if kron.out_scale is None else kron.out_view(kron.out_scale.unsqueeze(0)).squeeze(0)
    if kron.order == "b_first":
        inner = inner.view(y.shape[0], kron.left[1], kron.b.shape[0])
        plain = accumulate and bias is None and base is None and out_scale is None and not kron.out_shuffled
        if plain and kron.a is not None and torch_mixes(kron.a, y):
            target.baddbmm_(as_factor(kron.a, y.dtype).expand(y.shape[0], -1, -1), inner)
            return
        _mix(inner, kron.a, None, out_scale, bias, base, 1.0, accumulate, target)
        return
    right = as_factor(kron.b, y.dtype).t()
    for part in chunks(y.shape[0], y.shape[1] * y.element_size()):
        delta = torch.mm(_inner_rows(kron, inner[part]), right).view(
            part.stop - part.start, *target.shape[1:]
        )
        part_base = None if base is None else base[part]
        _mix(delta, None, None, out_scale, bias, part_base, 1.0, accumulate, target[part])


def add_in_chunks(
    y: Tensor, kron: KronMap, x: Tensor, bias: Tensor | None, base: Tensor | None, accumulate: bool
) -> None:
    """y = [y +] bias + base + the whole map of x, some tokens at a time."""
    for part in chunks(x.shape[0], inner_width(kron) * x.element_size()):
        inner = first_product(x[part], kron)
        if kron.order == "low_rank" and kron.a is not None:
            inner = mix_tokens(
                inner.view(inner.shape[0], kron.left[1], kron.b.shape[1]), kron.a, kron.scale
            ).flatten(1)
        part_base = None if base is None else base[part]
        if not adds_by_gemm(kron):
            add_product(y[part], kron, inner, bias, part_base, accumulate)
            continue
        if bias is not None or base is not None or not accumulate:
            _mix(*_plain(None, bias, part_base, accumulate), y[part].unsqueeze(1))
        add_by_gemm(y[part], kron, inner)


def plus(y: Tensor | None, like: Tensor, features: int, bias: Tensor | None, base: Tensor | None) -> Tensor:
    """[y +] bias + base, in y where it is there."""
    accumulate = y is not None
    y = new_output(like, (like.shape[0], features)) if y is None else y
    _mix(*_plain(None, bias, base, accumulate), y.unsqueeze(1))
    return y


def _plain(p: Tensor | None, bias: Tensor | None, base: Tensor | None, accumulate: bool) -> tuple:
    """Arguments of the kernel for whole rows (M, 1, N), without a product."""
    bias = None if bias is None else bias.unsqueeze(0)
    base = None if base is None else base.unsqueeze(1)
    return p, None, None, None, bias, base, 1.0, accumulate


def torch_mixes(a: Tensor, x: Tensor) -> bool:
    """Whether torch's batched GEMM multiplies by a left factor: where it measures faster."""
    return min(a.shape) >= TORCH_MIX and x.dtype == torch.bfloat16 and _ops.level() == AVX512


def as_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in this dtype, its neighbours in memory as before."""
    if factor.dtype == dtype:
        return factor
    if factor.stride(0) == 1 and factor.stride(1) != 1:
        return as_factor(factor.t(), dtype).t()
    out = new_output(factor, factor.shape, dtype)
    _cast(factor, out)
    return out


def number(scale: float | Tensor) -> float:
    """The scale as the kernels take it: a number of float32."""
    host = scales.on_host(scale, torch.float32)
    assert not isinstance(host, Tensor)
    return host


def chunks(tokens: int, token_bytes: int) -> Iterator[slice]:
    """Parts of the tokens, as equal as they can be, of about CHUNK_BYTES."""
    size = max(LEAST_CHUNK, CHUNK_BYTES // max(token_bytes, 1))
    parts = max(1, -(-tokens // size))
    for index in range(parts):
        yield slice(tokens * index // parts, tokens * (index + 1) // parts)


def inner_width(kron: KronMap) -> int:
    """Features of T."""
    return kron.left[0 if kron.order == "a_first" else 1] * kron.inner[1]


def rows_of(view: Tensor) -> Tensor:
    """(M, G, F) as (M·G, F)."""
    return view.flatten(0, 1)


def rows_merge(view: Tensor) -> bool:
    """Whether (M, G, F) is (M·G, F) without a copy."""
    return view.shape[0] == 1 or view.shape[1] == 1 or view.stride(0) == view.shape[1] * view.stride(1)


def torch_sums(p: Tensor, q: Tensor) -> bool:
    """Whether torch's GEMM forms the sum: where rows merge and the result is large enough for its blocks."""
    return rows_merge(p) and rows_merge(q) and p.shape[2] * q.shape[2] >= TORCH_SUMS
