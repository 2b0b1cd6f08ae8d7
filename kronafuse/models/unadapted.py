"""A model as it is without its adapters: as a second tree of modules, or for a while in place."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

from torch import nn

from ..nn.kron import KronLinear
from .instance_methods import InstanceMethod
from .taps import BlockAdapters

HOST = "_kronafuse_host"
"""The attribute in which a model with adapters keeps its Host; absent from a model without."""


def unadapted(
    module: nn.Module, layers: Set[nn.Module], known: dict[int, nn.Module] | None = None
) -> nn.Module:
    """Return a tree of the same tensors and modules without adapters; `module` itself if it carries none.

    Only the modules above an adapted layer are new objects, so that other threads can call the model.

    layers: the adapted layers that attach made; a KronLinear of the model's own is not one
    """
    known = {} if known is None else known
    if id(module) not in known:
        known[id(module)] = _without(module, layers, known)
    return known[id(module)]


def _without(module: nn.Module, layers: Set[nn.Module], known: dict[int, nn.Module]) -> nn.Module:
    if isinstance(module, KronLinear) and module in layers:
        return unadapted(module.base, layers, known)
    children = {
        name: None if child is None else unadapted(child, layers, known)
        for name, child in module._modules.items()
        if not isinstance(child, BlockAdapters)
    }
    if list(children.items()) == list(module._modules.items()):
        return module
    twin = object.__new__(type(module))
    for name, value in module.__dict__.items():
        if isinstance(value, InstanceMethod):
            twin.__dict__.update(value.own)
        elif name != HOST:
            twin.__dict__[name] = value
    twin.__dict__["_modules"] = children
    return twin


@contextmanager
def taken_off(model: nn.Module, layers: Set[nn.Module]) -> Iterator[None]:
    """Take the adapters out of the model for the length of a `with`.

    The module that stands in an adapted layer's place at the end becomes that layer's base.

    layers: as in `unadapted`
    """
    places: list[tuple[nn.Module, str, KronLinear]] = []
    blocks: list[tuple[nn.Module, str, BlockAdapters]] = []
    for parent in model.modules():
        if isinstance(parent, (KronLinear, BlockAdapters)):
            continue
        for name, child in parent._modules.items():
            if isinstance(child, KronLinear) and child in layers:
                places.append((parent, name, child))
            elif isinstance(child, BlockAdapters):
                blocks.append((parent, name, child))
    bases = {layer: layer.base for _, _, layer in places}
    for parent, name, layer in places:
        parent._modules[name] = layer.base
    for parent, name, _ in blocks:
        del parent._modules[name]
    try:
        yield
    finally:
        for parent, name, layer in places:
            now = parent._modules.get(name)
            if now is not None:
                # A layer with two holders of which one got another module has that one in both.
                layer.base = now if now is not bases[layer] else layer.base
                parent._modules[name] = layer
        for parent, name, holder in blocks:
            parent._modules[name] = holder
