"""Every supported architecture, small, and inputs that fit it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kronafuse.nn import KronFactors
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

Inputs = dict[str, object]


def sd15() -> tuple[nn.Module, Inputs]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }


def sdxl() -> tuple[nn.Module, Inputs]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        layers_per_block=1,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        norm_num_groups=8,
    )
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)},
    }


def dit() -> tuple[nn.Module, Inputs]:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "class_labels": torch.tensor([1, 7]),
    }


def pixart() -> tuple[nn.Module, Inputs]:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        norm_num_groups=8,
        sample_size=8,
        caption_channels=24,
        num_embeds_ada_norm=10,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> tuple[nn.Module, Inputs]:
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 9.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 16),
    }


def flux() -> tuple[nn.Module, Inputs]:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": torch.randn(2, 6, 4),
        "timestep": torch.tensor([0.3, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 16),
        "img_ids": torch.rand(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def flux2() -> tuple[nn.Module, Inputs]:
    model = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model, {
        "hidden_states": torch.randn(2, 6, 4),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([1.0, 2.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "img_ids": torch.rand(6, 4),
        "txt_ids": torch.zeros(5, 4),
    }


def clip() -> tuple[nn.Module, Inputs]:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModel(config), {"input_ids": torch.tensor([[0, 7, 8, 9, 2], [0, 11, 12, 2, 1]])}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    each.__name__: each for each in (sd15, sdxl, dit, pixart, sd3, flux, flux2, clip)
}
PARTIAL = ("flux2",)
"""Architectures with attention blocks whose projections are fused beyond the default targets."""


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The model in eval mode with fixed weights, and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        # diffusers starts some output layers at zero, behind which any delta would be hidden.
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), inputs


def output(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The first tensor that the model returns."""
    return model(**inputs)[0]


def randomize(attachment, seed: int = 1, std: float = 0.3) -> None:
    """Random factors, so that the deltas show."""
    generator = torch.Generator().manual_seed(seed)
    for factor in attachment.parameters():
        factor.data.copy_(std * torch.randn(factor.shape, generator=generator))


def factors_of(model: nn.Module) -> list[KronFactors]:
    return [each for each in model.modules() if isinstance(each, KronFactors)]
