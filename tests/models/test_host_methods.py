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
peft = pytest.importorskip("peft")

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import CLIPTextModel

KRONA = KronA((8, 4))
BOTTLENECK = Bottleneck("ff_in", "ff_in", 8)
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
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path / "merged").eval(), inputs), merged)


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
    StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)


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
