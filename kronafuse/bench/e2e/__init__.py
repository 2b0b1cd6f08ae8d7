"""Training steps of whole models, end to end: `kronafuse bench e2e`.

`configs` has the models as data, `arms` what trains them, `step` one training step, `run` measures.
"""

from __future__ import annotations

from .. import require_libraries

LIBRARIES = ("diffusers", "rich")
"""What the models and the table need, by import name; both are in the `bench` extra."""


def require_e2e() -> None:
    """ImportError that names what is absent and the extra that brings it."""
    require_libraries(LIBRARIES)
