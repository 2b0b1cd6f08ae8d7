"""Plain torch: the frozen layer, and the einsums that a careful user writes, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...ops.kron_linear.terms import FrozenLinear
from ...testing.accuracy import tensors_of, with_tensors
from ...testing.chain import eager_chain
from ..problems import KronProblem
from .arm import Arm, Built, leaf
from .compiling import compiled_now


def adapted(
    problem: KronProblem, function: Callable[[Tensor, Sequence[FrozenLinear]], Sequence[Tensor]]
) -> Built:
    """`function(x, layers)` on leaves of the problem's tensors."""
    trains = problem.spec.trains
    named = tensors_of(problem.x, problem.layers)
    leaves = {name: leaf(each, trains) for name, each in named.items() if not name.startswith("weight")}
    weights = {name: each for name, each in named.items() if name.startswith("weight")}
    layers = with_tensors(problem.layers, {**leaves, **weights})
    return Built(lambda: function(leaves["x"], layers), leaves)


def _frozen(problem: KronProblem) -> Built:
    x = leaf(problem.x, problem.spec.trains)
    weights = [layer.weight for layer in problem.layers if layer.weight is not None]
    return Built(
        lambda: [torch.nn.functional.linear(x, weight) for weight in weights],
        {"x": x},
        replace(problem, layers=tuple(layer._replace(terms=()) for layer in problem.layers)),
    )


def _compiled(problem: KronProblem) -> Built:
    built = adapted(problem, torch.compile(eager_chain, fullgraph=True, dynamic=False))
    return compiled_now(built, trains=problem.spec.trains)


FROZEN = Arm("frozen", _frozen, adapted=False)
"""F.linear, and dx: what everything is compared with."""
EINSUM = Arm("einsum", lambda problem: adapted(problem, eager_chain))
"""F.linear plus the einsums of the cheapest order."""
EINSUM_COMPILED = Arm("einsum_compiled", _compiled)
"""The same under torch.compile, in one graph."""
