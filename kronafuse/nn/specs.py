"""What to put on a model: KronA, LoKr and LoRA as frozen records."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from ..checks import FLOATING
from ..shapes import KronShape
from .factorization import divisors, factorization
from .fields import flag, number, plain
from .layout import Layout, Start
from .spec import Spec

DEFAULT = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections by diffusers' names; on a CLIP text encoder they stand for its own names."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec(Spec):
    """What every record of an adapter on linear layers has.

    targets:    suffixes of module names, as ("to_q", "attn2.to_k", "ff.net.2")
    per_target: suffix -> fields that differ there, or another spec; the longest matching suffix counts
    scale:      multiplies the delta
    shuffled:   output index n2·N1 + n1 (DiffuseKronA's released layout)
    init:       how the factors start; the delta starts at 0 in every case
    dtype:      of the factors
    """

    targets: tuple[str, ...] = DEFAULT
    per_target: Mapping[str, Any] | None = None
    scale: float = 1.0
    shuffled: bool = False
    init: str = ""
    dtype: torch.dtype = torch.float32

    INITS: ClassVar[Mapping[str, Mapping[str, Start]]] = {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        targets: object = self.targets
        if (
            not isinstance(targets, (tuple, list))
            or not targets
            or not all(isinstance(each, str) for each in targets)
        ):
            raise TypeError(f"{name}: targets must be a tuple of module-name suffixes; got {targets!r}")
        self._set("targets", tuple(targets))
        if not isinstance(self.init, str) or self.init not in self.INITS:
            raise ValueError(f"{name}: init must be one of {', '.join(self.INITS)}; got {self.init!r}")
        if self.dtype not in FLOATING:
            raise TypeError(
                f"{name}: dtype must be torch.float32, float16, bfloat16 or float64; got {self.dtype!r}"
            )
        self._set("scale", number(name, "scale", self.scale))
        self._set("shuffled", flag(name, "shuffled", self.shuffled))
        if self.per_target is not None:
            if not isinstance(self.per_target, Mapping):
                raise TypeError(f"{name}: per_target must map suffixes to fields; got {self.per_target!r}")
            self._set("per_target", {suffix: self._override(suffix) for suffix in self.per_target})

    def _set(self, field_name: str, value: object) -> None:
        """Put a field's checked and plain value in its place, while the record is being made."""
        object.__setattr__(self, field_name, value)

    def _override(self, suffix: str) -> AdapterSpec:
        assert self.per_target is not None
        value = self.per_target[suffix]
        if not isinstance(suffix, str) or not isinstance(value, (AdapterSpec, Mapping)):
            raise TypeError(
                f"{type(self).__name__}: per_target must map each suffix to fields that differ there, or to"
                f" another spec; got {suffix!r}: {value!r}"
            )
        if isinstance(value, AdapterSpec):
            return replace(value, per_target=None)
        known = {each.name for each in fields(self)} - {"targets", "per_target"}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: per_target[{suffix!r}] has unknown fields {', '.join(unknown)};"
                f" there are {', '.join(sorted(known))}"
            )
        return replace(self, per_target=None, **value)

    def at(self, name: str) -> AdapterSpec:
        """The spec that counts for the module of this name."""
        if not self.per_target:
            return self
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        ends = (name[start:] for start in starts)  # the longest first
        return next((self.per_target[end] for end in ends if end in self.per_target), self)

    def stored_as(self, dtype: torch.dtype) -> AdapterSpec:
        """The record of the same adapter with its factors in this dtype, those of `per_target` too."""
        overrides = self.per_target
        if overrides is not None:
            overrides = {suffix: replace(each, dtype=dtype) for suffix, each in overrides.items()}
        return replace(self, dtype=dtype, per_target=overrides)

    @abstractmethod
    def layout(self, n: int, k: int, name: str = "") -> Layout:
        """The factors for a Linear of N out_features and K in_features; `name` appears in errors."""

    def _layout(
        self, shape: KronShape, *, has_a: bool = True, a_rank: int | None = None, scale: float
    ) -> Layout:
        starts = tuple(self.INITS[self.init].items())
        return Layout(shape, has_a, a_rank, scale, self.shuffled, starts, self.dtype)


@dataclass(frozen=True)
class KronA(AdapterSpec):
    """W + scale · (A ⊗ B) with full factors A (N1, K1) and B (N/N1, K/K1).

    factors: (N1, K1). DiffuseKronA writes its (a1, a2) with the input side first: its (4, 64) is our (64, 4).
    init:    "diffusekrona": A ~ Normal(0, 1/N1), B = 0; "kaiming": A Kaiming-uniform, B = 0
    The other fields are `AdapterSpec`'s.

    Source: DiffuseKronA, arXiv 2402.17412, sections 3.2 and D.2, and its released code; KronA, arXiv
    2212.10650.
    """

    factors: tuple[int, int] = (64, 4)
    init: str = field(default="diffusekrona", kw_only=True)

    INITS: ClassVar[Mapping[str, Mapping[str, Start]]] = {
        "diffusekrona": {"lokr_a": "normal", "lokr_b": "zero"},
        "kaiming": {"lokr_a": "kaiming", "lokr_b": "zero"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        pair: object = self.factors
        factors = tuple(plain(each) for each in pair) if isinstance(pair, (tuple, list)) else ()
        if len(factors) != 2 or not all(type(each) is int and each > 0 for each in factors):
            raise ValueError(f"KronA: factors must be two positive integers (N1, K1); got {pair!r}")
        self._set("factors", factors)

    def layout(self, n: int, k: int, name: str = "") -> Layout:
        """A (N1, K1) and B (N/N1, K/K1); ValueError where they do not divide, with what does."""
        n1, k1 = self.factors
        wrong = []
        if n % n1:
            wrong.append(f"N1 = {n1} does not divide N = {n}, whose divisors are {_listed(divisors(n))}")
        if k % k1:
            wrong.append(f"K1 = {k1} does not divide K = {k}, whose divisors are {_listed(divisors(k))}")
        if wrong:
            raise ValueError(
                f"KronA: factors (N1, K1) = ({n1}, {k1}) must divide the layer's (N, K)"
                f"{f' of {name}' if name else ''}: {'; '.join(wrong)}. Choose others there with per_target."
            )
        return self._layout(KronShape(n1, k1, n // n1, k // k1), scale=self.scale)


@dataclass(frozen=True)
class LoKr(AdapterSpec):
    """W + scale · alpha/R · (A ⊗ B), with N = N1·N2 and K = K1·K2 split by `factor`.

    factor:         N1 and K1 where it divides, else the nearest by LoKr's rule; -1 for the nearest to a
                    square
    rank:           R of B = B_up · B_down, used where R < max(N2, K2)/2; None keeps B full
    alpha:          None for R. Counts only where some factor has rank R; full factors have alpha/R = 1
    decompose_both: A = A_up · A_down too, where R < max(N1, K1)/2
    init:           "lycoris": A and B_up Kaiming-uniform, B_down = 0, or B = 0 where it is full
    The other fields are `AdapterSpec`'s.

    Source: LoKr, arXiv 2309.14859, equations 4 and 5, and its released code.
    """

    factor: int = 8
    rank: int | None = None
    alpha: float | None = None
    decompose_both: bool = field(default=False, kw_only=True)
    init: str = field(default="lycoris", kw_only=True)

    INITS: ClassVar[Mapping[str, Mapping[str, Start]]] = {
        "lycoris": {
            "lokr_a": "kaiming",
            "lokr_a_up": "kaiming",
            "lokr_a_down": "kaiming",
            "lokr_b_up": "kaiming",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = plain(self.factor)
        if type(factor) is not int or (factor < 1 and factor != -1):
            raise ValueError(f"LoKr: factor must be a positive integer or -1; got {self.factor!r}")
        self._set("factor", factor)
        self._set("rank", None if self.rank is None else _checked_rank("LoKr", self.rank))
        self._set("alpha", None if self.alpha is None else number("LoKr", "alpha", self.alpha))
        self._set("decompose_both", flag("LoKr", "decompose_both", self.decompose_both))
        if self.decompose_both and self.rank is None:
            raise ValueError("LoKr: decompose_both needs a rank; got rank=None")

    def layout(self, n: int, k: int, name: str = "") -> Layout:
        """A (N1, K1) ⊗ B (N2, K2) by the factorization rule; every layer has one."""
        n1, n2 = factorization(n, self.factor)
        k1, k2 = factorization(k, self.factor)
        rank = self.rank if self.rank is not None and 2 * self.rank < max(n2, k2) else None
        split_a = self.decompose_both and self.rank is not None and 2 * self.rank < max(n1, k1)
        a_rank = self.rank if split_a else None
        used = rank if rank is not None else a_rank
        scale = self.scale if used is None or self.alpha is None else self.scale * self.alpha / used
        starts = dict(self.INITS[self.init])
        up = starts.pop("lokr_b_up")
        starts |= {"lokr_b": "zero"} if rank is None else {"lokr_b": up, "lokr_b_down": "zero"}
        shape = KronShape(n1, k1, n2, k2, rank)
        return Layout(shape, True, a_rank, scale, self.shuffled, tuple(starts.items()), self.dtype)


@dataclass(frozen=True)
class LoRA(AdapterSpec):
    """W + scale · alpha/R · B_up · B_down, with B_up (N, R) and B_down (R, K).

    rank:  R
    alpha: None for R
    init:  "lora": B_down Kaiming-uniform, B_up = 0
    The other fields are `AdapterSpec`'s; `shuffled` changes nothing where N1 = 1.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    rank: int = 16
    alpha: float | None = None
    init: str = field(default="lora", kw_only=True)

    INITS: ClassVar[Mapping[str, Mapping[str, Start]]] = {
        "lora": {"lokr_b": "zero", "lokr_b_down": "kaiming"}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("rank", _checked_rank("LoRA", self.rank))
        self._set("alpha", None if self.alpha is None else number("LoRA", "alpha", self.alpha))

    def layout(self, n: int, k: int, name: str = "") -> Layout:
        """B_up (N, R) and B_down (R, K); every layer has one."""
        scale = self.scale if self.alpha is None else self.scale * self.alpha / self.rank
        return self._layout(KronShape(1, 1, n, k, self.rank), has_a=False, scale=scale)


def _checked_rank(name: str, value: object) -> int:
    rank = plain(value)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{name}: rank must be a positive integer; got {value!r}")
    return rank


def _listed(numbers: list[int], most: int = 24) -> str:
    shown = ", ".join(str(each) for each in numbers[:most])
    return shown + (", ..." if len(numbers) > most else "")
