"""An output folder is one process's at a time, and never that of a process which is gone."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kronafuse.train import lock, run
from kronafuse.train.config import TrainConfig
from kronafuse.train.digits.demo import run_demo
from kronafuse.train.digits.recipe import SMOKE
from kronafuse.train.lock import HOLDER, LOCK, held

HOLD = """
import sys, time
from pathlib import Path
from kronafuse.train.lock import held
with held(Path(sys.argv[1]), "train"):
    print("holds", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_error_names_the_other_process_and_a_killed_one_holds_nothing(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    folder = configure().output
    folder.mkdir()
    with holder(folder) as other:
        named = (
            rf"another kronafuse train, process {other.pid} since 20.*, is at work in the output folder .*out"
        )
        with pytest.raises(BlockingIOError, match=rf"train: {named}; wait for it, stop it, or give another"):
            run.train(configure())
        with pytest.raises(BlockingIOError, match=rf"demo: {named}"):
            run_demo(folder, SMOKE)
        assert sorted(each.name for each in folder.iterdir()) == [LOCK, HOLDER]
    with held(folder, "train"):
        assert json.loads((folder / HOLDER).read_text())["process"] == os.getpid()
    assert list(folder.iterdir()) == []


@contextmanager
def left_over(folder: Path, seconds: float) -> Iterator[int]:
    """A lock that outlives its holder, as older versions of filelock leave it with processes forked from it."""
    with holder(folder) as other:
        written = (folder / HOLDER).read_bytes()
    (folder / HOLDER).write_bytes(written)
    descriptor = os.open(folder / LOCK, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    timer = threading.Timer(seconds, os.close, [descriptor])
    timer.start()
    yield other.pid
    timer.join()


def test_children_of_a_killed_process_are_waited_for(tmp_path: Path) -> None:
    """The processes that read images end some seconds after the one that trained."""
    with left_over(tmp_path, 0.3), held(tmp_path, "train"):
        assert json.loads((tmp_path / HOLDER).read_text())["process"] == os.getpid()


def test_children_of_a_killed_process_that_stay_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.05)
    with left_over(tmp_path, 0.5) as process:
        told = rf"another kronafuse train, process {process} \(which has ended; a child of it runs\) since "
        with pytest.raises(BlockingIOError, match=told), held(tmp_path, "train"):
            pass


def test_only_the_main_process_of_a_run_holds_its_folder(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Exception):
        pass

    def began(*_: object) -> None:
        raise Second

    make = run.new_accelerator

    def second(config: TrainConfig) -> object:
        accelerator = make(config)
        monkeypatch.setattr(type(accelerator), "is_main_process", property(lambda _: False))
        return accelerator

    monkeypatch.setattr(run, "new_accelerator", second)
    monkeypatch.setattr(run, "load_base", began)
    configure().output.mkdir()
    with held(configure().output, "train"), pytest.raises(Second):
        run.train(configure())


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(lock.FileLock, "acquire", refuses)
    with (
        pytest.warns(UserWarning, match=r"train: output folder .* is not locked .*: no flock here"),
        held(tmp_path, "train"),
    ):
        assert list(tmp_path.iterdir()) == []
