"""The GEMM with tails and the dense forms it takes, against float64: every tile, layout, tail and epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kronafuse.testing.inputs import generator, random
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16]
CONFIGS = [0, 1]
"""Rows of linear_configurations."""


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=CONFIGS, ids=["128x128", "64x64"])
def config(request: pytest.FixtureRequest) -> int:
    return request.param


class Inputs:
    """Random tensors of one dtype from one seed, on the device under test."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device, self.source = dtype, device, generator(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, strided: bool = False) -> Tensor:
        if not strided:
            return random(self.source, *shape, dtype=dtype or self.dtype).to(self.device)
        # Moving a view with gaps to a device would close them.
        return self(*shape[:-1], 2 * shape[-1] + 3, dtype=dtype)[..., 1 : 1 + 2 * shape[-1] : 2]


@dataclass
class Call:
    """The arguments of the operator beside y, and what they should give."""

    features: int
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    base: Tensor | None = None
    dense: tuple[tuple[Tensor, Tensor], ...] = ()
    block: tuple[Tensor, Tensor, Tensor | None] | None = None
    mix: tuple[Tensor, Tensor, Tensor | None] | None = None
    shuffled: bool = False

    def run(self, ops: Any, config: int, y: Tensor) -> Tensor:
        none = (None, None, None)
        ops.linear(
            self.x, self.weight, self.bias, self.base, [t for t, _ in self.dense], [up for _, up in self.dense],
            *(self.block or none), *(self.mix or none), self.shuffled, config, y,
        )  # fmt: skip
        return y

    def expected(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """In float64, of factors rounded to the compute dtype."""
        y = torch.zeros(tokens, self.features, dtype=torch.float64)
        for operand in (self.bias, self.base):
            y = y if operand is None else y + operand.cpu().double()
        if self.weight is not None:
            assert self.x is not None
            y = y + self.x.cpu().double() @ self.weight.cpu().double().t()
        for t, up in self.dense:
            y = y + t.cpu().double() @ up.cpu().double().t()
        if self.block is not None:
            inner, up, scale = self.block
            y = y + self._delta("mij,oj->mio", inner, up, scale, dtype)
        if self.mix is not None:
            inner, left, scale = self.mix
            y = y + self._delta("mjo,ij->mio", inner, left, scale, dtype)
        return y

    def _delta(
        self, rule: str, inner: Tensor, factor: Tensor, scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        delta = torch.einsum(rule, inner.cpu().double(), factor.cpu().to(dtype).double())
        delta = (delta.mT if self.shuffled else delta).flatten(1)
        return delta if scale is None else delta * scale.cpu().double()


def assert_rounded_once(y: Tensor, expected: Tensor) -> None:
    """Half a spacing of y's dtype, and what sums in float32 lose."""
    assert y.shape == expected.shape
    if y.numel() == 0:
        return
    got, spacing = y.cpu().double(), torch.finfo(y.dtype).eps
    limit = 0.505 * spacing * expected.abs() + 2e-6 * expected.abs().max() + 1e-7
    worst = ((got - expected).abs() / limit).max()
    assert not got.isnan().any()
    assert worst <= 1, f"{worst:.2f} of the limit"


def check(ops: Any, device: torch.device, config: int, dtype: torch.dtype, tokens: int, call: Call) -> Tensor:
    y = torch.full((tokens, call.features), float("nan"), dtype=dtype, device=device)
    expected = call.expected(tokens, dtype)
    assert_rounded_once(call.run(ops, config, y), expected)
    return y


@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight_transposed"])
@pytest.mark.parametrize(
    ("tokens", "features", "width"),
    [(70, 136, 72), (1, 64, 16), (130, 24, 200), (5, 37, 19), (66, 130, 7), (3, 8, 0)],
)
def test_gemm(cuda_ops, dtype, config, tokens, features, width, transposed):
    """Whole and partial tiles, aligned rows and rows that are not."""
    rand = Inputs(dtype, cuda_ops.device)
    weight = rand(width, features).t() if transposed else rand(features, width)
    check(*cuda_ops, config, dtype, tokens, Call(features, rand(tokens, width), weight, rand(features)))


def test_strided_operands(cuda_ops, dtype, config):
    """Gaps between elements of x, W, bias, base and y."""
    rand = Inputs(dtype, cuda_ops.device)
    call = Call(
        40, rand(33, 24, strided=True), rand(40, 24, strided=True), rand(80)[::2], rand(33, 40, strided=True),
        ((rand(33, 16, strided=True), rand(40, 16, strided=True)),),
    )  # fmt: skip
    buffer = torch.full((33, 80), float("nan"), dtype=dtype, device=cuda_ops.device)
    y = call.run(cuda_ops.ops, config, buffer[:, ::2])
    assert_rounded_once(y, call.expected(33, dtype))
    assert buffer[:, 1::2].isnan().all()


def padded(rand: Inputs, *shape: int, pitch: int) -> Tensor:
    """Aligned rows, `pitch` elements apart, with NaN behind what belongs to them."""
    whole = torch.full((*shape[:-1], pitch), float("nan"), dtype=rand.dtype, device=rand.device)
    whole[..., : shape[-1]] = rand(*shape)
    return whole[..., : shape[-1]]


@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight_transposed"])
def test_padded_rows(cuda_ops, dtype, config, transposed):
    """Rows that begin at multiples of 16 bytes and end between them: nothing behind their end is used."""
    rand = Inputs(dtype, cuda_ops.device)
    weight = padded(rand, 19, 37, pitch=40).t() if transposed else padded(rand, 37, 19, pitch=24)
    up = padded(rand, 12, 37, pitch=40).t() if transposed else padded(rand, 37, 12, pitch=16)
    call = Call(37, padded(rand, 9, 19, pitch=24), weight, dense=((padded(rand, 9, 12, pitch=16), up),))
    check(*cuda_ops, config, dtype, 9, call)


@pytest.mark.parametrize("pitch", [40, 44])
def test_rows_that_begin_between_chunks(cuda_ops, dtype, config, pitch):
    """Sizes of whole chunks, with rows that are aligned or not; y's own padding stays as it was."""
    rand = Inputs(dtype, cuda_ops.device)
    x, weight = padded(rand, 9, 32, pitch=pitch), padded(rand, 40, 32, pitch=pitch)
    call = Call(37, x, weight[:37], base=rand(9, 37))
    buffer = torch.full((9, pitch), float("nan"), dtype=dtype, device=cuda_ops.device)
    y = call.run(cuda_ops.ops, config, buffer[:, :37])
    assert_rounded_once(y, call.expected(9, dtype))
    assert buffer[:, 37:].isnan().all()


@pytest.mark.parametrize("pitch", [28, 32])
def test_padded_groups(cuda_ops, dtype, config, pitch):
    """Tokens of the block tail's T are aligned, its groups are not always."""
    rand = Inputs(dtype, cuda_ops.device)
    call = Call(
        80, rand(9, 16), rand(80, 16), block=(padded(rand, 9, 2, 24, pitch=pitch), rand(40, 24), None)
    )
    check(*cuda_ops, config, dtype, 9, call)


def test_expanded_operands(cuda_ops, dtype, config):
    """Strides of 0: one token for all, one value for all features."""
    rand = Inputs(dtype, cuda_ops.device)
    call = Call(48, rand(1, 32).expand(20, 32), rand(48, 32), rand(1).expand(48), rand(1, 48).expand(20, 48))
    check(*cuda_ops, config, dtype, 20, call)


@pytest.mark.parametrize("bias", [torch.float32, torch.float64, None], ids=str)
def test_base_in_place(cuda_ops, dtype, config, bias):
    """base is y itself; a bias of any dtype."""
    rand = Inputs(dtype, cuda_ops.device)
    y = rand(67, 72)
    call = Call(72, rand(67, 40), rand(72, 40), None if bias is None else rand(72, dtype=bias), y)
    expected = call.expected(67, dtype)
    assert_rounded_once(call.run(cuda_ops.ops, config, y), expected)


@pytest.mark.parametrize("widths", [(16,), (80, 4), (20, 16, 33, 8)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight_transposed"])
def test_dense_tails(cuda_ops, dtype, config, widths, transposed):
    """Up to four pairs after one another in the loop over k, in both layouts and in the other one than W's."""
    rand = Inputs(dtype, cuda_ops.device)
    weight = rand(48, 136).t() if transposed else rand(136, 48)
    dense = tuple(
        (rand(50, width), rand(width, 136).t() if transposed != (width == 4) else rand(136, width))
        for width in widths
    )
    check(*cuda_ops, config, dtype, 50, Call(136, rand(50, 48), weight, None, None, dense))


@pytest.mark.parametrize("transposed", [False, True], ids=["up", "up_transposed"])
@pytest.mark.parametrize(
    ("left", "right", "rank"), [(3, 40, 24), (1, 72, 16), (5, 27, 9), (2, 128, 32), (12, 8, 40), (40, 3, 5)]
)
def test_block_tail(cuda_ops, dtype, config, left, right, rank, transposed):
    """Groups inside a tile, across its border and as large as it; few rows are done by multiply-adds."""
    rand = Inputs(dtype, cuda_ops.device)
    features, tokens = left * right, 21
    up = rand(rank, right).t() if transposed else rand(right, rank)
    weight = rand(16, features).t() if transposed else rand(features, 16)
    call = Call(features, rand(tokens, 16), weight, block=(rand(tokens, left, rank), up, None))
    check(*cuda_ops, config, dtype, tokens, call)


@pytest.mark.parametrize("shuffled", [False, True], ids=["plain", "shuffled"])
@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight_transposed"])
@pytest.mark.parametrize(
    ("left", "right", "rank"), [(3, 40, 24), (40, 3, 4)], ids=["products", "multiply_adds"]
)
def test_block_tail_scaled_and_shuffled(cuda_ops, dtype, config, shuffled, transposed, left, right, rank):
    """A float32 factor, a row scale of the tail alone, base, bias and a dense tail beside it."""
    rand = Inputs(dtype, cuda_ops.device)
    features, tokens = left * right, 18
    weight = rand(24, features).t() if transposed else rand(features, 24)
    call = Call(
        features, rand(tokens, 24), weight, rand(features), rand(tokens, features),
        ((rand(tokens, 8), rand(features, 8)),),
        (rand(tokens, left, rank), rand(right, rank, dtype=torch.float32), rand(features, dtype=torch.float32)),
        shuffled=shuffled,
    )  # fmt: skip
    check(*cuda_ops, config, dtype, tokens, call)


@pytest.mark.parametrize("shuffled", [False, True], ids=["plain", "shuffled"])
@pytest.mark.parametrize(("left", "right", "count"), [(8, 16, 4), (3, 27, 7), (64, 2, 3)])
def test_mix_tail(cuda_ops, dtype, config, left, right, count, shuffled):
    rand = Inputs(dtype, cuda_ops.device)
    features, tokens = left * right, 35
    mix = (rand(tokens, count, right), rand(left, count, dtype=torch.float32), rand(features))
    call = Call(features, rand(tokens, 16), rand(features, 16), mix=mix, shuffled=shuffled)
    check(*cuda_ops, config, dtype, tokens, call)


@pytest.mark.parametrize("kind", ["bias", "base", "dense", "block", "mix", "all"])
def test_delta_without_weight(cuda_ops, dtype, config, kind):
    rand = Inputs(dtype, cuda_ops.device)
    chosen = {
        "bias": rand(48),
        "base": rand(9, 48),
        "dense": ((rand(9, 16), rand(16, 48).t()),),
        "block": (rand(9, 2, 16), rand(16, 24).t(), rand(48)),
        "mix": (rand(9, 4, 24), rand(2, 4), rand(48)),
    }
    if kind != "all":
        chosen = {kind: chosen[kind]}
    check(*cuda_ops, config, dtype, 9, Call(48, **chosen))  # pyright: ignore[reportArgumentType]


def test_many_tiles(cuda_ops, config):
    """More rows of tiles than a band has, and a last band that is not whole."""
    rand = Inputs(torch.bfloat16, cuda_ops.device)
    tokens = 64 * (2 - config) * 10 + 3
    call = Call(70 * (2 - config), rand(tokens, 16), rand(70 * (2 - config), 16))
    check(*cuda_ops, config, torch.bfloat16, tokens, call)


@pytest.mark.parametrize("shape", [(0, 24), (24, 0)], ids=str)
def test_empty(cuda_ops, dtype, shape):
    tokens, features = shape
    rand = Inputs(dtype, cuda_ops.device)
    for config in (-2, -1, *CONFIGS):
        check(*cuda_ops, config, dtype, tokens, Call(features, rand(tokens, 16), rand(features, 16)))


def test_chosen_config(cuda_ops, dtype):
    """-1 takes a row of the tables, whichever form has it; -2 the plain form's."""
    rand = Inputs(dtype, cuda_ops.device)
    dense = ((rand(40, 16), rand(64, 16)),)
    for config in (-1, -2):
        check(
            *cuda_ops, config, dtype, 40, Call(64, rand(40, 32), rand(64, 32), rand(64), rand(40, 64), dense)
        )


def test_repeatable(cuda_ops, dtype, config):
    rand = Inputs(dtype, cuda_ops.device)
    call = Call(40, rand(33, 24), rand(40, 24), rand(40), block=(rand(33, 5, 16), rand(8, 16), None))
    first, second = (check(*cuda_ops, config, dtype, 33, call) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (7, 16)}, r"weight must be \(N, K\) = \(8, 16\); got \(7, 16\)"),
        ({"x": (4, 15)}, r"weight must be \(N, K\) = \(8, 15\); got \(8, 16\)"),
        ({"x": None}, "weight comes with x"),
        ({"bias": (9,)}, r"bias must be \(N,\) = \(8\); got \(9\)"),
        ({"base": (4, 7)}, r"base must be \(M, N\) = \(4, 8\); got \(4, 7\)"),
        ({"dense": ((4, 3), (8, 2))}, r"up must be \(N, width\) = \(8, 3\); got \(8, 2\)"),
        ({"block": ((4, 3, 2), (4, 2))}, r"block_inner must be \(M, N1, R\).*got \(4, 3, 2\), \(4, 2\)"),
        ({"mix": ((4, 3, 2), (4, 2))}, r"mix_inner must be \(M, J, N2\).*got \(4, 3, 2\), \(4, 2\)"),
    ],
    ids=str,
)
def test_rejects_shapes(cuda_ops, change, message):
    rand = Inputs(torch.float16, cuda_ops.device)
    call = Call(8, rand(4, 16), rand(8, 16))
    for name, shape in change.items():
        value: Any = None if shape is None else rand(*shape) if not isinstance(shape[0], tuple) else None
        if name == "dense":
            value = (tuple(rand(*each) for each in shape),)
        elif name in ("block", "mix"):
            value = (*(rand(*each) for each in shape), None)
        setattr(call, name, value)
    with pytest.raises(RuntimeError, match=message):
        call.run(cuda_ops.ops, -1, rand(4, 8))


def test_rejects_dtypes_and_overlaps(cuda_ops):
    rand = Inputs(torch.float16, cuda_ops.device)
    x, weight, y = rand(4, 16), rand(8, 16), rand(4, 8)
    with pytest.raises(RuntimeError, match="y must be float16 or bfloat16; got float32"):
        Call(8, x, weight).run(cuda_ops.ops, -1, y.float())
    with pytest.raises(RuntimeError, match="weight must have y's dtype float16; got bfloat16"):
        Call(8, x, weight.bfloat16()).run(cuda_ops.ops, -1, y)
    block = (rand(4, 2, 3), rand(4, 3, dtype=torch.float64), None)
    with pytest.raises(RuntimeError, match="block_up must have y's dtype float16 or float32; got float64"):
        Call(8, block=block).run(cuda_ops.ops, -1, y)
    with pytest.raises(RuntimeError, match=r"y's elements must lie apart; got strides \(0, 1\)"):
        Call(8, x, weight).run(cuda_ops.ops, -1, y[:1].expand(4, 8))
    square = rand(8, 8)
    with pytest.raises(RuntimeError, match=r"base may be y itself, with its strides \(8, 1\); got \(1, 8\)"):
        Call(8, rand(8, 16), weight, base=square.t()).run(cuda_ops.ops, -1, square)
    for config in (-3, 2, 99):
        with pytest.raises(RuntimeError, match=f"config.*{config}"):
            Call(8, x, weight).run(cuda_ops.ops, config, y)


@pytest.mark.parametrize("transposed", [False, True], ids=["by_width", "by_features"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["plain", "shuffled"])
@pytest.mark.parametrize("mixes", [False, True], ids=["block", "mix"])
@pytest.mark.parametrize(("left", "right", "count"), [(4, 16, 8), (3, 5, 2), (1, 40, 20), (64, 20, 4)])
def test_build(cuda_ops, dtype, left, right, count, mixes, shuffled, transposed):
    """Every element of a dense form, from factors of any dtype and layout, with and without a scale of its features."""
    rand = Inputs(dtype, cuda_ops.device)
    features, width = left * right, count * (right if mixes else left)
    for factor_dtype, strided, scaled in (
        (dtype, False, False),
        (torch.float32, True, True),
        (torch.float64, False, True),
    ):
        factor = rand(left if mixes else right, count, dtype=factor_dtype, strided=strided)
        scale = rand(features, dtype=torch.float32) if scaled else None
        identity = torch.eye(right if mixes else left, dtype=torch.float64)
        dense = (
            torch.kron(factor.cpu().double(), identity)
            if mixes
            else torch.kron(identity, factor.cpu().double())
        )
        if shuffled:
            dense = dense.view(left, right, width).transpose(0, 1).reshape(features, width)
        if scale is not None:
            dense = dense * scale.cpu().double()[:, None]
        shape = (width, features) if transposed else (features, width)
        out = torch.full(shape, float("nan"), dtype=dtype, device=cuda_ops.device)
        out = out.t() if transposed else out
        cuda_ops.ops.build(factor, mixes, left, right, shuffled, scale, out)
        assert_rounded_once(out, dense)


def test_build_rejects(cuda_ops):
    rand = Inputs(torch.float16, cuda_ops.device)
    with pytest.raises(RuntimeError, match=r"factor must have right = 5 rows; got \(4, 3\)"):
        cuda_ops.ops.build(rand(4, 3), False, 2, 5, False, None, rand(10, 6))
    with pytest.raises(RuntimeError, match=r"out must be \(10, 6\); got \(10, 5\)"):
        cuda_ops.ops.build(rand(5, 3), False, 2, 5, False, None, rand(10, 5))
    with pytest.raises(RuntimeError, match="out must be float16 or bfloat16; got float32"):
        cuda_ops.ops.build(rand(5, 3), False, 2, 5, False, None, rand(10, 6).float())
