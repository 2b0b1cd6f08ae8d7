"""attach on a GPU in bf16, through the kernels that `auto` picks there."""

from __future__ import annotations

import pytest
import torch
from kronafuse import Bottleneck, KronA, LoKr, attach
from small_models import MODELS, PARTIAL, build, output, randomize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", [KronA((8, 4)), LoKr(4)], ids=lambda spec: type(spec).__name__)
def test_adapted_equals_merged(name, spec):
    model, inputs = build(name)
    dtype = torch.bfloat16
    model.to("cuda", dtype)
    inputs = {key: _on_gpu(key, value, dtype) for key, value in inputs.items()}
    attachment = attach(model, spec, allow_partial=name in PARTIAL)
    start = output(model, inputs).detach().float()
    randomize(attachment)
    adapted = output(model, inputs)
    adapted.float().square().mean().backward()
    assert attachment.report.fused == len(attachment.modules)
    assert all(torch.isfinite(each.grad).all() for each in attachment.parameters())
    assert all(each.grad.abs().max() > 0 for each in attachment.parameters())
    attachment.merge()
    merged = output(model, inputs).float()
    assert (merged - adapted.float()).abs().mean() < 0.3 * (merged - start).abs().mean()


PAIRS = {
    "sd15": [("attn2_out", "ff_in"), ("attn2_context", "attn2_context"), ("res_in", "res_out")],
    "sdxl": [("ff_in", "ff_in"), ("attn1_in", "block_out")],
    "dit": [("ff_in", "ff_in")],
    "pixart": [("attn2_in", "attn2_in"), ("attn2_out", "ff_in")],
}
"""Own and other residuals, convolutions, and sums carried past a gate."""


@pytest.mark.parametrize(
    ("name", "pair"),
    [(name, pair) for name, pairs in PAIRS.items() for pair in pairs],
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_bottlenecks_add_what_they_add_in_float32(name, pair):
    """The change of the outputs in bf16 on the GPU is that in fp32 on the CPU, and every tensor gets a gradient."""
    changes = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model, inputs = build(name)
        model.to(device, dtype)
        if device == "cuda":
            inputs = {key: _on_gpu(key, value, dtype) for key, value in inputs.items()}
        start = output(model, inputs).detach().float().cpu()
        attachment = attach(model, Bottleneck(*pair, 8))
        randomize(attachment)
        adapted = output(model, inputs)
        adapted.float().square().mean().backward()
        assert all(torch.isfinite(each.grad).all() for each in attachment.parameters())
        assert all(each.grad.abs().max() > 0 for each in attachment.parameters())
        changes.append(adapted.detach().float().cpu() - start)
    expected, found = changes
    assert (found - expected).norm() < 0.15 * expected.norm()


def _on_gpu(key: str, value: object, dtype: torch.dtype) -> object:
    if isinstance(value, dict):
        return {each: _on_gpu(each, item, dtype) for each, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", dtype) if value.is_floating_point() and "ids" not in key else value.to("cuda")
