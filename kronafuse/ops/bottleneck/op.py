"""`bottleneck`: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ..calls import any_requires_grad, autocasts, compute_dtype, distinct, runs_directly, scale_dtype
from ..transforms import apply, explained
from .autograd import Bottleneck
from .raw import OP, Options, forward


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    impl: str = "auto",
) -> Tensor:
    """y = residual + scale · (act(x · downᵀ + down_bias) · upᵀ + up_bias).

    x:          (..., K)  fp64, fp32, fp16 or bf16; any strides
    residual:   (..., N)  in x's dtype; x itself (the same tensor) is fused: dx then contains dy; None for none
    down:       (H, K)    H from 1 to 256
    up:         (N, H)
    down_bias:  (H,)
    up_bias:    (N,)
    activation: "identity", "relu", "sigmoid", "silu" or "gelu" (exact, by erf)
    scale:      float or 0-d tensor, multiplies all but the residual
    impl:       "auto", "reference", "eager", "cpu", "triton" or "cuda"

    Returns (..., N) in x's dtype; sums in fp32 (fp64 for fp64). Factors and biases of another dtype are cast to x's,
    and their gradients come in their own. Under autocast all but the residual is cast to autocast's dtype, and the
    result has the residual's dtype promoted with it: a float32 residual is never rounded to 16 bits.
    Gradients of everything that asks for one; second derivatives raise.
    A scale of 0 is multiplied by: y is the residual where the other tensors are finite, and NaN where a NaN or an
    infinity of theirs goes in. An infinity is also what x · downᵀ becomes beyond fp16, which no scale multiplies.
    Raises ValueError (shapes), TypeError (dtypes), NotImplementedError (impl cannot serve; lists the reasons).
    Source: arXiv 2303.18181.
    """
    _check_types(x, residual, down, up, down_bias, up_bias, impl)
    checks.check_activation(OP, activation)
    checks.check_scale(OP, scale, x)
    residual_is_x = residual is x
    if residual_is_x:
        residual = None
    elif residual is not None and not autocasts(x):
        checks.check_dtype(OP, "x", x)
        checks.check_dtype(OP, "residual", residual)
        checks.check_same_dtype(OP, "residual", residual, x)
    compiling = torch.compiler.is_compiling()
    if compiling and not isinstance(scale, Tensor):
        scale = x.new_ones((), dtype=scale_dtype(x)) * scale
    scale_tensor = scale if isinstance(scale, Tensor) else None
    number = 1.0 if isinstance(scale, Tensor) else float(scale)
    options = Options(number, activation, compute_dtype(x), residual_is_x, impl)
    tensors = [x, residual, down, up, down_bias, up_bias, scale_tensor]
    if runs_directly(tensors):
        return explained(OP, forward, tensors, options, False)[0]
    keep = any_requires_grad((x, down, up, down_bias, scale_tensor))
    return apply(OP, Bottleneck, options, keep, *(distinct(tensors) if compiling else tensors))[0]


def _check_types(
    x: object, residual: object, down: object, up: object, down_bias: object, up_bias: object, impl: object
) -> None:
    for name, tensor in (("x", x), ("down", down), ("up", up)):
        checks.check_tensor(OP, name, tensor)
    for name, tensor in (("residual", residual), ("down_bias", down_bias), ("up_bias", up_bias)):
        checks.check_tensor(OP, name, tensor, optional=True)
    if not isinstance(impl, str):
        raise TypeError(f"{OP}: impl must be a string; got {type(impl).__name__}")
