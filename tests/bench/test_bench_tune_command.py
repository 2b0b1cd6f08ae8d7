"""Compiling ahead of tuning, and the words of `kronafuse bench tune`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import typer
from kronafuse import env
from kronafuse.bench import tune as tuning_run
from kronafuse.bench.tune_compile import Compilations
from kronafuse.bench.tune_problems import problems
from kronafuse.cli.bench.tune import tune as command
from kronafuse.cli.exits import reported
from kronafuse.ops import launch
from kronafuse.ops.costs import PEAKS
from kronafuse.ops.launch import Architecture
from test_bench_tune import FAT, H200, THIN
from typer.testing import CliRunner

pytest.importorskip("triton")

app = typer.Typer()
app.command()(reported(command))

COMPILES = """
import os
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Sm90:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Sm90())
from kronafuse.bench.tune_candidates import valid
from kronafuse.bench.tune_compile import compile_launch, compile_problem
from kronafuse.bench.tune_problems import Subject, launches_of, problems, shortlist
from kronafuse.ops.launch import Architecture
from kronafuse.testing.cases import CASES

(problem,) = problems([Subject(CASES["sd15_1280-lora_r16"], torch.bfloat16)], Architecture(90, 132), ["shrink"])
print(compile_problem(problem, 2))
entries = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
step = problem.subject.prepare("cpu")
for config in shortlist(valid(problem.choice), 2):
    for launch in launches_of(problem, step, config):
        compile_launch(launch)
print(len(entries), len(set(os.listdir(os.environ["TRITON_CACHE_DIR"])) - entries))
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path):
    """Compiled on meta tensors, then asked for on tensors in memory: Triton's cache on disk gets nothing new."""
    environment = {name: value for name, value in os.environ.items() if name != env.TRITON_INTERPRET}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches, entries, new = (int(word) for word in done.stdout.split())
    assert launches >= 2
    assert entries >= 3  # two shrink kernels and their sum
    assert new == 0


def test_problems_travel_to_other_processes():
    for problem in problems([THIN, FAT], H200):
        assert pickle.loads(pickle.dumps(problem)) == problem


def test_failures_of_compiling_ahead_are_kept():
    """They are told at the end; the launches are compiled when they are timed."""
    chosen = problems([THIN], H200, ["shrink", "reduce"])
    futures: dict[Any, Future[int]] = {problem.place: Future() for problem in chosen}
    for problem in chosen:
        if problem.choice.kernel == "shrink":
            futures[problem.place].set_exception(RuntimeError("ptxas failed\nand more"))
        else:
            futures[problem.place].set_result(1)
    compilations = Compilations(futures)
    for problem in chosen:
        compilations.wait(problem, 10.0)
    shrinks = {str(problem) for problem in chosen if problem.choice.kernel == "shrink"}
    assert compilations.errors == dict.fromkeys(shrinks, "RuntimeError: ptxas failed")


def test_what_is_not_begun_or_takes_too_long_is_not_waited_for():
    first, second, *_ = problems([THIN], H200, ["shrink", "reduce"])
    running: Future[int] = Future()
    running.set_running_or_notify_cancel()
    waiting: Future[int] = Future()
    compilations = Compilations({first.place: running, second.place: waiting})
    compilations.wait(first, 0.01)
    compilations.wait(second, 60.0)
    assert waiting.cancelled()
    assert compilations.errors == {str(first): "not done within the 0 s that were left"}


def test_command_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["--cases", "quick", "--out", str(tmp_path / "tuned.json")])
    assert result.exit_code == 2
    assert "bench tune: needs a CUDA device, and torch sees none; --dry-run lists" in result.stderr
    assert not list(tmp_path.iterdir())


def test_refuses_an_interpreter_and_a_gpu_without_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(env, "triton_interprets", lambda: True)
    with pytest.raises(
        NotImplementedError, match="TRITON_INTERPRET is set, and an interpreter's times say nothing"
    ):
        tuning_run.cuda_architecture()
    monkeypatch.setattr(env, "triton_interprets", lambda: False)
    monkeypatch.setattr(launch, "architecture_of", lambda device: Architecture(86, 100))
    with pytest.raises(
        NotImplementedError, match="needs an NVIDIA GPU; rows of the table are found by their names"
    ):
        tuning_run.cuda_architecture()


def test_dry_run_lists_candidates():
    options = ["--cases", "sd15_1280-krona_64x4", "--kernels", "shrink", "--dry-run", "--architecture", "80"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.stderr
    assert f"sm_80 as {PEAKS[80].gpu}: predicted" in result.stdout
    assert "shrink dtype=bfloat16 rows=4096 width=20 features=320" in " ".join(result.stdout.split())
    assert "block_m=64" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernels", "gemm"], "--kernels must be of linear, one_pass, "),
        (["--cases", "sdxl-nothing"], "no case of kron_linear matches --case sdxl-nothing"),
        (["--dtype", "int8"], "--dtype must be one of "),
        (
            ["--batch", "0"],
            "--batch and --workers must be at least 1 and --seconds above 0; got 0, None, 300",
        ),
        (["--dry-run", "--architecture", "70", "--cases", "quick"], "--architecture must be one of 80, 86, "),
    ],
)
def test_rejects_options(options, message):
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert message in result.stderr
