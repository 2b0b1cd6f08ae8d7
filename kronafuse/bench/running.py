"""One run of the suites into one file, which is whole after every case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .ceilings import measure_ceilings
from .machine import describe, last_level_cache_bytes
from .records import Ceilings, Machine, Results, Row, Suite
from .selection import Options, Spec, specs
from .suites import arms_named, run_spec
from .targets import judged
from .timing import CpuTimer, CudaTimer, Timer

CACHE_BYTES = 32 * 2**20
"""Last-level cache of a CPU that does not say how large its is."""


def timer_of(device: torch.device) -> Timer:
    """The timer of a device."""
    if device.type == "cuda":
        return CudaTimer(device)
    return CpuTimer(last_level_cache_bytes() or CACHE_BYTES)


def run_suites(
    suites: Sequence[Suite],
    options: Options,
    arms: Sequence[str],
    path: Path,
    *,
    seconds: float,
    budget: float | None = None,
    begin: Callable[[Machine, Ceilings], object] = lambda machine, ceilings: None,
    show: Callable[[Sequence[Row]], object] = lambda rows: None,
) -> tuple[Results, list[Spec]]:
    """The results, and what was not begun because the budget was used up.

    arms:    globs on names; none for all
    seconds: for the turns of one case and mode
    budget:  seconds after which no new case is begun
    begin, show: are told of the machine, and of the rows of each case
    """
    if seconds <= 0 or (budget is not None and budget <= 0):
        raise ValueError(
            f"kronafuse bench: --seconds and --budget must be above 0; got {seconds} and {budget}"
        )
    started = time.monotonic()
    asked = specs(suites, options)
    chosen = arms_named(suites, arms)
    path.parent.mkdir(parents=True, exist_ok=True)
    timer = timer_of(asked[0].device)
    dtypes = list(dict.fromkeys(spec.dtype for spec in asked))
    results = Results(describe(), measure_ceilings(timer, dtypes))
    assert results.ceilings is not None
    begin(results.machine, results.ceilings)
    results.write(path)
    for index, spec in enumerate(asked):
        if budget is not None and time.monotonic() - started > budget:
            return results, asked[index:]
        rows = judged(run_spec(spec, chosen[spec.suite], timer, results.ceilings, seconds), results.ceilings)
        for row in rows:
            results = results.with_row(row)
        results.write(path)
        show(rows)
    return results, []
