"""Captions through frozen CLIP text encoders, as Stable Diffusion and Stable Diffusion XL take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .conditioning import UNCONDITIONAL
from .reading import reading

ZERO_KEY = "force_zeros_for_empty_prompt"
"""The key of `model_index.json` that says whether the unconditional caption is zeros; it is, if absent."""


class OneEncoder:
    """Stable Diffusion's: the encoder's last hidden state."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.requires_grad_(False).eval()

    def check(self, conditions: Sequence[str]) -> None:
        """Every caption is known; those longer than the encoder's context are cut."""

    @torch.no_grad()
    def encode(self, conditions: Sequence[str], resolution: int) -> dict[str, Any]:
        output = self.encoder(token_ids(self.tokenizer, self.encoder, conditions))
        return {"encoder_hidden_states": output.last_hidden_state}

    def to(self, device: torch.device) -> None:
        self.encoder.to(device)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> OneEncoder:
        return cls(*_pair(folder, "", CLIPTextModel, dtype))


class TwoEncoders:
    """Stable Diffusion XL's: both encoders' last but one hidden states side by side, the second's projection,
    and the image's size.

    zero_unconditional: the unconditional caption is zeros instead of the encoding of an empty text

    Source: Podell et al. 2023, arXiv 2307.01952, sections 2.1 and 2.2.
    """

    def __init__(self, parts: Sequence[tuple[Any, Any]], zero_unconditional: bool) -> None:
        self.parts = [(tokenizer, encoder.requires_grad_(False).eval()) for tokenizer, encoder in parts]
        self.zero_unconditional = zero_unconditional

    def check(self, conditions: Sequence[str]) -> None:
        """Every caption is known; those longer than the encoders' context are cut."""

    @torch.no_grad()
    def encode(self, conditions: Sequence[str], resolution: int) -> dict[str, Any]:
        outputs = [
            encoder(token_ids(tokenizer, encoder, conditions), output_hidden_states=True)
            for tokenizer, encoder in self.parts
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self.zero_unconditional:
            kept = torch.tensor([each != UNCONDITIONAL for each in conditions], device=hidden.device)
            hidden, pooled = hidden * kept[:, None, None], pooled * kept[:, None]
        size = [
            resolution,
            resolution,
            0,
            0,
            resolution,
            resolution,
        ]  # original size, top left of the cut, target size
        sizes = torch.tensor([size] * len(conditions), dtype=hidden.dtype, device=hidden.device)
        return {
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
        }

    def to(self, device: torch.device) -> None:
        for _, encoder in self.parts:
            encoder.to(device)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> TwoEncoders:
        kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        parts = [_pair(folder, suffix, kind, dtype) for suffix, kind in kinds.items()]
        index, zero = folder / "model_index.json", True
        if index.is_file():
            with reading(index):
                zero = bool(json.loads(index.read_text(encoding="utf-8")).get(ZERO_KEY, True))
        return cls(parts, zero)


def token_ids(tokenizer: Any, encoder: Any, captions: Sequence[str]) -> Tensor:
    """(batch, L) on the encoder's device, padded and cut to its context."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(encoder.device)


def _pair(folder: Path, suffix: str, kind: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    with reading(folder / f"tokenizer{suffix}"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}", local_files_only=True)
    with reading(folder / f"text_encoder{suffix}"):
        encoder = kind.from_pretrained(folder / f"text_encoder{suffix}", dtype=dtype, local_files_only=True)
    return tokenizer, encoder
