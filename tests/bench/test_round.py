"""A round with small parts of its own: budgets, statuses, the archive, and what the real parts say here."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from kronafuse.bench.round import parts as real
from kronafuse.bench.round.process import run_command
from kronafuse.bench.round.records import FILE
from kronafuse.bench.round.run import (
    RESERVE_SECONDS,
    SKIPPED,
    Command,
    Part,
    choose,
    last_line,
    run_round,
)
from kronafuse.bench.round.table import round_table
from kronafuse.cli.exits import reported
from rich.console import Console

PYTHON = (sys.executable, "-c")
PARENT = """
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
                          " print('child', flush=True); time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("waiting", flush=True)
time.sleep(60)
"""
"""Starts a child that Ctrl-C does not end, and waits for longer than any test."""


def part(name, *codes, budget=1.0, reasons=(), words=None):
    def commands(folder, _seconds):
        own = (
            words(folder)
            if words
            else [(*PYTHON, f"print('{name}', {code}); raise SystemExit({code})") for code in codes]
        )
        return [Command(each, f"{name}_{index}.log") for index, each in enumerate(own)]

    return Part(name, budget, tuple(reasons), commands)


def play(parts, folder, seconds=60.0, **options):
    options = {"reserve_seconds": 0.0, "grace_seconds": 0.2, "say": lambda _text: None} | options
    return run_round(parts, folder, seconds, **options)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends_within(process: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(process)


def test_statuses_logs_and_archive(tmp_path):
    folder, said = tmp_path / "round", []
    parts = [
        part("good", 0, 0),
        part("bad", 0, 3),
        part("absent", 0, reasons=("no CUDA device", "no tool")),
        part("after", 0),
    ]
    result = play(parts, folder, say=said.append)
    assert [each.status for each in result.parts] == ["done", "failed", "cannot run", "done"]
    assert [each.exit_statuses for each in result.parts] == [(0, 0), (0, 3), (), (0,)]
    assert result.parts[1].reason == "bad 0; bad 3"
    assert result.parts[2].reason == "no CUDA device; no tool"
    assert result.parts[2].started is None
    assert result.parts[3].started >= result.parts[0].started
    assert "bad: failed: bad 0; bad 3" in said
    assert json.loads((folder / FILE).read_text())["parts"][1]["status"] == "failed"
    with tarfile.open(tmp_path / "round.tar.gz") as archive:
        names = archive.getnames()
        log = archive.extractfile("round/bad_1.log").read()
    assert {"round/round.json", "round/good_0.log", "round/after_0.log"} <= set(names)
    assert log.decode().splitlines()[0].startswith("$ python")
    assert log.decode().splitlines()[1] == "bad 3"
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
    assert round_table(result).row_count == 4


def test_budget_kills_children_too(tmp_path):
    pid = tmp_path / "pid"
    slow = part("slow", words=lambda _folder: [(*PYTHON, PARENT, str(pid))])
    result = play([slow, part("next", 0, budget=5.0)], tmp_path / "round", seconds=6.5)
    assert result.parts[0].status == "stopped at its budget"
    assert result.parts[0].exit_statuses == (None,)
    assert result.parts[0].reason == "stopped"
    assert result.parts[0].seconds < 5.0
    assert ends_within(int(pid.read_text()), 5.0)
    assert result.parts[1].status == "done"
    assert "waiting" in (tmp_path / "round" / "slow_0.log").read_text()


def test_a_command_that_ends_leaves_no_child(tmp_path):
    script = PARENT.removesuffix("time.sleep(60)\n")
    pid = tmp_path / "pid"
    ended = run_command((*PYTHON, script, str(pid)), tmp_path / "log", 30.0)
    assert ended.exit_status == 0
    assert ends_within(int(pid.read_text()), 5.0)


@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored_here"])
def test_a_part_may_write_its_summary_when_it_is_stopped(tmp_path, ignored):
    """Also in a job in the background, or under nohup, whose processes inherit that SIGINT is ignored."""
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    words = (*PYTHON, "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('summary')")
    try:
        ended = run_command(words, tmp_path / "log", 1.0, grace_seconds=20.0)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.exit_status is None
    assert ended.seconds < 15.0
    assert (tmp_path / "log").read_text() == "summary\n"


def test_what_a_command_prints_is_read_whatever_the_terminal_can_print(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = play([part("greek", words=lambda _folder: [(*PYTHON, "print('5 µs')")])], tmp_path / "round")
    assert (result.parts[0].status, result.parts[0].reason) == ("done", "5 µs")


def test_what_a_command_says_is_no_markup(tmp_path):
    result = play(
        [part("id", words=lambda _folder: [(*PYTHON, "print('test_op[bf16] [/x]')")])], tmp_path / "r"
    )
    console = Console(file=io.StringIO(), width=160)
    console.print(round_table(result))
    assert "test_op[bf16] [/x]" in console.file.getvalue()


def test_unspent_time_goes_to_later_parts(tmp_path):
    given = {}

    def noting(name, budget):
        def commands(_folder, seconds):
            given[name] = seconds
            return [Command((*PYTHON, ""), f"{name}.log")]

        return Part(name, budget, (), commands)

    parts = [noting("first", 10.0), part("absent", 0, budget=50.0, reasons=("no",)), noting("second", 20.0)]
    play(parts, tmp_path / "round", seconds=100.0, reserve_seconds=5.0)
    assert 70.0 < given["first"] <= 75.0
    assert 80.0 < given["second"] <= 95.0


def test_no_time_left(tmp_path):
    result = play([part("late", 0)], tmp_path / "round", seconds=1.0, reserve_seconds=2.0)
    assert result.parts[0].status == "no time left"
    assert (tmp_path / "round.tar.gz").exists()


def test_shares_of_a_part(tmp_path):
    """A command that uses up its share is stopped, and the next one still has its own."""

    def commands(_folder, _seconds):
        return [
            Command((*PYTHON, "import time; time.sleep(60)"), "slow.log"),
            Command((*PYTHON, ""), "fast.log", 9.0),
        ]

    result = play([Part("two", 1.0, (), commands)], tmp_path / "round", seconds=10.0)
    assert result.parts[0].exit_statuses == (None, 0)
    assert result.parts[0].status == "stopped at its budget"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_part_and_keeps_what_is_there(tmp_path, number, code):
    """As the command line runs it: no process of the part is left behind."""
    pid = tmp_path / "pid"
    folder = tmp_path / "round"
    slow = part("slow", words=lambda _folder: [(*PYTHON, PARENT, str(pid))])

    def interrupt():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(typer.Exit) as caught:
            reported(play)([part("good", 0), slow, part("never", 0)], folder)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert caught.value.exit_code == code
    assert ends_within(int(pid.read_text()), 5.0)
    statuses = {each["part"]: each["status"] for each in json.loads((folder / FILE).read_text())["parts"]}
    assert statuses == {"good": "done", "slow": "interrupted"}
    assert (tmp_path / "round.tar.gz").exists()


def test_rejects_a_folder_with_content(tmp_path):
    (tmp_path / "old").write_text("kept")
    with pytest.raises(ValueError, match=r"--out must be a new or an empty folder; .* has content"):
        play([part("good", 0)], tmp_path)


def test_only_names_parts():
    parts = [part("tests", 0), part("core", 0), part("tune", 0)]
    assert [each.name for each in choose(parts, None)] == ["tests", "core", "tune"]
    assert [each.name for each in choose(parts, " tune, tests")] == ["tests", "tune"]
    for wrong in ("tests,speed", "", " , "):
        with pytest.raises(ValueError, match=r"separated by commas; got '.*'; parts: tests, core, tune"):
            choose(parts, wrong)


def test_last_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\n== 3 passed in 2 s ==\n\n")
    assert last_line(log) == "3 passed in 2 s"
    log.write_text("")
    assert last_line(log) == ""


def box(**changes):
    values = {"has_cuda": True, "tests": Path("tests"), "has_pytest": True, "has_sanitizer": True} | changes
    return real.Box(**values)


def reasons(**changes):
    return {each.name: each.reasons for each in real.parts_of(box(**changes))}


def test_the_real_parts_and_their_reasons():
    assert set(reasons().values()) == {()}
    assert reasons(has_cuda=False, has_sanitizer=False) == {
        "tests": ("no CUDA device",),
        "native": ("no CUDA device",),
        "core": (),
        "tune": ("no CUDA device",),
        "sanitizer": ("no CUDA device", "compute-sanitizer is not on PATH"),
    }
    assert reasons(tests=None)["tests"] == (
        "the tests are not here: run it in the repository, or pass --tests",
    )
    assert reasons(native=("libkronafuse_cuda.so is not built",))["native"] == (
        "libkronafuse_cuda.so is not built",
    )
    assert reasons(has_pytest=False)["sanitizer"] == ("pytest is not installed",)


def test_a_whole_round_fits_its_time():
    budgets = sum(each.budget for each in real.parts_of(box()))
    assert budgets + RESERVE_SECONDS <= real.ROUND_SECONDS <= 540


def test_core_reads_the_table_of_this_round(tmp_path):
    for chosen, has_cuda in (("core", True), ("quick", False)):
        commands = real.core_commands(tmp_path, 200.0, has_cuda=has_cuda)
        modes = [each.words[each.words.index("--mode") + 1] for each in commands]
        assert modes == ["forward_backward", "forward"]
        assert {each.words[4] for each in commands} == {"run"}
        assert all(chosen in each.words and each.environment == {} for each in commands)
        # One file, whose ceilings are measured once.
        assert all(each.words[-3:] == ("--out", str(tmp_path / "core.json"), "--add") for each in commands)
    (tmp_path / real.TUNED).write_text("{}")
    first = real.core_commands(tmp_path, 200.0, has_cuda=True)[0]
    assert first.environment == {"KRONAFUSE_TUNED": str(tmp_path / "tuned.json")}
    assert str(first).startswith("KRONAFUSE_TUNED=tuned.json python")
    assert str(tmp_path) not in str(first)


def test_turns_of_a_case_fit_the_budget(tmp_path):
    def told(seconds, word):
        return [
            float(each.words[each.words.index(word) + 1])
            for each in real.core_commands(tmp_path, seconds, has_cuda=True)
        ]

    for seconds in (100.0, 250.0):
        assert sum(told(seconds, "--budget")) <= seconds
    turns = told(250.0, "--seconds")
    assert turns[1] == pytest.approx(
        0.4 * (100.0 - real.MARGIN_SECONDS) / 20, abs=0.01
    )  # 20 cases in 2 of 5 shares
    assert set(told(10.0, "--seconds")) == {real.LEAST_TURNS}
    assert set(told(1e5, "--seconds")) == {real.MOST_TURNS}


def test_what_was_not_run_makes_a_part_incomplete(tmp_path):
    says = f"print({SKIPPED[0] + 'case a'!r}); print({SKIPPED[1] + 'choice b'!r}); print('Written')"
    quiet = part("quiet", 0)
    result = play([part("some", words=lambda _folder: [(*PYTHON, says)]), quiet], tmp_path / "round")
    assert [each.status for each in result.parts] == ["incomplete", "done"]
    assert result.parts[0].skipped == ("case a", "choice b")
    assert json.loads((tmp_path / "round" / FILE).read_text())["parts"][0]["skipped"] == [
        "case a",
        "choice b",
    ]


def test_a_lost_device_goes_on_in_a_new_process(tmp_path):
    def commands(_folder, _seconds):
        lost = "import sys; print(sys.argv[1:]); raise SystemExit(0 if sys.argv[1:] else 3)"
        return [
            Command((*PYTHON, lost), "again.log", again=("--missing",)),
            Command((*PYTHON, "raise SystemExit(3)"), "once.log"),
        ]

    folder = tmp_path / "round"
    result = play([Part("lost", 1.0, (), commands)], folder)
    assert result.parts[0].exit_statuses == (0, 3)
    assert (folder / "again.log").read_text().splitlines()[-2:] == ["[]", "['--missing']"]


def test_a_part_whose_probe_fails_cannot_run(tmp_path):
    def probed(name, script):
        words = (*PYTHON, script)
        return replace(part(name, 0), probe=Command(words, f"{name}_probe.log"))

    parts = [
        probed("bad", "print('Unable to attach'); raise SystemExit(1)"),
        probed("good", "print('fine')"),
    ]
    result = play(parts, tmp_path / "round")
    assert [each.status for each in result.parts] == ["cannot run", "done"]
    assert result.parts[0].reason == f"{sys.executable}: Unable to attach"
    assert not (tmp_path / "round" / "bad_0.log").exists()
    (sanitizer,) = [each for each in real.parts_of(box()) if each.probe is not None]
    assert sanitizer.name == "sanitizer"
    assert sanitizer.probe.words[0] == "compute-sanitizer"


def test_absent_libraries_are_named_before_a_round(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    assert real.Box.here(None).absent == ("peft",)


def test_warnings_and_unimportable_files_hide_no_result(tmp_path):
    """Under the settings of the repository, whose filter makes warnings errors."""
    (tmp_path / "test_other.py").write_text("import no_such_module\n")
    (tmp_path / "test_warns.py").write_text("import warnings\n\ndef test_it():\n    warnings.warn('new')\n")
    words = [*real.PYTEST, str(tmp_path), "-o", "filterwarnings=error"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "1 passed" in ran.stdout, ran.stdout
    assert "1 error" in ran.stdout


def test_tests_are_spread_where_they_can_be(tmp_path):
    alone, spread = (real.test_commands(tmp_path, tmp_path, workers)[0].words for workers in (1, 8))
    assert "-n" not in alone
    assert spread[spread.index("-n") + 1] == "8"
    assert real.Box.here(None).workers >= 1


@pytest.mark.parametrize("has_cuda", [True, False])
def test_the_commands_exist(tmp_path, has_cuda):
    """Every `kronafuse bench` command of a round takes the options that it is given."""
    from kronafuse.cli.app import app
    from typer.main import get_command

    commands = [
        *real.core_commands(tmp_path, 100.0, has_cuda=has_cuda),
        *real.tune_commands(tmp_path, 100.0),
    ]
    root = get_command(app)
    for command in commands:
        assert command.words[:4] == real.KRONAFUSE
        group = root.commands["bench"]
        group.commands[command.words[4]].make_context("bench", list(command.words[5:]))


def test_tests_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert real.find_tests(None) is None
    for name in real.TEST_FOLDERS:
        (tmp_path / "tests" / name).mkdir(parents=True)
    assert real.find_tests(None) == tmp_path / "tests"
    assert real.find_tests(tmp_path / "tests") == tmp_path / "tests"
    with pytest.raises(ValueError, match=r"--tests must be the folder of kronafuse's tests, which has .*ops"):
        real.find_tests(tmp_path)


def test_the_sanitizers_tests_exist():
    """Its selection finds whole operators in one dtype, and stays small."""
    root = Path(__file__).parents[2]
    paths = [str(root / "tests" / each) for each in real.SANITIZER_TESTS]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *paths]
    found = subprocess.run(
        [*words, "-k", real.SANITIZER_CASES], capture_output=True, text=True, check=False, cwd=root
    )
    assert found.returncode == 0, found.stdout + found.stderr
    names = [line for line in found.stdout.splitlines() if "::" in line]
    assert any("test_triton.py::test_op[" in each for each in names)
    assert any("test_bottleneck_triton.py::" in each for each in names)
    for name in ("test_kron_linear.py", "test_bottleneck.py"):
        assert any(name in each and each.endswith("-cuda]") for each in names)
    assert len(names) <= 100
    tools = [each.words[2] for each in real.sanitizer_commands(root / "tests")]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
