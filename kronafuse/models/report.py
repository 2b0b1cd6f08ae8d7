"""What `attach` did to a model, as a record that prints as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .sites import leaf

Recast = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    order:   what the planner runs first: "a_first", "b_first" or "low_rank"
    unfused: why the base is called instead of being read by the kernel, or None; known after a first call
    """

    name: str
    out_features: int
    in_features: int
    factors: str
    parameters: int
    order: str
    unfused: str | None
    merged: bool


@dataclass(frozen=True)
class Report:
    """Adapted layers, attention blocks and projections without a match, and which blocks share reads.

    unmatched:  attention block -> its linear layers, where no target matched
    sharing:    attention blocks whose q, k and v are evaluated from one read of x
    unshared:   adapted attention block -> why it is not: a processor of a class that we do not know, or a
                forward that was replaced
    unadapted:  every linear layer of an attention block that has no adapter of this attachment
    recast:     how many trained tensors are in another dtype than the spec's, by (found, asked)
    """

    model: str
    layers: tuple[LayerReport, ...]
    unmatched: dict[str, list[str]]
    sharing: tuple[str, ...]
    unshared: dict[str, str]
    unadapted: tuple[str, ...] = ()
    recast: Recast = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Trained numbers in all."""
        return sum(each.parameters for each in self.layers)

    @property
    def fused(self) -> int:
        """Layers whose base is read by the kernel."""
        return sum(each.unfused is None for each in self.layers)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.layers)} layers adapted, {self.fused} fused,"
            f" {self.parameters:,} parameters; {len(self.sharing)} attention blocks read x once"
        ]
        width = max((len(each.name) for each in self.layers), default=0)
        for each in self.layers:
            state = "fused" if each.unfused is None else f"base + delta: {each.unfused}"
            lines.append(
                f"  {each.name:<{width}}  {each.in_features} -> {each.out_features} as {each.factors},"
                f" {each.order}, {each.parameters:,} parameters, {state}{', merged' if each.merged else ''}"
            )
        for name, layers in self.unmatched.items():
            lines.append(f"  no target matches attention block {name}, which has {', '.join(layers)}")
        for reason, count in Counter(self.unshared.values()).items():
            lines.append(f"  {count} attention blocks have {reason}: x is read once per projection")
        if self.unadapted:
            leaves = Counter(leaf(name) for name in self.unadapted)
            named = ", ".join(f"{name} ({count})" for name, count in leaves.items())
            lines.append(
                f"  attention projections without an adapter, by the targets that name them: {named}"
            )
        lines += _recast_lines(self.recast)
        return "\n".join(lines)


@dataclass(frozen=True)
class BlockReport:
    """One block with a bottleneck adapter, what the adapter is made of, and its trained numbers."""

    name: str
    layout: str
    parameters: int


@dataclass(frozen=True)
class BottleneckReport:
    """Adapted blocks, and those without an adapter.

    source, sink:     the positions
    size:             the width, or the factors
    unmatched:        block -> why it has none
    model_parameters: numbers of the model without this adapter
    recast:           how many trained tensors are in another dtype than the spec's, by (found, asked)
    """

    model: str
    source: str
    sink: str
    size: str
    layers: tuple[BlockReport, ...]
    unmatched: dict[str, list[str]]
    model_parameters: int
    recast: Recast = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Trained numbers in all."""
        return sum(each.parameters for each in self.layers)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.layers)} blocks adapted, {self.source} -> {self.sink}, {self.size},"
            f" {self.parameters:,} parameters, {100 * self.parameters / self.model_parameters:.3g} % of the model's"
        ]
        width = max((len(each.name) for each in self.layers), default=0)
        lines += [
            f"  {each.name:<{width}}  {each.layout}, {each.parameters:,} parameters" for each in self.layers
        ]
        lines += [f"  without an adapter: {name}, {', '.join(why)}" for name, why in self.unmatched.items()]
        lines += _recast_lines(self.recast)
        return "\n".join(lines)


def _recast_lines(recast: Recast) -> list[str]:
    return [
        f"  {count} trained tensors are {found}, not the spec's {asked}: the model was cast after attach"
        for (found, asked), count in recast.items()
    ]
