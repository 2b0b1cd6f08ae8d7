"""y = x Wᵀ + bias + base + Σ T Lᵀ: the GEMM with tails, W in either layout or absent."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import architecture_of, launch
from ..outputs import new_output
from ..triton_common import dot, dot_precision
from . import tuning
from .tails import (
    BLOCK_TAIL,
    ELEMENTWISE_TAIL,
    MIX_TAIL,
    NO_TAIL,
    DenseTail,
    StructuredTail,
    add_block_tail,
    add_dense_tail,
    add_elementwise_tail,
)


@triton.jit
def _linear_kernel(
    x,
    weight,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    bias_ptr,
    base_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_bias,
    stride_base_m,
    stride_base_n,
    t0_ptr,
    l0_ptr,
    width0,
    stride_t0,
    stride_l0n,
    stride_l0w,
    t1_ptr,
    l1_ptr,
    width1,
    stride_t1,
    stride_l1n,
    stride_l1w,
    ts_ptr,
    factor_ptr,
    out_scale_ptr,
    O1,
    O2,
    J,
    stride_ts,
    stride_fo,
    stride_fj,
    stride_s,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAIL: tl.constexpr,
    PERMUTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_0: tl.constexpr,
    EVEN_1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    m_blocks = tl.cdiv(M, BLOCK_M)
    n_blocks = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), m_blocks * n_blocks, tl.num_programs(0)):
        # GROUP_M rows of tiles before the next column, so that neighbours share W in cache.
        band = tile // (GROUP_M * n_blocks)
        band_rows = tl.minimum(m_blocks - band * GROUP_M, GROUP_M)
        inside = tile % (GROUP_M * n_blocks)
        first_m = (band * GROUP_M + inside % band_rows) * BLOCK_M
        first_n = (inside // band_rows) * BLOCK_N
        m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        index = first_n + tl.arange(0, BLOCK_N)
        m_mask = m < M
        n_mask = index < N
        n = index.to(tl.int64)
        if PERMUTED:
            # The tile holds features that are neighbours in A ⊗ B, which are O1 apart in y.
            n = (index % O2).to(tl.int64) * O1 + index // O2
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if weight is not None:
            for k in range(0, K, BLOCK_K):
                if DESCRIPTORS:
                    x_tile = x.load([first_m, k])
                    if TRANSPOSED:
                        w_tile = weight.load([k, first_n])
                    else:
                        w_tile = weight.load([first_n, k]).T
                else:
                    offs_k = k + tl.arange(0, BLOCK_K)
                    x_mask = m_mask[:, None]
                    w_mask = n_mask[None, :]
                    if not EVEN_K:
                        x_mask = x_mask & (offs_k < K)[None, :]
                        w_mask = w_mask & (offs_k < K)[:, None]
                    wide_k = offs_k.to(tl.int64)
                    x_offsets = (m * stride_xm)[:, None] + wide_k[None, :] * stride_xk
                    w_offsets = (n * stride_wn)[None, :] + wide_k[:, None] * stride_wk
                    x_tile = tl.load(x + x_offsets, mask=x_mask, other=0.0)
                    w_tile = tl.load(weight + w_offsets, mask=w_mask, other=0.0)
                acc = dot(x_tile, w_tile, acc, PRECISION)
        if l0_ptr is not None:
            acc = add_dense_tail(
                acc, t0_ptr, l0_ptr, m, m_mask, n, n_mask, width0, stride_t0, stride_l0n, stride_l0w,
                EVEN_0, PRECISION, BLOCK_R,
            )  # fmt: skip
        if l1_ptr is not None:
            acc = add_dense_tail(
                acc, t1_ptr, l1_ptr, m, m_mask, n, n_mask, width1, stride_t1, stride_l1n, stride_l1w,
                EVEN_1, PRECISION, BLOCK_R,
            )  # fmt: skip
        if TAIL != NO_TAIL:
            o1 = index // O2
            o2 = index % O2
            if TAIL == BLOCK_TAIL:
                last = tl.minimum(first_n + BLOCK_N, N) - 1
                acc = add_block_tail(
                    acc, ts_ptr, factor_ptr, out_scale_ptr, m, m_mask, n, n_mask, o1, o2, first_n // O2, last // O2,
                    J, stride_ts, stride_fo, stride_fj, stride_s, PRECISION, BLOCK_R,
                )  # fmt: skip
            elif TAIL == MIX_TAIL:
                acc = add_elementwise_tail(
                    acc, ts_ptr, factor_ptr, out_scale_ptr, first_m, m_mask, n, n_mask, o1, o2,
                    J, stride_ts, O2, stride_fo, stride_fj, stride_s, BLOCK_M,
                )  # fmt: skip
            else:
                acc = add_elementwise_tail(
                    acc, ts_ptr, factor_ptr, out_scale_ptr, first_m, m_mask, n, n_mask, o2, o1 * J,
                    J, stride_ts, 1, stride_fo, stride_fj, stride_s, BLOCK_M,
                )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n * stride_bias, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        mask = m_mask[:, None] & n_mask[None, :]
        if base_ptr is not None:
            base_offsets = (m * stride_base_m)[:, None] + (n * stride_base_n)[None, :]
            acc += tl.load(base_ptr + base_offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounding point 2: base GEMM, tails, bias and base together, once.
        tl.store(y_ptr + (m * N)[:, None] + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


DENSE_SLOTS = 2
"""Dense tails that one launch serves, beside one structured tail."""


def linear_with_tails(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    features: int,
    dense: list[DenseTail],
    structured: StructuredTail | None,
    config: tuning.LinearConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y (M, N) = x Wᵀ + bias + base + Σ tails.

    x:        (M, K)  in any strides; not read where weight is None
    weight:   (N, K)  in any strides
    bias:     (N,)    in any stride
    base:     (M, N)  in any strides; may be `out` itself
    features: N
    config:   None for the one that `tuning` chooses
    out:      (M, N)  contiguous, written and returned; None for a new tensor
    """
    assert len(dense) <= DENSE_SLOTS
    tokens = x.shape[0]
    y = new_output(x, (tokens, features)) if out is None else out
    if y.numel() == 0:
        return y
    kind = NO_TAIL.value if structured is None else structured.kind
    permuted = structured is not None and structured.shuffled and 1 not in structured.sides
    architecture = architecture_of(x.device)
    transposed = weight is not None and weight.stride(1) != 1
    if config is None:
        described = weight is not None and not permuted and describable(x, weight)
        descriptors = described and architecture.capability >= 90
        accumulators = accumulators_beside(structured, permuted)
        widest = _widest_dot(dense, structured)
        config = tuning.linear_choice(
            architecture, x.dtype, tokens, features, 0 if weight is None else x.shape[1], transposed,
            widest, accumulators, descriptors,
        )  # fmt: skip
    arguments: dict[str, object] = {
        **_operands(x, weight, transposed, config),
        "bias_ptr": bias,
        "base_ptr": base,
        "y_ptr": y,
        "M": tokens,
        "N": features,
        "K": x.shape[1],
        "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_base_m": 0 if base is None else base.stride(0),
        "stride_base_n": 0 if base is None else base.stride(1),
        **_dense_arguments(dense),
        **_structured_arguments(structured),
    }
    evens = [tail.t.shape[1] % config.block_r == 0 for tail in dense] + [False] * DENSE_SLOTS
    constants = {
        "DESCRIPTORS": config.descriptors,
        "TRANSPOSED": transposed,
        "TAIL": kind,
        "PERMUTED": permuted,
        "EVEN_K": x.shape[1] % config.block_k == 0,
        "EVEN_0": evens[0],
        "EVEN_1": evens[1],
        "PRECISION": dot_precision(x.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r,
        "GROUP_M": config.group_m,
    }
    programs = tuning.blocks(tokens, config.block_m) * tuning.blocks(features, config.block_n)
    if config.descriptors:
        programs = min(programs, architecture.multiprocessors)
    launch(_linear_kernel, programs, x.device, arguments, constants, config.warps, config.stages)
    return y


def _widest_dot(dense: list[DenseTail], structured: StructuredTail | None) -> int:
    """Columns of the widest T that the tails multiply by dots, 0 without."""
    widths = [tail.t.shape[1] for tail in dense]
    if structured is not None and structured.kind == BLOCK_TAIL.value:
        widths.append(structured.factor.shape[1])
    return max(widths, default=0)


def accumulators_beside(tail: StructuredTail | None, permuted: bool) -> int:
    """Most accumulators a thread beside this tail."""
    if tail is None:
        return tuning.ACCUMULATORS
    if permuted or tail.kind == ELEMENTWISE_TAIL.value:
        return tuning.GATHER_ACCUMULATORS
    if tail.kind == BLOCK_TAIL.value:
        return tuning.ACCUMULATORS
    return tuning.UNALIGNED_ACCUMULATORS if tail.sides[1] % 16 else tuning.MIX_ACCUMULATORS


def describable(x: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can stand for both: x row-major, the weight in either layout."""
    return _aligned(x) and _aligned(weight if weight.stride(1) == 1 else weight.t())


def _aligned(matrix: Tensor) -> bool:
    """Dense rows that do not overlap, aligned to 16 bytes, and none of the sizes zero."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and 0 not in matrix.shape
    )


def _operands(
    x: Tensor, weight: Tensor | None, transposed: bool, config: tuning.LinearConfig
) -> dict[str, object]:
    """x and W as pointers with strides, or as descriptors of their tiles; without W neither is read."""
    if weight is None:
        return {"x": None, "weight": None, "stride_xm": 0, "stride_xk": 0, "stride_wn": 0, "stride_wk": 0}
    operands: tuple[object, object] = (x, weight)
    if config.descriptors and transposed:
        w_tiles = TensorDescriptor.from_tensor(weight.t(), [config.block_k, config.block_n])
        operands = (TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]), w_tiles)
    elif config.descriptors:
        w_tiles = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
        operands = (TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]), w_tiles)
    return {
        "x": operands[0],
        "weight": operands[1],
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
    }


def _dense_arguments(dense: list[DenseTail]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for slot in range(DENSE_SLOTS):
        tail = dense[slot] if slot < len(dense) else None
        assert tail is None or tail.t.stride(1) == 1
        arguments |= {
            f"t{slot}_ptr": None if tail is None else tail.t,
            f"l{slot}_ptr": None if tail is None else tail.up,
            f"width{slot}": 0 if tail is None else tail.t.shape[1],
            f"stride_t{slot}": 0 if tail is None else tail.t.stride(0),
            f"stride_l{slot}n": 0 if tail is None else tail.up.stride(0),
            f"stride_l{slot}w": 0 if tail is None else tail.up.stride(1),
        }
    return arguments


def _structured_arguments(tail: StructuredTail | None) -> dict[str, object]:
    assert tail is None or tail.t.is_contiguous()
    scale = None if tail is None else tail.out_scale
    return {
        "ts_ptr": None if tail is None else tail.t,
        "factor_ptr": None if tail is None else tail.factor,
        "out_scale_ptr": scale,
        "O1": 1 if tail is None else tail.sides[0],
        "O2": 1 if tail is None else tail.sides[1],
        "J": 1 if tail is None else tail.factor.shape[1],
        "stride_ts": 0 if tail is None else tail.t.stride(0),
        "stride_fo": 0 if tail is None else tail.factor.stride(0),
        "stride_fj": 0 if tail is None else tail.factor.stride(1),
        "stride_s": 0 if scale is None else scale.stride(0),
    }
