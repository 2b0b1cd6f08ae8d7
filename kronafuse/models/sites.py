"""Where adapters sit in a model: linear layers by name suffix, and the attention blocks around them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..nn.kron import KronLinear
from ..nn.specs import DEFAULT

CLIP_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
"""What the default targets stand for on a transformers CLIP text encoder."""

CLIP_MODEL_TYPES = ("clip_text_model", "clip")
"""`config.model_type` of the models on which they do."""


@dataclass
class Place:
    """One linear layer of a model: its first name, the module, every (parent, attribute) that holds it."""

    name: str
    module: nn.Module
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps K = in_features to N = out_features; quantised layers do too."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes)


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, child, parent) of all modules below, once for each holder; not what an adapted layer holds."""
    for attribute, child in module._modules.items():
        if child is None:
            continue
        name = f"{prefix}{attribute}"
        yield name, child, module
        if not isinstance(child, KronLinear):
            yield from walk(child, f"{name}.")


def linear_places(model: nn.Module) -> dict[str, Place]:
    """Every linear layer by its first name, in the model's order."""
    by_module: dict[int, Place] = {}
    for name, child, parent in walk(model):
        if is_linear(child):
            place = by_module.setdefault(id(child), Place(name, child))
            place.holders.append((parent, name.rpartition(".")[2]))
    return {place.name: place for place in by_module.values()}


def leaf(name: str) -> str:
    """The last part of a module's name that is not a number alone: "to_q", "to_out.0", "net.2"."""
    parts = name.split(".")
    first = len(parts) - 1
    while first > 0 and parts[first].isdigit():
        first -= 1
    return ".".join(parts[first:])


def ends_in(name: str, suffix: str) -> bool:
    """Whether a module's name is `suffix` or ends in it after a dot."""
    return name == suffix or name.endswith("." + suffix)


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets in this model's own names: the default ones stand for CLIP's on a CLIP text encoder."""
    if getattr(getattr(model, "config", None), "model_type", None) in CLIP_MODEL_TYPES and set(
        targets
    ) <= set(DEFAULT):
        return tuple(CLIP_NAMES[target] for target in targets)
    return tuple(targets)


def select(model: nn.Module, targets: Sequence[str]) -> list[Place]:
    """The linear layers whose names end in one of `targets`, in the model's order.

    Raises ValueError for a target that ends no linear layer's name, listing what exists.
    """
    places = linear_places(model)
    for target in targets:
        if not any(ends_in(name, target) for name in places):
            raise ValueError(_unknown(model, target, places))
    return [place for name, place in places.items() if any(ends_in(name, target) for target in targets)]


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute attention, by name: those with an attention processor or called so."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, KronLinear)
        and (hasattr(module, "set_processor") or type(module).__name__.endswith("Attention"))
        and any(is_linear(child) for _, child, _ in walk(module))
    }


def unmatched_blocks(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """Attention blocks that the targets miss without meaning to: name -> the linear layers they have instead.

    A block is missed where none of its layers ends in a target although another block's does, and none has a
    target's last part: "attn2.to_k" leaves attn1 out on purpose, "to_k" misses a block with a fused
    projection.
    """
    matched, missed = False, {}
    leaves = {leaf(target) for target in targets}
    for name, block in attention_blocks(model).items():
        layers = [child_name for child_name, child, _ in walk(block) if is_linear(child)]
        if any(ends_in(f"{name}.{layer}", target) for layer in layers for target in targets):
            matched = True
        elif not any(leaf(layer) in leaves for layer in layers):
            missed[name] = layers
    return missed if matched else {}


def unadapted_projections(model: nn.Module, adapted: Collection[str]) -> tuple[str, ...]:
    """Return the linear layers inside attention blocks that are not among the adapted ones, in the model's order.

    A layer that another library has wrapped is one, not also what the wrapper holds.
    """
    inside = {id(child) for block in attention_blocks(model).values() for _, child, _ in walk(block)}
    names: list[str] = []
    outer = "\0"
    for name, place in linear_places(model).items():
        if id(place.module) in inside and not name.startswith(outer):
            outer = f"{name}."
            names.append(name)
    return tuple(name for name in names if name not in adapted)


def _unknown(model: nn.Module, target: str, places: dict[str, Place]) -> str:
    other = next(
        ((name, module) for name, module in model.named_modules() if name and ends_in(name, target)), None
    )
    message = f"attach: no linear layer of {type(model).__name__} has a name that ends in {target!r}"
    if other is not None:
        message += f" ({other[0]} is {type(other[1]).__name__}, not a linear layer)"
    leaves = Counter(leaf(name) for name in places)
    close = difflib.get_close_matches(target, leaves, n=3)
    message += f"; did you mean {' or '.join(close)}?" if close else "."
    existing = ", ".join(f"{each} ({count})" for each, count in leaves.items())
    return f"{message} Its linear layers end in: {existing or 'nothing, there are none'}."


def listed(names: Sequence[str] | dict[str, None], most: int = 8) -> str:
    """The first names and how many more there are."""
    shown = list(names)[:most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
