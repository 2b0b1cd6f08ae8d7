"""What torch expects of an operator: opcheck, compile, export, autocast, checkpointing, determinism."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, kron_delta, kron_linear, kron_linear_group, kron_merge
from kronafuse.testing.accuracy import tensors_of, with_tensors
from kronafuse.testing.cases import ODD_CASES
from kronafuse.testing.inputs import case_inputs
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

ON_CPUS = pytest.mark.parametrize("impl", ["eager", "cpu"])
"""Both that a CPU has."""
GRADCHECKED = (
    "primes",
    "primes_shuffled",
    "b_scalar",
    "thin_b_first",
    "thin_a_first",
    "fat_b_first",
    "low_rank",
    "lora",
)


def raw_arguments(
    case: str, dtype: torch.dtype = torch.float32, *, impl: str = "eager", requires_grad: bool = False
):
    """Arguments of the raw forward op, flat."""
    x, layer = case_inputs(ODD_CASES[case], dtype, base=True, row_scale=True, tokens=5)
    (term,) = layer.terms
    tensors = [x, layer.weight, layer.bias, layer.base, term.a, term.b, term.b_down, None, term.row_scale]
    if requires_grad:
        tensors = [None if each is None else each.requires_grad_() for each in tensors]
    layout = ("kron_linear", impl, [1], [0.5], [term.shuffled])
    return tensors[0], tensors[1:4], tensors[4:], layout


@pytest.mark.parametrize("impl", ["eager", "cpu"])
@pytest.mark.parametrize("case", ["primes", "low_rank", "lora_shuffled", "empty"])
def test_opcheck_forward(case, impl):
    x, layer_tensors, term_tensors, layout = raw_arguments(case, impl=impl)
    torch.library.opcheck(torch.ops.kronafuse.kron_forward, (x, layer_tensors, term_tensors, *layout))


@pytest.mark.parametrize("impl", ["eager", "cpu"])
@pytest.mark.parametrize("case", ["primes", "low_rank", "lora_shuffled", "empty"])
@pytest.mark.parametrize("needed", [True, False])
def test_opcheck_backward(case, needed, impl):
    x, layer_tensors, term_tensors, layout = raw_arguments(case, impl=impl)
    y, saved = torch.ops.kronafuse.kron_forward(x, layer_tensors, term_tensors, *layout)
    present = [x, *layer_tensors[:2], *term_tensors]
    needs = [each is not None and needed for each in present]
    arguments = ([torch.randn_like(y)], x, layer_tensors, term_tensors, *layout, [saved], needs)
    torch.library.opcheck(torch.ops.kronafuse.kron_backward, arguments)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("case", GRADCHECKED)
def test_gradcheck_group(case, impl):
    scale = torch.tensor(0.7, dtype=torch.float64)
    x, layer = case_inputs(ODD_CASES[case], torch.float64, tokens=3, base=True, row_scale=True, scale=scale)
    named = tensors_of(x, [layer])
    leaves = [tensor.clone().requires_grad_() for tensor in named.values()]

    def call(*tensors):
        given = dict(zip(named, tensors, strict=True))
        return tuple(kron_linear_group(given["x"], with_tensors([layer], given), impl=impl))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("case", GRADCHECKED)
@pytest.mark.parametrize("function", ["kron_linear", "kron_delta", "kron_merge"])
def test_gradcheck_public_functions(function, case):
    x, layer = case_inputs(ODD_CASES[case], torch.float64, tokens=2)
    (term,) = layer.terms
    given = [x, layer.weight, term.a, term.b, term.b_down, torch.tensor(0.4, dtype=torch.float64)]
    leaves = [None if each is None else each.clone().requires_grad_() for each in given]

    def call(x, weight, a, b, b_down, scale):
        options = {"b_down": b_down, "scale": scale, "shuffled": term.shuffled}
        if function == "kron_linear":
            return kron_linear(x, weight, a, b, **options, impl="eager")
        if function == "kron_delta":
            return kron_delta(x, a, b, **options, impl="eager")
        return kron_merge(weight, a, b, **options)

    used = {"kron_linear": {0, 1}, "kron_delta": {0}, "kron_merge": {1}}[function] | {2, 3, 4, 5}
    inputs = [
        leaf if index in used else (leaf if leaf is None else leaf.detach())
        for index, leaf in enumerate(leaves)
    ]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@ON_CPUS
def test_second_derivatives_raise(impl):
    x = torch.randn(3, 8, requires_grad=True)
    y = kron_delta(x, torch.randn(2, 2), torch.randn(3, 4), impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="kron_delta: second derivatives are not implemented"):
        dx.sum().backward()


def compiled_layers():
    weight = torch.randn(64, 48)
    a, b = torch.randn(16, 2, requires_grad=True), torch.randn(4, 24, requires_grad=True)
    return weight, a, b


@pytest.mark.parametrize("impl", ["eager", "cpu", "auto"])
def test_compile_fullgraph_one_graph_for_scales_and_tokens(impl):
    """Floats that change, tokens that change: one graph, equal results, equal gradients."""
    torch._dynamo.reset()
    weight, a, b = compiled_layers()
    counter = CompileCounter()
    function = partial(kron_linear, weight=weight, a=a, b=b, impl=impl)
    compiled = torch.compile(lambda x, s: function(x, scale=s), fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 9, 4):
        for scale in (0.5, 1.5, 0.3):
            x = torch.randn(2, tokens, 48, requires_grad=True)
            dy = torch.randn(2, tokens, 64)
            ours = compiled(x, scale)
            expected = function(x, scale=scale)
            torch.testing.assert_close(ours, expected)
            grads = torch.autograd.grad(ours, (x, a, b), dy)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, (x, a, b), dy))
    assert counter.frame_count == 1


@ON_CPUS
def test_compile_fullgraph_with_inductor_group(impl):
    """q, k and v through inductor, forward and backward; the op stays visible as one call."""
    torch._dynamo.reset()
    weight, a, b = compiled_layers()
    scale = torch.tensor(0.5)

    def block(x):
        layers = [
            FrozenLinear(weight, (KronTerm(a, b, scale=scale),)),
            FrozenLinear(weight),
            FrozenLinear(weight),
        ]
        q, k, v = kron_linear_group(x * 2, layers, impl=impl)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    x = torch.randn(1, 6, 48, requires_grad=True)
    ours, expected = torch.compile(block, fullgraph=True)(x), block(x)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, a, b), dy), torch.autograd.grad(expected, (x, a, b), dy)
    )


@ON_CPUS
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, impl):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, a, b = compiled_layers()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.a, self.b = torch.nn.Parameter(a.detach()), torch.nn.Parameter(b.detach())

        def forward(self, x):
            return kron_linear(x, self.weight, self.a, self.b, scale=0.5, impl=impl)

    layer = Layer()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(7, 48),), dynamic_shapes=({0: tokens},), strict=strict)
    graphs = [
        module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    assert any("kron_forward" in str(node.target) for graph in graphs for node in graph.nodes)
    x = torch.randn(11, 48)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_dtype_and_backward_stays_in_it(dtype):
    weight, a, b = compiled_layers()
    weight.requires_grad_()
    x = torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = kron_linear(x, weight, a, b, bias=torch.randn(64), impl="eager")
    assert y.dtype == dtype
    low = kron_linear(x.to(dtype), weight.to(dtype), a, b, impl="eager")
    grads = torch.autograd.grad(y, (x, weight, a, b), torch.ones_like(y))
    assert [grad.dtype for grad in grads] == [torch.float32] * 4
    expected = torch.autograd.grad(low, (x, weight, a, b), torch.ones_like(low))
    torch.testing.assert_close(grads, expected)


@ON_CPUS
def test_autocast_casts_the_weight_of_a_layer_whose_input_is_low_already(impl):
    """In an autocast region the second layer's x is 16 bits wide and its weight is not."""
    weight, a, b = compiled_layers()
    low, base = torch.randn(5, 48).to(torch.bfloat16), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kron_linear(low, weight, a, b, impl=impl)
        assert kron_delta(low, a, b, base=base, impl=impl).dtype == torch.bfloat16
    assert torch.equal(y, kron_linear(low, weight.to(torch.bfloat16), a, b, impl=impl))


def test_autocast_does_not_touch_a_merge():
    weight, b, b_down = torch.randn(64, 64), torch.randn(64, 8), torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = kron_merge(weight, None, b, b_down=b_down)
    assert torch.equal(merged, kron_merge(weight, None, b, b_down=b_down))


def test_meta_tensors():
    weight, a, b = (each.detach().to("meta") for each in compiled_layers())
    y = kron_linear(torch.empty(2, 5, 48, device="meta"), weight, a, b)
    assert y.shape == (2, 5, 64)
    assert kron_merge(weight, a, b).shape == (64, 48)


@pytest.mark.parametrize("grad", [True, False])
def test_compile_fullgraph_where_nothing_requires_grad(grad):
    """Inference with frozen adapters, with and without no_grad around it."""
    torch._dynamo.reset()
    weight, a, b = (each.detach() for each in compiled_layers())
    compiled = torch.compile(
        lambda x: kron_linear(x, weight, a, b, scale=0.5), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(5, 48)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), kron_linear(x, weight, a, b, scale=0.5))


def test_compile_fullgraph_merge():
    torch._dynamo.reset()
    weight, a, b = compiled_layers()
    compiled = torch.compile(lambda w: kron_merge(w, a, b, scale=0.5), fullgraph=True, backend="aot_eager")
    ours, expected = compiled(weight), kron_merge(weight, a, b, scale=0.5)
    assert torch.equal(ours, expected)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (a, b), dy), torch.autograd.grad(expected, (a, b), dy)
    )


@pytest.mark.parametrize("case", ["primes", "low_rank_shuffled", "lora"])
def test_opcheck_merge(case):
    _, layer = case_inputs(ODD_CASES[case], torch.float32, tokens=1)
    (term,) = layer.terms
    scale = torch.tensor(0.5)
    arguments = (layer.weight, term.a, term.b, term.b_down, scale, term.shuffled, "eager")
    torch.library.opcheck(torch.ops.kronafuse.kron_merge.default, arguments)


@pytest.mark.parametrize("impl", ["reference", "eager", "triton", "cpu", "cuda"])
@pytest.mark.parametrize("case", ["thin_a_first", "thin_b_first", "fat_b_first_shuffled", "low_rank"])
def test_outputs_are_contiguous_whatever_the_inputs(case, impl):
    """A transposed x, base and weight: strides as the fake says, so that compiled programs may rely on them."""
    dtype = torch.bfloat16 if impl == "cuda" else torch.float32
    x, layer = case_inputs(ODD_CASES[case], dtype, weight=False, base=True)
    x, base = x.t().contiguous().t().requires_grad_(), layer.base.t().contiguous().t()
    (y,) = kron_linear_group(x, [layer._replace(base=base)], impl=impl)
    (expected,) = kron_linear_group(x.contiguous(), [layer], impl="reference")
    assert y.is_contiguous()
    close = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, expected, **close)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=False)
    assert dx.shape == x.shape


@ON_CPUS
def test_x_is_not_kept_where_only_dx_is_wanted(impl):
    weight, a, b = (each.detach() for each in compiled_layers())
    x = torch.randn(5, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kron_linear(x, weight, a, b, impl=impl)
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(kron_linear(x, weight, a, b, impl="reference"), x, dy)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), expected)


def test_autocast_leaves_float64_alone():
    x, a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(2, 2), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kron_delta(x, a, b, impl="eager").dtype == torch.float64


@ON_CPUS
def test_bfloat16_x_is_not_copied_for_float32_factors(impl):
    """fp32 factors on bf16 activations: what is saved of x is x itself."""
    x = torch.randn(16, 48, dtype=torch.bfloat16, requires_grad=True)
    _, a, b = compiled_layers()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kron_delta(x, a, b, impl=impl)
    assert y.dtype == torch.bfloat16
    assert any(t.data_ptr() == x.data_ptr() and t.dtype == torch.bfloat16 for t in kept)
    assert not any(
        t.dtype == torch.float32 and t.numel() >= x.numel() for t in kept if t is not b and t is not a
    )


@ON_CPUS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, impl):
    weight, a, b = compiled_layers()
    x = torch.randn(5, 48, requires_grad=True)

    def block(x):
        return kron_linear(torch.tanh(x), weight, a, b, impl=impl)

    dy = torch.randn(5, 64)
    expected = torch.autograd.grad(block(x), (x, a, b), dy)
    checkpoint(block, x, use_reentrant=use_reentrant).backward(dy)
    torch.testing.assert_close((x.grad, a.grad, b.grad), expected)


@ON_CPUS
@pytest.mark.parametrize("profiled", ["forward", "backward"])
def test_checkpointing_under_a_profiler_of_one_pass(profiled, impl):
    """What is saved does not depend on who watches: a fat T is held beside what checkpointing counts."""
    weight, a = torch.randn(48, 48), torch.randn(6, 6, requires_grad=True)
    b = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(16, 48, requires_grad=True)
    dy = torch.randn(16, 48)

    def block(x):
        return kron_linear(torch.tanh(x), weight, a, b, impl=impl)

    expected = torch.autograd.grad(block(x), (x, a, b), dy)
    watched, plain = torch.profiler.profile(), nullcontext()
    with watched if profiled == "forward" else plain:
        y = checkpoint(block, x, use_reentrant=False)
    with watched if profiled == "backward" else plain:
        grads = torch.autograd.grad(y, (x, a, b), dy)
    torch.testing.assert_close(grads, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on CUDA tensors here")
@pytest.mark.parametrize("grad", [False, True])
def test_views_that_stand_for_negated_values(grad):
    """The memory of such a view holds other values than it shows; the dispatcher copies it for the kernel."""
    weight, a, b = compiled_layers()
    x = torch.randn(5, 48, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    expected = kron_linear(x.resolve_neg(), weight, a, b, impl="triton")
    with torch.set_grad_enabled(grad):
        y = kron_linear(x, weight, a, b, impl="triton")
    torch.testing.assert_close(y, expected)


@ON_CPUS
def test_deterministic_mode(impl):
    weight, a, b = compiled_layers()
    x = torch.randn(5, 48, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(kron_linear(x, weight, a, b, impl=impl).sum(), (x, a, b)) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@ON_CPUS
def test_func_grad(impl):
    """torch.func sees through the Function, whose context is set up apart from its forward."""
    weight, a, b = compiled_layers()
    x = torch.randn(5, 48)

    def loss(a):
        return kron_linear(x, weight, a, b, impl=impl).square().sum()

    expected = torch.autograd.grad(loss(a), a)[0]
    torch.testing.assert_close(torch.func.grad(loss)(a.detach()), expected)


@ON_CPUS
def test_outputs_alias_nothing(impl):
    """Even a layer that only passes its base on gives a new tensor."""
    x, base = torch.randn(3, 8), torch.randn(3, 6)
    a, b = torch.zeros(2, 2), torch.zeros(3, 4)
    y = kron_delta(x, a, b, base=base, scale=0.0, impl=impl)
    y.add_(1.0)
    assert not torch.equal(y, base)


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    weight, a, b = (each.detach().cuda().to(torch.bfloat16) for each in compiled_layers())
    a.requires_grad_()
    b.requires_grad_()
    x = torch.randn(64, 48, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([a, b], lr=1e-2, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        kron_linear(x, weight, a, b, impl="triton").square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = a.detach().clone()
    graph.replay()
    assert not torch.equal(a, before)
