"""Tuning without a GPU: everything but the times is real, and what it writes is what launchers read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kronafuse.bench import tune as tuning_run
from kronafuse.bench.machine import describe
from kronafuse.bench.timing import spread_of
from kronafuse.bench.tune import time_problem, tune
from kronafuse.bench.tune_candidates import TUNABLES, valid
from kronafuse.bench.tune_problems import Problem, Subject, launches_of, problems, shortlist
from kronafuse.ops import tuned
from kronafuse.ops.kron_linear import tuning
from kronafuse.ops.launch import Architecture, Launch, recording
from kronafuse.testing.bottleneck_cases import CASES as BOTTLENECKS
from kronafuse.testing.cases import CASES

pytest.importorskip("triton")

GPU = "NVIDIA H200"
H200 = Architecture(90, 132, GPU)
BF16 = torch.bfloat16
THIN = Subject(CASES["sd15_1280-krona_64x4"], BF16)
FAT = Subject(CASES["sd15_1280-lokr_f8"], BF16)
BOTTLENECK = Subject(BOTTLENECKS["sd15_1280-width_60"], BF16)


class FakeTimer:
    """Every candidate takes a microsecond less than the one before it; each reading of the clock is a second."""

    def __init__(
        self, *, broken: Callable[[Launch], bool] | None = None, error: str = "out of resources"
    ) -> None:
        counter = itertools.count()
        self.clock = lambda: float(next(counter))
        self.broken, self.error = broken, error
        self.turns: list[tuple[str, ...]] = []

    def warm_up(self, copies: Sequence[Any]) -> None:
        (call,) = copies
        if self.broken is not None and any(map(self.broken, call.args[0])):
            raise RuntimeError(self.error)

    def device_times(self, arms: Any, seconds: float) -> Any:
        self.turns.append(tuple(arms))
        times = {name: 100.0 - number for number, name in enumerate(arms)}
        return {name: spread_of([[time_us], [time_us]]) for name, time_us in times.items()}, dict.fromkeys(
            arms, ()
        )


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins and ends with the table that the package ships."""
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.reload()
    yield
    monkeypatch.undo()
    tuned.reload()


def run(chosen: Sequence[Problem], path: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"timer": FakeTimer(), "gpu": GPU, "seconds": 1e6, "device": "meta", **options}
    return tune(chosen, path, **given)


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.reload()


def test_every_kernel_of_the_table_can_be_tuned():
    assert set(TUNABLES) == set(tuned.KEYS)


def test_problems_are_the_choices_of_the_steps_by_every_route():
    """Each row of the table once, kernels that only the other route reaches among them."""
    found = problems([THIN, FAT, FAT, BOTTLENECK], H200)
    assert {problem.choice.kernel for problem in found} == set(TUNABLES)
    assert len({problem.place for problem in found}) == len(found)
    for subject in (THIN, FAT, BOTTLENECK):
        kernels = [each for each in found if each.subject == subject and not each.is_route]
        times = [min(valid(problem.choice).values()) for problem in kernels]
        assert times == sorted(times, reverse=True)
    forms = {
        problem.choice.kernel: set(problem.routes) for problem in found if problem.choice.kernel == "one_pass"
    }
    assert forms["one_pass"] <= {"fat_route"}
    only = problems([THIN], H200, ["shrink"])
    assert {problem.choice.kernel for problem in only} == {"shrink"}


def test_layers_that_share_x_are_problems_of_their_own():
    alone, shared = (
        {problem.place for problem in problems([replace(THIN, layers=layers)], H200, ["shrink"])}
        for layers in (1, 3)
    )
    assert len(shared) == len(alone)
    assert shared.isdisjoint(alone)


@pytest.mark.parametrize("subject", [THIN, FAT, BOTTLENECK], ids=["thin", "fat", "bottleneck"])
def test_every_candidate_launches_what_it_says(subject):
    """The launch of the choice has the candidate's constants, and the second stage of a split comes with it."""
    for problem in problems([subject], H200):
        if problem.is_route:
            continue
        step = problem.subject.prepare("meta")
        for config in shortlist(valid(problem.choice), 4):
            first, *rest = launches_of(problem, step, config)
            assert (first.warps, first.stages) == (config.warps, config.stages)
            for name in (
                "block_m",
                "block_n",
                "block_k",
                "block_w",
                "block_r",
                "block_j",
                "block_p",
                "split",
            ):
                if hasattr(config, name) and name.upper() in first.constants:
                    assert first.constants[name.upper()] == getattr(config, name), (problem, config)
            assert all(each.kernel.__name__.startswith("_sum") for each in rest)
            if "SPLIT" in first.constants and not problem.choice.kernel.startswith("bottleneck"):
                assert bool(rest) == (first.constants["SPLIT"] > 1), (problem, config)


def test_shortlist_has_other_tiles_before_other_stages():
    choice = tuned.Choice("linear", H200, (BF16, 4096, 1280, 1280, False, 80, 128, True))
    predicted = valid(choice)
    chosen = shortlist(predicted, 8)
    assert len(chosen) == len(set(chosen)) == 8
    assert chosen[0] == next(iter(predicted))
    assert len({(config.block_m, config.block_n, config.warps) for config in chosen}) >= 6
    assert len({(config.block_m, config.block_n, config.warps) for config in list(predicted)[:8]}) < 6
    assert shortlist(predicted, 1) == chosen[:1]
    assert tuning.linear_config(H200, *choice.values) in chosen


def test_the_table_is_read_back_and_chosen_by_the_launchers(tmp_path, monkeypatch):
    """End to end: after tuning, the same step launches the measured configurations, and another GPU the rule's."""
    chosen, path = problems([THIN, BOTTLENECK], H200), tmp_path / "tables" / "tuned.json"
    before = launched(H200)
    progress = run(chosen, path)
    assert not progress.failures
    assert not progress.left
    rows = tuned.read(path)
    assert len(rows) == len(chosen) == len(progress.rows)
    assert {row.gpu for row in rows} == {GPU}
    for row in (*rows, *tuned.read(tuned.PATH)):
        assert asdict(TUNABLES[row.kernel].kind(**row.config)) == row.config
    use(path, monkeypatch)
    for row, problem in zip(progress.rows, chosen, strict=True):
        assert row.config == asdict(last_of(problem))
        assert row.runner_up is not None
        assert row.runner_up["time_us"] == row.time_us + 1
    assert launched(H200) != before
    assert launched(replace(H200, name="NVIDIA A10")) == before
    assert (rows[0].date, rows[0].triton) == (describe().date[:10], describe().triton)


def last_of(problem: Problem) -> Any:
    """What the fake timer finds fastest."""
    return shortlist(valid(problem.choice), tuning_run.MOST_CANDIDATES)[-1]


def launched(architecture: Architecture) -> list[Any]:
    """Kernel and configuration of every launch of both steps."""
    with recording(architecture) as launches:
        for subject in (THIN, BOTTLENECK):
            subject.prepare("meta")()
    return [(each.kernel.__name__, each.warps, each.stages, dict(each.constants)) for each in launches]


def test_rows_of_other_gpus_and_problems_stay(tmp_path):
    path = tmp_path / "tuned.json"
    (first, *_), others = problems([THIN], H200, ["shrink"]), problems([THIN], H200, ["reduce"])
    run([first], path, gpu="NVIDIA A10")
    run([first], path)
    run(others, path)
    again = run([first], path, most=1)
    rows = tuned.read(path)
    assert len(rows) == 2 + len(others)
    assert {row.gpu for row in rows if row.kernel == "shrink"} == {"NVIDIA A10", GPU}
    assert again.rows[0] in rows
    assert again.rows[0].runner_up is None


def test_routes_come_last_and_use_what_was_found(tmp_path):
    """A route is timed by its whole step, within which the launches have the configurations just measured."""
    chosen = problems([FAT], H200)
    seen: dict[str, list[Any]] = {}

    class Recording(FakeTimer):
        def device_times(self, arms: Any, seconds: float) -> Any:
            if any("Route" in name for name in arms):
                for name, (call,) in arms.items():
                    with recording(H200) as launches:
                        call()
                    seen.setdefault(name, launches)
            return super().device_times(arms, seconds)

    progress = run(chosen, tmp_path / "tuned.json", timer=Recording())
    routes = [TUNABLES[row.kernel].route for row in progress.rows]
    assert routes == sorted(routes)
    assert True in routes
    one_pass = [each for each in seen["FatRoute(form='one_pass')"] if "one_pass" in each.kernel.__name__]
    assert one_pass
    measured = {
        (row.config["block_m"], row.config["stages"]) for row in progress.rows if row.kernel == "one_pass"
    }
    assert {(each.constants["BLOCK_M"], each.stages) for each in one_pass} <= measured


def test_routes_of_the_first_case_come_within_a_budget(tmp_path):
    """Behind the kernels of all cases they would never be reached."""
    chosen = problems([FAT, THIN, BOTTLENECK], H200)
    first = [each for each in chosen if each.subject == FAT]
    assert chosen[: len(first)] == first
    assert [each.is_route for each in first] == sorted(each.is_route for each in first)
    assert any(each.is_route for each in first)
    progress = run(chosen, tmp_path / "tuned.json", seconds=2.0 * len(first) + 0.5)
    assert any(TUNABLES[row.kernel].route for row in progress.rows)
    assert progress.left == chosen[len(first) :]


def test_waiting_for_compilations_ends_with_the_budget(tmp_path):
    """A problem for which all the time was waited is left, and what is left was told to who waits."""
    chosen = problems([THIN], H200, ["shrink", "reduce"])
    timer, given = FakeTimer(), []

    def ready(_problem: Problem, seconds: float) -> None:
        given.append(seconds)
        while timer.clock() < 100:
            pass

    progress = run(chosen, tmp_path / "tuned.json", timer=timer, seconds=50.0, ready=ready)
    assert given == [49.0]
    assert not progress.rows
    assert progress.left == chosen


def test_the_budget_ends_it_and_what_was_found_is_kept(tmp_path):
    """The clock ticks a second a reading: one reading starts, two a choice."""
    chosen, path = problems([THIN], H200, ["shrink", "reduce", "linear"]), tmp_path / "tuned.json"
    assert len(chosen) > 3
    progress = run(chosen, path, seconds=4.5)
    assert len(progress.rows) == 2
    assert [str(problem) for problem in progress.left] == [str(problem) for problem in chosen[2:]]
    assert len(tuned.read(path)) == 2


def test_a_candidate_that_fails_is_left_out():
    problem = problems([THIN], H200, ["shrink"])[0]
    timed = time_problem(
        problem, FakeTimer(broken=lambda each: each.constants.get("BLOCK_M") == 64), 1.0, device="meta"
    )
    assert timed.failures
    assert {config.block_m for config in timed.failures} == {64}
    assert set(timed.failures.values()) == {"RuntimeError: out of resources"}
    assert 64 not in {config.block_m for config in timed.times}


def test_a_candidate_that_no_graph_holds_is_left_out():
    """Its time would be that of eager launches, beside replays of the others."""

    class Uncaptured(FakeTimer):
        def device_times(self, arms: Any, seconds: float) -> Any:
            spreads, notes = super().device_times(arms, seconds)
            return spreads, {**notes, list(arms)[-1]: ("event timing, not graph replay",)}

    problem = problems([THIN], H200, ["shrink"])[0]
    timed = time_problem(problem, Uncaptured(), 1.0, device="meta")
    assert timed.failures == {last_of(problem): "event timing, not graph replay"}
    assert last_of(problem) not in timed.times


def test_a_choice_without_a_candidate_that_runs_is_named(tmp_path):
    first, second = (problems([THIN], H200, [kernel])[0] for kernel in ("shrink", "reduce"))
    broken = FakeTimer(broken=lambda each: each.kernel.__name__ == f"_{first.choice.kernel}_kernel")
    progress = run([first, second], tmp_path / "tuned.json", timer=broken)
    assert list(progress.failures) == [str(first)]
    assert f"no configuration of {first} runs:" in progress.failures[str(first)]
    assert "out of resources" in progress.failures[str(first)]
    assert [row.kernel for row in progress.rows] == [second.choice.kernel]


def test_a_broken_device_ends_it(tmp_path):
    """Behind such an error every launch would fail, and be blamed on its configuration."""
    timer = FakeTimer(
        broken=lambda _launch: True, error="CUDA error: an illegal memory access was encountered"
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(problems([THIN], H200, ["shrink"]), tmp_path / "tuned.json", timer=timer)


def test_a_file_that_is_no_table_is_left_alone(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("notes")
    with pytest.raises(ValueError, match="must be JSON"):
        run(problems([THIN], H200, ["shrink"]), path)
    assert path.read_text() == "notes"


@pytest.mark.gpu
def test_tunes_on_a_gpu(tmp_path, monkeypatch):
    """Real times of a small case, and the launchers take the rows."""
    from kronafuse.bench.timing import CudaTimer

    here = tuning_run.cuda_architecture()
    chosen = problems([THIN], here, ["shrink", "linear", "base_route"])
    timer = CudaTimer(torch.device("cuda", torch.cuda.current_device()))
    progress = tune(chosen, tmp_path / "tuned.json", timer=timer, gpu=here.name, seconds=60, most=3)
    assert not progress.failures
    assert len(progress.rows) == len(chosen)
    use(tmp_path / "tuned.json", monkeypatch)
    for row in progress.rows:
        assert tuned.lookup(row.kernel, here.name, row.key) == row.config
    assert json.loads((tmp_path / "tuned.json").read_text())["note"] == tuning_run.NOTE
