"""Blocks of a U-Net by diffusers' names and by those of the LDM code, in which Stable Diffusion was released.

diffusers                          LDM, two ResBlocks a down level
down_blocks.i.resnets.j            input_blocks.{3i + j + 1}.0
down_blocks.i.attentions.j         input_blocks.{3i + j + 1}.1
mid_block.resnets.j, attentions.0  middle_block.{2j}, middle_block.1
up_blocks.i.resnets.j              output_blocks.{3i + j}.0
up_blocks.i.attentions.j           output_blocks.{3i + j}.1

A down level takes three places, its downsampler the third; an up level takes three, with three ResBlocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

PLACES = 3
"""Places a level takes on either side."""

COUNTS = {"down": PLACES - 1, "up": PLACES}
"""ResBlocks of a level, and attentions where it has any."""

MAX_LEVELS, MAX_LAYERS = 12, 64
"""Levels of a U-Net and layers of an attention that are named; Stable Diffusion XL has 3 and 10."""

_N = r"([0-9]{1,3})"
DIFFUSERS = re.compile(
    rf"(?:(down|up)_blocks\.{_N}|(mid)_block)\.(?:resnets\.{_N}|attentions\.{_N}\.transformer_blocks\.{_N})"
)
LDM = re.compile(rf"(?:(input|output)_blocks\.{_N}|(middle)_block)\.{_N}(?:\.transformer_blocks\.{_N})?")


@dataclass(frozen=True)
class UNetBlock:
    """A ResBlock or a transformer block.

    side:  "down", "mid" or "up"
    level: of its side, 0 in the middle
    index: among the ResBlocks or attentions of its level
    layer: in its attention; None for a ResBlock
    """

    side: str
    level: int
    index: int
    layer: int | None = None

    @property
    def diffusers(self) -> str:
        """The module's path in a diffusers U-Net."""
        place = "mid_block" if self.side == "mid" else f"{self.side}_blocks.{self.level}"
        if self.layer is None:
            return f"{place}.resnets.{self.index}"
        return f"{place}.attentions.{self.index}.transformer_blocks.{self.layer}"

    @property
    def ldm(self) -> str:
        """The module's path in an LDM U-Net."""
        part = 0 if self.layer is None else 1
        if self.side == "mid":
            name = f"middle_block.{part or 2 * self.index}"
        elif self.side == "down":
            name = f"input_blocks.{PLACES * self.level + self.index + 1}.{part}"
        else:
            name = f"output_blocks.{PLACES * self.level + self.index}.{part}"
        return name if self.layer is None else f"{name}.transformer_blocks.{self.layer}"

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sorts blocks as a diffusers U-Net registers them."""
        return ("down", "up", "mid").index(self.side), self.level, self.index, self.layer or 0


def from_diffusers(name: str) -> UNetBlock | None:
    """The block of this path in diffusers, None where the layout has no such block."""
    match = DIFFUSERS.fullmatch(name)
    if match is None:
        return None
    side, level, middle, resnet, attention, layer = match.groups()
    index = int(attention if resnet is None else resnet)
    block = UNetBlock(side or middle, int(level or 0), index, None if layer is None else int(layer))
    return block if block.diffusers == name and _exists(block) else None


def from_ldm(name: str) -> UNetBlock | None:
    """The block of this path in LDM, None where there is none."""
    match = LDM.fullmatch(name)
    if match is None:
        return None
    side, place, _, part, layer = match.groups()
    depth = None if layer is None else int(layer)
    if side is None:
        index = int(part) // 2 if depth is None else 0
        block = UNetBlock("mid", 0, index, depth)
    else:
        level, index = divmod(int(place) - (side == "input"), PLACES)
        block = UNetBlock("down" if side == "input" else "up", level, index, depth)
    return block if block.ldm == name and _exists(block) else None


def _exists(block: UNetBlock) -> bool:
    return (
        0 <= block.level < MAX_LEVELS
        and (block.layer or 0) < MAX_LAYERS
        and block.index < _count(block.side, block.layer is None)
    )


def _count(side: str, resnets: bool) -> int:
    return COUNTS.get(side, 2 if resnets else 1)


def absent(blocks: Collection[UNetBlock]) -> list[UNetBlock]:
    """What the U-Net of these blocks has beside them, in its order; an adapter sits on every block of its kind.

    blocks: ResBlocks, or transformer blocks

    Up level i mirrors down level L - i: attentions on both or on neither, all of one depth, which the
    middle shares with the level next to it. L, the last level, is the one that leaves the fewest absent.
    """
    levels = [block.level for block in blocks]
    lasts = range(max(levels, default=0), 2 * max(levels, default=0) + 1)
    return min((_absent(blocks, last) for last in lasts), key=len)


def _absent(blocks: Collection[UNetBlock], last: int) -> list[UNetBlock]:
    resnets = any(block.layer is None for block in blocks)
    levels = {
        last - block.level if block.side == "up" else block.level for block in blocks if block.side != "mid"
    }
    pairs = [
        {"down": level, "up": last - level} for level in (range(last + 1) if resnets else sorted(levels))
    ]
    whole: list[UNetBlock] = []
    for pair in [*pairs, {"mid": 0}]:
        alike = {**pairs[-1], **pair} if pairs and "mid" in pair else pair
        depths = [block.layer or 0 for block in blocks if alike.get(block.side) == block.level]
        layers = (None,) if resnets else range(1 + max(depths, default=0))
        for side, level in pair.items():
            places = product(range(_count(side, resnets)), layers)
            whole += [UNetBlock(side, level, *place) for place in places]
    return sorted(set(whole) - set(blocks), key=lambda block: block.order)
