"""The raw ops `kronafuse::bottleneck_forward` and `kronafuse::bottleneck_backward`: schemas, kernels and fakes.

They are functional and alias nothing. The implementation is chosen inside them, so a compiled program runs the same
kernels as an eager one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends, checks
from .. import cpu_reasons, cuda_reasons, triton_reasons
from ..calls import flat_tokens, run_op, unflat_tokens, without_autocast
from ..flop_counting import formula
from . import eager, flops, native_cpu, native_cuda, reference
from .call import Call, Needs, result_dtype

OP = "bottleneck"


Factors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """What of a call is not a tensor: constants under torch.compile."""

    scale: float
    activation: str
    dtype: torch.dtype
    residual_is_x: bool
    impl: str


OPTIONS = "float scale, str activation, ScalarType dtype, bool residual_is_x, str impl"
torch.library.define(
    "kronafuse::bottleneck_forward",
    "(Tensor x, Tensor? residual, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, "
    f"Tensor? scale_tensor, {OPTIONS}, bool keep) -> (Tensor, Tensor)",
)
torch.library.define(
    "kronafuse::bottleneck_backward",
    "(Tensor dy, Tensor x, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, "
    f"Tensor? scale_tensor, Tensor pre, {OPTIONS}, bool[6] needs) -> Tensor[]",
)


def _load_triton() -> Any:
    from . import kernels

    return kernels


IMPLEMENTATIONS = (
    backends.Implementation("cuda", cuda_reasons.reasons, lambda: native_cuda, cuda_reasons.UNMEASURED),
    backends.Implementation("cpu", cpu_reasons.reasons, lambda: native_cpu),
    backends.Implementation("triton", triton_reasons.reasons, _load_triton),
    backends.Implementation("eager", backends.never, lambda: eager),
    backends.Implementation("reference", backends.never, lambda: reference),
)
"""What can run the ops, in order of preference."""


def _flat_call(
    x: Tensor, residual: Tensor | None, factors: Factors, scale: Tensor | None, options: Options
) -> Call:
    flat = flat_tokens(x)
    added = flat if options.residual_is_x else None if residual is None else flat_tokens(residual)
    down, up, down_bias, up_bias = factors
    return Call(
        flat,
        added,
        down,
        up,
        down_bias,
        up_bias,
        options.scale if scale is None else scale,
        options.activation,
        options.dtype,
        options.residual_is_x,
    )


def _check(x: Tensor, residual: Tensor | None, factors: Factors, options: Options) -> None:
    checks.check_activation(OP, options.activation)
    checks.check_bottleneck(OP, x, residual, *factors, options.residual_is_x)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale_tensor: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    options, keep = Options(*rest[:-1]), rest[-1]
    factors = (down, up, down_bias, up_bias)
    _check(x, residual, factors, options)
    chosen = backends.choose(OP, IMPLEMENTATIONS, options.impl, x.device, options.dtype)
    with without_autocast(x.device.type):
        y, pre = chosen.load().forward(_flat_call(x, residual, factors, scale_tensor, options), keep)
    return (y if x.dim() == 2 else unflat_tokens(y, x.shape[:-1])), pre


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale_tensor: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    options, keep = Options(*rest[:-1]), rest[-1]
    _check(x, residual, (down, up, down_bias, up_bias), options)
    dtype = result_dtype(x, residual, options.dtype, options.residual_is_x)
    y = x.new_empty((*x.shape[:-1], up.shape[0]), dtype=dtype)
    tokens = y.numel() // up.shape[0]
    return y, x.new_empty((tokens, down.shape[0]) if keep else (0,), dtype=options.dtype)


def _gradients(
    dy: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale_tensor: Tensor | None,
    pre: Tensor,
    *rest: Any,
) -> Sequence[Tensor | None]:
    """The gradients that are needed, each in its tensor's place; None for the others."""
    options, needs = Options(*rest[:-1]), Needs(*rest[-1])
    chosen = backends.choose(OP, IMPLEMENTATIONS, options.impl, x.device, options.dtype)
    call = _flat_call(x, None, (down, up, down_bias, up_bias), scale_tensor, options)
    with without_autocast(x.device.type):
        grads = chosen.load().backward(flat_tokens(dy), call, pre, needs)
    return grads if x.dim() == 2 or grads.x is None else (grads.x.view(x.shape), *grads[1:])


def _backward(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(0) if grad is None else grad for grad in _gradients(dy, x, *rest)]


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale_tensor: Tensor | None,
    pre: Tensor,
    *rest: Any,
) -> list[Tensor]:
    likes = (x, down, up, down_bias, up_bias, scale_tensor)
    return [
        x.new_empty(like.shape, dtype=like.dtype) if need and like is not None else x.new_empty(0)
        for like, need in zip(likes, rest[-1], strict=True)
    ]


for _name, _kernel, _fake in (
    ("bottleneck_forward", _forward, _forward_fake),
    ("bottleneck_backward", _backward, _backward_fake),
):
    torch.library.impl(f"kronafuse::{_name}", "default", _kernel)
    torch.library.register_fake(f"kronafuse::{_name}", _fake)

bottleneck_forward = torch.ops.kronafuse.bottleneck_forward.default
bottleneck_backward = torch.ops.kronafuse.bottleneck_backward.default
formula(bottleneck_forward, flops.forward)
formula(bottleneck_backward, flops.backward)


def forward(tensors: Sequence[Tensor | None], options: Options, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, pre-activation where kept): `bottleneck_forward`, or its kernel where nothing tells them apart."""
    return run_op(bottleneck_forward, _forward, tensors, *tensors, *options, keep)


def backward(
    tensors: Sequence[Tensor | None], options: Options, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradients by `bottleneck_backward` or its kernel; only those needed count."""
    return run_op(bottleneck_backward, _gradients, tensors, *tensors, *options, needs)
