"""A scale of 0, 1 and -1 in every implementation, as a number and as a tensor, with NaN in the memory to be reused."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy
import pytest
import torch
from kronafuse import FrozenLinear, kron_delta, kron_linear, kron_linear_group, kron_merge
from kronafuse.ops import scales
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.ops.kron_merge.op import merge_by
from kronafuse.ops.outputs import poisoned
from kronafuse.testing import accuracy
from kronafuse.testing import bottleneck as bottleneck_testing
from kronafuse.testing.bottleneck_cases import ODD_CASES as BOTTLENECKS
from kronafuse.testing.cases import ADAPTERS, CASES, LAYERS, ODD_CASES, Case
from kronafuse.testing.inputs import bottleneck_inputs, case_inputs
from kronafuse.testing.memory import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOKENS = 9
"""Of the named cases here: a batch that torch's GEMMs take as one of many small ones."""
PAIRS = [("eager", F32), ("eager", BF16), ("eager", F16), ("eager", F64), ("cpu", F32), ("cpu", BF16)]
PAIRS += [("triton", F16), ("cuda", BF16), ("reference", F32), ("reference", BF16)]
FEW = ["thin_a_first", "fat_b_first_shuffled", "low_rank", "lora"]
"""One case an order of multiplication, for what is interpreted or emulated without a GPU."""
TOLERANCE = {F32: 1e-3, BF16: 0.06, F16: 0.01, F64: 1e-9}


@pytest.fixture(autouse=True)
def _infinite_numbers():
    """Triton's interpreter computes with NumPy, which warns of what these tests are about."""
    with numpy.errstate(all="ignore"):
        yield


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def device_of(impl: str) -> str:
    return "cpu" if impl == "cpu" else DEVICE


def is_slow(impl: str) -> bool:
    """Whether it is interpreted or emulated here."""
    return impl in ("triton", "cuda") and DEVICE == "cpu"


def cases_of(impl: str) -> list[str]:
    return FEW if is_slow(impl) else list(ODD_CASES)


def tokens_of(impl: str) -> int | None:
    return 3 if is_slow(impl) else None


def scale_of(number: float, as_tensor: bool, dtype: torch.dtype, impl: str) -> float | torch.Tensor:
    wide = F64 if dtype == F64 else F32
    return torch.tensor(number, dtype=wide, device=device_of(impl)) if as_tensor else number


def results(x: torch.Tensor, layer: FrozenLinear, impl: str, scale: float | torch.Tensor):
    """y and all gradients at this scale, on memory that holds NaN."""
    layer = layer._replace(terms=tuple(term._replace(scale=scale) for term in layer.terms))
    features = layer.terms[0].b.shape[0] * (1 if layer.terms[0].a is None else layer.terms[0].a.shape[0])
    source = torch.Generator().manual_seed(1)
    dy = torch.randn(x.shape[0], features, generator=source).to(x.dtype).to(x.device)
    poison(x.device)
    with poisoned():
        return accuracy.run(partial(kron_linear_group, impl=impl), x, [layer], [dy])


def moved(x: torch.Tensor, layer: FrozenLinear, impl: str) -> tuple[torch.Tensor, FrozenLinear]:
    place = device_of(impl)
    named = {name: each.to(place) for name, each in accuracy.tensors_of(x, [layer]).items()}
    return named["x"], accuracy.with_tensors([layer], named)[0]


def check_scales(x: torch.Tensor, layer: FrozenLinear, impl: str, kinds: Iterable[bool]) -> None:
    """At 0 the delta and what comes through it are 0; at -1 they are the negatives of those at 1."""
    dtype, plain = x.dtype, layer._replace(terms=())
    base = torch.zeros(()) if layer.weight is None else kron_linear_group(x, [plain], impl="eager")[0]
    for as_tensor in kinds:
        zero, one, minus = (
            results(x, layer, impl, scale_of(number, as_tensor, dtype, impl)) for number in (0.0, 1.0, -1.0)
        )
        for name, value in zero.items():
            assert value.isfinite().all(), f"{name} at scale 0"
            if name == "y0":
                torch.testing.assert_close(
                    value, base.to(dtype).expand_as(value), rtol=0, atol=TOLERANCE[dtype] if base.dim() else 0
                )
            elif name.startswith(("da", "db0", "db_down", "drow_scale")) or (
                name == "dx" and layer.weight is None
            ):
                assert value.count_nonzero() == 0, f"{name} at scale 0"
        for name in one:
            if name == "dscale0.0" or name.startswith(("da", "db0", "db_down")):
                sign = 1 if name == "dscale0.0" else -1
                assert_near(minus[name], sign * one[name], dtype, name)
        assert_near(minus["y0"] - base, base - one["y0"], dtype, "y0")


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    assert actual.isfinite().all(), name
    if actual.numel():
        level = expected.double().abs().amax().item()
        error = (actual.double() - expected.double()).abs().amax().item()
        assert error <= TOLERANCE[dtype] * max(level, 1.0), f"{name}: {error} beside {level}"


@pytest.mark.parametrize(
    ("impl", "dtype"), [("eager", BF16), ("eager", F16), ("cpu", BF16), ("cpu", F32)], ids=dtype_id
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_named_cases_at_scales_of_0_1_and_minus_1(adapter, impl, dtype):
    """Every layer of the case list; the number in half of the layers, the tensor in the others."""
    for index, layer in enumerate(LAYERS):
        case = CASES[f"{layer}-{adapter}"]
        x, frozen = moved(
            *case_inputs(case, dtype, tokens=TOKENS, factor_dtype=dtype, weight=False, bias=False), impl
        )
        check_scales(x, frozen, impl, [bool((index + (dtype == BF16)) % 2)])


@pytest.mark.parametrize(
    ("case", "impl", "dtype"),
    [
        pytest.param(case, *pair, id=f"{case}-{dtype_id(pair[1])}-{pair[0]}")
        for pair in PAIRS
        for case in cases_of(pair[0])
    ],
)
def test_odd_cases_at_scales_of_0_1_and_minus_1(case, impl, dtype):
    wide = F64 if dtype == F64 else F32
    given = case_inputs(ODD_CASES[case], dtype, tokens=tokens_of(impl), factor_dtype=wide, row_scale=True)
    check_scales(*moved(*given, impl), impl, [FEW.index(case) % 2 == 0] if is_slow(impl) else [False, True])


def put(tensors: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    """The tensors with `value` in the first element of one of them."""
    changed = {each: tensor.clone() for each, tensor in tensors.items()}
    changed[name].view(-1)[0] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("impl", "dtype"), [pair for pair in PAIRS if pair[0] != "reference"], ids=dtype_id)
def test_a_scale_of_zero_times_nan_and_infinity_is_nan(impl, dtype, value):
    """NaN at least wherever the definition in float64 has it, in y and in every gradient."""
    many = ["many_tokens_a_first", "many_tokens_b_first", "many_tokens_low_rank"]
    for name in FEW if is_slow(impl) else [*FEW, *many]:
        options = {"tokens": tokens_of(impl), "weight": False, "bias": False}
        x, layer = moved(*case_inputs(ODD_CASES[name], dtype, **options), impl)
        tensors = accuracy.tensors_of(x, [layer])
        for operand in tensors:
            given = put(tensors, operand, value)
            wide = {each: tensor.double() for each, tensor in given.items()}
            narrow_layer, wide_layer = (accuracy.with_tensors([layer], each)[0] for each in (given, wide))
            as_tensor = operand == "b0.0"
            ours = results(given["x"], narrow_layer, impl, scale_of(0.0, as_tensor, dtype, impl))
            truth = results(wide["x"], wide_layer, "reference", scale_of(0.0, as_tensor, F64, impl))
            assert truth["y0"].isnan().any()
            assert_nan_kept(ours, truth, f"{name}, {value} in {operand}")


def assert_nan_kept(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], where: str) -> None:
    for name, expected in truth.items():
        if name == "dscale0.0":
            continue  # no product with the scale
        lost = expected.isnan() & ~ours[name].isnan()
        assert not lost.any(), (
            f"{where}: {int(lost.sum())} of {int(expected.isnan().sum())} NaN lost in {name}"
        )


@pytest.mark.parametrize("kind", ["number", "tensor", "tensor on another device"])
@pytest.mark.parametrize("impl", ["eager", "triton", "cuda", "reference"])
def test_a_scale_of_zero_meets_no_overflow_of_float16(impl, kind, monkeypatch):
    """Products that are beyond float16 at a scale of 1 are 0 at 0."""
    if kind == "tensor on another device":
        if impl != "eager":
            pytest.skip("only eager treats it in another way")
        monkeypatch.setattr(scales, "on_host", lambda scale, _: scale)
    for name in ("thin_a_first", "fat_b_first", "low_rank", "lora"):
        if name == "low_rank" and kind == "tensor on another device":
            continue  # its P is unscaled, as the docstring of kron_linear_group says
        x, layer = moved(*case_inputs(ODD_CASES[name], F16, tokens=3, weight=False, bias=False), impl)
        large = {each: tensor * 2.0**12 for each, tensor in accuracy.tensors_of(x, [layer]).items()}
        layer = accuracy.with_tensors([layer], large)[0]
        found = results(large["x"], layer, impl, scale_of(0.0, kind != "number", F16, impl))
        for each in ("y0",) if impl == "reference" else ("y0", "dx", "da0.0", "db0.0", "db_down0.0"):
            if each in found:
                assert not found[each].isnan().any(), f"{name}: {each}"
                assert found[each].count_nonzero() == 0, f"{name}: {each}"


@pytest.mark.parametrize(
    "scale", [-0.0, 1e-50, torch.tensor(1e-50, dtype=F64), torch.tensor(0.0, requires_grad=True)]
)
@pytest.mark.parametrize(("impl", "dtype"), [("eager", BF16), ("eager", F16), ("cpu", BF16)], ids=dtype_id)
def test_scales_that_are_zero_in_float32(impl, dtype, scale):
    a, b, x = torch.randn(32, 32), torch.randn(40, 40), torch.randn(64, 1280).to(dtype)
    weight = torch.randn(1280, 1280).to(dtype)
    poison()
    y = kron_linear(x, weight, a, b, scale=scale, impl=impl)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    assert (
        kron_linear(x.to("meta"), weight.to("meta"), a.to("meta"), b.to("meta"), scale=0.0).shape == y.shape
    )


def test_a_tensor_scale_beyond_float32_is_infinite():
    x, a, b = torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2)
    scale = torch.tensor(1e39, dtype=F64)
    for impl in ("eager", "cpu"):
        assert kron_delta(x, a, b, scale=scale, impl=impl).eq(float("inf")).all(), impl
        y = bottleneck(torch.ones(2, 4), None, torch.ones(2, 4), torch.ones(4, 2), scale=scale, impl=impl)
        assert y.eq(float("inf")).all(), impl


@pytest.mark.parametrize(("impl", "dtype"), PAIRS, ids=dtype_id)
def test_bottlenecks_at_scales_of_0_1_and_minus_1(impl, dtype):
    names = ["primes", "narrowing", "no_residual"] if is_slow(impl) else list(BOTTLENECKS)
    for name in names:
        case = BOTTLENECKS[name]
        tensors = {
            each: tensor.to(device_of(impl)) for each, tensor in bottleneck_inputs(case, dtype).items()
        }
        dy = torch.randn(case.tokens, case.out_features).to(tensors["x"])
        base = {"x": tensors["x"], "other": tensors.get("residual"), "none": torch.zeros(())}[case.residual]
        for as_tensor in (False, True):
            found = []
            for number in (0.0, 1.0, -1.0):
                scale = scale_of(number, as_tensor, dtype, impl)
                given = {**tensors, "scale": scale} if as_tensor else tensors
                function = partial(bottleneck, impl=impl)
                if not as_tensor:
                    function = at_scale(function, scale)
                poison(tensors["x"].device)
                with poisoned():
                    found.append(bottleneck_testing.run(function, case, given, dy))
            zero, one, minus = found
            assert torch.equal(zero["y"], base.expand_as(zero["y"]).to(zero["y"].dtype)), name
            for each in zero:
                if each in ("ddown", "dup", "ddown_bias", "dup_bias"):
                    assert zero[each].count_nonzero() == 0, f"{name}: {each}"
                    assert_near(minus[each], -one[each], dtype, each)
                assert zero[each].isfinite().all(), f"{name}: {each}"
            assert_near(minus["y"] - base, base - one["y"], dtype, name)


def at_scale(function, scale):
    """The function at this scale, whatever it is given."""
    return lambda *tensors, **options: function(*tensors, **{**options, "scale": scale})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("impl", "dtype"), PAIRS, ids=dtype_id)
def test_a_bottleneck_at_a_scale_of_zero_keeps_nan(impl, dtype, value):
    """With and without a residual and biases, for every operand: NaN where the definition in float64 has it."""
    for name in ("narrowing", "no_residual", "no_biases", "no_biases_identity", "many_tokens"):
        if name == "many_tokens" and is_slow(impl):
            continue
        case = BOTTLENECKS[name]
        tensors = {
            each: tensor.to(device_of(impl)) for each, tensor in bottleneck_inputs(case, dtype).items()
        }
        dy = torch.randn(case.tokens, case.out_features).to(tensors["x"])
        for operand in tensors:
            given = put(tensors, operand, value)
            wanted = [each for each in given if each != "residual"]
            ours = bottleneck_testing.run(
                at_scale(partial(bottleneck, impl=impl), 0.0), case, given, dy, wanted
            )
            wide = {each: tensor.double() for each, tensor in given.items()}
            truth = bottleneck_testing.run(
                at_scale(partial(bottleneck, impl="reference"), 0.0),
                case,
                wide,
                dy.double(),
                wanted,
            )
            assert_nan_kept(ours, truth, f"{name}, {value} in {operand}")


@pytest.mark.parametrize(("impl", "dtype"), [pair for pair in PAIRS if pair[0] != "reference"], ids=dtype_id)
def test_merges_at_scales_of_0_1_and_minus_1(impl, dtype):
    for name in ("primes_shuffled", "low_rank", "lora"):
        _, layer = moved(*case_inputs(ODD_CASES[name], dtype, tokens=1), impl)
        (term,), weight = layer.terms, layer.weight
        for as_tensor in (False, True):
            poison(weight.device)
            with poisoned():
                zero, one, minus = (
                    merge_by(
                        impl, weight, term.a, term.b, term.b_down, scale_of(number, as_tensor, dtype, impl)
                    )
                    for number in (0.0, 1.0, -1.0)
                )
            assert torch.equal(zero, weight)
            assert_near(minus - weight, weight - one, dtype, name)
        b = put({"b": term.b}, "b", float("nan"))["b"]
        if term.a is not None and term.b_down is None:
            merged = merge_by(impl, weight, term.a, b, None, 0.0, True)
            truth = kron_merge(weight.double(), term.a.double(), b.double(), scale=0.0, shuffled=True)
            assert torch.equal(merged.isnan(), truth.isnan())


def test_poisoned_memory_is_what_torch_hands_out_next():
    """Not in every block: a process has free ones of its own."""
    for numel in (1000, 12_000, 60_000):
        poison()
        held = [torch.empty(numel) for _ in range(200)]
        assert any(each.isnan().any() for each in held), numel


def test_the_poison_shows_what_torch_leaves_unwritten():
    """The fault that it is there for, as long as this torch has it: a batched product in 16 bits at alpha = 0."""
    left, right = torch.randn(3, 64, 64).bfloat16(), torch.randn(3, 64, 64).bfloat16()
    poison()
    written = torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=0.0)
    if torch.__version__.startswith("2.13."):
        assert written.isnan().any()
    assert case_list_is_whole()


def case_list_is_whole() -> bool:
    return all(isinstance(CASES[f"{layer}-{adapter}"], Case) for layer in LAYERS for adapter in ADAPTERS)


@pytest.mark.parametrize("scale", [1e-40, -1e-44])
def test_a_scale_that_a_processor_flushes_to_zero_leaves_nothing_unwritten(scale):
    """torch.set_flush_denormal, which also libraries built for fast mathematics turn on."""
    x, weight = torch.randn(7, 96).bfloat16(), torch.randn(96, 96).bfloat16()
    a, b = torch.randn(8, 8), torch.randn(12, 12)
    plain = torch.nn.functional.linear(x, weight)
    assert torch.set_flush_denormal(True)
    try:
        for impl in ("eager", "cpu"):
            poison()
            torch.testing.assert_close(kron_linear(x, weight, a, b, scale=scale, impl=impl), plain)
            poison()
            y = bottleneck(x, x, weight[:16], weight[:, :16], scale=scale, impl=impl)
            torch.testing.assert_close(y, x)
    finally:
        torch.set_flush_denormal(False)
