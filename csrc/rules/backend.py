"""setuptools' build backend, which asks for torch and ninja only where something will be compiled."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from . import toolchain
from .switches import Switches

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

REQUIREMENTS = ["torch>=2.11", "ninja"]
"""What the libraries are built with: any torch from 2.11 on gives the same ones."""


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_requirements()]


def native_requirements() -> list[str]:
    """Nothing where the switches or the lack of a compiler rule both libraries out."""
    switches = Switches.read()
    if (switches.cpu, switches.cuda) == ("0", "0"):
        return []
    try:
        toolchain.cxx()
    except toolchain.Missing:
        return []
    return REQUIREMENTS
