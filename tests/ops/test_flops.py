"""What torch's FLOP counter says of our operators: the planner's numbers, the plain chain's, what eager multiplies."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from kronafuse import FrozenLinear, KronA, KronTerm, kron_delta, kron_linear_group, kron_merge, nn, plan
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.ops.flop_counting import give_formulas
from kronafuse.ops.kron_linear import raw
from kronafuse.planner import choose
from kronafuse.testing import accuracy
from kronafuse.testing import bottleneck as bottleneck_testing
from kronafuse.testing.bottleneck_cases import ODD_CASES as BOTTLENECKS
from kronafuse.testing.cases import CASES, ODD_CASES
from kronafuse.testing.chain import eager_chain
from kronafuse.testing.inputs import bottleneck_inputs, case_inputs
from torch.utils.flop_counter import FlopCounterMode

SOME = [*(name for name in CASES if name.startswith("sdxl_cross_k_640")), *ODD_CASES]


give_formulas()  # raw ops are called past what does so here
aten = torch.ops.aten
IN_PLACE = dict.fromkeys(
    (aten.addmm_, aten.baddbmm_), lambda _, left, right, **__: 2 * math.prod(left) * right[-1]
)
"""Products that torch's own counter leaves out."""


def counted(function, *arguments):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        function(*arguments)
    return counter.get_total_flops()


def problem(name: str):
    """A case of few tokens, of which eager multiplies every product as it is."""
    case = CASES.get(name) or ODD_CASES[name]
    x, layer = case_inputs(case, torch.float32, tokens=5)
    return case, x, layer


def is_multiplied(shape) -> bool:
    """Whether the chain's einsum has products at all: it multiplies by one number without one."""
    return min(shape.n1 * shape.k1, shape.n2 * shape.k2) > 1


@pytest.mark.parametrize("name", SOME)
def test_forward_is_what_the_planner_says_and_what_the_plain_chain_takes(name):
    case, x, layer = problem(name)
    flops = counted(kron_linear_group, x, [layer])
    shape = case.shape
    assert flops == plan(x.shape[0], shape.n1, shape.k1, shape.n2, shape.k2, rank=shape.rank).flops
    if is_multiplied(shape):
        assert flops == counted(eager_chain, x, [layer])
    assert counted(kron_linear_group, x, [layer, layer]) == 2 * flops
    delta = layer._replace(weight=None, bias=None)
    assert flops - counted(kron_linear_group, x, [delta]) == 2 * x.shape[0] * shape.n * shape.k


def backward_of(group, x, layer, wanted):
    """FLOPs of backward alone."""
    named = accuracy.tensors_of(x, [layer])
    leaves = {each: tensor.detach().requires_grad_(each in wanted) for each, tensor in named.items()}
    (y,) = group(leaves["x"], accuracy.with_tensors([layer], leaves))
    return counted(partial(torch.autograd.grad, y, [leaves[each] for each in wanted]), torch.ones_like(y))


@pytest.mark.parametrize("name", SOME)
def test_backward_counts_the_gradients_that_are_asked_for(name):
    """As the plain chain, which saves every product; we save thin ones, and compute a fat one again."""
    case, x, layer = problem(name)
    factors = [each for each in ("a0.0", "b0.0", "b_down0.0") if each in accuracy.tensors_of(x, [layer])]
    choice, tokens = choose(case.shape), x.shape[0]
    if tokens == 0 or not is_multiplied(case.shape):
        return
    again = {"a_first": case.shape.n1 * case.shape.k, "b_first": case.shape.n2 * case.shape.k}
    for wanted in (["x"], factors, ["x", *factors], ["x", "weight0"], ["b0.0"]):
        first = 0
        if set(wanted) & set(factors) and not choice.thin:
            needed = {"a_first": "b0.0", "b_first": "a0.0", "low_rank": "b0.0"}[choice.order]
            rank = case.shape.rank or 0
            first = 2 * tokens * again.get(choice.order, rank * case.shape.k) if needed in wanted else 0
        mix = 0
        if case.shape.rank is not None and case.has_a and "b0.0" in wanted:
            mix = 2 * tokens * case.shape.n1 * case.shape.k1 * case.shape.rank  # H = A P is not saved
        expected = backward_of(eager_chain, x, layer, wanted) + first + mix
        assert backward_of(observed_group, x, layer, wanted) == expected, wanted


def observed_group(x, layers):
    """A group whose forward a mode watches too: what it saves then depends on shapes alone."""
    with FlopCounterMode(display=False):
        return kron_linear_group(x, layers)


@pytest.mark.parametrize(
    "name", ["primes", "thin_b_first", "fat_a_first", "low_rank", "low_rank_fat", "lora"]
)
@pytest.mark.parametrize("asked", ["x", "a", "b", "b_down", "scale", "row_scale", "all"])
def test_the_formulas_count_what_eager_multiplies(name, asked):
    """The kernels of the raw ops run under the counter, so that it sees torch's own products."""
    case = ODD_CASES[name]
    x, layer = case_inputs(case, torch.float32, tokens=5, row_scale=True)
    (term,) = layer.terms
    arguments = [x, [layer.weight, layer.bias, None], [*term[:3], torch.tensor(0.5), term.row_scale]]
    layout = ("kron_linear", "eager", [1], [1.0], [case.shuffled])
    ours = counted(torch.ops.kronafuse.kron_forward, *arguments, *layout)
    assert ours == counted(raw._forward, *arguments, *layout) > 0
    y, *saved = raw._forward(*arguments, *layout)
    order = ["x", "weight", "bias", "a", "b", "b_down", "scale", "row_scale"]
    absent = {"a": term.a is None, "b_down": term.b_down is None}
    needs = [(asked in (each, "all")) and not absent.get(each, False) for each in order]
    rest = ([torch.ones_like(y)], *arguments, *layout, saved, needs)
    assert counted(torch.ops.kronafuse.kron_backward, *rest) == counted(raw._backward, *rest)


@pytest.mark.parametrize("name", ["primes", "no_residual", "no_biases", "many_tokens"])
def test_bottlenecks_count_as_two_linear_layers(name):
    case = BOTTLENECKS[name]
    tensors = bottleneck_inputs(case, torch.float32)
    chain = bottleneck_testing.bottleneck_chain
    ours, plain = (
        counted(bottleneck_testing.call, function, case, tensors) for function in (bottleneck, chain)
    )
    assert ours == plain == 2 * case.tokens * case.width * (case.in_features + case.out_features)
    for wanted in (["x"], ["up"], ["down"], ["x", "down", "up"]):
        leaves = {each: tensor.detach().requires_grad_(each in wanted) for each, tensor in tensors.items()}
        found = []
        for function in (bottleneck, chain):
            y = bottleneck_testing.call(function, case, leaves)
            asked = [leaves[each] for each in wanted]
            found.append(counted(partial(torch.autograd.grad, y, asked), torch.ones_like(y)))
        assert found[0] == found[1], wanted


def test_merges_count_the_product_of_a_low_rank():
    weight, a, b, b_down = (torch.randn(*shape) for shape in ((6, 8), (2, 2), (3, 5), (5, 4)))
    assert counted(partial(kron_merge, b_down=b_down), weight, a, b) == 2 * 3 * 5 * 4
    assert counted(kron_merge, weight, a, torch.randn(3, 4)) == 0


def test_a_custom_mapping_of_the_user_stays():
    x, a, b = torch.randn(2, 8), torch.randn(2, 2), torch.randn(3, 4)
    mapping = {torch.ops.kronafuse.kron_forward: lambda *_, **__: 7}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        kron_delta(x, a, b)
        kron_linear_group(x, [FrozenLinear(None, (KronTerm(a, b),))])
    assert counter.get_total_flops() == 14


def test_a_module_is_fused_under_the_counter_as_without_it():
    """Its hooks on all modules watch; a hook of somebody else may change what a call of the base does."""
    layer = nn.KronLinear(torch.nn.Linear(8, 6), KronA(factors=(2, 2)))
    x, planned = torch.randn(5, 8), plan(5, 2, 2, 3, 4).flops
    with FlopCounterMode(display=False) as counter:
        assert layer.unfused is None
        y = layer(x)
        assert layer.unfused is None
    assert torch.equal(y, layer(x))
    packet = torch.ops.kronafuse.kron_forward
    assert counter.get_flop_counts() == {each: {packet: planned} for each in ("Global", "KronLinear")}
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert layer.unfused == "hooks are registered on all modules"
        with FlopCounterMode(display=False) as counter:
            layer(x)
            assert layer.unfused == "hooks are registered on all modules"
    finally:
        handle.remove()
    assert counter.get_total_flops() == planned
