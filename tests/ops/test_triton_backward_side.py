"""The kernels of the backward side against `eager` in float64: one read of dy, one of x, and few launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronafuse import FrozenLinear, KronTerm, kron_linear_group
from kronafuse.ops.kron_linear import eager, kernels, reduction_tuning
from kronafuse.ops.kron_linear.algorithm import backward, forward
from kronafuse.ops.kron_linear.dense_kernel import build_up
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.sum_kernel import MOST_SPLITS, SLOTS, SecondStages
from kronafuse.ops.launch import Architecture, positional, recording
from kronafuse.ops.outputs import poisoned
from kronafuse.ops.triton_common import aligned_run
from kronafuse.testing.accuracy import check_group, run
from kronafuse.testing.cases import ADAPTERS, CASES, LAYERS, ODD_CASES
from kronafuse.testing.inputs import case_inputs, generator, random
from kronafuse.testing.launches import recorded_step, step_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SPACINGS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
"""Largest error, in spacings of the dtype at the largest element of the result."""
TOKENS = 37
H200 = Architecture(90, 132)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Inputs:
    """Random tensors of one dtype from one seed, on the device under test."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.source = dtype, generator(seed)

    def __call__(self, *shape: int, strided: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        return random(self.source, *shape, dtype=dtype or self.dtype, strided=strided).to(DEVICE)

    def kron(
        self, name: str, *, factor_dtype: torch.dtype | None = None, transposed: bool = False
    ) -> KronMap:
        """A map of one of SHAPES."""
        order, (o1, i1), (o2, i2), rank = SHAPES[name]

        def matrix(rows: int, columns: int) -> Tensor:
            shape = (columns, rows) if transposed else (rows, columns)
            made = self(*shape, dtype=factor_dtype)
            return made.t() if transposed else made

        has_a = name != "lora"
        return KronMap(
            matrix(o1, i1) if has_a else None,
            matrix(o2, i2 if rank is None else rank),
            None if rank is None else matrix(rank, i2),
            0.7,
            order,
            True,
        )


SHAPES: dict[str, tuple[Any, tuple[int, int], tuple[int, int], int | None]] = {
    "a_first": ("a_first", (3, 20), (5, 7), None),
    "a_first_runs": ("a_first", (4, 64), (5, 20), None),
    "b_first": ("b_first", (6, 4), (5, 37), None),
    "b_first_parts": ("b_first", (4, 8), (20, 40), None),
    "low_rank": ("low_rank", (4, 6), (7, 20), 3),
    "lora": ("low_rank", (1, 1), (24, 40), 5),
}
"""Maps whose first factor has features in one power of two and in two, aligned runs of neighbours and none."""


@pytest.fixture(params=["chosen", "small"])
def configuration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rule's tiles, and tiles so small that every loop and grid repeats and every sum has two stages."""
    if request.param == "small":
        chosen = reduction_tuning.shrink_reduce_config

        def small(*sizes: Any) -> reduction_tuning.ShrinkReduceConfig:
            config = chosen(*sizes)
            assert config is not None
            return replace(config, block_r=16, block_o=16, split=3)

        monkeypatch.setattr(reduction_tuning, "shrink_reduce_config", small)
    return request.param


def double(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, KronMap):
        parts = {name: double(getattr(value, name)) for name in ("a", "b", "b_down", "in_scale", "scale")}
        return replace(value, **parts)
    return value.double() if isinstance(value, Tensor) else value


def assert_close(actual: Tensor | None, truth: Tensor | None, dtype: torch.dtype) -> None:
    """Fails where an element of `actual` is NaN or further from `truth` than SPACINGS."""
    assert actual is not None
    assert truth is not None
    assert actual.shape == truth.shape
    assert actual.is_contiguous()
    limit = SPACINGS[dtype] * torch.finfo(dtype).eps * (truth.abs().max().item() if truth.numel() else 0.0)
    error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
    assert error <= limit, f"error {error:.3e}, limit {limit:.3e}"  # False for NaN


def assert_shrink_reduce(x: Tensor, kron: KronMap, other: Tensor, launches: list[str]) -> None:
    wide = torch.float32
    with recording(H200) as recorded:
        stages = kernels.second_stages()
        kernels.shrink_reduce(x, [kron], [other], [wide], stages)
    assert [each.kernel.__name__ for each in recorded] == launches
    stages = kernels.second_stages()
    with poisoned():
        downs, gradients = kernels.shrink_reduce(x, [kron], [other], [wide], stages)
        stages.finish()
    truth, expected = eager.shrink_reduce(x.double(), [double(kron)], [other.double()], [torch.float64], None)
    assert downs[0].dtype == x.dtype
    assert_close(downs[0], truth[0], x.dtype)
    assert gradients[0] is not None
    assert gradients[0].dtype == wide
    assert_close(gradients[0], expected[0], x.dtype)


def width(kron: KronMap) -> int:
    """Columns of the first product per token."""
    return kernels._down_width(kron)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
def test_shrink_reduce(name, tokens, dtype, configuration):
    """The first product of dy and its factor's gradient, in one launch."""
    inputs = Inputs(dtype)
    kron = inputs.kron(name, factor_dtype=torch.float32)
    x = inputs(tokens, kron.left[1] * kron.right[1])
    assert_shrink_reduce(x, kron, inputs(tokens, width(kron)), ["_shrink_reduce_kernel"])


@pytest.mark.parametrize("name", SHAPES)
def test_shrink_reduce_shuffled_strided_scaled(name, dtype, configuration):
    """Shuffled dy with gaps, a scale per feature, transposed factors, a tensor scale."""
    inputs = Inputs(dtype)
    features = inputs.kron(name).left[1] * inputs.kron(name).right[1]
    kron = replace(
        inputs.kron(name, transposed=True),
        in_shuffled=True,
        scale=torch.tensor(0.3, device=DEVICE),
        in_scale=random(inputs.source, features, dtype=torch.float32, strided=True).to(DEVICE),
    )
    x = inputs(TOKENS, features, strided=True)
    assert_shrink_reduce(x, kron, inputs(TOKENS, width(kron)), ["_shrink_reduce_kernel"])


def test_shrink_reduce_past_int32(configuration):
    """Tokens 2³¹ elements apart."""
    inputs = Inputs(torch.float16)
    kron = inputs.kron("b_first_parts")
    features = kron.left[1] * kron.right[1]
    buffer = torch.empty(2**31 + features, dtype=torch.float16, device=DEVICE)
    x = buffer.as_strided((3, features), (2**30, 1)).copy_(inputs(3, features))
    assert_shrink_reduce(x, kron, inputs(3, width(kron)), ["_shrink_reduce_kernel"])


def test_two_launches_where_one_does_not_fit(dtype):
    """A factor whose gradient has no room in registers: the separate kernels, the same results."""
    inputs = Inputs(dtype)
    kron = KronMap(inputs(2, 2), inputs(300, 300), None, 0.7, "b_first", False)
    assert_shrink_reduce(inputs(TOKENS, 600), kron, inputs(TOKENS, 600), ["_reduce_kernel", "_shrink_kernel"])


def test_reasons_against_one_launch():
    config = reduction_tuning.ShrinkReduceConfig(64, 64, 0, 16, 256, 8, 2)
    assert config.reasons(torch.bfloat16, 81920, 64, 4) == []
    wide = replace(config, block_f=2048, block_o=32, split=4)
    assert wide.reasons(torch.bfloat16, 81920, 1280, 200) == [
        "256 accumulators a thread, more than 64 leave no room for x",
        "794624 bytes of shared memory, more than 101376",
        "7 blocks of 200 columns, which read x as often: more than 2",
        "28 programs of 1024000 bytes, fewer than 42",
    ]
    assert "8 accumulators a thread" not in str(config.reasons(torch.float32, 81920, 64, 4))
    assert reduction_tuning.shrink_reduce_config(torch.bfloat16, 4096, 1280, 16) is None


def test_every_configuration_holds_all_features():
    for case in CASES.values():
        for features, columns in ((case.shape.n2, case.shape.k2), (case.shape.n1, case.shape.k1)):
            config = reduction_tuning.shrink_reduce_config(torch.bfloat16, 4096, features, columns)
            assert config is None or features <= config.held <= max(16, 2 * features)


def test_aligned_run():
    assert aligned_run(1, 80, 1280, 16) == 8
    assert aligned_run(1, 20, 1280, 20) == 4
    assert aligned_run(1, 5, 320, 5) == 1
    assert aligned_run(2, 16, 16, 16) == 1


def triton_group(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    with poisoned():
        return kron_linear_group(x, layers, impl="triton")


BACKWARD_CASES = ["thin_a_first", "thin_b_first_shuffled", "fat_a_first", "fat_b_first", "low_rank", "lora"]


@pytest.mark.parametrize("case", BACKWARD_CASES)
def test_each_gradient_alone(case):
    """fp32 factors on fp16 activations: every gradient alone is as accurate as all of them together."""
    x, layer = case_inputs(ODD_CASES[case], torch.float16, factor_dtype=torch.float32, row_scale=True)
    x, term = x.to(DEVICE), layer.terms[0]
    names = ["x", "b0.0"] + ["a0.0"] * (term.a is not None) + ["b_down0.0"] * (term.b_down is not None)
    for wanted in [[name] for name in names] + [names]:
        check_group(triton_group, x, [layer], wanted=wanted)


@pytest.mark.parametrize("case", BACKWARD_CASES)
def test_group_of_three(case):
    """q, k and v of one x: the gradients that contract x share its read."""
    x, layer = case_inputs(ODD_CASES[case], torch.float16, factor_dtype=torch.float32)
    layers = [layer, *(case_inputs(ODD_CASES[case], torch.float16, seed=seed)[1] for seed in (1, 2))]
    check_group(triton_group, x, layers)


def test_group_of_different_layers():
    """Layers of several orders and sizes on one x, one of them with two terms."""

    def layer(seed: int, name: str, **options: Any) -> FrozenLinear:
        return case_inputs(ODD_CASES[name], torch.float32, seed=seed, **options)[1]

    x, first = case_inputs(ODD_CASES["thin_a_first"], torch.float32)
    source = generator(3)
    other = KronTerm(random(source, 4, 4).float(), random(source, 5, 12).float())
    layers = [
        first,
        layer(1, "thin_a_first", terms=2),
        first._replace(weight=None, bias=None, terms=(other,)),
    ]
    check_group(triton_group, x, layers)


def test_repeatable():
    case = ODD_CASES["many_tokens_b_first"]
    x, layer = case_inputs(case, torch.float16, factor_dtype=torch.float32)
    dys = [random(generator(5), case.tokens, case.shape.n, dtype=torch.float16)]
    first, second = (run(triton_group, x, [layer], dys) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def kernels_of(case: str, **wanted: bool) -> list[str]:
    """What one backward launches where only these of dx, da and db are asked for."""
    x, layer = case_inputs(ODD_CASES[case], torch.float16, bias=False)
    with recording(H200):
        _, saved = forward(x, [layer], kernels)
    needs = [wanted.get("dx", False), False, False, wanted.get("da", False), wanted.get("db", False)]
    dy = x.new_empty(x.shape[0], ODD_CASES[case].shape.n)
    with recording(H200) as recorded:
        backward([dy], x, [layer], saved, [*needs, False, False, False], kernels)
    return [each.kernel.__name__.strip("_").removesuffix("_kernel") for each in recorded]


@pytest.mark.parametrize(
    ("case", "from_dy", "from_x"), [("thin_a_first", "db", "da"), ("thin_b_first", "da", "db")]
)
def test_only_what_is_asked_for(case, from_dy, from_x):
    """One launch for both only where both are wanted; the gradient of the saved T alone reads dy alone."""
    assert kernels_of(case, **{from_dy: True})[0] == "reduce"
    assert "shrink_reduce" not in kernels_of(case, dx=True)
    assert "shrink_reduce" not in kernels_of(case, **{from_x: True})
    both = kernels_of(case, **{from_dy: True, from_x: True})
    assert both[:2] == ["shrink_reduce", "reduce"]
    assert kernels_of(case, dx=True, da=True, db=True).count("shrink_reduce") == 1


@pytest.mark.parametrize("count", [1, SLOTS, SLOTS + 2])
def test_second_stages(count):
    """Sums of different sizes and numbers of parts, more than one launch serves, some of more parts than a tile."""
    inputs = Inputs(torch.float32)
    stages, expected = SecondStages(), []
    scales = [0.5, torch.tensor(0.25, device=DEVICE)]
    for index in range(count):
        partial = inputs(MOST_SPLITS + 5 if index == 1 else 3 + index, 7 + 40 * index)
        out = torch.full((partial.shape[1],), float("nan"), device=DEVICE)
        scale = scales[index % 2]
        stages.add(partial, out, scale)
        expected.append((out, partial.double().sum(0) * float(scale)))
    with recording(H200) as recorded:
        for out, _ in expected[:1]:
            assert out.isnan().all()
    assert recorded == []
    stages.finish()
    for out, truth in expected:
        assert_close(out, truth, torch.float32)
    with recording(H200) as recorded:
        stages.finish()
    assert recorded == [], "finished sums are forgotten"


def test_three_layers_read_x_once():
    """Forward: one launch for the first products; backward: one for the gradients that contract x."""
    for adapter in ("krona_64x4", "krona_4x64", "lora_r16"):
        counts = step_launches([CASES[f"sdxl_1280-{adapter}"]] * 3, H200)
        assert counts.forward.get("shrink", 0) + counts.forward.get("mix", 0) == 1, adapter
        dy_sums = 0 if counts.backward.get("shrink_reduce") == 3 else 3
        assert counts.backward["reduce"] - dy_sums == 1, adapter


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_launches(adapter):
    """fp32 factors on bf16 activations: at most so many launches a direction on any layer, and torch adds none."""
    found = [step_launches([CASES[f"{layer}-{adapter}"]], H200) for layer in LAYERS]
    names = {name for counts in found for direction in counts for name in direction}
    assert not any(name.startswith("aten.") for name in names), names
    assert tuple(max(sum(each[way].values()) for each in found) for way in (0, 1)) == LAUNCHES[adapter]


LAUNCHES = {
    "krona_64x4": (3, 5),
    "krona_64x8": (2, 5),
    "krona_4x64": (3, 6),
    "lokr_f4": (1, 7),
    "lokr_f8": (2, 6),
    "lokr_f16": (2, 6),
    "lokr_square": (2, 5),
    "lokr_f8_r16": (3, 8),
    "lora_r16": (3, 6),
    "diffusekrona_official": (2, 5),
}
"""Adapter -> most launches of a forward and of a backward over all layers."""


@pytest.mark.parametrize(
    "names", [("thin_b_first",), ("thin_b_first",) * 3, ("thin_b_first", "thin_b_first_shuffled")]
)
def test_up_maps_are_built_beside(names, dtype):
    """The launch of T writes the dense L that `linear` takes, of maps that are alike; the others' come on their own."""
    x, _ = case_inputs(ODD_CASES[names[0]], dtype)
    maps = [
        KronMap.of(case_inputs(ODD_CASES[name], torch.float32, seed=seed)[1].terms[0], None)
        for seed, name in enumerate(names)
    ]
    with poisoned():
        kernels.shrink(x, maps)
    alike = [kron for kron in maps if kron.out_shuffled == maps[0].out_shuffled]
    for kron in maps:
        assert (kron.dense_up is not None) == (kron in alike)
    for kron in alike:
        assert kron.dense_up is not None
        assert kron.dense_up.dtype == dtype
        assert torch.equal(kron.dense_up, build_up(kron, dtype))
    with recording(H200) as recorded:
        kernels.linear(x, None, None, None, alike[:1], [x.new_empty(x.shape[0], width(alike[0]))])
    assert [each.kernel.__name__ for each in recorded] == ["_linear_kernel"]


def test_a_scaled_up_map_is_not_built_beside():
    """An L with a row scale in it, a block tail and LoRA's B need nothing built by the launch of T."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("thin_b_first", {"row_scale": True}),
        ("low_rank", {}),
        ("lora", {}),
    ]
    for name, options in cases:
        x, layer = case_inputs(ODD_CASES[name], torch.float16, **options)
        kron = KronMap.of(layer.terms[0], None)
        with recording(H200) as recorded:
            kernels.shrink(x, [kron])
        assert kron.dense_up is None
        assert recorded[0].constants["UPS"] == 0


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_arguments_are_in_the_order_of_parameters(adapter):
    """Where they are not, a launch looks every argument up by its name."""
    recorded = recorded_step([CASES[f"sdxl_1280-{adapter}"]], H200)
    for each in [*recorded.forward, *recorded.backward]:
        assert [*each.arguments, *each.constants] == each.kernel.arg_names, each.kernel.__name__


def test_arguments_by_name_in_another_order():
    kernel = SimpleNamespace(arg_names=["x", "y", "BLOCK"])
    assert positional(kernel, {"x": 1, "y": 2}, {"BLOCK": 3}) == [1, 2, 3]
    assert positional(kernel, {"y": 2, "x": 1}, {"BLOCK": 3}) == [1, 2, 3]
