"""Modules that own adapter parameters, and the specs that describe them."""

from .factors import KronFactors
from .kron import KronLinear
from .specs import DEFAULT, AdapterSpec, KronA, LoKr, LoRA

__all__ = ["DEFAULT", "AdapterSpec", "KronA", "KronFactors", "KronLinear", "LoKr", "LoRA"]
