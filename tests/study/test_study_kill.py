"""Commands as processes: a Ray worker killed, the driver killed, Ctrl-C; no run is lost, none is done twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from kronafuse.study.runs import read_records
from processes import alive, command, descendants, finish, name_of, wait_for


def arguments(folder: Path, job: str = "waiting", ranks: str = "1,2,3") -> list[object]:
    return [
        "sweep", "--family", "lora", "--rank", ranks, "--seeds", "0", "--job", f"sweep_jobs:{job}",
        "--output", folder, "--cpus", "1",
    ]  # fmt: skip


def note(folder: Path, rank: int, start: int = 0) -> Path:
    return folder / "notes" / f"lora-{rank}-0-{start}"


def worker_of(folder: Path, rank: int, start: int = 0) -> int:
    """The process that has taken the run, once it has."""
    path = note(folder, rank, start)
    wait_for(lambda: path.exists() and path.read_text(), f"start {start} of rank {rank}")
    return int(path.read_text())


def stamp(folder: Path, run: str) -> tuple[int, int, bytes]:
    path = folder / "runs" / f"{run}.json"
    return path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()


def finished(folder: Path) -> dict[int, str]:
    """Rank -> id of the runs that are done."""
    records = read_records(folder).values()
    return {record["config"]["rank"]: record["id"] for record in records if record["status"] == "finished"}


def starts(folder: Path) -> dict[str, int]:
    names = [path.name.rpartition("-")[0] for path in (folder / "notes").iterdir()]
    return {name: names.count(name) for name in set(names)}


def test_a_killed_worker_is_started_again(tmp_path: Path) -> None:
    with command(*arguments(tmp_path)) as process:
        worker = worker_of(tmp_path, 2)
        assert name_of(worker).startswith("ray::")
        assert worker in descendants(process.pid)
        first = finished(tmp_path)
        assert set(first) == {1}
        before = stamp(tmp_path, first[1])
        everything = descendants(process.pid)
        os.kill(worker, signal.SIGKILL)
        assert worker_of(tmp_path, 2, start=1) != worker
        (tmp_path / "go").touch()
        code, printed = finish(process)
    assert code == 0, printed
    assert "3 finished, 0 failed" in printed
    assert set(finished(tmp_path)) == {1, 2, 3}
    assert stamp(tmp_path, first[1]) == before
    assert starts(tmp_path) == {"lora-1-0": 1, "lora-2-0": 2, "lora-3-0": 1}
    wait_for(lambda: not alive(everything), "the end of Ray's processes")


def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    with command(*arguments(tmp_path)) as process:
        worker_of(tmp_path, 2)
        everything = descendants(process.pid)
        working = {each for each in everything if "Agent" not in name_of(each)}
        assert len(working) > 3
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        first = finished(tmp_path)
        before = stamp(tmp_path, first[1])
    # Ray's agents look for their node for a minute before they end; what runs jobs ends at once
    wait_for(lambda: not alive(working), "the end of Ray's workers")
    assert set(first) == {1}
    (tmp_path / "go").touch()
    with command(*arguments(tmp_path)) as process:
        code, printed = finish(process)
    assert code == 0, printed
    assert "3 finished, 0 failed; 1 of them were there before" in printed
    done = finished(tmp_path)
    assert set(done) == {1, 2, 3}
    assert done[1] == first[1]
    assert stamp(tmp_path, first[1]) == before
    assert starts(tmp_path) == {"lora-1-0": 1, "lora-2-0": 2, "lora-3-0": 1}
    table = pd.read_csv(tmp_path / "results.csv")
    assert sorted(table["id"]) == sorted(done.values())
    assert not list(tmp_path.rglob("*.partial"))
    wait_for(lambda: not alive(everything), "the end of Ray's processes")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_cleanly(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    with command(*arguments(tmp_path)) as process:
        worker_of(tmp_path, 2)
        everything = descendants(process.pid)
        with command(*arguments(tmp_path)) as second:
            code, printed = finish(second)
        assert code == 2
        assert f"another kronafuse sweep, process {process.pid} since " in printed
        process.send_signal(number)
        code, printed = finish(process)
    assert code == expected, printed
    assert "stopped with 1 more runs done; the same command goes on" in printed
    assert set(read_records(tmp_path)) == set(finished(tmp_path).values())
    table = pd.read_csv(tmp_path / "results.csv")
    assert dict(zip(table["rank"], table["status"], strict=True)) == {
        1: "finished",
        2: "pending",
        3: "pending",
    }
    assert not list(tmp_path.rglob("*.partial"))
    wait_for(lambda: not alive(everything), "the end of Ray's processes")


def test_failed_runs_are_the_exit_code(tmp_path: Path) -> None:
    with command(*arguments(tmp_path, "dying", "1,2"), "--retries", "0") as process:
        code, printed = finish(process)
    assert code == 1
    assert "1 runs failed; --retry-failed redoes them:" in printed
    assert "the worker process died once: it was killed, or memory ran out" in printed


def test_the_installed_command_finds_jobs_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "own_jobs.py").write_text("def run(config, folder):\n    return {'score': 1.0}\n")
    with command(
        "sweep", "--family", "lora", "--rank", "1", "--seeds", "0", "--job", "own_jobs:run", "--cpus", "1",
        "--output", "out", installed_in=tmp_path,
    ) as process:  # fmt: skip
        code, printed = finish(process)
    assert code == 0, printed
    assert "1 finished, 0 failed" in printed
