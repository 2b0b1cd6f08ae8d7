"""impl="cpu" computes by its own kernels and torch's GEMMs alone: what the profiler sees of forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kronafuse import FrozenLinear, kron_linear_group
from kronafuse.testing.accuracy import tensors_of, with_tensors
from kronafuse.testing.cases import CASES, ODD_CASES, Case
from kronafuse.testing.inputs import case_inputs
from torch.profiler import ProfilerActivity, profile

GEMMS = {
    "aten::linear",
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::baddbmm_",
    "aten::matmul",
}
"""torch's own products; what they do inside is theirs."""
METADATA = {
    "aten::view", "aten::t", "aten::transpose", "aten::as_strided", "aten::empty", "aten::new_empty", "aten::select",
    "aten::slice", "aten::unsqueeze", "aten::squeeze", "aten::flatten", "aten::reshape", "aten::expand",
    "aten::permute", "aten::mT", "aten::detach", "aten::item", "aten::_local_scalar_dense",
}  # fmt: skip
"""What makes or looks at tensors and computes nothing."""
ADAPTERS = [
    "krona_64x4",
    "krona_4x64",
    "lokr_f8",
    "lokr_square",
    "lokr_f8_r16",
    "lora_r16",
    "diffusekrona_official",
]
KINDS: dict[str, Case] = {adapter: CASES[f"sd15_320-{adapter}"] for adapter in ADAPTERS}
KINDS |= {
    name: ODD_CASES[name]
    for name in ("low_rank", "low_rank_shuffled", "low_rank_fat", "a_absent", "b_scalar", "a_scalar")
}
OPTIONS = {
    "linear": {},
    "delta": {"weight": False, "bias": False, "base": True},
    "delta_alone": {"weight": False, "bias": False},
    "everything": {"base": True, "row_scale": True, "scale": torch.tensor(0.6)},
    "two_terms": {"terms": 2, "base": True},
}


def step_of(impl: str, x: torch.Tensor, layers: list[FrozenLinear], dys: list[torch.Tensor], wanted=None):
    """Forward and backward of a group, for gradients of the wanted tensors (None: of all)."""
    named = {name: each.detach() for name, each in tensors_of(x, layers).items()}
    leaves = [each.requires_grad_() for name, each in named.items() if wanted is None or name in wanted]
    group = with_tensors(layers, named)

    def step() -> None:
        torch.autograd.grad(kron_linear_group(named["x"], group, impl=impl), leaves, dys)

    return step


def seen_by(
    impl: str, x: torch.Tensor, layers: list[FrozenLinear], wanted: list[str] | None = None
) -> set[str]:
    """Names of the operators that ran, without those inside a GEMM."""
    dys = [torch.randn(x.shape[0], _features(layer)).to(x.dtype) for layer in layers]
    step = step_of(impl, x, layers, dys, wanted)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step()
    names = set()
    for event in prof.events() or ():
        outer, parent = [], event.cpu_parent
        while parent is not None:
            outer.append(parent.name)
            parent = parent.cpu_parent
        if event.name.startswith(("aten::", "kronafuse")) and not GEMMS.intersection(outer):
            names.add(event.name)
    return names


def _features(layer: FrozenLinear) -> int:
    if layer.weight is not None:
        return layer.weight.shape[0]
    (term, *_) = layer.terms
    return term.b.shape[0] * (1 if term.a is None else term.a.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_multiplies_and_nothing_else(kind, options, dtype):
    """No copies, casts, fills or sums of torch's, from fp32 factors, for every gradient at once."""
    x, layer = case_inputs(KINDS[kind], dtype, tokens=300, factor_dtype=torch.float32, **OPTIONS[options])
    names = seen_by("cpu", x, [layer])
    own = {name for name in names if name.startswith("kronafuse")}
    assert own
    assert names - own - GEMMS - METADATA == set()


def test_a_group_too():
    """q, k and v, whose dx is one sum, and a fat T too large to hold."""
    layers = []
    for adapter in ("krona_64x4", "lokr_f8", "lora_r16"):
        x, layer = case_inputs(CASES[f"sd15_320-{adapter}"], torch.float32, tokens=4096)
        layers.append(layer)
    names = seen_by("cpu", x, layers, ["x", "a0.0", "b0.0", "b1.0", "b2.0"])
    assert {name for name in names if not name.startswith("kronafuse")} - GEMMS - METADATA == set()


def test_the_list_catches_what_it_should():
    """The eager implementation copies and adds, and is seen to."""
    x, layer = case_inputs(
        KINDS["krona_64x4"], torch.float32, tokens=300, weight=False, bias=False, base=True
    )
    names = seen_by("eager", x, [layer])
    assert {"aten::clone", "aten::copy_"} <= names


def test_a_fat_intermediate_lives_in_chunks():
    """The forward of a fat term holds no (M, K) tensor: y and one chunk of T are its peak."""
    x, layer = case_inputs(CASES["sdxl_1280-lokr_f8"], torch.float32, bias=False)
    big = x.repeat(16, 1)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kron_linear_group(big, [layer], impl="cpu")
    held = peak = 0
    events: Any = prof.profiler
    for event in sorted(events.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    y_bytes = big.shape[0] * 1280 * 4
    assert y_bytes <= peak <= 1.15 * y_bytes


def test_dx_of_a_group_is_one_tensor():
    """dx of the second layer is added into that of the first by its GEMM."""
    x, layer = case_inputs(CASES["sd15_320-krona_64x4"], torch.float32, tokens=1024, bias=False)
    names = seen_by("cpu", x, [layer, layer], ["x"])
    assert "aten::addmm_" in names
    assert "aten::add_" not in names
