"""The parts of a round on a GPU box: what each runs, and what rules it out on this machine.

Correctness comes first, since figures of a wrong kernel say nothing. Tuning comes before the core cases, which
read the table it wrote; each log begins with the command and the variables it was given. The time of the parts
to come is kept for them, so the order decides what is known first, not what is dropped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...native import cuda_reasons
from ..records import Mode
from ..selection import SETS
from .run import Command, Part

ROUND_SECONDS = 540.0
"""The longest round: 9 minutes."""

BUDGETS = {"tests": 95.0, "native": 45.0, "tune": 75.0, "core": 195.0, "sanitizer": 100.0}
"""Seconds of each part in a whole round, in the order in which they run."""

TEST_FOLDERS = ("ops", "models", "bench")
"""Under the tests' folder: the operators, adapters on small models, and the timers."""

NATIVE_TESTS = "native/test_cuda_*.py"
"""The tests of the CUDA library's own operators."""

LIBRARIES = ("peft", "lycoris", "diffusers", "transformers")
"""Of baselines and models, by import name: without one, arms and tests are left out."""

SANITIZER_TESTS = (
    "ops/test_triton.py", "ops/test_bottleneck_triton.py", "ops/test_kron_linear.py", "ops/test_bottleneck.py",
)  # fmt: skip
SANITIZER_CASES = (
    "test_op and float16 and chosen or test_every_element_is_written and float16 "
    "or test_odd_cases and bfloat16-cuda"
)
"""Each operator's whole forward and backward on the small cases: Triton's kernels in one dtype, those in CUDA C++ in
the other, where the library is there."""

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

SANITIZER_PROBE = Command(
    ("compute-sanitizer", sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).item()"),
    "sanitizer_probe.log",
)
"""A program without an error: where it fails, the sanitizer does not run on this machine."""

TUNED, TUNED_VARIABLE = "tuned.json", "KRONAFUSE_TUNED"
"""The table that tuning writes, and the variable under which the kernels read it."""

CORE_MODES: dict[Mode, float] = {"forward_backward": 3.0, "forward": 2.0}
"""Mode -> its share of the core part's time, in the order in which they run over all suites."""

CORE = "core.json"
"""The results of all suites; the ceilings in it are measured once."""

TURNS_SHARE = 0.4
"""Of a case's time, what turns take; checks, compilation and capture take the rest."""

LEAST_TURNS, MOST_TURNS = 0.3, 2.0
"""Limits of a case's turns in seconds."""

MARGIN_SECONDS = 15.0
"""Between the time that a command is told and the time after which it is stopped."""

KRONAFUSE = (sys.executable, "-m", "kronafuse", "bench")
PYTEST = (
    sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default",
    "--continue-on-collection-errors",
)  # fmt: skip
"""Without a cache, so that the tests may lie in a folder that cannot be written to. A file that cannot be imported
and a warning that this version of torch alone gives hide no other result."""


@dataclass(frozen=True)
class Box:
    """What the parts depend on of the machine.

    tests:   the folder of the tests, or None where there is none
    workers: processes that the tests are spread over; 1 without pytest-xdist
    absent:  libraries that are not installed
    native:  reasons why the CUDA library cannot run
    """

    has_cuda: bool
    tests: Path | None
    has_pytest: bool
    has_sanitizer: bool
    workers: int = 1
    absent: tuple[str, ...] = ()
    native: tuple[str, ...] = ()

    @classmethod
    def here(cls, tests: Path | None) -> Box:
        """This machine; tests are looked for in the current folder where `tests` is None."""
        return cls(
            has_cuda=torch.cuda.is_available(),
            tests=find_tests(tests),
            has_pytest=importlib.util.find_spec("pytest") is not None,
            has_sanitizer=shutil.which("compute-sanitizer") is not None,
            workers=_workers(),
            absent=tuple(each for each in LIBRARIES if importlib.util.find_spec(each) is None),
            native=tuple(cuda_reasons(torch.device("cuda"))) if torch.cuda.is_available() else (),
        )


def find_tests(folder: Path | None) -> Path | None:
    """The folder of the tests: the named one, or that of the current folder. ValueError where a named one is none."""
    found = Path("tests") if folder is None else folder
    if all((found / each).is_dir() for each in TEST_FOLDERS):
        return found.resolve()
    if folder is not None:
        needed = ", ".join(f"{folder / each}" for each in TEST_FOLDERS)
        raise ValueError(f"bench all: --tests must be the folder of kronafuse's tests, which has {needed}")
    return None


def parts_of(box: Box) -> list[Part]:
    """The parts of a round on this machine, in order."""
    reasons = {
        "tests": (*_no_cuda(box), *_no_tests(box)),
        "native": (*_no_cuda(box), *box.native, *_no_tests(box)),
        "core": (),
        "tune": _no_cuda(box),
        "sanitizer": (
            *_no_cuda(box),
            *(() if box.has_sanitizer else ("compute-sanitizer is not on PATH",)),
            *_no_tests(box),
        ),
    }
    commands: dict[str, Callable[[Path, float], Sequence[Command]]] = {
        "tests": lambda folder, _seconds: test_commands(_tests_of(box), folder, box.workers),
        "native": lambda folder, _seconds: native_commands(_tests_of(box), folder, box.workers),
        "core": lambda folder, seconds: core_commands(folder, seconds, has_cuda=box.has_cuda),
        "tune": tune_commands,
        "sanitizer": lambda _folder, _seconds: sanitizer_commands(_tests_of(box)),
    }
    probes = {"sanitizer": SANITIZER_PROBE}
    return [
        Part(name, budget, reasons[name], commands[name], probes.get(name))
        for name, budget in BUDGETS.items()
    ]


def test_commands(tests: Path, folder: Path, workers: int) -> list[Command]:
    """The tests that need a GPU, then the operators' other tests, which run on CUDA where there is one."""
    words = (*PYTEST, *(("-n", str(workers)) if workers > 1 else ()))
    paths = [str(tests / each) for each in TEST_FOLDERS]
    operators = [str(tests / "ops"), "--ignore", str(tests / "ops" / "test_aot.py")]
    return [
        Command((*words, *paths, "-m", "gpu", "--junitxml", str(folder / "tests_gpu.xml")), "tests_gpu.log"),
        Command(
            (*words, *operators, "-m", "not gpu and not slow", "--junitxml", str(folder / "tests_ops.xml")),
            "tests_ops.log",
        ),
    ]


def native_commands(tests: Path, folder: Path, workers: int) -> list[Command]:
    """The tests of the CUDA library's operators, on the GPU."""
    words = (*PYTEST, *(("-n", str(workers)) if workers > 1 else ()))
    paths = map(str, sorted(tests.glob(NATIVE_TESTS)))
    return [Command((*words, *paths, "--junitxml", str(folder / "tests_native.xml")), "tests_native.log")]


def tune_commands(folder: Path, seconds: float) -> list[Command]:
    """The core cases' configurations."""
    words = (*KRONAFUSE, "tune", "--seconds", _told(seconds), "--out", str(folder / TUNED))
    return [Command(words, "tune.log")]


def core_commands(folder: Path, seconds: float, *, has_cuda: bool) -> list[Command]:
    """Every suite's core cases with all baselines; on a CPU the quick ones. Reads this round's tuned table.

    Training steps of all suites come first, and a case's turns are as long as the time allows for all cases.
    """
    table = folder / TUNED
    environment = {TUNED_VARIABLE: str(table)} if table.exists() else {}
    chosen = "core" if has_cuda else "quick"
    cases = sum(len(names) for names in SETS[chosen].values())
    found = []
    for mode, share in CORE_MODES.items():
        budget = float(_told(seconds * share / sum(CORE_MODES.values())))
        turns = min(max(TURNS_SHARE * budget / cases, LEAST_TURNS), MOST_TURNS)
        words = (
            *KRONAFUSE, "run", "--set", chosen, "--mode", mode, "--budget", f"{budget:.0f}",
            "--seconds", f"{turns:.2f}", "--out", str(folder / CORE), "--add",
        )  # fmt: skip
        found.append(Command(words, f"core_{mode}.log", share, environment, ("--missing",)))
    return found


def _told(seconds: float) -> str:
    """The time that a command is told it has."""
    return f"{max(seconds - MARGIN_SECONDS, seconds / 2):.0f}"


def sanitizer_commands(tests: Path) -> list[Command]:
    """compute-sanitizer's tools over the operators' small cases."""
    paths = [str(tests / each) for each in SANITIZER_TESTS]
    return [
        Command(
            (
                "compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                *PYTEST, *paths, "-k", SANITIZER_CASES,
            ),
            f"sanitizer_{tool}.log",
            # Without torch's cache every tensor is an allocation of its own, so reads past its end are seen.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in SANITIZER_TOOLS
    ]  # fmt: skip


def _tests_of(box: Box) -> Path:
    assert box.tests is not None  # the part has a reason against it otherwise
    return box.tests


def _workers() -> int:
    """Half of the cores, at most 8: every process compiles kernels, and all share the GPU."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def _no_cuda(box: Box) -> tuple[str, ...]:
    return () if box.has_cuda else ("no CUDA device",)


def _no_tests(box: Box) -> tuple[str, ...]:
    if not box.has_pytest:
        return ("pytest is not installed",)
    if box.tests is None:
        return ("the tests are not here: run it in the repository, or pass --tests",)
    return ()
