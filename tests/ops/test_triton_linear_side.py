"""The linear side of the Triton kernels: routes of fat terms and of the base GEMM, and tails of thin terms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from math import gcd
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fat_inputs import DEVICE, DTYPES, TOKENS, Inputs
from kronafuse import FrozenLinear, kron_linear_group
from kronafuse.ops import launch as launching
from kronafuse.ops import tuned
from kronafuse.ops.kron_linear import eager, kernels, route, tuning
from kronafuse.ops.kron_linear.algorithm import forward
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.tails import BLOCK_TAIL, NO_TAIL
from kronafuse.ops.kron_linear.terms import KronTerm
from kronafuse.ops.launch import Architecture, Launch, recording
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.accuracy import check_group
from kronafuse.testing.cases import CASES, ODD_CASES, Case
from kronafuse.testing.inputs import case_inputs
from kronafuse.testing.launches import recorded_step

H200 = Architecture(90, 132)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def routed(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    with poisoned():
        return kron_linear_group(x, layers, impl="triton")


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


@pytest.mark.parametrize("routes", ROUTES, ids=lambda routes: "-".join(routes))
@pytest.mark.parametrize("case", FAT_CASES)
def test_op_by_every_route(case, routes, dtype):
    """y and every gradient, with bias, base, row scale, tensor scale and two terms."""
    options: dict[str, Any] = {"tokens": 9, "row_scale": True, "scale": torch.tensor(0.6), "terms": 2}
    x, layers = to_device(*case_inputs(ODD_CASES[case], dtype, base=True, strided=True, **options))
    with route.forced(fat=routes[0], base=routes[1]):
        check_group(routed, x, layers)


@pytest.mark.parametrize("routes", ROUTES, ids=lambda routes: "-".join(routes))
def test_delta_alone_by_every_route(routes, dtype):
    """W = 0: nothing hides the delta."""
    x, layers = to_device(*case_inputs(ODD_CASES["fat_a_first"], dtype, bias=False))
    assert layers[0].weight is not None
    layers = [layers[0]._replace(weight=torch.zeros_like(layers[0].weight))]
    with route.forced(fat=routes[0], base=routes[1]):
        check_group(routed, x, layers)


@pytest.mark.parametrize("wanted", ["x", "a0.0", "b0.0"])
@pytest.mark.parametrize("fat", route.FatRoute.FORMS)
def test_each_gradient_alone(fat, wanted):
    x, layers = to_device(*case_inputs(ODD_CASES["fat_a_first"], torch.float32))
    with route.forced(fat=fat):
        check_group(routed, x, layers, wanted=[wanted])


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


def test_routes_know_their_tails():
    """What the fused kernel's tiles depend on is in the key of the base's route."""
    inputs = Inputs(torch.float32)
    fat = inputs.fat((4, 3), (40, 24))
    maps = {
        "none": [],
        "block": [fat],
        "elementwise": [inputs.fat((40, 24), (2, 2))],
        "mix": [replace(fat, order="b_first")],
        "permuted": [replace(fat, out_shuffled=True)],
        "dense": [replace(fat, thin=True, order="b_first")],
        "dense+mix": [replace(fat, order="b_first"), replace(fat, thin=True, order="b_first")] * 2,
    }
    asked: list[tuned.Choice] = []
    with recording(H200), tuned.deciding(asked.append):
        for group in maps.values():
            kernels._base_by_torch(inputs(TOKENS, 72), inputs(160, 72), group)
    assert [choice.key["tails"] for choice in asked if choice.kernel == "base_route"] == list(maps)


@pytest.mark.parametrize("base", route.BaseRoute.FORMS)
@pytest.mark.parametrize("name", ["sdxl_1280-krona_64x4", "sdxl_1280-lokr_f8"])
def test_dx_of_a_group_takes_one_tensor(name, base):
    """Each further layer adds its part in place: by our kernel, or by torch's GEMM without a copy of the sum."""
    with route.forced(base=base):
        step = recorded_step([CASES[name]] * 3, H200)
    into = [each for each in step.backward if "y_ptr" in each.arguments]
    assert len({id(each.arguments["y_ptr"]) for each in into}) == 1
    bases = [each.arguments["base_ptr"] is each.arguments["y_ptr"] for each in into]
    assert bases == [base == "torch", True, True]
    gemms = [operator for operator in step.backward_torch if operator.startswith("aten.addmm")]
    assert gemms == (["aten.addmm_"] * 2 if base == "torch" else [])


@pytest.mark.parametrize("routes", ROUTES, ids=lambda routes: "-".join(routes))
def test_dx_of_a_group_by_every_route(routes, dtype):
    """Three layers that share x, each adding to the dx of those before."""
    x, layers = to_device(*case_inputs(ODD_CASES["fat_a_first"], dtype, tokens=9))
    with route.forced(fat=routes[0], base=routes[1]):
        check_group(routed, x, layers * 3)


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
    """torch's GEMM where nothing is fused, and in fp32 where the GEMM is large; else the fused kernel."""
    large, small = (4096, 1280, 1280), (77, 640, 640)
    for sizes, dtype, terms, expected in (
        (large, torch.bfloat16, 1, False),
        (large, torch.bfloat16, 0, True),
        (large, torch.float32, 1, True),
        (small, torch.bfloat16, 0, True),
        (small, torch.bfloat16, 1, False),
        (small, torch.float32, 0, True),
        (small, torch.float32, 1, False),
    ):
        tails = "dense" if terms else "none"
        assert route.base_by_torch(H200, dtype, *sizes, False, terms, tails) is expected, (
            sizes,
            dtype,
            terms,
        )


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
    sizes = (torch.bfloat16, 4096, *term.left, *term.right, "a_first", True, False, True, False)
    base = (torch.bfloat16, 4096, 1280, 1280, False, 1, "block")
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
        assert not route.base_by_torch(gpu, *base[:-1], "mix")
        assert route.in_one_pass(gpu, torch.bfloat16, term._replace(transposed=True)) is route.in_one_pass(
            H200, torch.bfloat16, term._replace(transposed=True)
        )
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
