"""The dense forms of thin maps, D (width, in) and L (out, width), built from the factors at each call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..outputs import new_output
from . import tuning
from .maps import KronMap

BLOCK_F, BLOCK_T = 64, 32
"""Features and columns of T that a program writes."""


@triton.jit
def build_tile(
    block,
    factor_ptr,
    feature_scale_ptr,
    out_ptr,
    features,
    width,
    F1,
    F2,
    T2,
    stride_f,
    stride_t,
    stride_s,
    stride_of,
    stride_ot,
    MIX: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of a dense form, (features, width)."""
    feature_blocks = tl.cdiv(features, BLOCK_F)
    offs_f = (block % feature_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_t = (block // feature_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    if SHUFFLED:
        f1, f2 = offs_f % F1, offs_f // F1
    else:
        f1, f2 = offs_f // F2, offs_f % F2
    t1, t2 = offs_t // T2, offs_t % T2
    if MIX:  # A ⊗ I
        source = f1[:, None].to(tl.int64) * stride_f + t1[None, :].to(tl.int64) * stride_t
        nonzero = f2[:, None] == t2[None, :]
    else:  # I ⊗ B
        source = f2[:, None].to(tl.int64) * stride_f + t2[None, :].to(tl.int64) * stride_t
        nonzero = f1[:, None] == t1[None, :]
    inside = (offs_f < features)[:, None] & (offs_t < width)[None, :]
    value = tl.load(factor_ptr + source, mask=inside & nonzero, other=0.0).to(tl.float32)
    if feature_scale_ptr is not None:
        value = (
            value
            * tl.load(feature_scale_ptr + offs_f * stride_s, mask=offs_f < features, other=0.0).to(
                tl.float32
            )[:, None]
        )
    target = offs_f[:, None].to(tl.int64) * stride_of + offs_t[None, :].to(tl.int64) * stride_ot
    # Rounding point: once, after the row scale, from the factor's own dtype.
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dense_kernel(
    factor_ptr,
    feature_scale_ptr,
    out_ptr,
    features,
    width,
    F1,
    F2,
    T2,
    stride_f,
    stride_t,
    stride_s,
    stride_of,
    stride_ot,
    MIX: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    build_tile(
        tl.program_id(0), factor_ptr, feature_scale_ptr, out_ptr, features, width, F1, F2, T2, stride_f, stride_t,
        stride_s, stride_of, stride_ot, MIX, SHUFFLED, BLOCK_F, BLOCK_T,
    )  # fmt: skip


def up_factor(kron: KronMap) -> Tensor:
    """The factor of the second product."""
    factor = kron.a if kron.order == "b_first" else kron.b
    assert factor is not None
    return factor


def build_down(kron: KronMap, out: Tensor) -> None:
    """Writes D (width, in), so that T = x Dᵀ without the scale; low rank: P's D."""
    if kron.order == "a_first":
        assert kron.a is not None
        factor, strides = kron.a, (kron.a.stride(1), kron.a.stride(0))
        inner = kron.right[1]
    else:
        factor = kron.b if kron.b_down is None else kron.b_down
        strides, inner = (factor.stride(1), factor.stride(0)), factor.shape[0]
    sides = (kron.left[1], kron.right[1])
    mixes = kron.order == "a_first"
    _build(factor, strides, mixes, sides, kron.in_shuffled, inner, kron.in_scale, out.t())


def build_up(kron: KronMap, dtype: torch.dtype) -> Tensor:
    """L (out, width) in `dtype`, so that the delta is T Lᵀ."""
    first, second = kron.inner
    mixes, factor = kron.order == "b_first", up_factor(kron)
    out = new_output(factor, (kron.left[0] * kron.right[0], first * second), dtype)
    sides = (kron.left[0], kron.right[0])
    _build(factor, factor.stride(), mixes, sides, kron.out_shuffled, second, kron.out_scale, out)
    return out


def _build(
    factor: Tensor,
    strides: tuple[int, ...],
    mixes: bool,
    sides: tuple[int, int],
    shuffled: bool,
    inner: int,
    feature_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Writes out (features, width): a column of T is t1·inner + t2, a feature is (f1, f2) of `sides`.

    strides: of the factor, along its feature side and along its T side
    """
    features, width = out.shape
    arguments = {
        "factor_ptr": factor,
        "feature_scale_ptr": feature_scale,
        "out_ptr": out,
        "features": features,
        "width": width,
        "F1": sides[0],
        "F2": sides[1],
        "T2": inner,
        "stride_f": strides[0],
        "stride_t": strides[1],
        "stride_s": 0 if feature_scale is None else feature_scale.stride(0),
        "stride_of": out.stride(0),
        "stride_ot": out.stride(1),
    }
    constants = {"MIX": mixes, "SHUFFLED": shuffled, "BLOCK_F": BLOCK_F, "BLOCK_T": BLOCK_T}
    programs = tuning.blocks(features, BLOCK_F) * tuning.blocks(width, BLOCK_T)
    launch(_dense_kernel, programs, out.device, arguments, constants, 4, 1)
