"""bottleneck against the definition in float64, by implementation."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from kronafuse import available_impls, backends, checks
from kronafuse.ops import scales
from kronafuse.ops.bottleneck import eager, raw
from kronafuse.ops.bottleneck.call import Call, Needs
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.ops.bottleneck.ref import bottleneck_ref
from kronafuse.testing.bottleneck import call, check_case
from kronafuse.testing.bottleneck_cases import CASES, ODD_CASES, BottleneckCase
from kronafuse.testing.inputs import bottleneck_inputs
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 33
"""Tokens of the named cases here; the benchmarks use them whole."""
EAGER_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRITON_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CPU_DTYPES = [torch.float32, torch.bfloat16]
CUDA_DTYPES = [torch.float16, torch.bfloat16]
IMPLS = ["eager", "triton", "cpu", "cuda"]
NAMES = ("x", "residual", "down", "up", "down_bias", "up_bias", "scale")


def device_of(impl: str) -> str:
    return "cpu" if impl == "cpu" else DEVICE


def dtype_of(impl: str) -> torch.dtype:
    """float32 for what takes it."""
    return torch.float16 if impl == "cuda" else torch.float32


def dtype_id(dtype: object) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def is_slow(case: BottleneckCase, dtype: torch.dtype, impl: str) -> bool:
    """What `make test-full` adds: interpreted Triton and emulated CUDA beyond two widths, fp16 beyond one."""
    fast = ("sd15_320-width_60", "sd15_320-width_160") if dtype == torch.float32 else ("sd15_320-width_60",)
    return impl in ("triton", "cuda") and DEVICE == "cpu" and case.name not in fast


def case_params(impl: str, dtypes: list[torch.dtype]) -> list[object]:
    return [
        pytest.param(
            case,
            dtype,
            impl,
            marks=[pytest.mark.slow] if is_slow(case, dtype, impl) else [],
            id=f"{case}-{dtype_id(dtype)}-{impl}",
        )
        for case in CASES.values()
        for dtype in dtypes
    ]


def odd_params() -> list[object]:
    pairs = [("eager", torch.float32), ("eager", torch.bfloat16), ("eager", torch.float64)]
    pairs += [("reference", torch.float64)] + [("triton", dtype) for dtype in TRITON_DTYPES]
    pairs += [("cpu", dtype) for dtype in CPU_DTYPES] + [("cuda", dtype) for dtype in CUDA_DTYPES]
    return [
        pytest.param(case, dtype, impl, id=f"{case}-{dtype_id(dtype)}-{impl}")
        for case in ODD_CASES.values()
        for impl, dtype in pairs
    ]


def check(case: BottleneckCase, dtype: torch.dtype, impl: str, **options) -> None:
    check_case(partial(bottleneck, impl=impl), case, dtype, device=device_of(impl), **options)


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
    check(case, dtype, impl, factor_dtype=wide, tokens=TOKENS)


@pytest.mark.parametrize(
    ("case", "dtype", "impl"),
    case_params("eager", [torch.bfloat16, torch.float32])
    + case_params("triton", TRITON_DTYPES[:1])
    + case_params("cpu", CPU_DTYPES)
    + case_params("cuda", CUDA_DTYPES),
)
def test_delta_alone(case, dtype, impl):
    """Without a residual the delta's own error cannot hide behind the residual's rounding."""
    alone = BottleneckCase(case.name, 9, case.in_features, case.width, case.out_features, "none")
    check(alone, dtype, impl, wanted=[])


@pytest.mark.parametrize(("case", "dtype", "impl"), odd_params())
def test_odd_cases(case, dtype, impl):
    check(case, dtype, impl)


@pytest.mark.parametrize(("case", "dtype", "impl"), odd_params())
def test_strided_inputs(case, dtype, impl):
    """x, residual and biases with gaps between their elements, transposed factors, a tensor scale with a gradient."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(case, dtype, impl, strided=True, scale=torch.tensor(0.6, dtype=wide))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_activations(activation, residual, impl):
    case = BottleneckCase("activation", 19, 24, 20, 24, residual, activation)
    for dtype in {"triton": TRITON_DTYPES, "cuda": CUDA_DTYPES}.get(impl, CPU_DTYPES):
        check(case, dtype, impl)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("case", ["primes", "narrowing", "no_biases_identity", "width_two_parts"])
def test_each_gradient_alone(case, impl):
    """A gradient asked for alone is the one that comes when all are."""
    problem, scale = ODD_CASES[case], torch.tensor(0.5)
    names = list(bottleneck_inputs(problem, torch.float32, scale=scale))
    assert {"x", "down", "up", "scale"} <= set(names) <= set(NAMES)
    for name in names:
        check(problem, dtype_of(impl), impl, scale=scale, wanted=[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("left_out", NAMES)
def test_all_gradients_but_one(left_out, impl):
    problem, scale = ODD_CASES["narrowing"], torch.tensor(0.5)
    wanted = [name for name in NAMES if name != left_out]
    check(problem, dtype_of(impl), impl, scale=scale, wanted=wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [0.0, -2.5])
def test_zero_and_negative_scales_have_gradients(scale, impl):
    check(ODD_CASES["primes"], dtype_of(impl), impl, scale=torch.tensor(scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", ["primes", "narrowing", "no_residual", "no_biases", "no_biases_identity"])
def test_a_scale_that_stays_on_its_device(case, dtype, monkeypatch):
    """On a GPU eager multiplies by a tensor scale instead of reading it; the same arithmetic anywhere."""
    monkeypatch.setattr(scales, "on_host", lambda scale, _: scale)
    check(ODD_CASES[case], dtype, "eager", scale=torch.tensor(0.6))


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_inputs(impl):
    """One token for all, one residual for all, and a dy of one number."""
    place = {"device": device_of(impl), "dtype": dtype_of(impl)}
    x, residual = torch.randn(1, 1, 12, **place), torch.randn(6, **place)
    down, up = torch.randn(5, 12, **place), torch.randn(6, 5, **place, requires_grad=True)
    x, residual = x.expand(3, 7, 12), residual.expand(3, 7, 6)
    y = bottleneck(x, residual, down, up, impl=impl)
    expected = bottleneck_ref(x, residual, down, up)
    close = {"atol": 0.05, "rtol": 0.02} if impl == "cuda" else {}
    torch.testing.assert_close(y, expected, **close)
    (dup,) = torch.autograd.grad(y.sum(), up)
    torch.testing.assert_close(dup, torch.autograd.grad(expected.sum(), up)[0], **close)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_the_relu_of_nothing_and_of_nan(impl):
    """At 0 the gradient is 0, and NaN stays NaN, as torch has it."""
    place = {"device": device_of(impl), "dtype": dtype_of(impl)}
    x = torch.tensor([[0.0], [float("nan")]], **place, requires_grad=True)
    one = torch.ones(1, 1, **place)
    y = bottleneck(x, None, one, one, impl=impl)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y[0, 0] == 0
    assert dx[0, 0] == 0
    assert y[1, 0].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_repeatable(impl):
    """The same bits at every call."""
    case = BottleneckCase("repeatable", 100, 40, 20, 40)
    tensors = bottleneck_inputs(case, dtype_of(impl), scale=torch.tensor(0.5))
    leaves = {name: tensor.to(device_of(impl)).requires_grad_() for name, tensor in tensors.items()}

    def step():
        y = call(partial(bottleneck, impl=impl), case, leaves)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    assert all(torch.equal(one, two) for one, two in zip(step(), step(), strict=True))


def test_backend_choice():
    """auto on a CPU is the native library, for what it takes; a named implementation runs or says why not."""
    x, down, up = torch.randn(2, 8), torch.randn(3, 8), torch.randn(8, 3)
    names = [each.name for each in raw.IMPLEMENTATIONS]
    assert names == ["cuda", "cpu", "triton", "eager", "reference"]
    device = torch.device(DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fallback = "cpu" if dtype in CPU_DTYPES else "eager"
        expected = "triton" if DEVICE == "cuda" and dtype != torch.float64 else fallback
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert backends.choose("bottleneck", raw.IMPLEMENTATIONS, "auto", device, dtype).name == expected
    assert torch.equal(bottleneck(x, x, down, up), bottleneck(x, x, down, up, impl="cpu"))
    for impl, taken in (("triton", "float32, float16 and bfloat16"), ("cpu", "float32 and bfloat16")):
        with pytest.raises(NotImplementedError, match=f"impl='{impl}' cannot serve this call(.|\n)*{taken}"):
            bottleneck(x.double(), None, down.double(), up.double(), impl=impl)
    with pytest.raises(NotImplementedError, match="float32 tensors: the kernels take float16 and bfloat16"):
        bottleneck(x, None, down, up, impl="cuda")
    with pytest.raises(ValueError, match="bottleneck: impl must be one of auto, reference, eager"):
        bottleneck(x, None, down, up, impl="fast")


def test_available_impls_speaks_for_this_op_too():
    found = available_impls()
    assert found["eager"] == found["reference"] == found["cpu"] == []
    assert found["cuda"] != ["not built yet"]


class Allocations(TorchDispatchMode):
    """Elements of every tensor with memory of its own that an operation returns; views and `out=` left out.

    Every tensor seen is kept, so that no memory is given out twice.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.kept = list(known)
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = {each.untyped_storage().data_ptr() for each in self.kept}
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                if each.untyped_storage().data_ptr() not in storages:
                    self.sizes.append(each.numel())
                self.kept.append(each)
        return result

    def wide(self, elements: int) -> int:
        """How many of them are as large as that."""
        return sum(size >= elements for size in self.sizes)


def flat_call(residual: str, dtype: torch.dtype, scale: float | torch.Tensor) -> tuple[Call, torch.Tensor]:
    """A problem of 64 tokens, 96 wide, as the implementations take it, and its dy."""
    case = BottleneckCase("memory", 64, 96, 8, 96, residual)
    tensors = bottleneck_inputs(case, dtype)
    added = {"x": tensors["x"], "other": tensors.get("residual"), "none": None}[residual]
    factors = (tensors[name] for name in ("down", "up", "down_bias", "up_bias"))
    own = residual == "x"
    return Call(tensors["x"], added, *factors, scale, "gelu", dtype, own), torch.randn(64, 96).to(dtype)


@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [0.7, torch.tensor(0.7)], ids=["number", "tensor"])
def test_eager_makes_nothing_wide_beyond_y_and_dx(residual, dtype, scale):
    """Inside the implementation, where nothing hides: one wide tensor forward, one backward."""
    problem, dy = flat_call(residual, dtype, scale)
    known = [each for each in problem if isinstance(each, torch.Tensor)]
    with Allocations(*known, dy) as forward:
        _, pre = eager.forward(problem, True)
    assert forward.wide(64 * 96) == 1
    needs = Needs(True, True, True, True, True, isinstance(scale, torch.Tensor))
    with Allocations(*known, dy, pre) as backward:
        eager.backward(dy, problem, pre, needs)
    assert backward.wide(64 * 96) == 1


def test_the_count_of_wide_tensors_sees_them():
    """The plain chain, counted the same way, makes more."""
    problem, _ = flat_call("x", torch.float32, 0.7)
    known = [each for each in problem if isinstance(each, torch.Tensor)]
    with Allocations(*known) as seen:
        hidden = torch.nn.functional.gelu(problem.x @ problem.down.t() + problem.down_bias)
        problem.x + 0.7 * (hidden @ problem.up.t() + problem.up_bias)
    assert seen.wide(64 * 96) == 4


def saved(case: BottleneckCase, wanted: tuple[str, ...]) -> list[torch.Tensor]:
    """What the forward keeps beside its own factors."""
    tensors = bottleneck_inputs(case, torch.float32, tokens=16, scale=torch.tensor(0.5))
    for name in wanted:
        tensors[name].requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(partial(bottleneck, impl="eager"), case, tensors)
    own = {tensor.data_ptr() for name, tensor in tensors.items() if name != "x"}
    x = tensors["x"].data_ptr()
    return [
        each
        for each in kept
        if each.data_ptr() not in own
        and each.untyped_storage().nbytes() > 4
        and not (each.data_ptr() == x and "down" in wanted)
    ]


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("residual", ["x", "other", "none"])
def test_nothing_wide_is_saved(residual, activation):
    """Beside the factors: x where down asks for a gradient, and the M×H pre-activation."""
    case = BottleneckCase("saved", 16, 40, 6, 40, residual, activation)
    everything = ("x", "down", "up", "down_bias", "up_bias", "scale")
    (pre,) = saved(case, everything)
    assert pre.shape == (16, 6)
    (pre,) = saved(case, ("x",))
    assert pre.shape == (16, 6)
    assert saved(case, ("up_bias",)) == []
    if residual == "other":
        assert saved(case, ("residual",)) == []


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_past_int32(impl):
    """Two rows of x 2³¹ elements apart: addresses must not be 32 bits wide."""
    device, dtype = device_of(impl), torch.bfloat16 if impl == "cpu" else torch.float16
    buffer = torch.empty(2**31 + 64, dtype=dtype, device=device)
    x = buffer.as_strided((2, 32), (2**31, 1))
    x.copy_(torch.randn(2, 32))
    down = torch.randn(8, 32, device=device, requires_grad=True)
    up = torch.randn(32, 8, device=device)
    y = bottleneck(x, x, down, up, impl=impl)
    near = x.clone()
    expected = bottleneck(near, near, down, up, impl=impl)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, down, dy), torch.autograd.grad(expected, down, dy))
