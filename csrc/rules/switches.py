"""The environment variables of a build, read once and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

BUILD_CPU = "KRONAFUSE_BUILD_CPU"
BUILD_CUDA = "KRONAFUSE_BUILD_CUDA"
CUDA_ARCHS = "KRONAFUSE_CUDA_ARCHS"
CUDA_INSTANCES = "KRONAFUSE_CUDA_INSTANCES"
MAX_JOBS = "MAX_JOBS"

DEFAULT_ARCHS = ("80", "86", "89", "90", "90a", "100", "120")
"""Compute capabilities that are built unless CUDA_ARCHS says otherwise, as far as nvcc knows them."""


class SwitchError(ValueError):
    """An environment variable of the build has a value that means nothing."""


@dataclass(frozen=True)
class Switches:
    """What was asked for.

    cpu, cuda: "auto" (where a compiler is found), "1" (an error without one) or "0"
    archs:     compute capabilities as ("80", "90a"), None for the defaults
    one:       one instantiation per kernel template instead of all
    jobs:      compilers at a time
    """

    cpu: str = "auto"
    cuda: str = "auto"
    archs: tuple[str, ...] | None = None
    one: bool = False
    jobs: int = 1

    @staticmethod
    def read(environment: Mapping[str, str] = os.environ) -> Switches:
        """From environment variables; raises SwitchError with the name and the value."""

        def choice(name: str, allowed: tuple[str, ...]) -> str:
            value = environment.get(name, allowed[0])
            if value not in allowed:
                raise SwitchError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
            return value

        return Switches(
            cpu=choice(BUILD_CPU, ("auto", "1", "0")),
            cuda=choice(BUILD_CUDA, ("auto", "1", "0")),
            archs=_archs(environment.get(CUDA_ARCHS)),
            one=choice(CUDA_INSTANCES, ("all", "one")) == "one",
            jobs=_jobs(environment.get(MAX_JOBS)),
        )


def _archs(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    archs = tuple(re.split(r"[;,\s]+", text.strip()))
    for arch in archs:
        if not re.fullmatch(r"[89]\d|1\d\d|90a", arch):
            raise SwitchError(
                f"{CUDA_ARCHS} must be compute capabilities from 80 on without a dot, as '80;90a', "
                f"of which 90a alone has a letter; got {text!r}"
            )
    return tuple(dict.fromkeys(archs))


def _jobs(text: str | None) -> int:
    if text is None:
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) == 0:
        raise SwitchError(f"{MAX_JOBS} must be a positive integer; got {text!r}")
    return int(text)
