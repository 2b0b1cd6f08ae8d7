"""The released layout of bottleneck adapters: what is written, what is read, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from kronafuse import Bottleneck, KronA, LoRA, attach, formats
from kronafuse.formats import AdapterFile, unet_finetune
from kronafuse.formats.unet_blocks import absent, from_diffusers, from_ldm
from kronafuse.nn.spec_json import spec_to_dict
from torch import nn

ADAPTED = {
    "input_blocks.1.1.transformer_blocks.0": "down_blocks.0.attentions.0.transformer_blocks.0",
    "input_blocks.2.1.transformer_blocks.0": "down_blocks.0.attentions.1.transformer_blocks.0",
    "middle_block.1.transformer_blocks.0": "mid_block.attentions.0.transformer_blocks.0",
    "output_blocks.3.1.transformer_blocks.0": "up_blocks.1.attentions.0.transformer_blocks.0",
    "output_blocks.4.1.transformer_blocks.0": "up_blocks.1.attentions.1.transformer_blocks.0",
    "output_blocks.5.1.transformer_blocks.0": "up_blocks.1.attentions.2.transformer_blocks.0",
}
"""Transformer blocks of `unet()` by their released names and by diffusers'."""

RESBLOCKS = {
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0": "down_blocks.0.resnets.1",
    "input_blocks.4.0": "down_blocks.1.resnets.0",
    "input_blocks.5.0": "down_blocks.1.resnets.1",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.2.0": "up_blocks.0.resnets.2",
    "output_blocks.3.0": "up_blocks.1.resnets.0",
    "output_blocks.4.0": "up_blocks.1.resnets.1",
    "output_blocks.5.0": "up_blocks.1.resnets.2",
}
SPECS = [
    Bottleneck("attn2_out", "ff_in", 5, activation="silu", scale=0.5),
    Bottleneck("attn2_context", "attn2_context", 4, init="paper", dtype=torch.float64),
    Bottleneck("res_in", "res_out", 3, activation="sigmoid"),
    Bottleneck("res_out", "res_out", 2, activation="identity", dtype=torch.bfloat16),
]
WIDTHS = {each.width for each in SPECS}
FIRST = "input_blocks.1.1.transformer_blocks.0.adapter_inout"


def unet(channels: tuple[int, ...] = (32, 64), layers: int = 2, groups: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        layers_per_block=layers,
        attention_head_dim=2,
        norm_num_groups=groups,
    ).eval()


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 24, generator=generator)
    return model(sample, torch.tensor([3, 9]), text)[0]


def adapted(spec: Bottleneck, seed: int = 1, model: nn.Module | None = None):
    model = unet() if model is None else model
    attachment = attach(model, spec)
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, attachment


def files(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(folder.iterdir())}


class Inout(nn.Module):
    """The released module for a transformer block."""

    def __init__(self, size: int, width: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.adp = nn.Sequential(nn.Linear(size, width), activation or nn.ReLU(), nn.Linear(width, size))


def resblock(k: int, width: int, n: int) -> nn.Sequential:
    """The released module for a ResBlock."""
    norm, down, up = nn.GroupNorm(32, k), nn.Conv2d(k, width, 3, padding=1), nn.Conv2d(width, n, 3, padding=1)
    return nn.Sequential(norm, nn.SiLU(), down, nn.ReLU(), up)


def release(folder: Path, width: int = 5, children: bool = True) -> dict[str, Inout]:
    """A folder as the released code writes it; the modules by diffusers' names."""
    torch.manual_seed(7)
    folder.mkdir()
    modules = {}
    for ldm, name in ADAPTED.items():
        module = modules[name] = Inout(64 if "middle" in ldm else 32, width)
        torch.save(module.state_dict(), folder / f"{ldm}.adapter_inout.pt")
        if children:
            torch.save(module.adp.state_dict(), folder / f"{ldm}.adapter_inout.adp.pt")
    return modules


SPEC = Bottleneck("attn1_out", "block_out", scale=2.0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.source}-{spec.sink}")
def test_round_trip(spec, tmp_path):
    model, attachment = adapted(spec)
    attachment.scale = 0.75
    formats.save(tmp_path / "500-adapters", attachment, format="unet_finetune")
    end, blocks = (".adapter", RESBLOCKS) if spec.source.startswith("res") else (".adapter_inout", ADAPTED)
    assert sorted(files(tmp_path / "500-adapters")) == sorted(
        ["kronafuse.json", *(f"{ldm}{end}.pt" for ldm in blocks)]
    )
    assert [each.name for each in tmp_path.iterdir()] == ["500-adapters"]
    file = formats.load(tmp_path / "500-adapters")
    assert file.spec == spec
    assert file.scale == 0.75
    assert dict(file.modules) == attachment.modules
    saved = attachment.state_dict()
    assert list(file.tensors) == list(saved)
    for name, tensor in file.tensors.items():
        assert tensor.dtype == spec.dtype
        assert torch.equal(tensor, saved[name])
    other = unet()
    before = output(other)
    with attach(other, file):
        assert torch.equal(output(other), output(model))
        assert not torch.equal(output(other), before)
    formats.save(tmp_path / "again", file, format="unet_finetune")
    assert files(tmp_path / "again") == files(tmp_path / "500-adapters")


def test_a_released_folder(tmp_path):
    """Files of the released modules, with the redundant children."""
    modules = release(tmp_path / "a")
    file = unet_finetune.load(tmp_path / "a", SPEC)
    assert file.spec == Bottleneck("attn1_out", "block_out", 5, scale=2.0)
    assert file.scale == 1.0
    assert set(file.modules) == set(ADAPTED.values())
    assert file.modules["mid_block.attentions.0.transformer_blocks.0"] == (64, 64)
    for name, module in modules.items():
        down, _, up = module.adp
        assert torch.equal(file.tensors[f"{name}.down"], down.weight)
        assert torch.equal(file.tensors[f"{name}.down_bias"], down.bias)
        assert torch.equal(file.tensors[f"{name}.up"], up.weight)
        assert torch.equal(file.tensors[f"{name}.up_bias"], up.bias)
    with attach(unet(), file) as attachment:
        assert attachment.spec == file.spec
        assert all(torch.equal(each, file.tensors[name]) for name, each in attachment.state_dict().items())


def test_a_released_folder_of_resblocks(tmp_path):
    torch.manual_seed(7)
    sizes = attach(unet(), Bottleneck("res_in", "res_out", 3)).modules
    modules = {}
    for ldm, name in RESBLOCKS.items():
        n, k = sizes[name]
        modules[name] = resblock(k, 3, n)
        torch.save(modules[name].state_dict(), tmp_path / f"{ldm}.adapter.pt")
    file = unet_finetune.load(tmp_path, Bottleneck("res_in", "res_out"))
    assert dict(file.modules) == sizes
    assert sizes["up_blocks.1.resnets.0"] == (32, 96)
    for name, (norm, _, down, _, up) in modules.items():
        assert torch.equal(file.tensors[f"{name}.norm_weight"], norm.weight)
        assert torch.equal(file.tensors[f"{name}.norm_bias"], norm.bias)
        assert torch.equal(file.tensors[f"{name}.down"], down.weight)
        assert torch.equal(file.tensors[f"{name}.down_bias"], down.bias)
        assert torch.equal(file.tensors[f"{name}.up"], up.weight)
        assert torch.equal(file.tensors[f"{name}.up_bias"], up.bias)
    x = torch.randn(2, 96, 4, 4)
    adapter = attach(unet(), file).model.get_submodule("up_blocks.1.resnets.0")
    adapter = next(each for each in adapter.modules() if type(each).__name__ == "BottleneckAdapter")
    torch.testing.assert_close(adapter(x), modules["up_blocks.1.resnets.0"](x))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=lambda spec: f"{spec.source}-{spec.sink}")
def test_the_released_code_reads_what_is_saved(spec, tmp_path):
    """It hands `<module name>.pt` to each module's strict load_state_dict."""
    _, attachment = adapted(spec)
    formats.save(tmp_path / "a", attachment, format="unet_finetune")
    saved, sizes = attachment.state_dict(), attachment.modules
    for ldm, name in (ADAPTED if spec.source == "attn2_out" else RESBLOCKS).items():
        n, k = sizes[name]
        if spec.source == "attn2_out":
            module, end = Inout(k, spec.width), "adapter_inout"
            down, up = module.adp[0], module.adp[2]
        else:
            module, end = resblock(k, spec.width, n), "adapter"
            down, up = module[2], module[4]
        module.load_state_dict(torch.load(tmp_path / "a" / f"{ldm}.{end}.pt", weights_only=True), strict=True)
        assert torch.equal(down.weight, saved[f"{name}.down"])
        assert torch.equal(up.bias, saved[f"{name}.up_bias"])


@cache
def real(name: str) -> nn.Module:
    options = {
        "sd1": {"cross_attention_dim": 768},
        "sd2": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "sdxl": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
        },
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**options[name])


@pytest.mark.parametrize(
    ("name", "transformers", "resblocks"), [("sd1", 16, 22), ("sd2", 16, 22), ("sdxl", 70, 17)]
)
def test_names_on_real_architectures(name, transformers, resblocks):
    """diffusers' own reader of LDM checkpoints takes each name back to the module it came from."""
    model = real(name)
    for source, count in (("attn2_out", transformers), ("res_out", resblocks)):
        with attach(model, Bottleneck(source, source.replace("attn2_out", "ff_in"), 4)) as attachment:
            modules = attachment.modules
        blocks = {path: from_diffusers(path) for path in modules}
        assert len({block.ldm for block in blocks.values()}) == count
        assert absent(blocks.values()) == []
        levels = len(model.config.block_out_channels)
        checkpoint = {f"input_blocks.{place}.0.op.weight": None for place in range(3 * levels)}
        checkpoint |= {f"middle_block.{place}.x": None for place in range(3)}
        checkpoint |= {f"output_blocks.{place}.2.x": None for place in range(3 * levels)}
        checkpoint |= {f"{block.ldm}.mark": path for path, block in blocks.items()}
        config = {"layers_per_block": 2}
        converted = convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{key}": value for key, value in checkpoint.items()}, config
        )
        marks = {key.removesuffix(".mark"): path for key, path in converted.items() if key.endswith(".mark")}
        assert marks == {path: path for path in modules}
        assert all(from_ldm(block.ldm) == block for block in blocks.values())


def test_every_missing_file_is_noticed(tmp_path):
    """Each one alone, also of deep attentions."""
    blocks = [from_diffusers(name) for name in attach(real("sdxl"), Bottleneck(width=4)).modules]
    for block in blocks:
        assert absent([each for each in blocks if each != block]) == [block]
    release(tmp_path / "a")
    for ldm in ADAPTED:
        for name in (f"{ldm}.adapter_inout.pt", f"{ldm}.adapter_inout.adp.pt"):
            (tmp_path / "a" / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=rf"1 are missing, the first {ldm}\.adapter_inout\.pt"):
            unet_finetune.load(tmp_path / "a", SPEC)
        (tmp_path / f"{ldm}.adapter_inout.adp.pt").rename(tmp_path / "a" / f"{ldm}.adapter_inout.adp.pt")
        with pytest.raises(ValueError, match=rf"holds {ldm}\.adapter_inout\.adp\.pt but not {ldm}\.adapter_"):
            unet_finetune.load(tmp_path / "a", SPEC)
        (tmp_path / f"{ldm}.adapter_inout.pt").rename(tmp_path / "a" / f"{ldm}.adapter_inout.pt")


def test_the_layout_alone_says_too_little(tmp_path):
    release(tmp_path / "a")
    with pytest.raises(
        ValueError,
        match=r"does not say where its adapters read and write.* call formats\.unet_finetune\.load\(path, Bott",
    ):
        formats.load(tmp_path / "a")
    with pytest.raises(TypeError, match="spec must be a Bottleneck or None; got KronA"):
        unet_finetune.load(tmp_path / "a", KronA())
    with pytest.raises(ValueError, match="the layout holds the form 'dense'; got 'compacter'"):
        unet_finetune.load(tmp_path / "a", Bottleneck(form="compacter"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("source", "attn1_out"), ("sink", "block_out"), ("activation", "relu"), ("scale", 1.0)],
)
def test_a_spec_that_the_folder_contradicts(field, value, tmp_path):
    formats.save(tmp_path / "a", adapted(SPECS[0])[1], format="unet_finetune")
    fields = {"source": "attn2_out", "sink": "ff_in", "activation": "silu", "scale": 0.5}
    assert unet_finetune.load(tmp_path / "a", Bottleneck(**fields)).spec == SPECS[0]
    with pytest.raises(
        ValueError, match=rf"kronafuse\.json says {field}={fields[field]!r}; the spec says {field}={value!r}"
    ):
        unet_finetune.load(tmp_path / "a", Bottleneck(**fields | {field: value}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format_version": 3, "kronafuse_version": "9"}, "has format version 3, written by kronafuse 9"),
        (
            {"spec": spec_to_dict(LoRA())},
            "metadata of .*kronafuse.json is damaged: .*must be a Bottleneck; got LoRA",
        ),
        (
            {"spec": {**spec_to_dict(SPECS[0]), "sink": "attn1_in"}},
            "is damaged: .*comes before source 'attn2_out'",
        ),
        (
            {"spec": {"kind": "Bottleneck"}},
            "is damaged: .*Bottleneck lacks fields activation, budget, dtype, factors, form,",
        ),
        ({"more": 1}, "is damaged: .*has unknown fields more"),
        (
            {"kronafuse_version": "9"},
            "json is not as it was written: the digest of its header and tensors is",
        ),
        ({"scale": 2.0}, "json is not as it was written"),
        ({"spec": spec_to_dict(replace(SPECS[0], scale=0.25))}, "json is not as it was written"),
        ({"scale": "much"}, "is damaged: .*scale must be a finite number"),
    ],
)
def test_a_damaged_description(change, text, tmp_path):
    formats.save(tmp_path / "a", adapted(SPECS[0])[1], format="unet_finetune")
    path = tmp_path / "a" / "kronafuse.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=text):
        formats.load(tmp_path / "a")
    path.write_bytes(b"{\xff")
    with pytest.raises(ValueError, match=r"the metadata of .* is damaged"):
        formats.load(tmp_path / "a")


def exchanged(folder: Path) -> None:
    """Two files of the same sizes in each other's place."""
    left, right = (
        folder / f"output_blocks.{place}.1.transformer_blocks.0.adapter_inout.pt" for place in (3, 4)
    )
    left.rename(folder / "left")
    right.rename(left)
    (folder / "left").rename(right)


def one_less(folder: Path) -> None:
    path = folder / f"{FIRST}.pt"
    state = torch.load(path, weights_only=True)
    state["adp.2.bias"] -= 1
    torch.save(state, path)


@pytest.mark.parametrize("change", [exchanged, one_less])
def test_a_folder_that_is_not_as_it_was_written(change, tmp_path):
    """Every file is right in itself; with or without a spec that agrees."""
    formats.save(tmp_path / "a", adapted(SPECS[0])[1], format="unet_finetune")
    change(tmp_path / "a")
    for spec in (None, SPECS[0]):
        with pytest.raises(
            ValueError, match=r"kronafuse\.json is not as it was written: the digest of its header"
        ):
            unet_finetune.load(tmp_path / "a", spec)


def test_a_folder_without_a_digest_loads_with_a_warning(tmp_path):
    _, attachment = adapted(SPECS[0])
    formats.save(tmp_path / "a", attachment, format="unet_finetune")
    path = tmp_path / "a" / "kronafuse.json"
    header = json.loads(path.read_text())
    del header["digest"]
    path.write_text(json.dumps(header | {"format_version": 1}))
    with pytest.warns(UserWarning, match=r"kronafuse\.json has format version 1, which has no digest"):
        file = formats.load(tmp_path / "a")
    assert all(torch.equal(file.tensors[name], each) for name, each in attachment.state_dict().items())


def test_flipped_bits_of_a_folder_are_refused_or_change_nothing(tmp_path):
    """A zip file has bytes that say nothing, such as its records' dates."""
    _, attachment = adapted(SPECS[0])
    formats.save(tmp_path / "a", attachment, format="unet_finetune")
    wanted, refused = formats.load(tmp_path / "a"), 0
    for path in (tmp_path / "a" / "kronafuse.json", tmp_path / "a" / f"{FIRST}.pt"):
        raw = path.read_bytes()
        for bit in range(0, 8 * len(raw), max(1, 8 * len(raw) // 150)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                found = formats.load(tmp_path / "a")
            except ValueError:
                refused += 1
                continue
            assert (found.spec, found.modules, found.scale) == (wanted.spec, wanted.modules, wanted.scale), (
                bit
            )
            assert all(torch.equal(each, wanted.tensors[name]) for name, each in found.tensors.items()), bit
        path.write_bytes(raw)
    assert refused > 150


def test_folders_of_another_kind(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder; name the adapter file in it"):
        formats.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds no \.pt file"):
        unet_finetune.load(tmp_path, SPEC)
    with pytest.raises(NotADirectoryError, match="no folder"):
        unet_finetune.load(tmp_path / "nowhere", SPEC)
    release(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("what the released code passes over")
    assert len(unet_finetune.load(tmp_path / "a", SPEC).modules) == 6
    with pytest.raises(
        ValueError,
        match=r"adapter_inout\.adp\.pt, which is no adapter of a ResBlock, as the spec says: .*\.adapter\.pt",
    ):
        unet_finetune.load(tmp_path / "a", Bottleneck("res_in", "res_in"))


@pytest.mark.parametrize(
    "name",
    [
        "model.pt",
        "input_blocks.3.0.adapter_inout.pt",
        "input_blocks.3.1.transformer_blocks.0.adapter_inout.pt",
        "input_blocks.01.1.transformer_blocks.0.adapter_inout.pt",
        "input_blocks.1.0.adapter.pt",
        "input_blocks.0.1.transformer_blocks.0.adapter_inout.pt",
        "middle_block.0.transformer_blocks.0.adapter_inout.pt",
        "output_blocks.3.2.transformer_blocks.0.adapter_inout.pt",
    ],
)
def test_one_file_too_many(name, tmp_path):
    release(tmp_path / "a", children=False)
    (tmp_path / "a" / name).write_bytes((tmp_path / "a" / f"{FIRST}.pt").read_bytes())
    with pytest.raises(ValueError, match=rf"holds {name}, which is no adapter of a transformer block"):
        unet_finetune.load(tmp_path / "a", SPEC)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda state: state.pop("adp.0.bias"),
            "must hold adp.0.weight, .*; got adp.0.weight, adp.2.bias, adp",
        ),
        (lambda state: state.clear(), "must hold adp.0.weight, .*; got nothing"),
        (lambda state: state.update(more=torch.zeros(1)), "must hold .*, adp.2.weight, more"),
        (lambda state: state.update({"adp.2.bias": 3.0}), "must hold named tensors; got 'adp.2.bias': float"),
        (
            lambda state: state.update({"adp.2.weight": torch.zeros(5, 32)}),
            r"adp.2.weight must be \(32, 5\), with width H = 5 and \(N, K\) = \(32, 32\); got \(5, 32\)",
        ),
        (
            lambda state: state.update({"adp.0.bias": torch.zeros(6)}),
            r"adp.0.weight must be \(6, 32\), with wid",
        ),
        (
            lambda state: state.update({"adp.0.weight": torch.zeros(5)}),
            r"must have two dimensions or four; got \(5,",
        ),
        (
            lambda state: state.update({"adp.0.weight": torch.zeros(5, 32, 3, 3)}),
            r"must be \(5, 32\), with width",
        ),
        (
            lambda state: state.update({"adp.0.bias": torch.zeros(257)}),
            "a: Bottleneck: width H must be 1 to 256",
        ),
        (lambda state: state["adp.2.weight"].fill_(torch.nan), "adp.2.weight must be finite; got NaN"),
        (
            lambda state: state["adp.2.bias"].fill_(torch.inf),
            "adp.2.bias must be finite; got NaN or infinity",
        ),
        (
            lambda state: state.update({"adp.0.bias": torch.zeros(5, dtype=torch.int64)}),
            "adp.0.bias must be float32, .* got int64",
        ),
    ],
)
def test_damaged_tensors(change, text, tmp_path):
    release(tmp_path / "a", children=False)
    path = tmp_path / "a" / f"{FIRST}.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=text) as error:
        unet_finetune.load(tmp_path / "a", SPEC)
    assert str(tmp_path / "a") in str(error.value)


def test_one_width_in_all_files(tmp_path):
    release(tmp_path / "a", children=False)
    name = "output_blocks.5.1.transformer_blocks.0.adapter_inout.pt"
    torch.save(Inout(32, 4).state_dict(), tmp_path / "a" / name)
    with pytest.raises(ValueError, match=rf"{name}: adp.0.weight must be \(5, 32\), .*; got \(4, 32\)"):
        unet_finetune.load(tmp_path / "a", SPEC)


def test_children_repeat_their_parents(tmp_path):
    release(tmp_path / "a")
    path = tmp_path / "a" / f"{FIRST}.adp.pt"
    state = torch.load(path, weights_only=True)
    for wrong in (state["2.bias"] + 1, state["2.bias"].double(), state["2.bias"][:-1]):
        torch.save({**state, "2.bias": wrong}, path)
        with pytest.raises(ValueError, match=r"adp\.pt must repeat .*adapter_inout\.pt; 2\.bias differs"):
            unet_finetune.load(tmp_path / "a", SPEC)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(keep, zipped, tmp_path):
    modules = release(tmp_path / "a", children=False)
    path = tmp_path / "a" / f"{FIRST}.pt"
    state = modules[ADAPTED["input_blocks.1.1.transformer_blocks.0"]].state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert len(unet_finetune.load(tmp_path / "a", SPEC).modules) == 6
    os.truncate(path, keep if isinstance(keep, int) else int(keep * path.stat().st_size))
    with pytest.raises(ValueError, match=r"adapter_inout\.pt is (not a whole|no) torch\.save file"):
        unet_finetune.load(tmp_path / "a", SPEC)


class Payload:
    """What a pickle can do to its reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_is_not_executed(write, tmp_path):
    release(tmp_path / "a", children=False)
    path = tmp_path / "a" / f"{FIRST}.pt"
    write({"adp.0.weight": Payload(tmp_path / "executed")}, path)
    with pytest.raises(
        ValueError, match=r"is no torch\.save file of tensors alone; it has not been executed"
    ):
        unet_finetune.load(tmp_path / "a", SPEC)
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold named tensors; got list"):
        unet_finetune.load(tmp_path / "a", SPEC)
    path.write_bytes(b"no pickle at all")
    with pytest.raises(ValueError, match=r"adapter_inout\.pt is (not a whole|no) torch\.save file"):
        unet_finetune.load(tmp_path / "a", SPEC)


def record(spec: Bottleneck, model: nn.Module | None = None) -> AdapterFile:
    return adapted(spec, model=model)[1].adapter_file()


def changed(**fields) -> AdapterFile:
    file = record(SPECS[0])
    return AdapterFile(**{**file.__dict__, **fields})


REFUSED = {
    "compacter": (
        lambda: record(Bottleneck(width=8, form="compacter")),
        "holds the form 'dense'; got 'compacter'",
    ),
    "krona": (
        lambda: record(Bottleneck("ff_in", "block_out", form="krona", factors=(4, 4))),
        "holds the form 'dense'; got 'krona'",
    ),
    "gelu": (
        lambda: record(Bottleneck(width=4, activation="gelu")),
        "is for the activations identity, relu, sigmoid, silu; got 'gelu'",
    ),
    "another family": (
        lambda: attach(unet(), KronA((4, 4))).adapter_file(),
        r"format 'unet_finetune' holds Bottleneck adapters; got KronA\(",
    ),
    "one ResBlock a level": (
        lambda: record(SPECS[0], unet(layers=1)),
        r"two ResBlocks a down level .* every block: down_blocks\.0\.attentions\.1\.transformer_blocks\.0 is miss",
    ),
    "three ResBlocks a level": (
        lambda: record(SPECS[2], unet(layers=3)),
        r"every block: down_blocks\.0\.resnets\.2 is in no such U-Net",
    ),
    "another model": (
        lambda: changed(modules={"blocks.0": (32, 32)}),
        r"every block: blocks\.0 is in no such U-N",
    ),
    "a part": (
        lambda: changed(modules={"mid_block.attentions.0.transformer_blocks.0": (64, 64), **no_end()}),
        r"every block: up_blocks\.1\.attentions\.2\.transformer_blocks\.0 is missing",
    ),
    "channels": (
        lambda: record(SPECS[3], unet((16, 32), groups=8)),
        r"normalises ResBlocks in 32 groups, which must divide their channels K; got K = 16 at down_blocks\.0\.r",
    ),
    "no tensors": (
        lambda: changed(tensors={}),
        r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.down must be \(5, 32\), as the spec and .*; got none",
    ),
}


def no_end() -> dict[str, tuple[int, int]]:
    sizes = record(SPECS[0]).modules
    return {name: sizes[name] for name in list(ADAPTED.values())[:-1]}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_hold(case, tmp_path):
    make, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        formats.save(tmp_path / "a", make(), format="unet_finetune")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_replaced(tmp_path):
    """A folder of adapters may be written again; a folder with anything else in it, and a file, stay."""
    _, attachment = adapted(SPECS[0])
    for _ in range(2):
        formats.save(tmp_path / "a", attachment, format="unet_finetune")
    formats.save(tmp_path / "a", adapted(SPECS[2])[1], format="unet_finetune")
    assert len(files(tmp_path / "a")) == 13
    for name in ("notes.txt", "model.pt"):
        path = tmp_path / "a" / name
        path.write_text("mine")
        with pytest.raises(FileExistsError, match=f"the folder holds {name}, which is no adapter's"):
            formats.save(tmp_path / "a", attachment, format="unet_finetune")
        assert path.read_text() == "mine"
        path.unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="a file is there, not a folder"):
        formats.save(tmp_path / "file", attachment, format="unet_finetune")
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        formats.save(tmp_path / "nowhere" / "a", attachment, format="unet_finetune")
    with pytest.raises(ValueError, match="format must be 'kronafuse' or 'unet_finetune'; got 'peft'"):
        formats.save(tmp_path / "b", attachment, format="peft")
    next(attachment.parameters()).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"formats\.save: down_blocks\.0\..*\.down must be finite"):
        formats.save(tmp_path / "b", attachment, format="unet_finetune")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_save_leaves_the_old_folder(error, existing, tmp_path, monkeypatch):
    """The error comes when half of the files are written."""
    _, attachment = adapted(SPECS[0])
    if existing:
        formats.save(tmp_path / "a", attachment, format="unet_finetune")
        old = files(tmp_path / "a")
    sync, calls = os.fsync, []

    def interrupted(file):
        calls.append(file)
        if len(calls) == 4:
            raise error
        sync(file)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(type(error)):
        formats.save(tmp_path / "a", adapted(SPECS[0], seed=2)[1], format="unet_finetune")
    assert [each.name for each in tmp_path.iterdir()] == (["a"] if existing else [])
    if existing:
        assert files(tmp_path / "a") == old


def test_folder_of_another_model(tmp_path):
    formats.save(tmp_path / "a", adapted(SPECS[0])[1], format="unet_finetune")
    file = formats.load(tmp_path / "a")
    wider = unet((64, 64))
    before = output(wider)
    with pytest.raises(ValueError, match=r"is \(32, 32\) in the file, \(64, 64\) in the model"):
        attach(wider, file)
    assert torch.equal(output(wider), before)
