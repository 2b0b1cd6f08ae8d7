"""The least work of a problem: what percentages of the floor are made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..planner import choose
from ..testing.bottleneck_cases import BottleneckCase
from .problems import GROUP_LAYERS, Spec


@dataclass(frozen=True)
class Cost:
    """The least work: 2 FLOPs a multiply-accumulate, every tensor read or written once in each direction."""

    flops: int
    size_bytes: int


def cost(spec: Spec, *, adapted: bool = True) -> Cost:
    """Of the adapted layers, or of the frozen ones alone.

    Backward: dx costs what forward does, the factors' gradients what the adapter's forward does; x and dy are
    read, dx and the gradients written, weights and factors read again.
    """
    if isinstance(spec.case, BottleneckCase):
        return _bottleneck_cost(spec, spec.case)
    shape, m, size = spec.case.shape, spec.tokens, spec.dtype.itemsize
    layers = GROUP_LAYERS[spec.suite]
    base, adapter = shape.n * shape.k, choose(shape).macs if adapted else 0
    weights = layers * shape.n * shape.k * size
    factors = layers * shape.parameters * spec.factor_dtype.itemsize if adapted else 0
    x, ys = m * shape.k * size, layers * m * shape.n * size
    flops, moved = layers * m * (base + adapter), x + ys + weights + factors
    if spec.trains:
        flops += layers * m * (base + 2 * adapter)
        moved += ys + x + weights + 2 * factors + (x if adapted else 0)
    return Cost(2 * flops, moved)


def _bottleneck_cost(spec: Spec, case: BottleneckCase) -> Cost:
    m, size = spec.tokens, spec.dtype.itemsize
    macs = case.width * (case.in_features + case.out_features)
    x, y = m * case.in_features * size, m * case.out_features * size
    factors = (macs + case.width + case.out_features) * spec.factor_dtype.itemsize
    flops, moved = m * macs, x + y + factors
    if spec.trains:
        flops += 2 * m * macs
        moved += y + x + x + 2 * factors
    return Cost(2 * flops, moved)


def is_thin(spec: Spec) -> bool | None:
    """Whether T is thin; None for a bottleneck."""
    return None if isinstance(spec.case, BottleneckCase) else choose(spec.case.shape).thin
