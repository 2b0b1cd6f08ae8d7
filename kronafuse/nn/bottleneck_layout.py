"""Which tensors one bottleneck adapter has, and how they start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUPS = 32
"""Groups of the ResBlock form's GroupNorm; where 32 does not divide the channels, their greatest common divisor."""


@dataclass(frozen=True)
class Start:
    """Filled with `value`; or drawn, uniform in ±spread or normal with that standard deviation."""

    value: float = 0.0
    uniform: float | None = None
    normal: float | None = None

    def fill(self, tensor: Tensor) -> None:
        """Fill the tensor in place."""
        if self.uniform is not None:
            nn.init.uniform_(tensor, -self.uniform, self.uniform)
        elif self.normal is not None:
            nn.init.normal_(tensor, std=self.normal)
        else:
            nn.init.constant_(tensor, self.value)


ZERO, ONE = Start(), Start(1.0)

Trained = dict[str, tuple[tuple[int, ...], Start]]
"""Name -> (size, start)."""


@dataclass(frozen=True)
class BottleneckLayout:
    """One adapter from K to N numbers (channels, in a ResBlock).

    form:          "dense", "compacter", "krona" or "krona_res"
    convolution:   the ResBlock form: GroupNorm, SiLU, 3×3, activation, 3×3
    width:         H; None for the krona forms
    activation:    between down and up
    terms:         products that the compacter form sums
    rank:          of each of their right factors, or None
    factors:       (N1, K1) of the krona forms
    scale:         multiplies what is added
    zero_up:       whether the delta starts at 0; else both maps start as torch's layers do
    dtype:         of the tensors
    """

    n: int
    k: int
    form: str
    convolution: bool
    width: int | None
    activation: str
    terms: int
    rank: int | None
    factors: tuple[int, int] | None
    scale: float
    zero_up: bool
    dtype: torch.dtype

    @property
    def trained(self) -> Trained:
        """Size and start of every tensor, by name."""
        if self.factors is not None:
            return self._krona(*self.factors)
        assert self.width is not None
        area = 9 if self.convolution else 1
        before: Trained = {"norm_weight": ((self.k,), ONE), "norm_bias": ((self.k,), ZERO)}
        return {
            **(before if self.convolution else {}),
            **self._map("down", self.width, self.k),
            "down_bias": ((self.width,), Start(uniform=1 / math.sqrt(area * self.k))),
            **self._map("up", self.n, self.width),
            "up_bias": (
                (self.n,),
                ZERO if self.zero_up else Start(uniform=1 / math.sqrt(area * self.width)),
            ),
        }

    def _map(self, name: str, rows: int, columns: int) -> Trained:
        """A map from `columns` to `rows` numbers, whose entries have the variance of torch's Linear."""
        zero = self.zero_up and name == "up"
        kernel = (3, 3) if self.convolution else ()
        uniform = Start(uniform=1 / math.sqrt(columns * math.prod(kernel)))
        if self.form == "dense":
            return {name: ((rows, columns, *kernel), ZERO if zero else uniform)}
        terms = self.terms
        # Variances: 1/terms of A, 1/(3 columns) of B, so that their sum of products has 1/(3 columns).
        left = {f"{name}_a": ((terms, terms, terms), Start(normal=1 / math.sqrt(terms)))}
        size = (terms, rows // terms, columns // terms)
        if self.rank is None:
            return {**left, f"{name}_b": (size, ZERO if zero else uniform)}
        return {
            **left,
            f"{name}_b": (
                (terms, size[1], self.rank),
                ZERO if zero else Start(normal=1 / math.sqrt(self.rank)),
            ),
            f"{name}_b_down": ((terms, self.rank, size[2]), uniform),
        }

    def _krona(self, n1: int, k1: int) -> Trained:
        n2, k2 = self.n // n1, self.k // k1
        both: Trained = {
            "a": ((n1, k1), Start(normal=1 / n1)),
            "b": ((n2, k2), ZERO if self.zero_up else Start(uniform=1 / math.sqrt(k2))),
        }
        residual = {"residual_scale": ((), ZERO if self.zero_up else ONE)}
        return {**both, **(residual if self.form == "krona_res" else {})}

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Name -> size of every trained tensor, in the order in which they are registered and saved."""
        return {name: size for name, (size, _) in self.trained.items()}

    @property
    def parameters(self) -> int:
        """Trained numbers of this adapter."""
        return sum(math.prod(size) for size in self.sizes.values())

    @property
    def groups(self) -> int:
        """Groups of the ResBlock form's GroupNorm."""
        return math.gcd(GROUPS, self.k)

    def start(self, name: str, tensor: Tensor) -> None:
        """Fill one tensor as the spec's `init` says."""
        self.trained[name][1].fill(tensor)

    def __str__(self) -> str:
        if self.factors is not None:
            n1, k1 = self.factors
            residual = " + residual" if self.form == "krona_res" else ""
            return f"({n1}x{k1}) x ({self.n // n1}x{self.k // k1}){residual}"
        between = f"{self.width} {self.activation}"
        if self.form == "compacter":
            rank = "" if self.rank is None else f" of rank {self.rank}"
            between += f", {self.terms} products{rank}"
        kernels = " by 3x3 convolutions" if self.convolution else ""
        return f"{self.k} -> {between} -> {self.n}{kernels}"
