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
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .gradients import (
    FROM_DY,
    FROM_X,
    ROW_SCALE,
    SCALE,
    A,
    TermStep,
    gradient_between,
    gradient_from_dy,
    row_scale_gradient,
    scale_gradient,
)
from .maps import KronMap
from .terms import LAYER_GRADIENTS, TERM_GRADIENTS, FrozenLinear, KronTerm

if TYPE_CHECKING:
    from .sum_kernel import SecondStages


class Primitives(Protocol):
    """What a backend supplies; every result is a new tensor, or a base that `linear` owns, written as a whole."""

    CASTS_FACTORS: bool
    """Whether it casts factors to x's dtype itself, as it reads them; else maps come with cast factors."""

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
        inners: Sequence[Tensor | None],
        owns_base: bool = False,
    ) -> Tensor:
        """x Wᵀ + bias + base + Σ up(inner), (M, out); weight (out, in) in any strides. Not all four absent.

        An inner is None where the whole map is applied to x here, as `in_one_pass` said.
        owns_base: whether base is an earlier result, of which the sum may take the place
        """
        ...

    def in_one_pass(
        self, x: Tensor, weight: Tensor | None, maps: Sequence[KronMap], kept: Sequence[bool] | None = None
    ) -> list[bool]:
        """Which maps `linear` applies to x (M, in) itself, without their first products.

        kept: whose first products are computed anyway, for a gradient; None: no one's
        """
        ...

    def second_stages(self) -> SecondStages | None:
        """What collects sums whose results are asked for at the end; None where each is whole at once."""
        ...

    def reduce(
        self,
        p: Tensor,
        q: Tensor,
        scale: float | Tensor,
        dtype: torch.dtype,
        p_scale: Tensor | None = None,
        stages: Any = None,
    ) -> Tensor:
        """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: p (M, G, P), q (M, G, Q), p_scale (G, P) -> (P, Q).

        With `stages` the sum is whole when these have finished.
        """
        ...

    def shrink_reduce(
        self,
        x: Tensor,
        maps: Sequence[KronMap],
        others: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        stages: Any,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`shrink`, and where `other` (M, inner) is given Σ (in_scale ⊙ x)ᵀ other, (F, O), over `maps.first_rows`.

        From one read of x where the backend can; the sums are whole when `stages` has finished.
        """
        ...

    def reduce_shared(
        self,
        x: Tensor,
        maps: Sequence[KronMap],
        others: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        stages: Any,
    ) -> list[Tensor]:
        """Σ otherᵀ x, (O, F), over `maps.first_rows` of maps without in_scale, from one read of x where it can."""
        ...

    def takes_in_parts(self, dy: Tensor, kron: KronMap) -> bool:
        """Whether `backward_in_parts` serves this term, whose T was not saved."""
        ...

    def backward_in_parts(
        self, dy: Tensor, x: Tensor, kron: KronMap, dtypes: Sequence[torch.dtype | None], dx: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that contract dy and x, where a dtype asks for them, from both T of some tokens at a time.

        dx: what the term's own part is added to; None where it is not asked for
        """
        ...

    def one(self, like: Tensor) -> Tensor:
        """The 1×1 identity, a left factor that is absent, in the dtype of `like` or one that is cast to it."""
        ...

    def sum_tokens(self, dy: Tensor) -> Tensor:
        """Σ over tokens of dy (M, N), (N,): the bias's gradient."""
        ...

    def dot(self, factor: Tensor, gradient: Tensor) -> Tensor:
        """Σ factor ⊙ gradient of two matrices, 0-d in the gradient's dtype, which is the wider."""
        ...

    def row_dots(self, dy: Tensor, x: Tensor, kron: KronMap, inner: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ over tokens of dy ⊙ up(inner), (N,) in `dtype`; x is what `linear` takes beside inner."""
        ...


def _tokens(part: Tensor, first: int, second: int) -> Tensor:
    """(M, first·second) seen as (M, first, second)."""
    return part.view(part.shape[0], first, second)


def map_of(term: KronTerm, x: Tensor, primitives: Primitives) -> KronMap:
    """The forward map of a term, its factors in x's dtype unless the backend casts them itself."""
    return KronMap.of(term, None if primitives.CASTS_FACTORS else x.dtype, primitives.one)


def inner_of(kron: KronMap, shrunk: Tensor, primitives: Primitives) -> Tensor:
    """What the up map takes: the shrunk T itself, or scale · A P for a low-rank term with a left factor."""
    if kron.order != "low_rank" or kron.a is None:
        return shrunk
    rank = kron.b.shape[1]
    p = _tokens(shrunk, kron.left[1], rank)
    return primitives.mix(p, kron.a, kron.scale).flatten(1)


def forward(
    x: Tensor, layers: Sequence[FrozenLinear], primitives: Primitives, small_bytes: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(y of each layer, saved T of each term); the T of a fat term is saved as an empty tensor.

    x:           (M, K), layers with `base` as (M, N)
    small_bytes: a fat T that is there and smaller is saved all the same
    """
    maps = [[map_of(term, x, primitives) for term in layer.terms] for layer in layers]
    single = [
        primitives.in_one_pass(x, layer.weight, group) for layer, group in zip(layers, maps, strict=True)
    ]
    kept = [
        [not alone and _is_small(kron, x, small_bytes) for kron, alone in zip(group, singles, strict=True)]
        for group, singles in zip(maps, single, strict=True)
    ]
    flat = [
        kron
        for group, keeps in zip(maps, kept, strict=True)
        for kron, keep in zip(group, keeps, strict=True)
        if keep
    ]
    shared = iter(primitives.shrink(x, flat) if flat else [])
    ys, saved = [], []
    for layer, group, singles, keeps in zip(layers, maps, single, kept, strict=True):
        parts = [next(shared) if keep else None for keep in keeps]
        saved += [x.new_empty(0) if part is None else part for part in parts]
        passing = [not alone and not keep for alone, keep in zip(singles, keeps, strict=True)]
        ys.append(_output(x, layer, group, parts, passing, primitives))
    return ys, saved


def _output(
    x: Tensor,
    layer: FrozenLinear,
    group: Sequence[KronMap],
    parts: Sequence[Tensor | None],
    passing: Sequence[bool],
    primitives: Primitives,
) -> Tensor:
    """y of one layer; the T that are not saved, as large as x, are computed here and gone with this call."""
    own = [kron for kron, passes in zip(group, passing, strict=True) if passes]
    passing_parts = iter(primitives.shrink(x, own) if own else [])
    inners: list[Tensor | None] = []
    for kron, part, passes in zip(group, parts, passing, strict=True):
        shrunk = next(passing_parts) if passes else part
        inners.append(None if shrunk is None else inner_of(kron, shrunk, primitives))
    return primitives.linear(x, layer.weight, layer.bias, layer.base, group, inners)


def _is_small(kron: KronMap, x: Tensor, small_bytes: int) -> bool:
    """Whether T is thin, or smaller than this all the same: then it is saved, and layers share the read of x."""
    if kron.thin:
        return True
    width = kron.left[0 if kron.order == "a_first" else 1] * kron.inner[1]
    return x.shape[0] * width * x.element_size() < small_bytes


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
    flags = iter(needs)
    need_x = next(flags)
    needs_layer = [[next(flags) for _ in range(LAYER_GRADIENTS)] for _ in layers]
    parts = iter(saved)
    groups = [
        [
            TermStep.of(
                map_of(term, x, primitives), term, [next(flags) for _ in range(TERM_GRADIENTS)], next(parts)
            )
            for term in layer.terms
        ]
        for layer in layers
    ]
    for group in groups:
        for step in group:
            step.adjoint.applied = need_x
    stages = primitives.second_stages()
    empty = x.new_empty(0)
    dx: Tensor | None = None
    layer_grads: list[Tensor] = []
    waiting: list[TermStep] = []
    for dy, layer, group, (need_weight, need_bias) in zip(dys, layers, groups, needs_layer, strict=True):
        steps = [step for step in group if not _in_parts(step, dy, need_x, dx, layer, primitives)]
        if need_x:
            _decide_one_pass(dy, layer, steps, primitives)
        _gradients_from_dy(dy, x, steps, need_x, primitives, stages)
        if need_x and (layer.weight is not None or steps):
            dx = _input_gradient(dy, layer, steps, dx, primitives)
        for step in steps:
            _other_gradients(step, dy, x, primitives, stages)
        for step in group:
            if step not in steps:
                _backward_in_parts(step, dy, x, dx if need_x else None, primitives)
        waiting += [step for step in steps if step.wants_from_x]
        if not all(step.kron.thin for step in waiting):
            # Fat T are as large as x: they wait for no other layer.
            _gradients_from_x(x, waiting, primitives, stages)
            waiting = []
        for step in group:
            step.release()
        layer_grads += [dy.t() @ x if need_weight else empty]
        layer_grads.append(primitives.sum_tokens(dy) if need_bias else empty)
    _gradients_from_x(x, waiting, primitives, stages)
    if stages is not None:
        stages.finish()
    term_grads = [
        step.gradients.get(index, empty)
        for group in groups
        for step in group
        for index in range(TERM_GRADIENTS)
    ]
    return [empty if dx is None else dx, *layer_grads, *term_grads]


def _in_parts(
    step: TermStep, dy: Tensor, need_x: bool, dx: Tensor | None, layer: FrozenLinear, primitives: Primitives
) -> bool:
    """Whether a term's whole backward is done for some tokens at a time: it needs both T, and a dx that is there."""
    alone = need_x and dx is None and layer.weight is None
    more = step.needs[SCALE] or step.needs[ROW_SCALE] or step.kron.order == "low_rank"
    if alone or more or not (step.lacks_part and step.wants_from_dy and (need_x or step.wants_from_x)):
        return False
    return primitives.takes_in_parts(dy, step.kron)


def _backward_in_parts(
    step: TermStep, dy: Tensor, x: Tensor, dx: Tensor | None, primitives: Primitives
) -> None:
    places = FROM_DY[step.kron.order], FROM_X[step.kron.order]
    wanted = [step.dtypes[place] if step.needs[place] else None for place in places]
    for place, gradient in zip(
        places, primitives.backward_in_parts(dy, x, step.kron, wanted, dx), strict=True
    ):
        if gradient is not None:
            step.gradients[place] = gradient


def _decide_one_pass(
    dy: Tensor, layer: FrozenLinear, group: Sequence[TermStep], primitives: Primitives
) -> None:
    """Which terms' dx needs no first product of dy."""
    weight = None if layer.weight is None else layer.weight.t()
    adjoints, kept = [step.adjoint for step in group], [step.needs_down for step in group]
    for step, alone in zip(group, primitives.in_one_pass(dy, weight, adjoints, kept), strict=True):
        step.one_pass = alone


def _input_gradient(
    dy: Tensor, layer: FrozenLinear, group: Sequence[TermStep], base: Tensor | None, primitives: Primitives
) -> Tensor:
    """This layer's part of dx, added to `base` in place where the backend can."""
    weight = None if layer.weight is None else layer.weight.t()
    inners = [None if step.one_pass else _inner(step) for step in group]
    adjoints = [step.adjoint for step in group]
    return primitives.linear(dy, weight, None, base, adjoints, inners, True)


def _inner(step: TermStep) -> Tensor:
    assert step.inner is not None
    return step.inner


def _gradients_from_dy(
    dy: Tensor,
    x: Tensor,
    group: Sequence[TermStep],
    need_x: bool,
    primitives: Primitives,
    stages: SecondStages | None,
) -> None:
    """dy's first products where they are needed, and the gradients that contract dy."""
    lacking = [step for step in group if step.lacks_part]
    if lacking:
        for step, part in zip(lacking, primitives.shrink(x, [step.kron for step in lacking]), strict=True):
            step.part = part
    both = [step for step in group if step.needs_down or (need_x and not step.one_pass)]
    alone = [step for step in group if step.wants_from_dy and step not in both]
    for step in group:
        if step.wants_from_dy or step.needs[ROW_SCALE]:
            step.forward_inner = inner_of(step.kron, step.part, primitives)
    for step in alone:
        assert step.forward_inner is not None
        index = FROM_DY[step.kron.order]
        step.gradients[index] = gradient_from_dy(
            step.adjoint, dy, step.forward_inner, step.dtypes[index], primitives, stages
        )
    if not both:
        return
    indices = [FROM_DY[step.kron.order] for step in both]
    downs, gradients = primitives.shrink_reduce(
        dy,
        [step.adjoint for step in both],
        [step.forward_inner if step.wants_from_dy else None for step in both],
        [step.dtypes[index] for step, index in zip(both, indices, strict=True)],
        stages,
    )
    for step, index, down, gradient in zip(both, indices, downs, gradients, strict=True):
        step.down = down
        if step.wants_from_x or (need_x and not step.one_pass):
            step.inner = inner_of(step.adjoint, down, primitives)
        if gradient is not None:
            step.gradients[index] = gradient


def _gradients_from_x(
    x: Tensor, steps: Sequence[TermStep], primitives: Primitives, stages: SecondStages | None
) -> None:
    """The gradients that contract x."""
    if not steps:
        return
    indices = [FROM_X[step.kron.order] for step in steps]
    gradients = primitives.reduce_shared(
        x,
        [step.kron for step in steps],
        [_inner(step) for step in steps],
        [step.dtypes[index] for step, index in zip(steps, indices, strict=True)],
        stages,
    )
    for step, index, gradient in zip(steps, indices, gradients, strict=True):
        step.gradients[index] = gradient
        step.inner = None


def _other_gradients(
    step: TermStep, dy: Tensor, x: Tensor, primitives: Primitives, stages: SecondStages | None
) -> None:
    """The left factor's of a low-rank term, the scale's and the row scale's."""
    if step.wants_between:
        step.gradients[A] = gradient_between(step, primitives, stages)
    if step.needs[SCALE]:
        step.gradients[SCALE] = scale_gradient(step.kron, dy, x, primitives)
    if step.needs[ROW_SCALE]:
        assert step.forward_inner is not None
        step.gradients[ROW_SCALE] = row_scale_gradient(step.kron, dy, x, step.forward_inner, primitives)
