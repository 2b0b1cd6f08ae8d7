"""Attention processors that evaluate q, k and v from one read of their input.

A stock processor asks its attention module for `to_q(x)`, `to_k(x)` and `to_v(x)` in turn. Ours is the stock
processor with another module in its hands: one that answers the first of these calls with one operator call
for all projections of the same x, and hands out the other results when they are asked for. Everything else,
the choice of attention kernel (`_attention_backend`) and context parallelism (`_parallel_config`) with it,
stays the stock processor's own. No parameter lives in a processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor
from torch import Tensor, nn

from ..nn.kron import KronLinear, joins_a_group, linear_group

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


def _sharing(stock: Callable[..., Any], groups: Callable[[Tensor | None], Groups]) -> Callable[..., Any]:
    @wraps(stock)
    def __call__(
        self: Any,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        shared = SharedInput(attn, groups(encoder_hidden_states))
        return stock(self, shared, hidden_states, encoder_hidden_states, *args, **kwargs)

    return __call__


class SharingAttnProcessor(AttnProcessor):
    """`AttnProcessor` with one read of x."""

    __call__ = _sharing(AttnProcessor.__call__, classic_groups)


class SharingAttnProcessor2_0(AttnProcessor2_0):
    """`AttnProcessor2_0` with one read of x."""

    __call__ = _sharing(AttnProcessor2_0.__call__, classic_groups)


class SharingJointAttnProcessor2_0(JointAttnProcessor2_0):
    """`JointAttnProcessor2_0` (SD3) with one read of x and one of the context."""

    __call__ = _sharing(JointAttnProcessor2_0.__call__, joint_groups)


class SharingFluxAttnProcessor(FluxAttnProcessor):
    """`FluxAttnProcessor` with one read of x and one of the context."""

    __call__ = _sharing(FluxAttnProcessor.__call__, joint_groups)


class SharingFlux2AttnProcessor(Flux2AttnProcessor):
    """`Flux2AttnProcessor` with one read of x and one of the context."""

    __call__ = _sharing(Flux2AttnProcessor.__call__, joint_groups)


SHARING: dict[type, type] = {
    AttnProcessor: SharingAttnProcessor,
    AttnProcessor2_0: SharingAttnProcessor2_0,
    JointAttnProcessor2_0: SharingJointAttnProcessor2_0,
    FluxAttnProcessor: SharingFluxAttnProcessor,
    Flux2AttnProcessor: SharingFlux2AttnProcessor,
}
"""Stock processor class -> ours. A processor of any other class is left as it is."""


class SharingProcessors:
    """The processors of one model that were exchanged, and how to put the originals back.

    `left` names the adapted attention blocks whose processor is of a class we do not know.
    """

    def __init__(self) -> None:
        self.exchanged: dict[str, tuple[nn.Module, Any, Any]] = {}
        self.left: dict[str, str] = {}

    def extend(self, model: nn.Module) -> None:
        """Exchange the processors of every attention block that has adapted projections by now."""
        for name, module in model.named_modules():
            stock = getattr(module, "processor", None)
            adapted = any(
                isinstance(getattr(module, each, None), KronLinear) for group in JOINT for each in group
            )
            if stock is None or not adapted or name in self.exchanged:
                continue
            sharing = SHARING.get(type(stock))
            if sharing is None:
                self.left[name] = type(stock).__name__
                continue
            ours = object.__new__(sharing)
            ours.__dict__.update(stock.__dict__)
            module.processor = ours
            self.exchanged[name] = (module, stock, ours)

    def restore(self) -> None:
        """Put back every original that is still ours; a backend chosen in between is carried over."""
        for module, stock, ours in self.exchanged.values():
            if getattr(module, "processor", None) is ours:
                stock.__dict__.update(ours.__dict__)
                module.processor = stock
        self.exchanged, self.left = {}, {}
