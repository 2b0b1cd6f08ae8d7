"""torch.compile for arms."""

from __future__ import annotations

import warnings

import torch

from .arm import Built


def compiled_now(built: Built, *, trains: bool) -> Built:
    """The same, after the first call has compiled it: a fallback to eager would have raised."""
    with warnings.catch_warnings(), torch.set_grad_enabled(trains):
        # The planner's cache, which dynamo traces through: its answer is a constant of the shapes.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        built.forward()
    return built
