"""What adapters have changed in a model, kept with the model so that the last one to go undoes it exactly."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

from ..nn.factors import KronFactors
from ..nn.kron import KronLinear
from ..nn.trained import TrainedTensors
from .host_methods import (
    FUSING_METHODS,
    SAVING_METHODS,
    TREE_METHODS,
    LoadStateDict,
    Refusal,
    Saving,
    StateDict,
    WithoutAdapters,
)
from .instance_methods import InstanceMethod, methods_of
from .sites import Place
from .unadapted import HOST

if TYPE_CHECKING:
    from .attachment import Attachment


class Host:
    """The adapted layers of one model, its attachments, its frozen parameters, and methods put on its modules.

    Everything is undone on the instance it was done to; nothing is changed in a class or a process.
    """

    def __init__(self) -> None:
        self.layers: dict[str, tuple[KronLinear, Place]] = {}
        self.attachments: list[Attachment] = []
        self.frozen: list[tuple[nn.Module, str]] = []
        self.methods: list[InstanceMethod] = []

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """Return the model's Host; the first attachment makes it, which freezes the model's parameters."""
        host = model.__dict__.get(HOST)
        if host is None:
            host = cls()
            model.__dict__[HOST] = host
            host._freeze(model)
            host.methods.append(StateDict.install(host, model, "state_dict"))
            host.methods.append(LoadStateDict.install(host, model, "load_state_dict"))
            for module, name in methods_of(model, SAVING_METHODS):
                host.methods.append(Saving.install(host, module, name))
            for module, name in methods_of(model, TREE_METHODS):
                host.methods.append(WithoutAdapters.install(host, module, name))
        return host

    def join(self, attachment: Attachment) -> None:
        """Count one more attachment, until `leave`."""
        self.attachments.append(attachment)

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
        """Let attention blocks whose processors we know evaluate q, k and v from one read of x."""
        if "diffusers" not in sys.modules:
            return  # then the model is none of its models
        from .processors import SharedForward, adapted_attention, can_share

        for module in adapted_attention(model).values():
            if can_share(module):
                self.methods.append(SharedForward.install(self, module, "forward"))

    def sharing(self, model: nn.Module) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the adapted attention blocks that read x once, and why each other one does not."""
        if "diffusers" not in sys.modules:
            return (), {}
        from .processors import adapted_attention, unshared_reason

        reasons = {name: unshared_reason(module) for name, module in adapted_attention(model).items()}
        left = {name: reason for name, reason in reasons.items() if reason is not None}
        return tuple(name for name in reasons if name not in left), left

    def unwrap(self, name: str, factors: KronFactors) -> None:
        """Take one adapter off one layer; without adapters the base is put back where it was."""
        if name in self.layers:
            self.layers[name][0].discard(factors)
            self._put_back(name)

    def _put_back(self, name: str) -> None:
        layer, place = self.layers[name]
        if len(layer.adapters) == 0:
            for parent, attribute in place.holders:
                setattr(parent, attribute, layer.base)
            del self.layers[name]

    def displaced(self) -> list[str]:
        """Adapted layers that something else has since replaced in the model."""
        return [
            name
            for name, (layer, place) in self.layers.items()
            if any(parent._modules.get(attribute) is not layer for parent, attribute in place.holders)
        ]

    def in_weights(self, attachment: Attachment) -> bool:
        """Whether an attachment's deltas are merged."""
        return any(
            name in self.layers
            and isinstance(trained, KronFactors)
            and self.layers[name][0].is_merged(trained)
            for name, trained in attachment._trained.items()
        )

    def leave(self, attachment: Attachment) -> None:
        """Count one attachment less; after the last, the model is as it was before the first.

        What has since been taken out of the model, or replaced in it, is passed over.
        """
        self.attachments = [each for each in self.attachments if each is not attachment]
        if self.attachments:
            return
        for name in tuple(self.layers):
            self._put_back(name)
        for method in self.methods:
            method.uninstall(self)
        self.methods = []
        for module, attribute in self.frozen:
            _set_requires_grad(module, attribute, True)
        self.frozen = []
        attachment.model.__dict__.pop(HOST, None)

    def _freeze(self, model: nn.Module) -> None:
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                # The tensors of adapters on a part of this model, or on a larger one, stay trained.
                if (
                    parameter is not None
                    and parameter.requires_grad
                    and not isinstance(module, TrainedTensors)
                ):
                    self.frozen.append((module, attribute))
                    parameter.requires_grad_(False)

    def thaw(self, part: nn.Module) -> None:
        """Undo the freezing of a part of the model, until `freeze_again`."""
        for module, attribute in self._frozen_in(part):
            _set_requires_grad(module, attribute, True)

    def freeze_again(self, part: nn.Module) -> None:
        """Freeze it again; what something else has frozen since `thaw` stays frozen after `remove`."""
        inside = self._frozen_in(part)
        for module, attribute in inside:
            parameter = module._parameters.get(attribute)
            if parameter is None or not parameter.requires_grad:
                self.frozen.remove((module, attribute))
            else:
                parameter.requires_grad_(False)

    def _frozen_in(self, part: nn.Module) -> list[tuple[nn.Module, str]]:
        inside = {id(each) for each in part.modules()}
        return [each for each in self.frozen if id(each[0]) in inside]

    def refuse_fusing(self, model: nn.Module) -> None:
        """Let diffusers' methods that would drop the deltas of linear layers raise."""
        for module, name in methods_of(model, FUSING_METHODS):
            self.methods.append(Refusal.install(self, module, name))


def _set_requires_grad(module: nn.Module, attribute: str, value: bool) -> None:
    parameter = module._parameters.get(attribute)
    if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
        parameter.requires_grad_(value)
