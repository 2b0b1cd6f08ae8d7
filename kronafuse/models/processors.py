"""Evaluate q, k and v from one read of x, with the attention processors left in place.

A processor asks its attention module for `to_q(x)`, `to_k(x)` and `to_v(x)` in turn. The attention module's
`forward` hands itself to its processor; here it hands over a stand-in, which answers the first of these calls
with one operator call for all projections of the same x, and keeps the other results until they are asked for.
The processors stay the stock objects: diffusers compares their exact classes, sets other ones, and gives them
an attention kernel (`_attention_backend`) and context parallelism (`_parallel_config`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2AttnProcessor
from torch import Tensor, nn

from ..nn.kron import KronLinear, joins_a_group, linear_group
from .instance_methods import InstanceMethod

if TYPE_CHECKING:
    from .host import Host

Groups = tuple[tuple[str, ...], ...]
"""Projections that take the same tensor, by attribute name."""

SELF: Groups = (("to_q", "to_k", "to_v"),)
CROSS: Groups = (("to_k", "to_v"),)
JOINT: Groups = (*SELF, ("add_q_proj", "add_k_proj", "add_v_proj"))


def classic_groups(encoder_hidden_states: Tensor | None) -> Groups:
    """q, k and v share x in self-attention; k and v share the context in cross-attention."""
    return SELF if encoder_hidden_states is None else CROSS


def joint_groups(encoder_hidden_states: Tensor | None) -> Groups:
    """The image's q, k and v share x; the text's share the context."""
    return SELF if encoder_hidden_states is None else JOINT


class SharedInput:
    """An attention module as a processor sees it, for the length of one call.

    The first projection of a group that is called evaluates all of them. A projection that is then called
    with another tensor than the first is evaluated again, so the result is the stock processor's in every
    case.
    """

    def __init__(self, attn: nn.Module, groups: Groups) -> None:
        self._attn = attn
        self._groups = groups
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._attn, name)
        for group in self._groups:
            if name in group and value is not None and joins_a_group(value):
                return partial(self._project, name, group)
        return value

    def _project(self, name: str, group: tuple[str, ...], x: Tensor) -> Tensor:
        shared, y = self._ready.pop(name, (None, None))
        if y is not None and shared is x:
            return y
        layers = {each: getattr(self._attn, each, None) for each in group}
        joined = {each: layer for each, layer in layers.items() if layer is not None and joins_a_group(layer)}
        for each, result in zip(joined, linear_group(x, list(joined.values())), strict=True):
            self._ready[each] = (x, result)
        return self._ready.pop(name)[1]


GROUPS: dict[type, Callable[[Tensor | None], Groups]] = {
    AttnProcessor: classic_groups,
    AttnProcessor2_0: classic_groups,
    JointAttnProcessor2_0: joint_groups,
    FluxAttnProcessor: joint_groups,
    Flux2AttnProcessor: joint_groups,
}
"""Processor class -> what shares a read. With a processor of any other class each projection is called."""


FORWARDS = (Attention.forward, FluxAttention.forward, Flux2Attention.forward)
"""Forwards that only hand their module to the processor, so that a stand-in for the module will do."""


class SharedForward(InstanceMethod):
    """An attention module's `forward` with one read of x, for as long as its processor is of a known class."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.function = type(module).forward  # Dynamo does not look it up in a class that it allows in graphs

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the class's own forward returns."""
        attn = self.module
        groups = GROUPS.get(type(attn.processor))
        stand_in = attn if groups is None else SharedInput(attn, groups(encoder_hidden_states))
        return self.function(stand_in, hidden_states, encoder_hidden_states, *args, **kwargs)

    def uninstall(self, host: Host) -> None:
        """Take the method off, also from under a hook of accelerate, which keeps the forward that it found."""
        super().uninstall(host)
        if not self.hosts and self.module.__dict__.get("_old_forward") is self:
            self.module.__dict__["_old_forward"] = self.original()


def can_share(attn: nn.Module) -> bool:
    """Whether an attention block's forward is one that may be replaced."""
    own = attn.__dict__.get("forward")
    return isinstance(own, SharedForward) or (own is None and type(attn).forward in FORWARDS)


def adapted_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention blocks with a processor and adapted projections, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "processor", None) is not None
        and any(isinstance(getattr(module, each, None), KronLinear) for group in JOINT for each in group)
    }


def unshared_reason(attn: nn.Module) -> str | None:
    """Why an adapted attention block reads x once per projection, or None where it reads x once."""
    if not isinstance(attn.__dict__.get("forward"), SharedForward):
        return "a forward of their own"
    kind = type(attn.processor)
    return None if kind in GROUPS else f"the processor {kind.__name__}"
