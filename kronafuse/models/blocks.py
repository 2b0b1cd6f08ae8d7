"""The blocks of a diffusers model that bottleneck adapters sit in, and which positions each of them has."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn.bottleneck_spec import Bottleneck
from ..nn.positions import CONTEXT, POSITIONS, RESNET, TRANSFORMER
from .sites import attention_blocks, listed


@dataclass(frozen=True)
class Block:
    """One block of a model: its name, the module, and (N, K) of an adapter with a spec's positions there."""

    name: str
    module: nn.Module
    size: tuple[int, int]


def select_blocks(
    model: nn.Module, spec: Bottleneck, *, allow_partial: bool
) -> tuple[list[Block], dict[str, list[str]]]:
    """The blocks that have both positions, in the model's order, and the attention blocks that are left out.

    Raises ValueError where no block has them, with the positions that there are, and where some attention
    stays without an adapter although others get one, unless `allow_partial`.
    """
    kind = spec.block
    blocks = blocks_of(model, kind)
    if not blocks:
        others = Counter(
            type(each).__name__ for each in model.modules() if type(each).__name__.endswith("Block")
        )
        existing = ", ".join(f"{name} ({count})" for name, count in others.items())
        raise ValueError(
            f"attach: positions {spec.source!r} and {spec.sink!r} are those of diffusers'"
            f" {CLASSES[kind][1]}, and {type(model).__name__} has none; its blocks: {existing or 'none'}"
        )
    lacking = {name: _lacking(block, kind, spec) for name, block in blocks.items()}
    chosen = [
        Block(name, block, size_at(block, spec)) for name, block in blocks.items() if lacking[name] is None
    ]
    if not chosen:
        name = next(iter(blocks))
        raise ValueError(
            f"attach: no block of {type(model).__name__} can have the adapter: {lacking[name]}; positions of its"
            f" {len(blocks)} blocks: {', '.join(positions_of(blocks[name], kind))}"
        )
    left = {name: [reason] for name, reason in lacking.items() if reason is not None}
    if kind != RESNET:
        inside = [f"{each}." for each in blocks]
        for name, module in attention_blocks(model).items():
            if name not in blocks and not name.startswith(tuple(inside)):
                left[name] = [f"{type(module).__name__}, in no {CLASSES[kind][1]}"]
    if left and not allow_partial:
        raise ValueError(
            f"attach: {len(left)} blocks of {type(model).__name__} would have no adapter: "
            + listed([f"{name} ({', '.join(why)})" for name, why in left.items()], 4)
            + ". Pass allow_partial=True to leave them without."
        )
    return chosen, left


CLASSES = {
    TRANSFORMER: ("diffusers.models.attention", "BasicTransformerBlock"),
    RESNET: ("diffusers.models.resnet", "ResnetBlock2D"),
}
"""Kind of block -> where diffusers has its class."""


def blocks_of(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """The model's blocks of a kind by name. A module that is no diffusers model has none."""
    module, name = CLASSES[kind]
    found = getattr(sys.modules.get(module), name, None)
    if found is None:
        return {}  # diffusers has not been loaded, so none of its blocks is here
    return {name: block for name, block in model.named_modules() if isinstance(block, found)}


def positions_of(block: nn.Module, kind: str) -> tuple[str, ...]:
    """The positions that this block has, in order."""
    own = tuple(name for name, each in POSITIONS.items() if each.block == kind)
    if kind == RESNET or getattr(block, "attn2", None) is not None:
        return own
    return tuple(name for name in own if not name.startswith("attn2"))


def _lacking(block: Any, kind: str, spec: Bottleneck) -> str | None:
    """Why the block cannot have the adapter, or None."""
    positions = positions_of(block, kind)
    for name in (spec.source, spec.sink):
        if name not in positions:
            return f"it has no position {name!r}, being without cross-attention"
    if kind == RESNET:
        resampled = block.upsample is not None or block.downsample is not None
        if resampled and spec.source != spec.sink:
            return f"its resampling leaves {spec.source!r} and {spec.sink!r} of different sizes"
        return None
    if hasattr(block, "fuser"):
        return "its GLIGEN layer changes the stream between the positions"
    if spec.source == CONTEXT and not block.attn2.is_cross_attention:
        return f"its second attention reads no text, so there is no {CONTEXT!r}"
    return None


def size_at(block: Any, spec: Bottleneck) -> tuple[int, int]:
    """(N, K) of an adapter with the spec's positions in this block."""
    if spec.block != RESNET:
        width = int(block.attn2.cross_attention_dim if spec.source == CONTEXT else block.dim)
        return width, width
    channels = {"res_in": int(block.in_channels), "res_out": int(block.conv2.out_channels)}
    return channels[spec.sink], channels[spec.source]
