"""What the arms of a case compute on: random tensors, and their truth in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..ops.bottleneck.ref import bottleneck_ref
from ..ops.kron_linear.ref import kron_linear_group_ref
from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from ..testing import bottleneck as bottleneck_testing
from ..testing.accuracy import noise_of, run, tensors_of
from ..testing.bottleneck_cases import BottleneckCase
from ..testing.cases import Case
from ..testing.chain import eager_chain
from .ceilings import dtype_name
from .records import Mode, Suite

Results = Mapping[str, Tensor]
GROUP_LAYERS = {"kron_linear": 1, "kron_linear_group": 3}
"""Adapted layers that share x: one, or q, k and v."""


@dataclass(frozen=True)
class Spec:
    """One line of questions to all arms.

    tokens:       M in all, batch included
    factor_dtype: of the adapter's parameters; arms that have a dtype of their own say so
    """

    suite: Suite
    case: Case | BottleneckCase
    batch: int
    tokens: int
    dtype: torch.dtype
    mode: Mode
    device: torch.device
    factor_dtype: torch.dtype

    @property
    def problem(self) -> tuple[Suite, str, int, int, str, Mode]:
        """As its rows say it: `records.Row.problem`."""
        return self.suite, self.case.name, self.batch, self.tokens, dtype_name(self.dtype), self.mode

    def __str__(self) -> str:
        return f"{self.case.name}, {self.tokens} tokens, {dtype_name(self.dtype)}, {self.mode}"

    @property
    def trains(self) -> bool:
        """Whether gradients of x and of the parameters are asked for."""
        return self.mode == "forward_backward"

    def make(self, seed: int = 0) -> Problem:
        """The tensors."""
        source = torch.Generator(self.device).manual_seed(seed)
        make = _bottleneck if isinstance(self.case, BottleneckCase) else _kron
        return make(self, source)


class Problem(Protocol):
    """Tensors of a Spec, and what is true of them."""

    @property
    def spec(self) -> Spec:
        """What it was made from."""
        ...

    def copy(self) -> Problem:
        """The same on other memory."""
        ...

    def without_base(self) -> Problem:
        """The same with nothing but the delta in y."""
        ...

    def size_bytes(self) -> int:
        """What a copy takes: inputs and dy."""
        ...

    def read_bytes(self) -> int:
        """What a call reads at least: inputs, and dy in a training step."""
        ...

    @property
    def dys(self) -> Sequence[Tensor]:
        """Gradients that come from behind, one an output."""
        ...

    def masked(self, rows: Tensor) -> Problem:
        """The same with dy zero but for these rows, so that all gradients come from them."""
        ...


@dataclass(frozen=True)
class KronProblem:
    """x (M, K) and one or several adapted layers that share it."""

    spec: Spec
    x: Tensor
    layers: tuple[FrozenLinear, ...]
    dys: tuple[Tensor, ...]

    @property
    def case(self) -> Case:
        """The layer and its adapter."""
        assert isinstance(self.spec.case, Case)
        return self.spec.case

    def copy(self) -> KronProblem:
        """The same on other memory."""
        return replace(
            self,
            x=self.x.clone(),
            layers=tuple(_changed(layer, Tensor.clone, Tensor.clone) for layer in self.layers),
            dys=tuple(dy.clone() for dy in self.dys),
        )

    def without_base(self) -> KronProblem:
        """The same with W = 0."""
        return replace(
            self,
            layers=tuple(_changed(layer, torch.zeros_like, lambda each: each) for layer in self.layers),
        )

    def masked(self, rows: Tensor) -> KronProblem:
        """The same with dy zero but for these rows."""
        return replace(self, dys=tuple(_masked(dy, rows) for dy in self.dys))

    def size_bytes(self) -> int:
        """x, weights, factors, and dy of each layer."""
        return _bytes(tensors_of(self.x, self.layers).values()) + _bytes(self.dys)

    def read_bytes(self) -> int:
        """x, weights and factors, and dy in a training step."""
        return self.size_bytes() - (0 if self.spec.trains else _bytes(self.dys))


def _changed(
    layer: FrozenLinear, weight: Callable[[Tensor], Tensor], factor: Callable[[Tensor], Tensor]
) -> FrozenLinear:
    """The layer with `weight` and `factor` applied to its weight and to the factors of its terms."""
    assert layer.weight is not None
    terms = tuple(
        term._replace(
            a=None if term.a is None else factor(term.a),
            b=factor(term.b),
            b_down=None if term.b_down is None else factor(term.b_down),
        )
        for term in layer.terms
    )
    return layer._replace(weight=weight(layer.weight), terms=terms)


def _masked(dy: Tensor, rows: Tensor) -> Tensor:
    masked = torch.zeros_like(dy)
    masked[rows] = dy[rows]
    return masked


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _random(source: torch.Generator, size: Sequence[int], fan_in: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(*size, generator=source, device=source.device, dtype=torch.float32)
    return (values / fan_in**0.5).to(dtype)


def _kron(spec: Spec, source: torch.Generator) -> KronProblem:
    """Scaled so that y and the delta are of order 1; scale 1, on which all libraries agree."""
    case = spec.case
    assert isinstance(case, Case)
    shape = case.shape

    def layer() -> FrozenLinear:
        factors = spec.factor_dtype
        a = _random(source, (shape.n1, shape.k1), shape.k1, factors) if case.has_a else None
        inner = shape.k2 if shape.rank is None else shape.rank
        b = _random(source, (shape.n2, inner), inner, factors)
        b_down = None if shape.rank is None else _random(source, (shape.rank, shape.k2), shape.k2, factors)
        weight = _random(source, (shape.n, shape.k), shape.k, spec.dtype)
        return FrozenLinear(weight, (KronTerm(a, b, b_down, 1.0, case.shuffled),))

    count = GROUP_LAYERS[spec.suite]
    x = _random(source, (spec.tokens, shape.k), 1, spec.dtype)
    layers = tuple(layer() for _ in range(count))
    return KronProblem(
        spec, x, layers, tuple(_random(source, (spec.tokens, shape.n), 1, spec.dtype) for _ in layers)
    )


@dataclass(frozen=True)
class BottleneckProblem:
    """x (M, D), the factors and biases by name; x is its own residual, as in a transformer block."""

    spec: Spec
    tensors: Mapping[str, Tensor]
    dys: tuple[Tensor, ...]

    @property
    def case(self) -> BottleneckCase:
        """The sizes and the activation."""
        assert isinstance(self.spec.case, BottleneckCase)
        return self.spec.case

    def copy(self) -> BottleneckProblem:
        """The same on other memory."""
        return replace(
            self,
            tensors={name: each.clone() for name, each in self.tensors.items()},
            dys=tuple(dy.clone() for dy in self.dys),
        )

    def without_base(self) -> BottleneckProblem:
        """The same without a residual."""
        return replace(self, spec=replace(self.spec, case=replace(self.case, residual="none")))

    def masked(self, rows: Tensor) -> BottleneckProblem:
        """The same with dy zero but for these rows."""
        return replace(self, dys=tuple(_masked(dy, rows) for dy in self.dys))

    def size_bytes(self) -> int:
        """x, factors and dy."""
        return _bytes(self.tensors.values()) + _bytes(self.dys)

    def read_bytes(self) -> int:
        """x and factors, and dy in a training step."""
        return self.size_bytes() - (0 if self.spec.trains else _bytes(self.dys))


def _bottleneck(spec: Spec, source: torch.Generator) -> BottleneckProblem:
    case = spec.case
    assert isinstance(case, BottleneckCase)
    factors = spec.factor_dtype
    n, h, k = case.out_features, case.width, case.in_features
    tensors = {
        "x": _random(source, (spec.tokens, k), 1, spec.dtype),
        "down": _random(source, (h, k), k, factors),
        "up": _random(source, (n, h), h, factors),
        "down_bias": _random(source, (h,), 1, factors),
        "up_bias": _random(source, (n,), 1, factors),
    }
    return BottleneckProblem(spec, tensors, (_random(source, (spec.tokens, n), 1, spec.dtype),))


@dataclass(frozen=True)
class Expected:
    """Truth, the eager chain's results, and the noise that results may show, of the compared rows; by name."""

    truth: Results
    yardstick: Results
    noise: Results


def expected(problem: Problem, wanted: Sequence[str], rows: Tensor) -> Expected:
    """Outputs y0, y1, … and gradients d<name> of the wanted tensors, from these rows alone."""
    if isinstance(problem, BottleneckProblem):
        return _expected_bottleneck(problem, wanted, rows)
    assert isinstance(problem, KronProblem)
    x, dys = problem.x[rows], [dy[rows] for dy in problem.dys]
    return Expected(
        run(kron_linear_group_ref, x, problem.layers, dys, wanted, torch.float64),
        run(eager_chain, x, problem.layers, dys, wanted),
        noise_of(x, problem.layers, dys, wanted),
    )


def _expected_bottleneck(problem: BottleneckProblem, wanted: Sequence[str], rows: Tensor) -> Expected:
    """y is y0, as of a group of one."""
    tensors = {**problem.tensors, "x": problem.tensors["x"][rows]}
    dy, case = problem.dys[0][rows], problem.case
    truth = bottleneck_testing.run(bottleneck_ref, case, tensors, dy, wanted, torch.float64)
    chain = bottleneck_testing.run(bottleneck_testing.bottleneck_chain, case, tensors, dy, wanted)
    noise = bottleneck_testing.noise_of(case, tensors, dy)
    noise = {name: noise[name].expand(value.shape) for name, value in truth.items()}
    return Expected(*({**each, "y0": each["y"]} for each in (truth, chain, noise)))
