"""The primitives of `algorithm.py` on the CUDA C++ kernels of csrc.

Which kernel serves a term is decided here, by exact sizes and by the form that the device's GEMM has; the kernels know
no adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..outputs import new_output
from . import composed, sums
from . import native_cuda_calls as calls
from . import native_cuda_route as route
from .maps import KronMap, down_scale

CASTS_FACTORS: bool = True
"""Kernels read a factor in its own dtype and round it as they do: a cast would be a launch of its own."""

one, sum_tokens, dot = sums.one, sums.sum_tokens, sums.dot
takes_in_parts, backward_in_parts = sums.takes_in_parts, sums.backward_in_parts


def shrink(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """The first product of each map of x (M, in), scaled; low rank with a left factor: P, unscaled.

    Maps that read the same rows of x share the read; so do thin maps of any orders.
    """
    if len(maps) == 1:
        return _shrink_rows(x, maps)
    results: dict[int, Tensor] = {}
    for read in route.shared_reads(maps, calls.SLOTS):
        chosen = [maps[index] for index in read.indices]
        shared = _shrink_dense(x, chosen) if read.dense else _shrink_rows(x, chosen)
        results |= dict(zip(read.indices, shared, strict=True))
    return [results[index] for index in range(len(maps))]


def _shrink_rows(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """Maps on the same rows of x."""
    first = maps[0]
    view, in_scale = first.in_view(x), None
    if first.in_scale is not None:
        in_scale = first.in_view(first.in_scale.unsqueeze(0)).squeeze(0)
    scales = [down_scale(kron) for kron in maps]
    if first.order == "a_first":
        return [each.flatten(1) for each in calls.mix(view, [_left(kron) for kron in maps], scales, in_scale)]
    if all(route.by_gemm(kron, x) for kron in maps):
        return [_shrink_by_gemm(x, kron) for kron in maps]
    return calls.shrink(view, [_right_down(kron) for kron in maps], scales, in_scale)


def _shrink_by_gemm(x: Tensor, kron: KronMap) -> Tensor:
    """The rows of x, each of I2 features, as the tokens of a GEMM."""
    down = _right_down(kron)
    if down.dtype != x.dtype:
        down = calls.rounded(down, x.dtype)
    t = new_output(x, (x.shape[0], kron.left[1] * down.shape[0]))
    rows, products = x.view(-1, down.shape[1]), t.view(-1, down.shape[0])
    config = calls.CHOOSE if route.on_hopper(x.device) else calls.CHOOSE_PLAIN
    calls.linear(rows, down, None, None, calls.Tails(), products, config)
    return t


def _shrink_dense(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """Thin maps on different rows, by their dense forms."""
    downs = [_dense_down(kron, x.dtype) for kron in maps]
    return calls.shrink(x.unsqueeze(1), downs, [down_scale(kron) for kron in maps], None)


def _dense_down(kron: KronMap, dtype: torch.dtype) -> Tensor:
    """D (width, in), so that T = x Dᵀ without the scale; low rank: P's D."""
    mixes = kron.order == "a_first"
    factor = _left(kron) if mixes else _right_down(kron)
    sides = (kron.left[1], kron.right[1])
    return calls.built(factor.t(), mixes, sides, kron.in_shuffled, kron.in_scale, dtype, transposed=True).t()


def _left(kron: KronMap) -> Tensor:
    assert kron.a is not None
    return kron.a


def _right_down(kron: KronMap) -> Tensor:
    """The right factor's down part, (O2, I2) or (R, I2)."""
    return kron.b if kron.b_down is None else kron.b_down


def mix(p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
    """scale · A p[m]: (M, I1, R), (O1, I1) -> (M, O1, R)."""
    return calls.mix(p, [a], [scale], None)[0]


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    maps: Sequence[KronMap],
    inners: Sequence[Tensor | None],
    owns_base: bool = False,
) -> Tensor:
    """x Wᵀ + bias + base + Σ up(inner), (M, out); a map without an inner is applied to x whole.

    W is read with the first launch; what does not fit into it is added to y in place.
    """
    in_place = owns_base and base is not None and base.is_contiguous()
    y = base if in_place else new_output(x, (x.shape[0], _features(weight, base, maps)))
    assert y is not None
    if y.numel() == 0:
        return y
    hopper = route.on_hopper(x.device)
    transposed = weight is not None and weight.stride(1) != 1
    config = calls.CHOOSE if hopper else calls.CHOOSE_PLAIN
    dense: list[tuple[Tensor, Tensor]] = []
    blocks: list[calls.Tails] = []
    apart: list[tuple[KronMap, Tensor]] = []
    for kron, inner in zip(maps, inners, strict=True):
        if inner is None:
            calls.fat_linear(x, weight, bias, base, kron, y, route.fat_config(x.device))
            weight, bias, base = None, None, y
            continue
        kind = route.tail_kind(kron, x.dtype, transposed, hopper)
        if kind == route.DENSE:
            dense.append((inner, _dense_up(kron, inner.dtype, transposed)))
        elif kind == route.APART:
            apart.append((kron, inner))
        else:
            blocks.append(_structured(kron, inner, kind == route.BLOCK, hopper, transposed))
    while weight is not None or bias is not None or dense or blocks or (base is not y and not apart):
        tails = blocks.pop() if blocks else calls.Tails()
        tails.dense, dense = dense[: calls.DENSE_SLOTS], dense[calls.DENSE_SLOTS :]
        calls.linear(x, weight, bias, base, tails, y, config)
        weight, bias, base = None, None, y
    for kron, inner in apart:
        _mix_onto(kron, inner, base, y)
        base = y
    return y


def _features(weight: Tensor | None, base: Tensor | None, maps: Sequence[KronMap]) -> int:
    if weight is not None:
        return weight.shape[0]
    if base is not None:
        return base.shape[1]
    return maps[0].left[0] * maps[0].right[0]


def _dense_up(kron: KronMap, dtype: torch.dtype, transposed: bool) -> Tensor:
    """L (out, width), laid out as the weight beside which it is read."""
    mixes = kron.order == "b_first"
    factor = _left(kron) if mixes else kron.b
    plain = not mixes and kron.left == (1, 1) and kron.out_scale is None and factor.dtype == dtype
    if plain and factor.stride(0 if transposed else 1) == 1:
        return factor
    sides = (kron.left[0], kron.right[0])
    return calls.built(factor, mixes, sides, kron.out_shuffled, kron.out_scale, dtype, transposed)


def _structured(kron: KronMap, inner: Tensor, block: bool, hopper: bool, transposed: bool) -> calls.Tails:
    """The second product by the factor itself."""
    tokens = inner.shape[0]
    view = inner.view(tokens, *kron.inner)
    if not block:
        left = calls.readable(_left(kron), inner.dtype)
        return calls.Tails(mix=(view, left, kron.out_scale), shuffled=kron.out_shuffled)
    up = kron.b
    if hopper and (up.dtype != inner.dtype or up.stride(0 if transposed else 1) != 1):
        # That form copies tiles as they lie in memory.
        up = calls.rounded(up, inner.dtype, transposed)
    return calls.Tails(
        block=(view, calls.readable(up, inner.dtype), kron.out_scale), shuffled=kron.out_shuffled
    )


def _mix_onto(kron: KronMap, inner: Tensor, base: Tensor | None, y: Tensor) -> None:
    """y = base + out_scale ⊙ (A ⊗ I) inner by a launch of its own."""
    out_scale = kron.out_scale
    if out_scale is not None:
        out_scale = kron.out_view(out_scale.unsqueeze(0)).squeeze(0)
    calls.mix_onto(
        inner.view(inner.shape[0], *kron.inner), _left(kron),
        None if base is None else kron.out_view(base), out_scale, kron.out_view(y),
    )  # fmt: skip


def in_one_pass(
    x: Tensor, weight: Tensor | None, maps: Sequence[KronMap], kept: Sequence[bool] | None = None
) -> list[bool]:
    """Which maps `linear` applies to x itself: fat ones with a full B whose T nothing else takes."""
    if all(kron.thin for kron in maps) or x.shape[0] == 0:
        return [False] * len(maps)
    hopper, found = route.on_hopper(x.device), []
    for kron, also in zip(maps, kept or [False] * len(maps), strict=True):
        # W is read once, with the first of them.
        beside = weight is not None and not any(found)
        found.append(route.in_one_pass(kron, also, beside, hopper))
    return found


def second_stages() -> None:
    """Nothing is put off here: each sum is whole when its launches are."""


def reduce(
    p: Tensor,
    q: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    p_scale: Tensor | None = None,
    stages: Any = None,
) -> Tensor:
    """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: (M, G, P), (M, G, Q) -> (P, Q) in `dtype`, without atomics."""
    return calls.reduce(p, q, scale, dtype, p_scale)


def row_dots(dy: Tensor, x: Tensor, kron: KronMap, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over tokens of dy ⊙ up(inner), (N,) in `dtype`, summed in float32."""
    return sums.dots_of(dy, linear(x, None, None, None, [kron], [inner]), dtype)


shrink_reduce, reduce_shared = composed.shrink_reduce_of(shrink, reduce), composed.reduce_shared_of(reduce)
