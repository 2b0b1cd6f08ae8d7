"""Two ways to one GEMM: fold the delta into W first, or concatenate x with T and W with L."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.kron_linear.maps import kron_view
from ...ops.kron_linear.terms import FrozenLinear, KronTerm
from ...ops.kron_merge.op import kron_merge
from ...planner import choose
from ...shapes import KronShape
from ...testing.cases import Case
from ..problems import KronProblem, Spec
from .arm import Arm, Built
from .plain import adapted


def _merge(x: Tensor, layer: FrozenLinear) -> Tensor:
    """x (W + A ⊗ B)ᵀ; backward: dx by the merged weight, and the factors' gradients from the whole dyᵀ x."""
    (term,) = layer.terms
    assert layer.weight is not None
    merged = kron_merge(
        layer.weight, term.a, term.b, b_down=term.b_down, scale=term.scale, shuffled=term.shuffled
    )
    return torch.nn.functional.linear(x, merged)


MERGE_GEMM = Arm(
    "merge_gemm", lambda problem: adapted(problem, lambda x, layers: [_merge(x, layer) for layer in layers])
)
"""W + s·(A ⊗ B) in one pass, then one GEMM."""


def _concat_reasons(spec: Spec) -> list[str]:
    found = []
    if spec.trains:
        found.append("forward only: dy would have to lie in a buffer that has room for S")
    if spec.suite == "kron_linear_group":
        found.append("one buffer holds x and one T; three layers need three")
    if isinstance(spec.case, Case) and not choose(spec.case.shape).thin:
        found.append(f"T is {choose(spec.case.shape).width} wide, as x is: the GEMM would be twice as large")
    return found


def _concat(problem: KronProblem) -> Built:
    """x lies in the buffer from the beginning; T and L are made anew in every call.

    T is copied into its place: written there by its product, it would be a batch of M tiny ones.
    """
    (layer,) = problem.layers
    (term,) = layer.terms
    assert layer.weight is not None
    shape = KronShape.of(term.a, term.b, term.b_down)
    down, width = _down(term, shape)
    k = shape.k
    both = problem.x.new_empty(problem.x.shape[0], k + width)
    both[:, :k] = problem.x
    weights = layer.weight.new_zeros(shape.n, k + width)
    weights[:, :k] = layer.weight
    x, up = both[:, :k], _up(term, shape, weights[:, k:])

    def forward() -> list[Tensor]:
        both[:, k:] = down(x)
        up()
        return [torch.nn.functional.linear(both, weights)]

    return Built(forward, {"x": problem.x})


def _down(term: KronTerm, shape: KronShape) -> tuple[Callable[[Tensor], Tensor], int]:
    """x -> T (M, width) in the cheapest order, and the width."""
    order = choose(shape).order
    if order == "low_rank":
        assert term.b_down is not None
        assert shape.rank is not None
        equation, factor, width = "rk,mjk->mjr", term.b_down, shape.k1 * shape.rank
    elif order == "a_first":
        assert term.a is not None
        equation, factor, width = "ij,mjk->mik", term.a, shape.n1 * shape.k2
    else:
        equation, factor, width = "pk,mjk->mjp", term.b, shape.k1 * shape.n2

    def down(x: Tensor) -> Tensor:
        view = kron_view(x, shape.k1, shape.k2, shuffled=False)
        return torch.einsum(equation, factor.to(x.dtype), view).flatten(1)

    return down, width


def _up(term: KronTerm, shape: KronShape, out: Tensor) -> Callable[[], object]:
    """What writes L (N, width) with ΔY = T Lᵀ into `out`, which is zero where L always is; one kernel."""
    order, width = choose(shape).order, out.shape[1]
    if term.shuffled:  # rows are p·n1 + i, not i·n2 + p
        rows = out.view(shape.n2, shape.n1, width).transpose(0, 1)
    else:
        rows = out.view(shape.n1, shape.n2, width)
    if order == "a_first":  # I ⊗ B: B in every block of the diagonal
        blocks = rows.unflatten(2, (shape.n1, shape.k2)).diagonal(dim1=0, dim2=2)
        return lambda: blocks.copy_(term.b[:, :, None])
    a = term.a
    if order == "b_first":  # A ⊗ I: A on the diagonal of every block
        assert a is not None
        diagonals = rows.unflatten(2, (shape.k1, shape.n2)).diagonal(dim1=1, dim2=3)
        return lambda: diagonals.copy_(a[:, :, None])
    if a is None:
        return lambda: out.copy_(term.b)
    products = rows.unflatten(2, (shape.k1, term.b.shape[1]))
    dtype = out.dtype

    def multiply() -> None:
        torch.mul(a.to(dtype)[:, None, :, None], term.b.to(dtype)[None, :, None, :], out=products)

    return multiply


CONCAT_GEMM = Arm("concat_gemm", _concat, _concat_reasons)
"""[x | T] [W | L]ᵀ in one GEMM."""
