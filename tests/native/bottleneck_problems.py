"""Bottlenecks for the native kernels' own tests: what an implementation is called with, and the same in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from kronafuse.ops.bottleneck.call import Call
from kronafuse.testing.inputs import generator, random
from torch import Tensor

SPACINGS = 2
"""Largest error, in spacings of the dtype at the largest element of the result."""


@dataclass
class Problem:
    """The tensors of a call; `stream` is the dtype of x, residual and dy, `factor` that of the factors and biases."""

    tokens: int
    in_features: int
    width: int
    out_features: int
    residual: str = "x"
    activation: str = "gelu"
    biases: bool = True
    strided: bool = False
    stream: torch.dtype | None = None
    factor: torch.dtype | None = None
    scale: float | Tensor = 0.7

    def call(self, dtype: torch.dtype, device: torch.device) -> tuple[Call, Tensor]:
        """The call, and a dy for it."""
        make = partial(random, generator(0))
        stream, factor = self.stream or dtype, self.factor or dtype

        def rows(features: int) -> Tensor:
            if not self.strided:
                return make(self.tokens, features, dtype=stream).to(device)
            return make(self.tokens, 2 * features + 3, dtype=stream).to(device)[:, 1 : 1 + 2 * features : 2]

        def matrix(height: int, width: int) -> Tensor:
            if not self.strided:
                return make(height, width, dtype=factor).div(width**0.5).to(device)
            return make(width, height, dtype=factor).div(width**0.5).to(device).t()

        def vector(size: int) -> Tensor | None:
            step = 3 if self.strided else 1
            return make(step * size, dtype=factor).to(device)[::step] if self.biases else None

        x = rows(self.in_features)
        residual = {"x": x, "other": rows(self.out_features), "none": None}[self.residual]
        down, up = matrix(self.width, self.in_features), matrix(self.out_features, self.width)
        biases = vector(self.width), vector(self.out_features)
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        own = self.residual == "x"
        return Call(x, residual, down, up, *biases, scale, self.activation, dtype, own), rows(
            self.out_features
        )


def double(call: Call) -> Call:
    """The same in float64, factors as the compute dtype holds them."""
    held = {
        name: getattr(call, name).to(call.dtype).double()
        for name in ("down", "up", "down_bias", "up_bias")
        if getattr(call, name) is not None
    }
    scale = call.scale.double() if isinstance(call.scale, Tensor) else call.scale
    x = call.x.to(call.dtype).double()
    residual = None if call.residual is None else call.residual.double()
    return call._replace(**held, x=x, residual=residual, scale=scale, dtype=torch.float64)


def assert_close(
    name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype, spacings: float = SPACINGS
) -> None:
    assert actual.shape == truth.shape, name
    if truth.numel() == 0:
        return
    error = (actual.double() - truth).abs().max().item()
    limit = spacings * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
    assert error <= limit, f"{name}: error {error:.3e}, limit {limit:.3e}"
