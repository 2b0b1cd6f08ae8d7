"""Which way round an adapter is multiplied out, from exact integer costs.

Every adapter is a down map x → T and an up map T → ΔY around an intermediate T. The order that costs the
fewest multiply-accumulates per token is taken, once per layer and for both directions: the backward of an
order is the mirrored order on the transposed factors, at the same cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from .shapes import KronShape

Order = Literal["a_first", "b_first", "low_rank"]

THIN_WIDTH = 256
"""Widest T that counts as thin; K/4 is the other bound."""
SMALL_BYTES = 1 << 20
"""A fat T of fewer bytes is held until backward where it is there: computing it again takes longer than it is worth."""


@dataclass(frozen=True)
class Choice:
    """The chosen order, T's width per token, and whether T is thin (and so saved for backward)."""

    order: Order
    width: int
    thin: bool
    macs: int


@lru_cache(maxsize=4096)
def choose(shape: KronShape) -> Choice:
    """The cheapest order of `shape`; ties go to A first, whose up map adds into y in place."""
    n1, k1, n2, k2, rank = shape.n1, shape.k1, shape.n2, shape.k2, shape.rank
    order: Order
    if rank is not None:
        mix = n1 * k1 * rank if n1 * k1 > 1 else 0
        order, width, macs = "low_rank", max(n1, k1) * rank, rank * shape.k + mix + rank * shape.n
    else:
        a_first = n1 * shape.k + k2 * shape.n
        b_first = n2 * shape.k + k1 * shape.n
        if a_first <= b_first:
            order, width, macs = "a_first", n1 * k2, a_first
        else:
            order, width, macs = "b_first", k1 * n2, b_first
    return Choice(order, width, width <= min(THIN_WIDTH, shape.k // 4), macs)


@dataclass(frozen=True)
class Plan:
    """What one adapted layer costs at M tokens; `str()` gives it as a table.

    `macs_per_token` is the adapter's own; `flops` counts 2 for a multiply-accumulate, forward, base included;
    `bytes_forward` is the least traffic (x, W and the factors read, y written);
    `saved_bytes` is what the adapter adds to x in memory for backward; a fat T of fewer than SMALL_BYTES, which an
    eager call may hold beside, is not counted.
    """

    shape: KronShape
    tokens: int
    dtype: torch.dtype
    order: Order
    width: int
    thin: bool
    macs_per_token: int
    flops: int
    base_flops: int
    bytes_forward: int
    saved_bytes: int
    floor_us: float | None
    device: str | None

    @property
    def overhead(self) -> float:
        """The adapter's FLOPs over the frozen layer's."""
        return self.flops / self.base_flops - 1.0 if self.base_flops else 0.0

    def __str__(self) -> str:
        shape = self.shape
        right = f"({shape.n2}x{shape.k2})"
        if shape.rank is not None:
            right = f"({shape.n2}x{shape.rank})·({shape.rank}x{shape.k2})"
        rows = [
            (
                "layer",
                f"{shape.k} -> {shape.n}, {self.tokens} tokens, {str(self.dtype).removeprefix('torch.')}",
            ),
            ("adapter", f"({shape.n1}x{shape.k1}) ⊗ {right}, {shape.parameters:,} parameters"),
            ("order", f"{self.order}, T is {self.width} wide ({'thin' if self.thin else 'fat'})"),
            ("FLOPs", f"{self.flops:,} (frozen layer {self.base_flops:,}, +{100 * self.overhead:.2f} %)"),
            ("bytes", f"{self.bytes_forward:,} forward, {self.saved_bytes:,} saved beside x"),
        ]
        if self.floor_us is not None:
            rows.append(("floor", f"{self.floor_us:.1f} µs on {self.device}"))
        return "\n".join(f"{name:<8} {text}" for name, text in rows)


CEILINGS = {"H200": (790e12, 4.3e12)}
"""GPU name part -> (16-bit FLOP/s, bytes/s) measured on such a GPU; a floor is given for these alone."""


def plan(
    M: int,
    n1: int,
    k1: int,
    n2: int,
    k2: int,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
) -> Plan:
    """Order, FLOPs, bytes and floor of one adapted layer with A (N1, K1) ⊗ B (N2, K2) at M tokens.

    rank:   R where B = B_up · B_down
    dtype:  of x, W and y
    device: a device whose name (or "H200") has a measured ceiling gives `floor_us` for 16-bit dtypes; None gives none

    Raises ValueError for sizes below 1 (M may be 0), TypeError for sizes that are no integers.
    """
    sizes = {"n1": n1, "k1": k1, "n2": n2, "k2": k2} | ({} if rank is None else {"rank": rank})
    for name, size in {"M": M, **sizes}.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"plan: {name} must be an integer; got {size!r}")
    if M < 0 or any(size < 1 for size in sizes.values()):
        raise ValueError(f"plan: sizes must be at least 1 and M at least 0; got M={M}, {sizes}")
    shape = KronShape(n1, k1, n2, k2, rank)
    choice = choose(shape)
    size = dtype.itemsize
    base_flops = 2 * M * shape.n * shape.k
    flops = base_flops + 2 * M * choice.macs
    bytes_forward = size * (M * (shape.k + shape.n) + shape.n * shape.k + shape.parameters)
    name, ceilings = _ceilings(device)
    floor = None
    if ceilings and size == 2:
        floor = 1e6 * max(flops / ceilings[0], bytes_forward / ceilings[1])
    return Plan(
        shape, M, dtype, choice.order, choice.width, choice.thin, choice.macs, flops, base_flops, bytes_forward,
        saved_width(shape) * M * size, floor, name,
    )  # fmt: skip


def saved_width(shape: KronShape) -> int:
    """Elements per token that the adapter saves for backward beside x: T where it is thin."""
    choice = choose(shape)
    if not choice.thin:
        return 0
    return shape.k1 * shape.rank if shape.rank is not None else choice.width


def _ceilings(device: str | torch.device | None) -> tuple[str | None, tuple[float, float] | None]:
    if device is None:
        return None, None
    name = str(device)
    if torch.cuda.is_available() and name.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(device))
    return name, next((value for part, value in CEILINGS.items() if part in name), None)
