"""The four primitives of `algorithm.py` on Triton kernels.

Three kinds of map need a kernel each way: dense (a thin map whose D or L is built for the call), I ⊗ B and A ⊗ I.
Which one serves a term is decided here; the kernels know no adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import architecture_of
from ..outputs import new_output
from . import reduction_tuning, route, sums, tuning
from .beside_kernel import same_ups
from .dense_kernel import build_down, build_up
from .linear_kernel import DENSE_SLOTS, linear_with_tails
from .maps import KronMap, down_scale, first_factor, first_rows, first_scale, inner_rows
from .mix_kernel import Left, mix_tokens
from .one_pass_kernel import fat_term, linear_in_one_pass, permuted
from .reduce_kernel import SLOTS as REDUCE_SLOTS
from .reduce_kernel import reduce_rows, reduce_shared_rows
from .shrink_kernel import SLOTS, Down, shrink_rows
from .shrink_reduce_kernel import shrink_reduce_rows
from .sum_kernel import SecondStages
from .tails import BLOCK_TAIL, ELEMENTWISE_TAIL, MIX_TAIL, DenseTail, StructuredTail

CASTS_FACTORS: bool = True
"""Kernels read a factor in its own dtype and cast it in registers: a cast would be a launch of its own."""

one, sum_tokens, dot = sums.one, sums.sum_tokens, sums.dot
takes_in_parts, backward_in_parts = sums.takes_in_parts, sums.backward_in_parts


def shrink(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """The first product of each map of x (M, in), scaled; low rank with a left factor: P, unscaled.

    Maps that read the same rows of x share the read, SLOTS of them each; so do thin maps of any orders.
    """
    results: dict[int, Tensor] = {}
    for indices in _shared_reads(maps):
        shared = _shrink_together(x, [maps[index] for index in indices])
        results |= dict(zip(indices, shared, strict=True))
    return [results[index] for index in range(len(maps))]


def _shared_reads(maps: Sequence[KronMap]) -> list[list[int]]:
    """Which maps each launch serves, by index."""
    if len(maps) == 1:
        return [[0]]
    thin = [kron for kron in maps if kron.thin]
    mixed = not all(_same_rows(kron, thin[0]) for kron in thin)
    launches: list[list[int]] = []
    for index, kron in enumerate(maps):
        for each in launches:
            other = maps[each[0]]
            joins = other.thin if mixed and kron.thin else _same_rows(kron, other)
            if joins and len(each) < SLOTS:
                each.append(index)
                break
        else:
            launches.append([index])
    return launches


def _shrink_together(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """The first products of up to SLOTS maps from one read of x: thin ones, or all on the same rows."""
    first = maps[0]
    if not all(_same_rows(kron, first) for kron in maps[1:]):
        return _shrink_dense(x, maps)
    view, in_scale = first.in_view(x), _in_scale_view(first)
    if first.order == "a_first":
        return [each.flatten(1) for each in mix_tokens(view, [_left(kron) for kron in maps], in_scale)]
    downs = [Down(_right_down(kron), down_scale(kron)) for kron in maps]
    return shrink_rows(view, downs, in_scale, _built_beside(maps))


def _built_beside(maps: Sequence[KronMap]) -> list[KronMap]:
    """Those whose dense L the launch of their T builds as well: at least the first, where it takes one, and its like.

    A few programs at the end of a launch, against a launch of their own.
    """
    found: list[KronMap] = []
    for kron in maps:
        wanted = kron.applied and kron.out_scale is None and _takes_dense(kron)
        if wanted and (not found or same_ups(kron, found[0])):
            found.append(kron)
    return found


def _takes_dense(kron: KronMap) -> bool:
    """Whether `linear` multiplies T by an L that must be built."""
    return kron.thin and not _is_plain(kron) and not _structured_pays(kron)


def _is_plain(kron: KronMap) -> bool:
    """Whether B itself is L."""
    return kron.left == (1, 1) and kron.a is None and kron.out_scale is None


def _left(kron: KronMap) -> Left:
    assert kron.a is not None
    return Left(kron.a, kron.scale)


def _shrink_dense(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """T of thin maps of several orders, whose D are built one below the other."""
    widths = [_down_width(kron) for kron in maps]
    down = new_output(x, (sum(widths), x.shape[1]))
    downs = []
    for kron, part in zip(maps, down.split(widths), strict=True):
        build_down(kron, part)
        downs.append(Down(part, down_scale(kron)))
    return shrink_rows(x.unsqueeze(1), downs, None)


def _same_rows(kron: KronMap, other: KronMap) -> bool:
    """Whether both down maps are A ⊗ I, or both I ⊗ B, on the same rows of x, with factors of one dtype that stack."""
    same_side = (
        (kron.left[1], kron.right[1]) == (other.left[1], other.right[1])
        and (kron.in_shuffled == other.in_shuffled or 1 in (kron.left[1], kron.right[1]))
        and kron.in_scale is other.in_scale
    )
    if not same_side or (kron.order == "a_first") != (other.order == "a_first"):
        return False
    if kron.a is not None and other.a is not None and kron.order == "a_first":
        return kron.a.shape == other.a.shape and _layout(kron.a) == _layout(other.a)
    return _layout(_right_down(kron)) == _layout(_right_down(other))


def _layout(factor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """What the factors of one launch share."""
    return factor.stride(), factor.dtype


def _right_down(kron: KronMap) -> Tensor:
    """The right factor's down part, (O2, I2) or (R, I2)."""
    return kron.b if kron.b_down is None else kron.b_down


def _down_width(kron: KronMap) -> int:
    """Columns per token of what `shrink` returns."""
    if kron.order == "a_first":
        return kron.left[0] * kron.right[1]
    return kron.left[1] * _right_down(kron).shape[0]


def _in_scale_view(kron: KronMap) -> Tensor | None:
    """in_scale as (I1, I2)."""
    return None if kron.in_scale is None else kron.in_view(kron.in_scale.unsqueeze(0)).squeeze(0)


def mix(p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
    """scale · A p[m]: (M, I1, R), (O1, I1) -> (M, O1, R)."""
    return mix_tokens(p, [Left(a, scale)])[0]


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    maps: Sequence[KronMap],
    inners: Sequence[Tensor | None],
    owns_base: bool = False,
) -> Tensor:
    """x Wᵀ + bias + base + Σ up(inner), (M, out); terms beyond one launch's are added to y in place by the next."""
    features = _features(weight, base, maps)
    y = base if owns_base else None
    if weight is not None and _base_by_torch(x, weight, maps):
        y, bias = _base_of_torch(x, weight, bias, base, owns_base)
        weight = None
    dense: list[DenseTail] = []
    structured: list[StructuredTail] = []
    for kron, inner in zip(maps, inners, strict=True):
        if inner is None:
            y = linear_in_one_pass(x, weight, bias, base if y is None else y, kron, out=y)
            weight = bias = None
            continue
        inner = inner.contiguous()
        if kron.thin and (structured or not _structured_pays(kron)):
            dense.append(_dense_tail(kron, inner))
        else:
            structured.append(_structured_tail(kron, inner))
    while y is None or weight is not None or bias is not None or dense or structured:
        now, dense = dense[:DENSE_SLOTS], dense[DENSE_SLOTS:]
        tail = structured.pop(0) if structured else None
        y = linear_with_tails(x, weight, bias, base if y is None else y, features, now, tail, out=y)
        weight = bias = None
    return y


def _base_by_torch(x: Tensor, weight: Tensor, maps: Sequence[KronMap]) -> bool:
    """Whether torch's GEMM multiplies x by W."""
    return route.base_by_torch(
        architecture_of(x.device), x.dtype, x.shape[0], weight.shape[0], weight.shape[1],
        weight.stride(1) != 1, len(maps), _tails(maps),
    )  # fmt: skip


def _tails(maps: Sequence[KronMap]) -> str:
    """Kinds of the maps' tails, each once; a fat one's as the GEMM with tails would have it."""
    return "+".join(sorted({_tail_kind(kron) for kron in maps})) or "none"


def _tail_kind(kron: KronMap) -> str:
    if kron.thin and not _structured_pays(kron):
        return "dense"
    if permuted(kron):
        return "permuted"
    if kron.order == "b_first":
        return "mix"
    first, second = kron.inner
    return "elementwise" if tuning.elementwise_tail_pays(first, second, kron.right[0]) else "block"


def _base_of_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor | None, owns_base: bool
) -> tuple[Tensor, Tensor | None]:
    """x Wᵀ + base, or x Wᵀ + bias, of our own memory and contiguous; and the bias, where it is still to be added."""
    if base is None:
        return torch.nn.functional.linear(x, weight, bias), None
    # Out of place torch would copy the base first.
    return (base.addmm_ if owns_base else base.addmm)(x, weight.t()), bias


def in_one_pass(
    x: Tensor, weight: Tensor | None, maps: Sequence[KronMap], kept: Sequence[bool] | None = None
) -> list[bool]:
    """Which maps `linear` applies to x itself: fat ones with a full B, where the route says so."""
    if all(kron.thin for kron in maps):
        return [False] * len(maps)
    beside = None if weight is None or _base_by_torch(x, weight, maps) else weight
    found = []
    for kron, also in zip(maps, kept or [False] * len(maps), strict=True):
        single = _fits_one_pass(kron) and x.shape[0] > 0
        if single:
            term = fat_term(x, beside, kron, also)
            single = route.in_one_pass(architecture_of(x.device), x.dtype, term)
        if single:
            # W is read once, with the first of them.
            beside = None
        found.append(single)
    return found


def _fits_one_pass(kron: KronMap) -> bool:
    """Whether the one-pass kernel has a form for the map.

    Columns of a shuffled side are apart in memory: as W's they take too many registers, as x's there is no copying
    ahead.
    """
    full = not kron.thin and kron.b_down is None and kron.a is not None
    return full and not permuted(kron) and not permuted(kron.adjoint())


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
    if kron.dense_up is not None:
        return DenseTail(inner, kron.dense_up)
    return DenseTail(inner, kron.b if _is_plain(kron) else build_up(kron, inner.dtype))


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
    p: Tensor,
    q: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    p_scale: Tensor | None = None,
    stages: SecondStages | None = None,
) -> Tensor:
    """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: (M, G, P), (M, G, Q) -> (P, Q) in `dtype`, without atomics."""
    return reduce_rows(p, q, scale, dtype, p_scale, stages=stages)


def row_dots(dy: Tensor, x: Tensor, kron: KronMap, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over tokens of dy ⊙ up(inner), (N,) in `dtype`."""
    return sums.dots_of(dy, linear(x, None, None, None, [kron], [inner]), dtype)


def second_stages() -> SecondStages:
    """Collects the second stages of a backward's sums, which are launched together."""
    return SecondStages()


def shrink_reduce(
    x: Tensor,
    maps: Sequence[KronMap],
    others: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    stages: SecondStages,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """`shrink`, and Σ (in_scale ⊙ x)ᵀ other of each map's first factor, (F, O), in one launch where tuning has one."""
    results: dict[int, Tensor] = {}
    gradients: list[Tensor | None] = [None] * len(maps)
    for index, (kron, other, dtype) in enumerate(zip(maps, others, dtypes, strict=True)):
        if other is None:
            continue
        rows, scale, factor = first_rows(kron, x), first_scale(kron), first_factor(kron)
        other = inner_rows(kron, other)
        config = reduction_tuning.shrink_reduce_choice(
            architecture_of(x.device), x.dtype, rows.shape[0] * rows.shape[1], rows.shape[2], other.shape[2]
        )
        if config is None:
            gradients[index] = reduce_rows(rows, other, 1.0, dtype, scale, stages=stages)
        else:
            t = results[index] = new_output(x, (x.shape[0], other.shape[1] * other.shape[2]))
            gradients[index] = shrink_reduce_rows(
                rows,
                factor.t(),
                down_scale(kron),
                scale,
                other,
                inner_rows(kron, t),
                dtype,
                config,
                stages,
                _built_beside([kron]),
            )
    rest = [index for index in range(len(maps)) if index not in results]
    results |= dict(zip(rest, shrink(x, [maps[index] for index in rest]), strict=True))
    return [results[index] for index in range(len(maps))], gradients


def reduce_shared(
    x: Tensor,
    maps: Sequence[KronMap],
    others: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    stages: SecondStages,
) -> list[Tensor]:
    """Σ otherᵀ x of each map's first factor, (O, F); those of one shape on the same rows share the read of x."""
    gradients: dict[int, Tensor] = {}
    waiting = list(range(len(maps)))
    while waiting:
        first = maps[waiting[0]]
        alike = [index for index in waiting if _same_gradient(maps[index], first)][:REDUCE_SLOTS]
        ps = [inner_rows(maps[index], others[index].contiguous()) for index in alike]
        shared = reduce_shared_rows(ps, first_rows(first, x), [dtypes[index] for index in alike], stages)
        gradients |= dict(zip(alike, shared, strict=True))
        waiting = [index for index in waiting if index not in alike]
    return [gradients[index] for index in range(len(maps))]


def _same_gradient(kron: KronMap, other: KronMap) -> bool:
    """Whether the gradients of both first factors are sums over the same rows of x, of one shape."""
    return (
        (kron.order == "a_first") == (other.order == "a_first")
        and (kron.left[1], kron.right[1]) == (other.left[1], other.right[1])
        and first_factor(kron).shape == first_factor(other).shape
    )
