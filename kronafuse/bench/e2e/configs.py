"""The models of the end-to-end benchmark: published configurations as data.

Weights are random, so a configuration is all that is needed. `parameters` is the number that the class has
with this configuration, and the tests count it. What that count verifies:

- sd15 and sdxl: 859.5 M and 2,567 M are the published counts of the two U-Nets.
- dit_xl: 749.8 M in diffusers, whose blocks each own the embedding of time and class (2.8 M) that the
  published model has once; without the 27 copies it is the published 675 M.
- flux2_klein: 3.88 B of the published "4B"; the depth, the width, the text width of three Qwen3-4B layers
  (3 · 2560) and the absent guidance embedding are those of the released model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...nn.specs import DEFAULT


@dataclass(frozen=True)
class StepModel:
    """One model that the end-to-end benchmark trains an adapter on.

    kind:        which inputs it takes: "unet", "dit" or "flux2"
    class_name:  its class in diffusers
    config:      what the class is called with
    parameters:  of that class with that configuration
    source:      where the configuration is published
    side:        of the latent grid that the model sees, at the published resolution
    text_tokens: of the text that it reads, 0 for none
    cpu_side:    the smallest grid on which every level still has work, taken on a CPU
    cpu_tokens:  of the text there
    targets:     suffixes of all its attention projections
    """

    name: str
    kind: str
    class_name: str
    config: Mapping[str, Any] = field(hash=False)
    parameters: int
    source: str
    side: int
    text_tokens: int
    cpu_side: int
    cpu_tokens: int
    targets: tuple[str, ...] = DEFAULT


FLUX2_TARGETS = (
    *DEFAULT, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj", "to_out",
)  # fmt: skip
"""Double blocks have q, k, v and out for image and text; single blocks one fused projection in, one out."""

SD15 = StepModel(
    name="sd15",
    kind="unet",
    class_name="UNet2DConditionModel",
    config={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    parameters=859_520_964,
    source="unet/config.json of stable-diffusion-v1-5/stable-diffusion-v1-5",
    side=64,
    text_tokens=77,
    cpu_side=16,
    cpu_tokens=77,
)  # fmt: skip

SDXL = StepModel(
    name="sdxl",
    kind="unet",
    class_name="UNet2DConditionModel",
    config={
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    parameters=2_567_463_684,
    source="unet/config.json of stabilityai/stable-diffusion-xl-base-1.0",
    side=128,
    text_tokens=77,
    cpu_side=16,
    cpu_tokens=77,
)

DIT_XL = StepModel(
    name="dit_xl",
    kind="dit",
    class_name="DiTTransformer2DModel",
    config={
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    },
    parameters=749_826_464,
    source="transformer/config.json of facebook/DiT-XL-2-256",
    side=32,
    text_tokens=0,
    cpu_side=8,
    cpu_tokens=0,
)

FLUX2_KLEIN = StepModel(
    name="flux2_klein",
    kind="flux2",
    class_name="Flux2Transformer2DModel",
    config={
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "guidance_embeds": False,
    },
    parameters=3_875_544_576,
    source="Klein4BParams of black-forest-labs/flux2, in diffusers' names",
    side=64,
    text_tokens=512,
    cpu_side=4,
    cpu_tokens=16,
    targets=FLUX2_TARGETS,
)

MODELS = {model.name: model for model in (SD15, SDXL, DIT_XL, FLUX2_KLEIN)}
"""The models of the issue's table by name. On a GPU they run at the size they were published for."""
