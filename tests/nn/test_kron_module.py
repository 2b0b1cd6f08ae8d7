"""KronLinear as a module: its result, when it fuses, and everything torch does to modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from kronafuse import KronA, LoKr, LoRA
from kronafuse.nn import KronFactors, KronLinear
from kronafuse.nn import kron as kron_module
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

K, N = 64, 32
SPECS = [
    KronA((8, 4)),
    KronA((8, 4), shuffled=True, scale=0.5),
    LoKr(4),
    LoKr(4, 2, 1.0),
    LoKr(8, 1, decompose_both=True),
    LoRA(4, 2.0),
]


def fill(module: nn.Module, seed: int = 0) -> None:
    """Random factors: a delta of 0 would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        if isinstance(each, KronFactors):
            for factor in each.parameters():
                factor.data.copy_(torch.randn(factor.shape, generator=generator))


def dense_delta(factors: KronFactors) -> torch.Tensor:
    """scale · (A ⊗ B) by torch.kron, in float64."""
    term = factors.term()
    right = term.b.double() if term.b_down is None else term.b.double() @ term.b_down.double()
    left = torch.ones(1, 1).double() if term.a is None else term.a.double()
    delta = torch.kron(left, right)
    if term.shuffled:
        n1, n2 = left.shape[0], right.shape[0]
        delta = delta.view(n1, n2, -1).transpose(0, 1).reshape(n1 * n2, -1)
    return factors.lokr_scale.double() * delta


def made(spec=SPECS[0], *, bias: bool = True, dtype=torch.float32) -> KronLinear:
    torch.manual_seed(1)
    layer = KronLinear(nn.Linear(K, N, bias=bias, dtype=dtype), spec)
    fill(layer)
    return layer


def x_of(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (2, 5)), K, generator=torch.Generator().manual_seed(2)).to(dtype)


def expected(layer: KronLinear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight.double()
    for factors in layer.active():
        weight = weight + dense_delta(factors)
    return nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


@pytest.fixture
def calls(monkeypatch):
    """The groups that each operator call was given."""
    seen = []
    real = kron_module.kron_linear_group

    def counting(x, layers):
        seen.append(layers)
        return real(x, layers)

    monkeypatch.setattr(kron_module, "kron_linear_group", counting)
    return seen


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward(spec, bias, calls):
    layer, x = made(spec, bias=bias), x_of()
    assert torch.allclose(layer(x).double(), expected(layer, x), atol=1e-4)
    assert (layer(x) - layer.base(x)).abs().max() > 0.1
    assert all(group[0].weight is layer.weight and group[0].base is None for group in calls)
    assert layer.unfused is None


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_unfused_is_the_same(spec, calls):
    layer, x = made(spec), x_of()
    fused = layer(x)
    layer.base.register_forward_hook(lambda *_: None)
    assert torch.allclose(layer(x), fused, atol=1e-4)
    assert calls[-1][0].weight is None


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients(spec):
    layer, x = made(spec).double(), x_of().double().requires_grad_()
    assert [name for name, _ in layer.named_parameters()] == [
        "base.weight",
        "base.bias",
        *(f"adapters.0.{name}" for name in spec.layout(N, K).sizes),
    ]
    dy = torch.randn(2, 5, N, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    got = torch.autograd.grad((layer(x) * dy).sum(), wanted)
    # the scale is fp32 in the buffer, so the dense form uses it as it stands
    reference = torch.autograd.grad((expected(layer, x) * dy).sum(), wanted)
    for each, other in zip(got, reference, strict=True):
        assert torch.allclose(each, other, atol=1e-9)


class Scaled(nn.Linear):
    """A subclass whose forward is not F.linear."""

    def forward(self, input):
        return 2 * super().forward(input)


def _subclass(layer):
    base = Scaled(K, N)
    base.load_state_dict(layer.base.state_dict())
    layer.base = base


def _forward_hook(layer):
    layer.base.register_forward_hook(lambda module, args, y: y + 1)


def _forward_pre_hook(layer):
    layer.base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _backward_hook(layer):
    layer.base.register_full_backward_hook(lambda module, dx, dy: None)


def _replaced_forward(layer):
    base = layer.base
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) - 1


def _parametrized(layer):
    nn.utils.parametrizations.orthogonal(layer.base)


def _fp64_weight(layer):
    base = layer.base.double()
    base.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    base.register_forward_hook(lambda module, args, y: y.float())


class Tagged(torch.Tensor):
    """A tensor subclass, as quantised and distributed weights are."""


def _tensor_subclass(layer):
    layer.base.weight = nn.Parameter(layer.base.weight.detach().as_subclass(Tagged))


def _old_weight_norm(layer):
    base = layer.base
    weight = base.weight
    del base.weight
    base.register_parameter("weight_v", weight)
    base.weight = weight.detach() * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_old_weight_norm, "the base's weight is not its own parameter"),
        (_subclass, "the base is Scaled, not nn.Linear"),
        (_forward_hook, "the base has hooks"),
        (_forward_pre_hook, "the base has hooks"),
        (_backward_hook, "the base has hooks"),
        (_replaced_forward, "the base's forward is replaced"),
        (_parametrized, "the base is ParametrizedLinear, not nn.Linear"),
        (_fp64_weight, "the base has hooks"),
        (_tensor_subclass, "the base's weight is Tagged, not a plain tensor"),
    ],
)
def test_calls_a_base_that_is_more_than_a_linear(change, reason, calls):
    layer, x = made(), x_of()
    delta = nn.functional.linear(x.double(), dense_delta(layer.adapters["0"]))
    change(layer)
    y = layer(x).as_subclass(torch.Tensor)
    assert layer.unfused == reason
    assert calls[0][0].weight is None
    base = layer.base(x).as_subclass(torch.Tensor).double()
    assert torch.allclose(y.double(), base + delta, atol=1e-4)


def test_calls_the_base_under_global_hooks(calls):
    layer = made()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        layer(x_of())
        assert layer.unfused == "hooks are registered on all modules"
        assert calls[0][0].weight is None
    finally:
        handle.remove()
    layer(x_of())
    assert calls[1][0].weight is layer.weight


def test_calls_a_base_on_another_device():
    layer = made()
    layer.base.to("meta")
    assert kron_module.input_reason(layer.base, x_of()) == "the base's weight is on meta, x on cpu"


def test_calls_a_base_of_another_dtype_than_autocast(calls):
    layer, x = made(), x_of()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.unfused == "the base's weight is float32, the compute dtype bfloat16"
    assert calls[0][0].weight is None
    assert torch.allclose(y.double(), expected(layer, x), rtol=0.05, atol=0.6)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_fuses_in_the_dtype_of_autocast(x_dtype, calls):
    layer, x = made(dtype=torch.bfloat16), x_of(dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.unfused is None
    assert calls[0][0].weight is layer.weight
    assert torch.allclose(y.double(), expected(layer, x), rtol=0.05, atol=0.6)


def test_fp32_factors_on_bf16_activations(calls):
    layer = made(dtype=torch.bfloat16)
    y = layer(x_of(dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.unfused is None
    assert layer.adapters["0"].lokr_a.grad.dtype == torch.float32


def test_bias_of_another_dtype_is_not_fused():
    layer = made(dtype=torch.bfloat16)
    layer.base.bias = nn.Parameter(layer.base.bias.float())
    assert "bias is float32" in kron_module.input_reason(layer.base, x_of(dtype=torch.bfloat16))


def test_stacked_adapters_run_in_one_call(calls):
    layer, x = made(LoKr(4)), x_of()
    layer.add(LoRA(3).layout(N, K))
    layer.add(KronA((2, 2), shuffled=True).layout(N, K))
    fill(layer)
    assert torch.allclose(layer(x).double(), expected(layer, x), atol=1e-3)
    assert [len(group[0].terms) for group in calls] == [3]
    layer.discard(layer.adapters["1"])
    assert list(layer.adapters) == ["0", "2"]
    assert torch.allclose(layer(x).double(), expected(layer, x), atol=1e-3)
    layer.add(LoRA(3).layout(N, K))
    assert list(layer.adapters) == ["0", "2", "3"]


def test_without_adapters_is_the_base():
    layer, x = KronLinear(nn.Linear(K, N)), x_of()
    assert torch.equal(layer(x), layer.base(x))


def test_starts_as_the_base():
    base, x = nn.Linear(K, N), x_of()
    for spec in SPECS:
        assert torch.allclose(KronLinear(base, spec)(x), base(x), atol=1e-6)


def test_rejects_what_is_no_linear_and_factors_of_another_size():
    with pytest.raises(TypeError, match="base must have in_features and out_features; Conv2d has not"):
        KronLinear(nn.Conv2d(3, 3, 1), KronA())
    with pytest.raises(ValueError, match=r"make \(64, 64\); the layer's \(N, K\) is \(32, 64\)"):
        made().add(KronA((8, 4)).layout(64, 64))


class Answering(nn.Linear):
    """A base that computes in fp32 and answers in one dtype whatever came."""

    answer = torch.float32

    def forward(self, input):
        return super().forward(input.float()).to(self.answer)


@pytest.mark.parametrize(
    ("x_dtype", "answer"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_base_that_answers_in_another_dtype(x_dtype, answer, together):
    """As without an adapter, the result has the dtype of the base's own answer."""
    layer, x = made(), x_of(dtype=x_dtype)
    base = Answering(K, N)
    base.answer = answer
    base.load_state_dict(layer.base.state_dict())
    layer.base = base
    y = kron_module.linear_group(x, [layer, made(dtype=x_dtype)])[0] if together else layer(x)
    assert y.dtype == base(x).dtype == answer
    assert torch.allclose(y.double(), expected(layer, x), rtol=0.05, atol=0.6)
    y.float().sum().backward()
    assert all(each.grad.abs().max() > 0 for each in layer.adapters.parameters())


def test_a_base_that_answers_in_fp32_under_autocast():
    layer, x = made(), x_of()
    base = Answering(K, N)
    base.load_state_dict(layer.base.state_dict())
    layer.base = base
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == base(x).dtype == torch.float32
    assert torch.allclose(y.double(), expected(layer, x), rtol=0.05, atol=0.6)


def test_rejects_an_input_that_is_no_floating_tensor():
    layer = made()
    with pytest.raises(TypeError, match=r"KronLinear: x must be float32, .* got int64"):
        layer(torch.ones(2, K, dtype=torch.int64))
    with pytest.raises(TypeError, match="KronLinear: x must be a tensor; got list"):
        layer([1.0] * K)
    with pytest.raises(TypeError, match=r"KronLinear: x must be float32, .* got bool"):
        kron_module.linear_group(torch.ones(2, K, dtype=torch.bool), [layer, made()])


def test_rejects_an_offloaded_base():
    base = nn.Linear(K, N, device="meta")
    base.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"offloaded .* add adapters first, then offload"):
        KronLinear(base, LoKr(4))


def test_acts_like_its_base():
    layer = made()
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias


def test_scale_and_swapped_factors_do_not_recompile():
    layer, x = made(LoKr(4, 2, 1.0)), x_of()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(4):
        layer.adapters["0"].set_strength(0.5 + step)
        fill(layer, seed=step)
        assert torch.allclose(compiled(x).double(), expected(layer, x), atol=1e-3)
    assert counter.frame_count == 1


def test_token_counts_do_not_recompile():
    layer = made()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 17):
        x = x_of(2, tokens)
        assert torch.allclose(compiled(x).double(), expected(layer, x), atol=1e-4)
    assert counter.frame_count == 1


def test_compiled_gradients():
    layer, x = made(LoKr(4)), x_of()
    layer(x).square().sum().backward()
    eager = [factor.grad.clone() for factor in layer.adapters.parameters()]
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for factor, reference in zip(layer.adapters.parameters(), eager, strict=True):
        assert torch.allclose(factor.grad, reference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_and_pickle(merged):
    layer, x = made(LoKr(4, 2)), x_of()
    before = layer(x)
    if merged:
        layer.merge(layer.adapters["0"])
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert other.weight is not layer.weight
        other.unmerge(other.adapters["0"])
        assert torch.equal(other(x), before)
        fill(other, seed=9)
        assert not torch.allclose(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_keeps_the_scale_in_fp32(dtype):
    layer = made(LoKr(4, 2, 2 / 3)).to(dtype)
    factors = layer.adapters["0"]
    assert {each.dtype for each in layer.parameters()} == {dtype}
    assert factors.lokr_scale.dtype == torch.float32
    assert factors.lokr_scale.item() == torch.tensor(1 / 3).item()
    x = x_of(dtype=dtype)
    assert torch.allclose(layer(x).double(), expected(layer, x), rtol=0.05, atol=0.3)


def test_half_by_name():
    layer = made().half()
    assert layer.weight.dtype == layer.adapters["0"].lokr_a.dtype == torch.float16
    assert layer(x_of(dtype=torch.float16)).dtype == torch.float16


def test_meta_initialisation():
    """Built on meta, given memory, reset: as if built on the CPU."""
    with torch.device("meta"):
        layer = KronLinear(nn.Linear(K, N), LoKr(4, 2, 1.0))
    assert all(each.is_meta for each in (*layer.parameters(), *layer.buffers()))
    assert "scale=0.5" in repr(layer)
    layer.to_empty(device="cpu")
    for each in layer.modules():
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()
    factors = layer.adapters["0"]
    assert factors.lokr_scale.item() == 0.5
    assert factors.lokr_b_down.abs().max() == 0
    assert 0 < factors.lokr_b.abs().max() < 1
    assert torch.isfinite(layer(x_of())).all()


def test_load_state_dict_assign_onto_meta():
    source, x = made(LoKr(4, 2, 1.0)), x_of()
    source.adapters["0"].set_strength(3.0)
    with torch.device("meta"):
        layer = KronLinear(nn.Linear(K, N), LoKr(4, 2, 1.0))
    layer.load_state_dict(source.state_dict(), assign=True)
    assert not any(each.is_meta for each in (*layer.parameters(), *layer.buffers()))
    assert torch.equal(layer(x), source(x))


def test_output_can_be_changed_in_place():
    """As what nn.Linear returns."""
    layer, x = made(), x_of()
    y = layer(x)
    y += 1
    assert torch.allclose(y.double(), expected(layer, x) + 1, atol=1e-4)
    y.sum().backward()
    assert layer.adapters["0"].lokr_b.grad is not None


def test_export():
    layer = made(LoKr(4, 2))
    program = torch.export.export(layer, (x_of(3),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert torch.allclose(program.module()(x_of(7)), layer(x_of(7)), atol=1e-6)


def test_state_dict_names_say_lokr():
    """diffusers leaves parameters in their dtype under layerwise casting by such names."""
    names = {
        name for name in made(LoKr(8, 1, decompose_both=True)).state_dict() if name.startswith("adapters")
    }
    assert names == {f"adapters.0.lokr_{each}" for each in ("a_up", "a_down", "b", "b_down", "scale")}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    layer = made(LoKr(4, 2))
    x = x_of().requires_grad_()
    layer(x).square().sum().backward()
    reference = [each.grad.clone() for each in (x, *layer.parameters())]
    layer.zero_grad()
    x.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for each, other in zip((x, *layer.parameters()), reference, strict=True):
        assert torch.equal(each.grad, other)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_merge_and_unmerge(spec):
    layer, x = made(spec), x_of()
    y, weight = layer(x), layer.weight
    bits = weight.detach().clone()
    layer.merge(layer.adapters["0"])
    assert layer.weight is not weight
    assert layer.weight.requires_grad
    assert torch.allclose(layer(x), y, atol=1e-4)
    assert "merged" in repr(layer)
    assert list(layer.state_dict())[:2] == ["base.weight", "base.bias"]
    layer.merge(layer.adapters["0"])
    assert torch.allclose(layer(x), y, atol=1e-4)
    layer.unmerge(layer.adapters["0"])
    assert layer.weight is weight
    assert torch.equal(weight, bits)
    assert torch.equal(layer(x), y)


def test_unmerge_in_any_order():
    layer = made(LoKr(4), dtype=torch.bfloat16)
    weight = layer.weight
    first, second = layer.adapters["0"], layer.add(LoRA(3).layout(N, K))
    fill(layer)
    layer.merge(second)
    only_second = layer.weight.detach().clone()
    layer.unmerge(second)
    layer.merge(first)
    layer.merge(second)
    layer.unmerge(first)
    assert torch.equal(layer.weight, only_second)
    layer.unmerge(second)
    assert layer.weight is weight


def test_merge_without_keeping():
    layer, x = made(), x_of()
    y = layer(x)
    layer.merge(layer.adapters["0"], keep=False)
    assert torch.allclose(layer(x), y, atol=1e-4)
    with pytest.raises(RuntimeError, match="mid was merged with keep=False, which freed the original weight"):
        layer.unmerge(layer.adapters["0"], name="mid")
    added = layer.add(LoRA(2).layout(N, K))
    weight = layer.weight
    layer.merge(added)
    layer.unmerge(added)
    assert layer.weight is weight


def test_kept_weight_follows_to():
    layer = made()
    original = layer.weight.detach().clone()
    layer.merge(layer.adapters["0"])
    layer.double()
    layer.unmerge(layer.adapters["0"])
    assert torch.equal(layer.weight, original.double())


@pytest.mark.parametrize(("change", "reason"), [(_subclass, "Scaled"), (_forward_hook, "hooks")])
def test_merge_refuses_what_is_no_plain_linear(change, reason):
    layer = made()
    change(layer)
    weight = layer.weight
    with pytest.raises(RuntimeError, match=f"merge: mid cannot be merged: .*{reason}"):
        layer.merge(layer.adapters["0"], name="mid")
    assert layer.weight is weight


def test_repr():
    layer = made(KronA((8, 4), scale=0.5))
    assert layer.extra_repr() == "64 -> 32 as (8x4) x (4x16), scale=0.5, fused"
    layer.add(LoKr(8, 1, 2.0, decompose_both=True).layout(N, K))
    layer.base.register_forward_hook(lambda *_: None)
    assert layer.extra_repr() == (
        "64 -> 32 as (8x4) x (4x16), scale=0.5 + as (4x1)·(1x8) x (8x1)·(1x8), scale=2.0,"
        " base + delta: the base has hooks"
    )
