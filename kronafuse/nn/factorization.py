"""How sizes split into factors."""

from __future__ import annotations

import math


def divisors(size: int) -> list[int]:
    """The divisors of `size` ≥ 1, in increasing order."""
    small = [each for each in range(1, math.isqrt(size) + 1) if size % each == 0]
    return small + [size // each for each in reversed(small) if each * each != size]


def factorization(size: int, factor: int) -> tuple[int, int]:
    """size = small · large by LoKr's rule, with small ≤ large.

    A positive `factor` that divides `size` is one of the two. Otherwise small is the largest divisor up to
    √size that does not exceed `factor`; -1 sets no such limit and gives the pair nearest to a square.

    Raises ValueError for a size below 1 or a factor that is neither positive nor -1.
    Source: LoKr, arXiv 2309.14859, section 3 and its released code.
    """
    if size < 1 or (factor < 1 and factor != -1):
        raise ValueError(
            f"factorization: size must be positive and factor positive or -1; got {size}, {factor}"
        )
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = max(each for each in divisors(size) if each <= limit)
    return small, size // small
