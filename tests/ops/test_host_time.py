"""What keeps a call's host time low: no dispatcher where nothing watches, the op itself wherever something does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, bottleneck, kron_linear, kron_linear_group
from kronafuse.ops import calls
from kronafuse.ops.bottleneck import raw as bottleneck_raw
from kronafuse.ops.kron_linear import eager
from kronafuse.ops.kron_linear import raw as kron_raw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def kron_call(x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    weight, a, b = factors
    return kron_linear(x, weight, a, b, scale=0.7, impl="eager")


def group_call(x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    weight, a, b = factors
    layer = FrozenLinear(weight, (KronTerm(a, b, scale=0.7),))
    return sum(kron_linear_group(x, [layer, layer, layer], impl="eager"), start=torch.zeros(()))


def bottleneck_call(x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    down, up, bias = factors
    return bottleneck(x, x, down, up, up_bias=bias, scale=0.7, impl="eager")


CALLS = {
    "kron_linear": (kron_call, ((12, 12), (3, 4), (4, 3)), kron_raw, "kron"),
    "kron_linear_group": (group_call, ((12, 12), (3, 4), (4, 3)), kron_raw, "kron"),
    "bottleneck": (bottleneck_call, ((5, 12), (12, 5), (12,)), bottleneck_raw, "bottleneck"),
}


@pytest.fixture(params=CALLS)
def problem(request):
    """(function of x and factors, x, factors, module of the raw ops, the ops' prefix)."""
    function, sizes, raw, prefix = CALLS[request.param]
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 12, generator=source, requires_grad=True)
    factors = [torch.randn(*size, generator=source, requires_grad=True) for size in sizes]
    return function, x, factors, raw, prefix


@pytest.fixture
def seen(problem, monkeypatch):
    """Names of the registered ops that were called, in order."""
    _, _, _, raw, prefix = problem
    names: list[str] = []
    for name in (f"{prefix}_forward", f"{prefix}_backward"):
        op = getattr(raw, name)

        def record(*arguments, _op=op, _name=name):
            names.append(_name)
            return _op(*arguments)

        monkeypatch.setattr(raw, name, record)
    return names


def gradients(function, x, factors) -> tuple[torch.Tensor, ...]:
    y = function(x, factors)
    # No generator: make_fx of torch 2.11 cannot trace one.
    dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return y, *torch.autograd.grad(y, [x, *factors], dy)


@pytest.mark.parametrize("region", [None, "no_grad", "inference", "autocast"])
def test_plain_calls_leave_the_dispatcher_out(problem, seen, region):
    function, x, factors, _, _ = problem
    if region == "no_grad":
        with torch.no_grad():
            function(x, factors)
    elif region == "inference":
        with torch.inference_mode():
            function(x, factors)
    elif region == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x, factors)
        torch.autograd.grad(y.float().sum(), [x, *factors])
    else:
        gradients(function, x, factors)
    assert seen == []


def test_the_kernel_alone_gives_what_the_op_gives(problem, monkeypatch):
    function, x, factors, _, _ = problem
    plain = gradients(function, x, factors)
    monkeypatch.setattr(calls, "is_unobserved", lambda tensors: False)
    for ours, expected in zip(plain, gradients(function, x, factors), strict=True):
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_ops_and_nothing_inside_them(problem):
    function, x, factors, _, prefix = problem
    with _Dispatched() as mode:
        gradients(function, x, factors)
    assert [name for name in mode.names if name.startswith("kronafuse.")] == [
        f"kronafuse.{prefix}_forward.default",
        f"kronafuse.{prefix}_backward.default",
    ]
    assert not any("mm" in name for name in mode.names)


def test_a_function_mode_and_the_profiler_see_the_ops(problem, seen):
    function, x, factors, _, prefix = problem
    ops = [f"{prefix}_forward", f"{prefix}_backward"]
    with _Functions():
        function(x, factors)
    assert seen == ops[:1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(function, x, factors)
    events = {event.key for event in profile.key_averages()}
    assert {f"kronafuse::{name}" for name in ops} <= events


def test_tracers_and_fakes_see_the_ops(problem, seen):
    function, x, factors, _, prefix = problem
    ops = [f"{prefix}_forward", f"{prefix}_backward"]
    graph = make_fx(lambda x, *factors: gradients(function, x, list(factors)))(x, *factors)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert [name for name in targets if name.startswith("kronafuse.")] == [
        f"kronafuse.{name}.default" for name in ops
    ]
    seen.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert function(x, factors).shape == x.shape
    assert seen == ops[:1]


def test_jit_trace_sees_the_op():
    x, down, up = torch.randn(7, 12), torch.randn(5, 12), torch.randn(12, 5)
    with torch.no_grad():
        traced: Any = torch.jit.trace(
            lambda x: bottleneck(x, x, down, up, impl="eager"), (x,), check_trace=False
        )
    assert "kronafuse::bottleneck_forward" in str(traced.graph)


def test_subclasses_and_meta_tensors_see_the_ops(problem, seen):
    function, x, factors, _, prefix = problem
    forward = f"{prefix}_forward"

    class Subclass(torch.Tensor):
        pass

    function(x.detach().as_subclass(Subclass), factors)
    assert seen == [forward]
    seen.clear()
    assert function(x.to("meta"), [each.to("meta") for each in factors]).is_meta
    assert seen == [forward]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_programs_call_the_op(problem, dynamic):
    torch._dynamo.reset()
    function, x, factors, _, prefix = problem
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: function(x, [each.detach() for each in factors]),
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), function(x, factors))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert f"kronafuse.{prefix}_forward.default" in targets


def test_a_batched_backward_raises_and_is_not_computed_wrongly(problem):
    function, x, factors, _, _ = problem
    y = function(x, factors)
    with pytest.raises(
        NotImplementedError, match=r"the batched tensors of torch.func.vmap .* not implemented"
    ):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("tokens", [(7,), (2, 7), (2, 1, 7)])
def test_results_may_be_changed_in_place(problem, tokens):
    """Leading dimensions are put back without a view that autograd knows of."""
    function, x, factors, _, _ = problem
    x = torch.randn(*tokens, 12, requires_grad=True)
    y = function(x, factors)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    y += 1
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    with torch.no_grad():
        z = function(x, factors)
    assert not z._is_view()
    z += 1


def test_a_view_of_the_result_shares_nothing_with_autograd():
    y = torch.randn(6, 4)
    whole = calls.unflat_tokens(y, (2, 3))
    assert whole.shape == (2, 3, 4)
    assert whole.data_ptr() == y.data_ptr()
    assert not whole._is_view()


def test_tensors_that_have_the_dtype_are_not_touched():
    tensor = torch.randn(3)
    assert calls.as_dtype(tensor, torch.float32) is tensor
    assert calls.as_dtype(tensor, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", ["neither", "p", "q", "both"])
@pytest.mark.parametrize(
    ("tokens", "group", "height", "width"), [(300, 5, 3, 4), (300, 5, 40, 6), (300, 5, 6, 40), (9, 5, 40, 6)]
)
def test_reduce_whatever_the_layout(tokens, group, height, width, transposed, dtype):
    """The same sums, contiguous, for every layout that a factor gradient's operands come in."""
    source = torch.Generator().manual_seed(1)

    def operand(size: int, is_transposed: bool) -> torch.Tensor:
        if is_transposed:
            return torch.randn(tokens, size, group, generator=source).to(dtype).mT
        return torch.randn(tokens, group, size, generator=source).to(dtype)

    p = operand(height, transposed in ("p", "both"))
    q = operand(width, transposed in ("q", "both"))
    ours = eager.reduce(p, q, 0.5, dtype)
    exact = 0.5 * torch.einsum("mgp,mgq->pq", p.double(), q.double())
    spacing = torch.finfo(dtype).eps
    assert ours.is_contiguous()
    torch.testing.assert_close(
        ours.double(), exact, rtol=16 * spacing, atol=16 * spacing * (tokens * group) ** 0.5
    )
