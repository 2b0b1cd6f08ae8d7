"""The machine code of the Hopper GEMM: TMA and wgmma, and one K loop for [x | W] and [T | L]."""

from __future__ import annotations

import subprocess
from pathlib import Path

import objects
import pytest
from csrc.rules import libraries, toolchain
from csrc.rules.paths import CSRC
from kronafuse import native

KERNEL = "cuda19linear_sm90a_kernel"
"""Mangled, so that the fat kernel's name, which ends alike, is another."""
CONTROL = Path(__file__).with_name("two_loops_kernel.cu")
WAIT = "SYNCS.PHASECHK"
"""A wait at an mbarrier."""
STEPS = 4
"""Products of 16 in a stage of 64."""


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    entry = native.build_record().get("cuda", {})
    if not entry.get("built"):
        pytest.skip(entry.get("reason", "nothing was built: make native"))
    if "90a" not in entry["archs"]:
        pytest.skip(f"the CUDA library was built for {', '.join(entry['archs'])}, not for 90a")
    found = objects.sass(native.LIBRARIES / native.CUDA, "90a", KERNEL)
    assert found, f"no {KERNEL} in the library"
    assert len(found) in (1, 24), "one instance, or six tiles in two orientations and dtypes"
    return found


@pytest.fixture(scope="module")
def two_loops(tmp_path_factory) -> str:
    """A kernel that multiplies [x | W] in one loop and [T | L] in another."""
    try:
        nvcc, cxx = toolchain.nvcc(), toolchain.cxx()
    except toolchain.Missing as error:
        pytest.skip(str(error))
    target = tmp_path_factory.mktemp("control") / "two_loops.cubin"
    command = [
        nvcc.path, *libraries.nvcc_options(cxx), "-gencode=arch=compute_90a,code=sm_90a", f"-I{CSRC}",
        "-cubin", str(CONTROL), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (code,) = objects.sass(target, "90a", "two_loops_kernel").values()
    return code


def _count(instructions: list[str], mnemonic: str) -> int:
    return sum(mnemonic in each for each in instructions)


def _loop(code: str, *mnemonics: str) -> list[str]:
    """The smallest loop with all of these instructions."""
    for loop in objects.loops(code):
        if all(_count(loop, each) for each in mnemonics):
            return loop
    pytest.fail(f"no loop with {', '.join(mnemonics)}")


def _assert_one_product_loop(code: str) -> None:
    """Every wgmma is in one loop that waits for stages: those of a whole stage, and that of one cut short."""
    every, loop = objects.instructions(code), _loop(code, "HGMMA", WAIT)
    total = _count(every, "HGMMA")
    assert total == _count(loop, "HGMMA"), f"{total - _count(loop, 'HGMMA')} HGMMA outside the K loop"
    assert total in (STEPS + 1, 2 * (STEPS + 1)), f"{total} HGMMA for one or two blocks of 64 rows"


def _assert_one_fetching_loop(code: str) -> None:
    """x and T come by one and the same instruction, W and L by the ones beside it."""
    every, loop = objects.instructions(code), _loop(code, "UTMALDG.3D", WAIT)
    assert _count(every, "UTMALDG.3D") == 1, "x and T are fetched in different places"
    assert _count(loop, "UTMALDG.2D.MULTICAST") == _count(every, "UTMALDG.2D.MULTICAST") > 0
    assert _count(loop, "UTMALDG.2D ") > 0


def test_tma_and_wgmma(kernels):
    for name, code in kernels.items():
        every = objects.instructions(code)
        for mnemonic in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"):
            assert _count(every, mnemonic), f"{name} has no {mnemonic}"
        assert not _count(every, "STL"), f"{name} spills"


def test_both_operand_pairs_in_one_loop(kernels):
    for code in kernels.values():
        _assert_one_product_loop(code)
        _assert_one_fetching_loop(code)


def test_products_run_on_across_stages(kernels):
    """The loop waits for the stage before, never for all products, and fences no memory of the whole GPU."""
    for name, code in kernels.items():
        loop = _loop(code, "HGMMA", WAIT)
        waits = [each for each in loop if "WARPGROUP.DEPBAR" in each]
        assert waits, f"{name} never waits"
        assert all(each.endswith("0x1") for each in waits), f"{name}: {waits}"
        assert not _count(loop, "MEMBAR.ALL.GPU"), f"{name} fences in its K loop"
        groups = [each for each in loop if "HGMMA" in each and "gsb0" in each]
        assert len(groups) == 2, f"{name}: ptxas serialises the products: {groups}"


def test_two_loops_would_be_seen(two_loops):
    with pytest.raises(AssertionError, match="5 HGMMA outside the K loop"):
        _assert_one_product_loop(two_loops)
    with pytest.raises(AssertionError, match="different places"):
        _assert_one_fetching_loop(two_loops)
