"""A bottleneck adapter as a module: dense, as sums of Kronecker products, KronA^B, or by convolutions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.bottleneck.activations import FORWARD
from ..ops.bottleneck.op import bottleneck
from ..ops.calls import compute_dtype, scale_dtype
from ..ops.kron_linear.op import kron_delta
from .bottleneck_layout import BottleneckLayout
from .trained import TrainedTensors


class BottleneckAdapter(TrainedTensors):
    """y = residual + scale · (Up · act(Down · x + b_down) + b_up), in the form that the layout says.

    layout: from `Bottleneck.layout(n, k)`
    device: where the tensors are made; "meta" works

    Parameters: `down` (H, K), `down_bias` (H,), `up` (N, H), `up_bias` (N,); with convolutions `down`
    (H, K, 3, 3) and `up` (N, H, 3, 3), and `norm_weight`, `norm_bias` (K,) before them; in the compacter form
    `down_a` (terms, terms, terms) and `down_b` (terms, H/terms, K/terms), or `down_b` (terms, H/terms, R) with
    `down_b_down` (terms, R, K/terms), and likewise for `up`; in the krona forms `a` (N1, K1), `b` (N2, K2) and
    `residual_scale` ().
    """

    SCALE: ClassVar[str] = "bottleneck_scale"

    layout: BottleneckLayout
    a: Tensor
    b: Tensor
    residual_scale: Tensor
    down_bias: Tensor
    up_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, layout: BottleneckLayout, *, device: torch.device | str | None = None) -> None:
        if not isinstance(layout, BottleneckLayout):
            raise TypeError(
                "BottleneckAdapter: layout must be what Bottleneck(...).layout(n, k) returns; got"
                f" {type(layout).__name__}"
            )
        super().__init__(layout, device=device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., K), residual (..., N) or None -> (..., N); channels come second with convolutions."""
        if self.layout.factors is not None:
            return self._krona(x, residual)
        if self.layout.convolution:
            return self._convolve(x, residual)
        return bottleneck(
            x,
            residual,
            self._map("down"),
            self._map("up"),
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            activation=self.layout.activation,
            scale=self.scale_of_call(),
        )

    def _map(self, name: str) -> Tensor:
        """(rows, columns) of a map; Σ A_i ⊗ B_i is formed here: it is as large as a dense adapter's, not as W."""
        if self.layout.form == "dense":
            return self.get_parameter(name)
        left, right = self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")
        if self.layout.rank is not None:
            right = right @ self.get_parameter(f"{name}_b_down")
        terms, rows, columns = right.shape
        return torch.einsum("tij,tpq->ipjq", left, right).reshape(terms * rows, terms * columns)

    def _krona(self, x: Tensor, residual: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        joined = residual if residual is None or residual.dtype == dtype else None
        scale = self.scale_of_call()
        y = kron_delta(x, self.a, self.b, base=joined, scale=scale)
        if residual is not None and joined is None:
            y = residual + y
        if self.layout.form == "krona_res":
            strength = scale / self.layout.scale
            y = y + (strength * self.residual_scale).to(x.dtype) * x
        return y

    def _convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        # Normalised as x comes: in 16 bits an offset of its channels would leave little of them.
        normalised = functional.group_norm(
            x, self.layout.groups, self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype)
        )
        weights = {
            name: self.get_parameter(name).to(dtype) for name in ("down", "down_bias", "up", "up_bias")
        }
        hidden = functional.silu(normalised).to(dtype)
        hidden = functional.conv2d(hidden, weights["down"], weights["down_bias"], padding=1)
        scale = self.scale_of_call()
        hidden = _times(FORWARD[self.layout.activation](hidden), scale)
        y = functional.conv2d(hidden, weights["up"], padding=1)
        y = y + _times(weights["up_bias"], scale)[:, None, None]
        return y if residual is None else residual + y


def _times(tensor: Tensor, scale: float | Tensor) -> Tensor:
    """scale · tensor in the tensor's dtype; the scale is not rounded to 16 bits."""
    if not isinstance(scale, Tensor):
        return tensor * scale
    wide = scale_dtype(tensor)
    return (tensor.to(wide) * scale.to(wide)).to(tensor.dtype)
