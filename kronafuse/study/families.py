"""Adapter families: which axes a grid may vary, and the spec that a run's configuration describes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..nn.bottleneck_spec import KRONA_FORMS
from ..train.options import convert

Config = dict[str, Any]
"""A run's axes as plain values: "family", the axes of that family, and "seed"."""

AXES: dict[str, Any] = {
    "source": str, "sink": str, "activation": str, "scale": float, "width": int | None,
    "budget": float | None, "init": str, "form": str, "terms": int, "factors": tuple[int, int] | None,
    "factor": int, "rank": int | None, "alpha": float | None,
}  # fmt: skip
"""Every axis and the type of its values, in the order of the columns of a results file."""

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bottleneck": (
        "Bottleneck",
        (
            "source",
            "sink",
            "activation",
            "scale",
            "width",
            "budget",
            "init",
            "form",
            "terms",
            "factors",
            "rank",
        ),
    ),
    "krona": ("KronA", ("factors", "scale", "init")),
    "lokr": ("LoKr", ("factor", "rank", "alpha", "scale", "init")),
    "lora": ("LoRA", ("rank", "alpha", "scale", "init")),
}
"""Family -> its spec and the axes it takes."""

MAPS = ("dense", "compacter")
FORMS_WITH: dict[str, tuple[str, ...]] = {
    "activation": MAPS, "width": MAPS, "budget": MAPS, "terms": ("compacter",), "rank": ("compacter",),
    "factors": KRONA_FORMS,
}  # fmt: skip
"""Axes that only some forms of a bottleneck have -> those forms."""


def axes_of(family: str) -> tuple[str, ...]:
    """The axes of a family; ValueError for one that does not exist."""
    if family not in FAMILIES:
        raise ValueError(f"sweep: family must be one of {', '.join(FAMILIES)}; got {family!r}")
    return FAMILIES[family][1]


def spec_kind(family: str) -> Any:
    """The family's spec class."""
    import kronafuse

    axes_of(family)
    return getattr(kronafuse, FAMILIES[family][0])


def default_of(family: str, axis: str) -> Any:
    """The value an axis has where the grid does not name it: the spec's own."""
    return inspect.signature(spec_kind(family)).parameters[axis].default


def has_axis(config: Mapping[str, Any], axis: str) -> bool:
    """Whether the axis means anything to the run: not every form of a bottleneck has all of them."""
    if config.get("family") != "bottleneck":
        return True
    return axis not in FORMS_WITH or config.get("form", "dense") in FORMS_WITH[axis]


def axis_value(axis: str, value: Any) -> Any:
    """A value as the axis's type, as it stands in a configuration: factors are written "4x8"."""
    converted = convert(axis, AXES[axis], value)
    return "x".join(map(str, converted)) if isinstance(converted, tuple) else converted


def adapter_spec(config: Mapping[str, Any]) -> Any:
    """The spec of a run; the errors are the spec's own."""
    given = {axis: config[axis] for axis in axes_of(config["family"])}
    if "factors" in given:
        given["factors"] = convert("factors", AXES["factors"], given["factors"])
    return spec_kind(config["family"])(**given)


def describe(config: Mapping[str, Any]) -> str:
    """One line for people, as "bottleneck attn2_out -> ff_in relu scale=1 budget=2 seed=0"."""
    words = [str(config["family"])] if "family" in config else []
    if config.get("source") is not None and config.get("sink") is not None:
        words.append(f"{config['source']} -> {config['sink']}")
    if config.get("activation") is not None and has_axis(config, "activation"):
        words.append(str(config["activation"]))
    if config.get("form") not in (None, "dense"):
        words.append(str(config["form"]))
    for name in ("terms", "factors", "factor", "rank", "alpha", "scale", "width", "budget", "init", "seed"):
        value = config.get(name)
        if value is not None and has_axis(config, name):
            words.append(
                f"{name}={repr(float(value)).removesuffix('.0') if isinstance(value, float) else value}"
            )
    return " ".join(words)
