"""kron_linear, kron_delta and kron_linear_group against the definition in float64, by implementation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, kron_delta, kron_linear, kron_linear_group
from kronafuse.ops.kron_linear.ref import delta_weight, kron_delta_ref, kron_linear_ref
from kronafuse.testing.accuracy import check_group, tensors_of
from kronafuse.testing.cases import CASES, LAYERS, ODD_CASES, Case
from kronafuse.testing.inputs import case_inputs, generator, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 33
"""Tokens of the named cases here; the benchmarks use them whole."""
EAGER_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRITON_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CPU_DTYPES = [torch.float32, torch.bfloat16]
CUDA_DTYPES = [torch.float16, torch.bfloat16]
IMPLS = ["eager", "triton", "cpu", "cuda"]
WIDE_LAYERS = ("flux2_3072", "ff_in", "ff_out")
WIDE_ADAPTERS = ("krona_64x4", "lokr_f8", "lora_r16")


def is_slow(case: Case, dtype: torch.dtype, impl: str) -> bool:
    """What `make test-full` adds: the interpreter beyond one layer, wide layers beyond three adapters."""
    layer, adapter = case.name.split("-")
    if impl == "triton" and DEVICE == "cpu":
        return layer != "sd15_320"
    if impl == "cuda" and DEVICE == "cpu":
        return layer not in ("sd15_320", "sdxl_640")
    if dtype in (torch.float16, torch.float64):
        return layer not in ("sd15_320", "sdxl_640")
    return layer in WIDE_LAYERS and (adapter not in WIDE_ADAPTERS or dtype != torch.float32)


def dtype_id(dtype: object) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def dtype_of(impl: str) -> torch.dtype:
    """What tests of one dtype take: the one whose errors are smallest."""
    return torch.float16 if impl == "cuda" else torch.float32


def case_params(impl: str, dtypes: list[torch.dtype]) -> list[object]:
    params = []
    for case in CASES.values():
        for dtype in dtypes:
            marks = [pytest.mark.slow] if is_slow(case, dtype, impl) else []
            params.append(pytest.param(case, dtype, impl, marks=marks, id=f"{case}-{dtype_id(dtype)}-{impl}"))
    return params


def odd_params() -> list[object]:
    pairs = [("eager", torch.float32), ("eager", torch.bfloat16), ("eager", torch.float64)]
    pairs += [("reference", torch.float64)] + [("triton", dtype) for dtype in TRITON_DTYPES]
    pairs += [("cpu", dtype) for dtype in CPU_DTYPES] + [("cuda", dtype) for dtype in CUDA_DTYPES]
    return [
        pytest.param(case, dtype, impl, id=f"{case}-{dtype_id(dtype)}-{impl}")
        for case in ODD_CASES.values()
        for impl, dtype in pairs
    ]


def to_device(x: torch.Tensor, layer: FrozenLinear, impl: str = "") -> tuple[torch.Tensor, FrozenLinear]:
    device = "cpu" if impl == "cpu" else DEVICE

    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    terms = tuple(KronTerm(*map(move, term)) for term in layer.terms)
    return move(x), FrozenLinear(move(layer.weight), terms, move(layer.bias), move(layer.base))


def check(case: Case, dtype: torch.dtype, impl: str, **options) -> None:
    tokens = TOKENS if case.name in CASES else None
    x, layer = to_device(*case_inputs(case, dtype, tokens=tokens, **options), impl)
    check_group(partial(kron_linear_group, impl=impl), x, [layer])


@pytest.mark.parametrize(
    ("case", "dtype", "impl"),
    case_params("eager", EAGER_DTYPES)
    + case_params("triton", TRITON_DTYPES)
    + case_params("cpu", CPU_DTYPES)
    + case_params("cuda", CUDA_DTYPES),
)
def test_named_cases(case, dtype, impl):
    """y and every gradient of the case list, from float32 factors where x is 16 bits wide."""
    wide = dtype if dtype == torch.float64 else torch.float32
    check(case, dtype, impl, factor_dtype=wide)


@pytest.mark.parametrize(
    ("case", "dtype", "impl"),
    case_params("eager", [torch.bfloat16, torch.float32])
    + case_params("triton", TRITON_DTYPES[:1])
    + case_params("cpu", CPU_DTYPES)
    + case_params("cuda", CUDA_DTYPES),
)
def test_delta_alone(case, dtype, impl):
    """Without W the delta's own error cannot hide behind the base's rounding."""
    x, layer = to_device(*case_inputs(case, dtype, tokens=9, weight=False, bias=False), impl)
    check_group(partial(kron_linear_group, impl=impl), x, [layer], wanted=[])


@pytest.mark.parametrize(("case", "dtype", "impl"), odd_params())
def test_odd_cases(case, dtype, impl):
    check(case, dtype, impl)


@pytest.mark.parametrize(("case", "dtype", "impl"), odd_params())
def test_strided_inputs(case, dtype, impl):
    """x and base with gaps between their elements, transposed factors, base and bias together."""
    check(case, dtype, impl, strided=True, base=True)


@pytest.mark.parametrize(("case", "dtype", "impl"), odd_params())
def test_delta_with_base_row_scale_and_tensor_scale(case, dtype, impl):
    """No weight, a base, rank dropout's rows, a tensor scale with a gradient, two terms."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(0.6, dtype=wide)
    check(case, dtype, impl, weight=False, base=True, row_scale=True, scale=scale, terms=2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", ["thin_b_first", "fat_a_first", "fat_b_first", "low_rank", "low_rank_fat", "lora"]
)
def test_each_gradient_alone(case, impl):
    """A gradient asked for alone is the one that comes when all are."""
    x, layer = to_device(
        *case_inputs(ODD_CASES[case], dtype_of(impl), base=True, row_scale=True, scale=torch.tensor(0.5)),
        impl,
    )
    names = list(tensors_of(x, [layer]))
    assert {"x", "weight0", "bias0", "base0", "b0.0", "scale0.0", "row_scale0.0"} <= set(names)
    for name in names:
        check_group(partial(kron_linear_group, impl=impl), x, [layer], wanted=[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_scale_has_a_gradient(impl):
    x, layer = to_device(*case_inputs(ODD_CASES["low_rank"], dtype_of(impl), scale=torch.tensor(0.0)), impl)
    check_group(partial(kron_linear_group, impl=impl), x, [layer])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_group_of_unlike_layers(narrow, impl):
    """q, k and v from one x: other widths, other adapters, no adapter at all, delta with base."""
    dtype = dtype_of(impl) if not narrow else torch.bfloat16 if impl in ("cpu", "cuda") else torch.float16
    source = generator(3)
    x = random(source, 2, 9, 48, dtype=dtype)

    def rand(*shape):
        return (random(source, *shape) / shape[-1] ** 0.5).to(dtype)

    layers = [
        FrozenLinear(rand(64, 48), (KronTerm(rand(16, 2), rand(4, 24), scale=0.5),), rand(64)),
        FrozenLinear(
            rand(32, 48), (KronTerm(None, rand(32, 4), rand(4, 48)), KronTerm(rand(4, 6), rand(8, 8)))
        ),
        FrozenLinear(rand(24, 48)),
        FrozenLinear(None, (KronTerm(rand(6, 6), rand(5, 8), shuffled=True),), None, rand(2, 9, 30)),
    ]
    x, *_ = to_device(x, layers[0], impl)
    check_group(partial(kron_linear_group, impl=impl), x, [to_device(x, layer, impl)[1] for layer in layers])


@pytest.mark.parametrize("impl", IMPLS)
def test_unused_output_of_a_group(impl):
    """A layer whose y goes nowhere adds nothing to dx."""
    x, layer = to_device(*case_inputs(ODD_CASES["primes"], dtype_of(impl)), impl)
    leaf = x.clone().requires_grad_()
    assert layer.weight is not None
    alone = torch.autograd.grad(kron_linear_group(leaf, [layer], impl=impl)[0].sum(), leaf)[0]
    first, _ = kron_linear_group(leaf, [layer, layer], impl=impl)
    assert torch.equal(torch.autograd.grad(first.sum(), leaf)[0], alone)


@pytest.mark.parametrize("impl", ["reference", "eager", "triton", "cpu"])
def test_public_functions_agree_with_their_references(impl):
    dtype = torch.float32
    x, layer = to_device(*case_inputs(ODD_CASES["low_rank_shuffled"], dtype, base=True), impl)
    (term,) = layer.terms
    options = {"b_down": term.b_down, "scale": 0.3, "shuffled": True}
    y = kron_linear(x, layer.weight, term.a, term.b, bias=layer.bias, **options, impl=impl)
    torch.testing.assert_close(
        y, kron_linear_ref(x, layer.weight, term.a, term.b, bias=layer.bias, **options)
    )
    y = kron_delta(x, term.a, term.b, base=layer.base, **options, impl=impl)
    torch.testing.assert_close(y, kron_delta_ref(x, term.a, term.b, base=layer.base, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_repeatable(impl):
    """The same bits twice: forward and every gradient."""
    from kronafuse.testing.accuracy import run

    x, layer = to_device(*case_inputs(CASES["sd15_320-krona_64x4"], dtype_of(impl), tokens=65), impl)
    dys = [torch.randn(65, 320, device=x.device, dtype=x.dtype)]
    first, second = (run(partial(kron_linear_group, impl=impl), x, [layer], dys) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def factor_step(tokens: int):
    """A B-first layer, its saved T, a dy, and the flags that ask for dx, dA and dB."""
    case = CASES["sdxl_1280-krona_64x4"]
    x, layer = case_inputs(case, torch.float32, tokens=tokens, bias=False)
    return (
        case,
        x,
        layer,
        torch.randn(tokens, case.shape.n),
        [True, False, False, True, True, False, False, False],
    )


def test_the_planned_backward_is_the_mirrored_order():
    """A B-first adapter does not take the A-first backward: 3.75 % of the base GEMM instead of 60 %."""
    from kronafuse.ops.kron_linear import algorithm, eager
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 64
    case, x, layer, dy, needs = factor_step(tokens)
    layer = layer._replace(weight=None)
    _, saved = algorithm.forward(x, [layer], eager)
    with FlopCounterMode(display=False) as counter:
        algorithm.backward([dy], x, [layer], saved, needs, eager)
    base = 2 * tokens * case.shape.n * case.shape.k
    assert 0 < counter.get_total_flops() <= 0.0376 * base


def test_the_planned_backward_on_triton():
    """The same of the kernels launched: dense forms of a thin T included, a fraction of the A-first backward."""
    from kronafuse.ops.kron_linear import algorithm, kernels
    from kronafuse.ops.launch import Architecture, recording

    tokens = 64
    case, x, layer, dy, needs = factor_step(tokens)
    layer = layer._replace(weight=None)
    with recording(Architecture(90, 132)) as launches:
        _, saved = algorithm.forward(x, [layer], kernels)
        launches.clear()
        algorithm.backward([dy], x, [layer], saved, needs, kernels)
    macs = 0
    for each in launches:
        sizes, name = {**each.arguments, **each.constants}, each.kernel.__name__
        if name == "_shrink_kernel":
            macs += sizes["rows"] * sizes["W"] * sizes["K"]
        elif name == "_reduce_kernel":
            macs += sizes["COUNT"] * sizes["rows"] * sizes["P"] * sizes["Q"]
        elif name == "_shrink_reduce_kernel":
            macs += 2 * sizes["rows"] * sizes["F"] * sizes["O"]
        elif name == "_mix_kernel":
            macs += sizes["elements"] * sizes["O1"] * sizes["I1"]
        elif name == "_linear_kernel":
            macs += sizes["M"] * sizes["N"] * (sizes["width0"] + sizes["width1"])
            macs += sizes["M"] * sizes["N"] * sizes["J"] if sizes["TAIL"] else 0
        else:
            assert name == "_sum_kernel", name
    assert 0 < macs <= 0.16 * tokens * case.shape.n * case.shape.k


@pytest.mark.parametrize("tokens", [16, 4096])
def test_nothing_wide_is_saved(tokens):
    """What forward saves beside x and the factors is T of thin terms, to the byte that the planner says."""
    from kronafuse import plan

    for name in ("sd15_320-krona_64x4", "sd15_320-lokr_f8", "sd15_320-lokr_f8_r16"):
        case = CASES[name]
        x, layer = case_inputs(case, torch.float32, tokens=tokens)
        term = layer.terms[0]._replace(
            **{part: getattr(layer.terms[0], part).requires_grad_() for part in ("a", "b")}
        )
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            kron_linear_group(x, [layer._replace(terms=(term,))], impl="eager")
        own = {t.data_ptr() for t in tensors_of(x, [layer]).values()}
        extra = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own)
        shape = case.shape
        expected = plan(tokens, shape.n1, shape.k1, shape.n2, shape.k2, rank=shape.rank, dtype=torch.float32)
        assert extra == expected.saved_bytes, name


@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_small_fat_intermediate_is_computed_once(tokens, monkeypatch):
    """Backward computes a fat T again only where it is large; a wide one is never held."""
    from kronafuse.ops.kron_linear import eager

    case = CASES["sd15_320-lokr_f8"]
    x, layer = case_inputs(case, torch.float32, tokens=tokens)
    (term,) = layer.terms
    b = term.b.requires_grad_()
    shrunk = []
    shrink = eager.shrink
    monkeypatch.setattr(eager, "shrink", lambda x, maps: shrunk.append(len(maps)) or shrink(x, maps))
    (y,) = kron_linear_group(x, [layer._replace(terms=(term._replace(b=b),))], impl="eager")
    held = y.grad_fn.held.values()
    assert [part.nbytes for part in held] == ([16 * 320 * 4] if tokens == 16 else [])
    y.sum().backward()
    assert shrunk == ([1] if tokens == 16 else [1, 1])


@pytest.mark.parametrize("adapter", ["krona_64x4", "krona_4x64", "lokr_f8", "lokr_f8_r16"])
def test_memory_within_the_planners_budget(adapter):
    """The peak of forward and backward: y, dx, one buffer of their size, four Ts and the factors; nothing N×K."""
    from kronafuse import plan
    from torch.profiler import ProfilerActivity, profile

    tokens, case = 64, CASES[f"sdxl_1280-{adapter}"]
    shape = case.shape
    x, layer = case_inputs(case, torch.float32, tokens=tokens)
    (term,) = layer.terms
    leaves = [each.requires_grad_() for each in (x, term.a, term.b, term.b_down) if each is not None]
    dy = torch.randn(tokens, shape.n)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        y = kron_linear_group(x, [layer], impl="eager")[0]
        grads = torch.autograd.grad(y, leaves, dy)
    held = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert len(grads) == len(leaves)
    planned = plan(tokens, shape.n1, shape.k1, shape.n2, shape.k2, rank=shape.rank, dtype=torch.float32)
    budget = 4 * (tokens * (2 * shape.n + shape.k + 4 * planned.width) + 4 * shape.parameters)
    assert 4 * tokens * (shape.n + shape.k) * 0.5 < peak <= budget
    assert budget < 4 * shape.n * shape.k


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_past_int32(impl):
    """Two rows of x 2³¹ elements apart: addresses must not be 32 bits wide."""
    device, dtype = ("cpu", torch.bfloat16) if impl == "cpu" else (DEVICE, torch.float16)
    buffer = torch.empty(2**31 + 64, dtype=dtype, device=device)
    x = buffer.as_strided((2, 32), (2**31, 1))
    x.copy_(torch.randn(2, 32))
    a, b = torch.randn(4, 4, device=device), torch.randn(8, 8, device=device)
    weight = torch.randn(32, 32, device=device, dtype=dtype)
    y = kron_linear(x, weight, a, b, impl=impl)
    torch.testing.assert_close(y, kron_linear(x.clone(), weight, a, b, impl=impl))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_adapter_divides_every_layer(layer):
    """A case that is left out would be a hole in every table."""
    assert sum(name.startswith(layer + "-") for name in CASES) == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("impl", ["eager", "cpu"])
@pytest.mark.parametrize(
    "adapter", ["krona_64x4", "lokr_f8", "lokr_f8_r16", "lora_r16", "diffusekrona_official"]
)
def test_a_small_update_in_16_bits_is_rounded_with_the_sum_and_not_after_it(adapter, impl, dtype):
    """An update of 1e-4 beside weights of 0.03: the plain chain rounds x Wᵀ, then the sum; here y is rounded once."""
    if impl == "cpu" and dtype == torch.float16:
        pytest.skip("impl='cpu' serves fp32 and bf16")
    case = CASES[f"sd15_320-{adapter}"]
    x, layer = case_inputs(case, dtype, tokens=TOKENS, factor_dtype=torch.float32, bias=False)
    (term,) = layer.terms
    update = delta_weight(term._replace(scale=1.0), torch.float64)
    scale = 1e-4 / update.std().item()
    weight = (0.03 * random(generator(2), case.shape.n, case.shape.k)).to(dtype)
    base, delta = x.double() @ weight.double().t(), x.double() @ update.t() * scale

    def error(y):
        return ((y.double() - base - delta).norm() / delta.norm()).item()

    factors = {"a": term.a, "b": term.b, "b_down": term.b_down, "shuffled": case.shuffled}
    ours = error(kron_linear(x, weight, scale=scale, impl=impl, **factors))
    plain = error(torch.nn.functional.linear(x, weight) + (scale * x.float() @ update.float().t()).to(dtype))
    once = error((base + delta).to(dtype))
    assert ours < 1.05 * once, (ours, once, plain)
    assert ours < 0.9 * plain, (ours, once, plain)
    bias = (0.03 * random(generator(3), case.shape.n)).to(dtype)
    base = base + bias.double()
    ours = error(kron_linear(x, weight, bias=bias, scale=scale, impl=impl, **factors))
    plain = error(
        torch.nn.functional.linear(x, weight, bias) + (scale * x.float() @ update.float().t()).to(dtype)
    )
    assert ours < 0.9 * plain, (ours, plain)


@pytest.mark.parametrize("impl", ["eager", "cpu"])
def test_a_base_beside_a_weight_in_16_bits_is_added_as_the_plain_chain_does(impl):
    case = CASES["sd15_320-krona_64x4"]
    x, layer = case_inputs(case, torch.bfloat16, tokens=TOKENS, factor_dtype=torch.float32, bias=True)
    (term,) = layer.terms
    base = (3 * random(generator(4), TOKENS, case.shape.n)).bfloat16()
    term = term._replace(scale=1.0)
    layer = FrozenLinear(layer.weight, (term,), layer.bias, base)
    delta = x.double() @ delta_weight(term, torch.float64).t()
    truth = (
        torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        + delta
        + base.double()
    )
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias) + delta.bfloat16() + base

    def error(y):
        return (y.double() - truth).square().mean().sqrt().item()

    (y,) = kron_linear_group(x, [layer], impl=impl)
    assert error(y) < 1.1 * error(plain)
