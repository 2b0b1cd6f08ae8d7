"""What adapters have changed in a model, kept with the model so that the last one to go undoes it exactly."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from ..nn.factors import KronFactors
from ..nn.kron import KronLinear
from .sites import Place

if TYPE_CHECKING:
    from .processors import SharingProcessors

ATTRIBUTE = "_kronafuse_host"
"""Where a model with adapters keeps its Host; absent from a model without."""

FUSING_METHODS = ("fuse_qkv_projections", "fuse_projections")
"""diffusers' methods that copy the frozen weights of q, k and v into one layer, without the deltas."""


class Host:
    """The adapted layers of one model, its frozen parameters, its attention processors and its refusals.

    Everything is undone on the instance it was done to; nothing is changed in a class or a process.
    """

    def __init__(self) -> None:
        self.layers: dict[str, tuple[KronLinear, Place]] = {}
        self.frozen: list[tuple[nn.Module, str]] = []
        self.refusing: list[tuple[nn.Module, str, Any, Any]] = []
        self.processors: SharingProcessors | None = None
        self.users = 0

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """The model's Host, with one user more until `leave`; the first one freezes the model's parameters."""
        host = model.__dict__.get(ATTRIBUTE)
        if host is None:
            host = cls()
            model.__dict__[ATTRIBUTE] = host
            host._freeze(model)
        host.users += 1
        return host

    def wrap(self, place: Place) -> KronLinear:
        """The adapted layer at this place, put there if it is not yet."""
        if place.name in self.layers:
            return self.layers[place.name][0]
        layer = KronLinear(place.module)
        layer.train(place.module.training)
        for parent, attribute in place.holders:
            setattr(parent, attribute, layer)
        self.layers[place.name] = (layer, place)
        return layer

    def share_inputs(self, model: nn.Module) -> None:
        """Let known attention processors evaluate q, k and v from one read of x."""
        if "diffusers" not in sys.modules:
            return  # then the model is none of its models
        from .processors import SharingProcessors

        self.processors = self.processors or SharingProcessors()
        self.processors.extend(model)

    def unwrap(self, name: str, factors: KronFactors) -> None:
        """Take one adapter off one layer; without adapters the base is put back where it was."""
        if name in self.layers:
            self.layers[name][0].discard(factors)
            self._put_back(name)

    def _put_back(self, name: str) -> None:
        layer, place = self.layers[name]
        if len(layer.adapters) == 0:
            for parent, attribute in place.holders:
                setattr(parent, attribute, place.module)
            del self.layers[name]

    def displaced(self) -> list[str]:
        """Adapted layers that something else has since replaced in the model."""
        return [
            name
            for name, (layer, place) in self.layers.items()
            if any(parent._modules.get(attribute) is not layer for parent, attribute in place.holders)
        ]

    def leave(self, model: nn.Module) -> None:
        """One user less; after the last, the model is as it was before the first.

        What has since been taken out of the model, or replaced in it, is passed over.
        """
        if self.users > 1:
            self.users -= 1
            return
        for name in tuple(self.layers):
            self._put_back(name)
        if self.processors is not None:
            self.processors.restore()
        for module, method, refusal, own in self.refusing:
            if module.__dict__.get(method) is refusal:
                del module.__dict__[method]
                if own is not None:
                    module.__dict__[method] = own
        for module, attribute in self.frozen:
            parameter = module._parameters.get(attribute)
            if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
                parameter.requires_grad_(True)
        model.__dict__.pop(ATTRIBUTE, None)
        self.users = 0

    def _freeze(self, model: nn.Module) -> None:
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    self.frozen.append((module, attribute))
                    parameter.requires_grad_(False)

    def refuse_fusing(self, model: nn.Module) -> None:
        """Let diffusers' methods that would drop the deltas of linear layers raise."""
        if self.refusing:
            return
        for module in model.modules():
            for method in FUSING_METHODS:
                if callable(getattr(module, method, None)):
                    refusal = partial(_refuse, method, type(module).__name__)
                    self.refusing.append((module, method, refusal, module.__dict__.get(method)))
                    module.__dict__[method] = refusal


def _refuse(method: str, name: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    before = (
        " Where the adapters sit on a part of a model that was fusing its blocks in turn, those before this one"
        " now hold fused copies of their weights; the outputs are unchanged."
        if method == "fuse_projections"
        else ""
    )
    raise RuntimeError(
        f"{name}.{method}: the model carries kronafuse adapters, whose deltas a fused projection would drop."
        f" Fuse first and adapt the fused layers, or merge(keep=False) and remove() the attachment first.{before}"
    )
