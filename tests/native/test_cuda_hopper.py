"""The Hopper form of `linear`: every tile, orientation and dtype against float64; on a GPU, else emulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from kronafuse.ops.outputs import new_output, poisoned
from kronafuse.testing.accuracy import assert_accurate
from torch import Tensor

HOPPER = 100
"""Of `config`: row i of csrc/cuda/kron_linear/configs_sm90a.h is HOPPER + i."""
TILES = {
    "128x160": 0,
    "128x160_pingpong": 2,
    "64x160_pingpong": 4,
    "128x128": 6,
    "128x256": 8,
    "256x128": 10,
}
ROWS = {f"{tile}-cluster{cluster}": row + cluster - 1 for tile, row in TILES.items() for cluster in (1, 2)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """y = x Wᵀ + bias + base + Σ t upᵀ + the block tail."""

    shape: tuple[int, int]
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    base: Tensor | None = None
    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    block: tuple[Tensor, Tensor] | None = None

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs (M, J), (N, J) whose products add up to y but for bias and base."""
        pairs = list(self.dense)
        if self.x is not None and self.weight is not None:
            pairs.insert(0, (self.x, self.weight))
        if self.block is not None:
            inner, up = self.block
            blocks = torch.kron(torch.eye(inner.shape[1], dtype=up.dtype, device=up.device), up.contiguous())
            pairs.append((inner.flatten(1), blocks))
        return pairs

    def sum(self, change: Callable[[Tensor], Tensor], rounds: Callable[[Tensor], Tensor]) -> Tensor:
        """y from `change`d operands, `rounds` applied to each addition."""
        y = torch.zeros(self.shape, dtype=torch.float64)
        for added in (self.base, self.bias):
            if added is not None:
                y = y + change(added)
        for left, right in self.products():
            y = rounds(y + change(left) @ change(right).t())
        return y


@pytest.fixture
def linear(cuda_ops) -> Callable[..., Tensor]:
    """linear(problem, config, y=None): runs the operator, or skips on a GPU that is no Hopper."""
    if not cuda_ops.ops.linear_has_hopper():
        pytest.skip("neither a GPU of compute capability 9.0 with kernels for it nor the emulation")
    return partial(_linear, cuda_ops.ops)


def _linear(
    ops: Any, problem: Problem, config: int, y: Tensor | None = None, shuffled: bool = False
) -> Tensor:
    operands = [each for pair in problem.products() for each in pair]
    if y is None:
        with poisoned():
            y = padded_output(operands[0], problem.shape)
    ops.linear(
        problem.x, problem.weight, problem.bias, problem.base,
        [t for t, _ in problem.dense], [up for _, up in problem.dense],
        *(problem.block or (None, None)), None, None, None, None, shuffled, config, y,
    )  # fmt: skip
    return y


def padded_output(like: Tensor, shape: tuple[int, int]) -> Tensor:
    """(M, N) whose rows begin at multiples of 16 bytes, as TMA wants them."""
    return new_output(like, (shape[0], -(-shape[1] // 8) * 8))[:, : shape[1]]


def random(device: torch.device, dtype: torch.dtype, *shape: int, transposed: bool = False) -> Tensor:
    """A slice of a larger buffer, rows at multiples of 16 bytes, NaN everywhere around it."""
    if transposed:
        return random(device, dtype, *reversed(shape)).t()
    pitches = (*shape[1:-1], -(-shape[-1] // 8) * 8 + 8)
    buffer = torch.full((shape[0] + 1, *pitches), float("nan"), dtype=dtype, device=device)
    result = buffer[: shape[0], ..., : shape[-1]]
    return result.copy_(torch.randn(shape, dtype=torch.float32))


def assert_right(problem: Problem, y: Tensor) -> None:
    """y is as close to float64 as a chain of torch's products that rounds each sum."""

    def exactly(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double()

    truth = problem.sum(exactly, lambda y: y)
    yardstick = problem.sum(exactly, lambda each: each.to(y.dtype).double())
    noise = problem.sum(lambda tensor: exactly(tensor).square(), lambda y: y).sqrt()
    assert_accurate("y", y, yardstick, truth, noise, y.dtype)


@dataclass(frozen=True)
class Inputs:
    """Makes operands of one dtype and orientation."""

    device: torch.device
    dtype: torch.dtype
    transposed: bool = False

    def factor(self, *shape: int) -> Tensor:
        return random(self.device, self.dtype, *shape, transposed=self.transposed)

    def tokens(self, *shape: int) -> Tensor:
        return random(self.device, self.dtype, *shape)

    def frozen(self, m: int, n: int, k: int) -> Problem:
        return Problem((m, n), x=self.tokens(m, k), weight=self.factor(n, k))

    def dense(self, m: int, n: int, *widths: int) -> list[tuple[Tensor, Tensor]]:
        return [(self.tokens(m, width), self.factor(n, width)) for width in widths]

    def beside(self, problem: Problem) -> Problem:
        """The problem with bias and base."""
        m, n = problem.shape
        return replace(problem, bias=self.tokens(1, n)[0], base=self.tokens(m, n))


@pytest.fixture(params=[False, True], ids=["w_nk", "w_kn"])
def inputs(request, cuda_ops) -> Inputs:
    torch.manual_seed(5)
    return Inputs(cuda_ops.device, torch.bfloat16, request.param)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_row(linear, inputs, row, dtype):
    """x Wᵀ, two tails, bias and base; several tiles to a block of threads, the last ones partly outside y."""
    inputs = replace(inputs, dtype=dtype)
    m, n = 700, 328
    problem = inputs.beside(replace(inputs.frozen(m, n, 392), dense=inputs.dense(m, n, 20, 80)))
    assert_right(problem, linear(problem, HOPPER + row))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_many_tiles_to_a_block(linear, inputs, row):
    """Rounds of the ring of stages end at every place of it, and groups of tiles begin anew."""
    m = 2200 if inputs.device.type == "cpu" else 40_000
    problem = inputs.beside(replace(inputs.frozen(m, 512, 40), dense=inputs.dense(m, 512, 16)))
    assert_right(problem, linear(problem, HOPPER + row))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_any_order_of_warps(linear, inputs, cuda_ops, row):
    """Roles meet at barriers alone: the order in which they come does not show. A GPU has its own."""
    if cuda_ops.device.type == "cuda":
        pytest.skip("the emulation's order is drawn")
    m, n = 450, 500
    problem = inputs.beside(replace(inputs.frozen(m, n, 200), dense=inputs.dense(m, n, 24)))
    results = []
    try:
        for seed in (0, 1):
            cuda_ops.ops.emulation_settings(3, 227 * 1024, 9, 0, seed)
            results.append(linear(problem, HOPPER + row))
    finally:
        cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, 0)
    assert_right(problem, results[0])
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("n2", [160, 320, 80, 144, 7])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_block_tail(linear, inputs, row, n2):
    """I ⊗ B, whose blocks the tiles meet in every way: several blocks to a tile, several tiles to a block, across."""
    m, n1, rank = 200, 480 // n2 or 1, 40 if n2 == 80 else 72
    problem = replace(
        inputs.frozen(m, n1 * n2, 64), block=(inputs.tokens(m, n1, rank), inputs.factor(n2, rank))
    )
    assert_right(problem, linear(problem, HOPPER + row))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_kind_of_tail_at_once(linear, inputs, row):
    m, n = 130, 480
    problem = replace(
        inputs.beside(inputs.frozen(m, n, 72)),
        dense=inputs.dense(m, n, 8, 64, 100, 16),
        block=(inputs.tokens(m, 3, 48), inputs.factor(160, 48)),
    )
    assert_right(problem, linear(problem, HOPPER + row))


@pytest.mark.parametrize("row", TILES.values(), ids=TILES.keys())
def test_delta_alone(linear, inputs, row):
    """No x: base + T Lᵀ."""
    m, n = 190, 320
    problem = Problem((m, n), base=inputs.tokens(m, n), dense=inputs.dense(m, n, 80))
    assert_right(problem, linear(problem, HOPPER + row))
    bare = replace(problem, base=None)
    assert_right(bare, linear(bare, HOPPER + row))


@pytest.mark.parametrize("shape", [(1, 160, 64), (1, 7, 3), (3, 1, 16), (65, 161, 72), (257, 13, 1)])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_odd_shapes(linear, inputs, row, shape):
    """What the tiles hang over: zeros in, nothing out."""
    problem = inputs.beside(inputs.frozen(*shape))
    y = linear(problem, HOPPER + row)
    assert_right(problem, y)
    outside = y.as_strided((y.shape[0], y.stride(0)), y.stride())[:, shape[1] :]
    assert outside.isnan().all(), "written beyond y"


@pytest.mark.parametrize("width", [1, 15, 16, 17, 47, 48, 49, 64, 65])
def test_every_width_of_tail(linear, inputs, width):
    """The steps of 16 that a tail's last stage is cut to; beyond its width lies NaN."""
    m, n = 100, 160
    problem = replace(inputs.frozen(m, n, 64), dense=inputs.dense(m, n, width))
    for row in TILES.values():
        assert_right(problem, linear(problem, HOPPER + row))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_base_may_be_y(linear, inputs, row):
    m, n = 300, 330
    problem = replace(inputs.frozen(m, n, 100), base=inputs.tokens(m, n))
    assert problem.base is not None
    y = padded_output(problem.base, (m, n)).copy_(problem.base)
    assert linear(replace(problem, base=y), HOPPER + row, y=y) is y
    assert_right(problem, y)


@pytest.mark.parametrize("kind", ["float32", "strided", "one_number"])
def test_bias(linear, inputs, kind):
    problem = inputs.frozen(150, 200, 64)
    bias = {
        "float32": random(inputs.device, torch.float32, 1, 200)[0],
        "strided": inputs.tokens(200, 3)[:, 1],
        "one_number": inputs.tokens(1, 1)[0].expand(200),
    }[kind]
    problem = replace(problem, bias=bias)
    for row in TILES.values():
        assert_right(problem, linear(problem, HOPPER + row))


def test_a_row_is_chosen(linear, inputs):
    """config -1 where the Hopper form can serve, and where it cannot and the plain form does."""
    problem = replace(inputs.frozen(200, 480, 128), dense=inputs.dense(200, 480, 80))
    assert_right(problem, linear(problem, -1))
    odd = Problem((20, 30), x=torch.randn(20, 15).to(problem.x), weight=torch.randn(30, 15).to(problem.x))
    assert_right(odd, linear(odd, -1))


def _off_16_bytes(inputs: Inputs) -> Problem:
    problem = inputs.frozen(64, 64, 64)
    assert problem.x is not None
    return replace(problem, x=problem.x.new_zeros(64, 68)[:, 2:66])


def _feature_stride(inputs: Inputs) -> Problem:
    problem = inputs.frozen(64, 64, 64)
    assert problem.x is not None
    return replace(problem, x=problem.x.new_zeros(64, 128)[:, ::2])


def _two_orientations(inputs: Inputs) -> Problem:
    other = replace(inputs, transposed=not inputs.transposed)
    return replace(inputs.frozen(64, 64, 64), dense=other.dense(64, 64, 16))


def _factor_in_float32(inputs: Inputs) -> Problem:
    block = (inputs.tokens(64, 2, 16), replace(inputs, dtype=torch.float32).factor(32, 16))
    return replace(inputs.frozen(64, 64, 64), block=block)


def _no_product(inputs: Inputs) -> Problem:
    return Problem((64, 64), base=inputs.tokens(64, 64))


UNSERVED = (_off_16_bytes, _feature_stride, _two_orientations, _factor_in_float32)


@pytest.mark.parametrize("make", UNSERVED, ids=[make.__name__.strip("_") for make in UNSERVED])
def test_names_what_it_cannot_serve(linear, inputs, make):
    """By name an error, and nothing is written; unnamed the plain form serves."""
    problem = make(inputs)
    y = problem.products()[0][0].new_full(problem.shape, float("nan"))
    with pytest.raises(RuntimeError, match="Hopper form cannot serve"):
        linear(problem, HOPPER, y=y)
    assert y.isnan().all()
    if make is not _factor_in_float32:
        assert_right(problem, linear(problem, -1))


def test_rows_are_those_of_the_table():
    """The names above against what the library was compiled with."""
    introspection = pytest.importorskip("kronafuse._C", reason="kronafuse._C was not built for this Python")
    names = [row.name for row in introspection.configurations()["linear_sm90a"]]
    assert names == [f"{tile}{cluster}" for tile in TILES for cluster in ("", "_cluster2")]


def test_rejects_shuffled_blocks(linear, inputs):
    block = (inputs.tokens(64, 2, 16), inputs.factor(32, 16))
    problem = replace(inputs.frozen(64, 64, 64), block=block)
    with pytest.raises(RuntimeError, match="Hopper form cannot serve"):
        linear(problem, HOPPER, shuffled=True)


@pytest.mark.parametrize("row", [len(ROWS), 50])
def test_rejects_rows_beyond_the_table(linear, inputs, row):
    with pytest.raises(
        RuntimeError, match=f"config of the Hopper form must be -1 .. {len(ROWS) - 1}; got {row}"
    ):
        linear(inputs.frozen(64, 64, 64), HOPPER + row)
