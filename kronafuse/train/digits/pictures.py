"""Real digits, digits before and digits after, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ...formats.atomic import written_beside
from ..images import grid

COLUMNS = 6
"""Images shown of each class."""


def save_comparison(
    path: Path, classes: Sequence[str], sets: Mapping[str, tuple[Tensor, np.ndarray]]
) -> None:
    """One panel for each set, one row for each class: the first `COLUMNS` images, unselected.

    sets: title -> images (count, 1, height, width) in [-1, 1] and the class of each
    """
    figure = Figure(figsize=(3.2 * len(sets), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, (pixels, labels)) in zip(
        figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True
    ):
        rows = [pixels[torch.from_numpy(labels == each)][:COLUMNS] for each in classes]
        axes.imshow(np.asarray(grid(torch.cat(rows), COLUMNS, zoom=8, gap=4)), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title)
        axes.axis("off")
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
