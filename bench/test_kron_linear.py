"""Forward and backward of one adapted layer on this CPU beside the frozen layer and the eager chain.

    pytest bench --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

These are contributors' runs: compare the arms of one group, and only within one run. `ratio_to_frozen` in a saved run
comes from turns of both arms in alternation and is what travels between machines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kronafuse import FrozenLinear, kron_linear_group
from kronafuse.testing.cases import CASES
from kronafuse.testing.chain import eager_chain
from kronafuse.testing.inputs import case_inputs
from torch import Tensor

TOKENS = 2048
TURNS = 9
ADAPTERS = ("krona_64x4", "krona_4x64", "lokr_f8", "lokr_square", "lokr_f8_r16", "lora_r16")
DTYPES = (torch.float32, torch.bfloat16)
ARMS: dict[str, Callable[[Tensor, FrozenLinear], Tensor]] = {
    "frozen": lambda x, layer: torch.nn.functional.linear(x, layer.weight),
    "chain": lambda x, layer: eager_chain(x, [layer])[0],
    "eager": lambda x, layer: kron_linear_group(x, [layer], impl="eager")[0],
}


PEFT_OPTIONS = {
    "lokr_f8": {"r": 10_000, "decompose_factor": 8},
    "lokr_square": {"r": 10_000, "decompose_factor": -1},
    "lokr_f8_r16": {"r": 16, "decompose_factor": 8},
}
"""What PEFT has: LoKr, as shipped (an adapter in float32 whatever the layer's dtype)."""


def peft_step(adapter: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """The same step of PEFT's LoKr on a layer of the same size."""
    peft = pytest.importorskip("peft")
    case = CASES[f"sdxl_1280-{adapter}"]
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(case.shape.k, case.shape.n, bias=False, dtype=dtype))
    options = PEFT_OPTIONS[adapter]
    config = peft.LoKrConfig(alpha=options["r"], target_modules=["layer"], init_weights="lycoris", **options)
    model = peft.inject_adapter_in_model(config, model)
    factors = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in factors) == case.shape.parameters
    x = torch.randn(TOKENS, case.shape.k).to(dtype).requires_grad_()
    dy = torch.randn(TOKENS, case.shape.n).to(dtype)
    return lambda: torch.autograd.grad(model(x), [x, *factors], dy)


def training_step(arm: str, adapter: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, dx and the gradients of all factors, on random data."""
    if arm == "peft":
        return peft_step(adapter, dtype)
    case = replace(CASES[f"sdxl_1280-{adapter}"], tokens=TOKENS)
    x, layer = case_inputs(case, dtype, bias=False)
    (term,) = layer.terms
    factors = [each.requires_grad_() for each in (term.a, term.b, term.b_down) if each is not None]
    leaves = [x.requires_grad_()] if arm == "frozen" else [x.requires_grad_(), *factors]
    dy = torch.randn(TOKENS, case.shape.n).to(dtype)
    return lambda: torch.autograd.grad(ARMS[arm](x, layer), leaves, dy)


def ratio(step: Callable[[], object], other: Callable[[], object]) -> float:
    """Median time of one over the other's, in alternation."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for call, spent in zip((step, other), seconds, strict=True):
            started = time.perf_counter()
            call()
            spent.append(time.perf_counter() - started)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


@pytest.mark.parametrize("arm", [*ARMS, "peft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_forward_and_backward(benchmark, adapter, dtype, arm):
    if arm == "peft" and adapter not in PEFT_OPTIONS:
        pytest.skip("PEFT has no KronA; LoKr alone is compared")
    step = training_step(arm, adapter, dtype)
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"sdxl_1280-{adapter}-{name}, {TOKENS} tokens, forward + backward"
    grads = benchmark.pedantic(step, rounds=TURNS, warmup_rounds=2)
    if arm != "frozen":
        benchmark.extra_info["ratio_to_frozen"] = round(
            ratio(step, training_step("frozen", adapter, dtype)), 3
        )
    assert all(torch.isfinite(grad).all() for grad in grads)
