"""`kron_linear`, `kron_delta` and `kron_linear_group`: schemas, fakes, autograd and the public functions.

One pair of raw ops serves all three. They take the group flattened into lists of tensors, are functional and
alias nothing; gradients go through one autograd.Function outside them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends, checks, planner
from ...shapes import KronShape
from . import algorithm, eager, reference
from .terms import FrozenLinear, KronTerm


class Layout(NamedTuple):
    """What of a group is not a tensor: constants under torch.compile."""

    op: str
    impl: str
    terms_per_layer: tuple[int, ...]
    scales: tuple[float, ...]
    shuffled: tuple[bool, ...]


LAYER_TENSORS = 3
"""Tensors per layer in the flat list: weight, bias, base."""
TERM_TENSORS = 5
"""Tensors per term in the flat list: a, b, b_down, scale, row_scale."""

GROUP = (
    "Tensor?[] layer_tensors, Tensor?[] term_tensors, "
    "str op, str impl, int[] terms_per_layer, float[] scales, bool[] shuffled"
)
torch.library.define("kronafuse::kron_forward", f"(Tensor x, {GROUP}) -> Tensor[]")
torch.library.define(
    "kronafuse::kron_backward", f"(Tensor[] dys, Tensor x, {GROUP}, Tensor[] saved, bool[] needs) -> Tensor[]"
)


class _Planned(NamedTuple):
    """An implementation that runs the planned order on its own primitives."""

    primitives: Any

    def forward(self, x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[list[Tensor], list[Tensor]]:
        return algorithm.forward(x, layers, self.primitives)

    def backward(self, dys: Any, x: Tensor, layers: Any, saved: Any, needs: Any) -> list[Tensor]:
        return algorithm.backward(dys, x, layers, saved, needs, self.primitives)


IMPLEMENTATIONS = (
    backends.Implementation("eager", backends.never, lambda: _Planned(eager)),
    backends.Implementation("reference", backends.never, lambda: reference),
)
"""What can run the ops, in order of preference."""


def _unflatten(
    layer_tensors: Sequence[Tensor | None], term_tensors: Sequence[Tensor | None], layout: Layout
) -> list[FrozenLinear]:
    """The group as records again."""
    layers, first = [], 0
    for index, count in enumerate(layout.terms_per_layer):
        terms = []
        for number in range(first, first + count):
            a, b, b_down, scale, row_scale = term_tensors[number * TERM_TENSORS : (number + 1) * TERM_TENSORS]
            assert b is not None
            number_scale = layout.scales[number] if scale is None else scale
            terms.append(KronTerm(a, b, b_down, number_scale, layout.shuffled[number], row_scale))
        weight, bias, base = layer_tensors[index * LAYER_TENSORS : (index + 1) * LAYER_TENSORS]
        layers.append(FrozenLinear(weight, tuple(terms), bias, base))
        first += count
    return layers


def _flat_tokens(tensor: Tensor) -> Tensor:
    """(..., K) as (M, K); a view wherever the leading dimensions have one stride."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _flat_layers(layers: Sequence[FrozenLinear]) -> list[FrozenLinear]:
    return [each if each.base is None else each._replace(base=_flat_tokens(each.base)) for each in layers]


def _forward(
    x: Tensor, layer_tensors: Any, term_tensors: Any, op: str, impl: str, *layout: Any
) -> list[Tensor]:
    layers = _unflatten(layer_tensors, term_tensors, Layout(op, impl, *layout))
    checks.check_group(op, x, layers)
    chosen = backends.choose(op, IMPLEMENTATIONS, impl, x.device, x.dtype)
    with _without_autocast(x.device.type):
        ys, saved = chosen.load().forward(_flat_tokens(x), _flat_layers(layers))
    return [*(y.view(*x.shape[:-1], y.shape[-1]) for y in ys), *saved]


def _forward_fake(
    x: Tensor, layer_tensors: Any, term_tensors: Any, op: str, impl: str, *layout: Any
) -> list[Tensor]:
    layers = _unflatten(layer_tensors, term_tensors, Layout(op, impl, *layout))
    checks.check_group(op, x, layers)
    ys = [x.new_empty((*x.shape[:-1], checks.out_features(op, x, layer))) for layer in layers]
    tokens = math.prod(x.shape[:-1])
    saved = [_saved_fake(x, tokens, term, impl) for layer in layers for term in layer.terms]
    return [*ys, *saved]


def _saved_fake(x: Tensor, tokens: int, term: KronTerm, impl: str) -> Tensor:
    width = 0 if impl == "reference" else planner.saved_width(KronShape.of(term.a, term.b, term.b_down))
    return x.new_empty((tokens, width)) if width else x.new_empty(0)


def _backward(
    dys: list[Tensor], x: Tensor, layer_tensors: Any, term_tensors: Any, op: str, impl: str, *rest: Any
) -> list[Tensor]:
    *layout, saved, needs = rest
    layers = _unflatten(layer_tensors, term_tensors, Layout(op, impl, *layout))
    chosen = backends.choose(op, IMPLEMENTATIONS, impl, x.device, x.dtype)
    flat_dys = [_flat_tokens(dy) for dy in dys]
    with _without_autocast(x.device.type):
        grads = chosen.load().backward(flat_dys, _flat_tokens(x), layers, saved, needs)
    shapes = [grad.shape for grad in _gradients_fake(x, layers, needs)]
    wanted = [grad if need else x.new_empty(0) for grad, need in zip(grads, needs, strict=True)]
    return [grad.view(shape) for grad, shape in zip(wanted, shapes, strict=True)]


def _backward_fake(
    dys: list[Tensor], x: Tensor, layer_tensors: Any, term_tensors: Any, op: str, impl: str, *rest: Any
) -> list[Tensor]:
    *layout, _saved, needs = rest
    return _gradients_fake(x, _unflatten(layer_tensors, term_tensors, Layout(op, impl, *layout)), needs)


def _gradients_fake(x: Tensor, layers: Sequence[FrozenLinear], needs: Sequence[bool]) -> list[Tensor]:
    """Empty tensors of the gradients' shapes and dtypes, in `algorithm.backward`'s order."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    likes: list[tuple[Sequence[int], torch.dtype] | None] = [(x.shape, x.dtype)]
    for layer in layers:
        features = checks.out_features("kron_backward", x, layer)
        likes += [((features, x.shape[-1]), x.dtype), ((features,), x.dtype)]
    for layer in layers:
        for term in layer.terms:
            likes += [
                None if each is None else (each.shape, each.dtype) for each in (term.a, term.b, term.b_down)
            ]
            likes += [
                ((), wide),
                None if term.row_scale is None else (term.row_scale.shape, term.row_scale.dtype),
            ]
    return [
        x.new_empty(like[0], dtype=like[1]) if need and like is not None else x.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    ]


class _without_autocast(torch.autocast):
    """Autocast off inside a kernel: the public function has fixed the compute dtype."""

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type, enabled=False)


for _name, _kernel, _fake in (
    ("kron_forward", _forward, _forward_fake),
    ("kron_backward", _backward, _backward_fake),
):
    torch.library.impl(f"kronafuse::{_name}", ("cpu", "cuda"), _kernel)
    torch.library.register_fake(f"kronafuse::{_name}", _fake)

_kron_forward = torch.ops.kronafuse.kron_forward.default
_kron_backward = torch.ops.kronafuse.kron_backward.default


class _KronGroup(torch.autograd.Function):
    """The group's y of each layer, then what each term saves for backward."""

    @staticmethod
    def forward(layout: Layout, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        split = LAYER_TENSORS * len(layout.terms_per_layer)
        return tuple(_kron_forward(x, tensors[:split], tensors[split:], *layout))

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
        return tuple(_kron_backward(dys, x, rest[:split], rest[split:end], *layout, rest[end:], needs))

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
    dtype = _compute_dtype(x)
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


def _compute_dtype(x: Tensor) -> torch.dtype:
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
