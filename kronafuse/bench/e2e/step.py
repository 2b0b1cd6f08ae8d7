"""One training step of one arm: forward, loss, backward, and AdamW on what is trained."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...torch_private import graph_breaks, more_recompilations
from ..profiling import profiled
from ..records import Form
from .arms import Adapted, StepArm, adapted_layers
from .configs import StepModel
from .memory import allocated_bytes, peak_bytes
from .models import Batch, sharing_copy

FORMS: tuple[Form, ...] = ("eager", "compiled", "checkpointed")
LEARNING_RATE = 1e-4
RECOMPILE_LIMIT = 1024
"""Compilations of one function: all arms compile the same classes, and none may fall back to eager for it."""


class Step:
    """A training step that can be called again and again; returns the loss."""

    def __init__(self, arm: StepArm, adapted: Adapted, form: Form, batch: Batch) -> None:
        self.arm, self.parameters, self.batch = arm, adapted.parameters, batch
        self.forward = torch.compile(adapted.model) if form == "compiled" else adapted.model
        self.optimizer = (
            torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True) if self.parameters else None
        )

    def __call__(self) -> Tensor:
        with self.arm.surroundings(self.batch.x.device):
            output = self.forward(**self.batch.inputs, return_dict=False)[0]
            loss = F.mse_loss(output.float(), self.batch.target.float())
        loss.backward()
        self.batch.x.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


@dataclass
class Prepared:
    """A step that ran, and what is known of it before it is timed."""

    step: Step
    trained_parameters: int
    peak_bytes: int | None
    notes: list[str] = field(default_factory=list)


def prepare(model: nn.Module, of: StepModel, arm: StepArm, form: Form, batch: Batch, before: int) -> Prepared:
    """The arm on modules of its own that share the frozen weights, run until nothing is made for the first time.

    before: bytes on the GPU before the first arm: the model and its batch

    Raises what the arm raises; ValueError for autocast over a model that is not bf16; RuntimeError where the
    loss is not finite or the arm's operator did not run.
    """
    device = batch.x.device
    arm.require()
    if arm.autocast and batch.x.dtype != torch.bfloat16:
        raise ValueError(
            f"{arm.name}: bf16 autocast would change the frozen model too, which is {batch.x.dtype}"
        )
    others = allocated_bytes(device) - before
    copied = sharing_copy(model)
    if form == "checkpointed":
        copied.enable_gradient_checkpointing()  # type: ignore[operator]
    torch.manual_seed(0)
    adapted = arm.put(copied, of)
    step = Step(arm, adapted, form, batch)
    with _graph_breaks() as breaks:
        loss = float(step())
    if not math.isfinite(loss):
        raise RuntimeError(f"{arm.name}: the loss is {loss}")
    notes = list(adapted.notes)
    if form == "compiled":
        notes.append(f"{sum(breaks.values())} graph breaks")
    if arm.operator is not None:
        notes.append(_proof(arm, step, device))
    if arm.counted is not None:
        notes.append(_counted(arm.counted, step, device, len(adapted_layers(model, of))))
    peak, what = peak_bytes(step, device, others)
    trained = sum(each.numel() for each in adapted.parameters)
    return Prepared(step, trained, peak, [*notes, what])


@contextmanager
def _graph_breaks() -> Iterator[Counter[str]]:
    """The reasons for which torch.compile breaks graphs inside the block, counted."""
    found: Counter[str] = Counter()
    before = Counter(graph_breaks())
    yield found
    found.update(Counter(graph_breaks()) - before)


def _proof(arm: StepArm, step: Callable[[], object], device: torch.device) -> str:
    """What the profiler saw of the arm's operators in a step. RuntimeError where it saw none."""
    operators, kernels = profiled(step, device)
    assert arm.operator is not None
    own = {name: count for name, count in operators.items() if name.startswith(arm.operator)}
    if not own:
        raise RuntimeError(
            f"{arm.name}: no operator of {arm.operator} ran in a step: its library took another path"
        )
    launched = sorted(name for name in kernels if name.startswith("_"))
    if arm.kernels and device.type == "cuda" and not launched:
        raise RuntimeError(
            f"{arm.name}: {', '.join(own)} ran without a Triton kernel; kernels seen: {_listed(list(kernels))}"
        )
    counts = ", ".join(f"{name} ×{count}" for name, count in own.items())
    return f"a step ran {counts}" + (f"; kernels: {', '.join(launched)}" if launched else "")


def _counted(operator: str, step: Callable[[], object], device: torch.device, layers: int) -> str:
    """How often a step ran a library's own operators, which serve some layers and leave others to torch."""
    operators, _ = profiled(step, device)
    own = {name: count for name, count in operators.items() if name.startswith(operator)}
    counts = ", ".join(f"{name} ×{count}" for name, count in own.items()) or f"no operator of {operator}"
    return f"a step over {layers} adapted layers ran {counts}"


@contextmanager
def many_compilations() -> Iterator[None]:
    """Room for every arm's compilations of the same functions; what was compiled is dropped at both ends."""
    torch.compiler.reset()
    try:
        with more_recompilations(RECOMPILE_LIMIT):
            yield
    finally:
        torch.compiler.reset()


def release(device: torch.device) -> None:
    """Give back what failed and finished arms held: their modules refer to each other in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) or "none"
