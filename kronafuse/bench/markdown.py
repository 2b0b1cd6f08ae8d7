"""Tables in documents, generated from committed results.

A document says where a table goes and what it is made of:

    <!-- table: kron_linear mode=forward_backward dtype=float32 from results/cpu/bench.json -->
    <!-- end -->

The path is relative to the document. Words with = choose among the rows by their fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from .best import by_problem, fastest_of_ours, mean_of, no_slower, same_basis, times_faster
from .cpu_targets import auto_takes
from .records import Results, Row
from .targets import targets

MARK = re.compile(r"<!-- table: (?P<name>\w+)(?P<filters>(?: \w+=\S+)*) from (?P<path>\S+) -->\n")
END = "<!-- end -->"
LONG_US = 1000.0
"""From here on a time is given in milliseconds."""


def filled(text: str, folder: Path) -> str:
    """The document with every marked table generated anew.

    Raises ValueError for a table, a filter or an end that does not exist, and what `Results.read` raises.
    """
    parts, at = [], 0
    for mark in MARK.finditer(text):
        end = text.find(END, mark.end())
        between = MARK.search(text, mark.end(), end) if end >= 0 else None
        if end < 0 or between:
            raise ValueError(f"markdown: the table {mark['name']} from {mark['path']} has no {END}")
        filters = dict(each.split("=", 1) for each in mark["filters"].split())
        table = table_of(mark["name"], filters, Results.read(folder / mark["path"]))
        parts += [text[at : mark.end()], "\n".join(table), "\n"]
        at = end
    return "".join([*parts, text[at:]])


def table_of(name: str, filters: Mapping[str, str], results: Results) -> list[str]:
    """The lines of one table."""
    if name not in TABLES:
        raise ValueError(f"markdown: there is no table {name!r}; there are {', '.join(TABLES)}")
    known = {each.name for each in fields(Row)}
    unknown = [key for key in filters if key not in known]
    if unknown:
        raise ValueError(f"markdown: rows have no field {unknown[0]!r}; they have {', '.join(sorted(known))}")
    rows = [
        row for row in results.rows if all(str(getattr(row, key)) == value for key, value in filters.items())
    ]
    return TABLES[name](Results(results.machine, results.ceilings, tuple(rows), results.steps))


def ratios(suite: str, yardstick: str, results: Results) -> list[str]:
    """One line a problem: the yardstick's time, then the ratio of each arm to it."""
    measured = by_problem(row for row in results.rows if row.suite == suite)
    arms = list(dict.fromkeys(arm for each in measured.values() for arm in each if arm != yardstick))
    if not arms:
        raise ValueError(f"markdown: the results have no row of {suite} with figures")
    lines = table_lines(["case", "tokens", "dtype", "mode", yardstick, *arms])
    for (_, case, _batch, tokens, dtype, mode), each in measured.items():
        base = each.get(yardstick)
        if base is None:
            continue
        cells = [_ratio(each.get(arm), suite) for arm in arms]
        lines.append(line([f"`{case}`", str(tokens), dtype, mode.replace("_", " + "), _time(base), *cells]))
    return lines


def _ratio(row: Row | None, suite: str) -> str:
    if row is None:
        return ""
    ratio = row.ratio_to_chain if suite == "bottleneck" else row.ratio_to_frozen
    return "" if ratio is None else f"{ratio:.2f}"


def _time(row: Row) -> str:
    assert row.time_us is not None
    spent = row.time_us.median
    return f"{spent / 1000:.3g} ms" if spent >= LONG_US else f"{spent:.3g} µs"


def _layers(results: Results) -> list[str]:
    """One line a layer: how our time relates to the einsums' over its adapters."""
    lines = table_lines(
        ["layer", "tokens", "dtype", "mode", "adapters", "ours / einsum: mean", "least", "most", "slower"]
    )
    groups: dict[tuple[str, int, str, str], list[tuple[Row, Row]]] = {}
    taken = auto_takes if results.machine.gpu is None else fastest_of_ours
    for (suite, case, _batch, tokens, dtype, mode), arms in by_problem(results.rows).items():
        ours, chain = taken(arms), arms.get("einsum")
        if suite == "kron_linear" and ours is not None and chain is not None and same_basis(ours, chain):
            layer = case.rsplit("-", 1)[0]
            groups.setdefault((layer, tokens, dtype, mode), []).append((ours, chain))
    for (layer, tokens, dtype, mode), pairs in groups.items():
        each = [1 / times_faster(ours, chain) for ours, chain in pairs]
        slower = sum(not no_slower(ours, chain) for ours, chain in pairs)
        figures = [f"{value:.2f}" for value in (mean_of(each) or 0.0, min(each), max(each))]
        what = [f"`{layer}`", str(tokens), dtype, mode.replace("_", " + "), str(len(pairs))]
        lines.append(line([*what, *figures, str(slower)]))
    return lines


def _steps(results: Results) -> list[str]:
    lines = table_lines(
        ["model", "batch", "form", "arm", "ms a step", "× frozen", "peak GB", "trained parameters"]
    )
    for step in results.steps:
        cells = [f"`{step.model}`", str(step.batch), step.form, step.arm]
        if step.step_ms is None:
            lines.append(line([*cells, step.error or "not measured", "", "", ""]))
            continue
        lines.append(
            line(
                [
                    *cells,
                    f"{step.step_ms.median:.3g}",
                    "" if step.ratio_to_frozen is None else f"{step.ratio_to_frozen:.2f}",
                    "" if step.peak_bytes is None else f"{step.peak_bytes / 1e9:.2f}",
                    "" if step.trained_parameters is None else f"{step.trained_parameters:,}",
                ]
            )
        )
    return lines


def _targets(results: Results) -> list[str]:
    lines = table_lines(["target", "limit", "measured", "cases", "verdict"])
    return lines + [
        line([each.name, each.limit, each.figure, str(each.cases), each.verdict]) for each in targets(results)
    ]


def table_lines(head: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(head), line(["---"] * len(head))]


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(each.replace('|', '/') for each in cells)} |"


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "kron_linear": lambda results: ratios("kron_linear", "frozen", results),
    "kron_linear_group": lambda results: ratios("kron_linear_group", "frozen", results),
    "bottleneck": lambda results: ratios("bottleneck", "chain", results),
    "layers": _layers,
    "steps": _steps,
    "targets": _targets,
}
"""Name in a document -> its lines."""
