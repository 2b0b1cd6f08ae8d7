"""Memory that torch hands out next, filled with NaN: it shows a result that an operator of torch leaves unwritten.

`ops.outputs.poisoned` does so for what our own kernels write.
"""

from __future__ import annotations

import torch

SMALLEST_BYTES, LARGEST_BYTES = 1 << 6, 1 << 18
"""Sizes of the blocks that are filled. Larger tensors are cut from several of them, or from fresh pages of zeros."""
PER_SIZE = 4
"""Blocks of each size, so that a call gets its result and what it computes on the way from among them."""


def poison(device: torch.device | str = "cpu") -> None:
    """Fill free memory of many sizes with NaN, of all floating dtypes of 16 and 32 bits, and free it again."""
    held = []
    size = SMALLEST_BYTES
    while size <= LARGEST_BYTES:
        for count in (size, size + size // 2):
            for _ in range(PER_SIZE):
                # Every bit set is NaN in each of the dtypes.
                held.append(torch.full((count,), 0xFF, dtype=torch.uint8, device=device))
        size *= 2
    del held
