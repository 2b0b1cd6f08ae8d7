"""The scale of an adapter when it changes between a forward and its backward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kronafuse import Bottleneck, KronA, LoKr, LoRA
from kronafuse.nn import BottleneckAdapter, KronLinear
from kronafuse.nn import scale as scale_module
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

SIZE = 8
ADAPTERS = {
    "krona": KronA((2, 4)),
    "lokr": LoKr(4, 2),
    "lora": LoRA(2),
    "bottleneck": Bottleneck("ff_in", "block_out", width=4),
    "krona_res": Bottleneck("ff_in", "block_out", width=None, form="krona_res", factors=(2, 4)),
    "convolution": Bottleneck("res_in", "res_out", width=4),
}

COMPILED = ("krona", "convolution")
"""Those whose scale goes to an operator, and to products of torch's own."""


class Layer(nn.Module):
    """One adapter of any family, as a map of one tensor."""

    def __init__(self, name: str) -> None:
        super().__init__()
        spec = ADAPTERS[name]
        if isinstance(spec, Bottleneck):
            self.inner = BottleneckAdapter(spec.layout(SIZE, SIZE))
            self.trained = self.inner
        else:
            self.inner = KronLinear(nn.Linear(SIZE, SIZE).requires_grad_(False), spec)
            self.trained = self.inner.adapters["0"]
        for each in self.trained.parameters():
            nn.init.normal_(each)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x) if isinstance(self.inner, BottleneckAdapter) else self.inner(x)


class Net(nn.Module):
    """Two adapted layers, so that what the second one reads depends on the scale of the first."""

    def __init__(self, name: str = "krona") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = Layer(name), Layer(name)
        self.x = torch.randn(2, SIZE, 4, 4) if name == "convolution" else torch.randn(5, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def set(self, strength: float) -> None:
        self.first.trained.set_strength(strength)
        self.second.trained.set_strength(strength)


def gradients(net: Net, run: Callable[[Tensor], Tensor], between: Callable[[], object]) -> list[Tensor]:
    """Of a loss at strength 1, with something between the forward and its backward."""
    net.set(1.0)
    net.zero_grad()
    y = run(net.x.clone().requires_grad_())
    between()
    y.square().mean().backward()
    return [each.grad.clone() for each in net.parameters() if each.requires_grad]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other)


def in_two(net: Net, reentrant: bool) -> Callable[[Tensor], Tensor]:
    """Each layer checkpointed."""
    return lambda x: checkpoint(
        net.second,
        torch.tanh(checkpoint(net.first, x, use_reentrant=reentrant)),
        use_reentrant=reentrant,
    )


def eager_ways(net: Net) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same function, called in every way that keeps something for backward or repeats the forward there."""
    return {
        "eager": net,
        "checkpoint": lambda x: checkpoint(net, x, use_reentrant=False),
        "re-entrant": lambda x: checkpoint(net, x, use_reentrant=True),
        "nested": lambda x: checkpoint(in_two(net, False), x, use_reentrant=False),
        "nested re-entrant": lambda x: checkpoint(in_two(net, True), x, use_reentrant=True),
        "re-entrant in the other": lambda x: checkpoint(in_two(net, True), x, use_reentrant=False),
        "the other in a re-entrant": lambda x: checkpoint(in_two(net, False), x, use_reentrant=True),
    }


def compiled_ways(net: Net) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same with a compiled program inside or around."""
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    repeated = torch.compile(
        lambda x: checkpoint(net, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    return {
        "compiled": compiled,
        "checkpoint of compiled": lambda x: checkpoint(compiled, x, use_reentrant=False),
        "re-entrant of compiled": lambda x: checkpoint(compiled, x, use_reentrant=True),
        "compiled checkpoint": repeated,
    }


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_gradient_is_that_at_the_scale_of_the_forward(name):
    torch._dynamo.reset()
    net = Net(name)
    expected = gradients(net, net, lambda: None)

    def between() -> None:
        for strength in (0.0, 0.0, -1.0, 0.25):
            net.set(strength)
            with torch.no_grad():
                net(net.x)

    net.set(0.25)
    later = net(net.x).detach()
    with_graphs = compiled_ways(net) if name in COMPILED else {}
    for way, run in {**eager_ways(net), **with_graphs}.items():
        try:
            assert_same(gradients(net, run, between), expected)
            torch.testing.assert_close(run(net.x), later)
        except Exception as error:
            raise AssertionError(f"{way}: {error}") from error


def test_the_right_scale_is_what_makes_the_difference():
    """The test above could not fail if the scale did not reach the gradient."""
    net = Net()
    expected = gradients(net, net, lambda: None)
    net.set(0.25)
    y = net(net.x)
    net.zero_grad()
    y.square().mean().backward()
    assert not torch.allclose(net.first.trained.lokr_a.grad, expected[0])


def test_two_scales_in_one_loss():
    """Sliders: +1 and -1 of the same model, both checkpointed."""
    net = Net()
    x = net.x.clone().requires_grad_()

    def loss(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        net.zero_grad()
        net.set(1.0)
        up = run(x)
        net.set(-1.0)
        down = run(x)
        net.set(0.0)
        (up.square().mean() - 3 * down.mean()).backward()
        return [each.grad.clone() for each in net.parameters() if each.requires_grad]

    expected = loss(net)
    for reentrant in (False, True):
        assert_same(loss(lambda x, how=reentrant: checkpoint(net, x, use_reentrant=how)), expected)


def test_no_new_scale_compiles_anything():
    torch._dynamo.reset()
    net, counter = Net(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for strength in (1.0, 0.5, 0.0, -2.0):
        net.set(strength)
        torch.testing.assert_close(compiled(net.x), net(net.x))
    assert counter.frame_count == 1


def test_a_captured_graph_reads_the_buffer_that_is_written_in_place(monkeypatch):
    net = Net()
    trained = net.first.trained
    buffer, address = trained.scale, trained.scale.data_ptr()
    monkeypatch.setattr("kronafuse.nn.trained.is_capturing", lambda tensor: True)
    scale = trained.scale_of_call()
    assert isinstance(scale, Tensor)
    assert scale.item() == 1.0
    trained.set_strength(0.5)
    assert trained.scale is buffer
    assert buffer.data_ptr() == address
    assert buffer.item() == 0.5


def test_tensors_loaded_between_a_checkpointed_forward_and_its_backward_raise():
    """Without checkpointing torch itself says that a parameter was changed."""
    net = Net()
    state = {name: 2 * each for name, each in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"load_state_dict: the adapter's tensors were overwritten"):
        gradients(net, lambda x: checkpoint(net, x, use_reentrant=False), lambda: net.load_state_dict(state))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        gradients(net, net, lambda: net.load_state_dict(state))
    gradients(net, lambda x: checkpoint(net, x, use_reentrant=False), lambda: None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_merging_between_a_checkpointed_forward_and_its_backward_raises(reentrant):
    """A re-entrant checkpoint would give no gradient, without a word."""
    net = Net()
    expected = gradients(net, net, lambda: None)

    def run(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant)

    def each_layer(method: str) -> None:
        for layer in (net.first, net.second):
            getattr(layer.inner, method)(layer.trained)

    with pytest.raises(RuntimeError, match=r"^merge: the adapter was folded into its layer's weight between"):
        gradients(net, run, lambda: each_layer("merge"))
    with pytest.raises(
        RuntimeError, match=r"^unmerge: the adapter was taken out of its layer's weight between"
    ):
        gradients(net, run, lambda: each_layer("unmerge"))
    assert_same(gradients(net, run, lambda: None), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_threads_that_make_it_impossible_to_tell_raise(reentrant):
    net = Net()

    def run(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant)

    expected = gradients(net, net, lambda: None)
    with ThreadPoolExecutor(1) as other:

        def preview() -> None:
            net.set(0.5)
            other.submit(net, net.x).result()

        for between in (lambda: other.submit(net.set, 0.5).result(), preview):
            with pytest.raises(RuntimeError, match=r"adapter scale: several threads have set it"):
                gradients(net, run, between)
    # The thread is gone; what is called and set on one is told apart again.
    assert_same(gradients(net, run, lambda: net.set(0.5)), expected)


def test_one_thread_validates_without_gradients_and_another_trains():
    net = Net()
    expected = gradients(net, net, lambda: None)
    net = Net()

    def train() -> list[Tensor]:
        return gradients(net, lambda x: checkpoint(net, x, use_reentrant=False), lambda: net.set(0.25))

    def validate() -> None:
        net.set(0.5)
        with torch.no_grad():
            net(net.x)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as another:
        for _ in range(3):
            one.submit(validate).result()
            assert_same(another.submit(train).result(), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_that_fails_leaves_nothing_behind(reentrant):
    net = Net()
    expected = gradients(net, net, lambda: None)

    def fail(_gradient: Tensor) -> None:
        raise ValueError("stop")

    net.set(-1.0)
    x = net.x.clone().requires_grad_()
    x.register_hook(fail)
    failing = checkpoint(in_two(net, reentrant), x, use_reentrant=reentrant)

    def between() -> None:
        net.set(0.5)
        with pytest.raises(ValueError, match="stop"):
            failing.sum().backward()
        net.zero_grad()

    found = gradients(net, lambda x: checkpoint(net, x, use_reentrant=reentrant), between)
    assert_same(found, expected)


def with_reference(net: Net) -> Callable[[Tensor], Tensor]:
    """A difference to the same without the adapters, made by what is checkpointed itself."""

    def run(x: Tensor) -> Tensor:
        y = net(x)
        net.set(0.0)
        reference = net(x)
        net.set(1.0)
        return y - reference + net(x).square()

    return run


def set_first(net: Net) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        net.set(2.0)
        y = net(x)
        net.set(-2.0)
        return 3 * y + net(x).square()

    return run


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [with_reference, set_first])
def test_a_scale_set_inside_what_is_checkpointed_counts_there_again(inside, reentrant):
    net = Net()
    run = inside(net)

    def twice(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        y = run(x)
        net.set(1.0)
        return y + run(torch.sin(x))

    expected = gradients(net, lambda x: twice(x, run), lambda: None)
    found = gradients(
        net,
        lambda x: twice(x, lambda x: checkpoint(run, x, use_reentrant=reentrant)),
        lambda: net.set(0.1),
    )
    assert_same(found, expected)


def test_a_call_before_the_first_change_inside_what_is_checkpointed_raises_where_it_cannot_be_told():
    net = Net()

    def run(x: Tensor) -> Tensor:
        y = net(x)
        net.set(0.5)
        return y + net(x)

    expected = gradients(net, run, lambda: None)
    assert_same(gradients(net, lambda x: checkpoint(run, x, use_reentrant=True), lambda: None), expected)
    with pytest.raises(
        RuntimeError, match=r"adapter scale: it was set inside what gradient checkpointing repeats"
    ):
        gradients(net, lambda x: checkpoint(run, x, use_reentrant=False), lambda: None)


def test_a_compiled_step_may_set_the_scale():
    torch._dynamo.reset()
    net = Net()

    def step(x: Tensor) -> Tensor:
        net.set(0.0)
        with torch.no_grad():
            reference = net(x)
        net.set(1.0)
        return (net(x) - reference).square().mean()

    expected = step(net.x)
    expected.backward()
    gradient = net.first.trained.lokr_a.grad.clone()
    net.zero_grad()
    found = torch.compile(step, backend="aot_eager")(net.x)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(net.first.trained.lokr_a.grad, gradient)


def test_a_value_that_something_else_writes_into_the_buffer_counts():
    """DistributedDataParallel copies the first process's buffers into those of the others."""
    net, other = Net(), Net()
    net.set(0.25)
    for each in (other.first, other.second):
        with torch.no_grad():
            each.trained.scale.copy_(torch.tensor(0.25))
    torch.testing.assert_close(other(net.x), net(net.x))
    assert other.first.trained.scale_value == 0.25


def test_a_state_dict_with_a_scale_that_is_no_number_is_refused():
    net = Net()
    state = {name: torch.full_like(each, torch.nan) if each.dim() == 0 else 2 * each
             for name, each in net.state_dict().items()}  # fmt: skip
    kept = net.first.trained.lokr_a.clone()
    with pytest.raises(RuntimeError, match=r"first\..*lokr_scale must be a finite number; got nan"):
        net.load_state_dict(state)
    assert torch.equal(net.first.trained.lokr_a, kept)
    assert net.first.trained.scale.item() == net.first.trained.scale_value == 1.0


def test_more_changes_than_are_remembered_raise(monkeypatch):
    monkeypatch.setattr(scale_module, "REMEMBERED", 4)
    net = Net()

    def between(changes: int) -> Callable[[], object]:
        return lambda: [net.set(1.0 / (2 + index)) for index in range(changes)]

    def repeated(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False)

    expected = gradients(net, net, lambda: None)
    assert_same(gradients(net, repeated, between(3)), expected)
    with pytest.raises(RuntimeError, match=r"set more than 4 times between a checkpointed forward"):
        gradients(net, repeated, between(9))


def test_copies_have_a_scale_of_their_own():
    net = Net()
    net.set(0.5)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.set(2.0)
        assert other.first.trained.scale.item() == other.first.trained.scale_value == 2.0
        assert net.first.trained.scale.item() == net.first.trained.scale_value == 0.5
        assert not torch.allclose(other(net.x), net(net.x))


def test_state_dicts_and_memory_carry_the_scale():
    net, other = Net(), Net()
    net.set(0.5)
    for assign in (False, True):
        other.set(2.0)
        other.load_state_dict(copy.deepcopy(net.state_dict()), assign=assign)
        assert other.first.trained.scale_value == 0.5
        assert torch.equal(other(net.x), net(net.x))
    other.to_empty(device="cpu")
    assert other.first.trained.scale.item() == 0.5


def test_a_scale_given_to_functional_call_counts():
    net = Net()
    doubled = {name: 2 * each for name, each in net.named_buffers()}
    assert doubled
    y = torch.func.functional_call(net, doubled, (net.x,))
    net.set(2.0)
    torch.testing.assert_close(y, net(net.x))


def test_the_op_of_compiled_programs_keeps_its_contract():
    torch.library.opcheck(scale_module.scale_of_forward, (Net().first.trained.scale,))
