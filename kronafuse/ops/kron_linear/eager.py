"""The four primitives on torch's own GEMMs, on any device: never N×K.

y is added to in place; a shuffled or row-scaled term goes through one more (M, N) tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import scales
from . import composed, sums
from .maps import KronMap, down_scale

CASTS_FACTORS: bool = False
"""torch's GEMMs take operands of one dtype: maps come with their factors cast."""
DENSE_ELEMENTS = 4096
"""Up to this many elements A ⊗ I is built and one GEMM replaces a batch of tiny ones; measured on CPUs in fp32."""
DENSE_TOKENS = 256
"""Fewer tokens are a short batch, and A ⊗ I costs more than it saves."""

one, sum_tokens, dot = sums.one, sums.sum_tokens, sums.dot
takes_in_parts, backward_in_parts = sums.takes_in_parts, sums.backward_in_parts


def shrink(x: Tensor, maps: Sequence[KronMap]) -> list[Tensor]:
    """The first product of each map of x (M, in), scaled; low rank with a left factor: P, unscaled."""
    return [_shrink_one(x, kron) for kron in maps]


def _shrink_one(x: Tensor, kron: KronMap) -> Tensor:
    if kron.in_scale is not None:
        x = x * kron.in_scale.to(x.dtype)
    if kron.order == "a_first":
        assert kron.a is not None
        return mix(kron.in_view(x), kron.a, kron.scale).flatten(1)
    right = kron.b if kron.b_down is None else kron.b_down
    rows = (kron.in_view(x) if kron.in_shuffled else x).reshape(-1, right.shape[1])
    product = scales.product(rows, right.t(), down_scale(kron))
    return product.view(x.shape[0], kron.left[1] * right.shape[0])


def mix(p: Tensor, a: Tensor, scale: float | Tensor) -> Tensor:
    """scale · A p[m]: (M, I1, R), (O1, I1) -> (M, O1, R)."""
    if _is_small(a, p.shape[2], p.shape[0]) and p.stride(1) == p.shape[2] * p.stride(2):
        out = scales.product(p.flatten(1), _beside_identity(a, p.shape[2]).t(), scale)
        return out.view(p.shape[0], a.shape[0], p.shape[2])
    return scales.batched_product(a, p, scale)


def _is_small(a: Tensor, size: int, tokens: int) -> bool:
    """Whether A ⊗ I of the identity of this size is worth building."""
    return tokens >= DENSE_TOKENS and a.numel() * size * size <= DENSE_ELEMENTS


def _beside_identity(a: Tensor, size: int) -> Tensor:
    """A ⊗ I, (O1·size, I1·size)."""
    identity = torch.eye(size, dtype=a.dtype, device=a.device)
    return (a[:, None, :, None] * identity[:, None, :]).flatten(2).flatten(0, 1)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    maps: Sequence[KronMap],
    inners: Sequence[Tensor | None],
    _owns_base: bool = False,
) -> Tensor:
    """x Wᵀ + bias + base + Σ up(inner), (M, out)."""
    last = weight is not None and weight_last(x, maps)
    y = None
    if weight is not None and not last:
        y = torch.nn.functional.linear(x, weight, bias)
        if base is not None:
            y += base
    elif base is not None and not last:
        y = base.clone(memory_format=torch.contiguous_format)
        if bias is not None:
            y += bias
    elif bias is not None:
        y = bias.expand(x.shape[0], -1).clone(memory_format=torch.contiguous_format)
    for kron, inner in zip(maps, inners, strict=True):
        assert inner is not None
        if y is None:
            y = _expand(kron, inner)
        else:
            _expand_into(y, kron, inner)
    assert y is not None
    if last:
        assert weight is not None
        y.addmm_(x, weight.t())
        if base is not None:
            y += base
    return y


def weight_last(x: Tensor, maps: Sequence[KronMap]) -> bool:
    """Whether the product with W is added to the terms' sum, and not that to it.

    A GEMM adds what was there to its fp32 accumulators. In 16 bits a small delta is then rounded at its own size, and
    its sum with bias and x Wᵀ once instead of twice. A base comes after that, as the plain chain adds it.
    """
    return len(maps) > 0 and x.dtype in (torch.float16, torch.bfloat16)


def in_one_pass(
    _x: Tensor, _weight: Tensor | None, maps: Sequence[KronMap], _kept: Sequence[bool] | None = None
) -> list[bool]:
    """None: torch's GEMMs take the first product from memory."""
    return [False] * len(maps)


def _expand(kron: KronMap, inner: Tensor) -> Tensor:
    """out_scale ⊙ up(inner), (M, out) contiguous."""
    tokens, right = inner.shape[0], kron.right[0]
    if kron.order != "b_first":
        delta = torch.mm(inner.reshape(-1, kron.b.shape[1]), kron.b.t())
    else:
        assert kron.a is not None
        if _is_small(kron.a, right, tokens):
            delta = torch.mm(inner, _beside_identity(kron.a, right).t())
        else:
            delta = torch.bmm(kron.a.expand(tokens, -1, -1), inner.view(tokens, kron.left[1], right))
    delta = delta.view(tokens, kron.left[0], right)
    if kron.out_scale is not None:
        delta = delta * kron.out_view(kron.out_scale.to(delta.dtype).unsqueeze(0))
    if not kron.out_shuffled:
        return delta.reshape(tokens, kron.left[0] * right)
    y = delta.new_empty((tokens, kron.left[0] * right))
    kron.out_view(y).copy_(delta)
    return y


def _expand_into(y: Tensor, kron: KronMap, inner: Tensor) -> None:
    """y += out_scale ⊙ up(inner), inner (M, inner)."""
    in_place = kron.out_scale is None and not kron.out_shuffled
    if kron.order == "b_first":
        assert kron.a is not None
        size = kron.b.shape[0]
        if in_place and _is_small(kron.a, size, y.shape[0]):
            y.addmm_(inner, _beside_identity(kron.a, size).t())
            return
        inner = inner.view(y.shape[0], kron.a.shape[1], size)
        if in_place:
            kron.out_view(y).baddbmm_(kron.a.expand(y.shape[0], -1, -1), inner)
        else:
            _add(kron.out_view(y), torch.matmul(kron.a, inner), kron)
    elif in_place:
        y.view(-1, kron.b.shape[0]).addmm_(inner.reshape(-1, kron.b.shape[1]), kron.b.t())
    else:
        _add(kron.out_view(y), torch.matmul(inner.view(y.shape[0], *kron.inner), kron.b.t()), kron)


def _add(view: Tensor, delta: Tensor, kron: KronMap) -> None:
    if kron.out_scale is not None:
        delta = delta * kron.out_view(kron.out_scale.to(delta.dtype).unsqueeze(0))
    view.add_(delta)


def second_stages() -> None:
    """Nothing is put off here."""


def row_dots(dy: Tensor, x: Tensor, kron: KronMap, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over tokens of dy ⊙ up(inner), (N,) in `dtype`."""
    return sums.dots_of(dy, linear(x, None, None, None, [kron], [inner]), dtype)


def reduce(
    p: Tensor,
    q: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    p_scale: Tensor | None = None,
    stages: None = None,
) -> Tensor:
    """scale · Σ_{m,g} (p_scale[g] ⊙ p[m,g])ᵀ q[m,g]: (M, G, P), (M, G, Q) -> (P, Q) in `dtype`."""
    if p_scale is not None:
        p = p * p_scale.to(p.dtype)
    number = scales.on_host(scale, p.dtype)
    # A sum that overflows 16 bits must not meet a scale of 0.
    if isinstance(number, Tensor):
        q = q * (number != 0) if p.dtype == torch.float16 else q
    elif number == 0:
        q, number = q * number, 1.0
    (tokens, group, height), width = p.shape, q.shape[2]
    rows_merge = _rows_merge(p) and _rows_merge(q)
    # Sums of partial sums are as wide as these here, but would be rounded once more in 16 bits.
    if rows_merge or p.dtype in (torch.float16, torch.bfloat16):
        out = _whole_reduce(p, q)
    elif tokens >= DENSE_TOKENS and height * width * group * group <= DENSE_ELEMENTS:
        whole = p.mT.flatten(1).t() @ q.mT.flatten(1)
        out = whole.view(height, group, width, group).diagonal(dim1=1, dim2=3).sum(-1)
    elif height * width <= group * (height + width):
        out = torch.bmm(p.mT, q).sum(0)
    else:
        out = _whole_reduce(p, q)
    return (out.to(dtype) * number) if isinstance(number, Tensor) or number != 1 else out.to(dtype)


def _whole_reduce(p: Tensor, q: Tensor) -> Tensor:
    """Σ over m and g in one GEMM of inner dimension M·G."""
    left, right = _columns(p), _columns(q)
    if left.shape[1] <= right.shape[1] or left.shape[0] < DENSE_TOKENS:
        return torch.mm(left.t(), right)
    # The narrower side first: the copy of the small result costs less than the GEMM gains.
    return torch.mm(right.t(), left).t().contiguous()


def _columns(view: Tensor) -> Tensor:
    """(M, G, P) as (M·G, P); where it must be copied, runs of neighbours stay together."""
    if _rows_merge(view) or view.stride(1) != 1:
        return view.reshape(-1, view.shape[2])
    return view.permute(2, 0, 1).reshape(view.shape[2], -1).t()


def _rows_merge(view: Tensor) -> bool:
    """Whether (M, G, P) is (M·G, P) without a copy."""
    return view.shape[0] == 1 or view.shape[1] == 1 or view.stride(0) == view.shape[1] * view.stride(1)


shrink_reduce, reduce_shared = composed.shrink_reduce_of(shrink, reduce), composed.reduce_shared_of(reduce)
