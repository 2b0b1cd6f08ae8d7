"""Specs as JSON objects and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from .bottleneck_spec import Bottleneck
from .spec import Spec
from .specs import KronA, LoKr, LoRA

KINDS: dict[str, type[KronA | LoKr | LoRA | Bottleneck]] = {
    kind.__name__: kind for kind in (KronA, LoKr, LoRA, Bottleneck)
}


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """The spec as a JSON object: its kind and every field, defaults included."""
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

    Raises ValueError for an unknown kind, field or dtype, and whatever the spec itself refuses.
    """
    remaining = dict(values)
    kind = KINDS.get(str(remaining.pop("kind", None)))
    if kind is None:
        raise ValueError(f"spec: kind must be one of {', '.join(KINDS)}; got {values.get('kind')!r}")
    known = {each.name for each in fields(kind)}
    unknown = sorted(set(remaining) - known)
    if unknown:
        raise ValueError(
            f"spec: {kind.__name__} has no fields {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    if "dtype" in remaining:
        dtype = getattr(torch, str(remaining["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"spec: dtype must name a torch dtype; got {remaining['dtype']!r}")
        remaining["dtype"] = dtype
    if remaining.get("per_target") is not None:
        remaining["per_target"] = {
            suffix: spec_from_dict(override) for suffix, override in remaining["per_target"].items()
        }
    return kind(**remaining)
