"""The raw ops `kronafuse::kron_forward` and `kronafuse::kron_backward`: schemas, kernels and fakes.

They take the group flattened into lists of tensors, are functional and alias nothing. The implementation is chosen
inside them, so a compiled program runs the same kernels as an eager one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends, checks, planner
from ...shapes import KronShape
from .. import cpu_reasons, cuda_reasons, triton_reasons
from ..calls import flat_tokens, run_op, unflat_tokens, without_autocast
from ..flop_counting import formula
from . import algorithm, eager, flops, reference
from .terms import LAYER_TENSORS, TERM_TENSORS, FrozenLinear, KronTerm


class Layout(NamedTuple):
    """What of a group is not a tensor: constants under torch.compile."""

    op: str
    impl: str
    terms_per_layer: tuple[int, ...]
    scales: tuple[float, ...]
    shuffled: tuple[bool, ...]


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

    def forward(
        self, x: Tensor, layers: Sequence[FrozenLinear], small_bytes: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        return algorithm.forward(x, layers, self.primitives, small_bytes)

    def backward(self, dys: Any, x: Tensor, layers: Any, saved: Any, needs: Any) -> list[Tensor]:
        return algorithm.backward(dys, x, layers, saved, needs, self.primitives)


def _load_cuda() -> _Planned:
    from . import native_cuda

    return _Planned(native_cuda)


def _load_triton() -> _Planned:
    from . import kernels

    return _Planned(kernels)


def _load_cpu() -> _Planned:
    from . import native_cpu

    return _Planned(native_cpu)


IMPLEMENTATIONS = (
    backends.Implementation("cuda", cuda_reasons.reasons, _load_cuda, cuda_reasons.UNMEASURED),
    backends.Implementation("cpu", cpu_reasons.reasons, _load_cpu),
    backends.Implementation("triton", triton_reasons.reasons, _load_triton),
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


def _flat_layers(layers: Sequence[FrozenLinear]) -> list[FrozenLinear]:
    return [each if each.base is None else each._replace(base=flat_tokens(each.base)) for each in layers]


def _forward(
    x: Tensor, layer_tensors: Any, term_tensors: Any, op: str, impl: str, *layout: Any, small_bytes: int = 0
) -> list[Tensor]:
    layers = _unflatten(layer_tensors, term_tensors, Layout(op, impl, *layout))
    checks.check_group(op, x, layers)
    chosen = backends.choose(op, IMPLEMENTATIONS, impl, x.device, x.dtype)
    with without_autocast(x.device.type):
        ys, saved = chosen.load().forward(flat_tokens(x), _flat_layers(layers), small_bytes)
    if x.dim() != 2:
        ys = [unflat_tokens(y, x.shape[:-1]) for y in ys]
    return [*ys, *saved]


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


def _gradients(
    dys: Sequence[Tensor], x: Tensor, layer_tensors: Any, term_tensors: Any, op: str, impl: str, *rest: Any
) -> list[Tensor]:
    """The gradients that are needed, in `algorithm.backward`'s order; in the others' places is no matter what."""
    *layout, saved, needs = rest
    layers = _unflatten(layer_tensors, term_tensors, Layout(op, impl, *layout))
    chosen = backends.choose(op, IMPLEMENTATIONS, impl, x.device, x.dtype)
    flat_dys = [flat_tokens(dy) for dy in dys]
    with without_autocast(x.device.type):
        grads = chosen.load().backward(flat_dys, flat_tokens(x), layers, saved, needs)
    return [grads[0].view(x.shape), *grads[1:]] if needs[0] and x.dim() != 2 else grads


def _backward(
    dys: list[Tensor], x: Tensor, layer_tensors: Any, term_tensors: Any, *rest: Any
) -> list[Tensor]:
    grads = _gradients(dys, x, layer_tensors, term_tensors, *rest)
    return [grad if need else x.new_empty(0) for grad, need in zip(grads, rest[-1], strict=True)]


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


for _name, _kernel, _fake in (
    ("kron_forward", _forward, _forward_fake),
    ("kron_backward", _backward, _backward_fake),
):
    torch.library.impl(f"kronafuse::{_name}", "default", _kernel)
    torch.library.register_fake(f"kronafuse::{_name}", _fake)

kron_forward = torch.ops.kronafuse.kron_forward.default
kron_backward = torch.ops.kronafuse.kron_backward.default
formula(kron_forward, flops.forward)
formula(kron_backward, flops.backward)
_forward_alone = partial(_forward, small_bytes=planner.SMALL_BYTES)


def forward(x: Tensor, layer_tensors: Any, term_tensors: Any, layout: Layout) -> list[Tensor]:
    """y of each layer, then what each term saves: `kron_forward`, or its kernel where nothing tells them apart.

    The op saves T by shape alone, which tracers need; its kernel alone saves a small fat T too.
    """
    return run_op(
        kron_forward,
        _forward_alone,
        (x, *layer_tensors, *term_tensors),
        x,
        layer_tensors,
        term_tensors,
        *layout,
    )


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    layer_tensors: Any,
    term_tensors: Any,
    layout: Layout,
    saved: Any,
    needs: Any,
) -> list[Tensor]:
    """The gradients in `algorithm.backward`'s order, by `kron_backward` or its kernel; only those needed count."""
    tensors = (*dys, x, *layer_tensors, *term_tensors, *saved)
    return run_op(
        kron_backward, _gradients, tensors, dys, x, layer_tensors, term_tensors, *layout, saved, needs
    )
