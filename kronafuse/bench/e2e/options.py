"""What the command line asks for, checked: which models, arms and forms, and the defaults of each device."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from .arms import ARMS
from .configs import MODELS
from .run import Request
from .step import FORMS

Value = TypeVar("Value")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_STEPS, CPU_STEPS = 20, 4
CPU_MODELS = ("sd15", "dit_xl")
"""What a CPU does in minutes; the others run there by name."""


def request_of(
    *,
    models: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    steps: int | None = None,
    dtype: str | None = None,
    side: int | None = None,
    text_tokens: int | None = None,
    device: str | None = None,
    budget: float | None = None,
) -> Request:
    """The request that these options stand for; None is the device's default.

    Raises ValueError for what does not exist, listing what does, and for numbers below 1.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cuda", "cpu"):
        raise ValueError(f"bench e2e: device must be cuda or cpu; got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench e2e: device is cuda, and there is no CUDA device")
    on_cpu = chosen.type == "cpu"
    numbers = {"batch": batches or (), "steps": (steps,), "size": (side,), "text-tokens": (text_tokens,)}
    for name, values in numbers.items():
        if any(value is not None and value < 1 for value in values):
            raise ValueError(f"bench e2e: {name} must be at least 1; got {', '.join(map(str, values))}")
    if budget is not None and not budget > 0:
        raise ValueError(f"bench e2e: budget must be above 0; got {budget:g}")
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"bench e2e: dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return Request(
        models=matching("model", models or (CPU_MODELS if on_cpu else ("*",)), MODELS),
        batches=tuple(batches or ((1,) if on_cpu else (1, 4))),
        arms=matching("arm", ("frozen", *(arms or ("*",))), ARMS),
        forms=matching(
            "form", forms or (("eager",) if on_cpu else FORMS), {each: each for each in FORMS}
        ),
        device=chosen,
        dtype=DTYPES[dtype],
        steps=steps or (CPU_STEPS if on_cpu else GPU_STEPS),
        side=side,
        text_tokens=text_tokens,
        budget=budget,
    )  # fmt: skip


def matching(kind: str, patterns: Sequence[str], known: Mapping[str, Value]) -> tuple[Value, ...]:
    """What the patterns name, in the order of `known`. ValueError for one that names nothing."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ValueError(f"bench e2e: no {kind} matches {pattern!r}; there are {', '.join(known)}")
    return tuple(
        value for name, value in known.items() if any(fnmatch.fnmatch(name, each) for each in patterns)
    )
