"""Type-II analysis of variance of all factors together, with effect sizes, and what their design cannot tell."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from .design import Design


@dataclass(frozen=True)
class Term:
    """One factor, or two together. `df` are the degrees of freedom that the other terms leave it, of `nominal`.

    With df = 0 the factor is aliased whole, and it has no figures.
    """

    factor: str
    nominal: int
    df: int
    ss: float | None = None
    f: float | None = None
    p: float | None = None
    eta_squared: float | None = None
    partial_eta_squared: float | None = None
    omega_squared: float | None = None


@dataclass(frozen=True)
class Parts:
    """Two factors by which the data fall into parts that share no level; each part's levels by factor."""

    factors: tuple[str, str]
    parts: list[dict[str, tuple[str, ...]]]


@dataclass(frozen=True)
class TypeTwo:
    """terms: one a factor, and with interactions one for every two factors
    rank:  of the design matrix, which has `columns`
    parts: for every two factors that are not connected
    """

    terms: list[Term]
    df_residual: int
    ss_residual: float
    ss_total: float
    rank: int
    columns: int
    parts: list[Parts]

    @property
    def aliased(self) -> dict[str, tuple[int, int]]:
        """Terms that the others leave fewer degrees of freedom -> (df, nominal)."""
        return {each.factor: (each.df, each.nominal) for each in self.terms if each.df < each.nominal}


def type_two(design: Design, *, interactions: bool = False) -> TypeTwo:
    """Ordinary least squares: each term's sum of squares given all others that do not contain it.

    interactions: terms for every two factors beside the factors' own

    A design matrix of full rank goes through statsmodels' type-II table. Otherwise each term is compared with
    the model that lacks it: its sum of squares is that of the contrasts which the other terms leave it, and
    its degrees of freedom are their number.

    Raises ValueError where no residual degree of freedom is left.
    """
    names = {f"x{index}": factor for index, factor in enumerate(design.factors)}
    data = design.data.rename(
        columns={factor: name for name, factor in names.items()} | {design.response: "y"}
    )
    effects: list[tuple[str, ...]] = [(name,) for name in names]
    if interactions:
        effects += itertools.combinations(names, 2)
    full = _fit(data, effects)
    rank, columns = int(np.linalg.matrix_rank(full.model.exog)), full.model.exog.shape[1]
    if int(full.df_resid) < 1:
        terms = ", ".join(_effect_name(each, names) for each in effects)
        raise ValueError(
            f"anova: {len(data)} observations leave no residual degree of freedom beside {terms}: no replicate;"
            " run more seeds, or name fewer --factors"
        )
    ss_residual, ss_total = float(full.ssr), float(full.centered_tss)
    ms_residual = ss_residual / full.df_resid
    if ms_residual <= np.finfo(float).eps * ss_total:
        raise ValueError(
            f"anova: {', '.join(names.values())} leave no residual variance of {design.response}; F is not finite"
        )
    table = anova_lm(full, typ=2) if rank == columns else None
    terms = []
    for effect in effects:
        factor = _effect_name(effect, names)
        nominal = math.prod(len(design.factors[names[name]]) - 1 for name in effect)
        if table is not None:
            row = table.loc[_formula_term(effect)]
            df, ss, f, p = row["df"], row["sum_sq"], row["F"], row["PR(>F)"]
        else:
            df, ss = _given_others(data, effect, effects)
            if df == 0:
                terms.append(Term(factor, nominal, 0))
                continue
            f = ss / df / ms_residual
            p = stats.f.sf(f, df, full.df_resid)
        sizes = (
            ss / ss_total,
            ss / (ss + ss_residual),
            (ss - df * ms_residual) / (ss_total + ms_residual),
        )
        terms.append(Term(factor, nominal, int(df), float(ss), float(f), float(p), *map(float, sizes)))
    return TypeTwo(terms, int(full.df_resid), ss_residual, ss_total, rank, columns, _parts(design))


def _given_others(
    data: pd.DataFrame, effect: tuple[str, ...], effects: Sequence[tuple[str, ...]]
) -> tuple[int, float]:
    """Degrees of freedom and sum of squares that an effect adds to those that do not contain it."""
    others = [each for each in effects if not set(effect) <= set(each)]
    reduced, larger = _fit(data, others), _fit(data, [*others, effect])
    return round(reduced.df_resid - larger.df_resid), float(reduced.ssr - larger.ssr)


def _effect_name(effect: tuple[str, ...], names: Mapping[str, str]) -> str:
    return " × ".join(names[name] for name in effect)


def _formula_term(effect: tuple[str, ...]) -> str:
    return ":".join(f"C({name})" for name in effect)


def _fit(data: pd.DataFrame, effects: Sequence[tuple[str, ...]]) -> Any:
    with warnings.catch_warnings():
        # the rank is looked at, and reported, by `type_two`
        warnings.filterwarnings("ignore", "The design matrix is rank-deficient")
        return ols("y ~ " + (" + ".join(map(_formula_term, effects)) or "1"), data).fit()


def _parts(design: Design) -> list[Parts]:
    """Pairs of factors whose levels fall apart: no chain of observations leads from one part to another."""
    found = []
    for first, second in itertools.combinations(design.factors, 2):
        rows, columns = design.factors[first], design.factors[second]
        nodes = [(first, each) for each in rows] + [(second, each) for each in columns]
        ends = (
            [rows.index(each) for each in design.data[first]],
            [len(rows) + columns.index(each) for each in design.data[second]],
        )
        links = coo_array((np.ones(len(design.data)), ends), shape=(len(nodes), len(nodes)))
        count, part = connected_components(links, directed=False)
        if count > 1:
            parts = [dict.fromkeys((first, second), ()) for _ in range(count)]
            for (factor, name), its in zip(nodes, part, strict=True):
                parts[its][factor] += (name,)
            found.append(Parts((first, second), parts))
    return found
