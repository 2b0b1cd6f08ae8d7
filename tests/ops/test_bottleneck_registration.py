"""What torch expects of the bottleneck: opcheck, gradcheck, compile, export, autocast, checkpointing, determinism."""

from __future__ import annotations

import pytest
import torch
from kronafuse import checks
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.testing.bottleneck import bottleneck_chain, call
from kronafuse.testing.bottleneck_cases import ODD_CASES, BottleneckCase
from kronafuse.testing.inputs import bottleneck_inputs
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

RESIDUALS = ("x", "other", "none")
ON_CPUS = pytest.mark.parametrize("impl", ["eager", "cpu"])
"""Both that a CPU has."""


def raw_arguments(
    case: str, impl: str, scale: torch.Tensor | None
) -> tuple[list[object], tuple[object, ...]]:
    """Tensors and options of the raw forward op."""
    problem = ODD_CASES[case]
    tensors = bottleneck_inputs(problem, torch.float32)
    names = ("x", "residual", "down", "up", "down_bias", "up_bias")
    options = (0.5, problem.activation, torch.float32, problem.residual == "x", impl)
    return [*(tensors.get(name) for name in names), scale], options


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("impl", ["eager", "reference", "triton", "cpu"])
@pytest.mark.parametrize("case", ["primes", "narrowing", "no_biases_identity", "empty"])
def test_opcheck_forward(case, impl, keep):
    tensors, options = raw_arguments(case, impl, None)
    torch.library.opcheck(torch.ops.kronafuse.bottleneck_forward, (*tensors, *options, keep))


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("impl", ["eager", "reference", "triton", "cpu"])
@pytest.mark.parametrize("case", ["primes", "narrowing", "no_biases_identity", "empty"])
def test_opcheck_backward(case, impl, needed):
    tensors, options = raw_arguments(case, impl, torch.tensor(0.5))
    y, pre = torch.ops.kronafuse.bottleneck_forward(*tensors, *options, True)
    x, _, *factors = tensors
    needs = [each is not None and needed for each in (x, *factors)]
    arguments = (torch.randn_like(y), x, *factors, pre, *options, needs)
    torch.library.opcheck(torch.ops.kronafuse.bottleneck_backward, arguments)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_gradcheck(activation, residual, impl):
    case = BottleneckCase("gradcheck", 3, 6, 4, 6, residual, activation)
    scale = torch.tensor(0.7, dtype=torch.float64)
    named = bottleneck_inputs(case, torch.float64, scale=scale)
    leaves = [tensor.clone().requires_grad_() for tensor in named.values()]

    def function(*tensors):
        given = dict(zip(named, tensors, strict=True))
        return call(lambda *args, **options: bottleneck(*args, **options, impl=impl), case, given)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def factors(features: int = 48, width: int = 6) -> dict[str, torch.Tensor]:
    """The tensors of a bottleneck beside x and residual, with gradients."""
    case = BottleneckCase("factors", 1, features, width, features)
    tensors = bottleneck_inputs(case, torch.float32)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items() if name != "x"}


@ON_CPUS
def test_second_derivatives_raise(impl):
    x = torch.randn(3, 48, requires_grad=True)
    y = bottleneck(x, x, **factors(), impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bottleneck: second derivatives are not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize("own_residual", [True, False], ids=["own_residual", "no_residual"])
@pytest.mark.parametrize("of", ["hessian", "gradient_penalty", "nested_grad"])
def test_second_derivatives_raise_with_frozen_factors(of, own_residual):
    """Where x alone asks for a gradient nothing else leads back to the op: it must raise, not give a first one's."""
    frozen = {name: each.detach() for name, each in factors().items() if isinstance(each, torch.Tensor)}

    def total(x):
        return bottleneck(x, x if own_residual else None, **frozen, activation="silu", impl="eager").sum()

    def penalised(x):
        (dx,) = torch.autograd.grad(total(x), x, create_graph=True)
        (total(x) + dx.square().sum()).backward()

    twice = {
        "hessian": lambda x: torch.autograd.functional.hessian(total, x.detach()),
        "gradient_penalty": penalised,
        "nested_grad": torch.func.grad(lambda x: torch.func.grad(total)(x).square().sum()),
    }[of]
    with pytest.raises(RuntimeError, match="bottleneck: second derivatives are not implemented"):
        twice(torch.randn(3, 48, requires_grad=of == "gradient_penalty"))


@pytest.mark.parametrize("impl", ["eager", "auto"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_compile_fullgraph_one_graph_for_scales_and_tokens(residual, impl):
    """Floats that change, tokens that change: one graph, equal results, equal gradients."""
    torch._dynamo.reset()
    named = factors()
    counter = CompileCounter()

    def function(x, other, scale):
        added = {"x": x, "other": other, "none": None}[residual]
        return bottleneck(x, added, **named, activation="silu", scale=scale, impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 9, 4):
        for scale in (0.5, 1.5, 0.3):
            x, other = (torch.randn(2, tokens, 48, requires_grad=True) for _ in range(2))
            dy, leaves = torch.randn(2, tokens, 48), (x, *named.values())
            ours, expected = compiled(x, other, scale), function(x, other, scale)
            torch.testing.assert_close(ours, expected)
            grads = torch.autograd.grad(ours, leaves, dy)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, dy))
    assert counter.frame_count == 1


@ON_CPUS
def test_compile_fullgraph_with_inductor(impl):
    torch._dynamo.reset()
    named, scale = factors(), torch.tensor(0.5, requires_grad=True)

    def block(x):
        hidden = torch.nn.functional.layer_norm(x, (48,))
        return bottleneck(x * 2, hidden, **named, activation="gelu", scale=scale, impl=impl) + 1

    x = torch.randn(2, 5, 48, requires_grad=True)
    ours, expected = torch.compile(block, fullgraph=True)(x), block(x)
    torch.testing.assert_close(ours, expected)
    leaves, dy = (x, scale, *named.values()), torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


@pytest.mark.parametrize("grad", [True, False])
def test_compile_fullgraph_where_nothing_requires_grad(grad):
    torch._dynamo.reset()
    named = {name: tensor.detach() for name, tensor in factors().items()}
    compiled = torch.compile(
        lambda x: bottleneck(x, x, **named, scale=0.5), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(5, 48)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), bottleneck(x, x, **named, scale=0.5))


@ON_CPUS
def test_compile_fullgraph_of_tied_factors(impl):
    """One tensor in two places."""
    torch._dynamo.reset()
    bias, square = torch.randn(8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def function(x):
        return bottleneck(x, None, square, square, down_bias=bias, up_bias=bias, impl=impl)

    x = torch.randn(5, 8, requires_grad=True)
    ours, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x)
    leaves, dy = (x, square, bias), torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


@ON_CPUS
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, impl):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = torch.nn.ParameterDict(
                {name: torch.nn.Parameter(tensor.detach()) for name, tensor in factors().items()}
            )

        def forward(self, x):
            names = ("down", "up", "down_bias", "up_bias")
            down, up, down_bias, up_bias = (self.factors[name] for name in names)
            return bottleneck(x, x, down, up, down_bias=down_bias, up_bias=up_bias, scale=0.5, impl=impl)

    layer = Layer()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(7, 48),), dynamic_shapes=({0: tokens},), strict=strict)
    graphs = [
        module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    assert any("bottleneck_forward" in str(node.target) for graph in graphs for node in graph.nodes)
    x = torch.randn(11, 48)
    torch.testing.assert_close(program.module()(x), layer(x))


def autocast_results(function, residual: str, dtype: torch.dtype, stream: torch.dtype):
    """y and gradients under autocast, from a stream of one dtype and float32 factors."""
    named = factors()
    source = torch.Generator().manual_seed(5)
    x, other = (torch.randn(9, 48, generator=source).to(stream).requires_grad_() for _ in range(2))
    added = {"x": x, "other": other, "none": None}[residual]
    with torch.autocast("cpu", dtype=dtype):
        y = function(x, added, **named, activation="silu", scale=0.5)
    leaves = {"x": x, **({"other": other} if residual == "other" else {}), **named}
    dy = torch.randn(y.shape, generator=source).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return y, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
def test_autocast_keeps_the_residuals_dtype(impl, residual, dtype):
    """float32 with a float32 residual, autocast's dtype without one; gradients in their tensors' dtypes."""
    if impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        with (
            torch.autocast("cpu", dtype=dtype),
            pytest.raises(NotImplementedError, match="computes bfloat16"),
        ):
            bottleneck(torch.randn(2, 48), None, **factors(), impl=impl)
        return
    y, grads = autocast_results(
        lambda *args, **options: bottleneck(*args, **options, impl=impl), residual, dtype, torch.float32
    )
    expected, true_grads = autocast_results(bottleneck_under_autocast, residual, dtype, torch.float32)
    assert y.dtype == expected.dtype == (dtype if residual == "none" else torch.float32)
    spacing = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=spacing, atol=spacing)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        limit = spacing * true_grads[name].abs().max().item()
        torch.testing.assert_close(grad, true_grads[name], rtol=0, atol=limit)


def bottleneck_under_autocast(x, residual, down, up, *, down_bias, up_bias, activation, scale):
    """What torch's own operators make of it."""
    assert activation == "silu"
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, down, down_bias))
    delta = scale * torch.nn.functional.linear(hidden, up, up_bias)
    return delta if residual is None else residual + delta


@pytest.mark.parametrize("residual", ["x", "other"])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_autocast_does_not_round_a_float32_stream(impl, residual):
    """A delta of 0 leaves the residual's bits alone, and dy's."""
    named = {name: torch.zeros_like(tensor) for name, tensor in factors().items()}
    x, other = torch.randn(9, 48, requires_grad=True), torch.randn(9, 48, requires_grad=True)
    added = {"x": x, "other": other}[residual]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bottleneck(x, added, **named, impl=impl)
    assert torch.equal(y, added)
    dy = torch.randn(9, 48)
    assert torch.equal(torch.autograd.grad(y, added, dy)[0], dy)


def test_autocast_adds_chunk_by_chunk(monkeypatch):
    """More rows than a chunk holds, the last chunk shorter."""
    from kronafuse.ops.bottleneck import eager

    options = {"residual": "x", "dtype": torch.bfloat16, "stream": torch.float32}
    whole, whole_grads = autocast_results(bottleneck, **options)
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 4 * 48)
    y, grads = autocast_results(bottleneck, **options)
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(grads, whole_grads)


def test_autocast_leaves_float64_alone():
    x = torch.randn(3, 48, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bottleneck(x, x, **factors(), impl="eager").dtype == torch.float64


@ON_CPUS
def test_a_float32_stream_is_kept_once_under_autocast(impl):
    """What is saved of x is x itself, not a copy in 16 bits."""
    x, kept = torch.randn(16, 48, requires_grad=True), []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        bottleneck(x, x, **factors(), impl=impl)
    wide = [each for each in kept if each.numel() >= x.numel()]
    assert [each.data_ptr() for each in wide if each.shape == x.shape] == [x.data_ptr()]


def test_meta_tensors():
    named = {name: tensor.detach().to("meta") for name, tensor in factors().items()}
    x = torch.empty(2, 5, 48, device="meta", requires_grad=True)
    y = bottleneck(x, x, **named)
    assert y.shape == (2, 5, 48)
    assert torch.autograd.grad(y, x, torch.empty_like(y))[0].shape == x.shape


@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_outputs_are_contiguous_whatever_the_inputs(residual, impl):
    """A transposed x, residual and dy: strides as the fake says, so that compiled programs may rely on them."""
    named = factors()
    x, other = (torch.randn(48, 7).t().requires_grad_() for _ in range(2))
    added = {"x": x, "other": other, "none": None}[residual]
    y = bottleneck(x, added, **named, impl=impl)
    assert y.is_contiguous()
    torch.testing.assert_close(y, bottleneck_chain(x, added, **named))
    (dx,) = torch.autograd.grad(y, x, torch.randn(48, 7).t())
    assert dx.is_contiguous()


@ON_CPUS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, impl):
    named, x, dy = factors(), torch.randn(5, 48, requires_grad=True), torch.randn(5, 48)

    def block(x):
        stream = torch.tanh(x)
        return bottleneck(stream, stream, **named, impl=impl)

    leaves = (x, *named.values())
    expected = torch.autograd.grad(block(x), leaves, dy)
    checkpoint(block, x, use_reentrant=use_reentrant).backward(dy)
    torch.testing.assert_close(tuple(each.grad for each in leaves), expected)


@ON_CPUS
def test_deterministic_mode(impl):
    named, x = factors(), torch.randn(5, 48, requires_grad=True)
    leaves = (x, *named.values())
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(bottleneck(x, x, **named, impl=impl).square().sum(), leaves) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@ON_CPUS
@pytest.mark.parametrize("name", ["down", "up", "up_bias"])
@pytest.mark.parametrize("nested", [False, True])
def test_func_grad(name, nested, impl):
    """torch.func sees through the Function, also beneath a transform over another tensor."""
    named, x = {key: tensor.detach() for key, tensor in factors().items()}, torch.randn(5, 48)

    def loss(value):
        return bottleneck(x, x, **{**named, name: value}, impl=impl).square().sum()

    leaf = named[name].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    if nested:
        unused = torch.zeros(())
        found = torch.func.grad(lambda value: loss(value) + torch.func.grad(lambda z: z * z)(unused))(
            named[name]
        )
    else:
        found = torch.func.grad(loss)(named[name])
    torch.testing.assert_close(found, expected)


@ON_CPUS
def test_outputs_alias_nothing(impl):
    """Even a delta of 0 gives a new tensor, and it may be changed in place, with a gradient to come."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    down, up = torch.zeros(4, 8), torch.zeros(8, 4)
    for residual in (x, x.detach().clone(), None):
        y = bottleneck(x, residual, down, up, scale=0.0, impl=impl)
        before = None if residual is None else residual.detach().clone()
        y += 1
        assert residual is None or torch.equal(residual.detach(), before)
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    named = {
        name: tensor.detach().cuda().to(torch.bfloat16).requires_grad_() for name, tensor in factors().items()
    }
    x = torch.randn(64, 48, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        bottleneck(x, x, **named, impl="triton").square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = named["up"].detach().clone()
    graph.replay()
    assert not torch.equal(named["up"], before)
