"""dx, and what the factor gradients are sums of, from one pass over dy and the pre-activation."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture_of, launch
from ..triton_common import scale_value
from . import tuning
from .activation_kernels import activate, derivative
from .call import Call
from .hidden_kernels import factor_arguments, into_hidden, kernel_constants, load_rows, out_of_hidden, wider


@triton.jit
def _differentiate_columns(
    acc,
    pre_ptr,
    hidden_ptr,
    dpre_ptr,
    dtype,
    factor,
    row,
    offs_h,
    M,
    stored,
    H,
    ACTIVATION: tl.constexpr,
):
    """dpre of these columns, rounded to `dtype`, acc = dy · up; act(pre) and dpre are stored where asked for."""
    mask = (row < M)[:, None] & (offs_h < H)[None, :]
    store_mask = (row < stored)[:, None] & (offs_h < H)[None, :]
    offsets = row[:, None] * H + offs_h[None, :]
    pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if hidden_ptr is not None:
        hidden = activate(pre, ACTIVATION)
        tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=store_mask)
    # Rounding point 1: the pre-activation's gradient, an operand.
    dpre = (acc * factor * derivative(pre, ACTIVATION)).to(dtype)
    if dpre_ptr is not None:
        tl.store(dpre_ptr + offsets, dpre, mask=store_mask)
    return dpre


@triton.jit
def _bottleneck_backward_kernel(
    dy_ptr,
    pre_ptr,
    down_ptr,
    up_ptr,
    dx_ptr,
    hidden_ptr,
    dpre_ptr,
    scale,
    scale_ptr,
    M,
    N,
    K,
    H,
    columns,
    stride_gm,
    stride_gn,
    stride_dh,
    stride_dk,
    stride_un,
    stride_uh,
    ACTIVATION: tl.constexpr,
    ADDS_DY: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    SECOND: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_split = pid % SPLIT
    row = (pid // SPLIT).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = pre_ptr.dtype.element_ty
    acc, second = into_hidden(
        dy_ptr, up_ptr, dtype, row, M, N, H, stride_gm, stride_gn, stride_uh, stride_un,
        EVEN_N, EVEN_H, PRECISION, BLOCK_M, BLOCK_N, WIDTH, SECOND,
    )  # fmt: skip
    # What all programs of these rows know is stored by the first of them.
    stored = tl.where(pid_split == 0, M, 0)
    factor = scale_value(scale, scale_ptr)
    offs_h = tl.arange(0, WIDTH)
    dpre = _differentiate_columns(
        acc, pre_ptr, hidden_ptr, dpre_ptr, dtype, factor, row, offs_h, M, stored, H, ACTIVATION
    )
    if SECOND > 0:
        offs_s = WIDTH + tl.arange(0, SECOND)
        dpre_second = _differentiate_columns(
            second, pre_ptr, hidden_ptr, dpre_ptr, dtype, factor, row, offs_s, M, stored, H, ACTIVATION
        )
    else:
        dpre_second = dpre
    if dx_ptr is not None:
        begin = pid_split * columns
        for k in range(begin, tl.minimum(begin + columns, K), BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            dx = out_of_hidden(
                dpre, dpre_second, down_ptr, offs_k, K, H, stride_dh, stride_dk,
                EVEN_K, EVEN_H, PRECISION, BLOCK_M, BLOCK_K, WIDTH, SECOND,
            )  # fmt: skip
            if ADDS_DY:
                added = load_rows(dy_ptr, row, offs_k, M, K, stride_gm, stride_gn, EVEN_K)
                dx += added.to(tl.float32)
            mask = (row < M)[:, None] & (offs_k < K)[None, :]
            # Rounding point 2: dx, once.
            offsets = row[:, None] * K + offs_k[None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def backward_rows(
    dy: Tensor,
    call: Call,
    pre: Tensor,
    dx: Tensor | None,
    hidden: Tensor | None,
    dpre: Tensor | None,
) -> None:
    """Fills dx, act(pre) and dpre, contiguous, where they are given."""
    tokens, (width, in_features), out_features = dy.shape[0], call.down.shape, call.up.shape[0]
    config = tuning.bottleneck_choice(
        architecture_of(dy.device),
        call.dtype,
        wider(dy.dtype, call.x.dtype),
        tokens,
        out_features,
        width,
        in_features,
    )
    if dx is None:
        config = replace(config, split=1)
    programs = tuning.blocks(tokens, config.block_m)
    arguments = {
        "dy_ptr": dy,
        "pre_ptr": pre,
        "dx_ptr": dx,
        "hidden_ptr": hidden,
        "dpre_ptr": dpre,
        "M": tokens,
        "N": out_features,
        "K": in_features,
        "H": width,
        "columns": config.columns,
        "stride_gm": dy.stride(0),
        "stride_gn": dy.stride(1),
        **factor_arguments(call.down, call.up, call.scale),
    }
    constants = {**kernel_constants(config, call, "N", "K"), "ADDS_DY": call.residual_is_x}
    if programs:
        launch(
            _bottleneck_backward_kernel,
            programs * config.split,
            dy.device,
            arguments,
            constants,
            config.warps,
            config.stages,
        )
