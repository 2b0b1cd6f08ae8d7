"""The raw ops' FLOPs for torch.utils.flop_counter, which counts nothing for an op that it has no formula of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..torch_private import dispatch_modes

COUNTER = "torch.utils.flop_counter"
"""Loads Triton, which takes a second: so a formula is given to it once something counts, and not at import."""
_FORMULAS: dict[Any, Callable[..., int]] = {}


def formula(op: Any, flops: Callable[..., int]) -> None:
    """Have `flops` count what a call of the op's overload does, from its arguments."""
    _FORMULAS[op.overloadpacket] = flops
    give_formulas()


def give_formulas() -> None:
    """Register the formulas if FLOPs may be counted, also with the modes that have begun: each has its own table."""
    if torch.compiler.is_compiling() or COUNTER not in sys.modules:
        return
    from torch.utils import flop_counter

    for op, flops in _FORMULAS.items():
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op, get_raw=True)(flops)
    for mode in dispatch_modes():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            for op in _FORMULAS:
                counter.flop_registry.setdefault(op, flop_counter.flop_registry[op])
