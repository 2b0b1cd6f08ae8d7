"""The autograd.Function around the raw ops: what is saved, and which gradients are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...planner import choose
from ...shapes import KronShape
from ..calls import bind_by_position
from ..transforms import explained
from .raw import Layout, backward, forward
from .terms import LAYER_GRADIENTS, LAYER_TENSORS, TERM_GRADIENTS, TERM_TENSORS

BASE = 2
"""Where base stands among a layer's tensors; its gradient is dy itself, outside the raw op."""


class KronGroup(torch.autograd.Function):
    """The group's y of each layer, then what each term saves for backward."""

    @staticmethod
    def forward(layout: Layout, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        split = LAYER_TENSORS * len(layout.terms_per_layer)
        return tuple(forward(x, tensors[:split], tensors[split:], layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layout, x, *rest = inputs
        tensors = list(rest)  # Dynamo of torch 2.11 unpacks into a tuple
        layers = len(layout.terms_per_layer)
        split = LAYER_TENSORS * layers
        saved = output[layers:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        needs = ctx.needs_input_grad[2:]
        tensors[BASE:split:LAYER_TENSORS] = [None] * layers
        if not any(needs[split:]):
            saved = [part.new_empty(0) for part in saved]
            if not any(needs[index] for index in range(0, split, LAYER_TENSORS)):
                # dx and dbias come from dy alone: x is not kept, only its shape and dtype.
                x = x.new_empty(()).expand(x.shape)
        # What is saved depends on shapes alone, as checkpointing and tracers need it: a small fat T is held beside.
        ctx.held = {}
        if not torch.compiler.is_compiling():
            ctx.held = {
                index: part
                for index, part in enumerate(saved)
                if part.numel() and _is_fat(tensors, split, index)
            }
            saved = [x.new_empty(0) if index in ctx.held else part for index, part in enumerate(saved)]
        ctx.save_for_backward(x, *tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        layers, terms = len(layout.terms_per_layer), sum(layout.terms_per_layer)
        split = LAYER_TENSORS * layers
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[: split + TERM_TENSORS * terms], rest[split + TERM_TENSORS * terms :]
        _, need_x, *need = ctx.needs_input_grad
        results: list[Tensor | None] = [None] * len(need)
        dx = None
        used = tuple(index for index in range(layers) if grads[index] is not None)
        part = _part_of(layout.terms_per_layer, used)
        picked = [tensors[index] for index in part.tensors]
        needs = [need_x, *(need[index] for index in part.gradients)]
        if used and any(needs):
            # Under create_graph the products are recorded, to raise where they are differentiated again.
            products = KronGroupGradient.apply if torch.is_grad_enabled() else KronGroupGradient.forward
            parts = [ctx.held.get(index, saved[index]) for index in part.terms]
            dys = [grads[index] for index in used]
            flat = (*dys, x, *picked, *parts)
            dx, *computed = explained(layout.op, products, part.of(layout), needs, len(used), *flat)
            for index, result in zip(part.gradients, computed, strict=True):
                results[index] = result if need[index] else None
        for index in range(layers):
            if need[index * LAYER_TENSORS + BASE]:
                results[index * LAYER_TENSORS + BASE] = grads[index]
        return None, dx if used and need_x else None, *results


def _is_fat(tensors: Sequence[Tensor | None], split: int, term: int) -> bool:
    """Whether the T of this term is fat; its factors stand behind the layers' tensors."""
    a, b, b_down = tensors[split + term * TERM_TENSORS :][:3]
    assert b is not None
    return not choose(KronShape.of(a, b, b_down)).thin


class KronGroupGradient(torch.autograd.Function):
    """The gradients of a group, themselves not differentiable."""

    @staticmethod
    def forward(layout: Layout, needs: list[bool], layers: int, *tensors: Any) -> tuple[Tensor, ...]:
        dys, x, rest = tensors[:layers], tensors[layers], tensors[layers + 1 :]
        split = LAYER_TENSORS * layers
        end = split + TERM_TENSORS * sum(layout.terms_per_layer)
        return tuple(backward(dys, x, rest[:split], rest[split:end], layout, rest[end:], needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0].op

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{ctx.op}: second derivatives are not implemented")


bind_by_position(KronGroup)


class _Part(NamedTuple):
    """Some layers of a group: how many terms each has, and where tensors, gradients and terms stand in the whole."""

    terms_per_layer: tuple[int, ...]
    tensors: tuple[int, ...]
    gradients: tuple[int, ...]
    terms: tuple[int, ...]

    def of(self, layout: Layout) -> Layout:
        """The whole's layout, of these layers alone."""
        if self.terms_per_layer == layout.terms_per_layer:
            return layout
        return layout._replace(
            terms_per_layer=self.terms_per_layer,
            scales=tuple(layout.scales[number] for number in self.terms),
            shuffled=tuple(layout.shuffled[number] for number in self.terms),
        )


def _part_of(counts: tuple[int, ...], used: tuple[int, ...]) -> _Part:
    """The layers whose y has a gradient: the others add nothing to any."""
    split = LAYER_TENSORS * len(counts)
    first = [0, *accumulate(counts)]
    terms = [number for index in used for number in range(first[index], first[index] + counts[index])]
    assert TERM_TENSORS == TERM_GRADIENTS
    of_terms = [split + number * TERM_TENSORS + each for number in terms for each in range(TERM_TENSORS)]
    of_layers = [[index * LAYER_TENSORS + each for each in range(LAYER_TENSORS)] for index in used]
    tensors = [place for layer in of_layers for place in layer] + of_terms
    gradients = [place for layer in of_layers for place in layer[:LAYER_GRADIENTS]] + of_terms
    return _Part(tuple(counts[index] for index in used), tuple(tensors), tuple(gradients), tuple(terms))
