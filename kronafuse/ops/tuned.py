"""Configurations that a GPU measured: one table, read at first use, with nothing searched at run time.

A row serves one kernel on the GPU of exactly its name and one problem: all sizes exact, but the number of tokens or
rows, which counts as the next power of two, so that the row of 4,096 serves 2,049 to 4,096. Where no row fits, the
rule of the op's `tuning.py` chooses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from .launch import Architecture

PATH = Path(__file__).with_name("tuned.json")
"""The table that the package ships."""
VARIABLE = "KRONAFUSE_TUNED"
"""Environment variable: the path of a table to use instead of the shipped one, read at first use."""
SCHEMA = 1
KEYS: dict[str, tuple[str, ...]] = {
    "linear": (
        "dtype", "tokens", "features", "in_features", "transposed", "tail_width", "accumulators", "descriptors"
    ),
    "shrink": ("dtype", "rows", "width", "features"),
    "mix": ("dtype", "rows", "out", "features"),
    "reduce": ("dtype", "rows", "height", "width"),
    "shrink_reduce": ("dtype", "rows", "features", "width"),
    "one_pass": ("dtype", "tokens", "o1", "i1", "o2", "i2", "weight", "transposed", "descriptors"),
    "fat_route": (
        "dtype", "tokens", "o1", "i1", "o2", "i2", "order", "weight", "transposed", "descriptors", "kept"
    ),
    "base_route": ("dtype", "tokens", "features", "in_features", "transposed", "terms", "tails"),
    "bottleneck": ("dtype", "widest", "tokens", "in_features", "width", "out_features"),
}  # fmt: skip
"""Kernel or route -> what a row's key names, in the order in which it is asked for."""
BUCKETED = ("tokens", "rows")
"""Sizes that count as the next power of two."""


class Config(Protocol):
    """A configuration: a dataclass that says why it cannot run."""

    @property
    def reasons(self) -> Callable[..., list[str]]:
        """What it depends on, such as architecture and dtype -> why it cannot run there."""
        ...


ConfigType = TypeVar("ConfigType", bound=Config)
RuleType = TypeVar("RuleType")
"""The same, or None as well where a rule may find that no configuration is worth it."""


@dataclass(frozen=True)
class Row:
    """One measured choice, the second best beside it, and how it was measured."""

    kernel: str
    gpu: str
    key: dict[str, Any]
    config: dict[str, Any]
    time_us: float
    runner_up: dict[str, Any] | None
    date: str
    command: str
    commit: str
    triton: str

    @property
    def place(self) -> tuple[object, ...]:
        """What no two rows share."""
        return (self.kernel, self.gpu, *self.key.values())


def bucket(size: int) -> int:
    """The next power of two: sizes above half of it, up to it, share its row."""
    return 1 << max(0, size - 1).bit_length()


def key_of(kernel: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """The key of a row for these sizes, dtypes as in "bfloat16"."""
    found: dict[str, Any] = {}
    for name, value in zip(KEYS[kernel], values, strict=True):
        if isinstance(value, torch.dtype):
            found[name] = str(value).removeprefix("torch.")
        else:
            found[name] = bucket(value) if name in BUCKETED else value
    return found


def read(path: Path) -> list[Row]:
    """The rows of a table; ValueError that names the file, the row and the rule that it breaks."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a table of tuned configurations must be JSON; {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("schema") != SCHEMA
        or not isinstance(content.get("rows"), list)
    ):
        raise ValueError(
            f'{path}: a table must be {{"schema": {SCHEMA}, "rows": [...]}}; got {str(content)[:80]}'
        )
    rows = [_checked(path, number, row) for number, row in enumerate(content["rows"])]
    seen: dict[tuple[object, ...], int] = {}
    for number, row in enumerate(rows):
        if row.place in seen:
            raise ValueError(
                f"{path}: rows {seen[row.place]} and {number} are for the same {row.kernel} problem"
            )
        seen[row.place] = number
    return rows


def _checked(path: Path, number: int, row: Any) -> Row:
    where = f"{path}: row {number}"
    names = list(Row.__dataclass_fields__)
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with {', '.join(names)}; got {row!r}")
    absent, unknown = [name for name in names if name not in row], sorted(set(row) - set(names))
    if absent or unknown:
        raise ValueError(f"{where} must have {', '.join(names)}; absent: {absent}, unknown: {unknown}")
    if row["kernel"] not in KEYS:
        raise ValueError(f"{where}: kernel must be one of {', '.join(KEYS)}; got {row['kernel']!r}")
    empty = [name for name in ("gpu", "date", "command", "commit", "triton") if not _is_text(row[name])]
    if empty:
        raise ValueError(
            f"{where}: {', '.join(empty)} must say something; a row is only as good as its origin"
        )
    try:
        date.fromisoformat(row["date"])
    except ValueError as error:
        raise ValueError(f"{where}: date must be as 2026-01-31; got {row['date']!r}") from error
    expected = list(KEYS[row["kernel"]])
    if not isinstance(row["key"], dict) or list(row["key"]) != expected:
        raise ValueError(
            f"{where}: the key of {row['kernel']} must name {', '.join(expected)}; got {row['key']!r}"
        )
    for name in BUCKETED:
        if name in row["key"] and row["key"][name] != bucket(row["key"][name]):
            raise ValueError(
                f"{where}: {name} must be a power of two, for those up to it; got {row['key'][name]}"
            )
    if not isinstance(row["config"], dict) or not row["config"]:
        raise ValueError(f"{where}: config must be an object with the fields of one; got {row['config']!r}")
    time_us = row["time_us"]
    if isinstance(time_us, bool) or not isinstance(time_us, (int, float)) or not time_us > 0:
        raise ValueError(f"{where}: time_us must be above 0; got {time_us!r}")
    return Row(**row)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def written(rows: list[Row], note: str) -> str:
    """The table's text: rows in a fixed order, one a line, so that a change is read as such."""
    ordered = sorted(rows, key=lambda row: (row.gpu, row.kernel, str(row.key)))
    lines = ",\n".join(f"    {json.dumps(asdict(row))}" for row in ordered)
    body = f"[\n{lines}\n  ]" if lines else "[]"
    return f'{{\n  "schema": {SCHEMA},\n  "note": {json.dumps(note)},\n  "rows": {body}\n}}\n'


def in_use() -> Path:
    """The table that choices are read from."""
    return Path(os.environ.get(VARIABLE) or PATH)


@cache
def table() -> dict[str, dict[tuple[object, ...], Row]]:
    """GPU -> place -> row, of the table in use."""
    found: dict[str, dict[tuple[object, ...], Row]] = {}
    for row in read(in_use()):
        found.setdefault(row.gpu, {})[row.place] = row
    return found


def reload() -> None:
    """Forgets the table, so that the next choice reads it again."""
    table.cache_clear()
    _tabled.cache_clear()


def lookup(kernel: str, gpu: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measured configuration for this kernel, GPU and key as `key_of` makes it; None without a row."""
    row = table().get(gpu, {}).get((kernel, gpu, *key.values()))
    return None if row is None else row.config


@dataclass(frozen=True)
class Choice:
    """A configuration that is asked for: of which kernel, where, and for which sizes in the order of `KEYS`."""

    kernel: str
    architecture: Architecture
    values: tuple[Any, ...]

    @property
    def key(self) -> dict[str, Any]:
        return key_of(self.kernel, self.values)


Decide = Callable[[Choice], Any]
_deciders: list[Decide] = []
"""Those in force, the innermost last: of the whole process, since a backward on a GPU runs in autograd's own thread."""


@contextmanager
def deciding(decide: Decide) -> Iterator[None]:
    """Within it `decide` is asked for every configuration first; where it answers None, the table and the rule are.

    It holds for all threads.
    """
    _deciders.append(decide)
    try:
        yield
    finally:
        _deciders.remove(decide)


def choose(
    kernel: str,
    kind: type[ConfigType],
    architecture: Architecture,
    values: tuple[Any, ...],
    rule: Callable[[], RuleType],
    limits: tuple[Any, ...] | None = None,
) -> ConfigType | RuleType:
    """The row's configuration for these sizes on this GPU, the rule's where there is no row.

    limits: what the configuration's `reasons` takes; None for the architecture and the first dtype of `values`
    """
    if _deciders:
        decided = _deciders[-1](Choice(kernel, architecture, values))
        if decided is not None:
            return decided
    if architecture.name and architecture.name in table():
        found = _tabled(kernel, kind, architecture, values, limits)
        if found is not None:
            return found
    return rule()


@lru_cache(maxsize=4096)
def _tabled(
    kernel: str,
    kind: type[ConfigType],
    architecture: Architecture,
    values: tuple[Any, ...],
    limits: tuple[Any, ...] | None,
) -> ConfigType | None:
    key = key_of(kernel, values)
    found = lookup(kernel, architecture.name, key)
    if found is None:
        return None
    dtype = next(value for value in values if isinstance(value, torch.dtype))
    where = f"{in_use()}: {kernel} of {architecture.name} {key}"
    return configuration(kind, found, where, *(limits or (architecture, dtype)))


def configuration(kind: type[ConfigType], values: Mapping[str, Any], where: str, *limits: Any) -> ConfigType:
    """A row's configuration as the launcher takes it; ValueError where it has other fields or cannot run there.

    limits: what its `reasons` takes
    """
    expected = [field.name for field in fields(cast("Any", kind))]
    if sorted(values) != sorted(expected):
        raise ValueError(
            f"{where}: the configuration must have {', '.join(expected)}; got {', '.join(values)}"
        )
    found = kind(**values)
    reasons = found.reasons(*limits)
    if reasons:
        raise ValueError(f"{where}: the configuration cannot run there:\n    " + "\n    ".join(reasons))
    return found
