"""What a benchmark writes and reads: frozen records, as JSON with a schema version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..formats.atomic import write_json
from .decoding import decode

SCHEMA = 1
"""Version of the files; another one is refused."""

NOT_COVERED = "does not cover this case"
"""Begins the error of a row whose arm has reasons against the case; every other error is a failure."""

Suite = Literal["kron_linear", "kron_linear_group", "bottleneck"]
Mode = Literal["forward", "forward_backward"]
Form = Literal["eager", "compiled", "checkpointed"]
Verdict = Literal["met", "missed", "not measured"]


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile over all rounds, and the median of each pass over the arms."""

    median: float
    low: float
    high: float
    rounds: int
    passes: tuple[float, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """What the measurement leaves open: between the percentiles, and between the passes."""
        return min(self.low, *self.passes, self.median), max(self.high, *self.passes, self.median)

    def equals(self, other: Spread) -> bool:
        """Whether the two cannot be told apart: their intervals overlap."""
        (low, high), (other_low, other_high) = self.interval, other.interval
        return low <= other_high and other_low <= high


@dataclass(frozen=True)
class Accuracy:
    """RMS and largest error against float64 of y, and of the delta alone (run with W = 0)."""

    y_rms: float
    y_largest: float
    delta_rms: float | None
    delta_largest: float | None


@dataclass(frozen=True)
class Row:
    """One arm on one problem. Times are of one call, in microseconds; None is what was not measured.

    arm:            what ran; ours is named ours_<impl>
    device_us:      CUDA-graph replay (CUDA only; None where capture failed); cold: what is read exceeds twice the L2
    wall_us:        eager calls, until their results are there; cold: arguments rotated past the last-level cache
    host_us:        until an eager forward returns, in a training step with gradients tracked (CUDA only)
    ratio_to_frozen: of medians from turns with the frozen layer; device time on CUDA, wall time on a CPU
    ratio_to_chain:  the same to plain torch in the best order (arm einsum, or chain of a bottleneck)
    accuracy:       of this arm; `yardstick` is that of the eager chain on the same inputs
    truth_tokens:   tokens on which accuracy was taken
    peak_bytes:     allocated at most during one call, above what was there before it (CUDA only)
    floor_us:       of the least FLOPs and bytes at the machine's measured ceilings; its percentage is of cold time
                    on CUDA
    kernels:        names that the profiler saw, in order of time: of kernels on CUDA, of operators on a CPU
    launches:       kernels launched in one call (CUDA only)
    error:          why there are no figures; None where there are
    """

    suite: Suite
    case: str
    batch: int
    tokens: int
    dtype: str
    mode: Mode
    arm: str
    impl: str | None = None
    thin: bool | None = None
    device_us: Spread | None = None
    device_cold_us: Spread | None = None
    wall_us: Spread | None = None
    wall_cold_us: Spread | None = None
    host_us: Spread | None = None
    ratio_to_frozen: float | None = None
    ratio_to_chain: float | None = None
    accuracy: Accuracy | None = None
    yardstick: Accuracy | None = None
    truth_tokens: int | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    bytes_moved: int | None = None
    floor_us: float | None = None
    percent_of_floor: float | None = None
    kernels: tuple[str, ...] = ()
    launches: int | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    target: str | None = None
    verdict: Verdict | None = None

    @property
    def problem(self) -> tuple[str, str, int, int, str, str]:
        """What rows must share to be compared."""
        return self.suite, self.case, self.batch, self.tokens, self.dtype, self.mode

    @property
    def time_us(self) -> Spread | None:
        """What ratios are made of: device time where there is one, else wall time."""
        return self.device_us or self.wall_us

    @property
    def from_memory_us(self) -> Spread | None:
        """What bandwidths and percentages of the floor are made of: cold device time where there is one."""
        return self.device_cold_us or self.time_us


@dataclass(frozen=True)
class StepRow:
    """One training step of a whole model with one arm.

    ratio_to_frozen: of medians; `notes` says where turns were not interleaved and what was scaled down
    """

    model: str
    batch: int
    arm: str
    form: Form
    step_ms: Spread | None = None
    ratio_to_frozen: float | None = None
    peak_bytes: int | None = None
    trained_parameters: int | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clocks:
    """Clocks in MHz behind the large GEMMs of the ceilings, and their largest values."""

    sm_mhz: int | None
    sm_max_mhz: int | None
    memory_mhz: int | None
    memory_max_mhz: int | None


@dataclass(frozen=True)
class Gpu:
    """The CUDA device that ran."""

    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    cuda: str | None
    driver: str | None
    clocks: Clocks | None


@dataclass(frozen=True)
class Cpu:
    """The processor: cores that the process may use, threads that torch takes, and its last-level cache."""

    brand: str
    cores: int
    threads: int
    capability: str
    cache_bytes: int | None


@dataclass(frozen=True)
class Machine:
    """What ran, on what: neither the machine's name nor a path.

    tuned: which table of configurations the kernels read, as a digest of its rows, or "empty"; None in older files
    """

    commit: str | None
    dirty: bool | None
    kronafuse: str
    python: str
    torch: str
    triton: str | None
    peft: str | None
    lycoris: str | None
    diffusers: str | None
    gpu: Gpu | None
    cpu: Cpu
    date: str
    command: str
    tuned: str | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine's large copy (read and write counted) and large GEMMs reached, in the same run.

    launch_us: of the smallest kernel in a CUDA graph, in a row of them (CUDA only)
    """

    copy_bytes_per_s: float
    gemm_flops_per_s: dict[str, float]
    launch_us: float | None = None

    def floor_us(self, flops: int, size_bytes: int, dtype: str) -> float | None:
        """The least time of so many FLOPs and bytes; None where no GEMM of the dtype was measured."""
        peak = self.gemm_flops_per_s.get(dtype)
        return None if peak is None else 1e6 * max(flops / peak, size_bytes / self.copy_bytes_per_s)


@dataclass(frozen=True)
class Results:
    """One run: the machine, its ceilings, and what was measured."""

    machine: Machine
    ceilings: Ceilings | None = None
    rows: tuple[Row, ...] = ()
    steps: tuple[StepRow, ...] = ()

    def write(self, path: Path) -> None:
        """JSON, whole or not at all; what was at `path` is replaced."""
        write_json(Path(path), {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results in a file.

        Raises ValueError where it is no JSON, of another schema or lacks a field, TypeError where a value has
        another type; both name the file and the place.
        """
        path = Path(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}: not JSON: {error}") from error
        if not isinstance(value, dict) or "schema" not in value:
            raise ValueError(f"{path.name}: not the results of kronafuse bench: there is no schema version")
        if value.pop("schema") != SCHEMA:
            raise ValueError(
                f"{path.name}: schema must be {SCHEMA}; write the file anew with kronafuse bench"
            )
        return decode(cls, value, path.name)

    def with_row(self, row: Row) -> Results:
        """The same with one row more, in place of one of the same problem and arm."""
        kept = tuple(each for each in self.rows if (*each.problem, each.arm) != (*row.problem, row.arm))
        return replace(self, rows=(*kept, row))

    def with_step(self, step: StepRow) -> Results:
        """The same with one training step more, in place of one of the same model, batch, arm and form."""

        def key(each: StepRow) -> tuple[str, int, str, str]:
            return each.model, each.batch, each.arm, each.form

        return replace(self, steps=(*(each for each in self.steps if key(each) != key(step)), step))


def joined(results: Sequence[Results]) -> Results:
    """One out of several of the same machine; later rows take the place of earlier ones of the same problem.

    Raises ValueError where they were measured on different processors, GPUs or versions of torch.
    """
    whole, *rest = results
    for each in rest:
        for what, one, other in (
            ("GPU", _gpu_name(whole), _gpu_name(each)),
            ("CPU", whole.machine.cpu.brand, each.machine.cpu.brand),
            ("torch", whole.machine.torch, each.machine.torch),
        ):
            if one != other:
                raise ValueError(
                    f"results of different machines make no one report: {what} {one}, then {other}"
                )
        whole = replace(whole, ceilings=_both(whole.ceilings, each.ceilings))
        for row in each.rows:
            whole = whole.with_row(row)
        for step in each.steps:
            whole = whole.with_step(step)
    return whole


def _both(one: Ceilings | None, other: Ceilings | None) -> Ceilings | None:
    """The ceilings of the first, with dtypes that only the second measured."""
    if one is None or other is None:
        return one or other
    return replace(one, gemm_flops_per_s={**other.gemm_flops_per_s, **one.gemm_flops_per_s})


def _gpu_name(results: Results) -> str | None:
    return results.machine.gpu.name if results.machine.gpu else None
