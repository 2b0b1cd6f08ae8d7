"""Sizes of a Kronecker-adapted linear layer, in the letters of the whole package."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KronShape:
    """Sizes of A (N1, K1) ⊗ B (N2, K2), with B = B_up (N2, R) · B_down (R, K2) where `rank` is R.

    Feature indices are A-major, as in `torch.kron`: n = n1·N2 + n2 and k = k1·K2 + k2.
    """

    n1: int
    k1: int
    n2: int
    k2: int
    rank: int | None = None

    @classmethod
    def of(cls, a: Tensor | None, b: Tensor, b_down: Tensor | None = None) -> KronShape:
        """The sizes that these factors have; `a` None is the 1×1 identity."""
        n1, k1 = (1, 1) if a is None else (int(a.shape[0]), int(a.shape[1]))
        if b_down is None:
            return cls(n1, k1, int(b.shape[0]), int(b.shape[1]))
        return cls(n1, k1, int(b.shape[0]), int(b_down.shape[1]), int(b_down.shape[0]))

    @property
    def n(self) -> int:
        """N = N1·N2, the layer's out_features."""
        return self.n1 * self.n2

    @property
    def k(self) -> int:
        """K = K1·K2, the layer's in_features."""
        return self.k1 * self.k2

    @property
    def parameters(self) -> int:
        """Elements of the factors; the 1×1 identity has none."""
        right = self.n2 * self.k2 if self.rank is None else self.rank * (self.n2 + self.k2)
        identity = self.n1 == 1 and self.k1 == 1 and self.rank is not None
        return right if identity else self.n1 * self.k1 + right
