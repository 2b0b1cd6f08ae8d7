"""W + scale · (A ⊗ B) in Triton: W is read once and the new weight written once, summed in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..outputs import new_output
from ..triton_common import scale_arguments, scale_value

BLOCK_N, BLOCK_K, WARPS = 32, 64, 4
"""Tile of the weight that a program writes; chosen by rule, no GPU has measured it."""


@triton.jit
def _merge_kernel(
    weight_ptr,
    a_ptr,
    b_ptr,
    down_ptr,
    out_ptr,
    scale,
    scale_ptr,
    N,
    K,
    N1,
    N2,
    K2,
    R,
    stride_wn,
    stride_wk,
    stride_an,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_dr,
    stride_dk,
    SHUFFLED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    n = (pid // column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (pid % column_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    n_mask, k_mask = n < N, k < K
    mask = n_mask[:, None] & k_mask[None, :]
    if SHUFFLED:
        n1, n2 = n % N1, n // N1
    else:
        n1, n2 = n // N2, n % N2
    k1, k2 = (k // K2).to(tl.int64), (k % K2).to(tl.int64)
    n1, n2 = n1.to(tl.int64), n2.to(tl.int64)
    b_rows = b_ptr + n2 * stride_bn
    if down_ptr is None:
        right = tl.load(b_rows[:, None] + (k2 * stride_bk)[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        right = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        d_columns = down_ptr + k2 * stride_dk
        for r in range(R):
            up = tl.load(b_rows + r * stride_bk, mask=n_mask, other=0.0).to(tl.float32)
            down = tl.load(d_columns + r * stride_dr, mask=k_mask, other=0.0).to(tl.float32)
            right += up[:, None] * down[None, :]
    delta = right * scale_value(scale, scale_ptr)
    if a_ptr is not None:
        a_offsets = (n1 * stride_an)[:, None] + (k1 * stride_ak)[None, :]
        delta *= tl.load(a_ptr + a_offsets, mask=mask, other=0.0).to(tl.float32)
    wide_n, wide_k = n.to(tl.int64), k.to(tl.int64)
    w_offsets = (wide_n * stride_wn)[:, None] + (wide_k * stride_wk)[None, :]
    merged = tl.load(weight_ptr + w_offsets, mask=mask, other=0.0).to(tl.float32) + delta
    # Rounding point: the sum, once.
    out_offsets = (wide_n * K)[:, None] + wide_k[None, :]
    tl.store(out_ptr + out_offsets, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge(
    weight: Tensor, a: Tensor | None, b: Tensor, b_down: Tensor | None, scale: Tensor, shuffled: bool
) -> Tensor:
    """W + scale · (A ⊗ B), (N, K) contiguous; factors in any strides and dtypes."""
    n, k = weight.shape
    right = b if b_down is None else b_down
    out = new_output(weight, (n, k))
    arguments = {
        "weight_ptr": weight,
        "a_ptr": a,
        "b_ptr": b,
        "down_ptr": b_down,
        "out_ptr": out,
        **scale_arguments(scale),
        "N": n,
        "K": k,
        "N1": 1 if a is None else a.shape[0],
        "N2": b.shape[0],
        "K2": right.shape[1],
        "R": b.shape[1],
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_an": 0 if a is None else a.stride(0),
        "stride_ak": 0 if a is None else a.stride(1),
        "stride_bn": b.stride(0),
        "stride_bk": b.stride(1),
        "stride_dr": 0 if b_down is None else b_down.stride(0),
        "stride_dk": 0 if b_down is None else b_down.stride(1),
    }
    constants = {"SHUFFLED": shuffled, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
    programs = triton.cdiv(n, BLOCK_N) * triton.cdiv(k, BLOCK_K)
    launch(_merge_kernel, programs, weight.device, arguments, constants, WARPS, 1)
    return out
