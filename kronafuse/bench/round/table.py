"""A round's parts as a table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .records import RoundResult


def round_table(result: RoundResult) -> Table:
    """One line for each part: how it ended, its time, its exit statuses, and what its log ends with."""
    table = Table("part", "status", title=f"One round, {result.seconds:.0f} s")
    table.add_column("seconds", justify="right")
    table.add_column("exit")
    table.add_column("what it says")
    for part in result.parts:
        exits = ", ".join("stopped" if each is None else str(each) for each in part.exit_statuses)
        skipped = f"{len(part.skipped)} not run; " if part.skipped else ""
        table.add_row(part.part, part.status, f"{part.seconds:.0f}", exits, Text(f"{skipped}{part.reason}"))
    return table
