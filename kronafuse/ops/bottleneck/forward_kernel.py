"""y and the pre-activation from one read of x and of the residual; the hidden layer stays on chip."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture_of, launch
from ..outputs import new_output
from ..triton_common import scale_value
from . import tuning
from .activation_kernels import activate
from .call import Call, result_dtype
from .hidden_kernels import factor_arguments, into_hidden, kernel_constants, load_rows, out_of_hidden, wider


@triton.jit
def _activate_columns(
    acc, bias_ptr, pre_ptr, row, offs_h, stored, H, ACTIVATION: tl.constexpr, KEEP: tl.constexpr
):
    """act(acc + bias) of these columns, rounded to pre's dtype; acc + bias is stored where it is kept."""
    pre = acc
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        mask = (row < stored)[:, None] & (offs_h < H)[None, :]
        # Rounding point 1: what backward reads; the activation here takes the sum itself.
        tl.store(pre_ptr + row[:, None] * H + offs_h[None, :], pre.to(pre_ptr.dtype.element_ty), mask=mask)
    # Rounding point 2: the hidden layer, an operand.
    return activate(pre, ACTIVATION).to(pre_ptr.dtype.element_ty)


@triton.jit
def _bottleneck_forward_kernel(
    x_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    down_bias_ptr,
    up_bias_ptr,
    y_ptr,
    pre_ptr,
    scale,
    scale_ptr,
    M,
    N,
    K,
    H,
    columns,
    stride_xm,
    stride_xk,
    stride_rm,
    stride_rn,
    stride_dh,
    stride_dk,
    stride_un,
    stride_uh,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
        x_ptr, down_ptr, dtype, row, M, K, H, stride_xm, stride_xk, stride_dh, stride_dk,
        EVEN_K, EVEN_H, PRECISION, BLOCK_M, BLOCK_K, WIDTH, SECOND,
    )  # fmt: skip
    # What all programs of these rows know is stored by the first of them.
    stored = tl.where(pid_split == 0, M, 0)
    offs_h = tl.arange(0, WIDTH)
    hidden = _activate_columns(acc, down_bias_ptr, pre_ptr, row, offs_h, stored, H, ACTIVATION, KEEP)
    if SECOND > 0:
        offs_s = WIDTH + tl.arange(0, SECOND)
        hidden_second = _activate_columns(
            second, down_bias_ptr, pre_ptr, row, offs_s, stored, H, ACTIVATION, KEEP
        )
    else:
        hidden_second = hidden
    factor = scale_value(scale, scale_ptr)
    begin = pid_split * columns
    for n in range(begin, tl.minimum(begin + columns, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        delta = out_of_hidden(
            hidden, hidden_second, up_ptr, offs_n, N, H, stride_uh, stride_un,
            EVEN_N, EVEN_H, PRECISION, BLOCK_M, BLOCK_N, WIDTH, SECOND,
        )  # fmt: skip
        if up_bias_ptr is not None:
            delta += tl.load(up_bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y = delta * factor
        if residual_ptr is not None:
            added = load_rows(residual_ptr, row, offs_n, M, N, stride_rm, stride_rn, EVEN_N)
            y += added.to(tl.float32)
        mask = (row < M)[:, None] & (offs_n < N)[None, :]
        # Rounding point 3: y, once.
        offsets = row[:, None] * N + offs_n[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def forward(call: Call, keep: bool, config: tuning.BottleneckConfig | None = None) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where it is kept)."""
    x, residual = call.x, call.residual
    tokens, (width, in_features), out_features = x.shape[0], call.down.shape, call.up.shape[0]
    y_dtype = result_dtype(x, residual, call.dtype, call.residual_is_x)
    y = new_output(x, (tokens, out_features), y_dtype)
    pre = new_output(x, (tokens, width) if keep else (0,), call.dtype)
    if tokens == 0:
        return y, pre
    config = config or tuning.bottleneck_choice(
        architecture_of(x.device),
        call.dtype,
        wider(x.dtype, y_dtype),
        tokens,
        in_features,
        width,
        out_features,
    )
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "down_bias_ptr": None if call.down_bias is None else call.down_bias.contiguous(),
        "up_bias_ptr": None if call.up_bias is None else call.up_bias.contiguous(),
        "y_ptr": y,
        "pre_ptr": pre,
        "M": tokens,
        "N": out_features,
        "K": in_features,
        "H": width,
        "columns": config.columns,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_rm": 0 if residual is None else residual.stride(0),
        "stride_rn": 0 if residual is None else residual.stride(1),
        **factor_arguments(call.down, call.up, call.scale),
    }
    constants = {"KEEP": keep, **kernel_constants(config, call, "K", "N")}
    programs = tuning.blocks(tokens, config.block_m) * config.split
    launch(_bottleneck_forward_kernel, programs, x.device, arguments, constants, config.warps, config.stages)
    return y, pre
