"""Ray: a session of this machine or a cluster, and the check that its nodes share the output folder."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USAGE_STATS = "RAY_USAGE_STATS_ENABLED"
STORE_BYTES = 100 * 2**20
"""Ray's object store: runs hand over configurations and nothing else."""

CONNECT_SECONDS = 10
"""How long a cluster's address may take to answer."""


@dataclass(frozen=True)
class Resources:
    """What runs on what.

    address: a Ray cluster; None starts Ray on this machine
    cpus:    processors of this machine that runs may take; None for all that the process may use
    per_run: processors and threads of one run
    gpus:    GPUs of one run, a fraction included
    """

    address: str | None = None
    cpus: int | None = None
    per_run: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cpus", "per_run"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"sweep: {name} must be at least 1; got {value}")
        if not self.gpus >= 0:
            raise ValueError(f"sweep: gpus must be at least 0; got {self.gpus}")
        if self.address is not None and self.cpus is not None:
            raise ValueError(
                "sweep: cpus counts this machine's processors; a cluster at an address has its own"
            )


@contextmanager
def connected(resources: Resources, folder: Path) -> Iterator[int]:
    """A Ray session for the block; yields how many runs it takes at once.

    A session that this process has already is used and stays. Raises ConnectionError where no cluster answers
    at the address, OSError where a node of it does not see `folder`, ValueError where no node can hold a run.
    """
    os.environ.setdefault(USAGE_STATS, "0")
    import ray

    ours = not ray.is_initialized()
    on_termination = signal.getsignal(signal.SIGTERM)
    if ours and resources.address is None:
        ray.init(
            address="local",
            num_cpus=resources.cpus or usable_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=STORE_BYTES,
        )
    elif ours:
        check_answers(str(resources.address))
        ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if ours and callable(on_termination):
            signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own, which ends the process
        if resources.address is not None:
            check_shared(folder)
        yield slots(resources)
    finally:
        if ours:
            ray.shutdown()


def usable_cpus() -> int:
    """Processors that this process may use, or the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_answers(address: str) -> None:
    """ConnectionError where nobody listens at HOST:PORT, for which Ray itself would wait for many minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # "auto" and the like: Ray looks for them and says at once what it found
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"sweep: no Ray cluster answers at {address}: {error}") from error


def slots(resources: Resources) -> int:
    """How many runs the session takes at once; ValueError where none fits on any node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = [
        min(
            int(node.get("CPU", 0) // resources.per_run),
            int(node.get("GPU", 0) / resources.gpus) if resources.gpus else 10**9,
        )
        for node in nodes
    ]
    if not sum(fitting):
        largest = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"sweep: a run needs {resources.per_run} CPUs and {resources.gpus:g} GPUs on one node;"
            f" the nodes have: {largest}"
        )
    return sum(fitting)


def check_shared(folder: Path) -> None:
    """OSError that names the nodes of the session which do not read a file that was just written to `folder`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = secrets.token_hex(16)
    path = folder / f".shared-{token}"
    path.write_text(token, encoding="ascii")
    try:
        task = ray.remote(read_token)
        answers = {
            node["NodeManagerAddress"]: task.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(path.resolve())
            for node in ray.nodes()
            if node["Alive"]
        }
        blind = [address for address, answer in answers.items() if ray.get(answer) != token]
    finally:
        path.unlink(missing_ok=True)
    if blind:
        raise OSError(
            f"sweep: the output folder {folder} must be on storage that every node of the cluster shares;"
            f" a file written here cannot be read on {', '.join(blind)}"
        )


def read_token(path: Path) -> str | None:
    """What the file holds, None where it is not there; runs on a node of the cluster."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return None
