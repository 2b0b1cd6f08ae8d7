"""Which CUDA kernel serves which map: by shapes and by the form of the device's GEMM, before anything is launched.

No GPU has measured these rules: they weigh steps of matrix products, of 32 values of k in a tile of 128 features, and
launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native_cuda_calls as calls
from .maps import KronMap

DENSE, BLOCK, MIX, APART = "dense", "block", "mix", "apart"
"""A second product inside the GEMM: by its dense form L, by I ⊗ B, by A ⊗ I with multiply-adds; or after it."""

TILE_N, TILE_K = 128, 32
MIX_TERMS = 16
"""Most multiply-adds for each element of y that a tile does beside its matrix products."""
BUILD_STEPS = 4
"""Steps over k that take about as long as the launch that builds an L."""
ONE_PASS_SIDES = (40, 16)
"""Fewest rows and columns of B with which the one-pass kernel fills its tiles: below, it multiplies zeros."""


HOPPER_TILES, HOPPER_FILL = (96, 128, 160, 192), 0.8
"""Columns of the tiles of its Hopper form, and how full the best of them must be."""
WIDE_DOWN = 288
"""Rows of a D for which `shrink` reads x three times."""
GEMMS, FATS = ("hopper", "plain"), ("one_pass", "two_kernels")
_forced: list[tuple[str | None, str | None]] = []
"""Those in force, the innermost last: of the whole process, since a backward on a GPU runs in autograd's own thread."""


@contextmanager
def forced(*, gemm: str | None = None, fat: str | None = None) -> Iterator[None]:
    """Within it these forms are taken wherever they exist; None leaves the choice. ValueError for unknown names."""
    for name, form, forms in (("gemm", gemm, GEMMS), ("fat", fat, FATS)):
        if form is not None and form not in forms:
            raise ValueError(f"route {name} must be one of {', '.join(forms)}; got {form!r}")
    _forced.append((gemm, fat))
    try:
        yield
    finally:
        _forced.remove((gemm, fat))


def on_hopper(device: torch.device) -> bool:
    """Whether the GEMM takes its Hopper form, for calls that this form can serve."""
    return not (_forced and _forced[-1][0] == "plain") and calls.has_hopper(device)


def fat_config(device: torch.device) -> int:
    """The one-pass kernel's configuration: by its rule, or the first of the plain form where that is forced."""
    plain = _forced and _forced[-1][0] == "plain" and calls.has_hopper(device)
    return 0 if plain else calls.CHOOSE


def tail_kind(kron: KronMap, dtype: torch.dtype, transposed: bool, hopper: bool) -> str:
    """How the second product of a map joins the GEMM with a weight in this layout.

    The Hopper form copies operands as they lie in memory: dense ones, and B as it is where it is in the compute dtype.
    The plain one rounds factors as it reads them, and has multiply-adds for A ⊗ I.
    """
    if kron.order == "b_first":
        few = kron.left[1] <= MIX_TERMS and not hopper
        return MIX if few else DENSE if kron.thin else APART
    if not kron.thin:
        return BLOCK
    as_it_is = kron.b.dtype == dtype and kron.b.stride(0 if transposed else 1) == 1 and kron.inner[1] % 8 == 0
    if _is_shuffled(kron) or (hopper and not (as_it_is and kron.out_scale is None)):
        return DENSE
    return BLOCK if _block_pays(kron) else DENSE


def _is_shuffled(kron: KronMap) -> bool:
    """Whether the output's features are permuted: blocks would be stored element by element."""
    return kron.out_shuffled and 1 not in (kron.left[0], kron.right[0])


def _block_pays(kron: KronMap) -> bool:
    """Whether I ⊗ B takes fewer steps than its dense form and the launch that builds it."""
    (left, _), right, rank = kron.left, kron.right[0], kron.inner[1]
    straddles = 0 if right % TILE_N == 0 or TILE_N % right == 0 else 1
    groups = min(left, -(-TILE_N // right) + straddles)
    return groups * -(-rank // TILE_K) <= -(-left * rank // TILE_K) + BUILD_STEPS


def in_one_pass(kron: KronMap, kept: bool, weight: bool, hopper: bool) -> bool:
    """Whether the map is applied to x inside the GEMM's main loop.

    kept:   whether T is computed anyway, for a gradient
    weight: whether the same launch multiplies x by W, without which there is no Hopper form of it
    """
    if kron.thin or kron.a is None or kron.b_down is not None:
        return False
    fat = _forced[-1][1] if _forced else None
    if fat is not None:
        return fat == "one_pass"
    return not kept and (weight and _fills_hopper(kron) if hopper else _fills_plain(kron))


def _fills_plain(kron: KronMap) -> bool:
    return kron.right[0] >= ONE_PASS_SIDES[0] and kron.right[1] >= ONE_PASS_SIDES[1]


def _fills_hopper(kron: KronMap) -> bool:
    """Whether that form can serve, in tiles of one group each that are mostly full."""
    features, contracted = kron.right
    if features % 8 or contracted % 8 or kron.in_scale is not None or kron.in_shuffled or kron.out_shuffled:
        return False
    executed = min(-(-features // tile) * tile for tile in HOPPER_TILES)
    return features >= HOPPER_FILL * executed


def by_gemm(kron: KronMap, x: Tensor) -> bool:
    """Whether the first product is a GEMM on the rows of x: a D so wide that `shrink` would read x several times."""
    down = kron.b if kron.b_down is None else kron.b_down
    scaled = kron.in_scale is not None or isinstance(kron.scale, Tensor) or kron.scale != 1
    merges = x.is_contiguous() and (kron.left[1] == 1 or not kron.in_shuffled)
    return kron.order != "a_first" and down.shape[0] > WIDE_DOWN and merges and not scaled


@dataclass(frozen=True)
class Read:
    """One launch of first products: which maps it serves, and whether by their dense forms."""

    indices: list[int]
    dense: bool


def shared_reads(maps: Sequence[KronMap], slots: int) -> list[Read]:
    """Launches that read x as few times as `slots` maps at a time allow.

    Maps on the same rows of x share a read as they are; thin ones on different rows by their dense forms.
    """
    thin = {_rows(kron) for kron in maps if kron.thin}
    groups: dict[object, list[int]] = {}
    for index, kron in enumerate(maps):
        key = "dense" if kron.thin and len(thin) > 1 else _rows(kron)
        groups.setdefault(key, []).append(index)
    return [
        Read(indices[first : first + slots], key == "dense")
        for key, indices in groups.items()
        for first in range(0, len(indices), slots)
    ]


def _rows(kron: KronMap) -> tuple[object, ...]:
    """What maps have in common whose first factors contract the same rows of x."""
    left, right = kron.left[1], kron.right[1]
    shuffled = kron.in_shuffled and 1 not in (left, right)
    return kron.order == "a_first", left, right, shuffled, id(kron.in_scale)
