"""What `kronafuse bench tune` may choose from: the configurations of each kernel, and their predicted times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops import kernel_costs
from ..ops.bottleneck import tuning as bottleneck_tuning
from ..ops.kron_linear import one_pass_tuning, reduction_tuning, route, tuning
from ..ops.tuned import KEYS, Choice


@dataclass(frozen=True)
class Tunable:
    """One kernel: configurations for a choice, the rule's shipped ones first, and their predicted time.

    predicted_us: None where nothing predicts it
    limits:       what a configuration's `reasons` takes
    route:        whether it says which kernels run, so that it is timed by the whole step
    """

    kind: type
    candidates: Callable[[Choice], Iterable[Any]]
    predicted_us: Callable[[Choice, Any], float] | None = None
    limits: Callable[[Choice], tuple[Any, ...]] = lambda choice: (choice.architecture, operand_dtype(choice))
    route: bool = False


def values_of(choice: Choice) -> dict[str, Any]:
    """The choice's sizes by name, exact."""
    return dict(zip(KEYS[choice.kernel], choice.values, strict=True))


def valid(choice: Choice) -> dict[Any, float]:
    """Every configuration that can run, with its predicted time in µs, the best first; 0 where nothing predicts it."""
    tunable = TUNABLES[choice.kernel]
    limits = tunable.limits(choice)
    found = {}
    for config in tunable.candidates(choice):
        if config not in found and not config.reasons(*limits):
            found[config] = 0.0 if tunable.predicted_us is None else tunable.predicted_us(choice, config)
    return dict(sorted(found.items(), key=lambda each: each[1]))


def operand_dtype(choice: Choice) -> torch.dtype:
    """Of the products."""
    return values_of(choice)["dtype"]


def _staged(configs: Iterable[Any], steps: Iterable[int] = (0, 1, -1)) -> Iterator[Any]:
    """Each configuration, then each with a stage more and a stage less."""
    listed = list(configs)
    for step in steps:
        for config in listed:
            if config.stages + step >= 1:
                yield replace(config, stages=config.stages + step)


def _linear(choice: Choice) -> Iterator[Any]:
    sizes = values_of(choice)
    shipped = tuning.linear_candidates(
        choice.architecture, sizes["dtype"], sizes["tail_width"], sizes["accumulators"], sizes["descriptors"]
    )
    yield from _staged(shipped)
    for group_m in (4, 16):
        yield from (replace(config, group_m=group_m) for config in shipped)


def _linear_us(choice: Choice, config: Any) -> float:
    sizes = values_of(choice)
    work = kernel_costs.LinearSizes(
        sizes["tokens"], sizes["features"], sizes["in_features"], sizes["tail_width"]
    )
    return kernel_costs.linear_us(choice.architecture, sizes["dtype"], work, config)


def _one_pass(choice: Choice) -> Iterator[Any]:
    sizes = values_of(choice)
    yield from _staged(
        one_pass_tuning.one_pass_candidates(
            choice.architecture, sizes["dtype"], sizes["o1"], sizes["o2"], sizes["descriptors"]
        )
    )


def _one_pass_us(choice: Choice, config: Any) -> float:
    sizes = values_of(choice)
    work = kernel_costs.OnePassSizes(
        sizes["tokens"], (sizes["o1"], sizes["i1"]), (sizes["o2"], sizes["i2"]), sizes["weight"]
    )
    return kernel_costs.one_pass_us(choice.architecture, sizes["dtype"], work, config)


def _mix(choice: Choice) -> Iterator[Any]:
    sizes = values_of(choice)
    return reduction_tuning.mix_candidates(sizes["dtype"], sizes["out"], sizes["features"])


def _bottleneck(choice: Choice) -> Iterator[Any]:
    shared = bottleneck_tuning.bottleneck_candidates(choice.architecture, *choice.values)
    yield from _staged(shared, (0, -1))


def _bottleneck_us(choice: Choice, config: Any) -> float:
    sizes = values_of(choice)
    work = kernel_costs.BottleneckSizes(
        *(sizes[name] for name in ("tokens", "in_features", "width", "out_features"))
    )
    return kernel_costs.bottleneck_us(choice.architecture, sizes["dtype"], sizes["widest"], work, config)


def _forms(kind: Any) -> Callable[[Choice], Iterator[Any]]:
    return lambda _choice: (kind(form) for form in kind.FORMS)


def _with(*names: str) -> Callable[[Choice], tuple[Any, ...]]:
    return lambda choice: (
        choice.architecture,
        operand_dtype(choice),
        *(values_of(choice)[name] for name in names),
    )


def _of_sizes(candidates: Callable[..., Iterable[Any]]) -> Callable[[Choice], Iterable[Any]]:
    return lambda choice: candidates(*choice.values)


def _by_sizes(predict: Callable[..., float]) -> Callable[[Choice, Any], float]:
    return lambda choice, config: predict(choice.architecture, *choice.values, config)


TUNABLES: Mapping[str, Tunable] = {
    "linear": Tunable(tuning.LinearConfig, _linear, _linear_us),
    "one_pass": Tunable(one_pass_tuning.OnePassConfig, _one_pass, _one_pass_us, _with("o1", "o2")),
    "shrink": Tunable(
        reduction_tuning.ShrinkConfig,
        _of_sizes(reduction_tuning.shrink_candidates),
        _by_sizes(kernel_costs.shrink_us),
    ),
    "mix": Tunable(reduction_tuning.MixConfig, _mix, _by_sizes(kernel_costs.mix_us)),
    "reduce": Tunable(
        reduction_tuning.ReduceConfig,
        _of_sizes(reduction_tuning.reduce_candidates),
        _by_sizes(kernel_costs.reduce_us),
    ),
    "shrink_reduce": Tunable(
        reduction_tuning.ShrinkReduceConfig,
        _of_sizes(reduction_tuning.shrink_reduce_candidates),
        _by_sizes(kernel_costs.shrink_reduce_us),
        lambda choice: choice.values,
    ),
    "bottleneck": Tunable(bottleneck_tuning.BottleneckConfig, _bottleneck, _bottleneck_us, _with("widest")),
    "fat_route": Tunable(route.FatRoute, _forms(route.FatRoute), route=True),
    "base_route": Tunable(route.BaseRoute, _forms(route.BaseRoute), route=True),
}
"""Kernel or route -> how it is tuned, in the order in which they are."""
