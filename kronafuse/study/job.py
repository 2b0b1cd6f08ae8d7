"""What a run does: a function from a configuration to figures, found by name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..train import require_libraries
from ..train.options import build

SHIPPED = {"digits": ".digits:JOB"}
"""Name of a job -> where it is."""


@dataclass(frozen=True)
class Job:
    """A training job that a sweep runs once for every configuration.

    run:      (config, folder) -> figures by name, all finite numbers. `config` has the run's axes, its seed
              and the job's settings; `folder` is the sweep's, with what `prepare` left there. Ray sends it to
              its workers by pickle.
    settings: a dataclass of `train.options.option` fields; None takes any settings unchecked
    smoke:    the settings that run everything once in seconds
    check:    (settings, configs), called before anything runs; raises ValueError for what no run can do
    prepare:  (settings, folder), called once before the runs
    """

    name: str
    run: Callable[[Mapping[str, Any], Path], Mapping[str, float]]
    settings: type | None = None
    smoke: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], None] | None = None
    prepare: Callable[[Mapping[str, Any], Path], None] | None = None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with the job's defaults, as JSON values; the errors are those of `build`."""
        values = dict(given) if self.settings is None else asdict(build(self.settings, given))
        try:
            return json.loads(json.dumps(values, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"sweep: the settings of job {self.name!r} must be JSON values: {error}"
            ) from error


def find_job(name: str) -> Job:
    """A shipped job, or "module:attribute": a `Job`, or a function that becomes one.

    Modules are looked for in the working directory too; Ray's workers look there as well.

    Raises ValueError for an unknown name, ImportError for a module that cannot be imported and for absent
    libraries of a shipped job, TypeError for an attribute that is no job.
    """
    if name in SHIPPED:
        require_libraries()
    place = SHIPPED.get(name, name)
    module, separator, attribute = place.partition(":")
    if not separator or not module or not attribute:
        raise ValueError(
            f"sweep: job must be one of {', '.join(SHIPPED)}, or written module:function; got {name!r}"
        )
    package = __package__ if module.startswith(".") else None
    if package is None and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found = getattr(importlib.import_module(module, package), attribute, None)
    if isinstance(found, Job):
        return found
    if not callable(found):
        raise TypeError(f"sweep: job {name!r} must be a function or a Job; got {found!r}")
    return Job(name, found)  # pyright: ignore[reportArgumentType]
