"""kron_merge against the definition, rounded once."""

from __future__ import annotations

import pytest
import torch
from kronafuse import kron_merge
from kronafuse.ops.kron_linear.ref import delta_weight
from kronafuse.ops.kron_merge import op
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.cases import CASES, ODD_CASES
from kronafuse.testing.inputs import case_inputs

MERGED = [*ODD_CASES.values(), *(case for name, case in CASES.items() if name.startswith("sdxl_cross_k_640"))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MERGED, ids=str)
def test_forward(case, dtype):
    """W + ΔW is the float64 sum, rounded once: within one spacing everywhere in 16 bits."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, layer = case_inputs(case, dtype, tokens=1, factor_dtype=wide)
    (term,) = layer.terms
    with poisoned():
        merged = kron_merge(
            layer.weight, term.a, term.b, b_down=term.b_down, scale=term.scale, shuffled=case.shuffled
        )
    delta = delta_weight(term._replace(row_scale=None), torch.float64)
    error = (merged.double() - (layer.weight.double() + delta)).abs()
    assert merged.dtype == dtype
    size, eps = layer.weight.double().abs() + delta.abs(), torch.finfo(dtype).eps
    assert error.max() <= (8 if dtype in (torch.float32, torch.float64) else 1) * eps * size.max()
    assert error.mean() <= 0.5 * eps * size.mean()


def test_chunks_and_strides(monkeypatch):
    """Several chunks and a transposed weight give the same bits as one."""
    weight, a, b = torch.randn(48, 60).t(), torch.randn(6, 4), torch.randn(10, 12)
    whole = kron_merge(weight, a, b, scale=0.5)
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 1)
    assert torch.equal(kron_merge(weight, a, b, scale=0.5), whole)
    assert whole.is_contiguous()


def test_small_updates_survive_in_bfloat16():
    """An update of 1e-4 is added to the weight in fp32, not rounded on its own first."""
    weight = torch.randn(64, 64).to(torch.bfloat16) / 8
    a, b = torch.randn(8, 8), 1e-4 * torch.randn(8, 8)
    merged = kron_merge(weight, a, b)
    exact = (weight.double() + torch.kron(a.double(), b.double())).to(torch.bfloat16)
    assert (merged != exact).float().mean() < 1e-3


def test_a_new_tensor_even_at_scale_zero():
    weight = torch.randn(6, 8)
    merged = kron_merge(weight, torch.randn(2, 2), torch.randn(3, 4), scale=0.0)
    assert torch.equal(merged, weight)
    assert merged.data_ptr() != weight.data_ptr()
