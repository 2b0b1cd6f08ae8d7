"""Whether tensors are those that a spec has in its modules, compared before any number is worked on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn.spec import Spec, TensorLayout

MAX_SIZE = 2**31 - 1
"""Largest N or K of a module."""

MAX_NAME = 1000
"""Characters that the name of a module may have."""

Size = tuple[int, int]
Shapes = Mapping[str, tuple[int, ...]]


def parse_modules(value: Any) -> dict[str, Size]:
    """Module name -> (N, K), of a JSON object of pairs. Raise ValueError for anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"modules must map names to [N, K]; got {type(value).__name__}")
    modules: dict[str, Size] = {}
    for name, size in value.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"names of modules must have at most {MAX_NAME} characters; one has {len(name)}")
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 2
            or not all(type(each) is int and 1 <= each <= MAX_SIZE for each in size)
        ):
            raise ValueError(f"modules[{name!r}] must be [N, K], integers from 1 to {MAX_SIZE}; got {size!r}")
        modules[name] = (size[0], size[1])
    return modules


def check_contents(spec: Spec, modules: Mapping[str, Size], shapes: Shapes) -> list[str]:
    """Compare tensors with a spec and its modules; return their names in the order in which they are saved.

    shapes: module name + "." + tensor name -> sizes

    Raise ValueError for the first that is missing, unknown or of another shape, and what the spec raises for
    a module that it does not fit. The work is bounded by the size of the file: splitting a wrong N or K, which
    is at most MAX_SIZE, ends it, and splitting a right one takes fewer steps than its factors have elements.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, tensor = name.rpartition(".")
        found.setdefault(module, {})[tensor] = shape
    for module in found:
        if module not in modules:
            tensor, shape = next(iter(found[module].items()))
            raise ValueError(_difference(f"{module}.{tensor}".removeprefix("."), None, shape))
    layouts: dict[tuple[int, Size], TensorLayout] = {}
    names: list[str] = []
    for module, size in modules.items():
        own, tensors = spec.at(module), found.get(module, {})
        layout = layouts.get((id(own), size)) or own.layout(*size, module)
        layouts[id(own), size] = layout
        expected = layout.sizes
        for tensor in [*expected, *tensors]:
            if expected.get(tensor) != tensors.get(tensor):
                raise ValueError(_difference(f"{module}.{tensor}", expected.get(tensor), tensors.get(tensor)))
        names += [f"{module}.{tensor}" for tensor in expected]
    return names


def _difference(name: str, expected: tuple[int, ...] | None, found: tuple[int, ...] | None) -> str:
    def text(shape: tuple[int, ...] | None) -> str:
        return "none" if shape is None else str(shape)

    return f"{name} must be {text(expected)}, as the spec and the modules say; got {text(found)}"
