"""shrink and mix: s · (in_scale ⊙ x) Dᵀ and s · A (in_scale ⊙ x) for several factors at once, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch
from kronafuse.ops.outputs import new_output, poisoned
from kronafuse.testing.inputs import generator, random
from torch import Tensor


class Sizes(NamedTuple):
    """x (m, i1, i2) and as many factors as there are widths."""

    op: str
    m: int
    i1: int
    i2: int
    widths: tuple[int, ...]


SIZES = {
    "low_rank": Sizes("shrink", 70, 1, 1280, (16,)),
    "b_first": Sizes("shrink", 5, 4, 320, (20,)),
    "square": Sizes("shrink", 9, 8, 40, (40,)),
    "fat": Sizes("shrink", 7, 4, 96, (160,)),
    "wide": Sizes("shrink", 3, 2, 72, (300,)),
    "q_k_v": Sizes("shrink", 17, 3, 64, (4, 16, 33)),
    "eight_factors": Sizes("shrink", 3, 1, 48, (1, 2, 3, 5, 8, 13, 21, 34)),
    "rows_of_8_bytes": Sizes("shrink", 6, 16, 20, (20,)),
    "rows_of_4_bytes": Sizes("shrink", 6, 5, 6, (10,)),
    "shrink_primes": Sizes("shrink", 13, 5, 19, (7,)),
    "shrink_one_token": Sizes("shrink", 1, 1, 1152, (4,)),
    "b_column": Sizes("shrink", 3, 4, 1, (6,)),
    "many_rows": Sizes("shrink", 1100, 1, 32, (8,)),
    "long_rows": Sizes("shrink", 3, 1, 8200, (24,)),
    "factors_in_parts": Sizes("shrink", 270, 1, 1416, (100,)),
    "krona": Sizes("mix", 9, 64, 20, (4,)),
    "factor_8": Sizes("mix", 5, 8, 160, (8,)),
    "factor_4": Sizes("mix", 5, 4, 32, (4,)),
    "near_square": Sizes("mix", 3, 32, 40, (32,)),
    "left_q_k_v": Sizes("mix", 4, 64, 24, (80, 3, 16)),
    "mix_pairs": Sizes("mix", 7, 12, 6, (5,)),
    "mix_primes": Sizes("mix", 13, 5, 7, (11,)),
    "mix_one_token": Sizes("mix", 1, 64, 20, (4,)),
    "left_row": Sizes("mix", 6, 1, 24, (3,)),
    "right_scalar": Sizes("mix", 11, 40, 1, (6,)),
    "long_columns": Sizes("mix", 2, 900, 8, (40,)),
    "many_columns": Sizes("mix", 300, 3, 16, (2,)),
}
LAYOUTS = ("contiguous", "slices", "gaps", "shuffled", "tokens_together")
DTYPES = (torch.float16, torch.bfloat16)
SMALL = (1, 99 * 1024, 8, 6, 0)
"""One multiprocessor, as little shared memory as a block of sm_86 has, and turns taken in order."""
LARGE = (132, 227 * 1024, 9, 0, 7)
"""An H200's, whose few rows are shared by all warps; warps run in a drawn order."""


@pytest.fixture(params=DTYPES, ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same elements (M, ·, ·) in other strides."""
    m, first, second = tensor.shape
    if layout == "slices":  # rows apart, as of a chunk of a wider tensor
        whole = tensor.new_full((m, first, second + 16), float("nan"))
        whole[..., 8 : 8 + second] = tensor
        return whole[..., 8 : 8 + second]
    if layout == "gaps":  # no two neighbours, nothing aligned
        whole = tensor.new_full((m, first, 2 * second + 1), float("nan"))
        whole[..., 1::2] = tensor
        return whole[..., 1::2]
    if layout == "shuffled":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens_together":
        return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return tensor.contiguous()


@dataclass(frozen=True)
class Problem:
    """The operands of one call; `run` calls the kernel, `truth` is the result in float64."""

    op: str
    x: Tensor
    factors: Sequence[Tensor]
    scales: Sequence[float]
    scale_tensors: Sequence[Tensor | None]
    in_scale: Tensor | None = None
    base: Tensor | None = None
    out_scale: Tensor | None = None
    outs: Sequence[Tensor] = field(default_factory=list)

    @staticmethod
    def of(
        sizes: Sizes, dtype: torch.dtype, factors: torch.dtype | None = None, layout: str = "contiguous"
    ) -> Problem:
        """Random numbers; the factors transposed where the layout is not the plain one."""
        source, inner = generator(0), sizes.i2 if sizes.op == "shrink" else sizes.i1
        x = random(source, sizes.m, sizes.i1, sizes.i2, dtype=dtype)
        made = [random(source, width, inner, dtype=factors or dtype) for width in sizes.widths]
        if layout != "contiguous":
            made = [each.t().contiguous().t() for each in made]
        scales = [0.7 - 0.4 * index for index in range(len(made))]
        return Problem(sizes.op, laid_out(x, layout), made, scales, [None] * len(made))

    def shape(self, factor: Tensor) -> tuple[int, int, int]:
        """Of the factor's result."""
        m, i1, i2 = self.x.shape
        return (m, i1, factor.shape[0]) if self.op == "shrink" else (m, factor.shape[0], i2)

    def run(self, cuda_ops, splits: bool = True) -> list[Tensor]:
        """Results, on the CPU; into `outs` where there are some."""
        ops, device = cuda_ops

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        x, factors = self.x.to(device), [each.to(device) for each in self.factors]
        with poisoned():
            outs = list(self.outs) or [new_output(x, self.shape(each)) for each in factors]
            size = getattr(ops, f"{self.op}_workspace")(x, factors) if splits else 0
            workspace = new_output(x, (size,), torch.float32) if size else None
        begin = (
            x,
            factors,
            list(self.scales),
            [there(each) for each in self.scale_tensors],
            there(self.in_scale),
        )
        if self.op == "shrink":
            ops.shrink(*begin, workspace, outs)
        else:
            ops.mix(*begin, there(self.base), there(self.out_scale), workspace, outs)
        return [each.cpu() for each in outs]

    def scaled_input(self) -> Tensor:
        """in_scale ⊙ x, rounded as x itself was."""
        if self.in_scale is None:
            return self.x.double()
        return (self.x.float() * self.in_scale.float()).to(self.x.dtype).double()

    def truth(self) -> list[tuple[Tensor, Tensor]]:
        """Of each factor the result, and the sum of its products' magnitudes."""
        found = []
        for factor, scale, tensor in zip(self.factors, self.scales, self.scale_tensors, strict=True):
            product = "mik,ok->mio" if self.op == "shrink" else "mkj,ok->moj"
            times = scale * (1.0 if tensor is None else tensor.double())
            both = []
            for magnitude in (False, True):
                x, rounded = self.scaled_input(), factor.to(self.x.dtype).double()
                x, rounded = (x.abs(), rounded.abs()) if magnitude else (x, rounded)
                whole = torch.einsum(product, x, rounded) * (abs(times) if magnitude else times)
                whole = whole if self.out_scale is None else whole * self.out_scale.double()
                both.append(whole if self.base is None else whole + self.base.double())
            found.append((both[0], both[1].abs()))
        return found


def assert_rounded_once(problem: Problem, results: Sequence[Tensor]) -> None:
    """Half a spacing of the dtype for the only rounding, and what sums in fp32 lose."""
    dtype = problem.x.dtype
    half, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for number, (result, (truth, magnitude)) in enumerate(zip(results, problem.truth(), strict=True)):
        assert result.shape == truth.shape
        excess = (result.double() - truth).abs() - (half * truth.abs() + 2.0**-19 * magnitude + least)
        assert bool((excess <= 0).all()), f"factor {number}: {excess.amax().item():.3e} beyond the limit"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["own_dtype", "float32"])
def test_against_float64(cuda_ops, dtype: torch.dtype, name: str, factors: torch.dtype | None) -> None:
    problem = Problem.of(SIZES[name], dtype, factors)
    assert_rounded_once(problem, problem.run(cuda_ops))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strided_inputs(cuda_ops, dtype: torch.dtype, name: str, layout: str) -> None:
    factors = torch.float32 if dtype == torch.float16 else None
    problem = Problem.of(SIZES[name], dtype, factors, layout)
    assert_rounded_once(problem, problem.run(cuda_ops))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["b_first", "square", "shrink_primes", "krona", "near_square", "mix_primes"])
def test_strided_outputs(cuda_ops, dtype: torch.dtype, name: str, layout: str) -> None:
    problem = Problem.of(SIZES[name], dtype)
    outs = [
        laid_out(torch.full(problem.shape(each), torch.nan, dtype=dtype), layout) for each in problem.factors
    ]
    outs = [each.to(cuda_ops.device) for each in outs]
    assert_rounded_once(problem, replace(problem, outs=outs).run(cuda_ops))


@pytest.mark.parametrize("device", [SMALL, LARGE], ids=["small_device", "large_device"])
@pytest.mark.parametrize("splits", [True, False], ids=["", "unsplit"])
@pytest.mark.parametrize("name", SIZES)
def test_other_devices(
    cuda_ops, dtype: torch.dtype, name: str, splits: bool, device: tuple[int, ...]
) -> None:
    if cuda_ops.device.type != "cpu":
        pytest.skip("the emulation's settings")
    problem = Problem.of(SIZES[name], dtype)
    try:
        cuda_ops.ops.emulation_settings(*device)
        assert_rounded_once(problem, problem.run(cuda_ops, splits))
    finally:
        cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, 0)


@pytest.mark.parametrize("name", ["b_first", "q_k_v", "shrink_primes", "krona", "factor_8", "mix_primes"])
@pytest.mark.parametrize("layout", ["contiguous", "shuffled"])
@pytest.mark.parametrize(
    "scales", [torch.float64, torch.float32, None], ids=["float64", "float32", "own_dtype"]
)
def test_scales(cuda_ops, dtype: torch.dtype, name: str, layout: str, scales: torch.dtype | None) -> None:
    problem, source = Problem.of(SIZES[name], dtype, layout=layout), generator(1)
    in_scale = random(source, *problem.x.shape[1:], dtype=scales or dtype, strided=layout == "shuffled")
    tensors = [torch.tensor(1.5 - index, dtype=scales or dtype) for index in range(len(problem.factors))]
    problem = replace(problem, in_scale=in_scale, scale_tensors=tensors)
    assert_rounded_once(problem, problem.run(cuda_ops))


@pytest.mark.parametrize(
    "name", ["krona", "factor_8", "near_square", "mix_primes", "right_scalar", "long_columns"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_scale", [False, True], ids=["", "row_scale"])
def test_added_to_base(cuda_ops, dtype: torch.dtype, name: str, layout: str, row_scale: bool) -> None:
    problem, source = Problem.of(SIZES[name], dtype, layout=layout), generator(1)
    shape = problem.shape(problem.factors[0])
    base = laid_out(random(source, *shape, dtype=dtype), layout)
    scale = random(source, *shape[1:], dtype=torch.float32) if row_scale else None
    problem = replace(problem, base=base, out_scale=scale)
    assert_rounded_once(problem, problem.run(cuda_ops))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_in_place(cuda_ops, dtype: torch.dtype, layout: str) -> None:
    ops, device = cuda_ops
    problem = Problem.of(SIZES["near_square"], dtype)
    base = random(generator(1), *problem.shape(problem.factors[0]), dtype=dtype)
    y = laid_out(base, layout).clone(memory_format=torch.preserve_format).to(device)
    x, left = problem.x.to(device), problem.factors[0].to(device)
    ops.mix(x, [left], [problem.scales[0]], [None], None, y, None, None, [y])
    assert_rounded_once(replace(problem, base=base), [y.cpu()])


def test_bias_as_base(cuda_ops, dtype: torch.dtype) -> None:
    problem = Problem.of(SIZES["factor_8"], dtype)
    shape = problem.shape(problem.factors[0])
    bias = random(generator(1), *shape[1:], dtype=dtype).expand(shape)
    problem = replace(problem, base=bias)
    assert_rounded_once(problem, problem.run(cuda_ops))


@pytest.mark.parametrize("op", ["shrink", "mix"])
@pytest.mark.parametrize("empty", ["tokens", "left", "right", "factor"])
def test_empty(cuda_ops, dtype: torch.dtype, op: str, empty: str) -> None:
    sizes = Sizes(
        op,
        0 if empty == "tokens" else 5,
        0 if empty == "left" else 4,
        0 if empty == "right" else 24,
        (0,) if empty == "factor" else (6, 3),
    )
    problem = Problem.of(sizes, dtype)
    assert_rounded_once(problem, problem.run(cuda_ops))


def test_few_long_rows_are_split(cuda_ops, dtype: torch.dtype) -> None:
    ops, device = cuda_ops
    x, down = (
        torch.zeros(2, 1, 40000, dtype=dtype, device=device),
        torch.zeros(16, 40000, dtype=dtype, device=device),
    )
    size = ops.shrink_workspace(x, [down])
    assert size > 0
    assert size % (2 * 16) == 0
    problem = Problem.of(Sizes("shrink", 2, 1, 40000, (16, 5)), dtype)
    for splits in (True, False):
        assert_rounded_once(problem, problem.run(cuda_ops, splits))
    assert ops.shrink_workspace(x.new_zeros(4096, 1, 320), [down[:, :320]]) == 0
    with_base = Problem.of(Sizes("mix", 1, 9000, 40, (24,)), dtype)
    assert ops.mix_workspace(with_base.x.to(device), [with_base.factors[0].to(device)]) > 0
    shape = with_base.shape(with_base.factors[0])
    with_base = replace(
        with_base, base=random(generator(2), *shape, dtype=dtype), out_scale=random(generator(3), *shape[1:])
    )
    assert_rounded_once(with_base, with_base.run(cuda_ops))


@pytest.mark.parametrize("sizes", [Sizes("shrink", 3, 1, 64, (8,)), Sizes("mix", 2, 3, 16, (8,))], ids=str)
def test_offsets_past_int32(cuda_ops, sizes: Sizes) -> None:
    problem = Problem.of(sizes, torch.float16)
    far = 2**30 + 8
    # Of this memory few pages are touched.
    whole = torch.empty(2 * far + 2**12, dtype=torch.float16, device=cuda_ops.device)
    x = whole.as_strided(problem.x.shape, (far, 64, 1) if sizes.op == "shrink" else (16, far, 1))
    x.copy_(problem.x)
    factors = [each.to(cuda_ops.device) for each in problem.factors]
    out = whole[2**11 :].as_strided(
        problem.shape(factors[0]), (far, 8, 1) if sizes.op == "shrink" else (128, 16, 1)
    )
    none: list[Tensor | None] = [None]
    if sizes.op == "shrink":
        cuda_ops.ops.shrink(x, factors, [0.7], none, None, None, [out])
    else:
        cuda_ops.ops.mix(x, factors, [0.7], none, None, None, None, None, [out])
    assert_rounded_once(problem, [out.cpu()])


@pytest.mark.parametrize("name", ["low_rank", "krona", "long_rows"])
def test_repeatable(cuda_ops, dtype: torch.dtype, name: str) -> None:
    problem = Problem.of(SIZES[name], dtype)
    first, second = problem.run(cuda_ops), problem.run(cuda_ops)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_random_calls(cuda_ops) -> None:
    source = generator(5)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=source))]

    for _ in range(150):
        sizes = Sizes(
            draw("shrink", "mix"),
            draw(1, 2, 7, 40),
            draw(1, 2, 3, 4, 8, 20, 33, 64),
            draw(1, 2, 4, 6, 8, 20, 24, 40, 65, 96, 130),
            tuple(draw(1, 4, 8, 9, 16, 20, 33, 100) for _ in range(draw(1, 1, 2, 4))),
        )
        problem = Problem.of(sizes, draw(*DTYPES), draw(None, torch.float32), draw(*LAYOUTS))
        if draw(False, True):
            problem = replace(problem, in_scale=random(source, *sizes[2:4], dtype=torch.float32))
        print(sizes)
        assert_rounded_once(problem, problem.run(cuda_ops, draw(False, True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float16)}, "x must have 3 dimensions; got \\(2, 8\\)"),
        ({"x": torch.zeros(2, 3, 8)}, "x must be float16 or bfloat16; got float32"),
        ({"factors": [torch.zeros(4, 7, dtype=torch.float16)]}, "with I = 8, .* got \\(4, 7\\)"),
        (
            {"factors": [torch.zeros(4, 8, dtype=torch.bfloat16)]},
            "of x's dtype, float16, or float32; got bfloat16",
        ),
        (
            {"factors": [torch.zeros(4, 8)] * 9, "scales": [1.0] * 9, "scale_tensors": [None] * 9},
            "1 to 8 .* got 9",
        ),
        ({"scales": [1.0, 2.0]}, "got 1 factors, 2 scales"),
        ({"scale_tensors": [torch.ones(2)]}, "one element; got \\(2\\)"),
        ({"in_scale": torch.ones(8, 3)}, "in_scale must be .* \\(3, 8\\); got \\(8, 3\\)"),
        ({"outs": [torch.zeros(2, 3, 5, dtype=torch.float16)]}, "\\(2, 3, 4\\) .* got \\(2, 3, 5\\)"),
        ({"outs": [torch.zeros(2, 3, 4)]}, "x's dtype, float16; got float32"),
        ({"outs": [torch.zeros(1, 3, 4, dtype=torch.float16).expand(2, 3, 4)]}, "must not overlap"),
    ],
)
def test_rejects(cuda_ops, change: dict, message: str) -> None:
    problem = Problem("shrink", torch.zeros(2, 3, 8, dtype=torch.float16), [torch.zeros(4, 8)], [1.0], [None])
    problem = replace(problem, **change)
    outs = [each.to(cuda_ops.device) for each in problem.outs] or [
        torch.zeros(2, 3, each.shape[0], dtype=torch.float16, device=cuda_ops.device)
        for each in problem.factors
    ]
    with pytest.raises(RuntimeError, match=message):
        replace(problem, outs=outs).run(cuda_ops, splits=False)


def test_rejects_base_of_another_shape(cuda_ops) -> None:
    problem = Problem.of(SIZES["factor_4"], torch.float16)
    with pytest.raises(RuntimeError, match="base must be as the output"):
        replace(problem, base=torch.zeros(5, 4, 31, dtype=torch.float16)).run(cuda_ops)
    with pytest.raises(RuntimeError, match="out_scale must be as the output"):
        replace(problem, out_scale=torch.zeros(4, 31)).run(cuda_ops)
    several = Problem.of(SIZES["left_q_k_v"], torch.float16)
    with pytest.raises(RuntimeError, match="base and out_scale are for one factor; got 3"):
        replace(several, out_scale=torch.zeros(80, 24)).run(cuda_ops)


def test_rejects_small_workspace(cuda_ops) -> None:
    ops, device = cuda_ops
    problem = Problem.of(Sizes("shrink", 2, 1, 40000, (16,)), torch.float16)
    x, down = problem.x.to(device), problem.factors[0].to(device)
    out = x.new_zeros(2, 1, 16)
    with pytest.raises(RuntimeError, match=r"workspace must be [0-9]+ contiguous elements"):
        ops.shrink(x, [down], [1.0], [None], None, torch.zeros(3, device=device), [out])
