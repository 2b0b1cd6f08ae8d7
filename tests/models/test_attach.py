"""attach on every architecture: outputs, training, merging, stacking, removal and refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from kronafuse import KronA, LoKr, LoRA, attach
from kronafuse.formats import AdapterFile
from kronafuse.models.sites import leaf
from kronafuse.nn import KronLinear
from small_models import MODELS, PARTIAL, build, output, randomize
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("accelerate")

from accelerate import cpu_offload

KRONA = KronA((8, 4))


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that remove() must give back."""
    return {
        "modules": [(name, id(module), dict(module.__dict__)) for name, module in model.named_modules()],
        "processors": [id(getattr(module, "processor", None)) for module in model.modules()],
        "requires_grad": [(name, id(each), each.requires_grad) for name, each in model.named_parameters()],
        "keys": list(model.state_dict()),
        "training": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("name", MODELS)
def test_attach_train_merge_and_remove(name):
    model, inputs = build(name)
    before, start = snapshot(model), output(model, inputs).detach()
    attachment = attach(model, KRONA, allow_partial=name in PARTIAL)
    assert torch.allclose(output(model, inputs), start, atol=1e-5)

    randomize(attachment)
    adapted = output(model, inputs)
    assert (adapted - start).abs().max() > 1e-3
    adapted.square().sum().backward()
    for factor_name, factor in attachment.named_parameters():
        last_text = name == "sd3" and "transformer_blocks.1.attn.add_q" in factor_name
        assert last_text or factor.grad is not None
        assert last_text or factor.grad.abs().max() > 0, factor_name
    trained = {id(each) for each in attachment.parameters()}
    assert all(each.grad is None for each in model.parameters() if id(each) not in trained)
    assert {id(each) for each in model.parameters() if each.requires_grad} == trained

    bits = {each_name: each.detach().clone() for each_name, each in model.state_dict().items()}
    attachment.merge()
    assert torch.allclose(output(model, inputs), adapted, atol=1e-4)
    attachment.unmerge()
    assert torch.equal(output(model, inputs), adapted)
    assert all(torch.equal(each, bits[each_name]) for each_name, each in model.state_dict().items())

    attachment.remove()
    assert torch.equal(output(model, inputs), start)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", [LoKr(4, 2, 1.0), LoRA(3)], ids=lambda spec: type(spec).__name__)
def test_equals_the_dense_merge(name, spec):
    """Fused against each weight replaced by W + scale · (A ⊗ B) before any of our modules is in the model."""
    model, inputs = build(name)
    dense = copy.deepcopy(model)
    attachment = attach(model, spec, allow_partial=name in PARTIAL)
    randomize(attachment)
    for layer_name, factors in attachment._trained.items():
        term = factors.term()
        right = term.b @ term.b_down
        delta = right if term.a is None else torch.kron(term.a, right)
        dense.get_submodule(layer_name).weight.data += term.scale * delta
    assert torch.allclose(output(model, inputs), output(dense, inputs), atol=1e-4)


def test_second_adapter_stacks_and_either_goes_first():
    model, inputs = build("sd15")
    before, start = snapshot(model), output(model, inputs).detach()
    first = attach(model, KRONA)
    randomize(first)
    with_first = output(model, inputs).detach()
    second = attach(model, LoRA(2, targets=("to_q", "ff.net.2")))
    assert torch.allclose(output(model, inputs), with_first, atol=1e-5)
    assert all(each.requires_grad for each in (*first.parameters(), *second.parameters()))
    randomize(second, seed=5)
    with_both = output(model, inputs).detach()
    second.remove()
    assert torch.equal(output(model, inputs), with_first)
    second = attach(model, LoRA(2, targets=("to_q", "ff.net.2")))
    randomize(second, seed=5)
    assert torch.equal(output(model, inputs), with_both)
    first.remove()
    assert not any(each.requires_grad for each in model.parameters() if each not in set(second.parameters()))
    assert isinstance(
        model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), KronLinear
    )
    assert isinstance(
        model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_k"), nn.Linear
    )
    with pytest.raises(RuntimeError, match="fuse_qkv_projections"):
        model.fuse_qkv_projections()
    second.remove()
    assert torch.equal(output(model, inputs), start)
    assert snapshot(model) == before


def test_requires_grad_is_restored_one_by_one():
    model, _ = build("dit")
    model.requires_grad_(False)
    model.get_submodule("transformer_blocks.0.attn1.to_q").requires_grad_(True)
    before = snapshot(model)
    with attach(model, KRONA) as attachment:
        assert {id(each) for each in model.parameters() if each.requires_grad} == {
            id(each) for each in attachment.parameters()
        }
    assert snapshot(model) == before


def test_context_manager_removes_after_an_error():
    model, _ = build("dit")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attach(model, KRONA):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_spent_after_remove():
    model, _ = build("dit")
    attachment = attach(model, KRONA)
    attachment.remove()
    attachment.remove()
    assert "removed" in repr(attachment)
    assert len(list(attachment.parameters())) == 16
    for use in (attachment.merge, attachment.unmerge, lambda: attachment.report):
        with pytest.raises(RuntimeError, match="the attachment has been removed from its model"):
            use()


def test_scale():
    model, inputs = build("dit")
    attachment = attach(model, LoKr(4, 2, 1.0))
    randomize(attachment)
    start = attachment.scale
    adapted = output(model, inputs)
    attachment.scale = 0.0
    silent = output(model, inputs)
    attachment.scale = 1.0
    assert start == 1.0
    assert torch.equal(output(model, inputs), adapted)
    attachment.merge()
    with pytest.raises(RuntimeError, match="scale: 8 layers are merged"):
        attachment.scale = 2.0
    attachment.remove()
    assert torch.allclose(output(model, inputs), silent, atol=1e-5)


def test_merge_without_keeping_stays_after_remove():
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    attachment.merge(keep=False)
    with pytest.raises(RuntimeError, match="to_q was merged with keep=False"):
        attachment.unmerge()
    attachment.remove()
    assert not any(isinstance(each, KronLinear) for each in model.modules())
    assert all(each.requires_grad for each in model.parameters())
    assert torch.allclose(output(model, inputs), adapted, atol=1e-4)


def test_merge_is_all_or_nothing():
    model, _ = build("dit")
    attachment = attach(model, KRONA)
    last = model.get_submodule("transformer_blocks.1.attn1.to_v")
    last.base.register_forward_hook(lambda *_: None)
    bits = {name: each.clone() for name, each in model.state_dict().items()}
    randomize(attachment)
    with pytest.raises(
        RuntimeError, match=r"transformer_blocks.1.attn1.to_v cannot be merged: the base has hooks"
    ):
        attachment.merge()
    assert not any(each.merged for each in attachment.report.layers)
    weights = {name: each for name, each in model.state_dict().items() if "lokr" not in name}
    assert all(torch.equal(each, bits[name]) for name, each in weights.items())


def test_state_dict_round_trip_and_its_refusals():
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    state = {name: each.clone() for name, each in attachment.state_dict().items()}
    assert set(state) == {name for name, _ in attachment.named_parameters()}
    assert "transformer_blocks.0.attn1.to_out.0.lokr_b" in state
    adapted = output(model, inputs)
    randomize(attachment, seed=7)
    untouched = {name: each.clone() for name, each in attachment.state_dict().items()}
    bad = dict(state) | {"nowhere.lokr_a": torch.zeros(1)}
    del bad["transformer_blocks.0.attn1.to_q.lokr_a"]
    bad["transformer_blocks.0.attn1.to_k.lokr_a"] = torch.zeros(3, 3)
    with pytest.raises(ValueError) as caught:
        attachment.load_state_dict(bad)
    assert str(caught.value) == (
        "load_state_dict: factors do not fit this attachment: 1 missing: transformer_blocks.0.attn1.to_q.lokr_a;"
        " 1 unknown: nowhere.lokr_a; 1 of another shape: transformer_blocks.0.attn1.to_k.lokr_a is (3, 3),"
        " expected (8, 4)"
    )
    assert all(torch.equal(each, untouched[name]) for name, each in attachment.state_dict().items())
    attachment.load_state_dict(state)
    assert torch.equal(output(model, inputs), adapted)


@pytest.mark.parametrize("grad", [True, False])
def test_swapping_factors_does_not_recompile(grad):
    torch._dynamo.reset()
    model, inputs = build("dit")
    attachment = attach(model, LoKr(4, 2))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for seed in range(3):
            randomize(attachment, seed)
            attachment.load_state_dict({name: 2 * each for name, each in attachment.state_dict().items()})
            attachment.scale = 0.3 + seed
            assert torch.allclose(output(compiled, inputs), output(model, inputs), atol=1e-5)
    assert counter.frame_count == 1


def test_deepcopy_of_an_adapted_model_is_its_own():
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    other = copy.deepcopy(model)
    randomize(attachment, seed=4)
    assert torch.equal(output(other, inputs), adapted)
    attachment.remove()
    assert torch.equal(output(other, inputs), adapted)
    with attach(other, LoRA(2)) as second:
        assert len(list(second.parameters())) == 16
    assert torch.equal(output(other, inputs), adapted)


def test_deepcopy_of_an_attachment_brings_its_model():
    """How a moving average of the weights gets a handle of its own."""
    model, inputs = build("sd15")
    before, start = snapshot(model), output(model, inputs).detach()
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    copied = copy.deepcopy(attachment)
    assert copied.model is not model
    randomize(attachment, seed=4)
    assert torch.equal(output(copied.model, inputs), adapted)
    copied.remove()
    assert torch.equal(output(copied.model, inputs), start)
    assert not any(isinstance(each, KronLinear) for each in copied.model.modules())
    assert all(each.requires_grad for each in copied.model.parameters())
    copied.model.fuse_qkv_projections()
    assert len(attachment.report.layers) == len(copied.modules)
    attachment.remove()
    assert snapshot(model) == before


def test_load_state_dict_refuses_while_merged():
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    state = {name: 2 * each for name, each in attachment.state_dict().items()}
    attachment.merge()
    merged = output(model, inputs)
    with pytest.raises(RuntimeError, match=r"load_state_dict: 8 layers are merged; unmerge\(\) first"):
        attachment.load_state_dict(state)
    attachment.unmerge()
    assert torch.allclose(output(model, inputs), merged, atol=1e-4)
    attachment.load_state_dict(state)
    assert not torch.allclose(output(model, inputs), merged, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda each: each.to(torch.int64), TypeError, "must be float32, .*got int64"),
        (lambda each: each.bool(), TypeError, "must be float32, .*got bool"),
        (lambda each: each.to(torch.complex64), TypeError, "must be float32, .*got complex64"),
        (lambda each: each.tolist(), TypeError, "must be a tensor; got list"),
        (lambda each: each * torch.nan, ValueError, "must be finite; got NaN or infinity"),
        (lambda each: each + torch.inf, ValueError, "must be finite; got NaN or infinity"),
    ],
)
def test_load_state_dict_takes_finite_floating_tensors_only(change, error, text):
    model, _ = build("dit")
    attachment = attach(model, KRONA)
    before = {name: each.clone() for name, each in attachment.state_dict().items()}
    name = "transformer_blocks.1.attn1.to_v.lokr_b"
    state = {each_name: each + 1 for each_name, each in before.items()}
    with pytest.raises(error, match=f"load_state_dict: {name} {text}"):
        attachment.load_state_dict(state | {name: change(state[name])})
    assert all(torch.equal(each, before[each_name]) for each_name, each in attachment.state_dict().items())


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (None, TypeError),
        ("1", TypeError),
        (torch.empty((), device="meta"), TypeError),
    ],
)
def test_scale_is_a_finite_number(value, error):
    model, _ = build("dit")
    attachment = attach(model, KRONA)
    with pytest.raises(error, match="Attachment: scale must be a finite number; got"):
        attachment.scale = value
    assert attachment.scale == 1.0


def test_scales_whose_product_is_not_finite_in_float32_are_refused_as_a_whole():
    model, inputs = build("dit")
    attachment = attach(model, KronA((4, 2), per_target={"to_v": {"scale": 1e30}}))
    with pytest.raises(ValueError, match=r"Attachment: scale must be a finite number of float32, from -3\.4"):
        attachment.scale = 1e39
    with pytest.raises(
        ValueError, match=r"adapter: scale times the spec's must be .* of float32.*; got 1e\+40"
    ):
        attachment.scale = 1e10
    assert attachment.scale == 1.0
    assert torch.isfinite(output(model, inputs)).all()
    with pytest.raises(ValueError, match=r"adapter: scale must be a finite number of float32"):
        attach(build("dit")[0], LoKr(4, 2, alpha=1e20, scale=1e30))


def test_a_scale_that_the_models_state_dict_brings_is_the_attachments():
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    attachment.scale = 0.25
    other, _ = build("dit")
    loaded = attach(other, KRONA)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, inputs), output(model, inputs))
    assert loaded.scale == loaded.adapter_file().scale == 0.25
    next(iter(loaded._trained.values())).set_strength(2.0)
    with pytest.raises(RuntimeError, match=r"Attachment: the scales of its layers are not one number"):
        loaded.adapter_file()


def test_clip_takes_the_default_targets_by_its_own_names():
    model, _ = build("clip")
    with attach(model, KRONA) as attachment:
        names = {name.rpartition(".")[2] for name in attachment.modules}
        assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}
    with attach(model, KronA((8, 4), targets=("fc1",))) as attachment:
        assert list(attachment.modules) == ["encoder.layers.0.mlp.fc1", "encoder.layers.1.mlp.fc1"]
    with pytest.raises(ValueError, match=r"ends in 'to_q'. Its linear layers end in: k_proj"):
        attach(model, KronA((8, 4), targets=("to_q", "to_add_out")))


def test_report():
    model, inputs = build("sdxl")
    attachment = attach(model, KronA((4, 8), targets=("to_q", "to_k")))
    model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").base.register_forward_hook(
        lambda *_: None
    )
    output(model, inputs)
    report = attachment.report
    assert report.parameters == sum(each.numel() for each in attachment.parameters())
    assert len(report.layers) == len(attachment.modules) == report.fused + 1
    (unfused,) = [each for each in report.layers if each.unfused]
    assert (unfused.name, unfused.unfused) == (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "the base has hooks",
    )
    assert (unfused.factors, unfused.order, unfused.parameters) == ("(4x8) x (8x4)", "a_first", 64)
    assert len(report.sharing) == len(report.layers) // 2
    text = str(report)
    assert text.startswith(
        f"UNet2DConditionModel: {len(report.layers)} layers adapted, {report.fused} fused, "
    )
    assert "attn1.to_q" in text
    assert "32 -> 32 as (4x8) x (8x4), a_first, 64 parameters, base + delta: the base has hooks" in text


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("sd15", {}),
        ("sd3", {"add_q_proj": 2, "add_k_proj": 2, "add_v_proj": 2, "to_add_out": 1}),
        ("flux", {"add_q_proj": 1, "add_k_proj": 1, "add_v_proj": 1, "to_add_out": 1}),
        (
            "flux2",
            {
                "add_q_proj": 1,
                "add_k_proj": 1,
                "add_v_proj": 1,
                "to_add_out": 1,
                "to_qkv_mlp_proj": 1,
                "to_out": 1,
            },
        ),
        ("clip", {}),
    ],
)
def test_the_report_lists_every_attention_projection_without_an_adapter(name, left):
    model, _ = build(name)
    default = KronA((8, 4))
    with attach(model, default, allow_partial=True) as attachment:
        report = attachment.report
        assert Counter(leaf(each) for each in report.unadapted) == left
        assert not set(report.unadapted) & set(attachment.modules)
        assert all(model.get_submodule(each).in_features for each in report.unadapted)
        line = "attention projections without an adapter, by the targets that name them: "
        named = ", ".join(f"{each} ({left[each]})" for each in dict.fromkeys(map(leaf, report.unadapted)))
        assert (f"{line}{named}" in str(report)) == bool(left)
    targets = (*default.targets, *left)
    if left:
        with attach(model, KronA((8, 4), targets=targets)) as attachment:
            assert attachment.report.unadapted == ()
    with attach(model, KronA((8, 4), targets=("attn2.to_k",) if name == "sd15" else targets)) as attachment:
        count = len(attachment.report.unadapted)
        assert count == (28 if name == "sd15" else 0)


def test_unknown_target_lists_what_exists():
    model, _ = build("sd15")
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        attach(model, KronA((8, 4), targets=("to_q", "to_qq")))
    text = str(caught.value)
    assert (
        "no linear layer of UNet2DConditionModel has a name that ends in 'to_qq'; did you mean to_q" in text
    )
    assert "to_k (8)" in text
    assert "to_out.0 (8)" in text
    with pytest.raises(ValueError, match=r"\(conv_in is Conv2d, not a linear layer\)"):
        attach(model, KronA((8, 4), targets=("conv_in",)))
    with pytest.raises(ValueError, match=r"no linear layer of Sequential .* there are none"):
        attach(nn.Sequential(nn.ReLU()), KronA())
    assert snapshot(model) == before


def test_factors_that_do_not_divide_list_the_layers():
    model, _ = build("sd15")
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        attach(model, KronA((64, 5)))
    text = str(caught.value)
    assert "N1 = 64 does not divide N = 32, whose divisors are 1, 2, 4, 8, 16, 32" in text
    assert "K1 = 5 does not divide K = 24, whose divisors are 1, 2, 3, 4, 6, 8, 12, 24" in text
    assert text.count("(N, K) of ") == 4
    assert "Likewise 17 more layers of this size" in text
    assert snapshot(model) == before


def test_per_target_that_matches_nothing():
    model, _ = build("dit")
    with pytest.raises(ValueError, match="per_target names to_z, which end none of the 8 targeted"):
        attach(model, KronA((8, 4), per_target={"to_z": {"scale": 2.0}}))


def test_per_target():
    model, _ = build("dit")
    with attach(
        model, KronA((8, 4), per_target={"to_out.0": LoRA(2), "0.attn1.to_q": {"factors": (2, 2)}})
    ) as made:
        state = made.state_dict()
    assert state["transformer_blocks.0.attn1.to_q.lokr_a"].shape == (2, 2)
    assert state["transformer_blocks.1.attn1.to_q.lokr_a"].shape == (8, 4)
    assert state["transformer_blocks.1.attn1.to_out.0.lokr_b"].shape == (32, 2)
    assert "transformer_blocks.1.attn1.to_out.0.lokr_a" not in state


def test_attention_blocks_without_a_match():
    model, _ = build("flux2")
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        attach(model, KRONA)
    text = str(caught.value)
    assert "matches 1 attention blocks of Flux2Transformer2DModel" in text
    assert "single_transformer_blocks.0.attn (has to_qkv_mlp_proj, to_out)" in text
    assert "allow_partial=True" in text
    assert snapshot(model) == before
    with attach(model, KRONA, allow_partial=True) as attachment:
        assert attachment.report.unmatched == {
            "single_transformer_blocks.0.attn": ["to_qkv_mlp_proj", "to_out"]
        }
        assert "no target matches attention block single_transformer_blocks.0.attn" in str(attachment.report)
    fused = KronA((8, 4), targets=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"))
    with attach(model, fused) as attachment:
        assert attachment.report.unmatched == {}
        assert len(attachment.modules) == 6


def test_blocks_left_out_on_purpose_are_no_mistake():
    model, _ = build("sd15")
    with attach(model, KronA((8, 4), targets=("attn2.to_k", "attn2.to_v"))) as attachment:
        assert attachment.report.unmatched == {}
        assert all("attn2" in name for name in attachment.modules)
    with attach(model, KronA((8, 4), targets=("ff.net.2",))) as attachment:
        assert attachment.report.unmatched == {}


def test_refuses_layers_whose_weight_is_read_past_them():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"past|pass over an adapter: 0 \(TransformerEncoderLayer\)"):
        attach(model, LoRA(2, targets=("linear1",)))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        attach(model, LoRA(2, targets=("out_proj",)))
    with attach(model, LoRA(2, targets=("1",))) as attachment:
        assert list(attachment.modules) == ["1"]


def test_refuses_them_from_a_file_too():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    tensors = {"attention.out_proj.lokr_a": torch.ones(2, 2), "attention.out_proj.lokr_b": torch.ones(4, 4)}
    spec = KronA((2, 2), targets=("out_proj",))
    file = AdapterFile(spec, {"attention.out_proj": (8, 8)}, 1.0, tensors)
    with pytest.raises(ValueError, match=r"pass over an adapter: attention \(MultiheadAttention\)"):
        attach(model, file)
    with pytest.raises(ValueError, match=r"pass over an adapter: the model itself \(MultiheadAttention\)"):
        attach(model["attention"], spec)


def test_a_layer_held_twice_is_adapted_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict(
        {"first": nn.Sequential(shared), "second": nn.Sequential(shared), "proj": nn.Linear(8, 8)}
    )
    before = snapshot(model)
    with attach(model, LoRA(2, targets=("first.0",))) as attachment:
        assert model["first"][0] is model["second"][0]
        assert isinstance(model["second"][0], KronLinear)
        assert len(list(attachment.parameters())) == 2
    assert snapshot(model) == before


def test_refuses_a_model_that_is_already_wrapped(tmp_path):
    import torch.distributed as dist

    model, _ = build("dit")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="already wrapped by DistributedDataParallel"):
            attach(DistributedDataParallel(model), KRONA)
    finally:
        dist.destroy_process_group()


def test_refuses_what_is_no_model_or_spec():
    model, _ = build("dit")
    with pytest.raises(
        TypeError, match="spec must be KronA, LoKr, LoRA, Bottleneck or a loaded adapter file; got str"
    ):
        attach(model, "krona")
    with pytest.raises(TypeError, match=r"unet or transformer; got str"):
        attach("unet", KRONA)


def test_refuses_layers_adapted_through_another_root():
    model, _ = build("sd15")
    with (
        attach(model.mid_block, KRONA),
        pytest.raises(ValueError, match="not attached to this UNet2DConditionModel"),
    ):
        attach(model, KRONA)


def test_compiled_model_is_adapted_underneath():
    torch._dynamo.reset()
    model, inputs = build("dit")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with attach(compiled, KRONA) as attachment:
        assert all(name.startswith("transformer_blocks.") for name in attachment.modules)
        randomize(attachment)
        assert torch.allclose(output(compiled, inputs), output(model, inputs), atol=1e-5)


def test_remove_refuses_where_a_layer_was_replaced():
    model, _ = build("dit")
    attachment = attach(model, KRONA)
    block = model.transformer_blocks[0].attn1
    layer, block.to_q = block.to_q, nn.Linear(32, 32)
    with pytest.raises(
        RuntimeError, match=r"transformer_blocks.0.attn1.to_q: the adapted layer has been replaced"
    ):
        attachment.remove()
    block.to_q = layer
    attachment.remove()
    assert isinstance(block.to_q, nn.Linear)


@pytest.mark.parametrize("how", ["taken out", "compiled"])
def test_remove_where_the_model_has_changed_around_the_adapters(how):
    """A module that is gone, and one that has another name by now: the rest is given back all the same."""
    model, _ = build("sd15")
    attachment = attach(model, KRONA)
    if how == "taken out":
        model.conv_norm_out = None
        model.mid_block.attentions[0].norm = nn.GroupNorm(8, 64)
    else:
        model.mid_block = torch.compile(model.mid_block, backend="eager")
    attachment.remove()
    attachment.remove()
    assert not any(isinstance(each, KronLinear) for each in model.modules())
    assert all(each.requires_grad for each in model.parameters())
    assert not any("kronafuse" in key for key in model.__dict__)
    assert "removed" in repr(attachment)


def test_remove_that_failed_can_be_repeated(monkeypatch):
    model, inputs = build("dit")
    start = output(model, inputs)
    attachment, second = attach(model, KRONA), attach(model, LoRA(2))
    randomize(attachment)
    adapted = output(model, inputs)
    attachment.merge()
    layer = model.transformer_blocks[1].attn1.to_v
    monkeypatch.setattr(layer, "unmerge", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        attachment.remove()
    monkeypatch.undo()
    assert torch.allclose(output(model, inputs), adapted, atol=1e-4)
    attachment.remove()
    assert torch.allclose(output(model, inputs), start, atol=1e-5)
    assert len(second.report.layers) == 8
    second.remove()
    assert all(each.requires_grad for each in model.parameters())
    assert not any(isinstance(each, KronLinear) for each in model.modules())


def test_a_failure_while_attaching_leaves_the_model_alone(monkeypatch):
    model, _ = build("dit")
    before = snapshot(model)
    real, made = KronLinear.add, []

    def failing(self, layout):
        made.append(layout)
        if len(made) == 5:
            raise MemoryError("no memory for the fifth layer")
        return real(self, layout)

    monkeypatch.setattr(KronLinear, "add", failing)
    with pytest.raises(MemoryError):
        attach(model, KRONA)
    assert snapshot(model) == before


def test_meta_models_take_adapters():
    with torch.device("meta"):
        model = MODELS["dit"]()[0]
    attachment = attach(model, KRONA)
    assert all(each.is_meta for each in attachment.parameters())


def test_offloaded_after_attach():
    """accelerate keeps every weight and factor on meta between calls."""
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    with torch.no_grad():
        adapted = output(model, inputs)
        cpu_offload(model, torch.device("cpu"))
        assert all(each.is_meta for each in attachment.parameters())
        assert torch.allclose(output(model, inputs), adapted, atol=1e-5)
    assert attachment.report.layers[0].unfused == "the base's forward is replaced"


def test_gradient_checkpointing():
    model, inputs = build("sd15")
    attachment = attach(model, KRONA)
    randomize(attachment)
    output(model, inputs).square().sum().backward()
    reference = [each.grad.clone() for each in attachment.parameters()]
    model.zero_grad()
    model.train().enable_gradient_checkpointing()
    output(model, inputs).square().sum().backward()
    for each, other in zip(attachment.parameters(), reference, strict=True):
        assert torch.allclose(each.grad, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["sd15", "clip"])
def test_a_reference_pass_between_a_forward_and_its_backward(name, checkpointed):
    """Preference training: the model without the adapters, in the same loss; another adapter is set meanwhile."""
    model, inputs = build(name)
    attachments = [attach(model, KRONA), attach(model, LoRA(2))]
    for seed, each in enumerate(attachments):
        randomize(each, seed)

    def gradients(reference: torch.Tensor | None) -> list[torch.Tensor]:
        model.zero_grad()
        y = output(model, inputs)
        if reference is None:
            for each in attachments:
                each.scale = 0.0
            with torch.no_grad():
                reference = output(model, inputs)
            attachments[0].scale = 1.0
            attachments[1].scale = -0.5
        (y - reference).square().mean().backward()
        for each in attachments:
            each.scale = 1.0
        return [each.grad.clone() for attachment in attachments for each in attachment.parameters()]

    with torch.no_grad():
        for each in attachments:
            each.scale = 0.0
        reference = output(model, inputs)
        for each in attachments:
            each.scale = 1.0
    expected = gradients(reference)
    if checkpointed:
        start = "activation_checkpointing_enable" if name == "clip" else "enable_gradient_checkpointing"
        getattr(model.train(), start)()
    for each, other in zip(gradients(None), expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "clip", "flux"])
def test_fp32_factors_on_a_bf16_model(name):
    """The usual way to train; diffusers and transformers still call the model bf16."""
    model, inputs = build(name)
    model.to(torch.bfloat16)
    inputs = {
        key: value.to(torch.bfloat16)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "ids" not in key
        else value
        for key, value in inputs.items()
    }
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    assert model.dtype == adapted.dtype == torch.bfloat16
    assert attachment.report.fused == len(attachment.modules)
    adapted.float().square().mean().backward()
    assert {each.grad.dtype for each in attachment.parameters()} == {torch.float32}
    assert all(each.grad.abs().max() > 0 for each in attachment.parameters())
    attachment.merge()
    error = (output(model, inputs) - adapted).abs().mean() / adapted.abs().mean()
    assert error < 0.05
    attachment.remove()
    assert (output(model, inputs) - adapted).abs().mean() / adapted.abs().mean() > 2 * error


def test_attach_needs_no_optional_library():
    script = (
        "import sys, torch, kronafuse\n"
        "assert 'kronafuse.nn' not in sys.modules\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "with kronafuse.attach(model, kronafuse.LoRA(2, targets=('0',))): model(torch.zeros(1, 8))\n"
        "assert not {'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_layerwise_casting_leaves_the_factors_in_their_dtype():
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    layer = model.transformer_blocks[0].attn1.to_q
    assert layer.weight.dtype == torch.float16
    assert layer.adapters["0"].lokr_a.dtype == torch.float32
    assert torch.allclose(output(model, inputs), adapted, atol=0.05)
    assert layer.unfused == "the base's forward is replaced"
    assert attachment.report.fused == 0
