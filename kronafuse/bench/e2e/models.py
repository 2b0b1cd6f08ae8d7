"""A model of the end-to-end benchmark with random weights, and one batch of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configs import StepModel


@dataclass
class Batch:
    """One batch: what the model is called with, the input that gets a gradient, and what the loss compares with.

    inputs: keyword arguments of the model
    x:      the latents among them
    target: of the output's size
    """

    inputs: dict[str, Any]
    x: Tensor
    target: Tensor


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are made in `dtype`: a model of 4 B parameters is never held in fp32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(model: StepModel, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen model with torch's own random initialisation, whose fan-in scale keeps outputs finite."""
    import diffusers

    with default_dtype(dtype), torch.device(device):
        built: nn.Module = getattr(diffusers, model.class_name)(**model.config)
    count = sum(each.numel() for each in built.parameters())
    if count != model.parameters:
        raise ValueError(
            f"e2e: {model.class_name} has {count:,} parameters with the configuration of {model.name}, expected"
            f" {model.parameters:,}: this version of diffusers builds another model"
        )
    # Not diffusers' own `to`, which warns of a cast; here only the tables made from NumPy still need it.
    return nn.Module.to(built, device=device, dtype=dtype).requires_grad_(False).train()


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that holds the same parameters and buffers: an arm of its own at no memory."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(each): each for each in tensors})


def make_batch(
    model: StepModel,
    batch: int,
    side: int,
    text_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
) -> Batch:
    """Random inputs: a grid of `side` by `side` latents, and text where the model reads any."""
    torch.manual_seed(seed)
    with torch.device(device):
        inputs, x, channels = INPUTS[model.kind](model, batch, side, text_tokens, dtype)
        target = torch.randn(*_output_size(x, channels), dtype=dtype)
    return Batch(inputs, x.requires_grad_(), target)


def _unet(model: StepModel, batch: int, side: int, text_tokens: int, dtype: torch.dtype) -> Any:
    config = model.config
    x = torch.randn(batch, config["in_channels"], side, side, dtype=dtype)
    inputs: dict[str, Any] = {
        "sample": x,
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, text_tokens, config["cross_attention_dim"], dtype=dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        sizes = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, dtype=dtype),
            "time_ids": torch.tensor([8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]).repeat(batch, 1),
        }
    return inputs, x, config["out_channels"]


def _dit(model: StepModel, batch: int, side: int, text_tokens: int, dtype: torch.dtype) -> Any:
    x = torch.randn(batch, model.config["in_channels"], side, side, dtype=dtype)
    inputs = {
        "hidden_states": x,
        "timestep": torch.randint(0, 1000, (batch,)),
        "class_labels": torch.randint(0, model.config["num_embeds_ada_norm"], (batch,)),
    }
    return inputs, x, model.config["out_channels"]


def _flux2(model: StepModel, batch: int, side: int, text_tokens: int, dtype: torch.dtype) -> Any:
    x = torch.randn(batch, side * side, model.config["in_channels"], dtype=dtype)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    image, text = torch.zeros(side * side, 4), torch.zeros(text_tokens, 4)
    image[:, 1], image[:, 2] = rows, columns
    text[:, 3] = torch.arange(text_tokens)
    inputs = {
        "hidden_states": x,
        "encoder_hidden_states": torch.randn(
            batch, text_tokens, model.config["joint_attention_dim"], dtype=dtype
        ),
        "timestep": torch.rand(batch, dtype=dtype),
        "img_ids": image,
        "txt_ids": text,
    }
    return inputs, x, model.config["in_channels"]


INPUTS: dict[str, Callable[..., Any]] = {"unet": _unet, "dit": _dit, "flux2": _flux2}
"""Kind of model -> its keyword arguments, the latents among them, and the channels of its output."""


def _output_size(x: Tensor, channels: int) -> tuple[int, ...]:
    return (*x.shape[:-1], channels) if x.dim() == 3 else (x.shape[0], channels, *x.shape[2:])
