"""Specs as JSON objects and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ..checks import FLOATING
from .bottleneck_spec import Bottleneck
from .spec import Spec
from .specs import KronA, LoKr, LoRA

KINDS: dict[str, type[KronA | LoKr | LoRA | Bottleneck]] = {
    kind.__name__: kind for kind in (KronA, LoKr, LoRA, Bottleneck)
}


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
"""Name -> dtype."""


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """The spec as a JSON object: its kind and every field, defaults included.

    Raises TypeError for a spec of another class than those of KINDS, which could not be read again.
    """
    if type(spec) not in KINDS.values():
        raise TypeError(f"spec: must be {', '.join(KINDS)}; got {type(spec).__name__}")
    values: dict[str, Any] = {"kind": type(spec).__name__}
    for each in fields(spec):  # pyright: ignore[reportArgumentType]
        value = getattr(spec, each.name)
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {suffix: spec_to_dict(override) for suffix, override in value.items()}
        values[each.name] = value
    return values


def spec_from_dict(values: Mapping[str, Any]) -> Spec:
    """The spec that `spec_to_dict` wrote.

    Raises ValueError for an unknown kind or dtype, for fields that are unknown or missing (none takes its
    default), and whatever the spec itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"spec: must be an object; got {type(values).__name__}")
    remaining = dict(values)
    kind = KINDS.get(str(remaining.pop("kind", None)))
    if kind is None:
        raise ValueError(f"spec: kind must be one of {', '.join(KINDS)}; got {values.get('kind')!r}")
    known = {each.name for each in fields(kind)}
    for names, what in ((set(remaining) - known, "has no fields"), (known - set(remaining), "lacks fields")):
        if names:
            raise ValueError(
                f"spec: {kind.__name__} {what} {', '.join(sorted(names))}; its fields are {', '.join(sorted(known))}"
            )
    dtype = DTYPES.get(str(remaining["dtype"]))
    if dtype is None:
        raise ValueError(f"spec: dtype must be one of {', '.join(DTYPES)}; got {remaining['dtype']!r}")
    remaining["dtype"] = dtype
    per_target = remaining.get("per_target")
    if per_target is not None:
        if not isinstance(per_target, Mapping):
            raise ValueError(f"spec: per_target must be an object or null; got {type(per_target).__name__}")
        remaining["per_target"] = {
            suffix: spec_from_dict(override) for suffix, override in per_target.items()
        }
    return kind(**remaining)
