"""y = x Wᵀ + bias + base + s · x (A ⊗ B)ᵀ with x read once: A X is summed in registers from the GEMM's own tiles."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import architecture_of, launch
from ..outputs import new_output
from ..triton_common import dot, dot_precision, scale_arguments, scale_value
from . import one_pass_tuning
from .linear_kernel import describable
from .maps import KronMap, kron_view
from .route import FatTerm


@triton.jit
def _load_right(
    offs_k, o2, n, mask, b_ptr, out_scale_ptr, stride_bo, stride_bi, stride_s, DTYPE: tl.constexpr
):
    """B of the tile's columns, [BLOCK_K, BLOCK_N]; undefined outside the mask."""
    offsets = o2[None, :].to(tl.int64) * stride_bo + offs_k[:, None].to(tl.int64) * stride_bi
    b_tile = tl.load(b_ptr + offsets, mask=mask)
    if out_scale_ptr is not None:
        columns = tl.broadcast_to(n[None, :], mask.shape)
        # Rounding point: a row scale enters B before it is rounded.
        b_tile = b_tile.to(tl.float32) * tl.load(out_scale_ptr + columns * stride_s, mask=mask).to(tl.float32)
    return b_tile.to(DTYPE)


@triton.jit
def _one_pass_kernel(
    x,
    weight,
    stride_xm,
    stride_x1,
    stride_x2,
    stride_wn,
    stride_w1,
    stride_w2,
    bias_ptr,
    base_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    in_scale_ptr,
    out_scale_ptr,
    scale,
    scale_ptr,
    M,
    N,
    O1,
    O2,
    I1,
    I2,
    span,
    stride_bias,
    stride_base_m,
    stride_base_n,
    stride_ao,
    stride_ai,
    stride_bo,
    stride_bi,
    stride_s,
    stride_i1,
    stride_i2,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    m_blocks = tl.cdiv(M, BLOCK_M)
    span_blocks = tl.cdiv(span, BLOCK_N)
    n_blocks = span_blocks * (N // span)
    steps = tl.cdiv(I2, BLOCK_K) * I1
    factor = scale_value(scale, scale_ptr)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    for tile in range(tl.program_id(0), m_blocks * n_blocks, tl.num_programs(0)):
        # GROUP_M rows of tiles before the next column, so that neighbours share W in cache.
        band = tile // (GROUP_M * n_blocks)
        band_rows = tl.minimum(m_blocks - band * GROUP_M, GROUP_M)
        inside = tile % (GROUP_M * n_blocks)
        first_m = (band * GROUP_M + inside % band_rows) * BLOCK_M
        block_n = inside // band_rows
        # A span is N itself, or the groups that one tile or one row of tiles may not cross.
        first_local = (block_n % span_blocks) * BLOCK_N
        first_n = (block_n // span_blocks) * span + first_local
        m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        index = first_n + tl.arange(0, BLOCK_N)
        m_mask = m < M
        n_mask = first_local + tl.arange(0, BLOCK_N) < span
        n = index.to(tl.int64)
        group = first_n // O2
        o2_first = index - group * O2
        o2 = o2_first
        if GROUPS == 2:
            o2 = tl.where(o2_first >= O2, o2_first - O2, o2_first)
            if ALIGNED:
                o2 = tl.max_contiguous(tl.multiple_of(o2, 8), 8)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        first_mixed = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        second_mixed = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        b_mask = n_mask[None, :] & (tl.arange(0, BLOCK_K) < I2)[:, None]
        b_tile = _load_right(
            tl.arange(0, BLOCK_K), o2, n, b_mask, b_ptr, out_scale_ptr, stride_bo, stride_bi, stride_s, DTYPE
        )
        # One loop over both sides of the input, the left one fastest, so that loads run ahead across it.
        # Stages are named: without W no product takes x's tile, and its loads would not run ahead by themselves.
        for step in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
            i1 = step % I1
            first_k = (step // I1) * BLOCK_K
            offs_k = first_k + tl.arange(0, BLOCK_K)
            left, right = i1.to(tl.int64), offs_k.to(tl.int64)
            if DESCRIPTORS:
                x_tile = x.load([first_m, i1, first_k]).reshape(BLOCK_M, BLOCK_K)
            else:
                x_mask = m_mask[:, None]
                if not EVEN_K:
                    x_mask = x_mask & (offs_k < I2)[None, :]
                x_columns = left * stride_x1 + right * stride_x2
                x_tile = tl.load(x + (m * stride_xm)[:, None] + x_columns[None, :], mask=x_mask, other=0.0)
            if weight is not None:
                if DESCRIPTORS and TRANSPOSED:
                    w_tile = weight.load([i1, first_k, first_n]).reshape(BLOCK_K, BLOCK_N)
                elif DESCRIPTORS:
                    w_tile = weight.load([first_n, i1, first_k]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    w_mask = n_mask[None, :]
                    if not EVEN_K:
                        w_mask = w_mask & (offs_k < I2)[:, None]
                    w_rows = left * stride_w1 + right * stride_w2
                    w_tile = tl.load(
                        weight + (n * stride_wn)[None, :] + w_rows[:, None], mask=w_mask, other=0.0
                    )
                acc = dot(x_tile, w_tile, acc, PRECISION)
            wide = x_tile.to(tl.float32)
            if in_scale_ptr is not None:
                in_offsets = left * stride_i1 + right * stride_i2
                in_scale = tl.load(in_scale_ptr + in_offsets, mask=offs_k < I2, other=0.0).to(tl.float32)
                wide = wide * in_scale[None, :]
            a_column = a_ptr + left * stride_ai
            own = tl.load(a_column + group * stride_ao).to(x_tile.dtype)
            first_mixed += wide * own.to(tl.float32)
            if GROUPS == 2:
                other = tl.load(a_column + (group + 1) * stride_ao, mask=group + 1 < O1, other=0.0)
                second_mixed += wide * other.to(x_tile.dtype).to(tl.float32)
            if i1 == I1 - 1:
                # Masked here, not where it was loaded: else the copy to shared memory would move there, to every step.
                b_mask = n_mask[None, :] & (offs_k < I2)[:, None]
                first_mask = b_mask
                if GROUPS == 2:
                    first_mask = b_mask & (o2_first < O2)[None, :]
                # Rounding point 1: A X contains the scale.
                mixed = (first_mixed * factor).to(DTYPE)
                acc = dot(mixed, tl.where(first_mask, b_tile, 0.0).to(DTYPE), acc, PRECISION)
                first_mixed = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
                if GROUPS == 2:
                    second_mask = b_mask & (o2_first >= O2)[None, :]
                    mixed = (second_mixed * factor).to(DTYPE)
                    acc = dot(mixed, tl.where(second_mask, b_tile, 0.0).to(DTYPE), acc, PRECISION)
                    second_mixed = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
                # The next B, a whole turn of i1 before it is used.
                offs_next = offs_k + BLOCK_K
                b_tile = _load_right(
                    offs_next, o2, n, n_mask[None, :] & (offs_next < I2)[:, None], b_ptr, out_scale_ptr,
                    stride_bo, stride_bi, stride_s, DTYPE,
                )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n * stride_bias, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        mask = m_mask[:, None] & n_mask[None, :]
        if base_ptr is not None:
            base_offsets = (m * stride_base_m)[:, None] + (n * stride_base_n)[None, :]
            acc += tl.load(base_ptr + base_offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounding point 2: base GEMM, delta, bias and base together, once.
        tl.store(y_ptr + (m * N)[:, None] + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_in_one_pass(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    kron: KronMap,
    config: one_pass_tuning.OnePassConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y (M, N) = x Wᵀ + bias + base + the delta of one map with a full B and an output that is not shuffled.

    x:      (M, K)  in any strides
    weight: (N, K)  in any strides; None for the delta alone
    bias:   (N,)    in any stride
    base:   (M, N)  in any strides; may be `out` itself
    config: None for the one that `tuning` chooses
    out:    (M, N)  contiguous, written and returned; None for a new tensor
    """
    assert kron.a is not None
    assert kron.b_down is None
    assert not permuted(kron)
    (o1, i1), (o2, i2) = kron.left, kron.right
    tokens = x.shape[0]
    y = new_output(x, (tokens, o1 * o2)) if out is None else out
    if y.numel() == 0:
        return y
    x_view = kron.in_view(x)  # (M, I1, I2)
    w_view = None if weight is None else kron.in_view(weight)  # (N, I1, I2)
    transposed = w_view is not None and w_view.stride(2) != 1
    if config is None:
        config = _chosen(x, weight, kron)
    in_scale = None
    if kron.in_scale is not None:
        in_scale = kron_view(kron.in_scale.unsqueeze(0), i1, i2, kron.in_shuffled).squeeze(0)
    arguments: dict[str, object] = {
        **_operands(x_view, w_view, transposed, config),
        "bias_ptr": bias,
        "base_ptr": base,
        "y_ptr": y,
        "a_ptr": kron.a,
        "b_ptr": kron.b,
        "in_scale_ptr": in_scale,
        "out_scale_ptr": kron.out_scale,
        **scale_arguments(kron.scale),
        "M": tokens,
        "N": o1 * o2,
        "O1": o1,
        "O2": o2,
        "I1": i1,
        "I2": i2,
        "span": config.span,
        "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_base_m": 0 if base is None else base.stride(0),
        "stride_base_n": 0 if base is None else base.stride(1),
        "stride_ao": kron.a.stride(0),
        "stride_ai": kron.a.stride(1),
        "stride_bo": kron.b.stride(0),
        "stride_bi": kron.b.stride(1),
        "stride_s": 0 if kron.out_scale is None else kron.out_scale.stride(0),
        "stride_i1": 0 if in_scale is None else in_scale.stride(0),
        "stride_i2": 0 if in_scale is None else in_scale.stride(1),
    }
    constants = {
        "DESCRIPTORS": config.descriptors,
        "TRANSPOSED": transposed,
        "EVEN_K": i2 % config.block_k == 0,
        "GROUPS": config.groups,
        "ALIGNED": o2 % 8 == 0,
        "PRECISION": dot_precision(x.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "STAGES": config.stages,
    }
    programs = config.programs(tokens, o1 * o2)
    if config.descriptors:
        programs = min(programs, architecture_of(x.device).multiprocessors)
    launch(_one_pass_kernel, programs, x.device, arguments, constants, config.warps, config.stages)
    return y


def permuted(kron: KronMap) -> bool:
    """Whether neighbours in A ⊗ B are apart in y: tiles of such columns would take a pointer for each element."""
    return kron.out_shuffled and 1 not in (kron.left[0], kron.right[0])


def fat_term(x: Tensor, weight: Tensor | None, kron: KronMap, kept: bool) -> FatTerm:
    """What the choice of a route and of a configuration depends on.

    kept: whether the first product is computed anyway
    """
    descriptors = plain = False
    if weight is not None and architecture_of(x.device).capability >= 90:
        descriptors = _describable(kron.in_view(x), kron.in_view(weight))
        plain = describable(x, weight)
    return FatTerm(
        x.shape[0],
        kron.left,
        kron.right,
        kron.order,
        weight is not None,
        weight is not None and weight.stride(1) != 1,
        descriptors,
        plain,
        kept,
    )


def _chosen(x: Tensor, weight: Tensor | None, kron: KronMap) -> one_pass_tuning.OnePassConfig:
    term = fat_term(x, weight, kron, kept=False)
    return one_pass_tuning.one_pass_choice(
        architecture_of(x.device), x.dtype, term.tokens, term.left, term.right, term.weight, term.transposed,
        term.descriptors,
    )  # fmt: skip


def _describable(x_view: Tensor, w_view: Tensor) -> bool:
    """Whether tensor descriptors can stand for both: 16 bytes apart in all dimensions but one without gaps."""
    return _aligned(x_view) and _aligned(w_view if w_view.stride(2) == 1 else w_view.permute(1, 2, 0))


def _aligned(view: Tensor) -> bool:
    """Whether the last dimension is dense and the others are multiples of 16 bytes, each beyond those after it."""
    size = view.element_size()
    return (
        view.stride(2) == 1
        and all(view.stride(dimension) * size % 16 == 0 for dimension in (0, 1))
        and view.stride(1) >= view.shape[2]
        and view.stride(0) >= (view.shape[1] - 1) * view.stride(1) + view.shape[2]
        and view.data_ptr() % 16 == 0
        and 0 not in view.shape
    )


def _operands(
    x_view: Tensor, w_view: Tensor | None, transposed: bool, config: one_pass_tuning.OnePassConfig
) -> dict[str, object]:
    """x (M, I1, I2) and W (N, I1, I2) as pointers with strides, or as descriptors of their tiles by i1.

    A descriptor ends a tile at I2: what lies beyond belongs to the next i1 and is read as zero. Its dimensions are in
    the order of their strides, the largest first, as CUDA's description of tensor maps has them.
    """
    operands: tuple[object, object] = (x_view, w_view)
    if config.descriptors:
        assert w_view is not None
        x_tiles = TensorDescriptor.from_tensor(x_view, [config.block_m, 1, config.block_k])
        if transposed:
            w_tiles = TensorDescriptor.from_tensor(
                w_view.permute(1, 2, 0), [1, config.block_k, config.block_n]
            )  # (I1, I2, N)
        else:
            w_tiles = TensorDescriptor.from_tensor(w_view, [config.block_n, 1, config.block_k])
        operands = (x_tiles, w_tiles)
    return {
        "x": operands[0],
        "weight": operands[1],
        "stride_xm": x_view.stride(0),
        "stride_x1": x_view.stride(1),
        "stride_x2": x_view.stride(2),
        "stride_wn": 0 if w_view is None else w_view.stride(0),
        "stride_w1": 0 if w_view is None else w_view.stride(1),
        "stride_w2": 0 if w_view is None else w_view.stride(2),
    }
