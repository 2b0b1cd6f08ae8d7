"""`kron_linear`, `kron_delta` and `kron_linear_group`: the public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks
from ..calls import autocasts, distinct, runs_directly, scale_dtype
from ..transforms import apply, explained
from .autograd import KronGroup
from .raw import Layout, forward
from .terms import FrozenLinear, KronTerm, check_records


def kron_linear_group(x: Tensor, layers: Sequence[FrozenLinear], *, impl: str = "auto") -> list[Tensor]:
    """y = x Wᵀ + bias + base + Σ scale · row_scale ⊙ x (A ⊗ B)ᵀ of each layer, from one read of x.

    x:      (..., K)  fp64, fp32, fp16 or bf16; any strides
    layers: FrozenLinears of one K: q, k and v, each with any number of terms
    impl:   "auto", "reference", "eager", "cpu", "triton" or "cuda"

    Returns one (..., N) per layer, in x's dtype (under autocast in its dtype); sums in fp32 (fp64 for fp64). In 16 bits
    T is rounded too. impl="eager" and "cpu" also round the sum of bias, base and deltas, at its own size, before x Wᵀ
    is added to it in fp32; "triton" and "cuda" round y alone, except where torch's GEMM multiplies by W.
    Weight, bias and base must have x's dtype outside autocast; factors of another dtype are cast to it, and
    their gradients come in their own. Gradients of everything that asks for one; second derivatives raise.
    A scale of 0 is multiplied by: the delta is 0 where x and the factors are finite, and NaN where a NaN or an infinity
    of theirs goes in. NaN may reach further features and rows, since small factors are laid out among zeros. No
    product that overflows in fp16 at another scale makes a NaN of finite tensors, except with impl="reference" and,
    where the scale is a tensor on a GPU, x · b_downᵀ of a term that has a left factor too.
    Raises ValueError (shapes), TypeError (dtypes), NotImplementedError (impl cannot serve; lists the reasons).
    Source: KronA, arXiv 2212.10650; DiffuseKronA, arXiv 2402.17412; LoKr, arXiv 2309.14859.
    """
    return _apply("kron_linear_group", x, layers, impl)


def kron_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    *,
    b_down: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
    impl: str = "auto",
) -> Tensor:
    """y = x Wᵀ + bias + scale · x (A ⊗ B)ᵀ, fused with the frozen linear, without forming A ⊗ B.

    x:        (..., K)   fp64, fp32, fp16 or bf16; any strides
    weight:   (N, K)     in x's dtype
    a:        (N1, K1)   left factor, K = K1·K2; None for the 1×1 identity (LoRA)
    b:        (N2, K2)   right factor, or (N2, R) with b_down
    b_down:   (R, K2)    B = b · b_down
    bias:     (N,)
    scale:    float or 0-d tensor, multiplies the delta only
    shuffled: output index n2·N1 + n1 instead of n1·N2 + n2 (DiffuseKronA's released layout)
    impl:     "auto", "reference", "eager", "cpu", "triton" or "cuda"

    Returns (..., N); dtypes, errors and sources as `kron_linear_group`.
    """
    checks.check_tensor("kron_linear", "weight", weight)
    layer = FrozenLinear(weight, (KronTerm(a, b, b_down, scale, shuffled),), bias)
    return _apply("kron_linear", x, (layer,), impl)[0]


def kron_delta(
    x: Tensor,
    a: Tensor | None,
    b: Tensor,
    *,
    b_down: Tensor | None = None,
    base: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
    impl: str = "auto",
) -> Tensor:
    """y = base + scale · x (A ⊗ B)ᵀ, without forming A ⊗ B and without looking at the base weight.

    x:        (..., K)   fp64, fp32, fp16 or bf16; any strides
    a:        (N1, K1)   left factor, K = K1·K2; None for the 1×1 identity (LoRA)
    b:        (N2, K2)   right factor, or (N2, R) with b_down
    b_down:   (R, K2)    B = b · b_down
    base:     (..., N)   added to the delta; None for the delta alone
    scale:    float or 0-d tensor, multiplies the delta only
    shuffled: output index n2·N1 + n1 instead of n1·N2 + n2 (DiffuseKronA's released layout)
    impl:     "auto", "reference", "eager", "cpu", "triton" or "cuda"

    Returns (..., N); dtypes, errors and sources as `kron_linear_group`.
    """
    layer = FrozenLinear(None, (KronTerm(a, b, b_down, scale, shuffled),), None, base)
    return _apply("kron_delta", x, (layer,), impl)[0]


def _apply(op: str, x: Tensor, layers: Sequence[FrozenLinear], impl: str) -> list[Tensor]:
    """Fixes the compute dtype, flattens the group and calls the Function."""
    check_records(op, x, layers, impl)
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        layers = [_cast_whole(op, layer, dtype) for layer in layers]
    compiling = torch.compiler.is_compiling()
    layer_tensors: list[Tensor | None] = []
    term_tensors: list[Tensor | None] = []
    counts, scales, shuffled = [], [], []
    for layer in layers:
        layer_tensors += (layer.weight, layer.bias, layer.base)
        counts.append(len(layer.terms))
        for a, b, b_down, scale, is_shuffled, row_scale in layer.terms:
            if compiling and not isinstance(scale, Tensor):
                scale = x.new_ones((), dtype=scale_dtype(x)) * scale
            tensor_scale = scale if isinstance(scale, Tensor) else None
            if tensor_scale is None:
                checks.check_scale(op, scale, x)
            term_tensors += (a, b, b_down, tensor_scale, row_scale)
            scales.append(1.0 if tensor_scale is not None else float(scale))
            shuffled.append(is_shuffled)
    layout = Layout(op, impl, tuple(counts), tuple(scales), tuple(shuffled))
    tensors = [x, *layer_tensors, *term_tensors]
    if runs_directly(tensors):
        return explained(op, forward, x, layer_tensors, term_tensors, layout)[: len(counts)]
    results = apply(op, KronGroup, layout, *(distinct(tensors) if compiling else tensors))
    return list(results[: len(counts)])


def _cast_whole(op: str, layer: FrozenLinear, dtype: torch.dtype) -> FrozenLinear:
    whole = {"weight": layer.weight, "bias": layer.bias, "base": layer.base}
    for name, tensor in whole.items():
        if tensor is not None:
            checks.check_dtype(op, name, tensor)
    cast = {name: None if tensor is None else tensor.to(dtype) for name, tensor in whole.items()}
    return FrozenLinear(cast["weight"], layer.terms, cast["bias"], cast["base"])
