"""Where bottleneck adapters read and write: the positions of a block, in order, and the pairs that make sense."""

from __future__ import annotations

from dataclasses import dataclass

TRANSFORMER, RESNET = "transformer", "resnet"
"""Kinds of blocks: BasicTransformerBlock and ResnetBlock2D by diffusers' names."""


@dataclass(frozen=True)
class Position:
    """One place in a block.

    name:   as `source` and `sink` take it
    symbol: the paper's
    block:  the kind of block
    order:  what comes later in a block has the larger number; the text context stands beside the others
    same:   where adding something has the same effect, if that is a position by another name
    """

    name: str
    symbol: str
    block: str
    order: int
    same: str | None = None


POSITIONS = {
    each.name: each
    for each in (
        Position("attn1_in", "SA_in", TRANSFORMER, 0),
        Position("attn1_out", "SA_out", TRANSFORMER, 1, same="attn2_in"),
        Position("attn2_in", "CA_in", TRANSFORMER, 2),
        Position("attn2_context", "CA_c", TRANSFORMER, 3),
        Position("attn2_out", "CA_out", TRANSFORMER, 4, same="ff_in"),
        Position("ff_in", "FFN_in", TRANSFORMER, 5),
        Position("ff_out", "FFN_out", TRANSFORMER, 6, same="block_out"),
        Position("block_out", "Trans_out", TRANSFORMER, 7),
        Position("res_in", "Res_in", RESNET, 0),
        Position("res_out", "Res_out", RESNET, 1),
    )
}
"""Name -> position, in the order in which a block passes them. "in" is the residual stream before the norm; "out"
of attention and feed-forward is what they return, before it is added to the stream (and before a gate).

Source: Xiang et al. 2023, arXiv 2303.18181, "Design space", and the released code.
"""

CONTEXT = "attn2_context"
"""The text that cross-attention reads; it is no part of the stream, so it pairs with itself alone."""

SOURCES = tuple(POSITIONS)
"""The ten input positions."""

SINKS = tuple(name for name, each in POSITIONS.items() if each.same is None)
"""The seven output positions."""


def allowed_sinks(source: str) -> tuple[str, ...]:
    """The sinks of a source: those of its kind of block that do not come before it."""
    at = POSITIONS[source]
    if source == CONTEXT:
        return (CONTEXT,)
    return tuple(
        name
        for name in SINKS
        if POSITIONS[name].block == at.block and POSITIONS[name].order >= at.order and name != CONTEXT
    )


PAIRS = tuple((source, sink) for source in SOURCES for sink in allowed_sinks(source))
"""The twenty pairs."""


def check_pair(owner: str, source: object, sink: object) -> None:
    """Raises ValueError for what is no position, and for pairs that are none of the twenty, with what is allowed."""
    for role, name, names in (("source", source, SOURCES), ("sink", sink, SINKS)):
        at = POSITIONS.get(name) if isinstance(name, str) else None
        if role == "sink" and at is not None and at.same is not None:
            raise ValueError(
                f"{owner}: sink {name!r}: adding there is the same as adding at {at.same!r}, and that is what it"
                f" is called as a sink; sinks are {', '.join(SINKS)}"
            )
        if at is None:
            raise ValueError(f"{owner}: {role} must be one of {', '.join(names)}; got {name!r}")
    assert isinstance(source, str)
    assert isinstance(sink, str)
    allowed = allowed_sinks(source)
    if sink in allowed:
        return
    first, second = POSITIONS[source], POSITIONS[sink]
    if first.block != second.block:
        why = f"is in another kind of block ({second.block}) than source {source!r} ({first.block})"
    elif CONTEXT in (source, sink):
        why = f"does not go with source {source!r}: the text context is no part of the residual stream"
    else:
        why = f"comes before source {source!r} in the block"
    raise ValueError(f"{owner}: sink {sink!r} {why}; allowed sinks: {', '.join(allowed)}")
