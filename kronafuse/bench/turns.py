"""Turns: any callables timed beside each other by the clock, in alternation, in two passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from .records import Spread

Call = Callable[[], object]
Calls = Mapping[str, Sequence[Call]]
"""Arm -> the same call on different memory."""

PASSES = 2
"""Every arm is measured this often; what differs between passes is no difference between arms."""
TURN_US = 200.0
"""A turn repeats a call until it takes about so long, to be far above the clock's resolution."""
MOST_REPEATS = 200


class ArmError(RuntimeError):
    """An arm raised while it was measured."""

    def __init__(self, arm: str, error: Exception) -> None:
        super().__init__(f"{arm}: {type(error).__name__}: {error}")
        self.arm, self.error = arm, error


def spread_of(passes: Sequence[Sequence[float]]) -> Spread:
    """Median and percentiles over all rounds of all passes, and each pass's median."""
    values = sorted(value for each in passes for value in each)
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    medians = tuple(statistics.median(each) for each in passes if each)
    return Spread(statistics.median(values), fifths[0], fifths[3], len(values), medians)


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: the start moves on by one, and every second round runs backwards."""
    start = number % max(len(names), 1)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order


@contextmanager
def blamed(arm: str) -> Iterator[None]:
    """Whatever is raised inside becomes an ArmError of this arm."""
    try:
        yield
    except ArmError:
        raise
    except Exception as error:
        raise ArmError(arm, error) from error


def rounds(
    names: Sequence[str],
    turn: Callable[[str], float],
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    least_rounds: int = 3,
) -> dict[str, Spread]:
    """`turn(name)` of every name in alternation, in two passes of half the time each; at least so many rounds."""
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    number = 0
    for _ in range(PASSES):
        for values in found.values():
            values.append([])
        started = clock()
        done = 0
        while done < least_rounds or clock() - started < seconds / PASSES:
            for name in turns(names, number):
                with blamed(name):
                    found[name][-1].append(turn(name))
            number, done = number + 1, done + 1
    return {name: spread_of(passes) for name, passes in found.items()}


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    *,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    warmup: int = 1,
    settle: bool = False,
    least_rounds: int = 3,
) -> dict[str, Spread]:
    """Wall time of each call in microseconds, all of them in turns.

    synchronize: waits for the device, before the clock is read
    warmup:      untimed calls of each before the first turn
    settle:      one untimed call before each timed one, so that its own data is in the cache
    least_rounds: rounds of each pass, also where they take longer than `seconds` (in all)

    Short calls are repeated within a turn. Raises ArmError, which names the call that raised.
    """
    wait = synchronize or _nothing
    repeats = {}
    for name, call in calls.items():
        with blamed(name):
            for _ in range(warmup):
                call()
            repeats[name] = repeats_of(partial(timed, call, 1, wait, clock))

    def turn(name: str) -> float:
        if settle:
            calls[name]()
        return timed(calls[name], repeats[name], wait, clock)

    return rounds(list(calls), turn, seconds, clock=clock, least_rounds=least_rounds)


def _nothing() -> None:
    """On a CPU a call is done when it returns."""


def timed(call: Call, repeats: int, wait: Callable[[], object], clock: Callable[[], float]) -> float:
    """Microseconds of one call."""
    wait()
    started = clock()
    for _ in range(repeats):
        call()
    wait()
    return 1e6 * (clock() - started) / repeats


def repeats_of(once: Callable[[], float]) -> int:
    """How often a call is repeated in a turn, by the shorter of two tries."""
    spent = min(once(), once())
    return max(1, min(MOST_REPEATS, round(TURN_US / spent))) if spent > 0 else MOST_REPEATS


class Rotation:
    """The copies of a call, one after the other."""

    def __init__(self, copies: Sequence[Call]) -> None:
        self.copies, self.next = copies, 0

    def __call__(self) -> object:
        call = self.copies[self.next]
        self.next = (self.next + 1) % len(self.copies)
        return call()
