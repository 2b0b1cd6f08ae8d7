"""BottleneckAdapter in every form against its formula written out, and as a module among torch's."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from kronafuse import Bottleneck
from kronafuse.nn import BottleneckAdapter
from torch import Tensor
from torch.nn import functional

ACTS = {
    "identity": lambda x: x, "relu": torch.relu, "sigmoid": torch.sigmoid, "silu": functional.silu,
    "gelu": functional.gelu,
}  # fmt: skip
SPECS = {
    "dense": Bottleneck(width=7),
    "convolution": Bottleneck("res_in", "res_out", 6),
    "compacter": Bottleneck(width=8),
    "krona": Bottleneck("ff_in", "block_out", form="krona", factors=(5, 3)),
    "krona_res": Bottleneck("ff_in", "block_out", form="krona_res", factors=(5, 3)),
}
SPECS["compacter"] = replace(SPECS["compacter"], form="compacter")
SPECS["compacter-rank"] = replace(SPECS["compacter"], rank=2)


def made(spec: Bottleneck, n: int = 60, k: int = 36, seed: int = 0) -> BottleneckAdapter:
    torch.manual_seed(seed)
    adapter = BottleneckAdapter(replace(spec, dtype=torch.float64).layout(n, k))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return adapter


def summed(adapter: BottleneckAdapter, name: str) -> Tensor:
    """Σ A_i ⊗ B_i of the compacter form, or the dense map."""
    tensors = dict(adapter.named_parameters())
    if name in tensors:
        return tensors[name]
    right = tensors[f"{name}_b"]
    if f"{name}_b_down" in tensors:
        right = right @ tensors[f"{name}_b_down"]
    return sum(torch.kron(a, b) for a, b in zip(tensors[f"{name}_a"], right, strict=True))


def formula(adapter: BottleneckAdapter, x: Tensor, residual: Tensor | None) -> Tensor:
    layout, scale = adapter.layout, adapter.scale.double()
    tensors = dict(adapter.named_parameters())
    base = 0 if residual is None else residual
    if layout.factors is not None:
        y = base + scale * x @ torch.kron(tensors["a"], tensors["b"]).t()
        return y + tensors["residual_scale"] * x if layout.form == "krona_res" else y
    act = ACTS[layout.activation]
    if layout.convolution:
        hidden = functional.group_norm(x, 4, tensors["norm_weight"], tensors["norm_bias"])
        hidden = functional.conv2d(functional.silu(hidden), tensors["down"], tensors["down_bias"], padding=1)
        return base + scale * functional.conv2d(act(hidden), tensors["up"], tensors["up_bias"], padding=1)
    hidden = act(x @ summed(adapter, "down").t() + tensors["down_bias"])
    return base + scale * (hidden @ summed(adapter, "up").t() + tensors["up_bias"])


def inputs(form: str, n: int = 60, k: int = 36) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, k, 5, 4), (2, n, 5, 4)) if form == "convolution" else ((2, 3, k), (2, 3, n))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


@pytest.mark.parametrize("form", SPECS)
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "alone"])
def test_equals_its_formula(form, has_residual):
    spec = replace(SPECS[form], scale=-0.7)
    if form == "krona_res":
        n = k = 60  # the residual needs X and Y of one width
    else:
        n, k = 60, 36
    adapter = made(spec, n, k)
    x, residual = inputs(form, n, k)
    residual = residual if has_residual else None
    x.requires_grad_()
    y, expected = adapter(x, residual), formula(adapter, x, residual)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # the scale is held in fp32
    wanted = [x, *adapter.parameters()]
    dy = torch.randn_like(y)
    for got, truth in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("form", ["dense", "convolution", "compacter"])
def test_activations(form, activation):
    adapter = made(replace(SPECS[form], activation=activation))
    x, residual = inputs(form)
    torch.testing.assert_close(adapter(x, residual), formula(adapter, x, residual), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", SPECS)
def test_strength_multiplies_all_that_is_added(form):
    spec = SPECS[form] if form == "krona_res" else replace(SPECS[form], scale=0.5)
    n = k = 60
    adapter = made(spec, n, k)
    x, residual = inputs(form, n, k)
    whole = adapter(x, residual) - residual
    adapter.set_strength(0.25)
    torch.testing.assert_close(adapter(x, residual) - residual, 0.25 * whole, rtol=1e-6, atol=1e-9)
    adapter.set_strength(0.0)
    assert torch.equal(adapter(x, residual), residual)


@pytest.mark.parametrize("form", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(form, dtype):
    """fp32 tensors on 16-bit activations, and tensors in 16 bits: near the formula, in the activations' dtype."""
    n = k = 60
    adapter = made(SPECS[form], n, k).float()
    x, residual = inputs(form, n, k)
    expected = formula(copy.deepcopy(adapter).double(), x, residual)
    for each in (adapter, copy.deepcopy(adapter).to(dtype)):
        assert each.scale.dtype == torch.float32
        y = each(x.to(dtype), residual.to(dtype))
        assert y.dtype == dtype
        assert (y - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("form", SPECS)
def test_autocast_keeps_a_float32_residual(form):
    """The residual stream is fp32 under autocast, and adding to it does not round it to 16 bits."""
    n = k = 60
    adapter = made(SPECS[form], n, k).float()
    x, residual = (each.float() for each in inputs(form, n, k))
    adapter.set_strength(0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x, residual)
    assert y.dtype == torch.float32
    assert torch.equal(y, residual)
    adapter.set_strength(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x, residual)
    expected = formula(copy.deepcopy(adapter).double(), x.double(), residual.double())
    assert (y - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("form", SPECS)
def test_copies_pickles_moves_and_meta(form):
    adapter = made(SPECS[form], 60, 60)
    x, residual = inputs(form, 60, 60)
    y = adapter(x, residual)
    assert torch.equal(copy.deepcopy(adapter)(x, residual), y)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(x, residual), y)
    empty = BottleneckAdapter(adapter.layout, device="meta")
    assert all(each.is_meta for each in empty.parameters())
    empty.to_empty(device="cpu").reset_parameters()
    empty.load_state_dict(adapter.state_dict(), assign=True)
    assert torch.equal(empty(x, residual), y)
    assert adapter.half().scale.dtype == torch.float32


@pytest.mark.parametrize("form", SPECS)
def test_compile_fullgraph(form):
    adapter = made(SPECS[form], 60, 60).float()
    x, residual = (each.float() for each in inputs(form, 60, 60))
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), adapter(x, residual))
    adapter.set_strength(0.5)
    torch.testing.assert_close(compiled(x, residual), adapter(x, residual))


def test_krona_res_needs_one_width():
    with pytest.raises(ValueError, match=r"krona_res.* N = K; got N = 60, K = 36"):
        SPECS["krona_res"].layout(60, 36)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("form", ["dense", "convolution", "compacter"])
def test_activations_in_float32_with_gradients(form, activation):
    """torch has had activations that are wrong in one dtype alone."""
    adapter = made(replace(SPECS[form], activation=activation))
    single = copy.deepcopy(adapter).float()
    x, residual = inputs(form)
    dy = torch.randn(residual.shape, dtype=torch.float64)
    expected = formula(adapter, x, residual)
    y = single(x.float(), residual.float())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    truth = torch.autograd.grad(expected, list(adapter.parameters()), dy)
    for got, each in zip(torch.autograd.grad(y, list(single.parameters()), dy.float()), truth, strict=True):
        torch.testing.assert_close(got.double(), each, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_convolutions_normalise_before_they_round(offset):
    """Under autocast a feature map with an offset keeps its features: the norm is taken before the 16 bits."""
    adapter = made(SPECS["convolution"]).float()
    x, residual = (each.float() for each in inputs("convolution"))
    expected = formula(copy.deepcopy(adapter).double(), (x + offset).double(), 0 * residual.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x + offset)
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_rejects_a_spec_in_place_of_a_layout():
    with pytest.raises(
        TypeError, match=r"layout must be what Bottleneck\(\.\.\.\)\.layout\(n, k\) returns; got Bottleneck"
    ):
        BottleneckAdapter(Bottleneck())
