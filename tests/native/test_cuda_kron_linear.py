"""impl="cuda" in each of its forms: which kernels serve which term, and what they make of it together."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, backends, kron_linear_group
from kronafuse.ops import cuda_reasons
from kronafuse.ops.kron_linear import native_cuda, native_cuda_calls
from kronafuse.ops.kron_linear import native_cuda_route as route
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.raw import IMPLEMENTATIONS
from kronafuse.ops.outputs import poisoned
from kronafuse.shapes import KronShape
from kronafuse.testing.accuracy import check_group
from kronafuse.testing.cases import CASES, ODD_CASES, Case
from kronafuse.testing.inputs import case_inputs, generator, random
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16]
FORMS = [("hopper", "two_kernels"), ("hopper", "one_pass"), ("plain", "two_kernels"), ("plain", "one_pass")]


def to_device(device: torch.device, x: Tensor, layer: FrozenLinear) -> tuple[Tensor, FrozenLinear]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    terms = tuple(KronTerm(*map(move, term)) for term in layer.terms)
    return move(x), FrozenLinear(move(layer.weight), terms, move(layer.bias), move(layer.base))


def check(
    device: torch.device, case: Case, dtype: torch.dtype, form: tuple[str, str], **options: Any
) -> None:
    x, layer = to_device(device, *case_inputs(case, dtype, **options))
    with poisoned(), route.forced(gemm=form[0], fat=form[1]):
        check_group(partial(kron_linear_group, impl="cuda"), x, [layer])


@pytest.fixture(params=FORMS, ids="-".join)
def form(request: pytest.FixtureRequest, cuda_ops: Any) -> tuple[str, str]:
    if request.param[0] == "hopper" and not native_cuda_calls.has_hopper(cuda_ops.device):
        pytest.skip("the GPU is no Hopper")
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("case", ODD_CASES)
def test_every_gradient(cuda_ops, case, dtype, form):
    """Every element of every output and workspace is written before it is read."""
    check(cuda_ops.device, ODD_CASES[case], dtype, form)


@pytest.mark.parametrize("case", ODD_CASES)
def test_float32_factors_row_scale_and_base(cuda_ops, case, dtype, form):
    """A base, rank dropout's rows, two terms and a tensor scale, from factors of another dtype."""
    options = {"base": True, "row_scale": True, "scale": torch.tensor(0.6), "terms": 2}
    check(cuda_ops.device, ODD_CASES[case], dtype, form, factor_dtype=torch.float32, **options)


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["thin_b_first", "fat_a_first", "fat_b_first", "low_rank", "lora"])
def test_factors_of_another_dtype(cuda_ops, case, factor_dtype, form):
    """Those that no kernel reads are rounded by a launch."""
    check(cuda_ops.device, ODD_CASES[case], torch.bfloat16, form, factor_dtype=factor_dtype)


@pytest.mark.parametrize("adapter", ["krona_64x4", "krona_4x64", "lokr_f8", "lokr_square", "lora_r16"])
def test_named_adapters(cuda_ops, adapter, form):
    case = CASES[f"sd15_320-{adapter}"]
    check(cuda_ops.device, case, torch.bfloat16, form, tokens=70, factor_dtype=torch.float32)


def test_five_terms(cuda_ops, dtype, form):
    """More dense tails than one launch takes, beside blocks and mixes."""
    source = generator(1)

    def rand(*shape: int) -> Tensor:
        return (random(source, *shape) / shape[-1] ** 0.5).to(dtype)

    terms = [KronTerm(None, rand(96, 4), rand(4, 64)) for _ in range(5)]
    terms += [KronTerm(rand(16, 2), rand(6, 32)), KronTerm(rand(4, 8), rand(24, 8), shuffled=True)]
    layer = FrozenLinear(rand(96, 64), tuple(terms), rand(96))
    x, layer = to_device(cuda_ops.device, rand(19, 64), layer)
    with poisoned(), route.forced(gemm=form[0], fat=form[1]):
        check_group(partial(kron_linear_group, impl="cuda"), x, [layer])


class Recorder:
    """The operators' names as they are called."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.names = ops, []

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("workspace"):
            self.names.append(name)
        return getattr(self.ops, name)


def launches(cuda_ops: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> list[str]:
    recorder = Recorder(cuda_ops.ops)
    monkeypatch.setattr(native_cuda_calls, "_ops", lambda _device: recorder)
    run()
    return recorder.names


def kron(left: tuple[int, int], right: tuple[int, int], order: str, thin: bool, **rest: Any) -> KronMap:
    return KronMap(torch.zeros(left), torch.zeros(right), None, 1.0, order, thin, **rest)  # pyright: ignore


def test_tails_by_shape():
    """Which tail each kind of map gets, in both forms of the GEMM."""
    few, many = kron((64, 4), (20, 320), "b_first", True), kron((16, 40), (80, 32), "b_first", True)
    fat_few, fat_many = kron((8, 8), (160, 160), "b_first", False), kron((32, 40), (40, 32), "b_first", False)
    thin, fat = kron((4, 64), (320, 24), "a_first", True), kron((8, 8), (160, 160), "a_first", False)
    narrow = kron((64, 4), (5, 16), "a_first", True)
    shuffled = kron((4, 64), (320, 24), "a_first", True, out_shuffled=True)
    expected = {
        "few": ("mix", "dense"), "many": ("dense", "dense"), "fat_few": ("mix", "apart"),
        "fat_many": ("apart", "apart"), "thin": ("block", "block"), "fat": ("block", "block"),
        "narrow": ("block", "block"), "shuffled": ("dense", "dense"),
    }  # fmt: skip
    maps = [few, many, fat_few, fat_many, thin, fat, narrow, shuffled]
    for each, (name, kinds) in zip(maps, expected.items(), strict=True):
        found = tuple(route.tail_kind(each, torch.float32, False, hopper) for hopper in (False, True))
        assert found == kinds, name
    assert (
        route.tail_kind(thin, torch.bfloat16, False, hopper=True) == "dense"
    )  # of a factor that is rounded first


def test_one_pass_by_shape():
    """Where T is kept for a gradient it is not computed twice; Hopper's form takes what fills its tiles."""
    taken = {
        "filled": (kron((8, 8), (160, 160), "a_first", False), True, True),
        "b_first": (kron((8, 8), (160, 160), "b_first", False), True, True),
        "few_rows": (kron((32, 32), (40, 40), "a_first", False), True, False),
        "small": (kron((40, 40), (32, 32), "a_first", False), False, False),
        "shuffled": (kron((8, 8), (160, 160), "a_first", False, out_shuffled=True), True, False),
        "odd": (kron((8, 8), (157, 160), "a_first", False), True, False),
        "thin": (kron((4, 64), (320, 20), "a_first", True), False, False),
    }
    for name, (each, plain, hopper) in taken.items():
        assert route.in_one_pass(each, False, True, hopper=False) == plain, name
        assert route.in_one_pass(each, False, True, hopper=True) == hopper, name
        assert not route.in_one_pass(each, True, True, hopper=False), name
    assert not route.in_one_pass(taken["filled"][0], False, False, hopper=True)


def test_wide_first_product(cuda_ops, dtype, form):
    """A B of more rows than `shrink` reads x once for, by a GEMM where nothing scales it, forward and dx."""
    case = Case("wide", 5, KronShape(2, 2, 320, 304))
    assert route.by_gemm(kron((2, 2), (320, 304), "b_first", False), torch.zeros(5, 608))
    assert not route.by_gemm(
        kron((2, 2), (320, 304), "b_first", False, in_shuffled=True), torch.zeros(5, 608)
    )
    for scale in (1.0, 0.5):
        check(cuda_ops.device, case, dtype, form, scale=scale, factor_dtype=torch.float32)


def test_one_read_of_x_for_a_group(cuda_ops, monkeypatch):
    """q, k and v of one adapter share a launch; thin terms of unlike orders share one by their dense forms."""
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=cuda_ops.device)

    def term(left: tuple[int, int], right: tuple[int, int]) -> KronMap:
        factors = [torch.zeros(sides, device=cuda_ops.device) for sides in (left, right)]
        return KronMap.of(KronTerm(*factors), None)

    alike = [term((8, 8), (8, 8)) for _ in range(3)]
    assert launches(cuda_ops, monkeypatch, lambda: native_cuda.shrink(x, alike)) == ["mix"]
    unlike = [term((2, 16), (32, 4)), term((16, 2), (4, 32))]
    assert all(each.thin for each in unlike)
    names = launches(cuda_ops, monkeypatch, lambda: native_cuda.shrink(x, unlike))
    assert names == ["build", "build", "shrink"]


@pytest.mark.parametrize(
    ("form", "forward"),
    [(("plain", "one_pass"), ["fat_linear"]), (("plain", "two_kernels"), ["mix", "linear"])],
    ids=str,
)
def test_launches_of_a_fat_layer(cuda_ops, monkeypatch, form, forward):
    x, layer = to_device(cuda_ops.device, *case_inputs(CASES["sd15_320-lokr_f8"], torch.bfloat16, tokens=9))
    with route.forced(gemm=form[0], fat=form[1]):
        names = launches(cuda_ops, monkeypatch, lambda: kron_linear_group(x, [layer], impl="cuda"))
    assert names == forward


def test_forced_rejects():
    with (
        pytest.raises(ValueError, match="route gemm must be one of hopper, plain; got 'fast'"),
        route.forced(gemm="fast"),
    ):
        pass


def test_reasons(cuda_ops):
    assert cuda_reasons.reasons(cuda_ops.device, torch.bfloat16) == []
    assert cuda_reasons.reasons(cuda_ops.device, torch.float32) == [
        "float32 tensors: the kernels take float16 and bfloat16"
    ]
    with pytest.raises(NotImplementedError, match="impl='cuda' cannot serve this call:\n    float64 tensors"):
        backends.choose("kron_linear", IMPLEMENTATIONS, "cuda", cuda_ops.device, torch.float64)


def test_auto_passes_an_unmeasured_implementation_by():
    """It runs by name; `auto` takes the next, and says why where it ends at eager on a GPU."""
    device = torch.device("cuda", 0)
    names = {each.name: each for each in IMPLEMENTATIONS}
    assert names["cuda"].unmeasured == cuda_reasons.UNMEASURED
    ready = backends.Implementation("cuda", backends.never, lambda: None, unmeasured="no GPU has measured it")
    choose = partial(backends.choose, "kron_delta", device=device, dtype=torch.bfloat16)
    assert choose(implementations=(ready, names["eager"]), impl="cuda") is ready
    backends._warn_eager.cache_clear()
    with pytest.warns(RuntimeWarning, match="cuda: no GPU has measured it"):
        assert choose(implementations=(ready, names["eager"]), impl="auto").name == "eager"
    measured = backends.Implementation("cuda", backends.never, lambda: None)
    assert choose(implementations=(measured, names["eager"]), impl="auto") is measured
