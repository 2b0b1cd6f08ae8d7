"""Several processes, and a Ctrl-C from outside: the command as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kronafuse.train.checkpoint import checkpoints

ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def arguments(base: Path, data: Path, output: Path, *more: object) -> list[str]:
    each = [
        "train",
        "--base",
        base,
        "--data",
        data,
        "--output",
        output,
        "--factors",
        "4x2",
        "--batch-size",
        2,
    ]
    return ["kronafuse", *(str(part) for part in (*each, *more))]


def launch(processes: int, command: list[str]) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    done = subprocess.run(
        [*torchrun, "-m", *command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_resume_exactly(class_base: Path, class_folder: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    launch(2, arguments(class_base, class_folder, whole, "--steps", 4))
    launch(2, arguments(class_base, class_folder, part, "--steps", 2))
    launch(2, arguments(class_base, class_folder, part, "--steps", 4, "--resume", "latest"))
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (whole, part)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_from_outside(
    class_base: Path, class_folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """It reaches the whole group, as a terminal's or a scheduler's does: also the process that reads images."""
    output = tmp_path / "out"
    command = arguments(
        class_base, class_folder, output, "--steps", 100_000, "--checkpoint-every", 5, "--workers", 1
    )
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        while not checkpoints(output):
            assert process.poll() is None, process.stderr.read()
            process.stderr.read(1)
        os.killpg(process.pid, number)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    step = max(checkpoints(output))
    assert f"kronafuse: stopped after step {step}; go on with --resume latest" in printed
    assert all(not each.name.startswith(".") for each in output.iterdir())
