"""The benchmark suite behind `kronafuse bench`: every implementation a user could pick, against the hardware's floor.

`suites` times named cases with the `arms`, `records` is what is written, `targets` says what was promised.
Needs the libraries of the `bench` extra.
"""

from __future__ import annotations

import importlib.util

LIBRARIES = ("jinja2", "matplotlib", "numpy", "rich")
"""What tables, plots and reports need, by import name; all are in the `bench` extra."""


def require_libraries(libraries: tuple[str, ...] = LIBRARIES) -> None:
    """ImportError that names what is absent and the extra that brings it; the commands call it first."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if absent:
        from ..env import install_extra

        raise ImportError(f"kronafuse.bench: needs {', '.join(absent)}; {install_extra('bench')}")
