"""Where a bottleneck adapter reads and writes, and what is between: a frozen record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction

import torch

from ..checks import ACTIVATIONS, FLOATING, MAX_WIDTH
from .bottleneck_layout import BottleneckLayout
from .fields import number, plain
from .positions import POSITIONS, RESNET, check_pair
from .spec import Spec

INITS = ("zero_up", "paper")
FORMS = ("dense", "compacter", "krona", "krona_res")
KRONA_FORMS = ("krona", "krona_res")
KRONA_PAIR = ("ff_in", "block_out")
"""KronA^B stands beside the whole feed-forward."""
DEFAULT_WIDTH, DEFAULT_TERMS = 60, 4
WIDTH_STEP = 4
"""Widths that a budget chooses among are multiples of this."""


@dataclass(frozen=True)
class Bottleneck(Spec):
    """sink += scale · (Up · act(Down · source + b_down) + b_up) in every block that has both positions.

    source:     what is read, one of `nn.positions.SOURCES`: attn1_in, attn1_out, attn2_in, attn2_context,
                attn2_out, ff_in, ff_out, block_out, res_in, res_out
    sink:       where it is added, one of `nn.positions.SINKS`, in the same kind of block and not before the
                source. In ResBlocks (res_in, res_out) Down and Up are 3×3 convolutions after GroupNorm and
                SiLU
    width:      H, 1 to 256; None where `budget` says it
    activation: "identity", "relu", "sigmoid", "silu" or "gelu"
    scale:      multiplies what is added
    init:       "zero_up": Up and b_up = 0, so that step 0 equals the base model; "paper": both maps as torch's
                layers start, which is how the paper's code was released
    budget:     percent of the model's parameters; `attach` takes the largest width that is a multiple of 4,
                at most 256, and stays within it
    form:       "dense"; "compacter": Down and Up are sums of `terms` Kronecker products A_i ⊗ B_i with
                A_i (terms, terms); "krona": KronA^B, FFN(X) + scale · X (A ⊗ B)ᵀ with X what the feed-forward
                reads, and "krona_res": the same + s_res · X with a trained s_res, both at ff_in -> block_out
    terms:      of the compacter form; divides H, K and N
    rank:       of the compacter form's B_i = B_up · B_down; None keeps them full
    factors:    (N1, K1) of the krona forms
    dtype:      of the trained tensors

    The paper's released code hands its transformer adapters to the optimizer twice, so that they take two
    steps for one. That is not reproduced.

    Source: Xiang et al. 2023, arXiv 2303.18181; Compacter: Mahabadi et al. 2021, arXiv 2106.04647, section 3;
    KronA^B: Edalati et al. 2022, arXiv 2212.10650.
    """

    source: str = "attn2_out"
    sink: str = "ff_in"
    width: int | None = DEFAULT_WIDTH
    _: KW_ONLY
    activation: str = "relu"
    scale: float = 1.0
    init: str = "zero_up"
    budget: float | None = None
    form: str = "dense"
    terms: int = DEFAULT_TERMS
    rank: int | None = None
    factors: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_pair("Bottleneck", self.source, self.sink)
        for name, value, allowed in (
            ("activation", self.activation, ACTIVATIONS),
            ("init", self.init, INITS),
            ("form", self.form, FORMS),
        ):
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"Bottleneck: {name} must be one of {', '.join(allowed)}; got {value!r}")
        if self.dtype not in FLOATING:
            raise TypeError(
                f"Bottleneck: dtype must be torch.float32, float16, bfloat16 or float64; got {self.dtype!r}"
            )
        self._set("scale", number("Bottleneck", "scale", self.scale))
        if self.form in KRONA_FORMS:
            self._check_krona()
        else:
            self._check_width()

    def _set(self, name: str, value: object) -> None:
        """Put a field's checked and plain value in its place, while the record is being made."""
        object.__setattr__(self, name, value)

    def _check_krona(self) -> None:
        if (self.source, self.sink) != KRONA_PAIR:
            raise ValueError(
                f"Bottleneck: form {self.form!r} stands beside the whole feed-forward: source, sink must be"
                f" {KRONA_PAIR[0]!r}, {KRONA_PAIR[1]!r}; got {self.source!r}, {self.sink!r}"
            )
        factors = (
            tuple(plain(each) for each in self.factors) if isinstance(self.factors, (tuple, list)) else ()
        )
        if len(factors) != 2 or not all(type(each) is int and each > 0 for each in factors):
            raise ValueError(
                f"Bottleneck: form {self.form!r} needs factors, two positive integers (N1, K1);"
                f" got {self.factors!r}"
            )
        if self.budget is not None or self.rank is not None:
            raise ValueError(
                f"Bottleneck: form {self.form!r} has its size by factors; budget and rank must be None, got"
                f" budget={self.budget!r}, rank={self.rank!r}"
            )
        if self.width not in (None, DEFAULT_WIDTH) or self.terms != DEFAULT_TERMS:
            raise ValueError(
                f"Bottleneck: form {self.form!r} has neither width nor terms; got width={self.width!r},"
                f" terms={self.terms!r}"
            )
        if self.activation not in ("relu", "identity"):
            raise ValueError(
                f"Bottleneck: form {self.form!r} is linear and has no activation; got {self.activation!r}"
            )
        if self.form == "krona_res" and self.scale == 0:
            raise ValueError("Bottleneck: form 'krona_res' needs a scale other than 0; got 0.0")
        self._set("factors", factors)
        self._set("width", None)
        self._set("activation", "identity")

    def _check_width(self) -> None:
        if self.factors is not None:
            raise ValueError(
                f"Bottleneck: factors are for the forms {', '.join(KRONA_FORMS)}; got {self.factors!r} with"
                f" form {self.form!r}"
            )
        if self.budget is not None:
            if self.width is not None:
                raise ValueError(
                    f"Bottleneck: give width=None with a budget, which chooses the width; got width={self.width!r},"
                    f" budget={self.budget!r}"
                )
            budget = number("Bottleneck", "budget", self.budget)
            if budget <= 0:
                raise ValueError(f"Bottleneck: budget must be more than 0 percent; got {budget!r}")
            self._set("budget", budget)
        elif self.width is None:
            raise ValueError("Bottleneck: give a width or a budget; got neither")
        else:
            self._set("width", self._positive("width"))
            assert self.width is not None
            if self.width > MAX_WIDTH:
                raise ValueError(
                    f"Bottleneck: width H must be 1 to {MAX_WIDTH}, what the operator takes; got {self.width}"
                )
        self._set("terms", self._positive("terms"))
        if self.form == "compacter":
            self._check_compacter()
        elif self.rank is not None:
            raise ValueError(f"Bottleneck: rank is for the form 'compacter'; got {self.rank!r}")
        elif self.terms != DEFAULT_TERMS:
            raise ValueError(f"Bottleneck: terms are for the form 'compacter'; got {self.terms!r}")

    def _check_compacter(self) -> None:
        if POSITIONS[self.source].block == RESNET:
            raise ValueError(
                "Bottleneck: form 'compacter' is for transformer blocks, whose maps are matrices; got source"
                f" {self.source!r}"
            )
        if self.rank is not None:
            self._set("rank", self._positive("rank"))
        if self.width is not None and self.width % self.terms:
            raise ValueError(
                f"Bottleneck: terms must divide the width H; got terms={self.terms}, width={self.width}"
            )

    def _positive(self, name: str) -> int:
        value = plain(getattr(self, name))
        if type(value) is not int or value < 1:
            raise ValueError(f"Bottleneck: {name} must be a positive integer; got {getattr(self, name)!r}")
        return value

    @property
    def block(self) -> str:
        """The kind of block that both positions are in."""
        return POSITIONS[self.source].block

    def stored_as(self, dtype: torch.dtype) -> Bottleneck:
        """The record of the same adapter with its tensors in this dtype."""
        return replace(self, dtype=dtype)

    def at(self, name: str) -> Bottleneck:
        """The same in every block."""
        return self

    def layout(self, n: int, k: int, name: str = "") -> BottleneckLayout:
        """The tensors of one adapter from K to N. ValueError where terms or factors do not divide N or K."""
        if self.factors is None and self.width is None:
            raise ValueError(
                f"Bottleneck: the budget of {self.budget} % has no width before `attach` chooses it"
            )
        divisors = (("N", n, self.terms), ("K", k, self.terms)) if self.form == "compacter" else ()
        if self.factors is not None:
            divisors = (("N", n, self.factors[0]), ("K", k, self.factors[1]))
        wrong = [
            f"{divisor} does not divide {letter} = {size}"
            for letter, size, divisor in divisors
            if size % divisor
        ]
        if wrong:
            raise ValueError(
                f"Bottleneck: {'terms' if self.factors is None else 'factors (N1, K1)'} must divide the sizes (N, K)"
                f"{f' of {name}' if name else ''}: {'; '.join(wrong)}"
            )
        if self.rank is not None and self.width is not None:
            most = min(n, k, self.width) // self.terms
            if self.rank > most:
                raise ValueError(
                    f"Bottleneck: rank must be at most min(N, K, H) / terms = {most} for (N, K) = ({n}, {k})"
                    f"{f' of {name}' if name else ''}; got {self.rank}"
                )
        if self.form == "krona_res" and n != k:
            raise ValueError(f"Bottleneck: form 'krona_res' adds X itself, so N = K; got N = {n}, K = {k}")
        return BottleneckLayout(
            n, k, self.form, self.block == RESNET, self.width, self.activation, self.terms, self.rank,
            self.factors, self.scale, self.init == "zero_up", self.dtype,
        )  # fmt: skip

    def within(self, model_parameters: int, sizes: Mapping[str, tuple[int, int]]) -> Bottleneck:
        """The spec with the width that its budget allows in these places, name -> (N, K).

        Raises ValueError where not even the smallest width is within the budget.
        """
        if self.budget is None:
            return self
        allowed = int(Fraction(str(self.budget)) * model_parameters / 100)
        step = WIDTH_STEP if self.form == "dense" else math.lcm(WIDTH_STEP, self.terms)
        fitting, least = None, 0
        for width in range(step, MAX_WIDTH + 1, step):
            spec = replace(self, width=width, budget=None)
            cost = sum(spec.layout(n, k, name).parameters for name, (n, k) in sizes.items())
            least = least or cost
            if cost > allowed:
                break
            fitting = spec
        if fitting is None:
            raise ValueError(
                f"Bottleneck: no width meets a budget of {self.budget} % of {model_parameters:,} parameters, which"
                f" is {allowed:,}: the smallest, {step}, takes {least:,} in {len(sizes)} blocks"
            )
        return fitting
