"""One-way analysis of variance: F = MS_between / MS_within of each factor by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from .design import Design


@dataclass(frozen=True)
class OneWay:
    """One factor over all observations, whatever the other factors are there."""

    factor: str
    df_between: int
    df_within: int
    ms_between: float
    ms_within: float
    f: float
    p: float


def one_way(design: Design) -> list[OneWay]:
    """Every factor of the design, as the paper's: SS_between/(levels − 1) over SS_within/(observations − levels).

    Raises ValueError where a factor has as many levels as there are observations, and where no observation
    differs from others of its level.

    Source: Xiang et al. 2023, arXiv 2303.18181.
    """
    return [_one_way(design, factor) for factor in design.factors]


def _one_way(design: Design, factor: str) -> OneWay:
    values, levels = design.values, design.data[factor].to_numpy()
    groups = [values[levels == each] for each in design.factors[factor]]
    between, within = len(groups) - 1, len(values) - len(groups)
    if within == 0:
        raise ValueError(
            f"anova: factor {factor} has {len(groups)} levels in {len(values)} observations: no replicate, and no"
            " variance within its levels (0 degrees of freedom); run more seeds, or name other --factors"
        )
    mean = values.mean()
    ms_between = sum(len(group) * (group.mean() - mean) ** 2 for group in groups) / between
    ms_within = sum(((group - group.mean()) ** 2).sum() for group in groups) / within
    if ms_within <= np.finfo(float).eps * ms_between:
        raise ValueError(
            f"anova: {design.response} does not vary within the levels of factor {factor}; its F is not finite"
        )
    f = float(ms_between / ms_within)
    return OneWay(
        factor, between, within, float(ms_between), float(ms_within), f, float(stats.f.sf(f, between, within))
    )
