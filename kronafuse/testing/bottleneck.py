"""How accurate a bottleneck must be: `accuracy`'s table on its result and on every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.bottleneck.activations import FORWARD
from ..ops.bottleneck.ref import bottleneck_ref
from .accuracy import assert_accurate
from .bottleneck_cases import BottleneckCase
from .inputs import bottleneck_inputs

SCALE = 0.7
"""Where the tensors hold no scale."""
Function = Callable[..., Tensor]


def bottleneck_chain(
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
    """What a careful user writes in plain torch: two F.linear, the activation, scale, addition, all in x's dtype."""
    biases = [None if each is None else each.to(x.dtype) for each in (down_bias, up_bias)]
    hidden = FORWARD[activation](torch.nn.functional.linear(x, down.to(x.dtype), biases[0]))
    delta = torch.nn.functional.linear(hidden, up.to(x.dtype), biases[1])
    delta = (scale.to(x.dtype) if isinstance(scale, Tensor) else scale) * delta
    return delta if residual is None else residual + delta


def call(
    function: Function, case: BottleneckCase, tensors: Mapping[str, Tensor], scale: float = SCALE
) -> Tensor:
    """The function on the case's tensors; x itself is the residual where the case says so."""
    given: dict[str, Any] = dict(tensors)
    x, residual = given.pop("x"), given.pop("residual", None)
    residual = x if case.residual == "x" else residual
    given.setdefault("scale", scale)
    return function(x, residual, given.pop("down"), given.pop("up"), activation=case.activation, **given)


def run(
    function: Function,
    case: BottleneckCase,
    tensors: Mapping[str, Tensor],
    dy: Tensor,
    wanted: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y and gradients d<name> of the wanted tensors (None: of all), by `function`.

    dtype: everything is cast to it first (float64 for the truth)
    """
    wanted = list(tensors) if wanted is None else list(wanted)
    leaves = {
        name: (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_(name in wanted)
        for name, tensor in tensors.items()
    }
    y = call(function, case, leaves)
    results = {"y": y.detach()}
    if wanted:
        grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(y.dtype))
        results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def noise_of(case: BottleneckCase, tensors: Mapping[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """For y and every gradient the root of the sum of the squares of its products, in float64.

    What goes into the hidden layer comes out of it times the activation's derivative, and adds to what comes after.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    square = {name: tensor.square() for name, tensor in wide.items()} | {"dy": dy.double().square()}
    zero = square["x"].new_zeros(())
    scale = square.get("scale", zero + SCALE**2)
    bias = wide.get("down_bias", zero)
    pre = (wide["x"] @ wide["down"].t() + bias).requires_grad_()
    hidden = FORWARD[case.activation](pre)
    (slope,) = torch.autograd.grad(hidden.sum(), pre)
    noise_pre = square["x"] @ square["down"].t() + square.get("down_bias", zero)
    noise_hidden = hidden.detach().square() + slope.square() * noise_pre
    noise_up = square["dy"] @ square["up"]
    curved = case.activation in ("sigmoid", "silu", "gelu")
    noise_dpre = scale * noise_up * (slope.square() + (noise_pre if curved else 0))
    residual = square["x"] if case.residual == "x" else square.get("residual", zero)
    delta = noise_hidden @ square["up"].t() + square.get("up_bias", zero)
    squares = {
        "y": residual + scale * delta,
        "dx": noise_dpre @ square["down"] + (square["dy"] if case.residual == "x" else 0),
        "dresidual": square["dy"],
        "ddown": noise_dpre.t() @ square["x"],
        "dup": scale * (square["dy"].t() @ noise_hidden),
        "ddown_bias": noise_dpre.sum(0),
        "dup_bias": scale * square["dy"].sum(0),
        "dscale": (square["dy"] * delta).sum(),
    }
    return {name: value.detach().sqrt() for name, value in squares.items()}


def check_case(
    function: Function,
    case: BottleneckCase,
    dtype: torch.dtype,
    *,
    wanted: Sequence[str] | None = None,
    seed: int = 1,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Asserts that y and the gradients of `function` are as accurate as the plain chain's, against the definition."""
    tensors = {name: tensor.to(device) for name, tensor in bottleneck_inputs(case, dtype, **options).items()}
    source = torch.Generator().manual_seed(seed)
    dy = torch.randn(tensors["x"].shape[0], case.out_features, generator=source).to(dtype).to(device)
    truth = run(bottleneck_ref, case, tensors, dy, wanted, torch.float64)
    yardstick = run(bottleneck_chain, case, tensors, dy, wanted)
    ours = run(function, case, tensors, dy, wanted)
    noise = noise_of(case, tensors, dy)
    for name, expected in truth.items():
        own = dtype if name == "y" else tensors[name.removeprefix("d")].dtype
        assert ours[name].dtype == own, f"{name}: {ours[name].dtype}, expected {own}"
        assert ours[name].is_contiguous(), f"{name}: strides {ours[name].stride()}"
        assert_accurate(
            name, ours[name], yardstick[name], expected, noise[name].expand(expected.shape), dtype
        )
