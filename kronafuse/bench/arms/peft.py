"""PEFT's adapters, with the problem's factors in place of its own where it has the form."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.kron_linear.terms import FrozenLinear, KronTerm
from ...shapes import KronShape
from ...testing.cases import Case
from ..problems import KronProblem, Spec
from .arm import Arm, Built, leaf

Adapted = tuple[nn.Module, Mapping[str, Tensor]]
"""A layer with its adapter, and the parameters by our names."""

RANK = 16
"""Of the LoRA baseline."""


def _absent() -> list[str]:
    found = importlib.util.find_spec("peft") is not None
    return [] if found else ["PEFT is not installed; install with: pip install peft"]


def lokr_reasons(spec: Spec) -> list[str]:
    """What no LoKr of another library computes."""
    assert isinstance(spec.case, Case)
    found = []
    if spec.case.shuffled:
        found.append("no LoKr has DiffuseKronA's shuffled output")
    if not spec.case.has_a:
        found.append("the case is LoRA, not LoKr")
    return found


def frozen_linear(weight: Tensor) -> nn.Linear:
    """A module on the weight's own memory."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _injected(config: Any, weight: Tensor) -> Any:
    """PEFT's layer around the frozen one, in training mode."""
    import peft

    model = nn.Sequential()
    model.add_module("layer", frozen_linear(weight))
    return peft.inject_adapter_in_model(config, model).train().get_submodule("layer")


def _lokr_layer(layer: FrozenLinear, trains: bool) -> Adapted:
    """PEFT's LoKr with our factors, in float32, as PEFT ships it; alpha is the rank."""
    import peft

    (term,) = layer.terms
    assert layer.weight is not None
    assert term.a is not None
    # The smallest forms that PEFT gives a full or a low-rank right factor; ours takes their place.
    rank = 10**6 if term.b_down is None else 1
    config = peft.LoKrConfig(r=rank, alpha=rank, target_modules=["layer"], decompose_factor=-1)
    module = _injected(config, layer.weight)
    factors = {"a": term.a, "b": term.b, **({} if term.b_down is None else {"b_down": term.b_down})}
    parameters = {
        name: nn.Parameter(each.to(torch.float32, copy=True), requires_grad=trains)
        for name, each in factors.items()
    }
    full = term.b_down is None
    for name, ours in (
        ("w1", "a"),
        ("w2" if full else "w2_a", "b"),
        *(() if full else (("w2_b", "b_down"),)),
    ):
        holder = getattr(module, f"lokr_{name}")
        assert "default" in holder, f"PEFT made no lokr_{name}"
        holder["default"] = parameters[ours]
    return module, parameters


def group(
    problem: KronProblem,
    make: Callable[[FrozenLinear, bool], Adapted],
    around: Callable[[Callable[[], Sequence[Tensor]]], Callable[[], Sequence[Tensor]]] = lambda call: call,
    own: KronProblem | None = None,
) -> Built:
    """One module a layer, each on the same x."""
    trains = problem.spec.trains
    x = leaf(problem.x, trains)
    modules, leaves = [], {"x": x}
    for index, layer in enumerate((own or problem).layers):
        module, parameters = make(layer, trains)
        modules.append(module)
        leaves |= {f"{name}{index}.0": each for name, each in parameters.items()}
    return Built(around(lambda: [module(x) for module in modules]), leaves, own)


PEFT_LOKR = Arm(
    "peft_lokr", lambda problem: group(problem, _lokr_layer), lambda spec: [*_absent(), *lokr_reasons(spec)]
)
"""As shipped: parameters in float32, and so is its product with x, whatever the layer's dtype."""


def _autocast_reasons(spec: Spec) -> list[str]:
    found = [*_absent(), *lokr_reasons(spec)]
    if spec.dtype.itemsize != 2:
        found.append("autocast needs a 16-bit dtype")
    return found


def _lokr_autocast(problem: KronProblem) -> Built:
    device, dtype = problem.x.device.type, problem.x.dtype

    def around(call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        def forward() -> Sequence[Tensor]:
            with torch.autocast(device, dtype):
                return call()

        return forward

    return group(problem, _lokr_layer, around)


PEFT_LOKR_AUTOCAST = Arm("peft_lokr_autocast", _lokr_autocast, _autocast_reasons)
"""The same under autocast of the layer's dtype."""


def _lora_layer(layer: FrozenLinear, trains: bool) -> Adapted:
    import peft

    (term,) = layer.terms
    assert layer.weight is not None
    assert term.b_down is not None
    rank = term.b_down.shape[0]
    module = _injected(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"]), layer.weight)
    parameters = {
        "b": nn.Parameter(term.b.clone(), requires_grad=trains),
        "b_down": nn.Parameter(term.b_down.clone(), requires_grad=trains),
    }
    module.lora_B["default"].weight = parameters["b"]
    module.lora_A["default"].weight = parameters["b_down"]
    return module, parameters


def _lora(problem: KronProblem) -> Built:
    """The case's own factors where it is LoRA, random ones of rank 16 elsewhere."""
    if not problem.case.has_a:
        return group(problem, _lora_layer)
    source = torch.Generator(problem.x.device).manual_seed(1)
    dtype = problem.spec.factor_dtype

    def random(*size: int) -> Tensor:
        values = torch.randn(*size, generator=source, device=problem.x.device)
        return (values / size[-1] ** 0.5).to(dtype)

    shape = problem.case.shape
    layers = tuple(
        layer._replace(terms=(KronTerm(None, random(shape.n, RANK), random(RANK, shape.k)),))
        for layer in problem.layers
    )
    case = replace(problem.case, shape=KronShape(1, 1, shape.n, shape.k, RANK), shuffled=False, has_a=False)
    own = replace(problem, spec=replace(problem.spec, case=case), layers=layers)
    return group(problem, _lora_layer, own=own)


PEFT_LORA = Arm("peft_lora_r16", _lora, lambda _spec: _absent())
"""PEFT's LoRA of rank 16 in the problem's factor dtype: another adapter, for comparison of cost."""
