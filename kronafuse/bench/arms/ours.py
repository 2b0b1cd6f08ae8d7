"""Our implementations, each by name."""

from __future__ import annotations

import sys

from ... import backends
from ...env import triton_interprets
from ...ops.bottleneck.op import bottleneck
from ...ops.kron_linear.op import kron_linear_group
from ...ops.registry import IMPLEMENTATIONS
from ...testing.bottleneck_cases import BottleneckCase
from ..problems import BottleneckProblem, KronProblem, Spec
from .arm import Arm, Built
from .bottlenecks import on_bottleneck
from .plain import adapted

NAMES = tuple(name for name in backends.NAMES if name not in ("auto", "reference"))
"""Implementations that are there to be fast."""


def _reasons(impl: str, spec: Spec) -> list[str]:
    op = "bottleneck" if isinstance(spec.case, BottleneckCase) else "kron_linear"
    found = [each for each in IMPLEMENTATIONS[op] if each.name == impl]
    reasons = (
        found[0].reasons(spec.device, spec.dtype) if found else [f"{op} has no {impl!r} implementation yet"]
    )
    if not reasons and impl == "triton" and triton_interprets():
        reasons = ["kernels run in Triton's interpreter, whose speed says nothing"]
    if not reasons and impl == "cuda" and spec.device.type == "cpu":
        reasons = ["kernels are emulated on the CPU, whose speed says nothing"]
    return reasons


def triton_kernel_names() -> tuple[str, ...]:
    """Names of the Triton kernels of all ops that have been loaded."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("kronafuse.ops.") and module is not None:
            found |= {
                value.__name__
                for value in vars(module).values()
                if hasattr(value, "arg_names") and value.__name__.endswith("_kernel")
            }
    return tuple(sorted(found))


EVIDENCE = {
    "triton": triton_kernel_names,
    "eager": lambda: ("kronafuse::",),
    # A product that torch's GEMM does best, as all of LoRA's, is torch's in this one too.
    "cpu": lambda: ("kronafuse_cpu::", "kronafuse::"),
    "cuda": lambda: ("kronafuse_cuda::",),
}


def _kron(impl: str) -> Arm:
    def build(problem: KronProblem) -> Built:
        return adapted(problem, lambda x, layers: kron_linear_group(x, layers, impl=impl))

    return Arm(f"ours_{impl}", build, lambda spec: _reasons(impl, spec), impl=impl, evidence=EVIDENCE[impl])


def _bottleneck(impl: str) -> Arm:
    def build(problem: BottleneckProblem) -> Built:
        return on_bottleneck(problem, lambda *tensors, **options: bottleneck(*tensors, impl=impl, **options))

    return Arm(f"ours_{impl}", build, lambda spec: _reasons(impl, spec), impl=impl, evidence=EVIDENCE[impl])


KRON = tuple(_kron(impl) for impl in NAMES)
BOTTLENECK = tuple(_bottleneck(impl) for impl in NAMES)
