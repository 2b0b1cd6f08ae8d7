"""One-way analysis of variance: F = MS_between / MS_within of each factor by itself.

The paper's observations are its configurations; with several seeds a configuration's is the mean of its runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from .design import Design


@dataclass(frozen=True)
class OneWay:
    """One factor over all observations, whatever the other factors are there.

    note: why there is no F, where there is none
    """

    factor: str
    df_between: int
    df_within: int
    ms_between: float
    ms_within: float | None
    f: float | None
    p: float | None
    note: str = ""


def one_way(design: Design, *, lenient: bool = False) -> list[OneWay]:
    """Every factor of the design, as the paper's: SS_between/(levels − 1) over SS_within/(observations − levels).

    Raises ValueError where a factor has as many levels as there are observations, and where no observation
    differs from others of its level; lenient, such a factor has a note instead of an F.

    Source: Xiang et al. 2023, arXiv 2303.18181.
    """
    return [_one_way(design, factor, lenient) for factor in design.factors]


def _one_way(design: Design, factor: str, lenient: bool) -> OneWay:
    values, levels = design.values, design.data[factor].to_numpy()
    groups = [values[levels == each] for each in design.factors[factor]]
    between, within = len(groups) - 1, len(values) - len(groups)
    mean = values.mean()
    ms_between = float(sum(len(group) * (group.mean() - mean) ** 2 for group in groups) / between)
    if within == 0 and lenient:
        return OneWay(factor, between, within, ms_between, None, None, None, "no replicate")
    if within == 0:
        raise ValueError(
            f"anova: factor {factor} has {len(groups)} levels in {len(values)} observations: no replicate, and no"
            " variance within its levels (0 degrees of freedom); run more seeds, or name other --factors"
        )
    ms_within = float(sum(((group - group.mean()) ** 2).sum() for group in groups) / within)
    if ms_within <= np.finfo(float).eps * ms_between and lenient:
        return OneWay(factor, between, within, ms_between, ms_within, None, None, "no variance within levels")
    if ms_within <= np.finfo(float).eps * ms_between:
        raise ValueError(
            f"anova: {design.response} does not vary within the levels of factor {factor}; its F is not finite"
        )
    f = ms_between / ms_within
    return OneWay(factor, between, within, ms_between, ms_within, f, float(stats.f.sf(f, between, within)))
