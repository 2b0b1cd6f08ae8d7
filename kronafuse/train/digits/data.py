"""Scikit-learn's handwritten digits, cut into the half that is learnt from and the half that judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..data import TensorExamples

CLASSES = tuple(str(digit) for digit in range(10))
OLD, NEW = CLASSES[:5], CLASSES[5:]
"""The classes of the base model, and those that the adapter brings."""

SIDE = 8
LEVELS = 16
"""Scans are 8×8 with values 0 to 16."""


@dataclass(frozen=True)
class Half:
    """Scans (count, 1, 8, 8) in [-1, 1] and their classes."""

    pixels: Tensor
    labels: np.ndarray

    def of(self, classes: Sequence[str]) -> Half:
        """The scans of these classes."""
        chosen = np.isin(self.labels, classes)
        return Half(self.pixels[torch.from_numpy(chosen)], self.labels[chosen])

    def examples(self) -> TensorExamples:
        """As a training set, conditioned on the class."""
        return TensorExamples(self.pixels, self.labels.tolist())


@dataclass(frozen=True)
class Digits:
    """All 1,797 scans: diffusion models train on `learnt` alone, the judges are fitted on `judging` alone."""

    learnt: Half
    judging: Half


def read_digits(seed: int) -> Digits:
    """The two halves, every class split evenly between them."""
    bunch = load_digits()
    pixels = bunch.images.astype(np.float32)[:, None] / (LEVELS / 2) - 1  # type: ignore[union-attr]
    labels = bunch.target.astype(str)  # type: ignore[union-attr]
    learnt, judging = train_test_split(
        np.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels
    )
    halves = [Half(torch.from_numpy(pixels[chosen]), labels[chosen]) for chosen in (learnt, judging)]
    return Digits(*halves)
