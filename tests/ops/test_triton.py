"""The four primitives of the Triton kernels against those of `eager` in float64, and the op that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronafuse import FrozenLinear, KronTerm, kron_linear_group
from kronafuse.ops import launch as launching
from kronafuse.ops.kron_linear import eager, kernels, reduction_tuning, tuning
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.route import forced
from kronafuse.ops.kron_linear.tails import BLOCK_TAIL, ELEMENTWISE_TAIL, MIX_TAIL
from kronafuse.ops.outputs import new_output, poisoned
from kronafuse.testing.accuracy import check_group
from kronafuse.testing.cases import ODD_CASES
from kronafuse.testing.inputs import case_inputs, generator, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SPACINGS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
"""Largest error of a primitive, in spacings of its dtype at the largest element of the result."""
TOKENS = 19


@pytest.fixture(params=["chosen", "small"], autouse=True)
def configurations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the rule's tiles and with tiles so small that each loop and each grid repeats."""
    if request.param == "chosen":
        return
    chosen = tuning.linear_config

    def linear_config(*arguments: Any) -> tuning.LinearConfig:
        return replace(chosen(*arguments), block_m=16, block_n=16, block_k=16, block_r=16, group_m=2)

    def shrink_config(
        _dtype: torch.dtype, _rows: int, _width: int, features: int
    ) -> reduction_tuning.ShrinkConfig:
        steps = tuning.blocks(tuning.blocks(features, 16), 3)
        return reduction_tuning.ShrinkConfig(
            16, 16, 16, tuning.blocks(features, steps * 16), steps * 16, 4, 2
        )

    def reduce_config(*_sizes: Any) -> reduction_tuning.ReduceConfig:
        return reduction_tuning.ReduceConfig(16, 16, 16, 3, 4, 2)

    monkeypatch.setattr(tuning, "linear_config", linear_config)
    monkeypatch.setattr(reduction_tuning, "shrink_config", shrink_config)
    monkeypatch.setattr(
        reduction_tuning, "mix_config", lambda *_sizes: reduction_tuning.MixConfig(32, 16, 16, 4, 2)
    )
    monkeypatch.setattr(reduction_tuning, "reduce_config", reduce_config)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Inputs:
    """Random tensors of one dtype from one seed, on the device under test."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.source = dtype, generator(seed)

    def __call__(self, *shape: int, strided: bool = False) -> Tensor:
        return random(self.source, *shape, dtype=self.dtype, strided=strided).to(DEVICE)

    def kron(
        self,
        order: str,
        left: tuple[int, int],
        right: tuple[int, int],
        *,
        rank: int | None = None,
        thin: bool = False,
        has_a: bool = True,
        scale: float | Tensor = 0.7,
        transposed: bool = False,
        **sides: Any,
    ) -> KronMap:
        """A map (O1, I1) ⊗ (O2, I2), or with B (O2, R) · (R, I2)."""

        def matrix(rows: int, columns: int) -> Tensor:
            return self(columns, rows).t() if transposed else self(rows, columns)

        b = matrix(right[0], right[1] if rank is None else rank)
        b_down = None if rank is None else matrix(rank, right[1])
        a = matrix(*left) if has_a else None
        return KronMap(a, b, b_down, scale, order, thin, **sides)  # pyright: ignore[reportArgumentType]


def double(value: Any) -> Any:
    """The same in float64: a tensor, a map or a list of them."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, KronMap):
        return KronMap(*(double(getattr(value, each.name)) for each in fields(value)))
    return [double(each) for each in value] if isinstance(value, list) else value


def assert_close(actual: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Fails where an element of `actual` is NaN or further from `truth` than SPACINGS."""
    assert actual.shape == truth.shape
    assert actual.is_contiguous()
    if truth.numel() == 0:
        return
    error = (actual.double() - truth).abs().max().item()
    limit = SPACINGS[dtype] * torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= limit, f"error {error:.3e}, limit {limit:.3e}"  # False for NaN


def assert_shrink(x: Tensor, maps: Sequence[KronMap]) -> None:
    with poisoned():
        actual = kernels.shrink(x, list(maps))
    truth = eager.shrink(x.double(), double(list(maps)))
    storages = {part.untyped_storage().data_ptr() for part in actual}
    assert len(storages) == len(actual), "the results share memory"
    for part, expected in zip(actual, truth, strict=True):
        assert part.dtype == x.dtype
        assert_close(part, expected, x.dtype)


def assert_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    maps: Sequence[KronMap],
    inners: Any,
) -> None:
    with poisoned():
        actual = kernels.linear(x, weight, bias, base, list(maps), inners)
    truth = eager.linear(*double([x, weight, bias, base, list(maps), inners]))
    assert actual.dtype == x.dtype
    assert_close(actual, truth, x.dtype)


def test_poisoned_outputs_are_filled():
    with poisoned():
        assert new_output(torch.ones(2, device=DEVICE), (3,)).isnan().all()


SHAPES = {
    "a_first": {"order": "a_first", "left": (3, 20), "right": (5, 7)},
    "a_first_wide": {"order": "a_first", "left": (40, 7), "right": (5, 48)},
    "b_first": {"order": "b_first", "left": (6, 4), "right": (5, 37)},
    "b_first_wide": {"order": "b_first", "left": (2, 3), "right": (40, 33)},
    "low_rank": {"order": "low_rank", "left": (4, 6), "right": (7, 20), "rank": 3},
    "lora": {"order": "low_rank", "left": (1, 1), "right": (24, 40), "rank": 5, "has_a": False},
    "a_scalar": {"order": "a_first", "left": (1, 1), "right": (24, 40)},
    "b_scalar": {"order": "a_first", "left": (24, 40), "right": (1, 1)},
    "b_scalar_b_first": {"order": "b_first", "left": (24, 40), "right": (1, 1)},
}
"""Maps of every order, with sizes of one, primes, and more than one block of everything."""


KINDS = [(shape, thin) for shape in SHAPES for thin in (False, True) if not (thin and shape.endswith("wide"))]
"""Shapes with and without the dense forms of thin maps."""


def in_features(kron: KronMap) -> int:
    return kron.left[1] * kron.right[1]


def out_features(kron: KronMap) -> int:
    return kron.left[0] * kron.right[0]


@pytest.mark.parametrize(("shape", "thin"), KINDS)
def test_shrink(shape, thin, dtype):
    inputs = Inputs(dtype)
    kron = inputs.kron(**SHAPES[shape], thin=thin)
    assert_shrink(inputs(TOKENS, in_features(kron)), [kron])


@pytest.mark.parametrize("thin", [False, True], ids=["fat", "thin"])
@pytest.mark.parametrize("shape", ["a_first", "b_first", "low_rank", "lora"])
def test_shrink_shuffled_strided_scaled(shape, thin, dtype):
    """Shuffled x with gaps, a scale per feature, transposed factors, a tensor scale."""
    inputs = Inputs(dtype)
    scale = torch.tensor(0.3, device=DEVICE)
    kron = inputs.kron(**SHAPES[shape], thin=thin, scale=scale, transposed=True, in_shuffled=True)
    in_scale = random(inputs.source, in_features(kron), dtype=torch.float32, strided=True).to(DEVICE)
    assert_shrink(inputs(TOKENS, in_features(kron), strided=True), [replace(kron, in_scale=in_scale)])


def group(inputs: Inputs, names: Sequence[str], **options: Any) -> list[KronMap]:
    """Thin maps of the same 60 features."""
    shapes = {
        "a_first": {"order": "a_first", "left": (3, 20), "right": (5, 3)},
        "b_first": {"order": "b_first", "left": (6, 4), "right": (5, 15)},
        "b_first_other": {"order": "b_first", "left": (6, 4), "right": (3, 15)},
        "low_rank": {"order": "low_rank", "left": (4, 4), "right": (7, 15), "rank": 3},
        "lora": {"order": "low_rank", "left": (1, 1), "right": (24, 60), "rank": 5, "has_a": False},
        "fat": {"order": "a_first", "left": (20, 20), "right": (3, 3), "thin": False},
    }
    return [
        inputs.kron(**{"thin": True, **shapes[name]}, scale=0.5 + index, **options)
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("b_first", "b_first_other", "low_rank"),
        ("lora", "lora", "lora"),
        ("a_first", "b_first", "fat", "lora", "low_rank"),
        ("a_first",) * (kernels.SLOTS + 2),
    ],
    ids=["same_rows", "lora", "mixed", "more_than_slots"],
)
def test_shrink_group(names, dtype):
    """Several maps of one x: stacked where their rows agree, dense otherwise, in more launches than one if need be."""
    inputs = Inputs(dtype)
    assert_shrink(inputs(TOKENS, 60), group(inputs, names))


def test_one_launch_serves_a_group():
    """q, k and v: one launch reads x, whatever their orders."""
    inputs = Inputs(torch.float32)
    x = inputs(64, 60)
    for names, launches in (
        (("b_first",) * 3, ["_shrink"]),
        (("a_first",) * 3, ["_mix"]),
        (("a_first", "b_first", "lora"), ["_dense"] * 3 + ["_shrink"]),
    ):
        with launching.recording(launching.Architecture(90, 132)) as recorded:
            kernels.shrink(x, group(inputs, names))
        kinds = [launch.kernel.__name__.removesuffix("_kernel") for launch in recorded]
        assert [kind for kind in kinds if kind != "_sum"] == launches


@pytest.mark.parametrize("sizes", [(4, 6, 3), (40, 20, 5), (1, 8, 1), (3, 1, 17)])
def test_mix(sizes, dtype):
    inputs = Inputs(dtype)
    out, left, columns = sizes
    for p, a, scale in (
        (inputs(TOKENS, left, columns), inputs(out, left), 0.7),
        (inputs(TOKENS, columns, left).mT, inputs(left, out).t(), torch.tensor(0.2, device=DEVICE)),
    ):
        with poisoned():
            actual = kernels.mix(p, a, scale)
        assert_close(actual, eager.mix(p.double(), a.double(), double(scale)), dtype)


@pytest.mark.parametrize(("shape", "thin"), KINDS)
def test_linear(shape, thin, dtype):
    """Every kind of tail behind a GEMM with a bias."""
    inputs = Inputs(dtype)
    kron = inputs.kron(**SHAPES[shape], thin=thin)
    x, weight = inputs(TOKENS, 30), inputs(out_features(kron), 30)
    inner = inputs(TOKENS, kron.inner[0] * kron.inner[1])
    assert_linear(x, weight, inputs(out_features(kron)), None, [kron], [inner])


@pytest.mark.parametrize(
    ("shape", "thin"), [kind for kind in KINDS if kind[0] not in ("b_first_wide", "a_scalar")]
)
def test_linear_shuffled_strided_scaled(shape, thin, dtype):
    """Shuffled y, a scale per feature, everything with gaps, W transposed, a base, a second and a third term."""
    inputs = Inputs(dtype)
    kron = inputs.kron(**SHAPES[shape], thin=thin, transposed=True, out_shuffled=True)
    out, width = out_features(kron), kron.inner[0] * kron.inner[1]
    kron = replace(kron, out_scale=random(inputs.source, out, dtype=torch.float32, strided=True).to(DEVICE))
    x, weight = inputs(TOKENS, 30, strided=True), inputs(30, out).t()
    bias, base = inputs(out, strided=True), inputs(TOKENS, out, strided=True)
    inners = [inputs(TOKENS, width), inputs(TOKENS, width, strided=True), inputs(TOKENS, width)]
    assert_linear(x, weight, bias, base, [kron] * 3, inners)


@pytest.mark.parametrize("shape", ["a_first", "b_first", "lora"])
def test_linear_without_weight(shape, dtype):
    """The delta alone, with a base, and a base alone; x is not read."""
    inputs = Inputs(dtype)
    kron = inputs.kron(**SHAPES[shape])
    x = torch.full((TOKENS, in_features(kron)), float("nan"), dtype=dtype, device=DEVICE)
    inner, base = inputs(TOKENS, kron.inner[0] * kron.inner[1]), inputs(TOKENS, out_features(kron))
    assert_linear(x, None, None, None, [kron], [inner])
    assert_linear(x, None, inputs(out_features(kron)), base, [kron], [inner])
    assert_linear(x, None, None, base, [], [])


@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "weight_transposed"])
@pytest.mark.parametrize("tail", ["none", "b_first", "a_first", "low_rank"])
def test_linear_with_descriptors(tail, transposed, dtype, monkeypatch):
    """Tiles of x and W by tensor descriptors, fewer programs than tiles."""
    monkeypatch.setattr(launching, "INTERPRETER", launching.Architecture(90, 2))
    inputs, out, columns = Inputs(dtype), 72, 40
    shapes = {
        "b_first": ("b_first", (8, 4), (9, 10), None),
        "a_first": ("a_first", (2, 4), (36, 10), None),
        "low_rank": ("low_rank", (8, 4), (9, 10), 3),
    }
    maps = []
    if tail != "none":
        order, left, right, rank = shapes[tail]
        maps = [inputs.kron(order, left, right, rank=rank)]
    inners = [inputs(TOKENS, kron.inner[0] * kron.inner[1]) for kron in maps]
    weight = inputs(columns, out).t() if transposed else inputs(out, columns)
    x = inputs(TOKENS, columns)
    with forced(base="fused"):
        with launching.recording(launching.Architecture(90, 2)) as recorded:
            kernels.linear(x, weight, None, None, maps, inners)
        assert recorded[-1].constants["DESCRIPTORS"]
        assert_linear(x, weight, inputs(out), None, maps, inners)


def test_descriptors_only_where_memory_allows():
    """Rows not aligned to 16 bytes, gaps between columns and rows that overlap go by pointers."""
    with launching.recording(launching.Architecture(90, 132)) as recorded, forced(base="fused"):
        weight, x = torch.empty(64, 40), torch.empty(8, 40)
        kernels.linear(x, weight, None, None, [], [])
        kernels.linear(torch.empty(8, 42)[:, :40], weight, None, None, [], [])
        kernels.linear(torch.empty(8, 80)[:, ::2], weight, None, None, [], [])
        kernels.linear(x[:1].expand(8, 40), weight, None, None, [], [])
        kernels.linear(x.t().contiguous().t(), weight, None, None, [], [])
    assert [launch.constants["DESCRIPTORS"] for launch in recorded] == [True, False, False, False, False]


def test_every_structured_tail_is_reached():
    kinds = set()
    for shape in SHAPES:
        inputs = Inputs(torch.float32)
        kron = inputs.kron(**SHAPES[shape])
        with launching.recording(launching.Architecture(80, 108)) as recorded:
            kernels.linear(
                inputs(TOKENS, 8), None, None, None, [kron], [inputs(TOKENS, kron.inner[0] * kron.inner[1])]
            )
        kinds |= {launch.constants["TAIL"] for launch in recorded}
    assert kinds == {BLOCK_TAIL.value, MIX_TAIL.value, ELEMENTWISE_TAIL.value}


@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 40, 20), (20, 4, 33), (4, 1, 1)])
@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
def test_reduce(sizes, tokens, dtype):
    """Plain and transposed views, a scale per row of p, float and tensor scales, gradients of another dtype."""
    inputs = Inputs(dtype)
    groups, height, width = sizes
    p, q = inputs(tokens, groups, height), inputs(tokens, groups, width)
    p_scale = random(inputs.source, groups, height, dtype=torch.float32, strided=True).to(DEVICE)
    views = (inputs(tokens, height, groups, strided=True).mT, inputs(tokens, width, groups).mT)
    tensor_scale = torch.tensor(1.7, device=DEVICE)
    for left, right, scale, out, rows in (
        (p, q, 1.0, dtype, None),
        (p, q, 0.3, torch.float32, p_scale),
        (*views, tensor_scale, torch.float32, None),
        (*views, tensor_scale, dtype, p_scale.t().contiguous().t()),
    ):
        with poisoned():
            actual = kernels.reduce(left, right, scale, out, rows)
        assert actual.dtype == out
        truth = eager.reduce(left.double(), right.double(), double(scale), torch.float64, double(rows))
        assert_close(actual, truth, dtype)


def test_reduce_repeats(dtype):
    inputs = Inputs(dtype)
    p, q = inputs(300, 4, 20), inputs(300, 4, 30)
    first, second = (kernels.reduce(p, q, 0.5, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("shape", ["a_first", "b_first", "low_rank", "lora"])
def test_empty_and_single_token(shape, tokens):
    inputs = Inputs(torch.float32)
    kron = inputs.kron(**SHAPES[shape])
    x, weight = inputs(tokens, in_features(kron)), inputs(out_features(kron), in_features(kron))
    assert_shrink(x, [kron])
    inner = inputs(tokens, kron.inner[0] * kron.inner[1])
    assert_linear(x, weight, None, None, [kron], [inner])


def apart(inputs: Inputs, width: int) -> Tensor:
    """(3, width), the first and the last row 2³¹ elements apart, by a stride that itself fits 32 bits.

    Memory between the rows is never touched.
    """
    buffer = torch.empty(2**31 + width, dtype=inputs.dtype, device=DEVICE)
    view = buffer.as_strided((3, width), (2**30, 1))
    return view.copy_(inputs(3, width))


def test_past_int32(configurations):
    """Every primitive on tokens 2³¹ elements apart."""
    inputs = Inputs(torch.float16)
    x = apart(inputs, 60)
    for name in ("a_first", "b_first", "fat"):
        assert_shrink(x, group(inputs, [name]))
    kron = inputs.kron("b_first", (6, 4), (5, 15))
    assert_linear(x, inputs(30, 60), None, None, [kron], [inputs(3, 20)])
    view = x.unflatten(1, (4, 15))
    assert_close(
        kernels.reduce(view, view, 1.0, torch.float32),
        eager.reduce(view.double(), view.double(), 1.0, torch.float64),
        torch.float16,
    )


def test_base_and_inner_past_int32():
    inputs = Inputs(torch.float16)
    kron = inputs.kron("a_first", (4, 4), (15, 15))
    wide = apart(inputs, 60)
    assert_linear(inputs(3, 60), None, None, wide, [kron], [wide])


def triton_group(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    with poisoned():
        return kron_linear_group(x, layers, impl="triton")


OP_CASES = [
    "primes_shuffled",
    "thin_b_first",
    "thin_a_first_shuffled",
    "fat_b_first",
    "low_rank",
    "low_rank_fat",
    "lora",
]


@pytest.mark.parametrize("case", OP_CASES)
def test_op(case, dtype):
    """y and every gradient, with bias, base, row scale, tensor scale and two terms."""
    x, layer = case_inputs(
        ODD_CASES[case],
        dtype,
        tokens=9,
        base=True,
        row_scale=True,
        scale=torch.tensor(0.6),
        terms=2,
        strided=True,
    )
    check_group(triton_group, *to_device(x, [layer]))


def test_op_with_descriptors(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETER", launching.Architecture(90, 2))
    for case in ("thin_b_first", "fat_a_first", "low_rank"):
        check_group(triton_group, *to_device(*listed(case_inputs(ODD_CASES[case], torch.float32, tokens=9))))


def test_op_group(dtype):
    """Three layers of one x with different adapters; the third has none."""
    inputs = Inputs(dtype)
    x = inputs(9, 48)
    thin = KronTerm(inputs(8, 2), inputs(4, 24), None, 0.3)
    fat = KronTerm(inputs(6, 6), inputs(5, 8), None, torch.tensor(0.2, device=DEVICE))
    lora = KronTerm(None, inputs(30, 4), inputs(4, 48), 0.5)
    layers = [
        FrozenLinear(inputs(32, 48), (thin,), inputs(32)),
        FrozenLinear(inputs(30, 48), (fat, lora), None, inputs(9, 30)),
        FrozenLinear(inputs(7, 48)),
    ]
    check_group(triton_group, x, layers)


def listed(pair: tuple[Tensor, FrozenLinear]) -> tuple[Tensor, list[FrozenLinear]]:
    return pair[0], [pair[1]]


def to_device(x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, list[FrozenLinear]]:
    def move(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    moved = []
    for layer in layers:
        terms = tuple(KronTerm(*map(move, term)) for term in layer.terms)
        moved.append(FrozenLinear(move(layer.weight), terms, move(layer.bias), move(layer.base)))
    return move(x), moved


FORBIDDEN = (
    "mm",
    "bmm",
    "addmm",
    "addmv",
    "addbmm",
    "baddbmm",
    "matmul",
    "linear",
    "einsum",
    "mv",
    "dot",
    "tensordot",
)


@pytest.mark.parametrize("case", ["thin_b_first", "thin_a_first", "fat_a_first", "low_rank", "lora"])
def test_no_torch_gemm(case):
    """Forward and backward without one matrix product of torch."""
    x, layer = case_inputs(
        ODD_CASES[case], torch.float32, tokens=5, base=True, row_scale=True, scale=torch.tensor(0.5)
    )
    x, (layer,) = to_device(x, [layer])
    leaves = [x, layer.base, *(part for part in layer.terms[0] if isinstance(part, Tensor))]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kron_linear_group(x, [layer], impl="triton")[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any("kron_backward" in name for name in names)
    assert not {f"aten::{name}" for name in FORBIDDEN} & names


def test_profiler_would_show_a_gemm():
    """The names that the test above looks for are those that torch records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kron = Inputs(torch.float32).kron("b_first", (4, 4), (5, 5))
        eager.shrink(torch.ones(3, 20, device=DEVICE), [kron])
    assert {"aten::addmm", "aten::mm"} & {event.key for event in profile.key_averages()}


def test_tf32_follows_both_settings_of_torch():
    """torch.get_float32_matmul_precision() raises where the newer setting was used."""
    from kronafuse.ops.triton_common import dot_precision

    def found() -> str:
        assert dot_precision(torch.float16) == "ieee"
        return dot_precision(torch.float32)

    matmul = torch.backends.cuda.matmul
    before, others = matmul.fp32_precision, torch.backends.fp32_precision
    assert found() == "ieee"
    try:
        for older, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(older)
            assert found() == expected
        for newer in ("tf32", "ieee"):
            matmul.fp32_precision = newer
            assert found() == newer
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert found() == "tf32"
    finally:
        torch.backends.fp32_precision = others
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_shipped_configurations_are_valid():
    """Every tile of every architecture passes its own predicate; one too large is refused with the numbers."""
    for capability in tuning.SHARED_BYTES:
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            architecture = launching.Architecture(capability, 100)
            for tile in tuning.tiles_of(architecture, kind, capability >= 90):
                config = tuning.LinearConfig(
                    tile.block_m, tile.block_n, tile.block_k, 32, 8, tile.warps, tile.stages, capability >= 90
                )
                assert config.reasons(architecture, kind) == []
    wide = tuning.LinearConfig(256, 256, 64, 32, 8, 8, 4, True)
    reasons = wide.reasons(launching.Architecture(86, 84), torch.bfloat16)
    assert len(reasons) == 3
    assert "262144 bytes of shared memory, sm_86 has 101376" in reasons[0]
