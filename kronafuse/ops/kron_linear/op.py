"""`kron_linear`, `kron_delta` and `kron_linear_group`: the public functions and their autograd.Function."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from . import algorithm
from .raw import LAYER_TENSORS, TERM_TENSORS, Layout, kron_backward, kron_forward
from .terms import FrozenLinear, KronTerm


class _KronGroup(torch.autograd.Function):
    """The group's y of each layer, then what each term saves for backward."""

    @staticmethod
    def forward(layout: Layout, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        split = LAYER_TENSORS * len(layout.terms_per_layer)
        return tuple(kron_forward(x, tensors[:split], tensors[split:], *layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layout, x, *tensors = inputs
        saved = output[len(layout.terms_per_layer) :]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        ctx.shapes = [y.shape for y in output[: len(layout.terms_per_layer)]]
        needed = _needs_factors(ctx.needs_input_grad, layout)
        split = LAYER_TENSORS * len(layout.terms_per_layer)
        kept = [
            None if index < split and index % LAYER_TENSORS == 2 else each
            for index, each in enumerate(tensors)
        ]
        ctx.save_for_backward(x, *kept, *(part if needed else part.new_empty(0) for part in saved))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        layers = len(layout.terms_per_layer)
        split, terms = LAYER_TENSORS * layers, sum(layout.terms_per_layer)
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[: split + TERM_TENSORS * terms], rest[split + TERM_TENSORS * terms :]
        dys = [x.new_zeros(shape) if dy is None else dy for dy, shape in zip(grads, ctx.shapes, strict=False)]
        _, need_x, *need = ctx.needs_input_grad
        needs = [need_x]
        for index in range(layers):
            needs += need[index * LAYER_TENSORS : index * LAYER_TENSORS + algorithm.LAYER_GRADIENTS]
        needs += need[split:]
        flat: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            # Under create_graph the products are recorded, to raise where they are differentiated again.
            products = _KronGroupGradient.apply if torch.is_grad_enabled() else _KronGroupGradient.forward
            results = products(layout, needs, layers, *dys, x, *tensors, *saved)
            flat = [result if wanted else None for result, wanted in zip(results, needs, strict=True)]
        dx, layer_grads, term_grads = flat[0], flat[1 : 1 + 2 * layers], flat[1 + 2 * layers :]
        by_layer: list[Tensor | None] = []
        for index in range(layers):
            dbase = dys[index] if need[index * LAYER_TENSORS + 2] else None
            by_layer += [*layer_grads[2 * index : 2 * index + 2], dbase]
        return None, dx, *by_layer, *term_grads


class _KronGroupGradient(torch.autograd.Function):
    """The gradients of a group, themselves not differentiable."""

    @staticmethod
    def forward(
        layout: Layout, needs: list[bool], layers: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        dys, x, rest = tensors[:layers], tensors[layers], tensors[layers + 1 :]
        split = LAYER_TENSORS * layers
        end = split + TERM_TENSORS * sum(layout.terms_per_layer)
        return tuple(kron_backward(dys, x, rest[:split], rest[split:end], *layout, rest[end:], needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0].op

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{ctx.op}: second derivatives are not implemented")


# torch binds the arguments of every apply to forward's signature; read once, it is not read at every call.
_KronGroup.forward.__signature__ = inspect.signature(_KronGroup.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _needs_factors(needs_input_grad: Sequence[bool], layout: Layout) -> bool:
    """Whether any gradient that T serves is asked for."""
    return any(needs_input_grad[2 + LAYER_TENSORS * len(layout.terms_per_layer) :])


def kron_linear_group(x: Tensor, layers: Sequence[FrozenLinear], *, impl: str = "auto") -> list[Tensor]:
    """y = x Wᵀ + bias + base + Σ scale · row_scale ⊙ x (A ⊗ B)ᵀ of each layer, from one read of x.

    x:      (..., K)  fp64, fp32, fp16 or bf16; any strides
    layers: FrozenLinears of one K: q, k and v, each with any number of terms
    impl:   "auto", "reference", "eager", "cpu", "triton" or "cuda"

    Returns one (..., N) per layer, in x's dtype (under autocast in its dtype); sums in fp32 (fp64 for fp64).
    Weight, bias and base must have x's dtype outside autocast; factors of another dtype are cast to it, and
    their gradients come in their own. Gradients of everything that asks for one; second derivatives raise.
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
    dtype = compute_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        layers = [_cast_whole(layer, dtype) for layer in layers]
    compiling = torch.compiler.is_compiling()
    layer_tensors: list[Tensor | None] = []
    term_tensors: list[Tensor | None] = []
    counts, scales, shuffled = [], [], []
    for layer in layers:
        layer_tensors += (layer.weight, layer.bias, layer.base)
        counts.append(len(layer.terms))
        for a, b, b_down, scale, is_shuffled, row_scale in layer.terms:
            if compiling and not isinstance(scale, Tensor):
                scale = x.new_ones((), dtype=_scale_dtype(x)) * scale
            tensor_scale = scale if isinstance(scale, Tensor) else None
            if tensor_scale is None:
                checks.check_scale(op, scale, x)
            term_tensors += (a, b, b_down, tensor_scale, row_scale)
            scales.append(1.0 if tensor_scale is not None else float(scale))
            shuffled.append(bool(is_shuffled))
    if compiling:
        layer_tensors, term_tensors = _distinct(x, layer_tensors, term_tensors)
    layout = Layout(op, impl, tuple(counts), tuple(scales), tuple(shuffled))
    if not torch.is_grad_enabled():
        # Without gradients Dynamo hands ctx to a Function's forward, although it has a setup_context.
        return kron_forward(x, layer_tensors, term_tensors, *layout)[: len(counts)]
    return list(_KronGroup.apply(layout, x, *layer_tensors, *term_tensors)[: len(counts)])


def _distinct(x: Tensor, *groups: list[Tensor | None]) -> list[list[Tensor | None]]:
    """The groups with a view in place of every tensor met before: dynamo takes no tensor twice in one Function."""
    seen: list[Tensor] = [x]
    distinct = []
    for group in groups:
        kept: list[Tensor | None] = []
        for tensor in group:
            if tensor is not None and any(tensor is each for each in seen):
                tensor = tensor.view_as(tensor)
            if tensor is not None:
                seen.append(tensor)
            kept.append(tensor)
        distinct.append(kept)
    return distinct


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on and x is of a dtype that autocast casts, else x's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _cast_whole(layer: FrozenLinear, dtype: torch.dtype) -> FrozenLinear:
    weight, bias, base = (
        None if each is None else each.to(dtype) for each in (layer.weight, layer.bias, layer.base)
    )
    return FrozenLinear(weight, layer.terms, bias, base)


def _scale_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
