"""The arms of each suite, one file a family, in the order of tables: the yardstick first, ours last."""

from __future__ import annotations

from ..records import Suite
from . import bottlenecks, dense, lycoris, ours, peft, plain
from .arm import Arm as Arm

_KRON = (
    plain.FROZEN,
    peft.PEFT_LOKR,
    peft.PEFT_LOKR_AUTOCAST,
    peft.PEFT_LORA,
    lycoris.LYCORIS_REBUILD,
    lycoris.LYCORIS_BYPASS,
    lycoris.LYCORIS_BYPASS_AUTO,
    lycoris.LYCORIS_BYPASS_TRITON,
    plain.EINSUM,
    plain.EINSUM_COMPILED,
    dense.MERGE_GEMM,
    dense.CONCAT_GEMM,
    *ours.KRON,
)
ARMS: dict[Suite, tuple[Arm, ...]] = {
    "kron_linear": _KRON,
    "kron_linear_group": _KRON,
    "bottleneck": (bottlenecks.CHAIN, bottlenecks.MINIMAL, bottlenecks.COMPILED, *ours.BOTTLENECK),
}
CHAINS = {"kron_linear": "einsum", "kron_linear_group": "einsum", "bottleneck": "chain"}
"""Suite -> the arm that `ratio_to_chain` compares with."""
