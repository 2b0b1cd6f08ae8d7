"""The CUDA merge: W + s · (A ⊗ B) against float64, rounded once, for every dtype, layout and size of a row."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
from kronafuse.testing.inputs import generator, random
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SPACINGS = {torch.float64: 8, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}
"""Largest error in spacings at the largest |W| + |ΔW|: half of one for the rounding, the rest for the sum before it."""


class Sizes(NamedTuple):
    """A (n1, k1) ⊗ B (n2, k2), B of rank r where it is not 0."""

    n1: int
    k1: int
    n2: int
    k2: int
    r: int = 0


SIZES = {
    "even": Sizes(4, 4, 10, 40),
    "narrow_right": Sizes(6, 20, 5, 3),
    "primes": Sizes(3, 5, 7, 11),
    "a_scalar": Sizes(1, 1, 12, 20),
    "b_scalar": Sizes(12, 20, 1, 1),
    "a_row": Sizes(1, 6, 10, 4),
    "a_column": Sizes(6, 1, 3, 100),
    "low_rank": Sizes(2, 4, 12, 40, 5),
    "low_rank_primes": Sizes(3, 5, 11, 13, 1),
    "several_vectors_a_thread": Sizes(5, 64, 2, 80),
    "row_of_two_chunks": Sizes(2, 3, 2, 5003),
    "row_of_even_chunks": Sizes(3, 2, 1, 8192),
}


def problem(
    sizes: Sizes, dtype: torch.dtype, factors: torch.dtype | None = None, shuffled: bool = False
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """W, A, B, B_down; the float64 sum with scale 0.7; and |W| + |ΔW|."""
    source, (n1, k1, n2, k2, r) = generator(0), sizes
    factors = factors or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight = random(source, n1 * n2, k1 * k2, dtype=dtype)
    a, right = random(source, n1, k1, dtype=factors), random(source, n2, r or k2, dtype=factors)
    down = random(source, r, k2, dtype=factors) if r else None
    whole = right.double() if down is None else right.double() @ down.double()
    delta = 0.7 * torch.kron(a.double(), whole)
    if shuffled:
        delta = delta.view(n1, n2, -1).transpose(0, 1).reshape(delta.shape)
    return [weight, a, right, down], weight.double() + delta, weight.double().abs() + delta.abs()


def merge(cuda_ops, tensors, shuffled: bool = False, scale=0.7, out: Tensor | None = None) -> Tensor:
    """The kernel's result, on the CPU."""

    def there(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == cuda_ops.device:
            return tensor
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=cuda_ops.device)
        return moved.copy_(tensor)

    weight, a, b, b_down = (there(tensor) for tensor in tensors)
    if out is None:
        out = torch.full(weight.shape, float("nan"), dtype=weight.dtype, device=cuda_ops.device)
    held = isinstance(scale, Tensor)
    cuda_ops.ops.merge(
        weight, a, b, b_down, 1.0 if held else scale, there(scale) if held else None, shuffled, out
    )
    return out.cpu()


def assert_rounded_once(merged: Tensor, truth: Tensor, size: Tensor) -> None:
    dtype = merged.dtype
    error, eps = (merged.double() - truth).abs(), torch.finfo(dtype).eps
    assert error.max() <= SPACINGS[dtype] * eps * size.max()  # False for NaN
    assert error.mean() <= 0.5 * eps * size.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("shuffled", [False, True], ids=["in_order", "shuffled"])
def test_forward(cuda_ops, sizes, dtype, shuffled):
    tensors, truth, size = problem(sizes, dtype, shuffled=shuffled)
    assert_rounded_once(merge(cuda_ops, tensors, shuffled), truth, size)


@pytest.mark.parametrize(("dtype", "factors"), list(product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("sizes", [SIZES["even"], SIZES["low_rank"]], ids=["full", "low_rank"])
def test_factor_dtypes(cuda_ops, sizes, dtype, factors):
    """Factors in any dtype are read as they are; only the sum is rounded."""
    tensors, truth, size = problem(sizes, dtype, factors)
    assert_rounded_once(merge(cuda_ops, tensors), truth, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_absent(cuda_ops, dtype):
    tensors, truth, size = problem(Sizes(1, 1, 24, 40, 4), dtype)
    weight, a, b, b_down = tensors
    b = b * a.item()
    merged = merge(cuda_ops, [weight, None, b, b_down])
    truth = weight.double() + 0.7 * (b.double() @ b_down.double())
    assert_rounded_once(merged, truth, size + 1)


LAYOUTS = {
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "every_other": lambda tensor: torch.stack([tensor, tensor], dim=2).flatten(1)[:, ::2],
    "misaligned": lambda tensor: torch.cat([tensor[:, :1], tensor], dim=1)[:, 1:],
    "row_gaps": lambda tensor: torch.cat([tensor, tensor[:, :1].expand(-1, 8)], dim=1)[:, : tensor.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("operand", [0, 1, 2, 3], ids=["weight", "a", "b", "b_down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(cuda_ops, operand, layout, dtype):
    """Each operand in every layout gives the same bits."""
    tensors, _, _ = problem(SIZES["low_rank_primes"]._replace(r=4), dtype)
    expected = merge(cuda_ops, tensors)
    tensors[operand] = layout(tensors[operand])
    assert torch.equal(merge(cuda_ops, tensors), expected)


@pytest.mark.parametrize("layout", ["rows_apart", "columns_apart", "transposed"])
@pytest.mark.parametrize("sizes", [SIZES["even"], SIZES["primes"]], ids=["even", "primes"])
def test_output_views(cuda_ops, sizes, layout):
    """What lies between the elements of out is left alone."""
    tensors, truth, size = problem(sizes, torch.bfloat16)
    rows, columns = truth.shape
    side = 2 * max(rows, columns) + 16
    whole = torch.full((side, side), float("nan"), dtype=torch.bfloat16, device=cuda_ops.device)
    view = {
        "rows_apart": whole[:rows, 3 : 3 + columns],
        "columns_apart": whole[:rows, 1 : 1 + 2 * columns : 2],
        "transposed": whole[:columns, :rows].t(),
    }[layout]
    merge(cuda_ops, tensors, out=view)
    assert_rounded_once(view.cpu(), truth, size)
    assert int((~whole.isnan()).sum()) == truth.numel()


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_scale_as_a_tensor(cuda_ops, scale_dtype):
    tensors, _, _ = problem(SIZES["even"], torch.bfloat16)
    expected = merge(cuda_ops, tensors, scale=0.625)
    assert torch.equal(merge(cuda_ops, tensors, scale=torch.tensor(0.625, dtype=scale_dtype)), expected)


def test_small_updates_survive_in_bfloat16(cuda_ops):
    """An update of 1e-4 is added in fp32, not rounded on its own first."""
    source = generator(0)
    weight = (random(source, 64, 64) / 8).to(torch.bfloat16)
    a, b = random(source, 8, 8).float(), (1e-4 * random(source, 8, 8)).float()
    merged = merge(cuda_ops, [weight, a, b, None], scale=1.0)
    exact = (weight.double() + torch.kron(a.double(), b.double())).to(torch.bfloat16)
    assert (merged != exact).float().mean() < 1e-3


def test_one_block_for_several_rows(cuda_ops):
    """More rows than a device of one multiprocessor has blocks for: a block takes several rows of A."""
    if cuda_ops.device.type == "cuda":
        pytest.skip("the device is what it is")
    tensors, truth, size = problem(Sizes(13, 3, 9, 24), torch.float16)
    cuda_ops.ops.emulation_settings(1, 227 * 1024, 9, 0, 0)
    try:
        assert_rounded_once(merge(cuda_ops, tensors), truth, size)
    finally:
        cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, 0)


REJECTED = {
    "weight": (lambda given: given.update(weight=given["weight"][1:]), r"weight must be .* = \(40, 160\); got \(39"),
    "out": (lambda given: given.update(out=given["out"].t()), r"out must be .* = \(40, 160\); got \(160, 40\)"),
    "out_dtype": (lambda given: given.update(out=given["out"].half()), "out must be float32 as weight; got float16"),
    "out_is_weight": (lambda given: given.update(out=given["weight"]), "out must not share memory with weight"),
    "out_expanded": (
        lambda given: given.update(out=given["out"][:1].expand(40, -1)), "out must not name an element twice",
    ),
    "b": (lambda given: given.update(b=given["b"][:0]), "b must be a matrix of at least 1×1"),
    "rank": (lambda given: given.update(b_down=given["b"]), r"must share R; got b \(10, 40\), b_down \(10, 40\)"),
    "scale": (lambda given: given.update(scale_tensor=given["b"]), "scale_tensor must have one element"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_rejects(cuda_ops, change, message):
    (weight, a, b, _), _, _ = problem(SIZES["even"], torch.float32)
    given = {
        "weight": weight.to(cuda_ops.device), "a": a.to(cuda_ops.device), "b": b.to(cuda_ops.device), "b_down": None,
        "scale": 1.0, "scale_tensor": None, "shuffled": False, "out": torch.empty_like(weight, device=cuda_ops.device),
    }  # fmt: skip
    change(given)
    with pytest.raises(RuntimeError, match=message):
        cuda_ops.ops.merge(*given.values())
