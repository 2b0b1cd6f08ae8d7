"""Which implementations can run on this machine, and why the others cannot."""

from __future__ import annotations

import torch

from .. import backends
from .bottleneck import raw as bottleneck
from .kron_linear import raw as kron_linear

IMPLEMENTATIONS = {"kron_linear": kron_linear.IMPLEMENTATIONS, "bottleneck": bottleneck.IMPLEMENTATIONS}
"""Op of a training step -> what can run it."""
DTYPES = (torch.float32, torch.bfloat16)
"""Most implementations serve the first; those for 16-bit tensors alone the second."""


def available_impls() -> dict[str, list[str]]:
    """Implementation -> reasons why it cannot run here on the best device, or why `auto` passes it by; empty: neither.

    Asked on the CUDA device where there is one, else on the CPU, for float32 tensors or, where that leaves fewer
    reasons, for bfloat16 ones. A reason that holds for some ops only names them.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return {name: _reasons(name, device) for name in backends.NAMES if name != "auto"}


def _reasons(name: str, device: torch.device) -> list[str]:
    """Why the implementation cannot run; what all ops say, once."""
    ops: dict[str, list[str]] = {}
    for op, implementations in IMPLEMENTATIONS.items():
        found = [_against(each, device) for each in implementations if each.name == name]
        for reason in found[0] if found else ["not built yet"]:
            ops.setdefault(reason, []).append(op)
    return [
        reason if len(named) == len(IMPLEMENTATIONS) else f"{', '.join(named)}: {reason}"
        for reason, named in ops.items()
    ]


def _against(implementation: backends.Implementation, device: torch.device) -> list[str]:
    """Why it cannot run in the dtype that suits it best; where it can, why `auto` passes it by."""
    found = min((implementation.reasons(device, dtype) for dtype in DTYPES), key=len)
    return found or [each for each in (implementation.unmeasured,) if each is not None]
