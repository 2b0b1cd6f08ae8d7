"""The private CUDA operators, a function each: allocates what they write, decides what they round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from ..outputs import new_output
from .maps import KronMap

SLOTS = 8
"""Factors that one launch of `shrink` or `mix` serves."""
CHOOSE, CHOOSE_PLAIN = -1, -2
"""Configurations: of the form that serves the device best; of the plain one, by `linear` alone."""
DENSE_SLOTS = 4
"""Dense tails that one launch of `linear` serves, beside a structured one."""


@cache
def _ops(device: torch.device) -> Any:
    return native.cuda(device)


@cache
def has_hopper(device: torch.device) -> bool:
    """Whether `linear` has its Hopper form on this device."""
    if device.type != "cuda":
        return _ops(device).linear_has_hopper()
    with torch.cuda.device(device):
        return _ops(device).linear_has_hopper()


def _numbers(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """A scale as the float and the 0-d tensor that kernels multiply."""
    return (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)


def readable(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor where the kernels read it as it is, else rounded to `dtype` by a launch of its own."""
    if factor.dtype in (dtype, torch.float32):
        return factor
    return rounded(factor, dtype)


def rounded(factor: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The factor in `dtype`, rows or columns contiguous."""
    return built(factor, False, (1, factor.shape[0]), False, None, dtype, transposed)


def built(
    factor: Tensor,
    mixes: bool,
    sides: tuple[int, int],
    shuffled: bool,
    feature_scale: Tensor | None,
    dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:
    """(features, width): A ⊗ I of a factor (sides[0], J) if it mixes, else I ⊗ B of a factor (sides[1], J).

    feature_scale: (features,) multiplies the rows before they are rounded
    transposed:    whether features are neighbours in memory, as in a weight seen transposed
    """
    features, width = sides[0] * sides[1], factor.shape[1] * (sides[1] if mixes else sides[0])
    out = new_output(factor, (width, features) if transposed else (features, width), dtype)
    out = out.t() if transposed else out
    _ops(factor.device).build(factor, mixes, *sides, shuffled, feature_scale, out)
    return out


def shrink(
    x: Tensor, downs: Sequence[Tensor], scales: Sequence[float | Tensor], in_scale: Tensor | None
) -> list[Tensor]:
    """s · (in_scale ⊙ x) downᵀ for up to SLOTS factors: x (M, I1, I2), down (O, I2) -> (M, I1·O)."""
    ops, (tokens, left, _) = _ops(x.device), x.shape
    downs = [readable(down, x.dtype) for down in downs]
    results = [new_output(x, (tokens, left * down.shape[0])) for down in downs]
    outs = [out.view(tokens, left, down.shape[0]) for out, down in zip(results, downs, strict=True)]
    numbers = [_numbers(scale) for scale in scales]
    ops.shrink(
        x, downs, [each[0] for each in numbers], [each[1] for each in numbers], in_scale,
        _workspace(x, ops.shrink_workspace(x, downs)), outs,
    )  # fmt: skip
    return results


def mix(
    x: Tensor, lefts: Sequence[Tensor], scales: Sequence[float | Tensor], in_scale: Tensor | None
) -> list[Tensor]:
    """s · A (in_scale ⊙ x) for up to SLOTS factors: x (M, I1, I2), A (O1, I1) -> (M, O1, I2)."""
    lefts = [readable(left, x.dtype) for left in lefts]
    outs = [new_output(x, (x.shape[0], left.shape[0], x.shape[2])) for left in lefts]
    _mix_into(x, lefts, scales, in_scale, None, None, outs)
    return outs


def mix_onto(x: Tensor, left: Tensor, base: Tensor | None, out_scale: Tensor | None, out: Tensor) -> None:
    """out = base + out_scale ⊙ A x: x (M, I1, I2), A (O1, I1); base, out (M, O1, I2), base may be out itself."""
    _mix_into(x, [readable(left, x.dtype)], [1.0], None, base, out_scale, [out])


def _mix_into(
    x: Tensor,
    lefts: Sequence[Tensor],
    scales: Sequence[float | Tensor],
    in_scale: Tensor | None,
    base: Tensor | None,
    out_scale: Tensor | None,
    outs: Sequence[Tensor],
) -> None:
    ops, numbers = _ops(x.device), [_numbers(scale) for scale in scales]
    ops.mix(
        x, lefts, [each[0] for each in numbers], [each[1] for each in numbers], in_scale, base, out_scale,
        _workspace(x, ops.mix_workspace(x, lefts)), outs,
    )  # fmt: skip


def _workspace(like: Tensor, elements: int) -> Tensor | None:
    return new_output(like, (elements,), torch.float32) if elements else None


@dataclass
class Tails:
    """What one launch of `linear` adds to x Wᵀ, beside bias and base.

    dense: (T (M, width), L (N, width)), up to DENSE_SLOTS
    block: I ⊗ B: (inner (M, N1, R), B (N2, R), out_scale (N,))
    mix:   A ⊗ I: (inner (M, J, N2), A (N1, J), out_scale (N,))
    """

    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    block: tuple[Tensor, Tensor, Tensor | None] | None = None
    mix: tuple[Tensor, Tensor, Tensor | None] | None = None
    shuffled: bool = False


def linear(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    tails: Tails,
    y: Tensor,
    config: int = CHOOSE,
) -> None:
    """y = x Wᵀ + bias + base + the tails, rounded once; base may be y itself."""
    none = (None, None, None)
    _ops(y.device).linear(
        None if weight is None else x, weight, bias, base,
        [t for t, _ in tails.dense], [up for _, up in tails.dense],
        *(tails.block or none), *(tails.mix or none), tails.shuffled, config, y,
    )  # fmt: skip


def fat_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    kron: KronMap,
    y: Tensor,
    config: int = CHOOSE,
) -> None:
    """y = x Wᵀ + bias + base + the whole map of x, from one read of x; base may be y itself."""
    number, tensor = _numbers(kron.scale)
    assert kron.a is not None
    assert kron.b_down is None
    _ops(x.device).fat_linear(
        x, weight, bias, base, readable(kron.a, x.dtype), readable(kron.b, x.dtype), kron.in_scale, kron.out_scale,
        number, tensor, kron.in_shuffled, kron.out_shuffled, config, y,
    )  # fmt: skip


def reduce(p: Tensor, q: Tensor, scale: float | Tensor, dtype: torch.dtype, p_scale: Tensor | None) -> Tensor:
    """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: (M, G, P), (M, G, Q) -> (P, Q) in `dtype`."""
    ops, (number, tensor) = _ops(p.device), _numbers(scale)
    out = new_output(p, (p.shape[2], q.shape[2]), dtype)
    workspace = new_output(p, (ops.reduce_workspace(p, q),), torch.float32)
    ops.reduce(p, q, p_scale, number, tensor, workspace, out)
    return out
