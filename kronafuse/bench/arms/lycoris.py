"""LyCORIS's LoKr with the problem's factors in place of its own: rebuild, and bypass by each of its backends."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...ops.kron_linear.terms import FrozenLinear
from ..problems import KronProblem, Spec
from .arm import Arm, Built
from .peft import Adapted, frozen_linear, group, lokr_reasons

BACKEND = "LYCORIS_KERNEL_BACKEND"
"""Environment variable that LyCORIS reads in every call; setting it costs the call some microseconds of host time."""


def _reasons(spec: Spec) -> list[str]:
    found = importlib.util.find_spec("lycoris") is not None
    absent = [] if found else ["LyCORIS is not installed; install with: pip install lycoris-lora"]
    return [*absent, *lokr_reasons(spec)]


def _layer(layer: FrozenLinear, trains: bool, bypass: bool) -> Adapted:
    """A LokrModule; alpha is the rank, so that its scale is 1 in every mode."""
    from lycoris.modules.lokr import LokrModule

    (term,) = layer.terms
    assert layer.weight is not None
    assert term.a is not None
    low_rank = term.b_down is not None
    # The form that LyCORIS gives a low-rank right factor at any size; ours takes its place.
    module = LokrModule(
        "lokr", frozen_linear(layer.weight), lora_dim=1, alpha=1, factor=-1, full_matrix=not low_rank,
        bypass_mode=bypass,
    )  # fmt: skip
    module = module.to(layer.weight.device).train()
    assert module.use_w1
    assert module.use_w2 is not low_rank
    factors = {"a": ("lokr_w1", term.a), "b": ("lokr_w2_a" if low_rank else "lokr_w2", term.b)}
    if term.b_down is not None:
        factors["b_down"] = ("lokr_w2_b", term.b_down)
    parameters = {}
    for ours, (theirs, value) in factors.items():
        parameters[ours] = nn.Parameter(value.clone(), requires_grad=trains)
        setattr(module, theirs, parameters[ours])
    return module, parameters


def _kernel_reasons(spec: Spec) -> list[str]:
    found = _reasons(spec)
    if spec.device.type != "cuda":
        found.append("LyCORIS' kernels need a CUDA device; elsewhere it runs its torch code instead")
    return found


def _auto_reasons(spec: Spec) -> list[str]:
    found = _reasons(spec)
    if spec.device.type != "cuda":
        found.append("without a CUDA device LyCORIS chooses torch: see lycoris_bypass")
    return found


def _arm(
    name: str,
    backend: str,
    bypass: bool,
    reasons: Callable[[Spec], list[str]] = _reasons,
    evidence: tuple[str, ...] = (),
) -> Arm:
    def around(call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        def forward() -> Sequence[Tensor]:
            before = os.environ.get(BACKEND)
            os.environ[BACKEND] = backend
            try:
                return call()
            finally:
                if before is None:
                    del os.environ[BACKEND]
                else:
                    os.environ[BACKEND] = before

        return forward

    def build(problem: KronProblem) -> Built:
        return group(problem, lambda layer, trains: _layer(layer, trains, bypass), around)

    return Arm(name, build, reasons, evidence=lambda: evidence)


LYCORIS_REBUILD = _arm("lycoris_rebuild", "auto", bypass=False)
"""Its default: the dense delta, then a second GEMM, with the kernels that it picks itself."""
LYCORIS_BYPASS = _arm("lycoris_bypass", "torch", bypass=True)
"""Factors applied one after the other, in torch."""
LYCORIS_BYPASS_AUTO = _arm("lycoris_bypass_auto", "auto", bypass=True, reasons=_auto_reasons)
"""The same as users run it: its kernels, or inductor where they do not cover the factors, as it chooses."""
LYCORIS_BYPASS_TRITON = _arm(
    "lycoris_bypass_triton", "triton", bypass=True, reasons=_kernel_reasons, evidence=("lycoris::",)
)
"""The same with its Triton kernels; where it steps down to something else, the row is an error."""
