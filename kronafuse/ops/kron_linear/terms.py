"""The records a call is made of: a frozen linear layer and the Kronecker terms added to it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ... import checks

LAYER_TENSORS = 3
"""Tensors per layer in a flat list: weight, bias, base."""
TERM_TENSORS = 5
"""Tensors per term in a flat list: a, b, b_down, scale, row_scale."""
LAYER_GRADIENTS = 2
"""Gradients per layer in a flat list: weight, bias (that of base is dy itself)."""
TERM_GRADIENTS = 5
"""Gradients per term in a flat list: a, b, b_down, scale, row_scale."""


class KronTerm(NamedTuple):
    """One adapter: scale · row_scale ⊙ (A ⊗ B), to be added to a frozen weight.

    a:         (N1, K1)   left factor; None for the 1×1 identity (LoRA)
    b:         (N2, K2)   right factor, or (N2, R) with b_down
    b_down:    (R, K2)    B = b · b_down
    scale:     float or 0-d tensor
    shuffled:  output index n2·N1 + n1 instead of n1·N2 + n2 (DiffuseKronA's released layout)
    row_scale: (N,)       multiplies the delta's rows, in the order of y (rank dropout)
    """

    a: Tensor | None
    b: Tensor
    b_down: Tensor | None = None
    scale: float | Tensor = 1.0
    shuffled: bool = False
    row_scale: Tensor | None = None


class FrozenLinear(NamedTuple):
    """One frozen layer and its terms: y = x Wᵀ + bias + base + Σ terms.

    weight: (N, K)     None where the layer itself is evaluated elsewhere and its output is `base`
    terms:  KronTerms, all of the same N and K
    bias:   (N,)
    base:   (..., N)   added to the result
    """

    weight: Tensor | None
    terms: tuple[KronTerm, ...] = ()
    bias: Tensor | None = None
    base: Tensor | None = None


def check_records(op: str, x: object, layers: object, impl: object) -> None:
    """Raises TypeError unless x is a tensor, layers a sequence of FrozenLinears of tensors, and impl a string."""
    checks.check_tensor(op, "x", x)
    if not isinstance(impl, str):
        raise TypeError(f"{op}: impl must be a string; got {type(impl).__name__}")
    if not isinstance(layers, (list, tuple)) or isinstance(layers, FrozenLinear):
        raise TypeError(f"{op}: layers must be a list of FrozenLinears; got {type(layers).__name__}")
    for layer in layers:
        if not isinstance(layer, FrozenLinear):
            raise TypeError(f"{op}: layers must be FrozenLinears; got {type(layer).__name__}")
        for name, value in (("weight", layer.weight), ("bias", layer.bias), ("base", layer.base)):
            checks.check_tensor(op, name, value, optional=True)
        if not isinstance(layer.terms, (list, tuple)) or isinstance(layer.terms, KronTerm):
            raise TypeError(f"{op}: terms must be a tuple of KronTerms; got {type(layer.terms).__name__}")
        for term in layer.terms:
            if not isinstance(term, KronTerm):
                raise TypeError(f"{op}: terms must be KronTerms; got {type(term).__name__}")
            checks.check_tensor(op, "a", term.a, optional=True)
            checks.check_tensor(op, "b", term.b)
            checks.check_tensor(op, "b_down", term.b_down, optional=True)
            checks.check_tensor(op, "row_scale", term.row_scale, optional=True)
            checks.check_shuffled(op, term.shuffled)
