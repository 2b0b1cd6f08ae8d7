"""What a `kronafuse sweep` command asks for: its study file and its options as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..train.options import read_toml, tomllib
from .families import AXES, FORMS_WITH, axes_of
from .grid import ALL, KEYS, Grid, check_together, make_grid

JOB = "digits"
SEEDS = (0, 1, 2)
SMOKE_ADAPTERS = (
    {"family": "bottleneck", "pairs": ["attn2_out -> ff_in", "res_in -> res_out"], "width": 4},
    {"family": "krona", "factors": "4x8"},
    {"family": "lora", "rank": 2},
)
"""What a smoke run does where no grid is given."""


@dataclass(frozen=True)
class Request:
    """job:      by name
    settings: the study's, with those of the options
    options:  of them, the options' own, which count over a smoke run's too
    """

    job: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    grid: Grid


def read_study(path: Path | None) -> dict[str, Any]:
    """The keys of a study file; ValueError for keys that do not exist and values of the wrong shape."""
    study = {} if path is None else read_toml(path)
    unknown = [key for key in study if key not in KEYS]
    if unknown:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; a study has: {', '.join(KEYS)}")
    for key, kind, text in (
        ("job", str, "a name"),
        ("seeds", list, "a list of integers"),
        ("settings", dict, "a table [settings]"),
        ("adapters", list, "tables [[adapters]]"),
    ):
        if key in study and not isinstance(study[key], kind):
            raise TypeError(f"{path}: {key} must be {text}; got {study[key]!r}")
    if not all(isinstance(table, dict) for table in study.get("adapters", [])):
        raise TypeError(f"{path}: adapters must be tables [[adapters]]; got {study['adapters']!r}")
    return study


def make_request(
    study: Mapping[str, Any],
    *,
    job: str | None,
    seeds: str | None,
    families: str | None,
    axes: Mapping[str, str | None],
    settings: Sequence[str],
    smoke: bool,
) -> Request:
    """The study with the options in the places of its keys.

    axes:     axis -> values separated by commas, or None; replaces the axis in every family that has it
    settings: "key=value" each, the value as TOML would read it
    smoke:    one seed, and a grid of a few runs where none is given

    The errors are those of `make_grid`; ValueError for options that contradict each other, and for one that no
    family of the study takes.
    """
    check_together([axis for axis, text in axes.items() if text is not None])
    given = {axis: split(axis, text) for axis, text in axes.items() if text is not None}
    tables = [dict(table) for table in study.get("adapters", [])]
    if not tables and smoke and not given and families is None:
        tables = [dict(table) for table in SMOKE_ADAPTERS]
    if families is not None:
        tables = _of_families(tables, [each.strip() for each in families.split(",")])
    elif not tables:
        tables = [{"family": "bottleneck"}]
    if "form" in given:
        tables = [{**each, "form": given["form"]} if _takes(each, "form") else each for each in tables]
    unused = [axis for axis in given if not any(_takes(table, axis) for table in tables)]
    if unused:
        named = ", ".join(dict.fromkeys(str(table.get("family")) for table in tables))
        raise ValueError(f"sweep: no family of the grid ({named}) has the axis {', '.join(unused)}")
    for table in tables:
        for axis, values in given.items():
            if _takes(table, axis):
                _replace(table, axis, values)
    chosen = study.get("seeds", list(SEEDS)) if seeds is None else _numbers("seeds", seeds, int)
    if smoke and seeds is None:
        chosen = chosen[:1]
    options = dict(_setting(each) for each in settings)
    return Request(
        job or study.get("job", JOB),
        {**study.get("settings", {}), **options},
        options,
        make_grid(tables, chosen),
    )


def _of_families(tables: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The tables of these families; a family without a table has its defaults."""
    for name in names:
        axes_of(name)
    there = {table.get("family") for table in tables}
    kept = [table for table in tables if table.get("family") in names]
    return kept + [{"family": name} for name in names if name not in there]


def _takes(table: Mapping[str, Any], axis: str) -> bool:
    family = str(table.get("family"))
    if family == "bottleneck" and axis in FORMS_WITH:
        forms = table.get("form", "dense")
        return bool(set(FORMS_WITH[axis]) & set(forms if isinstance(forms, list) else [forms]))
    return axis in axes_of(family) or (axis == "pairs" and family == "bottleneck")


def _replace(table: dict[str, Any], axis: str, values: Any) -> None:
    """Puts an axis into a table; what it stands against goes."""
    for against in {"pairs": ("source", "sink"), "width": ("budget",), "budget": ("width",)}.get(axis, ()):
        table.pop(against, None)
    if axis in ("source", "sink"):
        table.pop("pairs", None)
    table[axis] = values


def split(axis: str, text: str) -> Any:
    """The text of an option as the axis's values; "all" pairs stay as they are."""
    parts = [part.strip() for part in text.split(",")]
    if axis == "pairs":
        return ALL if parts == [ALL] else parts
    types = (AXES[axis], *get_args(AXES[axis]))
    if axis == "factors" or str in types:
        return parts
    return _numbers(axis, text, float if float in types else int)


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        noun = "integers" if kind is int else "numbers"
        raise ValueError(f"sweep: {name} must be {noun} separated by commas; got {text!r}") from error


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ValueError(f"sweep: a setting is written KEY=VALUE; got {text!r}")
    return name.strip(), _plain(value.strip())


def _plain(text: str) -> Any:
    """The value as TOML reads it, and the text itself where that is none."""
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text
