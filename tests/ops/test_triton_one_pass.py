"""The one-pass kernel of fat terms: tiles, layouts, descriptors, dtypes; its configurations and why some cannot run."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fat_inputs import DEVICE, DTYPES, TOKENS, Inputs
from kronafuse.ops import launch as launching
from kronafuse.ops.kron_linear import eager, one_pass_tuning
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.one_pass_kernel import linear_in_one_pass
from kronafuse.ops.launch import Architecture, recording
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.cases import CASES

SPACINGS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
"""Largest error, in spacings of the dtype at the largest element of the result."""
H200 = Architecture(90, 132)
DESCRIBES = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
"""Whether the device under test takes descriptors, as the interpreter does."""


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def truth_of(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, kron: KronMap
) -> Tensor:
    """The same by `eager` in float64."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    kron = replace(kron, **{each.name: wide(getattr(kron, each.name)) for each in fields(kron)})
    inners = eager.shrink(x.double(), [kron])
    return eager.linear(x.double(), wide(weight), wide(bias), wide(base), [kron], inners)


def assert_close(actual: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Fails where an element of `actual` is NaN or further from `truth` than SPACINGS."""
    assert actual.shape == truth.shape
    assert actual.dtype == dtype
    error = (actual.double() - truth).abs().max().item()
    limit = SPACINGS[dtype] * torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= limit, f"error {error:.3e}, limit {limit:.3e}"  # False for NaN


SIZES = {
    "primes": ((3, 5), (7, 11)),
    "even": ((2, 3), (24, 16)),
    "small": ((4, 3), (8, 8)),
    "a_scalar": ((1, 1), (40, 24)),
    "b_scalar": ((3, 4), (1, 1)),
    "tall": ((2, 3), (33, 5)),
}
"""(O1, I1), (O2, I2): with and without remainders, groups smaller and larger than a tile."""
SMALL = one_pass_tuning.OnePassConfig(16, 16, 16, 2, 4, 2, 1, 0)
"""So small that each loop and each grid repeats."""


def layouts(left: int, right: int) -> list[one_pass_tuning.OnePassConfig]:
    """Tiles inside a group, over two whole groups, and across groups, as far as the sizes have them."""
    configs = [replace(SMALL, span=right)]
    if left % 2 == 0 and 2 * right <= 64:
        configs.append(replace(SMALL, block_n=64, groups=2, span=2 * right))
    if right >= SMALL.block_n:
        configs.append(replace(SMALL, groups=2, span=left * right))
    return configs


def test_layouts_are_all_there():
    assert [len(layouts(o1, o2)) for (o1, _), (o2, _) in SIZES.values()] == [1, 3, 2, 2, 1, 2]
    for (o1, _), (o2, _) in SIZES.values():
        for config in layouts(o1, o2):
            assert config.reasons(H200, torch.float16, o1, o2) == []


@pytest.mark.parametrize("sizes", SIZES)
def test_one_pass(sizes, dtype):
    """Every layout of tiles with a shuffled input, scales of features, a bias and a base; W in both layouts."""
    inputs, (left, right) = Inputs(dtype), SIZES[sizes]
    features, columns = left[0] * right[0], left[1] * right[1]
    x, bias, base = inputs(TOKENS, columns), inputs(features), inputs(TOKENS, features)
    for in_shuffled in (False, True):
        weight = inputs(columns, features).t() if in_shuffled else inputs(features, columns)
        kron = inputs.fat(left, right, scaled=True, in_shuffled=in_shuffled)
        truth = truth_of(x, weight, bias, base, kron)
        for config in (None, *layouts(left[0], right[0])):
            with poisoned():
                actual = linear_in_one_pass(x, weight, bias, base, kron, config)
            assert_close(actual, truth, dtype)


@pytest.mark.parametrize("sizes", ["even", "small", "tall"])
def test_one_pass_without_weight_in_place(sizes, dtype):
    """The delta alone, with a tensor scale and gaps in memory, and added to a y that it overwrites."""
    inputs, (left, right) = Inputs(dtype), SIZES[sizes]
    features = left[0] * right[0]
    kron = inputs.fat(left, right, scale=torch.tensor(0.3, device=DEVICE))
    kron = replace(kron, a=inputs(*left, strided=True), b=inputs(*right[::-1]).t())
    x, y = inputs(TOKENS, left[1] * right[1], strided=True), inputs(TOKENS, features)
    for config in layouts(left[0], right[0]):
        with poisoned():
            actual = linear_in_one_pass(x, None, None, None, kron, config)
        assert_close(actual, truth_of(x, None, None, None, kron), dtype)
        truth, out = truth_of(x, None, None, y, kron), y.clone()
        assert linear_in_one_pass(x, None, None, out, kron, config, out) is out
        assert_close(out, truth, dtype)


@pytest.mark.skipif(not DESCRIBES, reason="descriptors need sm_90")
@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight_transposed"])
@pytest.mark.parametrize("right", [(24, 24), (8, 8)], ids=str)
def test_one_pass_with_descriptors(right, transposed, dtype, monkeypatch):
    """Tiles by descriptors end with their i1, also where BLOCK_K does not divide I2; fewer programs than tiles."""
    monkeypatch.setattr(launching, "INTERPRETER", Architecture(90, 2))
    inputs, left = Inputs(dtype), (2, 3)
    features, columns = left[0] * right[0], left[1] * right[1]
    weight = inputs(columns, features).t() if transposed else inputs(features, columns)
    kron, x = inputs.fat(left, right, scaled=True), inputs(TOKENS, columns)
    truth = truth_of(x, weight, None, None, kron)
    for config in (None, *(replace(each, descriptors=True) for each in layouts(left[0], right[0]))):
        with recording(Architecture(90, 2)) as recorded:
            linear_in_one_pass(x, weight, None, None, kron, config)
        assert recorded[0].constants["DESCRIPTORS"]
        for each in (recorded[0].arguments["x"], recorded[0].arguments["weight"]):
            assert list(each.strides) == sorted(each.strides, reverse=True), (
                "CUDA has the largest stride first"
            )
        assert recorded[0].programs <= 2
        with poisoned():
            actual = linear_in_one_pass(x, weight, None, None, kron, config)
        assert_close(actual, truth, dtype)


def test_one_pass_descriptors_only_where_memory_allows():
    """I2 not a multiple of 16 bytes, a shuffled input, gaps between columns go by pointers."""
    inputs = Inputs(torch.float16)
    weight, x = inputs(32, 48), inputs(TOKENS, 48)
    plain = inputs.fat((4, 3), (8, 16))
    found = []
    for kron, tokens in (
        (plain, x),
        (inputs.fat((4, 12), (8, 4)), x),
        (replace(plain, in_shuffled=True), x),
        (plain, inputs(TOKENS, 48, strided=True)),
        (plain, x[:1].expand(TOKENS, 48)),
    ):
        with recording(H200) as recorded:
            linear_in_one_pass(tokens, weight, None, None, kron)
        found.append(recorded[0].constants["DESCRIPTORS"])
    assert found == [True, False, False, False, False]


def test_one_pass_casts_factors(dtype):
    """fp32 factors beside 16-bit x, as mixed-precision training has them."""
    inputs = Inputs(dtype)
    kron = inputs.fat((4, 3), (24, 16))
    assert kron.a is not None
    cast = replace(kron, a=kron.a.float(), b=kron.b.float())
    x, weight = inputs(TOKENS, 48), inputs(96, 48)
    assert torch.equal(
        linear_in_one_pass(x, weight, None, None, cast), linear_in_one_pass(x, weight, None, None, kron)
    )


def test_one_pass_past_int32():
    """Tokens 2³¹ elements apart, in x and in the base."""
    inputs = Inputs(torch.float16)

    def apart(width: int) -> Tensor:
        buffer = torch.empty(2**31 + width, dtype=torch.float16, device=DEVICE)
        return buffer.as_strided((3, width), (2**30, 1)).copy_(inputs(3, width))

    kron, x = inputs.fat((4, 3), (6, 5)), apart(15)
    base, weight = apart(24), inputs(24, 15)
    assert_close(
        linear_in_one_pass(x, weight, None, base, kron),
        truth_of(x, weight, None, base, kron),
        torch.float16,
    )


def test_one_pass_repeats(dtype):
    inputs = Inputs(dtype)
    kron, x, weight = inputs.fat((4, 3), (24, 16)), inputs(TOKENS, 48), inputs(96, 48)
    first, second = (linear_in_one_pass(x, weight, None, None, kron) for _ in range(2))
    assert torch.equal(first, second)


def test_configurations_say_why_they_cannot_run():
    config = one_pass_tuning.OnePassConfig(128, 128, 64, 8, 8, 4, 1, 160, True)
    assert config.reasons(H200, torch.bfloat16, 8, 160) == []
    assert config.reasons(Architecture(86, 84), torch.bfloat16, 8, 160) == [
        "131072 bytes of shared memory, sm_86 has 101376",
        "96 accumulators a thread, more than 80 spill",
        "descriptors need sm_90, got sm_86",
    ]
    across = replace(config, span=1280)
    assert across.reasons(H200, torch.bfloat16, 8, 160) == ["a tile touches 2 groups of 160, more than 1"]
    assert replace(across, groups=2, block_k=32).reasons(H200, torch.bfloat16, 8, 160) == []
    assert replace(config, span=480).reasons(H200, torch.bfloat16, 8, 160) == [
        "span 480 does not divide N = 8·160"
    ]


def test_every_fat_case_has_a_configuration():
    """On every architecture and in every dtype, by descriptors and by pointers."""
    fat = [case.shape for case in CASES.values() if case.shape.rank is None]
    for capability, kind in product((80, 86, 89, 90, 100, 120), (torch.bfloat16, torch.float32)):
        architecture = Architecture(capability, 100)
        for shape, descriptors in product(fat, {False, capability >= 90}):
            left, right = (shape.n1, shape.k1), (shape.n2, shape.k2)
            config = one_pass_tuning.one_pass_config(architecture, kind, 4096, left, right, True, descriptors)
            assert config.reasons(architecture, kind, shape.n1, shape.n2) == []
