"""The bottleneck's CPU operators by themselves: every instruction set, mixed dtypes, chunks, what they record."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from bottleneck_problems import Problem, assert_close, double
from kronafuse import checks, native
from kronafuse.ops.bottleneck import eager, native_cpu
from kronafuse.ops.bottleneck.call import Call, Needs, result_dtype
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.bottleneck import call as call_case
from kronafuse.testing.bottleneck_cases import ODD_CASES
from kronafuse.testing.inputs import bottleneck_inputs
from torch import Tensor

CPU = torch.device("cpu")
LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2}
SPACINGS = {torch.float32: 32, torch.bfloat16: 3}
"""Largest errors, in spacings of the dtype at the largest element: a sum's order shows in the last bits of float32."""
ALL = Needs(True, True, True, True, True, True)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of one instruction set."""
    ops = native.cpu()
    if LEVELS[request.param] > ops.best_level():
        pytest.skip(f"this processor has no {request.param}")
    before = ops.level()
    ops.set_level(LEVELS[request.param])
    yield
    ops.set_level(before)


@pytest.fixture(params=SPACINGS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_step(call: Call, dy: Tensor, needs: Needs = ALL) -> None:
    """Forward and backward on poisoned outputs against eager in float64, from the same pre-activation."""
    dy = dy.to(result_dtype(call.x, call.residual, call.dtype, call.residual_is_x))
    with poisoned():
        y, pre = native_cpu.forward(call, True)
        grads = native_cpu.backward(dy, call, pre, needs)
    wide, low = double(call), dy.to(call.dtype).double()
    true_y, true_pre = eager.forward(wide, True)
    close = partial(assert_close, dtype=call.dtype)
    close("y", y, true_y, spacings=SPACINGS[call.dtype])
    close("pre", pre, true_pre, spacings=SPACINGS[call.dtype])
    # dy is rounded where it is multiplied, and not where it is added.
    truth = eager.backward(low, wide._replace(residual_is_x=False), pre.double(), needs)
    if truth.x is not None and call.residual_is_x:
        truth = truth._replace(x=truth.x + dy.double())
    for name, actual, expected in zip(Needs._fields, grads, truth, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None and expected is not None:
            # The scale's is a sum of rounded gradients of both signs.
            close(name, actual, expected, spacings=SPACINGS[call.dtype] * (8 if name == "scale" else 1))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("width", [1, 3, 16, 40, 130])
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_every_instruction_set(dtype, activation, width):
    problem = Problem(67, 37, width, 45, "other", activation, scale=torch.tensor(0.6))
    assert_step(*problem.call(dtype, CPU))


@pytest.mark.usefixtures("level")
def test_activations_are_torchs(dtype):
    """Far from 0 on both sides, at it, at both infinities and at NaN."""
    numbers = torch.cat((torch.linspace(-100, 100, 4001), torch.linspace(-3, 3, 2000), torch.zeros(1)))
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    one = torch.ones(1, 1, dtype=dtype)
    for activation in checks.ACTIVATIONS:
        x = torch.cat((numbers, odd)).to(dtype)[:, None]
        call = Call(x, None, one, one, None, None, 1.0, activation, dtype, False)
        y, pre = native_cpu.forward(call, True)
        dx = native_cpu.backward(torch.ones_like(y), call, pre, Needs(True, *[False] * 5)).x
        exact = pre.double().requires_grad_()
        truth = eager.FORWARD[activation](exact)
        (slope,) = torch.autograd.grad(truth.sum(), exact)
        assert dx is not None
        for actual, expected in ((y, truth.detach()), (dx, slope)):
            finite, special = slice(0, len(numbers)), slice(len(numbers), None)
            error = (actual[finite].double() - expected[finite]).abs()
            # A difference of two terms keeps the error of the larger.
            limit = torch.finfo(dtype).eps * (2 * expected[finite].abs() + 1)
            assert bool((error <= limit).all()), f"{activation}: {(error / limit).max():.2f} of the limit"
            if activation in ("identity", "relu", "sigmoid"):
                torch.testing.assert_close(actual[special].double(), expected[special], equal_nan=True)


@pytest.mark.parametrize("activation", ["sigmoid", "silu", "gelu"])
def test_closed_gates_are_closed(activation):
    """Far below 0 a gate is 0, not a small number that a huge input makes large; of the derivative the same."""
    x, one = torch.tensor([[-1e4], [-1e30], [-3e38]], requires_grad=True), torch.ones(1, 1)
    y = bottleneck(x, None, one, one, activation=activation, impl="cpu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert not dx.any()


@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stream", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes(stream, factor, residual):
    """What autocast leaves: features and factors of other dtypes beside products in bfloat16."""
    problem = Problem(45, 40, 12, 40, residual, "silu", stream=stream, factor=factor)
    assert_step(*problem.call(torch.bfloat16, CPU), ALL._replace(scale=False))


@pytest.mark.parametrize("stream", [None, torch.float32, torch.float16], ids=["narrow", "float32", "float16"])
@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
def test_chunks_of_tokens(stream, strided, dtype):
    """So many features that a chunk of tokens is less than all of them, with a rest."""
    problem = Problem(1100, 4096, 5, 4096, "x", "gelu", strided=strided, stream=stream)
    if dtype == torch.float32 and stream == torch.float16:
        pytest.skip("products are in float32 under no autocast of float16")
    assert_step(*problem.call(dtype, CPU), ALL._replace(scale=False))


@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_strided(dtype, tokens, residual):
    problem = Problem(tokens, 53, 12, 53, residual, "sigmoid", strided=True, scale=torch.tensor(-0.6))
    assert_step(*problem.call(dtype, CPU))


@pytest.mark.parametrize("name", Needs._fields)
def test_each_gradient_alone(dtype, name):
    needs = Needs(*(name == each for each in Needs._fields))
    assert_step(*Problem(300, 40, 12, 48, "none", scale=torch.tensor(0.6)).call(dtype, CPU), needs)


def test_a_float32_stream_is_not_rounded():
    """A delta of nothing leaves the residual's bits alone."""
    call, _ = Problem(20, 48, 16, 48, stream=torch.float32, scale=0.0).call(torch.bfloat16, CPU)
    y, _ = native_cpu.forward(call, False)
    assert torch.equal(y, call.x)


RECORDED = {
    "aten::empty",
    "aten::new_empty",
    "aten::promote_types",
    "aten::resolve_conj",
    "aten::resolve_neg",
}
"""What may be recorded beside the products: memory without contents, dtypes, and flags of tensors."""
PRODUCTS = {"aten::mm", "aten::addmm"}


@pytest.mark.parametrize("scale", [0.7, torch.tensor(0.7)], ids=["number", "tensor"])
@pytest.mark.parametrize("case", ODD_CASES)
def test_records_no_operator_but_products(case, scale, dtype):
    """Forward and backward with float32 factors: every pass between the products is the library's own."""
    problem = ODD_CASES[case]
    options = {"scale": scale} if isinstance(scale, Tensor) else {}
    tensors = bottleneck_inputs(problem, dtype, factor_dtype=torch.float32, **options)
    leaves = {name: tensor.requires_grad_(name != "residual") for name, tensor in tensors.items()}
    dy = torch.randn(problem.tokens, problem.out_features).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = call_case(partial(bottleneck, impl="cpu"), problem, leaves)
        torch.autograd.grad(y, [leaf for leaf in leaves.values() if leaf.requires_grad], dy)
    seen = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert seen <= RECORDED | PRODUCTS
    assert any(event.key == "kronafuse_cpu::bottleneck_backward" for event in profile.key_averages())


def test_repeatable():
    """The same bits at every call, and, of sums that no product of torch's goes into, for any number of threads."""
    call, dy = Problem(3000, 24, 20, 24, scale=torch.tensor(0.5)).call(torch.float32, CPU)
    _, pre = native_cpu.forward(call, True)
    one, two = (native_cpu.backward(dy, call, pre, ALL) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = native_cpu.backward(dy, call, pre, Needs(*[False] * 4, True, False)).up_bias
            assert torch.equal(found, one.up_bias)
    finally:
        torch.set_num_threads(before)
