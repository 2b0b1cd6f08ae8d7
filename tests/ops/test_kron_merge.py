"""kron_merge against the definition, rounded once."""

from __future__ import annotations

import pytest
import torch
from kronafuse import kron_merge, native
from kronafuse.ops.kron_linear.ref import delta_weight
from kronafuse.ops.kron_merge import eager, op
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.cases import CASES, ODD_CASES
from kronafuse.testing.inputs import case_inputs

MERGED = [*ODD_CASES.values(), *(case for name, case in CASES.items() if name.startswith("sdxl_cross_k_640"))]
TRITON_MERGED = [*ODD_CASES.values(), CASES["sd15_320-diffusekrona_official"]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EAGER_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CPU_DTYPES = [torch.float32, torch.bfloat16]
CUDA_MERGED = [] if native.cuda_reasons(torch.device(DEVICE)) else TRITON_MERGED
"""On a GPU, or on the CPU where KRONAFUSE_EMULATED=1 has the kernels emulated."""
TRITON_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def params() -> list[object]:
    pairs = [(case, dtype, "eager") for case in MERGED for dtype in EAGER_DTYPES]
    pairs += [(case, dtype, "triton") for case in TRITON_MERGED for dtype in TRITON_DTYPES]
    pairs += [(case, dtype, "cuda") for case in CUDA_MERGED for dtype in EAGER_DTYPES]
    pairs += [(case, dtype, "cpu") for case in MERGED for dtype in CPU_DTYPES]
    return [
        pytest.param(case, dtype, impl, id=f"{case}-{str(dtype).removeprefix('torch.')}-{impl}")
        for case, dtype, impl in pairs
    ]


def device_of(impl: str) -> str:
    return "cpu" if impl == "cpu" else DEVICE


def implementation(impl: str):
    """The implementation's merge, as the op calls it."""
    (chosen,) = [each for each in op.IMPLEMENTATIONS if each.name == impl]
    return chosen.load().merge


@pytest.mark.parametrize(("case", "dtype", "impl"), params())
def test_forward(case, dtype, impl):
    """W + ΔW is the float64 sum, rounded once: within one spacing everywhere in 16 bits."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, layer = case_inputs(case, dtype, tokens=1, factor_dtype=wide, strided=True)
    (term,) = layer.terms
    device = device_of(impl)
    tensors = [
        None if each is None else each.to(device) for each in (layer.weight, term.a, term.b, term.b_down)
    ]
    scale = torch.tensor(term.scale, dtype=wide, device=device)
    with poisoned():
        merged = implementation(impl)(*tensors, scale, case.shuffled).cpu()
    delta = delta_weight(term._replace(row_scale=None), torch.float64)
    error = (merged.double() - (layer.weight.double() + delta)).abs()
    assert merged.dtype == dtype
    assert merged.is_contiguous()
    size, eps = layer.weight.double().abs() + delta.abs(), torch.finfo(dtype).eps
    assert error.max() <= (8 if dtype in (torch.float32, torch.float64) else 1) * eps * size.max()
    assert error.mean() <= 0.5 * eps * size.mean()


@pytest.mark.parametrize("impl", ["eager", "triton", "cpu"])
def test_transposed_weight(impl):
    device = device_of(impl)
    weight, a, b = (
        torch.randn(48, 60).t().to(device),
        torch.randn(6, 4).to(device),
        torch.randn(10, 12).to(device),
    )
    merged = implementation(impl)(weight, a, b, None, torch.tensor(0.5, device=device), False)
    torch.testing.assert_close(merged, weight + 0.5 * torch.kron(a, b))


def test_chunks_and_strides(monkeypatch):
    """Several chunks and a transposed weight give the same bits as one."""
    weight, a, b = torch.randn(48, 60).t(), torch.randn(6, 4), torch.randn(10, 12)
    arguments = (weight, a, b, None, torch.tensor(0.5), False)
    whole = eager.merge(*arguments)
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 1)
    assert torch.equal(eager.merge(*arguments), whole)
    assert whole.is_contiguous()


def test_small_updates_survive_in_bfloat16():
    """An update of 1e-4 is added to the weight in fp32, not rounded on its own first."""
    weight = torch.randn(64, 64).to(torch.bfloat16) / 8
    a, b = torch.randn(8, 8), 1e-4 * torch.randn(8, 8)
    merged = kron_merge(weight, a, b)
    exact = (weight.double() + torch.kron(a.double(), b.double())).to(torch.bfloat16)
    assert (merged != exact).float().mean() < 1e-3


def test_backend_choice():
    """auto takes a measured implementation; a name is served or refused with its reasons."""
    weight, a, b = torch.randn(6, 8), torch.randn(2, 2), torch.randn(3, 4)
    torch.testing.assert_close(kron_merge(weight, a, b), op.merge_by("eager", weight, a, b))
    with pytest.raises(NotImplementedError, match="kron_merge has no 'reference' implementation yet"):
        op.merge_by("reference", weight, a, b)
    with pytest.raises(ValueError, match="kron_merge: impl must be one of"):
        op.merge_by("fast", weight, a, b)
    reasons = native.cuda_reasons(torch.device("cpu"))
    if reasons:
        with pytest.raises(NotImplementedError, match="impl='cuda' cannot serve this call:"):
            op.merge_by("cuda", weight, a, b)
    else:
        torch.testing.assert_close(op.merge_by("cuda", weight, a, b), weight + torch.kron(a, b))


def test_a_new_tensor_even_at_scale_zero():
    weight = torch.randn(6, 8)
    merged = kron_merge(weight, torch.randn(2, 2), torch.randn(3, 4), scale=0.0)
    assert torch.equal(merged, weight)
    assert merged.data_ptr() != weight.data_ptr()
