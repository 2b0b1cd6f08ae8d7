"""Loss curves as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..formats.atomic import written_beside


def save_loss_curves(path: Path, curves: Mapping[str, Sequence[float]], *, window: int = 20) -> None:
    """One panel for each curve: the loss of every step, and its mean over the last `window` steps."""
    figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, losses) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        values = np.asarray(losses, dtype=np.float64)
        axes.plot(np.arange(1, len(values) + 1), values, linewidth=0.6, alpha=0.5, label="each step")
        if len(values) >= window:
            mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
            axes.plot(np.arange(window, len(values) + 1), mean, label=f"mean of {window}")
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend()
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
