"""Whole training steps on a GPU: CUDA-graph capture, repeatability to the bit, and the same kernels compiled.

The problems are thin, fat and low-rank layers, q, k and v in one call, and a bottleneck. That they train at all
is checked on any machine, by the eager implementation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kronafuse import bottleneck, kron_linear, kron_linear_group
from kronafuse.testing.accuracy import tensors_of, with_tensors
from kronafuse.testing.bottleneck import call
from kronafuse.testing.bottleneck_cases import CASES as BOTTLENECKS
from kronafuse.testing.cases import CASES
from kronafuse.testing.inputs import bottleneck_inputs, case_inputs
from torch import Tensor

TOKENS, STEPS = 384, 4
LAYERS = {
    "thin_b_first": "sdxl_640-krona_64x4",
    "thin_a_first": "sdxl_640-krona_4x64",
    "fat": "sdxl_640-lokr_f8",
    "square": "sdxl_640-lokr_square",
    "low_rank": "sdxl_640-lokr_f8_r16",
    "lora": "sdxl_640-lora_r16",
    "shuffled": "sdxl_640-diffusekrona_official",
}
"""Kind of layer -> its case."""
GROUP = ("thin_b_first", "thin_b_first", "fat")
"""q and k thin, v fat."""
Forward = Callable[[Tensor, dict[str, Tensor]], Tensor]


@dataclass
class Problem:
    """x, the trained tensors in fp32, what is computed from both, and what the loss compares it with."""

    x: Tensor
    trained: dict[str, Tensor]
    forward: Forward
    target: Tensor

    def loss(self) -> Tensor:
        return F.mse_loss(self.forward(self.x, self.trained).float(), self.target.float())

    def optimizer(self) -> torch.optim.Optimizer:
        on_gpu = self.x.device.type == "cuda"
        return torch.optim.AdamW(self.trained.values(), lr=1e-2, fused=True, capturable=on_gpu)


def layer_problem(kinds: Sequence[str], device: str, dtype: torch.dtype, impl: str, tokens: int) -> Problem:
    """Layers of these kinds on one x; a single one by `kron_linear`."""
    made = [
        case_inputs(CASES[LAYERS[kind]], dtype, tokens=tokens, seed=seed) for seed, kind in enumerate(kinds)
    ]
    layers = [layer for _, layer in made]
    named = {key: each.to(device) for key, each in tensors_of(made[0][0], layers).items()}
    factors = {key: each for key, each in named.items() if re.match(r"(a|b|b_down)\d", key)}

    def forward(x: Tensor, trained: dict[str, Tensor]) -> Tensor:
        own = with_tensors(layers, {**named, **trained})
        if len(own) > 1:
            return torch.cat(kron_linear_group(x, own, impl=impl), -1)
        (layer,) = own
        (term,) = layer.terms
        return kron_linear(
            x, layer.weight, term.a, term.b, b_down=term.b_down, bias=layer.bias, scale=term.scale,
            shuffled=term.shuffled, impl=impl,
        )  # fmt: skip

    return finish(named["x"], factors, forward)


def bottleneck_problem(device: str, dtype: torch.dtype, impl: str, tokens: int) -> Problem:
    case = BOTTLENECKS["sdxl_640-width_60"]
    tensors = {key: each.to(device) for key, each in bottleneck_inputs(case, dtype, tokens=tokens).items()}
    x = tensors.pop("x")

    def forward(x: Tensor, trained: dict[str, Tensor]) -> Tensor:
        return call(lambda *given, **named: bottleneck(*given, **named, impl=impl), case, {"x": x, **trained})

    return finish(x, tensors, forward)


def finish(x: Tensor, factors: dict[str, Tensor], forward: Forward) -> Problem:
    trained = {key: each.detach().float().clone().requires_grad_() for key, each in factors.items()}
    x.requires_grad_()
    y = forward(x, trained)
    return Problem(x, trained, forward, torch.randn_like(y))


PROBLEMS = (*LAYERS, "group", "bottleneck")
IMPLS = ("triton", "cuda")


def problem(
    name: str,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    impl: str = "triton",
    tokens: int = TOKENS,
):
    torch.manual_seed(0)
    if name == "group":
        return layer_problem(GROUP, device, dtype, impl, tokens)
    if name == "bottleneck":
        return bottleneck_problem(device, dtype, impl, tokens)
    return layer_problem((name,), device, dtype, impl, tokens)


def step_of(given: Problem, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """A training step that keeps its gradients in place, as a captured one must."""

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        if given.x.grad is not None:
            given.x.grad.zero_()
        loss = given.loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_problems_train(name):
    given = problem(name, "cpu", torch.float32, "eager", tokens=24)
    step = step_of(given, given.optimizer())
    losses = [float(step()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert given.x.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_cuda_graph_of_a_training_step(name, impl):
    """Replays on new inputs give the losses and the parameters of eager steps, to the bit."""
    given, other = problem(name, impl=impl), problem(name, impl=impl)
    xs = [torch.randn_like(given.x) for _ in range(STEPS)]

    def set_x(to: Problem, x: Tensor) -> None:
        with torch.no_grad():
            to.x.copy_(x)

    eager = step_of(given, given.optimizer())
    expected = []
    for x in xs:
        set_x(given, x)
        expected.append(eager().clone())

    optimizer = other.optimizer()
    step = step_of(other, optimizer)
    start = {key: each.detach().clone() for key, each in other.trained.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        for key, value in start.items():
            other.trained[key].copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    for x, wanted in zip(xs, expected, strict=True):
        set_x(other, x)
        graph.replay()
        assert torch.equal(loss, wanted)
    for key, value in other.trained.items():
        assert not torch.equal(value, start[key])
        assert torch.equal(value, given.trained[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_repeatable(name, impl):
    """Outputs and all gradients are equal to the bit, whatever ran in between."""
    given = problem(name, impl=impl)
    leaves = [given.x, *given.trained.values()]

    def results() -> list[Tensor]:
        y = given.forward(given.x, given.trained)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    first = results()
    for other in PROBLEMS:
        problem(other, impl=impl, tokens=97).loss().backward()
    for _ in range(3):
        for one, two in zip(first, results(), strict=True):
            assert torch.equal(one, two)


def kernels_of(function: Callable[[], object]) -> Counter[str]:
    """Names of the Triton kernels of the package that run in it, counted; inductor's own are named triton_*."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    names = (event.name for event in profile.events() if event.device_type.name == "CUDA")
    return Counter(name for name in names if name.startswith("_"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["thin_b_first", "fat", "group", "bottleneck"])
def test_compile_runs_the_same_kernels(name):
    given = problem(name)
    leaves = [given.x, *given.trained.values()]
    compiled = torch.compile(lambda: given.forward(given.x, given.trained), fullgraph=True)

    def backward(forward: Callable[[], Tensor]) -> list[Tensor]:
        y = forward()
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    def eager() -> Tensor:
        return given.forward(given.x, given.trained)

    expected, got = backward(eager), backward(compiled)
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(two, one)
    seen = kernels_of(lambda: backward(eager))
    assert seen
    assert kernels_of(lambda: backward(compiled)) == seen


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
def test_no_host_synchronisation(impl):
    """A step whose host waits for the device nowhere can run ahead of it."""
    given = problem("thin_b_first", impl=impl)
    step = step_of(given, given.optimizer())
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
