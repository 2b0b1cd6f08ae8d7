"""The end-to-end benchmark: every arm's training step on every model, batch and form.

Arms share one set of frozen weights and take turns. In every arm, the frozen one included, the latents
require a gradient, so that all of them go backward through the same frozen layers and `ratio_to_frozen` is
the adapter's own cost; a training script's step is shorter by the layers before the first adapter. An arm
that fails becomes a row with its error, and the others go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..ceilings import dtype_name
from ..records import Form, Spread, StepRow
from ..timing import PASSES, ArmError, interleave
from .arms import StepArm
from .configs import StepModel
from .memory import allocated_bytes
from .models import Batch, build, make_batch
from .step import Prepared, many_compilations, prepare, release

PUBLISHED_DTYPE = torch.bfloat16
NOT_TIMED = "ready, not timed yet"
"""Note of a row that is written before its arm's turns."""
MOST_ERROR = 400
"""Characters of an error that a row keeps."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    arms:        the frozen one among them gives the others their ratio
    steps:       timed steps of each arm, in two passes
    side:        of the latent grid; None for the published one, on a CPU for the smallest that the model takes
    text_tokens: likewise
    budget:      seconds after which nothing new is begun; what is ready is timed
    """

    models: Sequence[StepModel]
    batches: Sequence[int]
    arms: Sequence[StepArm]
    forms: Sequence[Form]
    device: torch.device
    dtype: torch.dtype
    steps: int
    side: int | None = None
    text_tokens: int | None = None
    budget: float | None = None

    def size_of(self, model: StepModel) -> tuple[int, int]:
        """The grid's side and the text's tokens that a model runs at."""
        on_cpu = self.device.type == "cpu"
        side = self.side or (model.cpu_side if on_cpu else model.side)
        tokens = model.cpu_tokens if on_cpu else model.text_tokens
        if model.text_tokens and self.text_tokens:
            tokens = self.text_tokens
        return side, tokens


def run(
    request: Request, write: Callable[[StepRow], None], *, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """Measure everything, form by form over all models; what was not begun because the budget was used up.

    `write` gets each row when its arm is ready, with a note that it is not timed, and again with its time. Where it
    is called twice for an arm, the later row is the one.
    """
    started = clock()

    def over() -> bool:
        return request.budget is not None and clock() - started > request.budget

    skipped: list[str] = []
    for form in request.forms:
        for model in request.models:
            if over():
                skipped.append(f"{label(model, request)}, {form}")
                continue
            _model(request, model, form, write, over, skipped)
            release(request.device)
    return skipped


def _model(
    request: Request,
    model: StepModel,
    form: Form,
    write: Callable[[StepRow], None],
    over: Callable[[], bool],
    skipped: list[str],
) -> None:
    """All batches of one model in one form."""
    side, tokens = request.size_of(model)
    try:
        built = build(model, request.dtype, request.device)
    except Exception as error:
        for batch in request.batches:
            for arm in request.arms:
                write(_failed(label(model, request), batch, arm.name, form, error))
        return
    for batch in request.batches:
        data = make_batch(model, batch, side, tokens, request.dtype, request.device)
        with many_compilations() if form == "compiled" else nullcontext():
            _group(request, model, built, data, batch, form, write, over, skipped)
        del data
        release(request.device)


def label(model: StepModel, request: Request) -> str:
    """The model's name, with what differs from the published size and from bf16."""
    side, tokens = request.size_of(model)
    differences = [f"{side}x{side}"] if side != model.side else []
    differences += [f"{tokens} text"] if tokens != model.text_tokens else []
    differences += [dtype_name(request.dtype)] if request.dtype != PUBLISHED_DTYPE else []
    return " ".join([model.name, *differences])


def _group(
    request: Request,
    model: StepModel,
    built: nn.Module,
    data: Batch,
    batch: int,
    form: Form,
    write: Callable[[StepRow], None],
    over: Callable[[], bool],
    skipped: list[str],
) -> None:
    """All arms of one model, batch and form, beside each other."""
    name, before = label(model, request), allocated_bytes(request.device)
    ready: dict[str, Prepared] = {}

    def row_of(arm: str, prepared: Prepared) -> StepRow:
        return StepRow(
            model=name,
            batch=batch,
            arm=arm,
            form=form,
            peak_bytes=prepared.peak_bytes,
            trained_parameters=prepared.trained_parameters,
            notes=(*_size_notes(model, request), *prepared.notes),
        )

    for arm in request.arms:
        if over():
            skipped.append(f"{name}, batch {batch}, {form}, {arm.name}")
            continue
        try:
            prepared = ready[arm.name] = prepare(built, model, arm, form, data, before)
        except Exception as error:
            write(_failed(name, batch, arm.name, form, error))
            release(request.device)
            continue
        row = row_of(arm.name, prepared)
        write(replace(row, notes=(*row.notes, NOT_TIMED)))
    times: dict[str, Spread] = {}
    while ready and not times:
        try:
            times = _timed(ready, request)
        except ArmError as error:
            del ready[error.arm]
            write(_failed(name, batch, error.arm, form, error.error))
    frozen = times.get("frozen")
    for arm_name, prepared in ready.items():
        spread = times[arm_name]
        ratio = None if frozen is None else spread.median / frozen.median
        write(replace(row_of(arm_name, prepared), step_ms=spread, ratio_to_frozen=ratio))


def _timed(ready: dict[str, Prepared], request: Request) -> dict[str, Spread]:
    """Milliseconds of each step, in turns."""
    wait = partial(torch.cuda.synchronize, request.device) if request.device.type == "cuda" else None
    least = math.ceil(request.steps / PASSES)
    calls = {name: prepared.step for name, prepared in ready.items()}
    found = interleave(calls, 0.0, synchronize=wait, warmup=0, least_rounds=least)
    return {name: _milliseconds(spread) for name, spread in found.items()}


def _milliseconds(spread: Spread) -> Spread:
    passes = tuple(each / 1e3 for each in spread.passes)
    return Spread(spread.median / 1e3, spread.low / 1e3, spread.high / 1e3, spread.rounds, passes)


def _size_notes(model: StepModel, request: Request) -> list[str]:
    side, tokens = request.size_of(model)
    if (side, tokens) == (model.side, model.text_tokens):
        return []
    text = f" and {tokens} text tokens" if model.text_tokens else ""
    return [f"run at {side}x{side} latents{text}, published for {model.side}x{model.side}"]


def _failed(model: str, batch: int, arm: str, form: Form, error: BaseException) -> StepRow:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"[:MOST_ERROR]
    return StepRow(model=model, batch=batch, arm=arm, form=form, error=text)
