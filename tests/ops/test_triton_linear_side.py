"""The linear side of the Triton kernels: fat terms in one pass, torch's GEMM with the delta behind it, their choice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from math import gcd
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronafuse import FrozenLinear, kron_linear_group
from kronafuse.ops import launch as launching
from kronafuse.ops import tuned
from kronafuse.ops.kron_linear import eager, kernels, one_pass_tuning, route, tuning
from kronafuse.ops.kron_linear.algorithm import forward
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.one_pass_kernel import linear_in_one_pass
from kronafuse.ops.kron_linear.tails import BLOCK_TAIL, NO_TAIL
from kronafuse.ops.kron_linear.terms import KronTerm
from kronafuse.ops.launch import Architecture, Launch, recording
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.accuracy import check_group
from kronafuse.testing.cases import CASES, ODD_CASES, Case
from kronafuse.testing.inputs import case_inputs, generator, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SPACINGS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
"""Largest error, in spacings of the dtype at the largest element of the result."""
TOKENS = 19
H200 = Architecture(90, 132)
DESCRIBES = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
"""Whether the device under test takes descriptors, as the interpreter does."""


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Inputs:
    """Random tensors of one dtype from one seed, on the device under test."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.source = dtype, generator(0)

    def __call__(self, *shape: int, strided: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        return random(self.source, *shape, dtype=dtype or self.dtype, strided=strided).to(DEVICE)

    def fat(
        self, left: tuple[int, int], right: tuple[int, int], *, scaled: bool = False, **options: Any
    ) -> KronMap:
        """A fat map A (O1, I1) ⊗ B (O2, I2); scaled: with a scale per feature on either side."""
        if scaled:
            options["in_scale"] = self(left[1] * right[1], strided=True, dtype=torch.float32)
            options["out_scale"] = self(left[0] * right[0], strided=True, dtype=torch.float32)
        return KronMap(
            self(*left), self(*right), None, options.pop("scale", 0.7), "a_first", False, **options
        )


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


def routed(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    with poisoned():
        return kron_linear_group(x, layers, impl="triton")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Backward in the calling thread, where the forced routes are known on a GPU too."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


ROUTES = list(product(route.FatRoute.FORMS, route.BaseRoute.FORMS))
FAT_CASES = [
    "primes",
    "primes_shuffled",
    "a_scalar",
    "fat_b_first",
    "fat_b_first_shuffled",
    "fat_a_first",
    "low_rank_fat",
    "thin_b_first",
    "one_token",
    "empty",
]


def to_device(x: Tensor, layer: FrozenLinear) -> tuple[Tensor, list[FrozenLinear]]:
    def move(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    terms = tuple(KronTerm(*map(move, term)) for term in layer.terms)
    return move(x), [FrozenLinear(move(layer.weight), terms, move(layer.bias), move(layer.base))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("routes", ROUTES, ids=lambda routes: "-".join(routes))
@pytest.mark.parametrize("case", FAT_CASES)
def test_op_by_every_route(case, routes, dtype):
    """y and every gradient, with bias, base, row scale, tensor scale and two terms."""
    options: dict[str, Any] = {"tokens": 9, "row_scale": True, "scale": torch.tensor(0.6), "terms": 2}
    x, layers = to_device(*case_inputs(ODD_CASES[case], dtype, base=True, strided=True, **options))
    with route.forced(fat=routes[0], base=routes[1]):
        check_group(routed, x, layers)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("routes", ROUTES, ids=lambda routes: "-".join(routes))
def test_delta_alone_by_every_route(routes, dtype):
    """W = 0: nothing hides the delta."""
    x, layers = to_device(*case_inputs(ODD_CASES["fat_a_first"], dtype, bias=False))
    assert layers[0].weight is not None
    layers = [layers[0]._replace(weight=torch.zeros_like(layers[0].weight))]
    with route.forced(fat=routes[0], base=routes[1]):
        check_group(routed, x, layers)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("wanted", ["x", "a0.0", "b0.0"])
@pytest.mark.parametrize("fat", route.FatRoute.FORMS)
def test_each_gradient_alone(fat, wanted):
    x, layers = to_device(*case_inputs(ODD_CASES["fat_a_first"], torch.float32))
    with route.forced(fat=fat):
        check_group(routed, x, layers, wanted=[wanted])


@pytest.mark.usefixtures("one_thread")
def test_op_with_descriptors_by_one_pass(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETER", Architecture(90, 2))
    for name in ("fat_a_first", "a_scalar"):
        x, layers = to_device(*case_inputs(ODD_CASES[name], torch.float32, tokens=9))
        with route.forced(fat="one_pass"):
            check_group(routed, x, layers)


def names_of(recorded: Sequence[Launch]) -> list[str]:
    return [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in recorded]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def adapted(case: Case, terms: int = 1) -> tuple[Tensor, FrozenLinear]:
    """x and a layer of the case on meta tensors."""
    shape = case.shape
    a = meta(shape.n1, shape.k1) if case.has_a else None
    b = meta(shape.n2, shape.rank or shape.k2)
    term = KronTerm(a, b, None if shape.rank is None else meta(shape.rank, shape.k2), 0.5, case.shuffled)
    return meta(4096, shape.k), FrozenLinear(meta(shape.n, shape.k), (term,) * terms, meta(shape.n))


def test_fat_forward_is_one_launch():
    """No U, no V: one kernel by one pass, the first product and the GEMM by two; the second term goes into y."""
    x, layer = adapted(CASES["sdxl_1280-lokr_f8"])
    found = []
    for fat in route.FatRoute.FORMS:
        with recording(H200) as recorded, route.forced(fat=fat):
            forward(x, [layer], kernels)
        found.append(names_of(recorded))
    assert found == [["one_pass"], ["mix", "linear"]]
    x, layer = adapted(CASES["sdxl_1280-lokr_f8"], terms=2)
    with recording(H200) as recorded, route.forced(fat="one_pass"):
        (y,), _ = forward(x, [layer], kernels)
    assert names_of(recorded) == ["one_pass", "one_pass"]
    assert [launch.arguments["y_ptr"] is y for launch in recorded] == [True, True]
    assert recorded[0].arguments["weight"] is not None
    assert recorded[1].arguments["weight"] is None
    assert recorded[1].arguments["base_ptr"] is y


def test_torch_base_needs_no_second_result():
    """The delta is added to the y that torch's GEMM wrote; a bias is torch's unless a base takes its place."""
    inputs = Inputs(torch.float32)
    kron = inputs.fat((4, 3), (8, 5))
    x, weight, bias, base = inputs(TOKENS, 15), inputs(32, 15), inputs(32), inputs(TOKENS, 32)
    for given, left in ((None, None), (base, bias)):
        with recording(Architecture(80, 108)) as recorded, route.forced(base="torch"):
            y = kernels.linear(x, weight, bias, given, [kron], [inputs(TOKENS, 20)])
        assert names_of(recorded) == ["linear"]
        arguments = recorded[0].arguments
        assert arguments["weight"] is None
        assert arguments["base_ptr"] is arguments["y_ptr"] is y
        assert arguments["bias_ptr"] is left
    with recording(Architecture(80, 108)) as recorded, route.forced(base="torch"):
        kernels.linear(x, weight, bias, None, [], [])
    assert recorded == []


@pytest.mark.parametrize("fat", [None, *route.FatRoute.FORMS])
def test_base_is_not_changed(fat):
    """What the caller gave stays as it is, whatever is added in place."""
    x, layers = to_device(*case_inputs(ODD_CASES["fat_a_first"], torch.float32, base=True, terms=2))
    base = layers[0].base
    assert base is not None
    before = base.clone()
    for form in route.BaseRoute.FORMS:
        with route.forced(fat=fat, base=form):
            routed(x, layers)
    assert torch.equal(base, before)


def test_base_rule():
    """torch's GEMM where nothing is fused and in fp32, both only where the GEMM is large; else the fused kernel."""
    large, small = (4096, 1280, 1280), (77, 640, 640)
    for sizes, dtype, terms, expected in (
        (large, torch.bfloat16, 1, False),
        (large, torch.bfloat16, 0, True),
        (large, torch.float32, 1, True),
        (small, torch.bfloat16, 0, False),
        (small, torch.float32, 1, False),
    ):
        assert route.base_by_torch(H200, dtype, *sizes, False, terms) is expected, (sizes, dtype, terms)


def fat_term(name: str, tokens: int) -> route.FatTerm:
    shape = CASES[name].shape
    return route.FatTerm(
        tokens, (shape.n1, shape.k1), (shape.n2, shape.k2), "a_first", True, False, True, True, False
    )


def test_fat_rule_takes_the_lesser_prediction():
    taken = set()
    for name in ("sdxl_1280-lokr_f4", "sdxl_1280-lokr_f8", "sdxl_1280-lokr_square"):
        term = fat_term(name, 4096)
        one_pass, two_kernels = route.predicted_us(H200, torch.bfloat16, term)
        found = route.in_one_pass(H200, torch.bfloat16, term)
        assert found is (one_pass < two_kernels)
        taken.add(found)
    assert taken == {True, False}
    kept = fat_term("sdxl_1280-lokr_f8", 4096)._replace(kept=True)
    assert route.predicted_us(H200, torch.bfloat16, kept)[1] < two_kernels_us("sdxl_1280-lokr_f8")


def two_kernels_us(name: str) -> float:
    return route.predicted_us(H200, torch.bfloat16, fat_term(name, 4096))[1]


def test_measured_rows_decide(tmp_path, monkeypatch):
    """A row of the table for this GPU and these sizes goes before the rule; one of no route is refused."""
    gpu = Architecture(90, 132, "Some GPU")
    term = fat_term("sdxl_1280-lokr_f8", 4096)
    by_rule = route.in_one_pass(gpu, torch.bfloat16, term)
    other = "two_kernels" if by_rule else "one_pass"
    sizes = (torch.bfloat16, 4096, *term.left, *term.right, "a_first", True, True, False)
    base = (torch.bfloat16, 4096, 1280, 1280, False, 1)
    origin = {
        "runner_up": None, "date": "2026-01-31", "command": "kronafuse bench tune", "commit": "0", "triton": "3"
    }  # fmt: skip
    path = tmp_path / "table.json"

    def write(fat: str) -> None:
        rows = [
            tuned.Row("fat_route", gpu.name, tuned.key_of("fat_route", sizes), {"form": fat}, 9.0, **origin),
            tuned.Row(
                "base_route", gpu.name, tuned.key_of("base_route", base), {"form": "torch"}, 9.0, **origin
            ),
        ]
        path.write_text(json.dumps({"schema": tuned.SCHEMA, "rows": [asdict(row) for row in rows]}))
        tuned.reload()

    monkeypatch.setenv(tuned.VARIABLE, str(path))
    try:
        write(other)
        assert route.in_one_pass(gpu, torch.bfloat16, term) is not by_rule
        assert route.base_by_torch(gpu, *base)
        assert not route.base_by_torch(H200, *base)
        write("three_kernels")
        with pytest.raises(
            ValueError, match="route fat must be one of one_pass, two_kernels; got 'three_kernels'"
        ):
            route.in_one_pass(gpu, torch.bfloat16, term)
    finally:
        monkeypatch.undo()
        tuned.reload()


def test_forced_rejects_unknown_routes():
    with (
        pytest.raises(ValueError, match="route base must be one of fused, torch; got 'cublas'"),
        route.forced(base="cublas"),
    ):
        pass


def test_only_plain_fat_maps_with_a_full_b_go_in_one_pass():
    inputs = Inputs(torch.float32)
    fat = inputs.fat((4, 3), (8, 5))
    others = [
        replace(fat, thin=True),
        replace(fat, b_down=inputs(5, 5), order="low_rank"),
        replace(fat, in_shuffled=True),
        replace(fat, out_shuffled=True),
    ]
    maps = [fat, *others, fat]
    with route.forced(fat="one_pass"):
        assert kernels.in_one_pass(inputs(TOKENS, 15), None, maps) == [True, *[False] * 4, True]
        assert kernels.in_one_pass(inputs(0, 15), None, maps) == [False] * 6
    assert eager.in_one_pass(inputs(TOKENS, 15), None, maps) == [False] * 6


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


TAIL_LIMIT = 1.1
"""Columns of T that a tile multiplies, padding included, over those that the term's share of the FLOPs has."""
PADDED = {20: 32, 40: 48, 72: 80}
"""Widths that the tensor cores' own step of 16 pads beyond the limit, and to what."""


def thin_launches(case: Case) -> Iterator[tuple[KronMap, Launch]]:
    """The GEMM with a tail of a thin case, forward and for dx."""
    x, layer = adapted(case)
    kron = KronMap.of(layer.terms[0], torch.bfloat16)
    assert layer.weight is not None
    for each, weight, tokens in (
        (kron, layer.weight, x),
        (kron.adjoint(), layer.weight.t(), meta(4096, case.shape.n)),
    ):
        with recording(H200) as recorded:
            kernels.linear(tokens, weight, None, None, [each], [meta(4096, each.inner[0] * each.inner[1])])
        yield each, recorded[-1]


THIN = [case for case in CASES.values() if KronMap.of(adapted(case)[1].terms[0], torch.bfloat16).thin]


@pytest.mark.parametrize("case", THIN, ids=str)
def test_tail_within_its_share(case):
    """At most 1.1 times width/K of the GEMM's FLOPs; by blocks wherever fewer columns of T then meet a tile.

    A ⊗ I has no zero block as wide as a tile, and a shuffled tile touches every group: both have the dense L.
    """
    for kron, launch in thin_launches(case):
        width, step = kron.inner[0] * kron.inner[1], launch.constants["BLOCK_R"]
        o2, block_n = kron.right[0], launch.constants["BLOCK_N"]
        touched = min(kron.left[0], 1 + (block_n - gcd(block_n, o2)) / o2)
        dense = launch.constants["TAIL"] == NO_TAIL.value
        if dense:
            executed = tuning.blocks(width, step) * step
            assert executed <= TAIL_LIMIT * width or executed == PADDED[width]
            if width > 0.03 * launch.arguments["K"] and kron.order != "b_first" and not kron.out_shuffled:
                assert touched * tuning.blocks(kron.inner[1], tuning.MINIMUM) * tuning.MINIMUM >= executed
        else:
            assert launch.constants["TAIL"] == BLOCK_TAIL.value
            assert touched * tuning.blocks(kron.inner[1], step) * step <= width
