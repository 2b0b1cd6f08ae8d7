"""The four primitives of `algorithm.py` on Triton kernels.

Three kinds of map need a kernel each way: dense (a thin map whose D or L is built for the call), I ⊗ B and A ⊗ I.
Which one serves a term is decided here; the kernels know no adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..outputs import new_output
from . import tuning
from .dense_kernel import build_down, build_up
from .linear_kernel import DENSE_SLOTS, linear_with_tails
from .maps import KronMap
from .mix_kernel import mix_tokens
from .reduce_kernel import reduce_rows
from .shrink_kernel import SLOTS, Columns, shrink_rows
from .tails import BLOCK_TAIL, ELEMENTWISE_TAIL, MIX_TAIL, DenseTail, StructuredTail


def shrink(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """The first product of each map of x (M, in), scaled; low rank with a left factor: P, unscaled.

    Thin maps share reads of x, SLOTS of them each; a fat one reads x itself.
    """
    results: list[Tensor | None] = [None] * len(maps)
    thin = [index for index, kron in enumerate(maps) if kron.thin]
    for start in range(0, len(thin), SLOTS):
        chosen = thin[start : start + SLOTS]
        shared = _shrink_thin(x, [maps[index] for index in chosen])
        for index, result in zip(chosen, shared, strict=True):
            results[index] = result
    return [
        _shrink_fat(x, kron) if result is None else result for kron, result in zip(maps, results, strict=True)
    ]


def _shrink_thin(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """T of up to SLOTS thin maps from one read of x."""
    first = maps[0]
    if all(_same_rows(kron, first) for kron in maps):
        return _shrink_blocks(x, maps)
    widths = [_down_width(kron) for kron in maps]
    down = new_output(maps[0].b, (sum(widths), x.shape[1]))
    for kron, part in zip(maps, down.split(widths), strict=True):
        build_down(kron, part)
    columns = [Columns(width, _down_scale(kron)) for width, kron in zip(widths, maps, strict=True)]
    return shrink_rows(x.unsqueeze(1), down, columns, None)


def _same_rows(kron: KronMap, other: KronMap) -> bool:
    """Whether both down maps are I ⊗ B on the same rows of x, so that their B stack."""
    return (
        kron.order != "a_first"
        and other.order != "a_first"
        and (kron.left[1], kron.right[1]) == (other.left[1], other.right[1])
        and (kron.in_shuffled == other.in_shuffled or 1 in (kron.left[1], kron.right[1]))
        and kron.in_scale is other.in_scale
    )


def _shrink_blocks(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """T of maps whose down maps are I ⊗ B on the same rows."""
    first = maps[0]
    downs = [_right_down(kron) for kron in maps]
    columns = [Columns(down.shape[0], _down_scale(kron)) for down, kron in zip(downs, maps, strict=True)]
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    return shrink_rows(first.in_view(x), down, columns, _in_scale_view(first))


def _shrink_fat(x: Tensor, kron: KronMap) -> Tensor:
    if kron.order != "a_first":
        return _shrink_blocks(x, [kron])[0]
    assert kron.a is not None
    return mix_tokens(kron.in_view(x), kron.a, kron.scale, _in_scale_view(kron)).flatten(1)


def _right_down(kron: KronMap) -> Tensor:
    """The right factor's down part, (O2, I2) or (R, I2)."""
    return kron.b if kron.b_down is None else kron.b_down


def _down_width(kron: KronMap) -> int:
    """Columns per token of what `shrink` returns."""
    if kron.order == "a_first":
        return kron.left[0] * kron.right[1]
    return kron.left[1] * _right_down(kron).shape[0]


def _down_scale(kron: KronMap) -> float | Tensor:
    """The scale of the first product: with a low-rank B and a left factor, `mix` takes it instead."""
    return 1.0 if kron.order == "low_rank" and kron.a is not None else kron.scale


def _in_scale_view(kron: KronMap) -> Tensor | None:
    """in_scale as (I1, I2)."""
    return None if kron.in_scale is None else kron.in_view(kron.in_scale.unsqueeze(0)).squeeze(0)


def mix(p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
    """scale · A p[m]: (M, I1, R), (O1, I1) -> (M, O1, R)."""
    return mix_tokens(p, a, scale)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    maps: Sequence[KronMap],
    inners: Sequence[Tensor],
) -> Tensor:
    """x Wᵀ + bias + base + Σ up(inner), (M, out); terms beyond one launch's tails go through `base` into the next."""
    dense: list[DenseTail] = []
    structured: list[StructuredTail] = []
    for kron, inner in zip(maps, inners, strict=True):
        inner = inner.contiguous()
        if kron.thin and (structured or not _structured_pays(kron)):
            dense.append(_dense_tail(kron, inner))
        else:
            structured.append(_structured_tail(kron, inner))
    features = _features(weight, base, maps)
    y = None
    while y is None or dense or structured:
        now, dense = dense[:DENSE_SLOTS], dense[DENSE_SLOTS:]
        tail = structured.pop(0) if structured else None
        y = linear_with_tails(x, weight, bias, base if y is None else y, features, now, tail)
        weight = bias = None
    return y


def _features(weight: Tensor | None, base: Tensor | None, maps: Sequence[KronMap]) -> int:
    if weight is not None:
        return weight.shape[0]
    if base is not None:
        return base.shape[1]
    return maps[0].left[0] * maps[0].right[0]


def _structured_pays(kron: KronMap) -> bool:
    """Whether a thin term's tail is cheaper by blocks than dense."""
    if kron.order == "b_first" or (kron.out_shuffled and 1 not in (kron.left[0], kron.right[0])):
        return False
    first, second = kron.inner
    return tuning.block_tail_pays(first * second, first, second, kron.right[0])


def _dense_tail(kron: KronMap, inner: Tensor) -> DenseTail:
    plain = kron.left == (1, 1) and kron.a is None and kron.out_scale is None
    return DenseTail(inner, kron.b if plain else build_up(kron))


def _structured_tail(kron: KronMap, inner: Tensor) -> StructuredTail:
    sides = (kron.left[0], kron.right[0])
    if kron.order == "b_first":
        assert kron.a is not None
        return StructuredTail(MIX_TAIL.value, inner, kron.a, sides, kron.out_scale, kron.out_shuffled)
    first, second = kron.inner
    elementwise = tuning.elementwise_tail_pays(first, second, sides[1])
    kind = (ELEMENTWISE_TAIL if elementwise else BLOCK_TAIL).value
    return StructuredTail(kind, inner, kron.b, sides, kron.out_scale, kron.out_shuffled)


def reduce(
    p: Tensor, q: Tensor, scale: float | Tensor, dtype: torch.dtype, p_scale: Tensor | None = None
) -> Tensor:
    """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: (M, G, P), (M, G, Q) -> (P, Q) in `dtype`, without atomics."""
    return reduce_rows(p, q, scale, dtype, p_scale)
