"""A sweep on a Ray cluster at an address: started by somebody else, used, and left running."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from kronafuse.study import cluster
from kronafuse.study.cluster import Resources
from kronafuse.train.interrupt import termination_raises
from processes import HERE, alive, command, descendants, finish, wait_for


@pytest.mark.slow
def test_a_cluster_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # what the cluster and its drivers share
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port", str(port),
            "--num-cpus", "1", "--include-dashboard", "false", "--disable-usage-stats",
            "--object-store-memory", str(100 * 2**20),
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    try:
        wait_for(lambda: _listens(port), "the cluster")
        with command(
            "sweep", "--family", "lora", "--rank", "1,2", "--seeds", "0", "--job", "sweep_jobs:quick",
            "--output", tmp_path, "--address", f"127.0.0.1:{port}",
        ) as process:  # fmt: skip
            code, printed = finish(process)
        assert code == 0, printed
        assert sorted(pd.read_csv(tmp_path / "results.csv")["rank"]) == [1, 2]
        assert not list(tmp_path.glob(".shared-*"))
        assert head.poll() is None
    finally:
        everything = descendants(head.pid) | {head.pid}
        for each in everything:
            if alive({each}):
                os.kill(each, signal.SIGKILL)
        head.wait()
        wait_for(lambda: not alive(everything), "the end of Ray's processes")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_commands_own_handler_of_sigterm_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts one that ends the process without closing what the sweep has open."""
    import ray

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "slots", lambda _: 1)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with termination_raises():
            ours = signal.getsignal(signal.SIGTERM)
            with cluster.connected(Resources(), tmp_path):
                assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
