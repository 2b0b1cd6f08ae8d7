"""The operators of the CPU library against float64, at every level of instructions and for all sorts of strides."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from kronafuse import native
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LAYOUTS = ["plain", "gaps", "transposed"]
LEVELS = ["scalar", "avx2", "avx512"]


@pytest.fixture(params=range(3), ids=LEVELS)
def ops(request) -> Iterator:
    """The library, held to one level."""
    found = native.cpu()
    before = found.level()
    if request.param > found.best_level():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    found.set_level(request.param)
    yield found
    found.set_level(before)


def tensor(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "gaps":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2].to(dtype)[..., : shape[-1]]
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).mT
    return torch.randn(*shape).to(dtype)


def like(source: Tensor) -> Tensor:
    """As `source` in shape, strides and values, with memory of its own."""
    return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype).copy_(source)


def assert_near(actual: Tensor, truth: Tensor, size: float, error: float) -> None:
    assert not actual.isnan().any()
    difference = (actual.double() - truth).abs()
    assert (difference <= error * (truth.abs() + size)).all(), difference.max()


MIXED = [
    (5, 8, 8, 160), (7, 4, 64, 20), (3, 64, 4, 20), (33, 3, 5, 7), (2, 1, 1, 1), (100, 12, 20, 1), (3, 8, 8, 1000),
    (1, 5, 9, 33), (2, 700, 3, 9), (4, 6, 6, 16), (41, 4, 64, 20), (34, 64, 4, 20), (35, 16, 17, 5),
]  # fmt: skip
"""M, I, O, C."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MIXED, ids=str)
def test_mix(ops, sizes, dtype, layout):
    """y = [y +] bias + base + scale · out_scale ⊙ A (in_scale ⊙ p), with everything and with nothing."""
    m, i, o, c = sizes
    torch.manual_seed(0)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    p, base, before = (tensor(*each) for each in (
        ((m, i, c), dtype, layout), ((m, o, c), dtype, other), ((m, o, c), dtype, layout)
    ))  # fmt: skip
    left = tensor((o, i), torch.float32, layout) / i**0.5
    in_scale, out_scale, bias = torch.randn(i, c), torch.randn(c, o).t(), torch.randn(o, c)
    for inside, outside, accumulate in [(False, False, False), (True, True, True), (False, True, False)]:
        y = like(before)
        tables = (in_scale if inside else None, *((out_scale, bias, base) if outside else (None, None, None)))
        ops.mix(p, left, *tables, 0.7, accumulate, y)
        wide = p.double() * (in_scale.to(dtype).double() if inside else 1)
        truth = 0.7 * torch.einsum("oi,mic->moc", left.to(dtype).double(), wide)
        if outside:
            truth = truth * out_scale.to(dtype).double() + bias.to(dtype).double() + base.double()
        if accumulate:
            truth = truth + before.double()
        assert_near(y, truth, 1.0, ERROR[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_without_a_left_factor(ops, dtype, layout):
    """The identity: scaled copies, sums of bias and base alone, and zeros."""
    p, base = tensor((9, 3, 50), dtype, layout), tensor((9, 3, 50), dtype, "plain")
    out_scale, bias = torch.randn(3, 50), torch.randn(3, 50, dtype=torch.float64)
    y = torch.full((9, 3, 50), float("nan"), dtype=dtype)
    ops.mix(p, None, None, out_scale, bias, base, 2.0, False, y)
    truth = 2 * p.double() * out_scale.to(dtype).double() + bias.to(dtype).double() + base.double()
    assert_near(y, truth, 1.0, ERROR[dtype])
    ops.mix(None, None, None, None, None, base, 1.0, False, y)
    assert torch.equal(y, base)
    ops.mix(None, None, None, None, None, None, 1.0, False, y)
    assert torch.equal(y, torch.zeros_like(y))
    ops.mix(None, None, None, None, None, base, 1.0, True, base)
    assert torch.equal(base / 2, y + (base / 2))


REDUCED = [
    (5, 8, 160, 160), (300, 20, 4, 64), (33, 160, 8, 8), (7, 1, 3, 50), (100, 4, 20, 320), (257, 1, 16, 200),
    (3, 5, 7, 1), (4, 30, 33, 2), (1000, 1, 2, 1500), (40, 1, 200, 700),
]  # fmt: skip
"""M, G, P, Q."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*REDUCED, (0, 3, 4, 5), (9, 0, 4, 5)], ids=str)
def test_reduce(ops, sizes, dtype):
    """out = scale · Σ (p_scale ⊙ p)ᵀ q for all pairs of layouts, straight into every dtype."""
    m, g, height, width = sizes
    torch.manual_seed(0)
    for at, layout in enumerate(LAYOUTS):
        for other in LAYOUTS:
            p, q = tensor((m, g, height), dtype, layout), tensor((m, g, width), dtype, other)
            for p_scale in (None, torch.randn(g, height)):
                out = torch.full(
                    (width, height), float("nan"), dtype=(torch.float32, torch.float64, dtype)[at]
                )
                ops.reduce(p, q, p_scale, 0.5, False, out.t())
                scaled = p.double() * (1 if p_scale is None else p_scale.to(dtype).double())
                truth = 0.5 * torch.einsum("mgp,mgq->qp", scaled, q.double())
                error = ERROR[torch.bfloat16] if out.dtype == torch.bfloat16 else 1e-5
                assert_near(out, truth, (m * g) ** 0.5 + 1, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_are_as_exact_as_a_gemm(ops, dtype):
    """One slice of many steps: what earlier steps summed is not carried through every addition of the next."""
    torch.manual_seed(0)
    p, q = torch.randn(20480, 1, 16).to(dtype), torch.randn(20480, 1, 16).to(dtype)
    out = torch.empty(16, 16)
    ops.reduce(p, q, None, 1.0, False, out)
    truth = p[:, 0].double().t() @ q[:, 0].double()
    ours, gemm = (
        (each - truth).square().mean().sqrt() for each in (out, p[:, 0].float().t() @ q[:, 0].float())
    )
    assert ours <= 1.1 * gemm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(0, 5), (1, 7), (300, 1000), (5, 9000)], ids=str)
def test_column_sums(ops, sizes, dtype):
    p, q = tensor(sizes, dtype, "plain"), tensor(sizes, dtype, "transposed")
    out = torch.full(sizes[1:], float("nan"))
    ops.column_sums(p, None, False, out)
    assert_near(out, p.double().sum(0), sizes[0] ** 0.5 + 1, 1e-5)
    ops.column_sums(q, p, True, out)
    assert_near(out, (p.double() * (1 + q.double())).sum(0), sizes[0] ** 0.5 + 1, 1e-5)


def test_cast(ops):
    """Between all dtypes, as torch rounds: subnormals, infinities and NaN among the values."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    values = torch.randn(50, 70) * torch.logspace(-9, 5, 70)
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    for source in kinds:
        for target in kinds:
            given = values.to(source)
            out = torch.empty(70, 50, dtype=target).t()
            ops.cast(given, out)
            truth = given if source == target else given.float().to(target)
            torch.testing.assert_close(out, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(ops, dtype, shuffled):
    weight, left, right = tensor((60, 84), dtype, "transposed"), torch.randn(5, 7), torch.randn(12, 12).half()
    out = torch.full((60, 84), float("nan"), dtype=dtype)
    ops.merge(weight, left, right, 0.3, shuffled, out)
    delta = torch.einsum("ij,pq->ipjq", left.double(), right.double())
    delta = (delta.transpose(0, 1) if shuffled else delta).reshape(60, 84)
    assert_near(out, weight.double() + 0.3 * delta, 1.0, ERROR[dtype])


def test_the_same_bits_for_any_number_of_threads(ops):
    p, q = torch.randn(999, 4, 20), torch.randn(999, 4, 320)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, sums, mixed = torch.empty(20, 320), torch.empty(320), torch.empty(999, 7, 320)
            ops.reduce(p, q, None, 1.0, False, out)
            ops.column_sums(q.flatten(0, 1), None, False, sums)
            ops.mix(q, torch.ones(7, 4), None, None, None, None, 1.0, False, mixed)
            results.append((out, sums, mixed))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_the_level_by_environment_variable():
    """KRONAFUSE_CPU_LEVEL holds a process to a level; a name that is none is an error that lists them."""
    program = "from kronafuse import native; print(native.cpu().level())"

    def run(level: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"KRONAFUSE_CPU_LEVEL": level}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )

    assert run("scalar").stdout == "0\n"
    failed = run("sse9")
    assert failed.returncode == 1
    assert "KRONAFUSE_CPU_LEVEL must be scalar, avx2 or avx512; got sse9" in failed.stderr


@pytest.mark.parametrize("level", [-1, 3])
def test_rejects_unknown_levels(level):
    with pytest.raises(RuntimeError, match=rf"set_level: level must be 0 .*; got {level}"):
        native.cpu().set_level(level)
