"""`kronafuse bench run`, and one command a suite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ...bench.records import Ceilings, Machine, Row, Suite
    from ...bench.selection import Options

Names = list[str] | None
Case = Annotated[Names, typer.Option("--case", help="Cases, as sdxl_1280-krona_64x4; globs, repeatable.")]
Layer = Annotated[Names, typer.Option("--layer", help="Layers, as sdxl_1280; globs, repeatable.")]
Adapter = Annotated[Names, typer.Option("--adapter", help="Adapters, as krona_64x4; globs, repeatable.")]
Set = Annotated[str, typer.Option("--set", help="Where no case is named: core, quick or all.")]
Batch = Annotated[list[int] | None, typer.Option("--batch", help="Images; 4 on a GPU, 1 on a CPU if absent.")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Tokens in all, instead of the case's own.")]
Dtype = Annotated[
    Names, typer.Option("--dtype", help="fp32, fp16 or bf16; bf16 on a GPU, fp32 on a CPU if absent.")
]
Mode = Annotated[Names, typer.Option("--mode", help="forward or forward_backward; both if absent.")]
ArmNames = Annotated[
    Names, typer.Option("--arm", help="Arms beside those that ratios are made with; globs, repeatable.")
]
Factors = Annotated[
    str, typer.Option("--factors", help="The adapter's parameters: compute (dtype) or float32.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda; cuda where there is one.")]
Seconds = Annotated[float, typer.Option("--seconds", help="For the turns of all arms of one case and mode.")]
Budget = Annotated[float | None, typer.Option("--budget", help="Seconds after which no new case is begun.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Results as JSON, written anew after each case; runs/bench.json if absent."),
]
Missing = Annotated[
    bool, typer.Option("--missing", help="With --add: only what the results in --out have no row of.")
]
Add = Annotated[
    bool, typer.Option("--add", help="Add to the results in --out, of the same machine, versions and commit.")
]


def run(
    suite: Annotated[
        Names, typer.Option("--suite", help="kron_linear, kron_linear_group or bottleneck; all if absent.")
    ] = None,
    case: Case = None, layer: Layer = None, adapter: Adapter = None, set_name: Set = "core", batch: Batch = None,
    tokens: Tokens = None, dtype: Dtype = None, mode: Mode = None, arm: ArmNames = None, factors: Factors = "compute",
    device: Device = None, seconds: Seconds = 2.0, budget: Budget = None, out: Out = None,
    add: Add = False, missing: Missing = False,
) -> None:  # fmt: skip
    """Time the suites' cases with all baselines.

    Every arm is checked against float64 first; what is wrong, does not cover a case or did not run becomes a row
    with its error. Exits with 1 where one of our implementations is wrong or fails, with 3 where nothing more runs
    on the device; the same command with --add --missing goes on.
    """
    from ...bench.selection import Options, suites_named

    options = Options(
        set_name, case or (), layer or (), adapter or (), batch or (), tokens, dtype or (), mode or (), factors, device
    )  # fmt: skip
    _run(suites_named(suite or ()), options, arm or (), seconds, budget, out, add, missing)


def _of(suite: str, about: str) -> Callable[..., None]:
    """The command of one suite."""

    def command(
        case: Case = None, layer: Layer = None, adapter: Adapter = None, set_name: Set = "core",
        batch: Batch = None, tokens: Tokens = None, dtype: Dtype = None, mode: Mode = None, arm: ArmNames = None,
        factors: Factors = "compute", device: Device = None, seconds: Seconds = 2.0, budget: Budget = None,
        out: Out = None, add: Add = False, missing: Missing = False,
    ) -> None:  # fmt: skip
        run(
            [suite], case, layer, adapter, set_name, batch, tokens, dtype, mode, arm, factors, device, seconds,
            budget, out, add, missing,
        )  # fmt: skip

    command.__doc__ = about
    return command


SUITE_COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "kron_linear": _of("kron_linear", "Time one adapted layer with all baselines."),
    "kron_linear_group": _of("kron_linear_group", "Time q, k and v, three adapted layers that share x."),
    "bottleneck": _of("bottleneck", "Time bottleneck adapters beside plain torch."),
}


def _run(
    suites: Sequence[Suite],
    options: Options,
    arms: Sequence[str],
    seconds: float,
    budget: float | None,
    out: Path | None,
    add: bool,
    missing: bool,
) -> None:
    from ...bench import require_libraries

    require_libraries()
    from rich.console import Console

    from ...bench.device import DEVICE_LOST, DeviceLostError
    from ...bench.running import SKIPPED, run_suites
    from ...bench.suites import NOT_COVERED
    from ...bench.tables import left_out, machine_lines, problem_table
    from ...bench.targets import lines
    from ..exits import Missed

    path = out or Path("runs/bench.json")
    console = Console()
    if not console.is_terminal:
        console.width = 200

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(machine: Machine, ceilings: Ceilings) -> None:
        for line in machine_lines(machine, ceilings):
            say(line)

    def show(rows: Sequence[Row]) -> None:
        if any(row.error is None for row in rows):
            console.print(problem_table(rows))
        for line in left_out(rows):
            say(f"    {line}")

    try:
        results, skipped = run_suites(
            suites, options, arms, path, seconds=seconds, budget=budget, add=add, missing=missing, begin=begin,
            show=show,
        )  # fmt: skip
    except DeviceLostError as error:
        print(f"kronafuse: {error}; --add --missing goes on in a new process", file=sys.stderr)
        raise typer.Exit(DEVICE_LOST) from error
    for line in lines(results):
        say(line)
    for spec in skipped:
        say(f"{SKIPPED}{spec}")
    say(f"Written: {path}")
    wrong = [
        row
        for row in results.rows
        if row.impl is not None and row.error is not None and not row.error.startswith(NOT_COVERED)
    ]
    if wrong:
        names = ", ".join(dict.fromkeys(f"{row.arm} on {row.case}" for row in wrong))
        raise Missed(f"kronafuse bench: wrong or not run: {names}")
