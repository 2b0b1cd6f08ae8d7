"""The machine code of the fat kernel on Hopper: A X is summed while the products with W run."""

from __future__ import annotations

import objects
import pytest
from kronafuse import native

KERNEL = "fat_hopper_kernel"


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    """Kernel -> its machine code in the built library; skips where it has none for sm_90a."""
    entry = native.build_record().get("cuda", {})
    if not entry.get("built"):
        pytest.skip(entry.get("reason", "nothing was built: make native"))
    if "90a" not in entry["archs"]:
        pytest.skip(f"the CUDA library was built for {', '.join(entry['archs'])}, not for 90a")
    found = objects.sass(native.LIBRARIES / native.CUDA, "90a", KERNEL)
    assert found, f"no {KERNEL} in the library"
    return found


def loop_with(code: str, *mnemonics: str) -> list[str]:
    """The smallest loop with all of these instructions."""
    for loop in objects.loops(code):
        if all(places(loop, each) for each in mnemonics):
            return loop
    pytest.fail(f"no loop with {', '.join(mnemonics)}")


def places(instructions: list[str], mnemonic: str) -> list[int]:
    return [index for index, each in enumerate(instructions) if mnemonic in each]


def assert_mixes_beside_products(code: str) -> None:
    """Products of a stage are begun, then x is mixed and the next x loaded, then the products are waited for, once."""
    loop = loop_with(code, "HGMMA", "FFMA", "LDSM")
    products, sums, loads = places(loop, "HGMMA"), places(loop, "FFMA"), places(loop, "LDSM")
    waits = places(loop, "WARPGROUP.DEPBAR")
    assert len(products) == 1 + 2 + 3 + 4, "a stage of 1, 2, 3 or 4 steps of 16"
    assert len(sums) >= 32, "64 rows by 64 columns over 128 threads"
    assert len(loads) == 4, "x comes from shared memory once"
    assert len(waits) == 1
    assert max(products) < min(sums) < max(sums) < waits[0]
    assert max(loads) < waits[0]


def test_hopper_mixes_while_its_products_run(kernels):
    for code in kernels.values():
        assert_mixes_beside_products(code)
        assert places(objects.instructions(code), "UTMALDG.3D")


def test_a_serial_loop_is_seen():
    """Negative control: a wait between the products and the sums."""
    stage = (
        ["HGMMA.64x160x16 R24, R104"] * 10 + ["WARPGROUP.DEPBAR.LE gsb0, 0x0"] + ["FFMA R1, R2, R3, R1"] * 32
    )
    lines = [*stage, *["LDSM.16.M88.4 R4, [R5]"] * 4, "@!P0 BRA 0x0"]
    code = "\n".join(f"/*{16 * index:04x}*/  {text} ;" for index, text in enumerate(lines))
    with pytest.raises(AssertionError):
        assert_mixes_beside_products(code)
