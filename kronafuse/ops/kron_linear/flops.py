"""FLOPs of the raw ops: their products in the planned order, whatever implementation runs, 2 a multiply-accumulate.

Like torch's own formulas they count products of matrices and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...planner import Order, choose
from ...shapes import KronShape
from .gradients import FROM_DY, FROM_X, ROW_SCALE, SCALE, A
from .terms import LAYER_GRADIENTS, LAYER_TENSORS, TERM_GRADIENTS, TERM_TENSORS


class _Products(NamedTuple):
    """Multiply-accumulates per token of a term: of the first product, of A between low-rank ones, of the second."""

    first: int
    between: int
    second: int

    @classmethod
    def of(cls, shape: KronShape) -> _Products:
        """In the planned order."""
        order = choose(shape).order
        if order == "a_first":
            return cls(shape.n1 * shape.k, 0, shape.k2 * shape.n)
        if order == "b_first":
            return cls(shape.n2 * shape.k, 0, shape.k1 * shape.n)
        assert shape.rank is not None
        mix = shape.n1 * shape.k1 * shape.rank if shape.n1 * shape.k1 > 1 else 0
        return cls(shape.rank * shape.k, mix, shape.rank * shape.n)

    def backward(self, order: Order, needs: Sequence[bool], need_x: bool, saved: bool) -> int:
        """Of dx and of the term's gradients, as `algorithm.backward` computes them."""
        from_dy, from_x, between = (
            needs[FROM_DY[order]],
            needs[FROM_X[order]],
            order == "low_rank" and needs[A],
        )
        down, dx = self.second, self.first  # each is the adjoint's counterpart of the other
        macs = 0
        if from_x or between or need_x:
            macs += down
        if from_x or need_x:
            macs += self.between
        if need_x:
            macs += dx
        if from_dy:
            macs += self.second
        if from_x:
            macs += self.first
        if between:
            macs += self.between
        if from_dy or between or needs[ROW_SCALE]:
            macs += 0 if saved else self.first
        if from_dy or needs[ROW_SCALE]:
            macs += self.between
        if needs[SCALE]:
            macs += self.first + self.second + self.between
        if needs[ROW_SCALE]:
            macs += self.second
        return macs


def _shapes(term_tensors: Sequence[Tensor | None]) -> list[KronShape]:
    shapes = []
    for first in range(0, len(term_tensors), TERM_TENSORS):
        a, b, b_down = term_tensors[first : first + 3]
        assert b is not None
        shapes.append(KronShape.of(a, b, b_down))
    return shapes


def forward(
    x: Tensor,
    layer_tensors: Sequence[Tensor | None],
    term_tensors: Sequence[Tensor | None],
    *_: Any,
    **__: Any,
) -> int:
    """x Wᵀ of each layer and both products of each term."""
    macs = sum(weight.numel() for weight in layer_tensors[::LAYER_TENSORS] if weight is not None)
    macs += sum(choose(shape).macs for shape in _shapes(term_tensors))
    return 2 * math.prod(x.shape[:-1]) * macs


def backward(
    _dys: Sequence[Tensor],
    x: Tensor,
    layer_tensors: Sequence[Tensor | None],
    term_tensors: Sequence[Tensor | None],
    *rest: Any,
    **_: Any,
) -> int:
    """dy W and dyᵀ x of each layer and the products of each term's gradients, where they are asked for."""
    *_layout, saved, needs = rest
    need_x, macs = needs[0], 0
    weights = layer_tensors[::LAYER_TENSORS]
    for index, weight in enumerate(weights):
        if weight is not None:
            macs += weight.numel() * (need_x + needs[1 + index * LAYER_GRADIENTS])
    first = 1 + LAYER_GRADIENTS * len(weights)
    for index, (shape, part) in enumerate(zip(_shapes(term_tensors), saved, strict=True)):
        own = needs[first + index * TERM_GRADIENTS :][:TERM_GRADIENTS]
        order = choose(shape).order
        macs += _Products.of(shape).backward(order, own, need_x, part.numel() > 0)
    return 2 * math.prod(x.shape[:-1]) * macs
