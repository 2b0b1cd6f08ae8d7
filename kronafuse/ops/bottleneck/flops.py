"""FLOPs of the raw ops: their products, 2 a multiply-accumulate, as torch's own formulas count."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def forward(x: Tensor, _residual: Tensor | None, down: Tensor, up: Tensor, *_: Any, **__: Any) -> int:
    """x · downᵀ and hidden · upᵀ."""
    return 2 * math.prod(x.shape[:-1]) * (down.numel() + up.numel())


def backward(_dy: Tensor, x: Tensor, down: Tensor, up: Tensor, *rest: Any, **_: Any) -> int:
    """The products of the gradients that are asked for."""
    need_x, need_down, need_up, need_down_bias, _need_up_bias, need_scale = rest[-1]
    through_up = need_x or need_down or need_down_bias
    macs = up.numel() * (through_up + (need_up or need_scale)) + down.numel() * (need_x + need_down)
    return 2 * math.prod(x.shape[:-1]) * macs
