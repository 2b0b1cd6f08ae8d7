"""Which kernels serve a frozen layer and its fat terms: a measured row where there is one, else predicted time.

Two questions are answered here. Who multiplies x by W: our kernel together with the tails ("fused"), or torch's GEMM,
whose result our kernel then adds the delta to in place ("torch"). And how a fat term with a full B is added: with A X
summed in registers from the tiles of x that the GEMM reads anyway ("one_pass"), or with the first product in memory
("two_kernels").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch

from ...planner import Order
from .. import tuned
from ..kernel_costs import (
    LinearSizes,
    OnePassSizes,
    block_tail_width,
    linear_us,
    mix_us,
    one_pass_us,
    shrink_us,
)
from ..launch import Architecture
from . import one_pass_tuning, reduction_tuning, tuning

TORCH_MACS = 1 << 30
"""Multiply-adds of an fp32 base GEMM from which on another launch, and y read and written once more, are small."""


@dataclass(frozen=True)
class FatRoute:
    """How a fat term with a full B is added."""

    form: str
    FORMS: ClassVar = ("one_pass", "two_kernels")

    def reasons(self, _architecture: Architecture, _dtype: torch.dtype) -> list[str]:
        """Why this is no route; empty where it is one."""
        return _unknown("fat", self.form, self.FORMS)


@dataclass(frozen=True)
class BaseRoute:
    """Who multiplies x by W."""

    form: str
    FORMS: ClassVar = ("fused", "torch")

    def reasons(self, _architecture: Architecture, _dtype: torch.dtype) -> list[str]:
        """Why this is no route; empty where it is one."""
        return _unknown("base", self.form, self.FORMS)


def _unknown(name: str, form: str, forms: tuple[str, ...]) -> list[str]:
    return [] if form in forms else [f"route {name} must be one of {', '.join(forms)}; got {form!r}"]


FUSED, TORCH = BaseRoute("fused"), BaseRoute("torch")
ONE_PASS, TWO_KERNELS = FatRoute("one_pass"), FatRoute("two_kernels")


@contextmanager
def forced(*, fat: str | None = None, base: str | None = None) -> Iterator[None]:
    """Within it these routes are taken wherever they exist; None leaves the choice. ValueError for unknown names.

    It holds for all threads: a backward on a GPU runs in autograd's own.
    """
    wanted: dict[str, FatRoute | BaseRoute] = {}
    if fat is not None:
        wanted["fat_route"] = FatRoute(fat)
    if base is not None:
        wanted["base_route"] = BaseRoute(base)
    for name, form, kind in (("fat", fat, FatRoute), ("base", base, BaseRoute)):
        unknown = [] if form is None else _unknown(name, form, kind.FORMS)
        if unknown:
            raise ValueError(unknown[0])
    with tuned.deciding(lambda choice: wanted.get(choice.kernel)):
        yield


def base_by_torch(
    architecture: Architecture,
    dtype: torch.dtype,
    tokens: int,
    features: int,
    in_features: int,
    transposed: bool,
    terms: int,
    tails: str,
) -> bool:
    """Whether torch's GEMM multiplies x by W (features, in_features), beside this number of terms.

    tails: kinds of the terms' tails, as in "block+dense", which leave the fused kernel different tiles; "none" without

    The rule: where nothing is fused (no terms), one launch either way; and from TORCH_MACS on in fp32, whose products
    our kernel does without tensor cores, or for tf32 in tiles too small for them. Elsewhere the fused kernel: a y
    written and read once more would cost a third of a 1280-wide base GEMM, by bytes and FLOPs.
    """

    def rule() -> BaseRoute:
        large = tokens * features * in_features >= TORCH_MACS
        return TORCH if terms == 0 or (large and dtype == torch.float32) else FUSED

    sizes = (dtype, tokens, features, in_features, transposed, terms, tails)
    return tuned.choose("base_route", BaseRoute, architecture, sizes, rule).form == "torch"


class FatTerm(NamedTuple):
    """A fat term A (O1, I1) = left, B (O2, I2) = right on x (tokens, I1·I2).

    weight:            whether the same launch multiplies x by W
    transposed:        whether W's rows are not contiguous
    descriptors:       whether the one-pass form can read x and W by descriptors
    plain_descriptors: whether the GEMM with tails can
    kept:              whether the first product is computed anyway, for a gradient
    """

    tokens: int
    left: tuple[int, int]
    right: tuple[int, int]
    order: Order
    weight: bool
    transposed: bool
    descriptors: bool
    plain_descriptors: bool
    kept: bool


def in_one_pass(architecture: Architecture, dtype: torch.dtype, term: FatTerm) -> bool:
    """Whether the one-pass form serves the term; the rule: where its predicted time is the lesser."""

    def rule() -> FatRoute:
        one_pass, two_kernels = predicted_us(architecture, dtype, term)
        return ONE_PASS if one_pass < two_kernels else TWO_KERNELS

    sizes = (
        dtype, term.tokens, *term.left, *term.right, term.order, term.weight, term.transposed, term.descriptors,
        term.kept,
    )  # fmt: skip
    return tuned.choose("fat_route", FatRoute, architecture, sizes, rule).form == "one_pass"


@lru_cache(maxsize=4096)
def predicted_us(architecture: Architecture, dtype: torch.dtype, term: FatTerm) -> tuple[float, float]:
    """Predicted time of the layer with this term, in one pass and by two kernels, each with its chosen tile."""
    tokens, left, right = term.tokens, term.left, term.right
    config = one_pass_tuning.one_pass_config(
        architecture, dtype, tokens, left, right, term.weight, term.descriptors
    )
    sizes = OnePassSizes(tokens, left, right, term.weight, not term.weight)
    return (
        one_pass_us(architecture, dtype, sizes, config),
        _two_kernels_us(architecture, dtype, term),
    )


def _two_kernels_us(architecture: Architecture, dtype: torch.dtype, term: FatTerm) -> float:
    """The first product into memory, unless it is there anyway; then the GEMM with the second as its tail."""
    (o1, i1), (o2, i2), tokens = term.left, term.right, term.tokens
    in_features = i1 * i2 if term.weight else 0
    by_blocks = term.order == "a_first" and not tuning.elementwise_tail_pays(o1, i2, o2)
    if by_blocks:
        accumulators = tuning.ACCUMULATORS
    elif term.order == "a_first":
        accumulators = tuning.GATHER_ACCUMULATORS
    else:
        accumulators = tuning.UNALIGNED_ACCUMULATORS if o2 % 16 else tuning.MIX_ACCUMULATORS
    config = tuning.linear_config(
        architecture, dtype, tokens, o1 * o2, in_features, term.transposed, i2 if by_blocks else 0,
        accumulators, term.plain_descriptors,
    )  # fmt: skip
    tail = block_tail_width(config.block_n, o1, o2, i2) if by_blocks else 0
    multiply_adds = 0 if by_blocks else i2 if term.order == "a_first" else i1
    sizes = LinearSizes(tokens, o1 * o2, in_features, tail, multiply_adds, not term.weight)
    time_us = linear_us(architecture, dtype, sizes, config)
    if term.kept:
        return time_us
    if term.order == "a_first":
        first = reduction_tuning.mix_config(dtype, o1, i1)
        return time_us + mix_us(architecture, dtype, tokens * i2, o1, i1, first)
    first = reduction_tuning.shrink_config(dtype, tokens * i1, o2, i2)
    return time_us + shrink_us(architecture, dtype, tokens * i1, o2, i2, first)
