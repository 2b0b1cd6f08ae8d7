"""The analysis as Markdown for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...formats.atomic import write_json, written_beside
from .design import Design
from .linear import Term, TypeTwo
from .one_way import OneWay
from .plots import CONFIDENCE, interval

MARKDOWN, JSON = "anova.md", "anova.json"
POSITIONS_PLOT = "positions.png"

OVER_CONFIGURATIONS, OVER_RUNS = "over configurations", "over runs"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Everything that was computed and what it was computed from.

    configurations: one-way, every configuration's mean over its seeds is an observation
    runs:           one-way, every run is one; the same list where every configuration was run once
    constants:      columns with one value in all rows -> that value
    plots:          title -> file name beside the report
    """

    source: str
    filters: tuple[str, ...]
    rows: int
    design: Design
    configurations: list[OneWay]
    runs: list[OneWay]
    type_two: TypeTwo
    constants: dict[str, str]
    plots: dict[str, str]


def write_report(folder: Path, analysis: Analysis) -> None:
    """anova.md and anova.json in `folder`."""
    write_json(folder / JSON, as_json(analysis))
    with written_beside(folder / MARKDOWN) as partial:
        partial.write_text(as_markdown(analysis), encoding="utf-8")


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The numbers."""
    design, two = analysis.design, analysis.type_two
    return {
        "source": analysis.source,
        "filters": list(analysis.filters),
        "response": design.response,
        "rows": analysis.rows,
        "runs": len(design.data),
        "configurations": len(design.configurations),
        "factors": design.factors,
        "left_out": design.left_out,
        "missing": list(design.missing),
        "constants": analysis.constants,
        "means": {factor: means(design, factor) for factor in design.factors},
        "one_way_configurations": [dataclasses.asdict(each) for each in analysis.configurations],
        "one_way_runs": [dataclasses.asdict(each) for each in analysis.runs],
        "type_two": dataclasses.asdict(two),
        "aliased": {name: {"df": df, "nominal": nominal} for name, (df, nominal) in two.aliased.items()},
        "plots": analysis.plots,
    }


def means(design: Design, factor: str) -> list[dict[str, Any]]:
    """Each level's count, mean and confidence interval."""
    found = []
    for level in design.factors[factor]:
        values = design.values[(design.data[factor] == level).to_numpy()]
        low, high = interval(values)
        found.append({
            "level": level, "count": len(values), "mean": float(values.mean()),
            "low": low if len(values) > 1 else None, "high": high if len(values) > 1 else None,
        })  # fmt: skip
    return found


def as_markdown(analysis: Analysis) -> str:
    """The report."""
    design = analysis.design
    parts = [
        f"# Analysis of variance of {design.response}",
        _counts(analysis),
        *[
            part
            for title, (text, results) in one_way_tables(analysis).items()
            for part in (f"## {title}", text, markdown_table(*one_way_rows(results)))
        ],
        f"## {type_two_title(analysis)}",
        "Each term's sum of squares given all others that do not contain it, by ordinary least squares.",
        markdown_table(*type_two_rows(analysis.type_two)),
        *_bullets(alias_notes(analysis.type_two)),
        "## Means",
    ]
    for factor in design.factors:
        rows = [
            [each["level"], str(each["count"]), f"{each['mean']:.4g}", _interval_text(each)]
            for each in means(design, factor)
        ]
        parts.append(markdown_table([factor, "runs", "mean", f"{CONFIDENCE:.0%} interval"], rows))
    parts += [
        "## Plots",
        *[f"![{_one_line(title)}]({quote(name)})" for title, name in analysis.plots.items()],
    ]
    if POSITIONS_PLOT not in analysis.plots.values():
        parts.append(NO_POSITIONS)
    if design.missing:
        parts += ["## Missing", *_bullets(design.missing)]
    if analysis.constants:
        rows = [[name, value] for name, value in analysis.constants.items()]
        parts += ["## The same in all rows", markdown_table(["column", "value"], rows)]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> list[str]:
    """One list, or nothing."""
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _counts(analysis: Analysis) -> str:
    design = analysis.design
    filters = f", left by the filters {' and '.join(f'`{each}`' for each in analysis.filters)}"
    lines = [
        f"Results: `{analysis.source}`, {analysis.rows} rows{filters if analysis.filters else ''}",
        f"Runs with a result: {len(design.data)}, of {len(design.configurations)} configurations",
        *[
            f"Factor {name}: {len(levels)} levels ({', '.join(levels)})"
            for name, levels in design.factors.items()
        ],
        *[f"Left out: {name} ({why})" for name, why in design.left_out.items()],
        *([f"Missing, and gone on without: {len(design.missing)}, listed below"] if design.missing else []),
    ]
    return _bullets(lines)[0]


NO_POSITIONS = (
    "No map of positions: it needs source and sink among the columns looked at, and two pairs of them."
)


def one_way_tables(analysis: Analysis) -> dict[str, tuple[str, list[OneWay]]]:
    """Title -> what an observation is, and the results; one table where every configuration was run once."""
    means = "every configuration's mean over its seeds is an observation, as in the paper"
    tables = {
        f"One factor at a time, {OVER_CONFIGURATIONS}": (
            f"F = MS_between / MS_within; {means}.", analysis.configurations,
        ),
        f"One factor at a time, {OVER_RUNS}": (
            "F = MS_between / MS_within; every run is an observation, as if the seeds of a configuration were"
            " independent of each other.",
            analysis.runs,
        ),
    }  # fmt: skip
    return tables if analysis.design.replicated else dict([next(iter(tables.items()))])


def type_two_title(analysis: Analysis) -> str:
    """Heading of the type-II table."""
    if analysis.design.replicated:
        return f"All factors together (type II), {OVER_RUNS}: seeds are replicates"
    return f"All factors together (type II), {OVER_CONFIGURATIONS}"


def one_way_rows(results: Sequence[OneWay]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the one-way table."""
    head = ["factor", "df between", "df within", "MS between", "MS within", "F", "p"]
    rows = [
        [
            each.factor, str(each.df_between), str(each.df_within), f"{each.ms_between:.4g}",
            "" if each.ms_within is None else f"{each.ms_within:.4g}",
            each.note if each.f is None else f"{each.f:.4g}", "" if each.p is None else p_text(each.p),
        ]
        for each in results
    ]  # fmt: skip
    return head, rows


def type_two_rows(result: TypeTwo) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the type-II table, the residual's last; an aliased factor has no figures."""
    head = ["term", "df", "SS", "F", "p", "η²", "partial η²", "ω²"]
    rows = [_term_row(each) for each in result.terms]
    rows.append(["residual", str(result.df_residual), f"{result.ss_residual:.4g}", "", "", "", "", ""])
    return head, rows


def _term_row(term: Term) -> list[str]:
    if term.ss is None or term.f is None or term.p is None:
        return [f"{term.factor} (aliased)", f"0 of {term.nominal}", "", "", "", "", "", ""]
    effects = (term.eta_squared, term.partial_eta_squared, term.omega_squared)
    df = str(term.df) if term.df == term.nominal else f"{term.df} of {term.nominal}"
    return [
        term.factor, df, f"{term.ss:.4g}", f"{term.f:.4g}", p_text(term.p),
        *(f"{effect:.3f}" for effect in effects if effect is not None),
    ]  # fmt: skip


def alias_notes(result: TypeTwo) -> list[str]:
    """In words, what the design cannot tell apart."""
    notes = []
    if result.aliased:
        counts = ", ".join(f"{name} {df} of {nominal}" for name, (df, nominal) in result.aliased.items())
        notes.append(
            f"Aliased: the design matrix has rank {result.rank} and {result.columns} columns. Degrees of freedom"
            f" that can be told from the other factors: {counts}. The figures above are of those alone."
        )
    for each in result.parts:
        listed = "; ".join(
            "(" + ", ".join(f"{factor}: {' '.join(levels)}" for factor, levels in part.items()) + ")"
            for part in each.parts
        )
        notes.append(
            f"No run connects these {len(each.parts)} parts, so that a difference between them can be put down"
            f" neither to {each.factors[0]} nor to {each.factors[1]}: {listed}."
        )
    return notes


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose numbers are right-aligned, but for the first column."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def p_text(p: float) -> str:
    """Three digits, and "< 0.0001" below that."""
    return "< 0.0001" if p < 1e-4 else f"{p:.3g}"


def _interval_text(level: dict[str, Any]) -> str:
    return "one run" if level["low"] is None else f"{level['low']:.4g} to {level['high']:.4g}"
