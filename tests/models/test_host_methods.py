"""Methods of an adapted model that read its module tree: saving, PEFT's, and what is left behind by them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from kronafuse import Bottleneck, KronA, LoRA, attach, formats
from kronafuse.models.instance_methods import InstanceMethod
from kronafuse.nn import KronLinear
from small_models import build, output, randomize
from test_attach import snapshot
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPTextModel

KRONA = KronA((8, 4))
BOTTLENECK = Bottleneck("ff_in", "ff_in", 8)
LORA_FILE = "pytorch_lora_weights.safetensors"
NAME = "kronafuse_adapter.safetensors"
KINDS = {"sd15": UNet2DConditionModel, "clip": CLIPTextModel}
WROTE = "wrote the model without its kronafuse adapters"


def instance_methods(model: nn.Module) -> list[str]:
    return [
        name
        for module in model.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, InstanceMethod) or "kronafuse" in name
    ]


def save(model, folder, **kwargs):
    with pytest.warns(UserWarning, match=WROTE):
        model.save_pretrained(folder, **kwargs)


def assert_reloads(name, folder, inputs, start, adapted, **kwargs):
    """The folder is the base model's to the bit, and with the file beside it the adapted one's."""
    loaded, info = KINDS[name].from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded.eval()
    assert torch.equal(output(loaded, inputs), start)
    attach(loaded, formats.load(folder / NAME))
    assert torch.equal(output(loaded, inputs), adapted)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("sd15", KRONA), ("sd15", BOTTLENECK), ("clip", LoRA(2))],
    ids=["unet", "unet-bottleneck", "clip"],
)
def test_a_saved_model_reloads_as_the_base_and_with_its_adapter(name, spec, tmp_path):
    model, inputs = build(name)
    before, start = snapshot(model), output(model, inputs).detach()
    attachment = attach(model, spec)
    randomize(attachment)
    attachment.scale = 0.5
    adapted = output(model, inputs)
    folder = tmp_path / "whole"
    with pytest.warns(UserWarning, match=f"{WROTE}; its adapters are in {NAME}. Adapters that are"):
        model.save_pretrained(folder)
    assert torch.equal(output(model, inputs), adapted)
    assert_reloads(name, folder, inputs, start, adapted)
    save(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*model*.safetensors"))) > 1
    assert_reloads(name, tmp_path / "shards", inputs, start, adapted)
    save(model, tmp_path / "variant", variant="fp16")
    assert_reloads(name, tmp_path / "variant", inputs, start, adapted, variant="fp16")
    save(model, folder)
    attachment.remove()
    assert snapshot(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / NAME).exists()


def test_pickled_weights_are_the_bases_too(tmp_path):
    model, inputs = build("sd15")
    start = output(model, inputs)
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    save(model, tmp_path, safe_serialization=False)
    assert_reloads("sd15", tmp_path, inputs, start, adapted, use_safetensors=False)


def test_a_state_dict_given_to_save_pretrained_is_written_under_the_models_own_names(tmp_path):
    model, inputs = build("clip")
    start = output(model, inputs)
    attachment = attach(model, KRONA)
    randomize(attachment)
    adapted = output(model, inputs)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    assert "encoder.layers.0.self_attn.q_proj.base.weight" in state
    save(model, tmp_path, state_dict=state)
    assert_reloads("clip", tmp_path, inputs, start, adapted)


def test_merged_adapters_are_written_as_weights(tmp_path):
    model, inputs = build("sd15")
    first, second = attach(model, KRONA), attach(model, LoRA(2))
    randomize(first)
    randomize(second)
    first.merge()
    adapted = output(model, inputs)
    save(model, tmp_path)
    second.merge()
    merged = output(model, inputs)
    with pytest.raises(
        RuntimeError, match=rf"{tmp_path} has {NAME} of an earlier call, .* 0 adapters are to be written"
    ):
        model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    attach(loaded, formats.load(tmp_path / NAME))
    assert torch.allclose(output(loaded, inputs), adapted, atol=1e-5)
    save(model, tmp_path / "merged")
    assert not (tmp_path / "merged" / NAME).exists()
    assert torch.equal(
        output(UNet2DConditionModel.from_pretrained(tmp_path / "merged").eval(), inputs), merged
    )


def test_stacked_adapters_are_written_one_by_one(tmp_path):
    model, inputs = build("sd15")
    for index, spec in enumerate((KRONA, LoRA(2, targets=("to_q",)), BOTTLENECK)):
        randomize(attach(model, spec), seed=index)
    adapted = output(model, inputs)
    save(model, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    for suffix in ("", "_2", "_3"):
        attach(loaded, formats.load(tmp_path / f"kronafuse_adapter{suffix}.safetensors"))
    assert torch.equal(output(loaded, inputs), adapted)


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=build("clip")[0],
        tokenizer=None,
        unet=build("sd15")[0],
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_saved_pipeline_reloads(tmp_path, compiled):
    pipe = pipeline()
    results = {}
    for name, kind in (("unet", "sd15"), ("text_encoder", "clip")):
        model, inputs = getattr(pipe, name), build(kind)[1]
        start = output(model, inputs)
        randomize(attach(model, KRONA))
        results[name] = kind, inputs, start, output(model, inputs)
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.warns(UserWarning, match=WROTE):
        pipe.save_pretrained(tmp_path, safe_serialization=True)
    for name, (kind, inputs, start, adapted) in results.items():
        assert_reloads(kind, tmp_path / name, inputs, start, adapted)
    nothing = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path, **nothing)
    assert torch.equal(output(reloaded.unet.eval(), results["unet"][1]), results["unet"][2])


@pytest.mark.parametrize("name", ["sd15", "clip"])
def test_pushing_to_the_hub_uploads_the_base_and_the_adapter(name, monkeypatch, tmp_path):
    model, inputs = build(name)
    start = output(model, inputs)
    randomize(attach(model, KRONA))
    adapted = output(model, inputs)
    with pytest.raises(RuntimeError, match=r"save_pretrained: push_to_hub=True would upload before"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(type(model), "_upload_folder", None, raising=False)
    if name == "sd15":
        from diffusers.utils import hub_utils

        monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: FakeRepo(repo_id))
        monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: FakeCard())
        monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
        seen = "_upload_folder"
    else:
        monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: FakeRepo(repo_id))
        seen = "_upload_modified_files"
        from transformers.utils import hub

        monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: FakeCard())

    def check(self, folder, *_args, **_kwargs):
        from pathlib import Path

        assert_reloads(name, Path(folder), inputs, start, adapted)

    monkeypatch.setattr(type(model), seen, check)
    with pytest.warns(UserWarning, match=WROTE):
        model.push_to_hub("someone/something")


class FakeRepo:
    def __init__(self, repo_id):
        self.repo_id = repo_id


class FakeCard:
    def save(self, path):
        pass


LORA = {
    "sd15": lambda: LoraConfig(r=2, target_modules=["to_q", "to_v"]),
    "clip": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
}


def fill(model: nn.Module) -> None:
    """PEFT's factors, so that its deltas show."""
    generator = torch.Generator().manual_seed(3)
    for name, each in model.named_parameters():
        if "lora_" in name and "lokr" not in name:
            each.data.copy_(0.2 * torch.randn(each.shape, generator=generator))


def add_peft(model: nn.Module, name: str) -> None:
    model.add_adapter(LORA[name](), "theirs")
    fill(model)


def unload(model: nn.Module) -> None:
    """As its pipeline does it."""
    pipe = pipeline()
    setattr(pipe, "unet" if isinstance(model, UNet2DConditionModel) else "text_encoder", model)
    pipe.unload_lora_weights()


def trained_of(model: nn.Module) -> set[str]:
    return {name for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("name", ["sd15", "clip"])
@pytest.mark.parametrize("first", ["peft", "attach"])
@pytest.mark.parametrize("out", ["unload", "delete", "remove"])
def test_peft_and_attach_in_both_orders(name, first, out):
    model, inputs = build(name)
    start = output(model, inputs).detach()
    plain, _ = build(name)
    add_peft(plain, name)
    theirs = output(plain, inputs).detach()
    alone, _ = build(name)
    ours_alone = attach(alone, KRONA)
    randomize(ours_alone)
    ours = output(alone, inputs).detach()

    if first == "peft":
        add_peft(model, name)
        attachment = attach(model, KRONA)
    else:
        attachment = attach(model, KRONA)
        add_peft(model, name)
    randomize(attachment)
    assert all(each.requires_grad for each in attachment.parameters())
    both = output(model, inputs)
    assert not torch.allclose(both, ours, atol=1e-3)
    assert not torch.allclose(both, theirs, atol=1e-3)
    assert len(attachment.report.layers) == len(ours_alone.report.layers)
    assert not any("lora_" in each or "base_layer" in each for each in attachment.report.unadapted)
    assert any("not nn.Linear" in (each.unfused or "") for each in attachment.report.layers)

    if out == "unload":
        unload(model)
        assert not any(isinstance(each, BaseTunerLayer) for each in model.modules())
        assert torch.allclose(output(model, inputs), ours, atol=1e-5)
        assert attachment.report.fused == len(attachment.modules)
        attachment.remove()
        assert torch.equal(output(model, inputs), start)
    elif out == "delete":
        (model.delete_adapters if name == "sd15" else model.delete_adapter)("theirs")
        assert torch.allclose(output(model, inputs), ours, atol=1e-5)
        attachment.remove()
        assert torch.equal(output(model, inputs), start)
    else:
        attachment.remove()
        assert torch.equal(output(model, inputs), theirs)
        assert trained_of(model) == trained_of(plain)
        assert [key for key, _ in model.named_modules()] == [key for key, _ in plain.named_modules()]
        unload(model)
        assert torch.equal(output(model, inputs), start)
    assert not any(isinstance(each, KronLinear) for each in model.modules())
    assert instance_methods(model) == []


@pytest.mark.parametrize("spec", [KRONA, BOTTLENECK], ids=["layers", "blocks"])
def test_peft_does_not_freeze_the_adapters(spec):
    model, _ = build("sd15")
    attachment = attach(model, spec)
    add_peft(model, "sd15")
    assert all(each.requires_grad for each in attachment.parameters())
    theirs = {id(each) for each_name, each in model.named_parameters() if ".theirs." in each_name}
    ours = {id(each) for each in attachment.parameters()}
    assert {id(each) for each in model.parameters() if each.requires_grad} == ours | theirs


def test_peft_files_have_the_models_own_names(tmp_path):
    plain, inputs = build("sd15")
    add_peft(plain, "sd15")
    plain.save_lora_adapter(tmp_path / "plain", "theirs")
    model, _ = build("sd15")
    attachment = attach(model, KRONA)
    randomize(attachment)
    ours = output(model, inputs)
    model.load_lora_adapter(tmp_path / "plain", prefix=None, adapter_name="theirs", weight_name=LORA_FILE)
    both = output(model, inputs)
    assert not torch.allclose(both, ours, atol=1e-3)
    model.save_lora_adapter(tmp_path / "adapted", "theirs")
    files = [load_file(tmp_path / each / LORA_FILE) for each in ("plain", "adapted")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(each, files[1][key]) for key, each in files[0].items())
    attachment.remove()
    assert torch.allclose(output(model, inputs), output(plain, inputs), atol=1e-5)


@pytest.mark.parametrize("first", ["peft", "attach"])
def test_pefts_functions_that_would_name_its_layers_wrongly_are_refused(first):
    """Saving gave names that nothing loads, and loading found none of its names, both without an error."""
    model, inputs = build("sd15")
    if first == "peft":
        add_peft(model, "sd15")
    attachment = attach(model, KRONA)
    randomize(attachment)
    if first == "attach":
        add_peft(model, "sd15")
    both = output(model, inputs)
    refused = (
        r"et_peft_model_state_dict: 16 layers .*; use the model's save_lora_adapter and load_lora_adapter"
    )
    with pytest.raises(RuntimeError, match=refused):
        get_peft_model_state_dict(model, adapter_name="theirs")
    plain, _ = build("sd15")
    add_peft(plain, "sd15")
    theirs = get_peft_model_state_dict(plain, adapter_name="theirs")
    with pytest.raises(RuntimeError, match=refused):
        set_peft_model_state_dict(model, theirs, adapter_name="theirs")
    assert torch.equal(output(model, inputs), both)
    attachment.remove()
    assert get_peft_model_state_dict(model, adapter_name="theirs").keys() == theirs.keys()


def test_peft_deltas_can_be_fused_under_the_adapters():
    model, inputs = build("sd15")
    attachment = attach(model, KRONA)
    randomize(attachment)
    ours = output(model, inputs)
    add_peft(model, "sd15")
    y = output(model, inputs)
    assert not torch.allclose(y, ours, atol=1e-3)
    model.fuse_lora()
    assert torch.allclose(output(model, inputs), y, atol=1e-4)
    model.unfuse_lora()
    assert torch.allclose(output(model, inputs), y, atol=1e-4)
    model.disable_lora()
    assert torch.allclose(output(model, inputs), ours, atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "clip"])
def test_peft_is_refused_while_a_delta_is_merged(name):
    model, inputs = build(name)
    before = snapshot(model)
    attachment = attach(model, KRONA)
    randomize(attachment)
    attachment.merge()
    y, keys = output(model, inputs), list(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"add_adapter: \d+ layers of the model are merged, .* unmerge\(\) first"
    ):
        add_peft(model, name)
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model, inputs), y)
    attachment.remove()
    assert snapshot(model) == before


def test_a_peft_call_that_fails_leaves_the_adapters():
    model, inputs = build("sd15")
    attachment = attach(model, KRONA)
    randomize(attachment)
    y, keys, trained = output(model, inputs), list(model.state_dict()), trained_of(model)
    with pytest.raises(ValueError, match="Target modules"):
        model.add_adapter(LoraConfig(target_modules=["nowhere"]), "theirs")
    assert (list(model.state_dict()), trained_of(model)) == (keys, trained)
    assert torch.equal(output(model, inputs), y)


def test_a_state_dict_without_adapters_loads_into_the_adapted_model():
    """Its keys are those of the module tree, as PEFT's are: `to_q.base.weight` and `to_q.adapters.0.lokr_a`."""
    model, inputs = build("sd15")
    base = {name: 2 * each for name, each in model.state_dict().items()}
    other, _ = build("sd15")
    other.load_state_dict(base)
    attachment = attach(model, KRONA)
    result = model.load_state_dict(base, strict=False)
    assert result.unexpected_keys == []
    assert all(".adapters.0.lokr_" in each for each in result.missing_keys)
    attachment.scale = 0.0
    assert torch.allclose(output(model, inputs), output(other, inputs), atol=1e-5)
    state = model.state_dict()
    assert state.keys() == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    model.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("spec", [KRONA, BOTTLENECK], ids=["layers", "blocks"])
def test_methods_of_a_copy_act_on_the_copy(copied, spec, tmp_path):
    model, inputs = build("sd15")
    start = output(model, inputs)
    randomize(attach(model, spec))
    adapted = output(model, inputs)
    other = copied(model)
    for each in model.parameters():
        each.data.zero_()
    assert torch.equal(output(other, inputs), adapted)
    save(other, tmp_path)
    assert_reloads("sd15", tmp_path, inputs, start, adapted)
    add_peft(other, "sd15")
    assert not any(isinstance(each, BaseTunerLayer) for each in model.modules())


@pytest.mark.parametrize("inner_first", [True, False])
def test_adapters_through_two_roots_go_in_either_order(inner_first, tmp_path):
    """Both have put their methods on the same modules; either may leave first."""
    model, inputs = build("sd15")
    root = nn.ModuleDict({"unet": model})
    before, start = snapshot(root), output(model, inputs)
    outer = attach(root, KronA((8, 4), targets=("attn1.to_q", "attn2.to_v")))
    inner = attach(model, KronA((4, 4), targets=("attn1.to_k", "ff.net.2")))
    for index, each in enumerate((outer, inner)):
        assert all(tensor.requires_grad for tensor in each.parameters())
        randomize(each, seed=index)
    adapted = output(model, inputs)
    save(model, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded, inputs), start)
    attach(loaded, formats.load(tmp_path / NAME))
    attach(loaded, formats.load(tmp_path / "kronafuse_adapter_2.safetensors"))
    assert torch.allclose(output(loaded, inputs), adapted, atol=1e-5)
    for each in (inner, outer) if inner_first else (outer, inner):
        with pytest.raises(RuntimeError, match="fuse_qkv_projections: the model carries kronafuse adapters"):
            model.fuse_qkv_projections()
        each.remove()
    assert snapshot(root) == before
    assert instance_methods(root) == []
    assert torch.equal(output(model, inputs), start)


def test_a_part_of_an_adapter_is_saved_by_the_names_of_its_own_model(tmp_path):
    unet, inputs = build("sd15")
    clip, text_inputs = build("clip")
    root = nn.ModuleDict({"unet": unet, "text": clip})
    start, text_start = output(unet, inputs), output(clip, text_inputs)
    spec = KronA((8, 4), targets=("to_q", "q_proj"), per_target={"to_q": {"scale": 0.5}})
    attachment = attach(root, spec)
    randomize(attachment)
    adapted, text_adapted = output(unet, inputs), output(clip, text_inputs)
    save(unet, tmp_path / "unet")
    save(clip, tmp_path / "text")
    assert_reloads("sd15", tmp_path / "unet", inputs, start, adapted)
    assert_reloads("clip", tmp_path / "text", text_inputs, text_start, text_adapted)
    attachment.remove()
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    attach(root, KronA((8, 4), targets=("to_q", "q_proj"), per_target={layer: {"scale": 2.0}}))
    with pytest.raises(RuntimeError, match=f"per_target of the adapter on ModuleDict names {layer} by more"):
        unet.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_saving_is_refused_where_it_cannot_be_made_right(tmp_path):
    model, _ = build("clip")
    attach(model, KRONA)
    with pytest.raises(RuntimeError, match="its weights are distributed over processes"):
        model.save_pretrained(tmp_path / "new", distributed_checkpoint=True)
    with pytest.raises(RuntimeError, match="the argument save_directory, which is missing"):
        model.save_pretrained(None)
    attachment = attach(model, LoRA(2))
    next(attachment.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"CLIPTextModel.save_pretrained: .* must be finite"):
        model.save_pretrained(tmp_path / "new")
    other, _ = build("clip")
    other.save_pretrained = lambda save_directory: None
    attachment = attach(other, KRONA)
    with pytest.raises(RuntimeError, match="this object has a save_pretrained of its own, not its class's"):
        other.save_pretrained(tmp_path / "new")
    attachment.remove()
    other.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_the_main_process_writes_files_of_adapters(tmp_path):
    model, _ = build("sd15")
    attach(model, KRONA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / NAME).exists()


def test_saving_around_an_adapted_part_is_refused(tmp_path):
    model, _ = build("sd15")
    before = snapshot(model)
    with attach(model.mid_block, KRONA):
        keys = list(model.state_dict())
        assert any(key.startswith("mid_block") and ".base." in key for key in keys)
        with pytest.raises(RuntimeError, match="save_pretrained: a part of the model, mid_block, carries"):
            model.save_pretrained(tmp_path)
        with attach(model, KronA((8, 4), targets=("ff.net.2",))):
            save(model, tmp_path)
            assert not UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)[1][
                "missing_keys"
            ]
    assert snapshot(model) == before
    model.save_pretrained(tmp_path / "after")


def test_tied_weights_stay_tied(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model, tokens = LlamaForCausalLM(config).eval(), {"input_ids": torch.tensor([[3, 1, 4, 1]])}
    before, start = snapshot(model), output(model, tokens)
    attachment = attach(model, LoRA(2, targets=("q_proj", "lm_head")))
    randomize(attachment)
    adapted = output(model, tokens)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(output(model, tokens), adapted)
    save(model, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(output(loaded, tokens), start)
    attach(loaded, formats.load(tmp_path / NAME))
    assert torch.equal(output(loaded, tokens), adapted)
    attachment.remove()
    assert snapshot(model) == before


def test_a_kron_linear_of_the_models_own_is_no_adapter(tmp_path):
    """One that its user has built in is saved as the layer that it is."""
    model, _ = build("sd15")
    ff = model.mid_block.attentions[0].transformer_blocks[0].ff.net
    ff[2] = KronLinear(ff[2], LoRA(2))
    keys = set(model.state_dict())
    attach(model, KRONA)
    save(model, tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == keys
    own = ff[2]
    add_peft(model, "sd15")
    assert ff[2] is own
