"""kronafuse: Kronecker and bottleneck adapters for diffusion models, evaluated without the dense update."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from . import formats as formats
    from . import nn as nn
    from .models.attach import Attachment as Attachment
    from .models.attach import attach as attach
    from .nn.bottleneck_spec import Bottleneck as Bottleneck
    from .nn.specs import KronA as KronA
    from .nn.specs import LoKr as LoKr
    from .nn.specs import LoRA as LoRA
    from .ops.bottleneck.op import bottleneck as bottleneck
    from .ops.kron_linear.op import kron_delta as kron_delta
    from .ops.kron_linear.op import kron_linear as kron_linear
    from .ops.kron_linear.op import kron_linear_group as kron_linear_group
    from .ops.kron_linear.terms import FrozenLinear as FrozenLinear
    from .ops.kron_linear.terms import KronTerm as KronTerm
    from .ops.kron_merge.op import kron_merge as kron_merge
    from .ops.registry import available_impls as available_impls
    from .planner import plan as plan

_PUBLIC = {
    "Attachment": ".models.attach",
    "Bottleneck": ".nn.bottleneck_spec",
    "FrozenLinear": ".ops.kron_linear.terms",
    "KronA": ".nn.specs",
    "KronTerm": ".ops.kron_linear.terms",
    "LoKr": ".nn.specs",
    "LoRA": ".nn.specs",
    "attach": ".models.attach",
    "available_impls": ".ops.registry",
    "bottleneck": ".ops.bottleneck.op",
    "kron_delta": ".ops.kron_linear.op",
    "kron_linear": ".ops.kron_linear.op",
    "kron_linear_group": ".ops.kron_linear.op",
    "kron_merge": ".ops.kron_merge.op",
    "plan": ".planner",
}
"""Public name -> the module that holds it, loaded when the name is first used."""

_SUBMODULES = ("formats", "nn")

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
