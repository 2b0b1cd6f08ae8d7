"""Fat terms some tokens at a time: the same accuracy as whole, whatever the parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kronafuse import FrozenLinear, kron_linear_group
from kronafuse.ops.kron_linear import native_cpu, native_cpu_products
from kronafuse.testing.accuracy import check_group
from kronafuse.testing.cases import ODD_CASES
from kronafuse.testing.inputs import case_inputs

FAT = [
    "many_tokens_b_first",
    "fat_a_first",
    "low_rank_fat",
    "a_absent",
    "primes",
    "primes_shuffled",
]


@pytest.fixture
def small_chunks(monkeypatch) -> list[int]:
    """Chunks of five tokens; the list counts the terms whose backward was done in parts."""
    monkeypatch.setattr(native_cpu, "SMALL_BYTES", 0)
    monkeypatch.setattr(native_cpu_products, "CHUNK_BYTES", 1)
    monkeypatch.setattr(native_cpu_products, "LEAST_CHUNK", 5)
    seen: list[int] = []
    whole = native_cpu.backward_in_parts

    def counted(*arguments):
        seen.append(1)
        return whole(*arguments)

    monkeypatch.setattr(native_cpu, "backward_in_parts", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"terms": 2, "base": True}, {"weight": False}, {"strided": True}], ids=str
)
@pytest.mark.parametrize("name", FAT)
def test_fat_terms(name, options, dtype, small_chunks):
    """y and every gradient, from float32 factors, alone and with bias, base and a second term."""
    x, layer = case_inputs(ODD_CASES[name], dtype, tokens=23, factor_dtype=torch.float32, **options)
    check_group(partial(kron_linear_group, impl="cpu"), x, [layer])
    whole = name in ("low_rank_fat", "a_absent") or "weight" in options
    assert len(small_chunks) == (0 if whole else len(layer.terms))


@pytest.mark.parametrize(
    "wanted", [["x"], ["x", "a0.0"], ["x", "b0.0"], ["a0.0", "b0.0"], ["a0.0"], ["b0.0"]]
)
@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("name", ["many_tokens_b_first", "fat_a_first", "primes_shuffled"])
def test_some_gradients(name, row_scale, wanted, small_chunks):
    x, layer = case_inputs(ODD_CASES[name], torch.float32, tokens=23, row_scale=row_scale)
    check_group(partial(kron_linear_group, impl="cpu"), x, [layer], wanted=wanted)
    from_dy = "b0.0" if name == "fat_a_first" else "a0.0"
    assert len(small_chunks) == (from_dy in wanted and len(wanted) == 2)


def test_layers_of_a_group_add_up(small_chunks):
    """dx of a second layer's fat term is added to that of the first."""
    x, layer = case_inputs(ODD_CASES["fat_a_first"], torch.float32)
    layers = [layer, FrozenLinear(layer.weight, layer.terms), FrozenLinear(None, layer.terms, None, None)]
    check_group(partial(kron_linear_group, impl="cpu"), x, layers)
    assert len(small_chunks) == 3
