"""Compiles what tuning will launch in other processes: the one that times finds it in Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager

import torch

from ..ops.launch import OPTIONS, Launch, recording
from .tune import MOST_CANDIDATES, call_of
from .tune_candidates import valid
from .tune_problems import Problem, launches_of, shortlist

MOST_WORKERS = 12
"""Processes at most; each holds torch and a CUDA context."""


def default_workers() -> int:
    """Half of the cores, within the limit."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // 2))


def compile_problem(problem: Problem, most: int = MOST_CANDIDATES) -> int:
    """Compiles the launches of the candidates that will be timed, for the current device; how many they are."""
    step = problem.subject.prepare("meta")
    found = 0
    for config in shortlist(valid(problem.choice), most):
        if problem.is_route:
            with recording(problem.choice.architecture) as launches:
                call_of(problem, step, config, {})()
        else:
            launches = launches_of(problem, step, config)
        for each in launches:
            compile_launch(each)
        found += len(launches)
    return found


def compile_launch(launch: Launch) -> None:
    """What launching it would compile, without launching."""
    launch.kernel.warmup(
        **launch.arguments,
        **launch.constants,
        grid=(launch.programs,),
        num_warps=launch.warps,
        num_stages=launch.stages,
        **OPTIONS,
    )


class Compilations:
    """Compilations under way, a future a problem."""

    def __init__(self, futures: dict[tuple[object, ...], Future[int]]) -> None:
        self._futures = futures
        self.errors: dict[str, str] = {}

    def wait(self, problem: Problem, seconds: float) -> None:
        """Until the problem's launches are compiled, at most so long.

        What is not begun is dropped, and what failed or takes longer is noted: timing compiles its launches itself.
        """
        future = self._futures[problem.place]
        if future.cancel():
            return
        try:
            future.result(timeout=seconds)
        except FutureTimeoutError:
            self.errors[str(problem)] = f"not done within the {seconds:.0f} s that were left"
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self.errors[str(problem)] = f"{type(error).__name__}: {first}"


@contextmanager
def compiling(problems: Sequence[Problem], device: int, workers: int) -> Iterator[Compilations]:
    """Compiles all problems, the first ones first; what is not begun when the block ends is dropped."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.cuda.set_device, initargs=(device,)
    )
    try:
        yield Compilations({each.place: pool.submit(compile_problem, each) for each in problems})
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
