"""Studies: a grid of adapters over one training job, run on Ray, and the analysis of its variance.

`grid` says which runs there are, `job` what a run does, `sweep` runs them, `folder` remembers what was asked for
and `results` gathers what they wrote; `anova` reads such a table. Needs the libraries of the `study` extra; the
digits job those of `train` too.
"""

from __future__ import annotations

import importlib.util

SWEEP_LIBRARIES = ("filelock", "pandas", "pyarrow", "ray", "rich")
"""What `kronafuse sweep` needs, by import name."""

ANOVA_LIBRARIES = ("matplotlib", "pandas", "pyarrow", "rich", "scipy", "statsmodels")
"""What `kronafuse anova` needs, by import name."""


def require_libraries(libraries: tuple[str, ...]) -> None:
    """ImportError that names what is absent and the extra that brings it; the commands call it first."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if absent:
        from ..env import install_extra

        raise ImportError(f"kronafuse.study: needs {', '.join(absent)}; {install_extra('study')}")
