"""Every number of the demo, in one record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...nn.specs import KronA
from ..config import LoopSettings
from .data import SIDE

TOKENS, TOKEN_WIDTH = 4, 32
"""Length and width of what cross-attention reads for a class."""

UNET: dict[str, Any] = {
    "sample_size": SIDE, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TOKEN_WIDTH, "attention_head_dim": 8, "norm_num_groups": 8,
}  # fmt: skip
"""A U-Net of 1.05 million parameters with self- and cross-attention at both levels."""

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
    "clip_sample": False,
}  # fmt: skip
"""Guided images leave [-1, 1] on the way; clipped at every step, 80 % of the base's digits are right, not all."""

FACTORS = (4, 8)
LORA_RANK = 16
LOKR_FACTOR = 8


BASE = LoopSettings(
    steps=600, batch_size=64, learning_rate=2e-3, warmup=20, decay="cosine", weight_decay=0.0,
    condition_dropout=0.1,
)  # fmt: skip
ADAPTER = replace(BASE, learning_rate=5e-3, seed=1)


@dataclass(frozen=True)
class Recipe:
    """How long each part runs; `gated` says whether the result must reach the targets."""

    base: LoopSettings = BASE
    adapter: LoopSettings = ADAPTER
    spec: KronA = field(default_factory=lambda: KronA(FACTORS))
    per_new_class: int = 50
    per_old_class: int = 20
    sampling_steps: int = 25
    guidance: float = 2.0
    timed_steps: int = 15
    seed: int = 0
    gated: bool = True


FULL = Recipe()

SMOKE = Recipe(
    base=replace(FULL.base, steps=3, batch_size=8),
    adapter=replace(FULL.adapter, steps=3, batch_size=8),
    per_new_class=6, per_old_class=6, sampling_steps=2, timed_steps=1, gated=False,
)  # fmt: skip
"""Everything once, far too short to learn anything."""

LIMIT_SECONDS = 480
"""How long the demo may take on two cores, training of the base model included."""

BEFORE_BELOW = 0.10
AFTER_AT_LEAST = 0.85
"""Accuracy on the new classes that the demo holds itself to."""


def base_key(recipe: Recipe) -> str:
    """Names the cached base model by all that decides its weights."""
    decisive = [UNET, SCHEDULER, TOKENS, asdict(recipe.base), recipe.seed]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
