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
    "fat_b_first",
    "fat_b_first_shuffled",
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
    x, layer = case_inputs(ODD_CASES[name], dtype, factor_dtype=torch.float32, **options)
    check_group(partial(kron_linear_group, impl="cpu"), x, [layer])
    expected = 0 if name == "low_rank_fat" or "weight" in options else len(layer.terms)
    assert len(small_chunks) in (expected, 0)


@pytest.mark.parametrize(
    "wanted", [["x"], ["x", "a0.0"], ["x", "b0.0"], ["a0.0", "b0.0"], ["a0.0"], ["b0.0"]]
)
@pytest.mark.parametrize("name", ["fat_b_first", "fat_a_first", "fat_b_first_shuffled"])
def test_some_gradients(name, wanted, small_chunks):
    x, layer = case_inputs(ODD_CASES[name], torch.float32)
    check_group(partial(kron_linear_group, impl="cpu"), x, [layer], wanted=wanted)


def test_layers_of_a_group_add_up(small_chunks):
    """dx of a second layer's fat term is added to that of the first."""
    x, layer = case_inputs(ODD_CASES["fat_a_first"], torch.float32)
    layers = [layer, FrozenLinear(layer.weight, layer.terms), FrozenLinear(None, layer.terms, None, None)]
    check_group(partial(kron_linear_group, impl="cpu"), x, layers)
    assert len(small_chunks) == 3
