"""Modules that own adapter parameters, and the specs that describe them."""

from .bottleneck import BottleneckAdapter
from .bottleneck_spec import Bottleneck
from .factors import KronFactors
from .kron import KronLinear
from .spec import Spec
from .specs import DEFAULT, AdapterSpec, KronA, LoKr, LoRA

__all__ = [
    "DEFAULT",
    "AdapterSpec",
    "Bottleneck",
    "BottleneckAdapter",
    "KronA",
    "KronFactors",
    "KronLinear",
    "LoKr",
    "LoRA",
    "Spec",
]
