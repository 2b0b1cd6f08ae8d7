"""Attention processors: one read of x for q, k and v, the stock result, and everything forwarded."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from kronafuse import KronA, LoKr, attach
from kronafuse.nn import KronLinear
from kronafuse.nn import kron as kron_module
from small_models import MODELS, PARTIAL, build, output, randomize
from torch import nn

pytest.importorskip("diffusers")

from diffusers import ControlNetModel, UNet3DConditionModel, UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    SlicedAttnProcessor,
)
from kronafuse.models.processors import GROUPS, SharedForward

KRONA = KronA((8, 4))
JOINT = KronA(
    (8, 4),
    targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)


@pytest.fixture
def calls(monkeypatch):
    """The names of the projections in each operator call, and the x that they shared."""
    seen = []
    real = kron_module.kron_linear_group

    def counting(x, layers):
        seen.append((len(layers), x))
        return real(x, layers)

    monkeypatch.setattr(kron_module, "kron_linear_group", counting)
    return seen


def unshared(model):
    """The same model with the attention blocks' own forward: each projection is called by itself."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module.__dict__.get("forward"), SharedForward):
            del module.__dict__["forward"]
    return other


# groups of 3 (q, k, v of x or of the text), groups of 2 (k, v of the context) and single layers (q, out)
@pytest.mark.parametrize(
    ("name", "spec", "groups"),
    [
        ("sd15", KRONA, {3: 4, 2: 4, 1: 12}),
        ("sdxl", KRONA, {3: 8, 2: 8, 1: 24}),
        ("dit", KRONA, {3: 2, 1: 2}),
        ("pixart", KRONA, {3: 2, 2: 2, 1: 6}),
        ("sd3", JOINT, {3: 4, 1: 3}),
        ("flux", JOINT, {3: 3, 1: 2}),
        ("flux2", JOINT, {3: 2, 1: 2}),
    ],
)
def test_one_call_for_each_x(name, spec, groups, calls):
    model, inputs = build(name)
    attachment = attach(model, spec, allow_partial=name in PARTIAL)
    randomize(attachment)
    y = output(model, inputs)
    sizes = [count for count, _ in calls]
    assert {count: sizes.count(count) for count in sorted(set(sizes), reverse=True)} == groups
    assert sum(sizes) == len(attachment.modules)

    calls.clear()
    other = unshared(model)
    assert torch.allclose(output(other, inputs), y, atol=1e-5)
    assert {count for count, _ in calls} == {1}

    attachment.merge()
    calls.clear()
    assert torch.allclose(output(model, inputs), y, atol=1e-4)
    assert calls == []


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_gradients_are_the_stock_ones(name):
    model, inputs = build(name)
    attachment = attach(model, JOINT if name != "sd15" else LoKr(4, 2))
    randomize(attachment)
    other = unshared(model)
    results = []
    for each in (model, other):
        output(each, inputs).square().sum().backward()
        results.append([factor.grad for factor in each.parameters() if factor.requires_grad])
    assert len(results[0]) == len(list(attachment.parameters()))
    for ours, stock in zip(*results, strict=True):
        assert (ours is None) == (stock is None)
        assert ours is None or torch.allclose(ours, stock, rtol=1e-3, atol=1e-4)


def test_a_projection_without_an_adapter_is_called_by_itself(calls):
    model, inputs = build("dit")
    attachment = attach(model, KronA((8, 4), targets=("to_q", "to_v")))
    randomize(attachment)
    y = output(model, inputs)
    assert [count for count, _ in calls] == [2, 2]
    assert torch.allclose(output(unshared(model), inputs), y, atol=1e-5)


def test_a_hooked_projection_is_called_by_itself(calls):
    """Hooks on the adapted layer itself belong to a call of it; hooks on its base do not stop the sharing."""
    model, inputs = build("dit")
    randomize(attach(model, KRONA))
    block = model.transformer_blocks[0].attn1
    called = []
    block.to_k.register_forward_hook(lambda *_: called.append("to_k"))
    block.to_v.base.register_forward_hook(lambda *_: called.append("base of to_v"))
    y = output(model, inputs)
    assert sorted(called) == ["base of to_v", "to_k"]
    assert sorted(count for count, _ in calls) == [1, 1, 1, 2, 3]
    assert torch.allclose(output(unshared(model), inputs), y, atol=1e-5)


def test_another_adapter_on_top_is_called():
    """A layer that another library has wrapped since is no longer ours to read."""
    model, inputs = build("dit")
    randomize(attach(model, KRONA))
    block = model.transformer_blocks[0].attn1

    class OnTop(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    y = output(model, inputs)
    block.to_q = OnTop(block.to_q)
    assert not torch.allclose(output(model, inputs), y)
    assert torch.allclose(output(unshared(model), inputs), output(model, inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "flux", "flux2"])
def test_the_signature_of_forward_is_the_stock_one(name):
    model, _ = build(name)
    attach(model, KRONA, allow_partial=name in PARTIAL)
    blocks = [each for each in model.modules() if "forward" in each.__dict__]
    assert blocks
    for each in blocks:
        assert inspect.signature(each.forward) == inspect.signature(type(each).forward.__get__(each))


def test_the_stock_arguments_arrive():
    """Attention masks and cross_attention_kwargs reach the stock processor, with the stock effect."""
    model, inputs = build("sd15")
    randomize(attach(model, KRONA))
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    masked = dict(inputs, encoder_attention_mask=mask)
    assert not torch.allclose(output(model, masked), output(model, inputs), atol=1e-4)
    assert torch.allclose(output(unshared(model), masked), output(model, masked), atol=1e-5)


def test_the_attention_without_sdpa_shares_too(calls):
    model, inputs = build("sd15")
    model.set_attn_processor(AttnProcessor())
    stock = model.attn_processors
    attachment = attach(model, KRONA)
    randomize(attachment)
    y = output(model, inputs)
    assert {count for count, _ in calls} == {1, 2, 3}
    assert torch.allclose(output(unshared(model), inputs), y, atol=1e-5)
    attachment.remove()
    assert all(each is stock[name] for name, each in model.attn_processors.items())


def test_unknown_processors_are_left_and_reported(calls):
    model, inputs = build("sd15")
    sliced = SlicedAttnProcessor(1)
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(sliced)
    attachment = attach(model, KRONA)
    randomize(attachment)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert attachment.report.unshared == {name: "the processor SlicedAttnProcessor"}
    assert name not in attachment.report.sharing
    assert "1 attention blocks have the processor SlicedAttnProcessor: x is read once per projection" in str(
        attachment.report
    )
    y = output(model, inputs)
    assert model.get_submodule(name).processor is sliced
    attachment.merge()
    assert torch.allclose(output(model, inputs), y, atol=1e-4)
    attachment.remove()
    assert model.get_submodule(name).processor is sliced


def test_backend_and_parallel_config_are_forwarded(monkeypatch):
    """Chosen before or after attach, they reach the attention kernel."""
    from diffusers.models.transformers import transformer_flux

    model, inputs = build("flux")
    stock = dict(model.attn_processors)
    config = object()
    for each in stock.values():
        each._parallel_config = config
    attachment = attach(model, KRONA)
    model.set_attention_backend("native")
    seen = []
    real = transformer_flux.dispatch_attention_fn

    def spy(*args, backend=None, parallel_config=None, **kwargs):
        seen.append((backend, parallel_config))
        return real(*args, backend=backend, **kwargs)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", spy)
    output(model, inputs)
    assert [(backend.value, parallel) for backend, parallel in seen] == [("native", config)] * 2
    attachment.remove()
    assert all(model.attn_processors[name] is each for name, each in stock.items())
    assert {each._attention_backend.value for each in stock.values()} == {"native"}
    assert {each._parallel_config for each in stock.values()} == {config}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "clip"])
def test_the_processors_stay_the_objects_that_they_are(name):
    """diffusers and its hooks look a processor's exact class up."""
    model, inputs = build(name)
    before = [getattr(each, "processor", None) for each in model.modules()]
    with attach(model, KRONA, allow_partial=name in PARTIAL) as attachment:
        assert attachment.report.sharing
        output(model, inputs)
        of_model = [each for each in model.modules() if not isinstance(each, KronLinear)]
        after = {id(each.processor) for each in of_model if getattr(each, "processor", None) is not None}
        assert after == {id(each) for each in before if each is not None}


def unet_3d():
    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=24,
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
    )


def video():
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=24,
        layers_per_block=1,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )


@pytest.mark.parametrize(
    "made",
    [
        lambda: build("sd15")[0],
        unet_3d,
        video,
        lambda: ControlNetModel.from_unet(build("sd15")[0]),
    ],
    ids=["unet", "unet_3d", "video", "controlnet"],
)
def test_the_default_processors_can_be_set_after_attach_and_share(made):
    model = made()
    attachment = attach(model, KRONA)
    sharing = attachment.report.sharing
    assert sharing
    classes = {type(each) for each in model.attn_processors.values()}
    model.set_default_attn_processor()
    assert attachment.report.sharing == sharing
    model.set_attn_processor(SlicedAttnProcessor(1))
    assert attachment.report.sharing == ()
    model.set_default_attn_processor()
    assert attachment.report.sharing == sharing
    chosen = model.attn_processors
    assert {type(each) for each in chosen.values()} <= classes | {AttnProcessor}
    attachment.remove()
    assert all(chosen[name] is each for name, each in model.attn_processors.items())
    assert not any("forward" in each.__dict__ for each in model.modules())


def test_a_processor_chosen_after_attach_shares(calls):
    model, inputs = build("sd15")
    randomize(attach(model, KRONA))
    y = output(model, inputs)
    model.set_default_attn_processor()
    calls.clear()
    assert torch.allclose(output(model, inputs), y, atol=1e-5)
    assert {count for count, _ in calls} == {1, 2, 3}


def test_a_hook_of_diffusers_finds_the_processors_class():
    """Skip-layer guidance asks a registry that knows the stock classes only."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    model, inputs = build("dit")
    plain, _ = build("dit")
    config = LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    attachment = attach(model, KRONA)
    start = output(model, inputs)
    for each in (model, plain):
        apply_layer_skip(each, config)
    assert not torch.allclose(output(model, inputs), start, atol=1e-3)
    assert torch.allclose(output(model, inputs), output(plain, inputs), atol=1e-5)
    attachment.remove()
    assert torch.equal(output(model, inputs), output(plain, inputs))


def test_an_attention_block_with_a_forward_of_its_own_is_left_and_reported(calls):
    model, inputs = build("dit")

    class Louder(Attention):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model.transformer_blocks[0].attn1.__class__ = Louder
    start = output(model, inputs)
    attachment = attach(model, KRONA)
    assert attachment.report.unshared == {"transformer_blocks.0.attn1": "a forward of their own"}
    assert torch.allclose(output(model, inputs), start, atol=1e-5)
    assert sorted(count for count, _ in calls) == [1, 1, 1, 1, 1, 3]


def test_stock_classes_are_untouched():
    before = {stock: dict(vars(stock)) for stock in GROUPS}
    model, inputs = build("flux")
    attach(model, KRONA)
    plain, plain_inputs = build("flux")
    output(model, inputs)
    assert all(type(each) in GROUPS for each in plain.attn_processors.values())
    assert not any(isinstance(each, KronLinear) for each in plain.modules())
    output(plain, plain_inputs)
    assert {stock: dict(vars(stock)) for stock in GROUPS} == before


@pytest.mark.parametrize("name", [name for name in MODELS if name != "clip"])
def test_fusing_projections_is_refused_and_allowed_again(name):
    """It would copy the frozen weights and drop the deltas without a word."""
    model, inputs = build(name)
    if not hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections = lambda: [
            each.fuse_projections() for each in model.modules() if hasattr(each, "fuse_projections")
        ]
    attachment = attach(model, KRONA, allow_partial=name in PARTIAL)
    randomize(attachment)
    y = output(model, inputs)
    with pytest.raises(
        RuntimeError, match="carries kronafuse adapters, whose deltas a fused projection would drop"
    ):
        model.fuse_qkv_projections()
    block = next(each for each in model.modules() if hasattr(each, "fuse_projections"))
    with pytest.raises(RuntimeError, match="fuse_projections: the model carries kronafuse adapters"):
        block.fuse_projections()
    assert torch.equal(output(model, inputs), y)
    attachment.merge(keep=False)
    attachment.remove()
    model.fuse_qkv_projections()
    assert torch.allclose(output(model, inputs), y, atol=1e-4)
    assert any(getattr(each, "fused_projections", False) for each in model.modules())


def test_fusing_is_refused_by_a_model_inside_the_adapted_one():
    model, inputs = build("sd15")
    with attach(nn.ModuleDict({"unet": model}), KRONA):
        with pytest.raises(
            RuntimeError, match=r"UNet2DConditionModel.fuse_qkv_projections: the model carries"
        ):
            model.fuse_qkv_projections()
        assert not any(hasattr(each, "to_qkv") for each in model.modules())
    model.fuse_qkv_projections()
    output(model, inputs)


@pytest.mark.parametrize(("name", "part"), [("sd15", "mid_block"), ("sd3", "transformer_blocks.1")])
def test_refused_fusing_around_an_adapted_part_leaves_the_outputs(name, part):
    """diffusers fuses block after block: ours refuses, and what those before it hold changes nothing."""
    model, inputs = build(name)
    start = output(model, inputs)
    attachment = attach(model.get_submodule(part), KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    with pytest.raises(RuntimeError, match="those before this one now hold fused copies of their weights"):
        model.fuse_qkv_projections()
    assert torch.allclose(output(model, inputs), adapted, atol=1e-5)
    attachment.remove()
    assert torch.allclose(output(model, inputs), start, atol=1e-5)
    with attach(model, KRONA) as whole:
        randomize(whole)
        assert not torch.allclose(output(model, inputs), start, atol=1e-3)
    model.fuse_qkv_projections()
    assert torch.allclose(output(model, inputs), start, atol=1e-4)


def test_attach_refuses_projections_that_are_fused_already():
    model, inputs = build("sd15")
    start = output(model, inputs)
    model.fuse_qkv_projections()
    with pytest.raises(
        ValueError, match=r"attn1.to_q, .* are replaced by a fused projection and would not be called"
    ):
        attach(model, KRONA)
    with attach(model, KronA((8, 4), targets=("to_qkv", "to_kv", "to_out.0"))) as attachment:
        randomize(attachment)
        assert not torch.allclose(output(model, inputs), start, atol=1e-3)
    model.unfuse_qkv_projections()
    with attach(model, KRONA):
        assert torch.allclose(output(model, inputs), start, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_compiles_in_one_graph(name):
    torch._dynamo.reset()
    model, inputs = build(name)
    attachment = attach(model, JOINT if name != "pixart" else KRONA)
    randomize(attachment)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(output(compiled, inputs), output(model, inputs), atol=1e-5)
