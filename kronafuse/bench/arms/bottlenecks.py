"""A bottleneck in plain torch: what a user writes, the least that torch's operators can do, and the first compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...ops.bottleneck.activations import FORWARD
from ...testing.bottleneck import SCALE, bottleneck_chain, call
from ..problems import BottleneckProblem
from .arm import Arm, Built, leaf
from .compiling import compiled_now


def on_bottleneck(problem: BottleneckProblem, function: Callable[..., Tensor]) -> Built:
    """`function(x, residual, down, up, ...)` on leaves of the problem's tensors."""
    leaves = {name: leaf(each, problem.spec.trains) for name, each in problem.tensors.items()}
    return Built(lambda: [call(function, problem.case, leaves)], leaves)


def _minimal_chain(
    x: Tensor,
    residual: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor,
    activation: str = "relu",
    scale: float = SCALE,
) -> Tensor:
    dtype = x.dtype
    hidden = FORWARD[activation](torch.nn.functional.linear(x, down.to(dtype), down_bias.to(dtype)))
    if residual is None:
        return scale * torch.mm(hidden, up.to(dtype).t())
    return torch.addmm(residual, hidden, up.to(dtype).t(), alpha=scale)


def _minimal(problem: BottleneckProblem) -> Built:
    tensors = {name: each for name, each in problem.tensors.items() if name != "up_bias"}
    own = replace(problem, tensors=tensors)
    return replace(on_bottleneck(own, _minimal_chain), own=own)


def _compiled(problem: BottleneckProblem) -> Built:
    built = on_bottleneck(problem, torch.compile(bottleneck_chain, fullgraph=True, dynamic=False))
    return compiled_now(built, trains=problem.spec.trains)


CHAIN = Arm("chain", lambda problem: on_bottleneck(problem, bottleneck_chain))
"""Two F.linear, the activation, the scale, the addition: what everything is compared with."""
MINIMAL = Arm("minimal", _minimal)
"""Without the up bias, so that scale, residual and product are one addmm: the least that torch can do, for less."""
COMPILED = Arm("chain_compiled", _compiled)
"""The chain under torch.compile, in one graph."""
