"""Which implementation serves a call, and why the others cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Reasons = list[str]


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: what rules it out for a call, and the module that runs it.

    `reasons(device, dtype)` is empty where the implementation can serve tensors of that device and dtype.
    `load()` imports and returns what the op calls; it runs once, at first use.
    `unmeasured` says, of an implementation that no measurement has compared yet, why `auto` passes it by.
    """

    name: str
    reasons: Callable[[torch.device, torch.dtype], Reasons]
    load: Callable[[], Any]
    unmeasured: str | None = None


def never(_device: torch.device, _dtype: torch.dtype) -> Reasons:
    """No reason against: for implementations that run everywhere."""
    return []


NAMES = ("auto", "reference", "eager", "cpu", "triton", "cuda")
"""Values that `impl` takes."""

AUTO = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}
"""What `auto` tries on each device type, in order; the reference is never among them."""


def choose(
    op: str, implementations: Sequence[Implementation], impl: str, device: torch.device, dtype: torch.dtype
) -> Implementation:
    """The implementation that runs this call.

    A named one runs or raises NotImplementedError with its reasons. `auto` takes the first of `AUTO` without
    reasons and measured; reaching `eager` on a GPU warns once, with the reasons of those before it.
    """
    by_name = {each.name: each for each in implementations}
    if impl != "auto":
        if impl not in NAMES:
            raise ValueError(f"{op}: impl must be one of {', '.join(NAMES)}; got {impl!r}")
        chosen = by_name.get(impl)
        reasons = (
            [f"{op} has no {impl!r} implementation yet"] if chosen is None else chosen.reasons(device, dtype)
        )
        if reasons or chosen is None:
            listed = "\n".join(f"    {reason}" for reason in reasons)
            raise NotImplementedError(f"{op}: impl={impl!r} cannot serve this call:\n{listed}")
        return chosen
    against: list[str] = []
    for name in AUTO.get(device.type, ("eager",)):
        candidate = by_name.get(name)
        reasons = _against(op, name, candidate, device, dtype)
        if candidate is not None and not reasons:
            if name == "eager" and device.type == "cuda":
                _warn_eager(op, "; ".join(against))
            return candidate
        against += [f"{name}: {reason}" for reason in reasons]
    raise NotImplementedError(f"{op}: no implementation serves {device} in {dtype}: {'; '.join(against)}")


def _against(
    op: str, name: str, candidate: Implementation | None, device: torch.device, dtype: torch.dtype
) -> Reasons:
    """Why `auto` does not take it."""
    if candidate is None:
        return [f"{op} has no {name!r} implementation yet"]
    return candidate.reasons(device, dtype) or [each for each in (candidate.unmeasured,) if each is not None]


@cache
def _warn_eager(op: str, reasons: str) -> None:
    warnings.warn(
        f"{op}: running on torch's own GEMMs (impl='eager'): {reasons}", RuntimeWarning, stacklevel=4
    )
