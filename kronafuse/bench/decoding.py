"""Frozen dataclasses from JSON, with the place and the rule in every error."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def decode(kind: type[Record], value: object, where: str) -> Record:
    """The dataclass `kind` from a JSON object; `where` names it in errors.

    Raises ValueError for a missing or an unknown key, TypeError for a value of another type.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{where}: must be an object of {kind.__name__}; got {_shown(value)}")
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(
            f"{where}: {kind.__name__} has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )
    missing = [
        name
        for name, each in known.items()
        if name not in value and each.default is MISSING and each.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {kind.__name__} needs {', '.join(missing)}; got {', '.join(value)}")
    return kind(**{key: _value(hints[key], each, f"{where}.{key}") for key, each in value.items()})


def _value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [each for each in arguments if each is not type(None)]
        return _value(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if origin is tuple:
        _expect(isinstance(value, list), "a list", value, where)
        assert isinstance(value, list)
        return tuple(_value(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        assert isinstance(value, dict)
        return {key: _value(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if is_dataclass(hint):
        return decode(hint, value, where)  # type: ignore[arg-type]
    if hint is float:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), "a number", value, where)
        return float(value)  # type: ignore[arg-type]
    _expect(
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), hint.__name__, value, where
    )
    return value


def _expect(right: bool, rule: str, value: object, where: str) -> None:
    if not right:
        raise TypeError(f"{where}: must be {rule}; got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"
