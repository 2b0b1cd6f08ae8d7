"""What both kernels are made of: a product into the hidden layer, and one out of it, a block of rows a program.

The hidden width is one power of two or the sum of two, each with an accumulator of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import dot, dot_precision, scale_arguments
from . import tuning
from .activation_numbers import ACTIVATIONS
from .call import Call


@triton.jit
def load_rows(ptr, row, offs_f, M, F, stride_m, stride_f, EVEN_F: tl.constexpr):
    """Features offs_f of these rows of a (M, F) tensor, 0 outside of it."""
    mask = (row < M)[:, None]
    if not EVEN_F:
        mask = mask & (offs_f < F)[None, :]
    offsets = row[:, None] * stride_m + offs_f.to(tl.int64)[None, :] * stride_f
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_factor(
    ptr,
    dtype: tl.constexpr,
    offs_r,
    offs_c,
    rows,
    columns,
    stride_r,
    stride_c,
    EVEN_R: tl.constexpr,
    EVEN_C: tl.constexpr,
):
    """Elements (offs_r, offs_c) of a (rows, columns) factor in `dtype`, 0 outside of it."""
    offsets = offs_r.to(tl.int64)[:, None] * stride_r + offs_c.to(tl.int64)[None, :] * stride_c
    if EVEN_R and EVEN_C:
        tile = tl.load(ptr + offsets)
    elif EVEN_R:
        tile = tl.load(ptr + offsets, mask=(offs_c < columns)[None, :], other=0.0)
    elif EVEN_C:
        tile = tl.load(ptr + offsets, mask=(offs_r < rows)[:, None], other=0.0)
    else:
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    # Rounding point 0: a factor of another dtype.
    return tile.to(dtype)


@triton.jit
def into_hidden(
    in_ptr,
    w_ptr,
    dtype: tl.constexpr,
    row,
    M,
    F,
    H,
    stride_im,
    stride_if,
    stride_wh,
    stride_wf,
    EVEN_F: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    WIDTH: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Rows of the input times w (H, F), both in `dtype`: the hidden layer's first WIDTH columns, and SECOND more."""
    offs_h = tl.arange(0, WIDTH)
    offs_s = WIDTH + tl.arange(0, SECOND if SECOND > 0 else 1)
    acc = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    second = tl.zeros([BLOCK_M, SECOND if SECOND > 0 else 1], dtype=tl.float32)
    for f in range(0, F, BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        tile = load_rows(in_ptr, row, offs_f, M, F, stride_im, stride_if, EVEN_F)
        # Rounding point 0: input wider than the compute dtype.
        tile = tile.to(dtype)
        w_tile = load_factor(w_ptr, dtype, offs_f, offs_h, F, H, stride_wf, stride_wh, EVEN_F, EVEN_H)
        acc = dot(tile, w_tile, acc, PRECISION)
        if SECOND > 0:
            w_tile = load_factor(w_ptr, dtype, offs_f, offs_s, F, H, stride_wf, stride_wh, EVEN_F, EVEN_H)
            second = dot(tile, w_tile, second, PRECISION)
    return acc, second


@triton.jit
def out_of_hidden(
    hidden,
    hidden_second,
    w_ptr,
    offs_o,
    features,
    H,
    stride_wh,
    stride_wo,
    EVEN_O: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    WIDTH: tl.constexpr,
    SECOND: tl.constexpr,
):
    """The hidden layer's rows times columns offs_o of w (H, features)."""
    offs_h = tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    dtype: tl.constexpr = hidden.dtype
    w_tile = load_factor(w_ptr, dtype, offs_h, offs_o, H, features, stride_wh, stride_wo, EVEN_H, EVEN_O)
    acc = dot(hidden, w_tile, acc, PRECISION)
    if SECOND > 0:
        offs_s = WIDTH + tl.arange(0, SECOND)
        w_tile = load_factor(w_ptr, dtype, offs_s, offs_o, H, features, stride_wh, stride_wo, EVEN_H, EVEN_O)
        acc = dot(hidden_second, w_tile, acc, PRECISION)
    return acc


def kernel_constants(config: tuning.BottleneckConfig, call: Call, inner: str, outer: str) -> dict[str, Any]:
    """The constants of both kernels; `inner` and `outer` are the letters of the features read and written."""
    sizes = {"K": call.down.shape[1], "N": call.up.shape[0]}
    steps = {inner: config.block_in, outer: config.block_out}
    return {
        "ACTIVATION": ACTIVATIONS[call.activation],
        "SPLIT": config.split,
        **{f"EVEN_{letter}": sizes[letter] % steps[letter] == 0 for letter in sizes},
        "EVEN_H": call.down.shape[0] == config.width + config.second,
        "PRECISION": dot_precision(call.dtype),
        "BLOCK_M": config.block_m,
        **{f"BLOCK_{letter}": steps[letter] for letter in steps},
        "WIDTH": config.width,
        "SECOND": config.second,
    }


def factor_arguments(down: Tensor, up: Tensor, scale: float | Tensor) -> dict[str, Any]:
    return {
        "down_ptr": down,
        "up_ptr": up,
        "stride_dh": down.stride(0),
        "stride_dk": down.stride(1),
        "stride_un": up.stride(0),
        "stride_uh": up.stride(1),
        **scale_arguments(scale),
    }


def wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The wider of two dtypes; the first of equals."""
    return first if first.itemsize >= second.itemsize else second
