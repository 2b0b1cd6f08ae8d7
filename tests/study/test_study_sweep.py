"""Sweeps on Ray: every run once, failures beside results, folders that stay what they are."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sweep_jobs
from kronafuse.study.anova.analysis import analyse
from kronafuse.study.cluster import (
    Resources,
    check_answers,
    check_shared,
    connected,
    read_token,
    slots,
    usable_cpus,
)
from kronafuse.study.grid import Grid, make_grid
from kronafuse.study.job import Job, find_job
from kronafuse.study.results import results_table, write_results
from kronafuse.study.runs import Run, checked_metrics, execute, failure, record_path
from kronafuse.study.sweep import Outcome, sweep
from kronafuse.study.view import View, outcome
from kronafuse.train.lock import held
from rich.console import Console

pytestmark = pytest.mark.usefixtures("session")


def grid(*ranks: int, seeds: tuple[int, ...] = (0,)) -> Grid:
    return make_grid([{"family": "lora", "rank": list(ranks)}], seeds)


def run_sweep(
    folder: Path, job: Any = sweep_jobs.quick, grid_: Grid | None = None, **options: Any
) -> tuple[Outcome, str]:
    """The outcome and what was printed."""
    text = io.StringIO()
    settings = options.pop("settings", {})
    job = job if isinstance(job, Job) else Job("test", job)
    outcome = sweep(
        job, settings, grid_ or grid(1, 2), folder, console=Console(file=text, width=200), **options
    )
    return outcome, text.getvalue()


def stamps(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Each record's inode, time and content."""
    return {
        path.stem: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in (folder / "runs").glob("*.json")
    }


def test_every_run_once_and_a_table(tmp_path: Path) -> None:
    outcome, printed = run_sweep(tmp_path, grid_=grid(1, 2, 4, seeds=(0, 1)), settings={"steps": 7})
    assert len(outcome.finished) == len(set(outcome.ran)) == 6
    assert outcome.failed == {}
    assert len(list((tmp_path / "notes").iterdir())) == 6
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["score"]) == pytest.approx([1.0, 1.1, 2.0, 2.1, 4.0, 4.1])
    assert list(table["rank"]) == [1, 1, 2, 2, 4, 4]
    assert set(table["status"]) == {"finished"}
    assert set(table["id"]) == set(outcome.finished)
    assert set(table["steps"]) == {7}
    assert table["torch_version"].notna().all()
    parquet = pd.read_parquet(tmp_path / "results.parquet")
    assert list(parquet.columns) == list(table.columns)
    assert list(parquet["score"]) == list(table["score"])
    record = json.loads(record_path(tmp_path, outcome.finished[0]).read_text())
    assert record["config"]["family"] == "lora"
    assert record["settings"] == {"steps": 7}
    assert "[6/6]" in printed
    assert "done 6, running 0, failed 0, remaining 0" in printed


def test_again_redoes_nothing_and_another_grid_adds(tmp_path: Path) -> None:
    first, _ = run_sweep(tmp_path)
    before = stamps(tmp_path)
    again, _ = run_sweep(tmp_path)
    assert len(first.finished) == 2
    assert again.ran == ()
    assert set(again.finished) == set(first.finished)
    assert stamps(tmp_path) == before
    more, _ = run_sweep(tmp_path, grid_=grid(2, 4))
    assert len(more.ran) == 1
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(pd.read_csv(tmp_path / "results.csv")) == 3


def statuses(folder: Path) -> dict[int, str]:
    """Rank -> status in the table."""
    table = pd.read_csv(folder / "results.csv")
    return dict(zip(table["rank"], table["status"], strict=True))


def test_runs_without_a_record_are_pending_in_the_table(tmp_path: Path) -> None:
    """As after an interrupt; also those that only an earlier grid of the folder asked for."""
    outcome, _ = run_sweep(tmp_path, grid_=grid(1, 2), settings={"steps": 7})
    run_sweep(tmp_path, grid_=grid(4), settings={"steps": 7})
    record_path(tmp_path, outcome.finished[1]).unlink()
    write_results(tmp_path)
    assert statuses(tmp_path) == {1: "finished", 2: "pending", 4: "finished"}
    row = pd.read_parquet(tmp_path / "results.parquet").set_index("rank").loc[2]
    assert (row["id"], row["steps"]) == (outcome.finished[1], 7)
    assert pd.isna(row["score"])
    assert pd.isna(row["seconds"])
    with pytest.raises(ValueError, match=rf"{outcome.finished[1]} lora rank=2 .*\(pending\)"):
        analyse(tmp_path / "results.csv", tmp_path / "out", response="score", factors=["rank"])
    run_sweep(tmp_path, grid_=grid(1), settings={"steps": 7})
    assert statuses(tmp_path)[2] == "pending"
    run_sweep(tmp_path, grid_=grid(1, 2), settings={"steps": 7})
    assert set(statuses(tmp_path).values()) == {"finished"}


def test_a_folder_that_does_not_remember_its_grids_is_accepted(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"job": "test", "settings": {}}')
    before = stamps(tmp_path)
    run_sweep(tmp_path, grid_=grid(2, 4))
    assert {name: stamps(tmp_path)[name] for name in before} == before
    remembered = json.loads((tmp_path / "sweep.json").read_text())["configs"]
    assert [config["rank"] for config in remembered] == [2, 4]
    assert statuses(tmp_path) == dict.fromkeys((1, 2, 4), "finished")


def test_the_cluster_is_looked_for_before_the_job_prepares(tmp_path: Path) -> None:
    def prepare(settings: Any, folder: Path) -> None:
        (folder / "prepared").touch()

    job = Job("test", sweep_jobs.quick, prepare=prepare)
    with pytest.raises(ValueError, match=r"a run needs 3 CPUs"):
        run_sweep(tmp_path, job, resources=Resources(per_run=3))
    assert not (tmp_path / "prepared").exists()
    run_sweep(tmp_path, job)
    assert (tmp_path / "prepared").exists()


def test_a_job_that_ends_its_process_has_failed(tmp_path: Path) -> None:
    outcome, _ = run_sweep(tmp_path, sweep_jobs.leaving, grid(1), retries=2)
    assert list(outcome.failed.values()) == ["SystemExit: exit code 3"]
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_processors_are_counted_where_the_system_does_not_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cpus() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


def test_a_failure_is_recorded_and_stops_no_other(tmp_path: Path) -> None:
    outcome, printed = run_sweep(tmp_path, sweep_jobs.failing, grid(3, 1, 2))
    ((failed, reason),) = outcome.failed.items()
    assert reason == "ValueError: rank 3 is not for us"
    assert len(outcome.finished) == 2
    assert "failed: ValueError: rank 3 is not for us" in printed
    record = json.loads(record_path(tmp_path, failed).read_text())
    assert "sweep_jobs.py" in record["traceback"]
    table = pd.read_csv(tmp_path / "results.csv").set_index("id")
    assert table.loc[failed, "status"] == "failed"
    assert table.loc[failed, "error"] == reason
    assert pd.isna(table.loc[failed, "score"])

    (tmp_path / "mended").touch()
    still, _ = run_sweep(tmp_path, sweep_jobs.failing, grid(3, 1, 2))
    assert still.ran == ()
    assert set(still.failed) == {failed}
    before = stamps(tmp_path)
    mended, _ = run_sweep(tmp_path, sweep_jobs.failing, grid(3, 1, 2), retry_failed=True)
    assert mended.ran == (failed,)
    assert mended.failed == {}
    after = stamps(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {failed}


def test_a_run_whose_worker_always_dies_is_listed_with_the_reason(tmp_path: Path) -> None:
    outcome, _ = run_sweep(tmp_path, sweep_jobs.dying, grid(1, 2), retries=1)
    assert list(outcome.failed.values()) == [
        "the worker process died 2 times: it was killed, or memory ran out"
    ]
    assert len(outcome.finished) == 1
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == [
        "lora-1-0-0",
        "lora-2-0-0",
        "lora-2-0-1",
    ]


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    run_sweep(tmp_path, settings={"steps": 7, "rate": 0.5})
    before = stamps(tmp_path)
    with pytest.raises(
        ValueError, match=r"has runs of other settings: steps was 7 and is 8; rate was 0.5 and is None"
    ):
        run_sweep(tmp_path, settings={"steps": 8})
    with pytest.raises(ValueError, match=r"has runs of other settings: job was 'test' and is 'other'"):
        run_sweep(tmp_path, Job("other", sweep_jobs.quick), settings={"steps": 7, "rate": 0.5})
    assert stamps(tmp_path) == before
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json does not say which job the folder is of"):
        run_sweep(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    path = next((tmp_path / "runs").glob("*.json"))
    for text in ("{", "[]", '{"id": "other", "status": "finished"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{path.name} is no record of .*; delete it to redo the run"):
            run_sweep(tmp_path)


def test_a_record_of_another_default_is_refused(tmp_path: Path) -> None:
    run_sweep(tmp_path)
    path = next((tmp_path / "runs").glob("*.json"))
    record = json.loads(path.read_text())
    record["config"]["scale"] = 2.0
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"{path.name} is of other axes: scale was 2.0 and is 1.0"):
        run_sweep(tmp_path)
    del record["config"]["scale"]  # of a version without the axis
    path.write_text(json.dumps(record))
    assert run_sweep(tmp_path)[0].ran == ()


def test_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        held(tmp_path, "sweep"),
        pytest.raises(BlockingIOError, match=rf"another kronafuse sweep, process {os.getpid()} since "),
    ):
        run_sweep(tmp_path)
    outcome, _ = run_sweep(tmp_path)
    assert len(outcome.ran) == 2


def test_settings_may_not_be_named_as_axes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"settings must not be named as axes; got rank, seed"):
        run_sweep(tmp_path, settings={"rank": 2, "seed": 1})
    with pytest.raises(
        ValueError,
        match=r"sweep: settings must not be named status, my_version; reserved are: id, status, seconds, error,",
    ):
        run_sweep(tmp_path, settings={"status": 2, "my_version": 1})
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_session_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a run needs 3 CPUs and 0 GPUs on one node; the nodes have: 2 CPUs and 0 GPUs"
    ):
        run_sweep(tmp_path, resources=Resources(per_run=3))
    with pytest.raises(ValueError, match=r"a run needs 1 CPUs and 0.5 GPUs on one node"):
        run_sweep(tmp_path, resources=Resources(gpus=0.5))
    assert slots(Resources()) == 2
    assert slots(Resources(per_run=2)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 0}, "cpus must be at least 1; got 0"),
        ({"per_run": 0}, "per_run must be at least 1; got 0"),
        ({"gpus": -1}, "gpus must be at least 0; got -1"),
        ({"address": "auto", "cpus": 2}, "cpus counts this machine's processors"),
    ],
)
def test_rejects_resources(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(**options)


def test_an_address_where_nobody_listens_is_named() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127.0.0.1:1: .*refused"):
        check_answers("127.0.0.1:1")
    check_answers("auto")


def test_rejects_retries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"retries must be at least 0; got -1"):
        run_sweep(tmp_path, retries=-1)


def test_nodes_that_do_not_see_the_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert read_token(tmp_path / "absent") is None
    from kronafuse.study import cluster

    monkeypatch.setattr(cluster, "read_token", lambda path: None)
    with (
        pytest.raises(
            OSError, match=r"must be on storage that every node of the cluster shares; a file .* read on \d"
        ),
        connected(Resources(address="auto"), tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_figures_are_checked() -> None:
    run = Run("0", {"rank": 2}, {"steps": 3})
    assert checked_metrics({"score": 1, "other": 0.5}, run) == {"score": 1, "other": 0.5}
    for metrics, kind, message in (
        ({}, ValueError, "a job must return at least one figure; got none"),
        (3, TypeError, "a job must return figures by name; got 3"),
        ({"score": "good"}, TypeError, "figure 'score' must be a number; got 'good'"),
        ({"score": True}, TypeError, "figure 'score' must be a number; got True"),
        ({"score": float("nan")}, ValueError, "figure 'score' must be finite; got nan"),
        (
            {"rank": 1.0, "steps": 2},
            ValueError,
            "figures must not be named as axes or settings; got rank, steps",
        ),
        ({"alpha": 1.0}, ValueError, "figures must not be named as axes or settings; got alpha"),
        *(
            ({name: 1.0}, ValueError, f"a job's figures must not be named {name}; reserved are: id, status")
            for name in ("id", "status", "seconds", "error", "host", "pair", "torch_version")
        ),
    ):
        with pytest.raises(kind, match=message):
            checked_metrics(metrics, run)


def test_a_worker_that_ray_ends_leaves_no_failure(tmp_path: Path) -> None:
    """Ray ends a worker by a SystemExit with its own message; the run is to be started again."""
    ended = SystemExit(1)
    ended.ray_terminate_msg = "The process receives a SIGTERM."  # type: ignore[attr-defined]

    def run_once(config: Any, folder: Path) -> dict[str, float]:
        raise ended

    run = Run("lora-1", {"family": "lora", "seed": 0}, {})
    with pytest.raises(SystemExit):
        execute(Job("ended", run_once), run, tmp_path, 1)
    assert not record_path(tmp_path, run.id).exists()


def test_a_finished_record_is_never_written_again(tmp_path: Path) -> None:
    """As when a worker is killed between its record and its answer, and Ray starts the run again."""
    (tmp_path / "runs").mkdir()
    job, run = Job("test", sweep_jobs.quick), Run("abc", grid(2).configs[0], {})
    assert execute(job, run, tmp_path, 1) == "finished"
    before = stamps(tmp_path)
    assert execute(job, run, tmp_path, 1) == "finished"
    assert stamps(tmp_path) == before
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_a_failed_record_has_no_figures() -> None:
    record = failure(Run("abc", {"family": "lora", "rank": 2, "seed": 0}, {"steps": 3}), "gone")
    table = results_table([record])
    assert list(table.columns) == ["id", "status", "family", "rank", "seed", "steps", "seconds", "error"]


def test_the_table_leaves_axes_empty_that_a_form_does_not_have() -> None:
    table = {"family": "bottleneck", "width": 8, "form": ["dense", "compacter"], "terms": [2, 4]}
    records = [
        failure(Run(str(i), each, {}), "gone") for i, each in enumerate(make_grid([table], [0]).configs)
    ]
    terms = results_table(records).set_index("id")["terms"]
    assert pd.isna(terms["0"])
    assert list(terms[["1", "2"]]) == [2, 4]


def test_jobs_are_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_jobs_here.py").write_text("def run(config, folder):\n    return {'score': 1.0}\n")
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", os.getcwd())])
    with pytest.raises(ImportError, match="own_jobs_here"):
        find_job("own_jobs_here:run")
    monkeypatch.chdir(tmp_path)
    assert find_job("own_jobs_here:run").run({}, tmp_path) == {"score": 1.0}


def test_a_progress_line_has_the_first_line_of_an_error() -> None:
    record = failure(Run("abc", {"family": "lora"}, {}), "ValueError: first\nsecond")
    assert outcome(record) == "failed: ValueError: first"


def test_jobs_are_found_by_name() -> None:
    assert find_job("digits").name == "digits"
    assert find_job("sweep_jobs:quick").run is sweep_jobs.quick
    for name, kind, message in (
        ("letters", ValueError, "job must be one of digits, or written module:function; got 'letters'"),
        ("sweep_jobs:", ValueError, "job must be one of digits"),
        ("sweep_jobs:absent", TypeError, "job 'sweep_jobs:absent' must be a function or a Job; got None"),
        ("no_such_module:job", ImportError, "no_such_module"),
    ):
        with pytest.raises(kind, match=message):
            find_job(name)
    with pytest.raises(ValueError, match=r"unknown key step \(closest: steps\)"):
        find_job("digits").complete({"step": 3})
    with pytest.raises(ValueError, match=r"the settings of job 'x' must be JSON values"):
        Job("x", sweep_jobs.quick).complete({"rate": float("nan")})


def test_the_view_counts_and_shows_the_last_results() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    finished = {
        "id": "a",
        "status": "finished",
        "config": {"family": "lora", "seed": 0},
        "metrics": {"score": 0.5},
        "seconds": 2.0,
    }
    with View(console, 10, 3, 1) as view:
        assert (view.remaining, view.time_left()) == (6, "?")
        view.ended_run(finished, 2)
        view.ended_run({**finished, "id": "b", "status": "failed", "error": "KeyError: 'x'"}, 1)
        assert (view.done, view.failed, view.running, view.remaining) == (4, 2, 1, 3)
        shown = Console(file=io.StringIO(), width=160)
        shown.print(view.render())
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "done 4, running 1, failed 2, remaining 3, time left 0:00:0" in text
    assert "score 0.5, 2.0 s" in text
    assert "failed: KeyError: 'x'" in text


def test_the_session_of_the_process_stays(tmp_path: Path) -> None:
    import ray

    run_sweep(tmp_path)
    assert ray.is_initialized()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_job_may_print_what_its_terminal_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def printing(config: Any, folder: Path) -> dict[str, float]:
        print("η² of 5 µs")
        return {"score": 1.0}

    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert execute(
        Job("printing", printing), Run("lora-1", {"family": "lora", "seed": 0}, {}), tmp_path, 1
    ) == ("finished")
