"""One line an arm, in fixed columns: for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .best import best_baseline, by_problem, same_basis, same_time, times_faster
from .records import Ceilings, Machine, Row, Spread

COLUMNS = (
    "arm", "time µs", "±", "cold µs", "wall µs", "host µs", "GB/s", "TFLOP/s", "% floor", "× frozen", "× best",
    "RMS y", "RMS Δ", "peak MB", "target",
)  # fmt: skip
"""time: device time on CUDA, wall time on a CPU. GB/s and % floor: of the cold time on CUDA. × frozen:
this time over the frozen layer's. × best: how many times faster than the fastest baseline; "=" where the two
cannot be told apart."""


def cells(row: Row, best: Row | None) -> list[str]:
    """The texts of a row without an error, in the order of COLUMNS."""
    spent, from_memory, accuracy = row.time_us, row.from_memory_us, row.accuracy
    assert spent is not None
    assert from_memory is not None
    cold = row.device_cold_us if row.device_us else row.wall_cold_us
    against = ""
    if best is not None and best.arm != row.arm and row.arm != "frozen" and same_basis(row, best):
        against = "=" if same_time(row, best) else f"{times_faster(row, best):.2f}"
    return [
        row.arm,
        microseconds(spent),
        f"{100 * (spent.high - spent.low) / 2 / spent.median:.0f} %",
        microseconds(cold),
        microseconds(row.wall_us),
        microseconds(row.host_us),
        "" if row.bytes_moved is None else f"{row.bytes_moved / from_memory.median / 1e3:.3g}",
        "" if row.flops is None else f"{row.flops / spent.median / 1e6:.3g}",
        "" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}",
        "" if row.ratio_to_frozen is None else f"{row.ratio_to_frozen:.2f}",
        against,
        "" if accuracy is None else f"{accuracy.y_rms:.1e}",
        "" if accuracy is None or accuracy.delta_rms is None else f"{accuracy.delta_rms:.1e}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        "" if row.verdict is None else f"{row.verdict}: {row.target}",
    ]


def microseconds(spread: Spread | None) -> str:
    """The median, to three digits or more."""
    if spread is None:
        return ""
    value = spread.median
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def title_of(row: Row) -> str:
    """What the rows of one problem share."""
    return f"{row.suite} {row.case}: batch {row.batch}, {row.tokens} tokens, {row.dtype}, {row.mode}"


def problem_table(rows: Sequence[Row]) -> Table:
    """The rows of one problem; errors in the line of their arm."""
    (arms,) = by_problem(rows).values()
    best = best_baseline(arms)
    table = Table(title=title_of(rows[0]), title_justify="left")
    for name in COLUMNS:
        table.add_column(
            name, justify="left" if name in ("arm", "target") else "right", no_wrap=name != "target"
        )
    for row in rows:
        if row.error is None:
            table.add_row(*cells(row, best))
    return table


def left_out(rows: Sequence[Row]) -> list[str]:
    """A line for every row with an error, and for every note, which arms may share."""
    lines = [f"{row.arm}: {row.error}" for row in rows if row.error is not None]
    sharing: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            sharing.setdefault(note, []).append(row.arm)
    return lines + [f"{', '.join(arms)}: {note}" for note, arms in sharing.items()]


def machine_lines(machine: Machine, ceilings: Ceilings | None) -> list[str]:
    """Where a run ran, in a few lines."""
    cpu, gpu = machine.cpu, machine.gpu
    lines = [
        f"{machine.date}, kronafuse {machine.kronafuse}"
        + (f", commit {machine.commit}" if machine.commit else "")
        + (" with changes" if machine.dirty else ""),
        f"Python {machine.python}, torch {machine.torch}, Triton {machine.triton}, PEFT {machine.peft},"
        f" LyCORIS {machine.lycoris}, diffusers {machine.diffusers}",
        f"{cpu.brand}, {cpu.cores} cores, {cpu.threads} threads, {cpu.capability}",
    ]
    if gpu is not None:
        lines.append(
            f"{gpu.name}, sm_{gpu.capability.replace('.', '')}, {gpu.multiprocessors} multiprocessors,"
            f" {gpu.l2_bytes / 2**20:.0f} MiB L2, driver {gpu.driver}, CUDA {gpu.cuda}"
        )
        if gpu.clocks is not None:
            clocks = gpu.clocks
            lines.append(
                f"clocks behind the GEMM: SM {clocks.sm_mhz} of {clocks.sm_max_mhz} MHz,"
                f" memory {clocks.memory_mhz} of {clocks.memory_max_mhz} MHz"
            )
    if ceilings is not None:
        rates = ", ".join(
            f"{name} GEMM {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.gemm_flops_per_s.items()
        )
        launch = "" if ceilings.launch_us is None else f", {ceilings.launch_us:.2g} µs a launch"
        lines.append(f"ceilings: copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, {rates}{launch}")
    return [*lines, f"command: {machine.command}"]
