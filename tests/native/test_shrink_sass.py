"""The machine code of the kernel behind shrink and mix: what keeps it at the rate of memory."""

from __future__ import annotations

import objects
import pytest
from kronafuse import native

KERNEL = "contraction_kernel"


@pytest.fixture(scope="module", params=["90"])
def kernels(request: pytest.FixtureRequest) -> dict[str, str]:
    entry = native.build_record().get("cuda", {})
    if not entry.get("built"):
        pytest.skip(entry.get("reason", "nothing was built: make native"))
    if request.param not in entry["archs"]:
        pytest.skip(f"the CUDA library was built for {', '.join(entry['archs'])}, not for {request.param}")
    found = objects.sass(native.LIBRARIES / native.CUDA, request.param, KERNEL)
    assert len(found) in (2, 10), "one instance of each layout, or three widths and two in two dtypes"
    return found


def test_x_is_copied_ahead_by_16_bytes(kernels: dict[str, str]) -> None:
    for name, code in kernels.items():
        used = objects.instructions(code)
        assert any("LDGSTS" in each and ".128" in each for each in used), name
        assert any("HMMA" in each for each in used), name


def test_results_are_stored_by_16_bytes(kernels: dict[str, str]) -> None:
    for name, code in kernels.items():
        assert any("STG" in each and ".128" in each for each in objects.instructions(code)), name


def test_products_wait_for_no_global_load(kernels: dict[str, str]) -> None:
    """The loop over the steps of one tile of x reads shared memory alone."""
    for name, code in kernels.items():
        loops = [loop for loop in objects.loops(code) if any("HMMA" in each for each in loop)]
        assert loops, name
        assert not any("LDG." in each or "LDL" in each for each in loops[0]), name
