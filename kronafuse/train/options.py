"""Option records read from TOML and flags: one dataclass field is one key, one flag and one help text."""

from __future__ import annotations

import difflib
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Options = TypeVar("Options")


def about(help: str, **rules: Any) -> Mapping[str, Any]:
    """A field's metadata: its help text; `choices`, `least`, `most` and `above` hold its value."""
    return {"help": help, **rules}


def option(help: str, default: Any, **rules: Any) -> Any:
    """A dataclass field with a default and with `about`'s metadata."""
    return field(default=default, metadata=about(help, **rules))


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, with or without a byte order mark; ValueError where it is not TOML."""
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {path} does not exist")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def build(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """`kind` from keys and values; ValueError for keys it lacks or needs, TypeError for wrong values."""
    known: dict[str, Field[Any]] = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"unknown {_plural('key', unknown)}{_close(unknown, known)};"
            f" the keys that exist are: {', '.join(known)}"
        )
    missing = [name for name, each in known.items() if each.default is MISSING and name not in values]
    if missing:
        raise ValueError(
            f"missing {_plural('key', missing)}: each must be in the TOML file or given as a flag"
        )
    hints = get_type_hints(kind)
    converted = {name: convert(name, hints[name], value) for name, value in values.items()}
    for name, value in converted.items():
        hold(name, value, known[name].metadata)
    return kind(**converted)


def convert(name: str, hint: Any, value: Any) -> Any:
    """`value` as the field's type: lists become tuples, "64x4" two integers, "a,b" names, integers floats."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(each for each in get_args(hint) if each is not type(None))
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if get_origin(hint) is tuple:
        return _tuple(name, hint, value)
    raise TypeError(f"{name} must be {type_name(hint)}; got {value!r}")


def type_name(hint: Any) -> str:
    """How a message and a help text name a field's type."""
    if get_origin(hint) is tuple:
        return "two integers, as 64x4" if Ellipsis not in get_args(hint) else "a list of names"
    return {Path: "a path", float: "a number", int: "an integer", bool: "true or false", str: "a string"}[
        hint
    ]


def _tuple(name: str, hint: Any, value: Any) -> tuple[Any, ...]:
    pair = Ellipsis not in get_args(hint)
    if isinstance(value, str):
        value = value.replace("×", "x").split("x") if pair else [part.strip() for part in value.split(",")]
        value = [int(part) if pair and part.strip().isdigit() else part for part in value]
    element = get_args(hint)[0]
    correct = isinstance(value, (list, tuple)) and all(type(each) is element for each in value)
    if not correct or (pair and len(value) != len(get_args(hint))) or (not pair and not all(value)):
        raise TypeError(f"{name} must be {type_name(hint)}; got {value!r}")
    return tuple(value)


def hold(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    """ValueError for a number that is not finite, or a value outside a field's rules; None is none."""
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}")
    if "choices" in rules and value not in rules["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(rules['choices'])}; got {value!r}")
    if "least" in rules and not value >= rules["least"]:
        raise ValueError(f"{name} must be at least {rules['least']}; got {value!r}")
    if "most" in rules and not value <= rules["most"]:
        raise ValueError(f"{name} must be at most {rules['most']}; got {value!r}")
    if "above" in rules and not value > rules["above"]:
        raise ValueError(f"{name} must be above {rules['above']}; got {value!r}")


def _plural(noun: str, names: list[str]) -> str:
    return f"{noun}{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _close(unknown: list[str], known: Mapping[str, Any]) -> str:
    matches = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    return f" (closest: {', '.join(matches)})" if matches else ""
