"""The timers, with a clock and a device that only count."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kronafuse.bench.ceilings import measure_ceilings
from kronafuse.bench.timing import (
    HOST_CALLS,
    MOST_CALLS,
    ArmError,
    CpuTimer,
    CudaTimer,
    Rotation,
    interleave,
    rounds,
    spread_of,
    turns,
)


class World:
    """A clock in seconds that calls move on, and what was called."""

    def __init__(self) -> None:
        self.now, self.called = 0.0, []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, microseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += microseconds * 1e-6
            self.called.append(name)

        return run


def test_spreads_are_of_all_rounds_and_name_each_pass():
    spread = spread_of([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert (spread.median, spread.low, spread.high, spread.rounds) == (3.5, 2.0, 5.0, 6)
    assert spread.passes == (2.0, 5.0)
    assert spread.interval == (2.0, 5.0)
    assert spread_of([[7.0]]).interval == (7.0, 7.0)


def test_turns_alternate_and_every_arm_starts_once():
    orders = [turns("abc", number) for number in range(3)]
    assert orders == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"]]
    assert {sorted(order)[0] for order in orders} == {"a"}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_rounds_keep_to_the_time_and_to_the_least_number():
    world = World()

    def turn(_name: str) -> float:
        world.now += 1.0
        return 1.0

    found = rounds(["a", "b"], turn, 20.0, clock=world.clock)
    assert found["a"].rounds == found["b"].rounds == 10  # two passes of five rounds of two seconds
    found = rounds(["a", "b"], turn, 0.0, clock=world.clock, least_rounds=3)
    assert found["a"].rounds == 6


def test_interleave_times_every_arm_in_turns():
    world = World()
    calls = {"slow": world.call("slow", 3000.0), "fast": world.call("fast", 1000.0)}
    found = interleave(calls, 0.1, clock=world.clock)
    assert found["slow"].median == pytest.approx(3000.0)
    assert found["fast"].median == pytest.approx(1000.0)
    timed = world.called[6:]  # a warm-up and two tries of each
    assert timed[:4] == ["slow", "fast", "slow", "fast"]
    assert timed.count("slow") == timed.count("fast")
    assert found["slow"].rounds == timed.count("slow") >= 20


def test_short_calls_are_repeated_within_a_turn():
    world = World()
    found = interleave({"short": world.call("short", 10.0)}, 0.0, clock=world.clock, least_rounds=1)
    assert found["short"].median == pytest.approx(10.0)
    assert len(world.called) == 3 + 2 * 20


def test_a_warm_turn_has_an_untimed_call_first():
    world = World()
    interleave({"x": world.call("x", 500.0)}, 0.0, clock=world.clock, least_rounds=1, settle=True)
    assert len(world.called) == 3 + 2 * 2


def test_interleave_waits_for_the_device():
    world = World()
    pending = [0.0]

    def launch() -> None:
        pending[0] += 700e-6

    def wait() -> None:
        world.now += pending[0]
        pending[0] = 0.0

    found = interleave({"x": launch}, 0.0, synchronize=wait, clock=world.clock, least_rounds=2)
    assert found["x"].median == pytest.approx(700.0)


def test_an_arm_that_raises_is_named():
    def fail() -> None:
        raise MemoryError("no room")

    with pytest.raises(ArmError, match="bad: MemoryError: no room") as raised:
        interleave({"good": lambda: None, "bad": fail}, 0.0)
    assert raised.value.arm == "bad"


def test_cold_turns_go_round_the_copies():
    world = World()
    copies = [world.call(name, 1000.0) for name in "abc"]
    rotation = Rotation(copies)
    for _ in range(4):
        rotation()
    assert world.called == ["a", "b", "c", "a"]
    timer = CpuTimer(1000, clock=world.clock)
    assert timer.cold_bytes() == 2000
    world.called.clear()
    found = timer.measure({"arm": copies, "single": copies[:1]}, 0.3)
    assert found["arm"].wall_us is not None
    assert found["arm"].wall_us.median == pytest.approx(1000.0)
    assert found["arm"].wall_cold_us is not None
    assert found["single"].wall_cold_us is None
    assert found["arm"].device_us is found["arm"].host_us is None
    assert {"b", "c"} <= set(world.called)


class FakeCuda:
    """Launches cost host time when they are called, and device time when the queue is waited for."""

    def __init__(self, host_us: float) -> None:
        self.now = self.device_done = 0.0
        self.host_us, self.capturing = host_us, None
        self.recorded: list[str] = []
        self.stream_now, self.pool_open = "default", None

    def clock(self) -> float:
        return self.now

    def kernel(self, name: str, microseconds: float) -> Callable[[], None]:
        def run() -> None:
            if self.capturing is not None:
                self.capturing.append((name, microseconds))
                return
            self.now += self.host_us * 1e-6
            self._enqueue(name, microseconds)

        return run

    def _enqueue(self, name: str, microseconds: float) -> None:
        self.recorded.append(name)
        self.device_done = max(self.device_done, self.now) + microseconds * 1e-6

    def synchronize(self) -> None:
        self.now = max(self.now, self.device_done)

    def CUDAGraph(self) -> Any:
        graph = SimpleNamespace(kernels=[])

        def replay() -> None:
            for name, microseconds in graph.kernels:
                self._enqueue(name, microseconds)

        graph.replay = replay
        return graph

    @contextmanager
    def graph(self, graph: Any, pool: Any) -> Any:
        """As of torch 2.11: where the capture fails, ending it raises before the stream and the pool are restored."""
        if self.pool_open is not None or self.stream_now != "default":
            raise RuntimeError(f"a capture is under way on {self.stream_now}, to pool {self.pool_open}")
        self.capturing, self.pool_open, self.stream_now = graph.kernels, pool, "capture"
        try:
            yield
        except Exception:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            ) from None
        finally:
            self.capturing = None
        self.pool_open, self.stream_now = None, "default"

    def graph_pool_handle(self) -> Any:
        return 0, 1

    def end_allocation(self, device: Any, pool: Any) -> None:
        assert pool == self.pool_open
        self.pool_open = None

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, name=self.stream_now)

    def set_stream(self, stream: Any) -> None:
        self.stream_now = stream.name

    @contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.now, self.device_done))
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def get_device_properties(self, device: Any) -> Any:
        return SimpleNamespace(L2_cache_size=100)


def cuda_timer(fake: FakeCuda) -> CudaTimer:
    return CudaTimer(torch.device("cuda", 0), fake, fake.clock, end_allocation=fake.end_allocation)


def test_device_time_is_that_of_a_graph_and_wall_time_that_of_calls():
    fake = FakeCuda(host_us=30.0)
    found = cuda_timer(fake).measure({"arm": [fake.kernel("k", 10.0), fake.kernel("k2", 12.0)]}, 0.5)["arm"]
    assert found.device_us is not None
    assert found.device_us.median == pytest.approx(10.0)
    assert found.device_cold_us is not None
    assert found.device_cold_us.median == pytest.approx(11.0)  # round both copies
    assert found.wall_us is not None
    assert 30.0 <= found.wall_us.median <= 32.0  # launches hide the kernels
    assert found.host_us is not None
    assert found.host_us.median == pytest.approx(30.0)
    assert found.notes == ()
    assert cuda_timer(fake).cold_bytes() == 200


def test_host_time_is_of_the_forward_alone():
    fake = FakeCuda(host_us=30.0)
    step, forward = fake.kernel("step", 10.0), fake.kernel("forward", 1.0)
    fake.recorded.clear()
    cuda_timer(fake).measure({"arm": [step]}, 0.0, {"arm": forward})
    assert fake.recorded.count("forward") == 2 * 3 * HOST_CALLS


def test_short_calls_fill_a_graph():
    fake = FakeCuda(host_us=1.0)
    captured: list[int] = []
    graph = fake.graph

    @contextmanager
    def counting(each: Any, pool: Any) -> Any:
        with graph(each, pool):
            yield
        captured.append(len(each.kernels))

    fake.graph = counting
    cuda_timer(fake).device_times({"a": [fake.kernel("a", 50.0)], "b": [fake.kernel("b", 0.1)]}, 0.0)
    assert captured == [1, 10, 1, MOST_CALLS]


def test_arms_take_turns_on_the_device():
    fake = FakeCuda(host_us=1.0)
    arms = {name: [fake.kernel(name, 1000.0), fake.kernel(name, 1000.0)] for name in "ab"}
    timer = cuda_timer(fake)
    timer.device_times(arms, 0.0)
    # Each turn is two replays of both copies: an untimed one keeps the device busy while the timed one is launched.
    assert "".join(fake.recorded[4:20]) == "aaaabbbbaaaabbbb"


def test_a_failed_capture_hurts_no_other_arm():
    """Its time by events is a note: beside device times of others it would say nothing."""
    fake = FakeCuda(host_us=5.0)
    run = fake.kernel("k", 20.0)

    def synchronises() -> None:
        if fake.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        run()

    found = cuda_timer(fake).measure({"arm": [synchronises], "other": [fake.kernel("o", 10.0)]}, 0.0)
    arm, other = found["arm"], found["other"]
    assert arm.device_us is arm.device_cold_us is None
    assert arm.wall_us is not None
    assert arm.notes == (
        "warm: capture failed: RuntimeError: CUDA error: operation failed due to a previous error during capture;"
        " 20.0 µs by events around eager calls",
    )
    assert other.device_us is not None
    assert other.device_us.median == pytest.approx(10.0)
    assert other.notes == ()
    assert (fake.stream_now, fake.pool_open) == ("default", None)


def test_an_arm_is_cold_only_where_it_is_captured():
    fake = FakeCuda(host_us=5.0)
    run, captures = fake.kernel("k", 20.0), []

    def once() -> None:
        if fake.capturing is not None:
            captures.append(1)
            if len(captures) > 200:
                raise RuntimeError("no more memory for graphs")
        run()

    copies = [once, *[once] * 300]
    found = cuda_timer(fake).measure({"arm": copies}, 0.0)["arm"]
    assert found.device_us is not None
    assert found.device_cold_us is None
    assert found.notes[0].startswith("cold: capture failed: RuntimeError: CUDA error")


def test_a_cold_turn_starts_behind_a_replay():
    """A start event on an idle device would count the time of the launch."""
    fake = FakeCuda(host_us=30.0)
    busy = []
    event = fake.Event

    def seen(enable_timing: bool) -> Any:
        made = event(enable_timing)
        record = made.record

        def noted() -> None:
            busy.append(fake.device_done > fake.now)
            record()

        made.record = noted
        return made

    fake.Event = seen
    cuda_timer(fake).device_times({"arm": [fake.kernel("a", 100.0), fake.kernel("b", 100.0)]}, 0.0)
    assert busy
    assert all(busy)


def test_an_arm_that_raises_on_the_device_is_named():
    fake = FakeCuda(host_us=5.0)

    def fail() -> None:
        raise RuntimeError("illegal address")

    with pytest.raises(ArmError, match="bad: RuntimeError: illegal address"):
        cuda_timer(fake).measure({"good": [fake.kernel("k", 1.0)], "bad": [fail]}, 0.0)


def test_ceilings_of_this_machine():
    found = measure_ceilings(CpuTimer(1024), [torch.float32], seconds=0.05, copy_bytes=2**20, gemm_size=64)
    assert found.copy_bytes_per_s > 1e7
    assert found.gemm_flops_per_s["float32"] > 1e7
    assert found.launch_us is None
