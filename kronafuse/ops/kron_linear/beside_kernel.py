"""The dense L of thin terms, built by spare programs of the launch that computes their T."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..outputs import new_output
from ..triton_common import slot_arguments
from . import tuning
from .dense_kernel import BLOCK_F, BLOCK_T, build_tile, up_factor
from .maps import KronMap


@triton.jit
def build_beside(
    block,
    factor0_ptr, factor1_ptr, factor2_ptr, factor3_ptr, up0_ptr, up1_ptr, up2_ptr, up3_ptr,
    features, width, F1, F2, T2, stride_f, stride_t,
    MIX: tl.constexpr, SHUFFLED: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of one of up to four L (features, width), in programs of a launch that does something else."""
    tiles = tl.cdiv(features, BLOCK_F) * tl.cdiv(width, BLOCK_T)
    if block < tiles:
        build_tile(
            block, factor0_ptr, None, up0_ptr, features, width, F1, F2, T2, stride_f, stride_t,
            0, width, 1, MIX, SHUFFLED, BLOCK_F, BLOCK_T,
        )  # fmt: skip
    if up1_ptr is not None and (block >= tiles) & (block < 2 * tiles):
        build_tile(
            block - tiles, factor1_ptr, None, up1_ptr, features, width, F1, F2, T2, stride_f, stride_t,
            0, width, 1, MIX, SHUFFLED, BLOCK_F, BLOCK_T,
        )  # fmt: skip
    if up2_ptr is not None and (block >= 2 * tiles) & (block < 3 * tiles):
        build_tile(
            block - 2 * tiles, factor2_ptr, None, up2_ptr, features, width, F1, F2, T2, stride_f, stride_t,
            0, width, 1, MIX, SHUFFLED, BLOCK_F, BLOCK_T,
        )  # fmt: skip
    if up3_ptr is not None and block >= 3 * tiles:
        build_tile(
            block - 3 * tiles, factor3_ptr, None, up3_ptr, features, width, F1, F2, T2, stride_f, stride_t,
            0, width, 1, MIX, SHUFFLED, BLOCK_F, BLOCK_T,
        )  # fmt: skip


SLOTS = 4
"""Maps whose L one launch builds."""
BESIDE_ARGUMENTS = tuple(f"{name}{slot}_ptr" for name in ("factor", "up") for slot in range(SLOTS))
BESIDE_SIZES = ("up_features", "up_width", "F1", "F2", "T2", "stride_uf", "stride_ut")
"""Arguments of a kernel that builds L beside its own work."""


class Beside:
    """The L of some maps, to be built by programs of the launch that computes their T.

    maps: of one order, of the same sides, strides and shuffle, without out_scale
    """

    def __init__(self, maps: Sequence[KronMap], dtype: torch.dtype) -> None:
        assert len(maps) <= SLOTS
        self.maps = maps
        self.arguments: dict[str, Any] = dict.fromkeys(BESIDE_ARGUMENTS)
        self.arguments |= dict.fromkeys(BESIDE_SIZES, 0)
        self.constants = {"UPS": len(maps), "MIX": False, "SHUFFLED": False, "UP_F": BLOCK_F, "UP_T": BLOCK_T}
        self.programs = 0
        if maps:
            self._describe(maps, dtype)

    def _describe(self, maps: Sequence[KronMap], dtype: torch.dtype) -> None:
        first = maps[0]
        features, (outer, inner) = first.left[0] * first.right[0], first.inner
        factors = [up_factor(kron) for kron in maps]
        self.ups = [new_output(factor, (features, outer * inner), dtype) for factor in factors]
        sizes = (features, outer * inner, first.left[0], first.right[0], inner, *factors[0].stride())
        self.arguments = {
            **slot_arguments("factor{}_ptr", factors, SLOTS),
            **slot_arguments("up{}_ptr", self.ups, SLOTS),
            **dict(zip(BESIDE_SIZES, sizes, strict=True)),
        }
        self.constants |= {"MIX": first.order == "b_first", "SHUFFLED": first.out_shuffled}
        tiles = tuning.blocks(features, BLOCK_F) * tuning.blocks(outer * inner, BLOCK_T)
        self.programs = len(maps) * tiles

    def keep(self) -> None:
        """Hands the launched L to their maps."""
        for kron, up in zip(self.maps, self.ups if self.maps else [], strict=True):
            kron.dense_up = up


def same_ups(kron: KronMap, other: KronMap) -> bool:
    """Whether one launch can build the L of both beside."""
    return (
        (kron.order == "b_first") == (other.order == "b_first")
        and (kron.left[0], kron.right[0], kron.inner) == (other.left[0], other.right[0], other.inner)
        and kron.out_shuffled == other.out_shuffled
        and up_factor(kron).stride() == up_factor(other).stride()
    )
