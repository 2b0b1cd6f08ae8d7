"""Values of a spec's fields as plain Python ones, which JSON takes: NumPy's scalars and 0-d tensors become them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from ..checks import check_number


def plain(value: Any) -> Any:
    """The Python value of a NumPy scalar, a 0-d array or a 0-d tensor; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def number(owner: str, name: str, value: Any) -> float:
    """The value as a float. Raises TypeError for what is no number, ValueError for what is not finite in float32.

    Kernels apply scales in float32, so 1e39 would be an infinity there.
    """
    if getattr(value, "is_meta", False):
        raise TypeError(f"{owner}: {name} must be a finite number; got a tensor on meta, which has no value")
    converted = plain(value)
    if isinstance(converted, bool) or not isinstance(converted, Real):
        raise TypeError(f"{owner}: {name} must be a finite number; got {value!r}")
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(f"{owner}: {name} must be a finite number; got {converted!r}")
    return check_number(owner, name, converted)


def flag(owner: str, name: str, value: Any) -> bool:
    """The value as a bool. Raises TypeError for anything else, 0 and 1 included."""
    converted = plain(value)
    if not isinstance(converted, bool):
        raise TypeError(f"{owner}: {name} must be True or False; got {value!r}")
    return converted
