"""Every rule that a call must keep, with the text it breaks with: op, rule in letters, in numbers, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shapes import KronShape

if TYPE_CHECKING:
    from .ops.kron_linear.terms import FrozenLinear, KronTerm

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = ("identity", "relu", "sigmoid", "silu", "gelu")
"""Between a bottleneck's two layers; gelu is the exact one, by erf."""
FLOAT32_MAX = torch.finfo(torch.float32).max
"""The largest scale for tensors of every dtype but float64: kernels apply scales in float32."""
MAX_WIDTH = 256
"""Largest hidden width H of a bottleneck."""
_Named = Sequence[tuple[str, Tensor | None]]


def check_tensor(op: str, name: str, value: object, *, optional: bool = False) -> None:
    """Raises TypeError unless the value is a dense tensor, or None where it is optional."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
            raise TypeError(f"{op}: {name} must be a dense tensor (layout torch.strided); got {kind}")
    elif not (optional and value is None):
        or_none = " or None" if optional else ""
        raise TypeError(f"{op}: {name} must be a tensor{or_none}; got {type(value).__name__}")


def check_shuffled(op: str, shuffled: object) -> None:
    """Raises TypeError unless the flag is a bool."""
    if not isinstance(shuffled, bool):
        raise TypeError(f"{op}: shuffled must be True or False; got {shuffled!r}")


def check_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is floating."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64; got {_dtype(tensor)}")


def check_same_dtype(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises TypeError unless the tensor has x's dtype."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have x's dtype {_dtype(x)}; got {_dtype(tensor)}")


def check_same_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises ValueError unless the tensor is on x's device."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}; got {tensor.device}")


def _check_whole(op: str, x: Tensor, dtype: torch.dtype, device: torch.device, named: _Named) -> None:
    """Raises unless the tensors have x's dtype and device."""
    for name, tensor in named:
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            check_dtype(op, name, tensor)
            check_same_dtype(op, name, tensor, x)
            check_same_device(op, name, tensor, x)


def _check_parts(op: str, x: Tensor, device: torch.device, named: _Named) -> None:
    """Raises unless the tensors are floating and on x's device."""
    for name, tensor in named:
        if tensor is not None and (tensor.dtype not in FLOATING or tensor.device != device):
            check_dtype(op, name, tensor)
            check_same_device(op, name, tensor, x)


def check_factors(op: str, a: Tensor | None, b: Tensor, b_down: Tensor | None) -> None:
    """Raises ValueError unless the factors are matrices of at least 1×1 whose ranks agree."""
    for name, factor in (("a", a), ("b", b), ("b_down", b_down)):
        if factor is not None and (factor.dim() != 2 or 0 in factor.shape):
            rules = {"a": "(N1, K1)", "b": "(N2, K2)" if b_down is None else "(N2, R)", "b_down": "(R, K2)"}
            raise ValueError(
                f"{op}: {name} must be {rules[name]} with sizes of at least 1; got {shape_text(factor)}"
            )
    if b_down is not None and b.shape[1] != b_down.shape[0]:
        raise ValueError(
            f"{op}: b (N2, R) and b_down (R, K2) must share R; got b {shape_text(b)}, b_down {shape_text(b_down)}"
        )


def check_group(op: str, x: Tensor, layers: Sequence[FrozenLinear]) -> None:
    """Raises unless x and the layers make one call of `kron_linear_group` (`op` names the caller)."""
    check_dtype(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., K); got a 0-d tensor")
    if not layers:
        raise ValueError(f"{op}: layers must hold at least one FrozenLinear; got none")
    for index, layer in enumerate(layers):
        where = op if len(layers) == 1 else f"{op}: layer {index}"
        features = out_features(where, x, layer)
        _check_layer(where, x, layer, features)


def out_features(op: str, x: Tensor, layer: FrozenLinear) -> int:
    """N of one layer, from its weight, its first term or its base; x's last dimension is checked against each."""
    features: int | None = None
    if layer.weight is not None:
        if layer.weight.dim() != 2:
            raise ValueError(f"{op}: weight must be (N, K); got {shape_text(layer.weight)}")
        if x.shape[-1] != layer.weight.shape[1]:
            raise ValueError(
                f"{op}: x must end in K = {layer.weight.shape[1]}; "
                f"got x {shape_text(x)}, weight {shape_text(layer.weight)}"
            )
        features = layer.weight.shape[0]
    for index, (a, b, b_down, *_) in enumerate(layer.terms):
        where = op if len(layer.terms) == 1 else f"{op}: term {index}"
        check_factors(where, a, b, b_down)
        n1, k1 = (1, 1) if a is None else map(int, a.shape)
        n2, k2 = int(b.shape[0]), int((b if b_down is None else b_down).shape[1])
        if x.shape[-1] != k1 * k2:
            raise ValueError(
                f"{where}: x must end in K = K1·K2 = {k1}·{k2} = {k1 * k2}; "
                f"got x {shape_text(x)}, {_factors_text(layer.terms[index])}"
            )
        if features is not None and features != n1 * n2:
            raise ValueError(
                f"{where}: N1·N2 = {n1}·{n2} = {n1 * n2} must be the layer's N = {features}; "
                f"got {_factors_text(layer.terms[index])}"
            )
        features = n1 * n2
    if features is None:
        raise ValueError(f"{op}: a layer needs a weight or at least one term; got neither")
    return features


def _check_layer(op: str, x: Tensor, layer: FrozenLinear, features: int) -> None:
    dtype, device = x.dtype, x.device
    whole = (("weight", layer.weight), ("bias", layer.bias), ("base", layer.base))
    _check_whole(op, x, dtype, device, whole)
    if layer.bias is not None and tuple(layer.bias.shape) != (features,):
        raise ValueError(f"{op}: bias must be (N,) = ({features},); got {shape_text(layer.bias)}")
    if layer.base is not None and layer.base.shape != (*x.shape[:-1], features):
        raise ValueError(
            f"{op}: base must be (..., N) = {(*x.shape[:-1], features)}, as x {shape_text(x)} says; "
            f"got {shape_text(layer.base)}"
        )
    for term in layer.terms:
        parts = (("a", term.a), ("b", term.b), ("b_down", term.b_down), ("row_scale", term.row_scale))
        _check_parts(op, x, device, parts)
        if term.row_scale is not None and tuple(term.row_scale.shape) != (features,):
            raise ValueError(
                f"{op}: row_scale must be (N,) = ({features},); got {shape_text(term.row_scale)}"
            )
        check_scale(op, term.scale, x)


def check_scale(op: str, scale: object, x: Tensor) -> None:
    """Raises unless the scale is a finite real number or a floating 0-d tensor on x's device.

    Values are looked at outside torch.compile only, where a look would make the number a constant, and those of
    tensors never, which would wait for a GPU: a NaN or an infinity there goes into the result.
    """
    if type(scale) is float and (torch.compiler.is_compiling() or -FLOAT32_MAX <= scale <= FLOAT32_MAX):
        return
    if isinstance(scale, Tensor):
        check_tensor(op, "scale", scale)
        check_dtype(op, "scale", scale)
        check_same_device(op, "scale", scale, x)
        if scale.dim() != 0:
            raise ValueError(f"{op}: scale must be a float or a 0-d tensor; got {shape_text(scale)}")
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"{op}: scale must be a float or a 0-d tensor; got {type(scale).__name__}")
    elif not torch.compiler.is_compiling():
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        check_number(op, "scale", scale, wide)


def check_number(op: str, name: str, value: float | Real, dtype: torch.dtype = torch.float32) -> float:
    """The number as a float. Raises ValueError unless it is finite in this dtype."""
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    largest = torch.finfo(dtype).max
    if not -largest <= number <= largest:  # NaN is not
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{op}: {name} must be a finite number of {kind}, from -{largest:.7g} to {largest:.7g}; got {number!r}"
        )
    return number


def check_merge(op: str, weight: Tensor, a: Tensor | None, b: Tensor, b_down: Tensor | None) -> None:
    """Raises unless the factors make a delta of the weight's shape."""
    check_tensor(op, "weight", weight)
    check_tensor(op, "a", a, optional=True)
    check_tensor(op, "b", b)
    check_tensor(op, "b_down", b_down, optional=True)
    check_dtype(op, "weight", weight)
    check_factors(op, a, b, b_down)
    shape = KronShape.of(a, b, b_down)
    if tuple(weight.shape) != (shape.n, shape.k):
        raise ValueError(
            f"{op}: weight must be (N, K) = (N1·N2, K1·K2) = ({shape.n1}·{shape.n2}, {shape.k1}·{shape.k2}) = "
            f"({shape.n}, {shape.k}); got {shape_text(weight)}"
        )
    for name, factor in (("a", a), ("b", b), ("b_down", b_down)):
        if factor is not None:
            check_dtype(op, name, factor)
            check_same_device(op, name, factor, weight)


def check_activation(op: str, activation: object) -> None:
    """Raises ValueError unless the activation is one of `ACTIVATIONS`."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def check_bottleneck(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual_is_x: bool,
) -> None:
    """Raises unless the tensors make one bottleneck: down (H, K), up (N, H), H from 1 to `MAX_WIDTH`."""
    check_dtype(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., K); got a 0-d tensor")
    for name, rule, factor in (("down", "(H, K)", down), ("up", "(N, H)", up)):
        if factor.dim() != 2 or 0 in factor.shape:
            raise ValueError(
                f"{op}: {name} must be {rule} with sizes of at least 1; got {shape_text(factor)}"
            )
    (width, in_features), out_features = down.shape, up.shape[0]
    if width > MAX_WIDTH:
        raise ValueError(f"{op}: down (H, K) must have H from 1 to {MAX_WIDTH}; got {shape_text(down)}")
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{op}: x must end in K = {in_features}; got x {shape_text(x)}, down {shape_text(down)}"
        )
    if up.shape[1] != width:
        raise ValueError(
            f"{op}: down (H, K) and up (N, H) must share H; got down {shape_text(down)}, up {shape_text(up)}"
        )
    for name, rule, bias, size in (
        ("down_bias", "(H,)", down_bias, width),
        ("up_bias", "(N,)", up_bias, out_features),
    ):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{op}: {name} must be {rule} = ({size},); got {shape_text(bias)}")
    expected = (*x.shape[:-1], out_features)
    if residual_is_x and in_features != out_features:
        raise ValueError(
            f"{op}: x as its own residual needs N = K; got K = {in_features}, N = {out_features}, "
            f"as down {shape_text(down)} and up {shape_text(up)} say"
        )
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(
            f"{op}: residual must be (..., N) = {expected}, as x {shape_text(x)} and up {shape_text(up)} say; "
            f"got {shape_text(residual)}"
        )
    others = (
        ("residual", residual),
        ("down", down),
        ("up", up),
        ("down_bias", down_bias),
        ("up_bias", up_bias),
    )
    _check_parts(op, x, x.device, others)


def shape_text(tensor: Tensor) -> str:
    """The tensor's shape as it is written in messages."""
    return str(tuple(tensor.shape))


def _factors_text(term: KronTerm) -> str:
    parts = (("a", term.a), ("b", term.b), ("b_down", term.b_down))
    return ", ".join(f"{name} {shape_text(factor)}" for name, factor in parts if factor is not None)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
