"""Random numbers as a function of what they are for, so that a resumed run draws what the whole run would."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`, for example (seed, "noise", step, rank)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
