"""Random inputs of a case: slices of larger buffers, so that wrong strides show."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from .bottleneck_cases import BottleneckCase
from .cases import Case


def generator(seed: int) -> torch.Generator:
    """A seeded generator; pytest shows the print of a failing test."""
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def random(
    source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64, strided: bool = False
) -> Tensor:
    """Standard normal numbers, rounded to `dtype`; strided: a view with gaps between rows and columns."""
    if strided and shape:
        whole = torch.randn(*shape[:-1], 2 * shape[-1] + 3, generator=source, dtype=torch.float64)
        return whole.to(dtype)[..., 1 : 1 + 2 * shape[-1] : 2]
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)


def case_inputs(
    case: Case,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    tokens: int | None = None,
    factor_dtype: torch.dtype | None = None,
    weight: bool = True,
    bias: bool = True,
    base: bool = False,
    row_scale: bool = False,
    scale: float | Tensor = 0.7,
    strided: bool = False,
    terms: int = 1,
) -> tuple[Tensor, FrozenLinear]:
    """x (2, M, K) or (M, K) and a layer of the case, scaled so that y and the delta are of order 1."""
    source, shape = generator(seed), case.shape
    m = case.tokens if tokens is None else min(tokens, case.tokens)
    factors = factor_dtype or dtype
    x = random(source, m, shape.k, dtype=dtype, strided=strided)

    def factor(*size: int, fan_in: int) -> Tensor:
        value = random(source, *size, dtype=torch.float64) / fan_in**0.5
        return value.to(factors).t().contiguous().t() if strided else value.to(factors)

    def term() -> KronTerm:
        a = factor(shape.n1, shape.k1, fan_in=shape.k1) if case.has_a else None
        rank = shape.rank
        b = factor(shape.n2, shape.k2 if rank is None else rank, fan_in=shape.k2 if rank is None else rank)
        b_down = None if rank is None else factor(rank, shape.k2, fan_in=shape.k2)
        rows = None
        if row_scale:
            rows = (torch.rand(shape.n, generator=source) < 0.7).to(dtype) * 1.25
        return KronTerm(a, b, b_down, scale, case.shuffled, rows)

    layer = FrozenLinear(
        (random(source, shape.n, shape.k) / shape.k**0.5).to(dtype) if weight else None,
        tuple(term() for _ in range(terms)),
        random(source, shape.n, dtype=dtype) if bias else None,
        random(source, m, shape.n, dtype=dtype, strided=strided) if base else None,
    )
    return x, layer


def bottleneck_inputs(
    case: BottleneckCase,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    tokens: int | None = None,
    factor_dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    strided: bool = False,
) -> dict[str, Tensor]:
    """Tensors of a bottleneck by the name of its argument, x (M, K) first; the delta is of order 1.

    A residual that is x itself is not among them, nor are biases that the case has not.
    """
    source, factors = generator(seed), factor_dtype or dtype
    m = case.tokens if tokens is None else min(tokens, case.tokens)
    n, h, k = case.out_features, case.width, case.in_features

    def factor(*size: int) -> Tensor:
        value = (random(source, *size) / size[-1] ** 0.5).to(factors)
        return value.t().contiguous().t() if strided else value

    tensors = {"x": random(source, m, k, dtype=dtype, strided=strided)}
    if case.residual == "other":
        tensors["residual"] = random(source, m, n, dtype=dtype, strided=strided)
    tensors |= {"down": factor(h, k), "up": factor(n, h)}
    if case.biases:
        tensors["down_bias"] = random(source, h, dtype=factors, strided=strided)
        tensors["up_bias"] = random(source, n, dtype=factors, strided=strided)
    return tensors if scale is None else {**tensors, "scale": scale}
