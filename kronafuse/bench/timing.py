"""One timer for all arms of a case: turns in alternation, warm and cold caches, medians with their spread.

Arms are given as several copies of one call on different memory: warm turns use the first copy, cold turns go round
them. `turns.interleave` is the same for single callables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..torch_private import end_allocation
from .records import Spread
from .turns import PASSES as PASSES
from .turns import ArmError as ArmError
from .turns import Call, Calls, Rotation, blamed, interleave, rounds, timed
from .turns import spread_of as spread_of
from .turns import turns as turns


@dataclass(frozen=True)
class Timing:
    """Times of one arm in microseconds, as in `Row`; None is what was not measured."""

    device_us: Spread | None = None
    device_cold_us: Spread | None = None
    wall_us: Spread | None = None
    wall_cold_us: Spread | None = None
    host_us: Spread | None = None
    notes: tuple[str, ...] = ()


class Timer(Protocol):
    """What the suites ask of a timer."""

    device: torch.device

    def cold_bytes(self) -> int:
        """Bytes that calls on all copies must read together, to read from memory each time."""
        ...

    def measure(
        self, arms: Calls, seconds: float, host: Mapping[str, Call] | None = None
    ) -> dict[str, Timing]:
        """All arms in turns, within about `seconds`. Raises ArmError where one raises.

        host: what host time is taken of, where it is not the whole call
        """
        ...


@dataclass
class CpuTimer:
    """Wall time by the clock. Warm: one untimed call before each turn; cold: the copies in rotation."""

    cache_bytes: int
    clock: Callable[[], float] = time.perf_counter
    least_rounds: int = 3
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def cold_bytes(self) -> int:
        """Twice the last-level cache."""
        return 2 * self.cache_bytes

    def measure(
        self, arms: Calls, seconds: float, host: Mapping[str, Call] | None = None
    ) -> dict[str, Timing]:
        """Two thirds of the time for warm turns, which are twice as long, one third for cold ones; no host time."""
        one = {name: copies[0] for name, copies in arms.items()}
        warm = interleave(one, seconds * 2 / 3, clock=self.clock, settle=True, least_rounds=self.least_rounds)
        several = {name: Rotation(copies) for name, copies in arms.items() if len(copies) > 1}
        cold = interleave(several, seconds / 3, clock=self.clock, warmup=0, least_rounds=self.least_rounds)
        return {name: Timing(wall_us=warm[name], wall_cold_us=cold.get(name)) for name in arms}


GRAPH_US = 500.0
"""A warm graph holds so many calls that its replay takes about so long."""
MOST_CALLS = 100
WARMUP_SECONDS = 0.05
HOST_CALLS = 10
"""Eager calls in one turn of wall and host time: few enough that the device's queue never fills."""


@dataclass
class CudaTimer:
    """Device time by CUDA-graph replay; wall and host time of eager calls.

    cuda:           `torch.cuda`, or what behaves like it
    end_allocation: cleans up behind a capture that failed

    An arm that cannot be captured has no device time; its `notes` say why, and what events around eager calls gave.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    cuda: Any = torch.cuda
    clock: Callable[[], float] = time.perf_counter
    least_rounds: int = 3
    end_allocation: Callable[[int, Any], object] = end_allocation

    def cold_bytes(self) -> int:
        """Twice the L2."""
        return 2 * self.cuda.get_device_properties(self.device).L2_cache_size

    def measure(
        self, arms: Calls, seconds: float, host: Mapping[str, Call] | None = None
    ) -> dict[str, Timing]:
        """A fifth of the time each for warm and cold replay, warm and cold eager calls, and host time."""
        for name, copies in arms.items():
            with blamed(name):
                self.warm_up(copies)
        part = seconds / 5
        warm, why = self.device_times({name: copies[:1] for name, copies in arms.items()}, part)
        several = {name: copies for name, copies in arms.items() if len(copies) > 1}
        cold, why_cold = self.device_times(several, part)
        first = {name: copies[:1] for name, copies in arms.items()}
        wall, wall_cold = self.eager_times(first, part), self.eager_times(several, part)
        returned = self.host_times(host or {name: copies[0] for name, copies in arms.items()}, part)
        return {
            name: Timing(
                None if why[name] else warm[name],
                None if why[name] or why_cold.get(name) else cold.get(name),
                wall[name],
                wall_cold.get(name),
                returned[name],
                (*_uncaptured("warm", warm, why, name), *_uncaptured("cold", cold, why_cold, name)),
            )
            for name in arms
        }

    def warm_up(self, copies: Sequence[Call]) -> None:
        """Every copy once, then the first for a while, on a stream of their own, as capture wants it."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for call in copies:
                call()
            started = self.clock()
            while self.clock() - started < WARMUP_SECONDS:
                copies[0]()
                self.cuda.synchronize()
        self.cuda.current_stream().wait_stream(stream)
        self.cuda.synchronize()

    def device_times(
        self, arms: Calls, seconds: float
    ) -> tuple[dict[str, Spread], dict[str, tuple[str, ...]]]:
        """Device time of one call of each arm; an arm of several copies goes round them within a graph.

        Each turn has a replay before the timed one: it brings an arm's own data into the cache, of several copies
        the last ones, and keeps the device busy while the timed one is launched. The notes of an arm that cannot
        be captured say why; its time is by events around eager calls and compares with no other. The arms must have
        run before (`warm_up`), so that nothing is compiled or allocated for the first time.
        """
        players, notes = {}, {}
        for name, copies in arms.items():
            with blamed(name):
                players[name], notes[name] = self._player(copies)
                players[name]()
        self.cuda.synchronize()

        def turn(name: str) -> float:
            player = players[name]
            player()
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            player()
            end.record()
            self.cuda.synchronize()
            return 1e3 * start.elapsed_time(end) / player.calls

        spreads = rounds(list(arms), turn, seconds, clock=self.clock, least_rounds=self.least_rounds)
        return spreads, notes

    def _player(self, copies: Sequence[Call]) -> tuple[_Player, tuple[str, ...]]:
        """What replays the calls, and why it is no graph where it is none."""
        try:
            single = self._capture(copies, 1)
        except Exception as error:
            self.cuda.synchronize()
            note = f"capture failed: {type(error).__name__}: {_first_line(error)}"
            return _Player(_Eager(copies, HOST_CALLS), HOST_CALLS * len(copies)), (note,)
        if len(copies) > 1:
            return _Player(single, len(copies)), ()
        single()
        self.cuda.synchronize()
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        single()
        end.record()
        self.cuda.synchronize()
        spent = 1e3 * start.elapsed_time(end)
        calls = max(1, min(MOST_CALLS, round(GRAPH_US / spent))) if spent > 0 else MOST_CALLS
        return _Player(single if calls == 1 else self._capture(copies, calls), calls), ()

    def _capture(self, copies: Sequence[Call], repeats: int) -> Callable[[], object]:
        """The replay of a graph of all copies, `repeats` times.

        Where it fails, torch may leave its own stream current and the graph's allocations open; both end here.
        """
        before, pool = self.cuda.current_stream(), self.cuda.graph_pool_handle()
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph, pool=pool):
                for _ in range(repeats):
                    for call in copies:
                        call()
        except BaseException:
            self.cuda.set_stream(before)
            self.end_allocation(self.device.index or 0, pool)
            raise
        return graph.replay

    def eager_times(self, arms: Calls, seconds: float) -> dict[str, Spread]:
        """Wall time of eager calls, with one synchronisation for a batch of them."""
        rotations = {name: Rotation(copies) for name, copies in arms.items()}

        def turn(name: str) -> float:
            return timed(rotations[name], HOST_CALLS, self.cuda.synchronize, self.clock)

        return rounds(list(arms), turn, seconds, clock=self.clock, least_rounds=self.least_rounds)

    def host_times(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Spread]:
        """Time until an eager call returns; the device's queue is empty at the start of each turn."""

        def turn(name: str) -> float:
            call = calls[name]
            self.cuda.synchronize()
            started = self.clock()
            for _ in range(HOST_CALLS):
                call()
            spent = self.clock() - started
            self.cuda.synchronize()
            return 1e6 * spent / HOST_CALLS

        return rounds(list(calls), turn, seconds, clock=self.clock, least_rounds=self.least_rounds)


@dataclass(frozen=True)
class _Player:
    """Something that runs `calls` calls on the device."""

    run: Callable[[], object]
    calls: int

    def __call__(self) -> None:
        self.run()


@dataclass(frozen=True)
class _Eager:
    copies: Sequence[Call]
    repeats: int

    def __call__(self) -> None:
        for _ in range(self.repeats):
            for call in self.copies:
                call()


def _uncaptured(
    what: str, spent: Mapping[str, Spread], why: Mapping[str, Sequence[str]], name: str
) -> list[str]:
    """The notes of an arm that could not be captured, with its time by events."""
    return [
        f"{what}: {each}; {spent[name].median:.1f} µs by events around eager calls"
        for each in why.get(name, ())
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
