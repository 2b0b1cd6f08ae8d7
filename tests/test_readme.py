"""The README's Python runs as it stands, on a small model with SDXL's layout in place of the published one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def small_sdxl_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        norm_num_groups=16,
    )


def test_sdxl_snippet(monkeypatch, tmp_path):
    snippet = next(each for each in SNIPPETS if "StableDiffusionXLPipeline" in each)
    unet = small_sdxl_unet()
    pipeline = SimpleNamespace(unet=unet, to=lambda device: None)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", lambda *_, **__: pipeline)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert (tmp_path / "subject.safetensors").stat().st_size > 0
    names["adapter"].unmerge()
    names["adapter"].scale = 0.7
    names["adapter"].remove()
    names["attach"](unet, names["formats"].load("subject.safetensors"))
    assert len(snippet.strip().splitlines()) <= 14


def test_bottleneck_snippet(monkeypatch, capsys):
    snippet = next(each for each in SNIPPETS if "Bottleneck(" in each)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", lambda *_, **__: unet)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert len(names["adapter"].modules) == 16
    assert "attn2_out -> ff_in, width 60, 1,511,040 parameters, 0.176 %" in capsys.readouterr().out
    names["adapter"].remove()
    within = names["attach"](unet, names["Bottleneck"](width=None, budget=0.75))
    assert (within.spec.width, within.report.parameters) == (256, 6_406_336)


def test_operators_snippet(capsys):
    snippet = next(each for each in SNIPPETS if "kron_linear_group" in each)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["y"].shape == names["q"].shape == (2, 77, 1280)
    torch.testing.assert_close(names["y"], names["x"] @ names["weight"].t())
    assert "b_first" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("    make ")])
def test_make_lines_are_documented_targets(line):
    assert re.match(r"    make [a-z-]+( |$)", line)
    assert "#" in line
