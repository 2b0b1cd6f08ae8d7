"""Forward and backward of one adapted layer on this CPU beside the frozen layer and the eager chain.

    pytest bench --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

These are contributors' runs: compare the arms of one group, and only within one run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kronafuse import kron_linear_group
from kronafuse.testing.cases import CASES
from kronafuse.testing.chain import eager_chain
from kronafuse.testing.inputs import case_inputs
from torch import Tensor

TOKENS = 2048
ADAPTERS = ("krona_64x4", "krona_4x64", "lokr_f8", "lokr_square", "lokr_f8_r16", "lora_r16")
ARMS = {
    "frozen": lambda x, layer: torch.nn.functional.linear(x, layer.weight),
    "chain": lambda x, layer: eager_chain(x, [layer])[0],
    "eager": lambda x, layer: kron_linear_group(x, [layer], impl="eager")[0],
}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda each: str(each).removeprefix("torch.")
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_forward_and_backward(benchmark, adapter, dtype, arm):
    case = replace(CASES[f"sdxl_1280-{adapter}"], tokens=TOKENS)
    x, layer = case_inputs(case, dtype, bias=False)
    (term,) = layer.terms
    factors = [each.requires_grad_() for each in (term.a, term.b, term.b_down) if each is not None]
    x.requires_grad_()
    leaves: list[Tensor] = [x] if arm == "frozen" else [x, *factors]
    dy = torch.randn(TOKENS, case.shape.n).to(dtype)
    benchmark.group = f"{case}-{str(dtype).removeprefix('torch.')}, forward + backward"
    grads = benchmark(lambda: torch.autograd.grad(ARMS[arm](x, layer), leaves, dy))
    assert all(torch.isfinite(grad).all() for grad in grads)
