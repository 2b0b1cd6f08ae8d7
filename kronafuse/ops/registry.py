"""Which implementations can run on this machine, and why the others cannot."""

from __future__ import annotations

import torch

from .. import backends
from .kron_linear.raw import IMPLEMENTATIONS


def available_impls() -> dict[str, list[str]]:
    """Implementation -> reasons why it cannot run here on the best device; empty means that it can.

    Asked for float32 tensors on the CUDA device where there is one, else on the CPU.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    by_name = {each.name: each.reasons(device, torch.float32) for each in IMPLEMENTATIONS}
    return {name: by_name.get(name, ["not built yet"]) for name in backends.NAMES if name != "auto"}
