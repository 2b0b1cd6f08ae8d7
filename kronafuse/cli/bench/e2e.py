"""`kronafuse bench e2e`: training steps of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WIDTH = 160
"""Of tables that go into a file."""

STEPS_HINT = "on a GPU 20, on a CPU 4"


def e2e(
    model: Annotated[
        list[str] | None, typer.Option(help="Model, or a glob; on a CPU sd15 and dit_xl by default.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size; 1 and 4 by default, on a CPU 1.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Arm, or a glob; frozen always runs.")] = None,
    form: Annotated[
        list[str] | None, typer.Option(help="eager, compiled, checkpointed; on a CPU eager by default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Timed steps of each arm; {STEPS_HINT} by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the frozen model; bfloat16, on a CPU float32 by default.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the latent grid; the published one, on a CPU the smallest.")
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Tokens of the text that the model reads.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; cuda where there is one.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds after which no model and no arm is begun; eager steps come first."),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file, rewritten with every row.")] = Path("runs/e2e.json"),
) -> None:
    """Time one training step of SDXL, SD 1.5, DiT-XL/2 and Flux2-klein with every adapter.

    Forward, loss, backward and optimizer step with adapters on all attention projections, beside the frozen
    model: milliseconds, peak memory and trained parameters. Weights are random, nothing is downloaded.
    """
    from ...bench.e2e import require_e2e

    require_e2e()
    from rich.console import Console

    from ...bench.e2e.options import request_of
    from ...bench.e2e.run import run
    from ...bench.e2e.table import step_table
    from ...bench.machine import describe
    from ...bench.records import Results, StepRow
    from ...bench.running import SKIPPED
    from ..exits import Missed

    request = request_of(
        models=model, batches=batch, arms=arm, forms=form, steps=steps, dtype=dtype, side=size,
        text_tokens=text_tokens, device=device, budget=budget,
    )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(describe())
    results.write(out)

    def write(row: StepRow) -> None:
        nonlocal results
        results = results.with_step(row)
        results.write(out)
        state = f"{row.step_ms.median:.1f} ms" if row.step_ms is not None else row.error or "ready"
        console.print(
            f"{row.model}, batch {row.batch}, {row.form}, {row.arm}: {state}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    skipped = run(request, write)
    console.print(step_table(results.steps))
    for each in skipped:
        console.print(f"{SKIPPED}{each}", highlight=False, markup=False, soft_wrap=True)
    if results.steps and all(row.error is not None for row in results.steps):
        raise Missed("bench e2e: no arm ran; the rows have the errors")
