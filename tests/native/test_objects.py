"""Every CUDA kernel in the library, on every architecture: registers, stack, spills and shared memory."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import objects
import pytest
from csrc.rules import building, sources
from csrc.rules.paths import CSRC
from kronafuse import native
from kronafuse.ops.costs import shared_limit

MOST_REGISTERS = 255
SMALLEST = 99 * 1024
"""Shared memory of a block on sm_86, 89 and 120, bytes."""
LARGEST = 227 * 1024
"""Of a block on sm_90 and 100."""


@pytest.fixture(scope="module")
def library() -> Path:
    return objects.built_library("cuda")


@pytest.fixture(scope="module")
def kernels(library) -> list[objects.Resources]:
    return objects.resources(library)


@pytest.fixture(scope="module")
def introspection(library) -> Any:
    try:
        module = importlib.import_module("kronafuse._C")
    except ImportError as error:
        pytest.skip(f"kronafuse._C was not built for this Python: {error}")
    record = building.record_folder(native.LIBRARIES) / building.TABLE
    older = Path(module.__file__ or "").stat().st_mtime < record.stat().st_mtime
    assert not older, "kronafuse._C is older than what was built last: make native"
    return module


def test_every_architecture_holds_every_kernel(kernels):
    """Plain kernels for each plain architecture, and those of `*_sm90a.cu` files for sm_90a alone."""
    archs = native.build_record()["cuda"]["archs"]
    names = {arch: {each.kernel for each in kernels if each.arch == arch} for arch in archs}
    plain = [names[arch] for arch in archs if arch.isdecimal()]
    assert plain[0], "no kernel is in the library"
    assert all(each == plain[0] for each in plain), "an architecture lacks kernels that another has"
    if "90a" in archs:
        assert names["90a"], "no kernel was built for sm_90a"
        assert not names["90a"] & plain[0]
    assert {each.arch for each in kernels} == set(archs)


def test_no_kernel_spills_or_has_a_stack(kernels):
    found = [each for each in kernels if each.stack_bytes or each.local_bytes]
    assert not found, "\n".join(map(str, found))


def test_registers_and_static_shared_memory(kernels):
    """Shared memory is dynamic, so that one place decides on it; what remains static is what nvcc reserves."""
    for each in kernels:
        assert 0 < each.registers <= MOST_REGISTERS, each
        assert each.shared_bytes <= 1024, each


def test_ptxas_agrees(kernels, introspection):
    """The record that `kronafuse doctor` shows is of this library, and names no spill."""
    recorded = {(each.kernel, each.arch): each for each in introspection.usages()}
    assert set(recorded) == {(each.kernel, each.arch) for each in kernels}
    for each in kernels:
        usage = recorded[each.kernel, each.arch]
        assert (usage.registers, usage.stack_bytes) == (each.registers, each.stack_bytes), each
        assert usage.spill_store_bytes == usage.spill_load_bytes == 0, each


def test_record_of_the_module(introspection):
    versions, entry = introspection.versions(), native.build_record()["cuda"]
    assert versions["nvcc"] == entry["nvcc"]
    assert versions["archs"].split() == entry["archs"]
    assert versions["instances"] == entry["instances"]
    assert versions["levels"].split() == native.build_record()["cpu"]["levels"]


def test_configurations_fit(introspection):
    """Every configuration fits some GPU, and every kernel but Hopper's own has one for the GPUs with least memory."""
    tables = introspection.configurations()
    for kernel, rows in tables.items():
        assert rows, kernel
        assert len({row.name for row in rows}) == len(rows), f"{kernel}: names repeat"
        for row in rows:
            assert row.shared_bytes <= LARGEST, f"{kernel} {row.name}"
            assert row.threads % 32 == 0, f"{kernel} {row.name}"
            assert 32 <= row.threads <= 1024, f"{kernel} {row.name}"
        if not kernel.endswith("_sm90a"):
            assert min(row.shared_bytes for row in rows) <= SMALLEST, kernel
    assert shared_limit(86) == SMALLEST
    assert shared_limit(90) == LARGEST


def test_every_table_of_configurations_is_shown(introspection):
    """A table in a header that csrc/python/configurations.h forgets would be unknown to `kronafuse doctor`."""
    shown = (CSRC / "python" / "configurations.h").read_text()
    declared = [
        table
        for header in sorted((CSRC / "cuda").rglob("*.h"))
        for table in re.findall(r"^(?:inline )?constexpr Configuration (\w+)\[\]", header.read_text(), re.M)
    ]
    assert len(declared) == len(introspection.configurations())
    assert not [table for table in declared if not re.search(rf"\b{table}\b", shown)]


def test_sm90a_files_are_where_their_name_says():
    """TMA and wgmma are reached from files named for their architecture alone."""
    for unit in sources.emulated_units():
        if unit.source.suffix == ".cu" and "common" not in unit.source.parts:
            uses = re.search(r'#include "[^"]*(?:wgmma|sm90a/)', unit.source.read_text()) is not None
            assert uses <= sources.is_specific(unit.source), unit.source.name
