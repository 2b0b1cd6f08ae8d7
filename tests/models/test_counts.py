"""Trained parameters on the real architectures, built on the meta device, against the published counts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from kronafuse import KronA, LoKr, LoRA, attach
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel


@cache
def sdxl_unet() -> nn.Module:
    """Stable Diffusion XL: 70 transformer blocks, context 2048."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@cache
def sd1_unet() -> nn.Module:
    """Stable Diffusion 1.x: 16 transformer blocks, context 768."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


@cache
def clip_l() -> nn.Module:
    """The text encoder of Stable Diffusion 1.x: 12 layers of width 768."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        return CLIPTextModel(config)


def count(model: nn.Module, spec) -> tuple[int, int]:
    """Adapted layers, and trained numbers."""
    with attach(model, spec) as attachment:
        numbers = sum(each.numel() for each in attachment.parameters())
        assert numbers == attachment.report.parameters
        return len(attachment.modules), numbers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (KronA((64, 4)), 3_874_560),
        (KronA((64, 8)), 2_152_320),
        (KronA((64, 16)), 1_506_240),
        (KronA((64, 2)), 7_534_080),
        (LoRA(4), 5_806_080),
        (LoKr(-1), 1_513_920),
        (LoKr(-1, 1), 575_360),
        (LoKr(-1, 8), 904_640),
        (LoKr(4), 59_708_160),
        (LoKr(8), 14_960_640),
        (LoKr(8, 4), 761_600),
        (LoKr(8, 8), 1_487_360),
        (LoKr(16), 3_874_560),
    ],
    ids=str,
)
def test_sdxl(spec, expected):
    assert count(sdxl_unet(), spec) == (560, expected)


@pytest.mark.parametrize(
    ("spec", "unet", "text", "total"),
    [
        (KronA((64, 4)), 398_048, 122_880, 520_928),
        (KronA((64, 8)), 248_176, 79_872, 328_048),
        (LoRA(4), 797_184, 294_912, 1_092_096),
    ],
    ids=str,
)
def test_sd1_unet_and_text_encoder(spec, unet, text, total):
    layers, numbers = zip(count(sd1_unet(), spec), count(clip_l(), spec), strict=True)
    assert layers == (128, 48)
    assert numbers == (unet, text)
    assert sum(numbers) == total


def test_size_of_the_full_models():
    """The architectures are the published ones: 982.58 M of Stable Diffusion 1.x are trained by DreamBooth."""
    assert sum(each.numel() for each in sd1_unet().parameters()) == 859_520_964
    assert sum(each.numel() for model in (sd1_unet(), clip_l()) for each in model.parameters()) == 982_581_444
