"""The definition: two linear layers and an addition, any dtype and device. What every kernel is measured against."""

from __future__ import annotations

from torch import Tensor

from .activations import FORWARD


def bottleneck_ref(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
) -> Tensor:
    """residual + scale · (act(x · downᵀ + down_bias) · upᵀ + up_bias), by the definition; arguments as `bottleneck`."""
    pre = pre_activation(x, down, down_bias)
    delta = FORWARD[activation](pre) @ up.to(x.dtype).t()
    if up_bias is not None:
        delta = delta + up_bias.to(x.dtype)
    delta = (scale.to(x.dtype) if isinstance(scale, Tensor) else scale) * delta
    return delta if residual is None else residual + delta


def pre_activation(x: Tensor, down: Tensor, down_bias: Tensor | None) -> Tensor:
    """x · downᵀ + down_bias, (..., H)."""
    pre = x @ down.to(x.dtype).t()
    return pre if down_bias is None else pre + down_bias.to(x.dtype)
