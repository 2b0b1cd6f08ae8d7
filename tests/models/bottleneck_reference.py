"""Blocks of diffusers with one bottleneck adapter in them, written out: what `attach` has to compute.

A transformer block, with h its residual stream:

    attn1_in:  h                                    the block's input
    attn1_out: attn1(norm(h));       h += gate · attn1_out
    attn2_in:  h
    attn2_out: attn2(norm(h), text); h += attn2_out           attn2_context is the text
    ff_in:     h
    ff_out:    ff(norm(h));          h += gate · ff_out
    block_out: h

A source is read where it is named; a sink is h itself, or the text, and what is added is in it from there on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from kronafuse import Bottleneck
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

Tensors = Mapping[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}


def linear_delta(spec: Bottleneck, tensors: Tensors, x: Tensor) -> Tensor:
    """s · (Up · act(Down · x + b_down) + b_up), x (..., K)."""
    hidden = torch.einsum("hk,...k->...h", tensors["down"], x) + tensors["down_bias"]
    hidden = ACTIVATIONS[spec.activation](hidden)
    return spec.scale * (torch.einsum("nh,...h->...n", tensors["up"], hidden) + tensors["up_bias"])


def convolution_delta(spec: Bottleneck, tensors: Tensors, x: Tensor) -> Tensor:
    """s · (Up * act(Down * SiLU(GroupNorm(x)) + b_down) + b_up), x (B, K, height, width), 32 groups."""
    groups = x.unflatten(1, (32, -1)).flatten(2)
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    normal = normal * tensors["norm_weight"][:, None, None] + tensors["norm_bias"][:, None, None]
    hidden = ACTIVATIONS[spec.activation](
        _convolve(ACTIVATIONS["silu"](normal), tensors["down"], tensors["down_bias"])
    )
    return spec.scale * _convolve(hidden, tensors["up"], tensors["up_bias"])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3×3 with one row and column of zeros around: a sum of nine shifted products."""
    height, width = x.shape[-2:]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    y = bias[:, None, None].expand(len(x), -1, height, width)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            y = y + torch.einsum("nk,bkij->bnij", weight[:, :, row, column], shifted)
    return y


class Tap:
    """One call's adapter: what it read, until its sink is reached."""

    def __init__(self, spec: Bottleneck, delta: Callable[[Tensor], Tensor]) -> None:
        self.spec = spec
        self.delta = delta
        self.pending: Tensor | None = None
        self.added = False

    def read(self, position: str, value: Tensor) -> None:
        if position == self.spec.source:
            self.pending = self.delta(value)

    def pass_through(self, position: str, value: Tensor) -> Tensor:
        """A position of the stream or the text: read there, then add there."""
        self.read(position, value)
        if position != self.spec.sink:
            return value
        assert self.pending is not None, f"{position} is reached before {self.spec.source}"
        self.added = True
        return value + self.pending


def transformer_forward(block: Any, spec: Bottleneck, tensors: Tensors) -> Callable[..., Tensor]:
    """forward of a BasicTransformerBlock with the adapter."""

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        assert not cross_attention_kwargs
        tap = Tap(spec, lambda x: linear_delta(spec, tensors, x))
        h, text = tap.pass_through("attn1_in", hidden_states), encoder_hidden_states
        if block.norm_type == "layer_norm":
            normal, gate1, gate2 = block.norm1(h), 1.0, 1.0
            norm2, norm3 = block.norm2, block.norm3
        elif block.norm_type == "ada_norm_single":
            assert timestep is not None
            table = block.scale_shift_table + timestep.view(len(h), 6, -1)
            shift1, scale1, gate1, shift2, scale2, gate2 = (table[:, row : row + 1] for row in range(6))
            normal = block.norm1(h) * (1 + scale1) + shift1
            norm2 = nn.Identity()

            def norm3(h):
                return block.norm2(h) * (1 + scale2) + shift2
        else:
            assert block.norm_type == "ada_norm_zero"
            normal, gate1, shift2, scale2, gate2 = block.norm1(
                h, timestep, class_labels, hidden_dtype=h.dtype
            )
            gate1, shift2, scale2, gate2 = (each[:, None] for each in (gate1, shift2, scale2, gate2))
            norm2 = None

            def norm3(h):
                return block.norm3(h) * (1 + scale2) + shift2

        out = block.attn1(normal, encoder_hidden_states=None, attention_mask=attention_mask)
        tap.read("attn1_out", out)
        h = h + gate1 * out
        if block.attn2 is not None:
            assert norm2 is not None
            h = tap.pass_through("attn2_in", h)
            assert text is not None
            text = tap.pass_through("attn2_context", text)
            out = block.attn2(norm2(h), encoder_hidden_states=text, attention_mask=encoder_attention_mask)
            tap.read("attn2_out", out)
            h = h + out
        h = tap.pass_through("ff_in", h)
        out = block.ff(norm3(h))
        tap.read("ff_out", out)
        h = tap.pass_through("block_out", h + gate2 * out)
        assert tap.added
        return h

    return forward


def resnet_forward(block: Any, spec: Bottleneck, tensors: Tensors) -> Callable[..., Tensor]:
    """forward of a ResnetBlock2D with the adapter around the block's own."""
    inner = type(block).forward

    def forward(input_tensor: Tensor, temb: Tensor) -> Tensor:
        tap = Tap(spec, lambda x: convolution_delta(spec, tensors, x))
        y = inner(block, tap.pass_through("res_in", input_tensor), temb)
        y = tap.pass_through("res_out", y)
        assert tap.added
        return y

    return forward


def with_reference(
    model: nn.Module, spec: Bottleneck, tensors: Tensors
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the model that computes with the adapter, and the adapter's tensors, which take gradients.

    tensors: block name + "." + tensor name -> value, for every block of the kind
    """
    model = copy.deepcopy(model).requires_grad_(False)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    kind, make = (
        (ResnetBlock2D, resnet_forward)
        if spec.source.startswith("res")
        else (BasicTransformerBlock, transformer_forward)
    )
    left = set(leaves)
    for name, block in model.named_modules():
        if isinstance(block, kind):
            own = {
                key.removeprefix(f"{name}."): leaf
                for key, leaf in leaves.items()
                if key.startswith(f"{name}.")
            }
            left -= {f"{name}.{key}" for key in own}
            block.forward = make(block, spec, own)
    assert not left, f"tensors of no block: {sorted(left)}"
    return model, leaves
