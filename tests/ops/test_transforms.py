"""torch.func and torch's other transforms: each works, or raises with our words, on every public operator."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, kron_delta, kron_linear, kron_linear_group, kron_merge
from kronafuse.ops import transforms
from kronafuse.ops.bottleneck.op import bottleneck
from kronafuse.ops.bottleneck.ref import bottleneck_ref
from kronafuse.ops.kron_linear.ref import kron_delta_ref, kron_linear_ref
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

GENERATOR = torch.Generator().manual_seed(0)
X, WEIGHT, A, B, DOWN, UP = (
    torch.randn(*shape, generator=GENERATOR) for shape in ((4, 8), (6, 8), (2, 2), (3, 4), (3, 8), (8, 3))
)


def group(x):
    return kron_linear_group(x, [FrozenLinear(WEIGHT), FrozenLinear(WEIGHT, (KronTerm(A, B),))])[1]


OPERATORS = {
    "kron_linear": (lambda x: kron_linear(x, WEIGHT, A, B), X, lambda x: kron_linear_ref(x, WEIGHT, A, B)),
    "kron_delta": (lambda x: kron_delta(x, A, B), X, lambda x: kron_delta_ref(x, A, B)),
    "kron_linear_group": (group, X, lambda x: kron_linear_ref(x, WEIGHT, A, B)),
    "kron_merge": (lambda a: kron_merge(WEIGHT, a, B), A, lambda a: WEIGHT + torch.kron(a, B)),
    "bottleneck": (lambda x: bottleneck(x, x, DOWN, UP), X, lambda x: bottleneck_ref(x, x, DOWN, UP)),
}
"""Operator -> a function of one tensor, the tensor, the same by the definition."""


def dual(function, value):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(value, torch.ones_like(value)))


def batched_gradients(function, value):
    value = value.clone().requires_grad_()
    y = function(value)
    return torch.autograd.grad(y, value, torch.ones(2, *y.shape), is_grads_batched=True)


def squared(function):
    return lambda value: function(value).square().sum()


FORWARD = {
    "jvp": lambda function, value: torch.func.jvp(function, (value,), (value,)),
    "linearize": lambda function, value: torch.func.linearize(function, value),
    "dual": dual,
    "jacobian": lambda function, value: torch.autograd.functional.jacobian(
        function, value, vectorize=True, strategy="forward-mode"
    ),
}
BATCHED = {
    "vmap": lambda function, value: torch.func.vmap(function)(torch.stack([value, value])),
    "vmap of grad": lambda function, value: torch.func.vmap(torch.func.grad(squared(function)))(value[None]),
    "jacfwd": lambda function, value: torch.func.jacfwd(function)(value),
    "hessian": lambda function, value: torch.func.hessian(squared(function))(value),
}
BATCHED_BACKWARD = {
    "jacrev": lambda function, value: torch.func.jacrev(function)(value),
    "jacobian": lambda function, value: torch.autograd.functional.jacobian(function, value, vectorize=True),
    "is_grads_batched": batched_gradients,
}
WORKS = {
    "grad": lambda function, value: torch.func.grad(squared(function))(value),
    "vjp": lambda function, value: torch.func.vjp(squared(function), value)[1](torch.ones(()))[0],
    "jacrev by one": lambda function, value: torch.func.jacrev(function, chunk_size=1)(value),
    "jacobian": lambda function, value: torch.autograd.functional.jacobian(function, value),
    "make_fx": lambda function, value: make_fx(function)(value)(value),
}


def raises(op: str, reason: str):
    return pytest.raises(NotImplementedError, match=re.escape(f"{op}: {reason}"))


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_grad"])
@pytest.mark.parametrize("op", OPERATORS)
def test_forward_mode_raises_and_is_not_zero(op, gradients):
    function, value, _ = OPERATORS[op]
    for transform in FORWARD.values():
        with torch.set_grad_enabled(gradients), raises(op, transforms.FORWARD):
            transform(function, value)


@pytest.mark.parametrize("op", OPERATORS)
def test_batched_tensors_raise(op):
    function, value, _ = OPERATORS[op]
    for transform in BATCHED.values():
        with raises(op, transforms.BATCHED):
            transform(function, value)


@pytest.mark.parametrize("op", OPERATORS)
def test_batched_gradients_raise_or_are_right(op):
    """kron_merge's gradients are torch's own products, which torch.func batches."""
    function, value, definition = OPERATORS[op]
    for name, transform in BATCHED_BACKWARD.items():
        if op == "kron_merge" and name == "jacrev":
            torch.testing.assert_close(transform(function, value), transform(definition, value))
            continue
        with raises(op, transforms.BATCHED):
            transform(function, value)


@pytest.mark.parametrize("op", OPERATORS)
def test_functionalize_raises(op):
    function, value, _ = OPERATORS[op]
    with raises(op, transforms.FUNCTIONALIZED):
        torch.func.functionalize(function)(value)


@pytest.mark.parametrize("transform", WORKS)
@pytest.mark.parametrize("op", OPERATORS)
def test_the_reverse_mode_works(op, transform):
    function, value, definition = OPERATORS[op]
    run = WORKS[transform]
    torch.testing.assert_close(run(function, value), run(definition, value), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared, which is a constant
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_grad"])
@pytest.mark.parametrize("op", OPERATORS)
def test_jit_trace_works_or_raises(op, gradients):
    """Operators without lists are traced where nothing asks for a gradient."""
    function, value, _ = OPERATORS[op]
    trace = partial(torch.jit.trace, function)
    with torch.set_grad_enabled(gradients):
        if op in ("kron_merge", "bottleneck"):
            torch.testing.assert_close(trace((value,))(value * 2), function(value * 2))
        else:
            with raises(op, transforms.TRACED):
                trace((value,))
    with raises(op, transforms.TRACED_GRADIENTS):
        trace((value.clone().requires_grad_(),))


def test_other_errors_are_as_they_were():
    """Only what torch says of a transform is put in other words."""

    def fails():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        transforms.explained("kron_linear", fails)
    with pytest.raises(ValueError, match=r"kron_delta: x must end in K = K1·K2 = 2·4 = 8; got x \(7,\)"):
        torch.func.grad(lambda x: kron_delta(x, A, B).sum())(torch.randn(7))
