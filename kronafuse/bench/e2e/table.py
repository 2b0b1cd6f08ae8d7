"""The end-to-end rows as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..records import StepRow


def step_table(steps: Sequence[StepRow]) -> Table:
    """One line for each row: time with its spread, ratio, memory, and what is trained; or the error."""
    table = Table(title="Training step, end to end")
    for name in ("model", "batch", "form", "arm"):
        table.add_column(name, no_wrap=True)
    for name in ("ms per step", "spread", "ratio to frozen", "peak MiB", "trained"):
        table.add_column(name, justify="right")
    if any(row.step_ms is None for row in steps):
        table.add_column("error")
    for row in steps:
        place = (row.model, str(row.batch), row.form, row.arm)
        if row.error is not None or row.step_ms is None:
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
            table.add_row(*place, "", "", "", peak, "", Text(row.error or "not timed"))
            continue
        low, high = row.step_ms.interval
        table.add_row(
            *place,
            f"{row.step_ms.median:.1f}",
            f"{low:.1f} to {high:.1f}",
            "" if row.ratio_to_frozen is None else f"{row.ratio_to_frozen:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
            f"{row.trained_parameters:,}",
        )
    return table
