"""How accurate an implementation must be: one table, for CI, a laptop and a GPU alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.kron_linear.ref import kron_linear_group_ref
from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from .chain import eager_chain

RMS_RATIO = 1.1
"""RMS error against float64, at most this many times the eager chain's in the same compute dtype."""
MAX_RATIO = 2.0
"""Largest error, at most this many times the eager chain's."""
NOISE_EPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0, torch.float64: 64.0}
"""Spacings of the compute dtype, times the root of the sum of squares of what is summed (`noise`), that an RMS
error may always reach; the largest error may reach four times that. In 32 bits the order of a sum is free (one
after the other, n products err by 0.2 √n spacings); in 64 the truth is no better than what it judges; in 16 bits
this holds for results below `FEW` elements only, whose ratio of errors is chance."""
FEW = 512

Results = Mapping[str, Tensor]
Group = Callable[[Tensor, Sequence[FrozenLinear]], Sequence[Tensor]]


class Errors(NamedTuple):
    """RMS and largest absolute error against float64."""

    rms: float
    largest: float


def errors(actual: Tensor, truth: Tensor) -> Errors:
    """Errors of `actual` against `truth` (float64); NaN where any element is NaN."""
    difference = actual.detach().double().cpu() - truth.detach().cpu()
    if difference.numel() == 0:
        return Errors(0.0, 0.0)
    return Errors(difference.square().mean().sqrt().item(), difference.abs().amax().item())


def assert_accurate(
    name: str, actual: Tensor, yardstick: Tensor, truth: Tensor, noise: Tensor, dtype: torch.dtype
) -> None:
    """Raises AssertionError unless `actual` is about as close to `truth` as the eager chain's `yardstick`.

    noise: root of the sum of squares of the products that make each element of the truth
    dtype: what `actual` and `yardstick` were computed in
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    ours, theirs = errors(actual, truth), errors(yardstick, truth)
    floor = Errors(0.0, 0.0)
    if truth.numel() < FEW or dtype in (torch.float32, torch.float64):
        spacing = NOISE_EPS[dtype] * torch.finfo(dtype).eps
        level = errors(noise, torch.zeros_like(noise))
        floor = Errors(spacing * level.rms, 4 * spacing * level.largest)
    rms_limit = max(RMS_RATIO * theirs.rms, floor.rms)
    max_limit = max(MAX_RATIO * theirs.largest, floor.largest)
    within = ours.rms <= rms_limit and ours.largest <= max_limit  # False for NaN
    assert within, (
        f"{name}: RMS error {ours.rms:.3e} (limit {rms_limit:.3e}), "
        f"largest {ours.largest:.3e} (limit {max_limit:.3e})"
    )


def noise_of(
    x: Tensor, layers: Sequence[FrozenLinear], dys: Sequence[Tensor], wanted: Sequence[str] | None
) -> Results:
    """For every output and gradient the root of the sum of the squares of its products.

    All of them are sums of products of inputs, so the definition on squared inputs gives it.
    """
    squared = {name: tensor.double().square() for name, tensor in tensors_of(x, layers).items()}
    layers = [
        layer._replace(terms=tuple(term._replace(scale=_squared(term.scale)) for term in layer.terms))
        for layer in layers
    ]
    squares = [dy.double().square() for dy in dys]
    results = run(kron_linear_group_ref, squared["x"], with_tensors(layers, squared), squares, wanted)
    return {name: value.detach().sqrt() for name, value in results.items()}


def _squared(scale: float | Tensor) -> float | Tensor:
    return scale.double().square() if isinstance(scale, Tensor) else scale * scale


def tensors_of(x: Tensor, layers: Sequence[FrozenLinear]) -> dict[str, Tensor]:
    """Every tensor of a group by name, as x, weight0, a0.1 (layer 0, term 1)."""
    named: dict[str, Tensor | None] = {"x": x}
    for index, layer in enumerate(layers):
        named |= {f"weight{index}": layer.weight, f"bias{index}": layer.bias, f"base{index}": layer.base}
        for number, term in enumerate(layer.terms):
            at = f"{index}.{number}"
            named |= {
                f"a{at}": term.a,
                f"b{at}": term.b,
                f"b_down{at}": term.b_down,
                f"row_scale{at}": term.row_scale,
            }
            named |= {f"scale{at}": term.scale if isinstance(term.scale, Tensor) else None}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def with_tensors(layers: Sequence[FrozenLinear], named: Mapping[str, Tensor]) -> list[FrozenLinear]:
    """The layers with the tensors of these names in place of their own."""
    replaced = []
    for index, layer in enumerate(layers):
        terms = []
        for number, term in enumerate(layer.terms):
            at = f"{index}.{number}"
            scale = named.get(f"scale{at}", term.scale)
            parts = [named.get(f"{part}{at}") for part in ("a", "b", "b_down")]
            assert parts[1] is not None
            terms.append(
                KronTerm(parts[0], parts[1], parts[2], scale, term.shuffled, named.get(f"row_scale{at}"))
            )
        whole = [named.get(f"{part}{index}") for part in ("weight", "bias", "base")]
        replaced.append(FrozenLinear(whole[0], tuple(terms), whole[1], whole[2]))
    return replaced


def run(
    group: Group,
    x: Tensor,
    layers: Sequence[FrozenLinear],
    dys: Sequence[Tensor],
    wanted: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs y0, y1, … and gradients d<name> of the wanted tensors (None: of all), by `group`.

    dtype: everything is cast to it first (float64 for the truth)
    """
    named = tensors_of(x, layers)
    wanted = list(named) if wanted is None else list(wanted)
    leaves = {
        name: _leaf(tensor if dtype is None else tensor.to(dtype), name in wanted)
        for name, tensor in named.items()
    }
    ys = group(leaves["x"], with_tensors(layers, leaves))
    results = {f"y{index}": y for index, y in enumerate(ys)}
    if wanted:
        chosen = [leaves[name] for name in wanted]
        grads = torch.autograd.grad(list(ys), chosen, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])
        results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def _leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """A leaf on the same memory and strides."""
    return tensor.detach().requires_grad_(wanted)


def check_group(
    group: Group,
    x: Tensor,
    layers: Sequence[FrozenLinear],
    *,
    seed: int = 1,
    wanted: Sequence[str] | None = None,
) -> None:
    """Asserts that outputs and gradients of `group` are as accurate as the eager chain's, against the definition."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shapes = [y.shape for y in kron_linear_group_ref(x.double(), _double(layers))]
    dys = [torch.randn(shape, generator=source).to(x.dtype).to(x.device) for shape in shapes]
    truth = run(kron_linear_group_ref, x, layers, dys, wanted, torch.float64)
    ours = run(group, x, layers, dys, wanted)
    yardstick = run(eager_chain, x, layers, dys, wanted)
    noise = noise_of(x, layers, dys, wanted)
    for name, expected in truth.items():
        own = tensors_of(x, layers).get(name.removeprefix("d"), x)
        assert ours[name].dtype == (own.dtype if name.startswith("d") else x.dtype), (
            f"{name}: {ours[name].dtype}"
        )
        assert_accurate(name, ours[name], yardstick[name], expected, noise[name], x.dtype)


def _double(layers: Sequence[FrozenLinear]) -> list[FrozenLinear]:
    named = {name: tensor.double() for name, tensor in tensors_of(torch.empty(0), layers).items()}
    return with_tensors(layers, named)
