"""Says how good generated digits are: a classifier and a distance, fitted on scans that no model has seen."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor

from .data import Half

COMPONENTS = 20
"""Principal components that the Fréchet distance is taken in."""


class Judge:
    """A support vector machine and PCA(20), fitted on `half`."""

    def __init__(self, half: Half) -> None:
        features = _features(half.pixels)
        self.classifier = SVC(C=10, gamma="scale").fit(features, half.labels)
        self.projection = PCA(COMPONENTS, random_state=0).fit(features)

    def accuracy(self, pixels: Tensor, labels: np.ndarray) -> float:
        """Share of the images that the classifier takes for what they should be."""
        return float(np.mean(self.classifier.predict(_features(pixels)) == labels))

    def frechet(self, first: Tensor, second: Tensor) -> float:
        """Fréchet distance between two sets of images, each (count, 1, 8, 8), in PCA(20) features."""
        return frechet_distance(*(self.projection.transform(_features(each)) for each in (first, second)))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two sets of feature vectors, each (count, features).

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, section 2.
    """
    means = first.mean(0) - second.mean(0)
    left, right = (np.cov(each, rowvar=False) for each in (first, second))
    values, vectors = np.linalg.eigh(left)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ right @ root).clip(min=0)).sum()
    return float(means @ means + np.trace(left) + np.trace(right) - 2 * cross)


def _features(pixels: Tensor) -> np.ndarray:
    return pixels.flatten(1).double().numpy()
