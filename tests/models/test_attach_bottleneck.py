"""attach with a Bottleneck: what it adds, trains, saves and takes off again, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kronafuse import Bottleneck, KronA, attach, formats
from kronafuse.models.taps import BlockAdapters
from kronafuse.nn.positions import PAIRS
from small_models import build, output, randomize
from test_attach import snapshot
from torch import nn
from torch._dynamo.testing import CompileCounter

pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel

MODELS = ("sd15", "sdxl", "dit", "pixart")
UNETS = ("sd15", "sdxl")
BEST = Bottleneck(width=8)
CARRIED = {"dit": ("ff_in", "ff_in"), "pixart": ("attn2_in", "attn2_in")}
"""Pairs whose sum stands behind a gate, so that it is carried past it."""


def pairs_of(name: str) -> list[tuple[str, str]]:
    """The pairs that a model has."""
    own = [pair for pair in PAIRS if name in UNETS or not pair[0].startswith("res")]
    return [pair for pair in own if name != "dit" or not any(each.startswith("attn2") for each in pair)]


CASES = [(name, pair) for name in MODELS for pair in pairs_of(name)]


@pytest.mark.parametrize(
    ("name", "pair"), CASES, ids=lambda each: each if isinstance(each, str) else "-".join(each)
)
def test_attach_train_and_remove(name, pair):
    """Step 0 is the base model's to the bit; every tensor gets a gradient; remove leaves nothing behind."""
    model, inputs = build(name)
    before, start = snapshot(model), output(model, inputs).detach()
    attachment = attach(model, Bottleneck(*pair, 8))
    assert torch.equal(output(model, inputs), start)

    randomize(attachment)
    adapted = output(model, inputs)
    assert (adapted - start).abs().max() > 1e-3
    adapted.square().sum().backward()
    assert all(each.grad.abs().max() > 0 for each in attachment.parameters())
    trained = {id(each) for each in attachment.parameters()}
    assert {id(each) for each in model.parameters() if each.requires_grad} == trained
    assert all(each.grad is None for each in model.parameters() if id(each) not in trained)

    attachment.scale = 0.0
    assert torch.equal(output(model, inputs), start)
    attachment.remove()
    assert torch.equal(output(model, inputs), start)
    assert snapshot(model) == before
    attachment.remove()


@pytest.mark.parametrize("name", MODELS)
def test_paper_start_changes_the_outputs_at_once(name):
    model, inputs = build(name)
    start = output(model, inputs)
    with attach(model, Bottleneck("ff_in", "block_out", 8, init="paper")):
        assert (output(model, inputs) - start).abs().max() > 1e-4


FORMS = {
    "compacter": Bottleneck("ff_in", "ff_in", 8, form="compacter", rank=2),
    "krona": Bottleneck("ff_in", "block_out", form="krona", factors=(4, 2)),
    "krona_res": Bottleneck("ff_in", "block_out", form="krona_res", factors=(4, 2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_kronecker_forms(name, form):
    model, inputs = build(name)
    before, start = snapshot(model), output(model, inputs).detach()
    attachment = attach(model, FORMS[form])
    assert torch.equal(output(model, inputs), start)
    randomize(attachment)
    adapted = output(model, inputs)
    assert (adapted - start).abs().max() > 1e-3
    adapted.square().sum().backward()
    assert all(each.grad.abs().max() > 0 for each in attachment.parameters())
    attachment.remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("form", ["krona", "krona_res"])
def test_krona_b_stands_beside_the_feed_forward(form):
    """FFN(X) + s X (A ⊗ B)ᵀ + s_res X, with X what the feed-forward reads; the dense twin has it written out."""
    model, inputs = build("sd15")
    dense = copy.deepcopy(model)
    attachment = attach(model, replace(FORMS[form], scale=0.5))
    randomize(attachment)
    for name, trained in attachment._trained.items():
        ff = dense.get_submodule(name).ff
        tensors = dict(trained.named_parameters())

        def beside(x, forward=ff.forward, tensors=tensors):
            added = 0.5 * x @ torch.kron(tensors["a"], tensors["b"]).t()
            return forward(x) + added + tensors.get("residual_scale", 0) * x

        ff.forward = beside
    assert torch.allclose(output(model, inputs), output(dense, inputs), atol=1e-5)


def test_merge_is_refused_and_changes_nothing():
    model, inputs = build("sd15")
    attachment = attach(model, BEST)
    randomize(attachment)
    before = output(model, inputs)
    for keep in (True, False):
        with pytest.raises(RuntimeError, match="merge: a Bottleneck is not the change of any weight"):
            attachment.merge(keep)
    with pytest.raises(RuntimeError, match="unmerge: a Bottleneck is never merged"):
        attachment.unmerge()
    assert torch.equal(output(model, inputs), before)
    attachment.remove()
    with pytest.raises(RuntimeError, match="removed from its model"):
        attachment.merge()


@pytest.mark.parametrize("name", MODELS)
def test_two_in_one_block_add_up(name):
    """Two adapters at one place equal one of both widths; taking off the first leaves the second."""
    model, inputs = build(name)
    pair = CARRIED.get(name, ("attn1_out", "ff_in"))
    start = output(model, inputs).detach()
    first, second = (attach(model, Bottleneck(*pair, width)) for width in (4, 6))
    randomize(first, 1)
    randomize(second, 2)
    both = output(model, inputs)
    second_alone = {key: value.clone() for key, value in second.state_dict().items()}
    first_alone = first.state_dict()
    second.remove()
    assert (output(model, inputs) - both).abs().max() > 1e-3
    first.remove()
    assert torch.equal(output(model, inputs), start)

    joined = attach(model, Bottleneck(*pair, 10))
    state = joined.state_dict()
    for key, value in state.items():
        one, two = first_alone[key], second_alone[key]
        if key.endswith("up_bias"):
            value.copy_(one + two)
        else:
            value.copy_(torch.cat((one, two), 1 if key.endswith(".up") else 0))
    assert torch.allclose(output(model, inputs), both, atol=1e-5)


def test_beside_krona_in_any_order_of_removal():
    model, inputs = build("sd15")
    before, start = snapshot(model), output(model, inputs).detach()
    for first_off in (0, 1):
        attachments = [attach(model, KronA((8, 4))), attach(model, BEST)]
        for each in attachments:
            randomize(each)
        both = output(model, inputs)
        attachments.pop(first_off).remove()
        one = output(model, inputs)
        assert (one - both).abs().max() > 1e-3
        assert (one - start).abs().max() > 1e-3
        attachments.pop().remove()
        assert torch.equal(output(model, inputs), start)
        assert snapshot(model) == before


def test_fusing_projections_stays_allowed_without_linear_adapters():
    model, inputs = build("sd15")
    with attach(model, BEST) as attachment:
        randomize(attachment)
        before = output(model, inputs)
        model.fuse_qkv_projections()
        assert torch.allclose(output(model, inputs), before, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_save_load_and_attach(name, tmp_path):
    model, inputs = build(name)
    spec = Bottleneck("ff_in", "ff_in", None, budget=3.0, activation="silu", scale=0.5)
    attachment = attach(model, spec)
    assert attachment.spec == replace(spec, width=attachment.spec.width, budget=None)
    assert attachment.spec.width % 4 == 0
    randomize(attachment)
    attachment.scale = 0.7
    adapted = output(model, inputs)
    formats.save(tmp_path / "adapter.safetensors", attachment)
    attachment.remove()
    loaded = formats.load(tmp_path / "adapter.safetensors")
    with attach(model, loaded) as again:
        assert torch.equal(output(model, inputs), adapted)
        assert again.spec == attachment.spec
        assert again.scale == 0.7


def test_file_of_another_model(tmp_path):
    model, _ = build("sd15")
    other, _ = build("sdxl")
    with attach(other, BEST) as attachment:
        formats.save(tmp_path / "adapter.safetensors", attachment)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"the file is for another model than this UNet2DCond.*blocks are missing"
    ):
        attach(model, formats.load(tmp_path / "adapter.safetensors"))
    assert snapshot(model) == before


def test_file_of_some_blocks():
    """A file may leave blocks out; they stay without an adapter, and the report says so."""
    model, inputs = build("sd15")
    start = output(model, inputs)
    with attach(model, BEST) as attachment:
        randomize(attachment)
        whole = attachment.adapter_file()
    first = next(iter(whole.modules))
    tensors = {key: value for key, value in whole.tensors.items() if key.startswith(f"{first}.")}
    part = replace(whole, modules={first: whole.modules[first]}, tensors=tensors)
    with attach(model, part) as attachment:
        assert list(attachment.modules) == [first]
        assert str(attachment.report).count("without an adapter: ") == 3
        assert "transformer_blocks.0, not in the file" in str(attachment.report)
        assert (output(model, inputs) - start).abs().max() > 1e-4


def test_load_state_dict_refuses_whole():
    model, _ = build("sd15")
    attachment = attach(model, BEST)
    state = {key: value.clone() for key, value in attachment.state_dict().items()}
    name = next(key for key in state if key.endswith(".up"))
    for change, text in (
        ({name: state[name][:, :-1]}, rf"1 of another shape: {name} is \(32, 7\), expected \(32, 8\)"),
        ({name: state[name] * torch.nan}, "must be finite"),
        ({"else.up": state[name]}, "1 unknown: else.up"),
    ):
        before = {key: value.clone() for key, value in attachment.state_dict().items()}
        with pytest.raises(ValueError, match=text):
            attachment.load_state_dict({**state, **change})
        assert all(torch.equal(before[key], value) for key, value in attachment.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_copies(name):
    model, inputs = build(name)
    start = output(model, inputs)
    attachment = attach(model, Bottleneck(*CARRIED.get(name, ("attn1_in", "attn2_in")), 8))
    randomize(attachment)
    adapted = output(model, inputs)
    twin = copy.deepcopy(attachment)
    assert torch.equal(output(twin.model, inputs), adapted)
    next(twin.parameters()).data.add_(1.0)
    assert torch.equal(output(model, inputs), adapted)
    twin.remove()
    assert torch.equal(output(twin.model, inputs), start)
    assert torch.equal(output(model, inputs), adapted)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), inputs), adapted)


def test_copy_after_a_forward_pass_that_ended_in_an_error():
    model, inputs = build("sd15")
    attachment = attach(model, Bottleneck("attn1_in", "block_out", 8))
    randomize(attachment)
    adapted = output(model, inputs)
    ff = next(module for name, module in model.named_modules() if name.endswith("ff"))
    handle = ff.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match="stop"):
        output(model, inputs)
    handle.remove()
    assert torch.equal(output(copy.deepcopy(attachment).model, inputs), adapted)
    assert torch.equal(output(model, inputs), adapted)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name):
    model, inputs = build(name)
    attachment = attach(model, Bottleneck(*CARRIED.get(name, ("attn1_out", "block_out")), 8))
    randomize(attachment)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        y = output(model, inputs)
        gradients.append([y.detach(), *torch.autograd.grad(y.square().mean(), list(attachment.parameters()))])
        # The second pass ends early; what it has read must not outlive it.
        assert not any(each._by_thread for each in model.modules() if isinstance(each, BlockAdapters))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", MODELS)
def test_compile_fullgraph(name):
    model, inputs = build(name)
    attachment = attach(model, Bottleneck(*CARRIED.get(name, ("attn2_out", "ff_in")), 8))
    randomize(attachment)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for strength in (1.0, 0.5):
        attachment.scale = strength
        torch.testing.assert_close(output(compiled, inputs), output(model, inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_bfloat16_model(name):
    """fp32 adapters on a 16-bit model, as they are trained, and under autocast on an fp32 one."""
    model, inputs = build(name)
    model.bfloat16()
    lower = {
        key: each.bfloat16() if isinstance(each, torch.Tensor) and each.dtype == torch.float32 else each
        for key, each in inputs.items()
    }
    attachment = attach(model, Bottleneck(*CARRIED.get(name, ("attn2_out", "ff_in")), 8))
    assert all(each.dtype == torch.float32 for each in attachment.parameters())
    randomize(attachment)
    y = output(model, lower)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(
        each.grad.dtype == torch.float32 and each.grad.abs().max() > 0 for each in attachment.parameters()
    )


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    model, inputs = build(name)
    attachment = attach(model, Bottleneck(*CARRIED.get(name, ("attn1_in", "block_out")), 8))
    randomize(attachment)
    expected = output(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = output(model, inputs)
    assert (y - expected).norm() < 0.1 * expected.norm()
    y.square().mean().backward()
    assert all(each.grad is not None for each in attachment.parameters())


def test_layerwise_casting_leaves_the_adapters_alone():
    model, inputs = build("sd15")
    attachment = attach(model, Bottleneck("res_in", "res_out", 4))
    randomize(attachment)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert output(model, inputs).isfinite().all()
    assert all(each.dtype == torch.float32 for each in attachment.parameters())
    assert any(each.dtype == torch.float8_e4m3fn for each in model.parameters())


def test_meta_model_and_report():
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=2,
        )  # fmt: skip
    attachment = attach(model, Bottleneck(width=12))
    assert all(each.is_meta for each in attachment.parameters())
    # 3 blocks 32 wide (down, two up) and one of 64 in the middle
    count = 3 * (2 * 32 * 12 + 12 + 32) + (2 * 64 * 12 + 12 + 64)
    assert attachment.report.parameters == count
    text = str(attachment.report)
    assert f"4 blocks adapted, attn2_out -> ff_in, width 12, {count:,} parameters" in text
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in text
    assert "32 -> 12 relu -> 32, 812 parameters" in text
    assert f"4 blocks, {count:,} parameters" in repr(attachment)


def test_rejects_positions_that_the_model_does_not_have():
    cases = (
        ("dit", BEST, r"no block of DiT.* position 'attn2_out', being without cross-attention; positions of its 2"
         r" blocks: attn1_in, attn1_out, ff_in, ff_out, block_out$"),
        ("dit", Bottleneck("res_in", "res_in"), r"diffusers' ResnetBlock2D, and DiTTransformer2DModel has none; its"
         r" blocks: BasicTransformerBlock \(2\)"),
        ("flux", BEST, r"diffusers' BasicTransformerBlock, and FluxTransformer2DModel has none; its blocks:"
         r" FluxTransformerBlock \(1\), FluxSingleTransformerBlock \(1\)"),
        ("clip", BEST, r"diffusers' BasicTransformerBlock, and CLIPTextModel has none"),
    )  # fmt: skip
    for name, spec, text in cases:
        model, inputs = build(name)
        before, start = snapshot(model), output(model, inputs)
        with pytest.raises(ValueError, match=f"^attach: .*{text}"):
            attach(model, spec)
        assert snapshot(model) == before
        assert torch.equal(output(model, inputs), start)


def test_rejects_a_budget_and_terms():
    model, _ = build("sd15")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"no width meets a budget of 0\.01 % of [\d,]+ parameters, which is \d+:"
    ):
        attach(model, Bottleneck(width=None, budget=0.01))
    with pytest.raises(
        ValueError, match=r"terms must divide the sizes \(N, K\) of down_blocks\.0.*: 5 does not"
    ):
        attach(model, Bottleneck(width=10, form="compacter", terms=5))
    assert snapshot(model) == before


def test_budget_does_not_count_adapters_already_there():
    model, _ = build("sd15")
    spec = Bottleneck(width=None, budget=2.0)
    with attach(model, spec) as alone:
        width = alone.spec.width
    with attach(model, Bottleneck(width=256)), attach(model, spec) as second:
        assert second.spec.width == width


def test_blocks_without_the_position_are_named():
    model, inputs = build("sd15")
    block = next(each for each in model.modules() if type(each).__name__ == "BasicTransformerBlock")
    block.attn2 = block.norm2 = None
    with pytest.raises(
        ValueError, match=r"1 blocks of UNet.* would have no adapter: down_blocks\.0.* no position"
    ):
        attach(model, BEST)
    with attach(model, BEST, allow_partial=True) as attachment:
        assert len(attachment.modules) == 3
        assert "without an adapter: down_blocks.0" in str(attachment.report)
        randomize(attachment)
        assert output(model, inputs).isfinite().all()


def test_gligen_and_chunks():
    model, inputs = build("sd15")
    blocks = [each for each in model.modules() if type(each).__name__ == "BasicTransformerBlock"]
    for each in blocks:
        each.set_chunk_feed_forward(4, dim=1)
    with (
        attach(model, Bottleneck("ff_out", "block_out", 4)),
        pytest.raises(RuntimeError, match="chunk by chunk"),
    ):
        output(model, inputs)
    start = output(model, inputs)
    with attach(model, FORMS["krona"]) as attachment:
        randomize(attachment)
        chunked = output(model, inputs)
        assert (chunked - start).abs().max() > 1e-3
        for each in blocks:
            each.set_chunk_feed_forward(None)
        assert torch.allclose(output(model, inputs), chunked, atol=1e-5)
    blocks[0].fuser = nn.Identity()
    with pytest.raises(ValueError, match="its GLIGEN layer changes the stream between the positions"):
        attach(model, BEST)


def test_text_context_must_be_a_tensor():
    model, _ = build("sd15")
    with attach(model, Bottleneck("attn2_context", "attn2_context", 4)):
        block = next(each for each in model.modules() if type(each).__name__ == "BasicTransformerBlock")
        with pytest.raises(ValueError, match=r"'attn2_context' reads the text .*; got NoneType"):
            block(torch.randn(1, 4, 32))


def test_no_adapter_modules_are_left():
    model, _ = build("sdxl")
    with attach(model, BEST):
        assert any(isinstance(each, BlockAdapters) for each in model.modules())
    assert not any(isinstance(each, BlockAdapters) for each in model.modules())


def test_only_the_hooks_that_a_pair_needs():
    """One sum at cross-attention's branch needs one hook there, and one that lets go of what was read."""
    model, _ = build("sd15")
    block = next(each for each in model.modules() if type(each).__name__ == "BasicTransformerBlock")

    def hooks() -> int:
        return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in block.modules())

    for spec, count in ((BEST, 2), (Bottleneck("block_out", "block_out", 4), 2), (FORMS["krona"], 3)):
        with attach(model, spec):
            assert hooks() == count
        assert hooks() == 0


@pytest.mark.parametrize(
    "pair", [("attn1_in", "block_out"), ("attn2_in", "ff_in"), ("res_in", "res_out")], ids="-".join
)
def test_threads_do_not_see_each_other(pair):
    """One model serving several threads, each with inputs of its own, gives what it gives alone."""
    model, inputs = build("sd15")
    randomize(attach(model, Bottleneck(*pair, 8)))
    many = [{**inputs, "sample": inputs["sample"] + shift} for shift in range(4)]
    with torch.no_grad():
        alone = [output(model, each) for each in many]

    def serve(index):
        with torch.no_grad():
            return all(torch.equal(output(model, many[index]), alone[index]) for _ in range(25))

    with ThreadPoolExecutor(len(many)) as pool:
        assert list(pool.map(serve, range(len(many)))) == [True] * len(many)
    assert not any(each._by_thread for each in model.modules() if isinstance(each, BlockAdapters))


def test_two_with_different_places_in_one_block():
    """One that adds at its own source reads without the other there; one that adds later reads with it."""
    model, inputs = build("sd15")
    first = attach(model, Bottleneck("attn1_in", "attn2_in", 4))
    randomize(first, 1)
    reads = {}
    for sink in ("attn2_in", "ff_in"):
        second = attach(model, Bottleneck("attn2_in", sink, 6))
        name, adapter = next(iter(second._trained.items()))
        seen = []
        handle = adapter.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        for strength in (1.0, 0.0):
            first.scale = strength
            output(model, inputs)
        handle.remove()
        second.remove()
        reads[sink] = (seen[0] - seen[1]).abs().max()
        assert name.startswith("down_blocks.0")
    assert reads["attn2_in"] < 1e-5
    assert reads["ff_in"] > 1e-2
