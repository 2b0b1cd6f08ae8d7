"""Plots of a design as PNG: each factor, and the map of positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from ...formats.atomic import written_beside
from ...nn.positions import PAIRS, POSITIONS, SINKS, SOURCES
from .design import Design

CONFIDENCE = 0.95
MOST_LEVEL_LABELS = 5
"""More are written aslant."""


def save_factor(path: Path, design: Design, factor: str) -> None:
    """Every run by level, and each level's mean with its confidence interval (t distribution)."""
    levels, column = design.factors[factor], design.data[factor].to_numpy()
    figure = Figure(figsize=(max(4.0, 0.9 * len(levels) + 1.5), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, each in enumerate(levels):
        values = design.values[column == each]
        spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(
            place + spread, values, "o", color="C0", alpha=0.35, markersize=4,
            label="" if place else "run",
        )  # fmt: skip
        low, high = interval(values)
        mean = values.mean()
        axes.errorbar(
            place, mean, yerr=[[mean - low], [high - mean]], fmt="D", color="C3", capsize=4, markersize=5,
            label="" if place else f"mean, {CONFIDENCE:.0%} interval",
        )  # fmt: skip
    symbols = {name: f"{name} ({each.symbol})" for name, each in POSITIONS.items()}
    slanted = {"rotation": 40, "ha": "right"} if len(levels) > MOST_LEVEL_LABELS else {}
    names = [symbols.get(each, each) for each in levels]
    axes.set_xticks(range(len(levels)), names, parse_math=False, **slanted)
    axes.set_xlabel(factor, parse_math=False)
    axes.set_ylabel(design.response, parse_math=False)
    axes.legend(fontsize="small")
    _save(figure, path)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The confidence interval of the mean; the mean itself for a single value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean - half), float(mean + half)


def save_positions(path: Path, design: Design) -> None:
    """Mean response of each source (row) and sink (column); illegal pairs are blank, pairs without runs crossed."""
    means = position_means(design)
    figure = Figure(figsize=(8.2, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(means), cmap="viridis", aspect="auto")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for source, sink in PAIRS:
        row, column = SOURCES.index(source), SINKS.index(sink)
        value = means[row, column]
        there = not np.isnan(value)
        axes.text(
            column, row, f"{value:.3g}" if there else "×", ha="center", va="center",
            color="white" if there and value < middle else "black", fontsize="small" if there else "large",
        )  # fmt: skip
    for names, place in ((SINKS, axes.set_xticks), (SOURCES, axes.set_yticks)):
        place(range(len(names)), [f"{each} ({POSITIONS[each].symbol})" for each in names])
    axes.tick_params(axis="x", rotation=35)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.set(xlabel="sink", ylabel="source")
    axes.set_title(f"{design.response}: mean by position; × = legal, no runs", parse_math=False)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def position_means(design: Design) -> np.ndarray:
    """(10, 7) means over all runs of a pair, NaN where there are none."""
    means = np.full((len(SOURCES), len(SINKS)), np.nan)
    for source, sink in PAIRS:
        values = design.values[((design.data["source"] == source) & (design.data["sink"] == sink)).to_numpy()]
        if len(values):
            means[SOURCES.index(source), SINKS.index(sink)] = values.mean()
    return means


def _save(figure: Figure, path: Path) -> None:
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
