"""python -m csrc.rules: builds in place, for work on the kernels.

cpu                      kronafuse/lib/libkronafuse_cpu.so
cuda                     kronafuse/lib/libkronafuse_cuda.so, as the environment variables say
emulated                 .cache/emulated/libkronafuse_emulated.so
kernel FILE [ARCHS]      compiles one .cu file for ARCHS (as "80,90,120") and prints what its kernels take
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from . import building, libraries, ptxas, record, sources, toolchain
from .ninja_file import BuildError
from .paths import EMULATED, LIBRARIES
from .switches import SwitchError, Switches


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m csrc.rules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cpu", "cuda", "emulated", "kernel"))
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--only", default="", help="emulated: a pattern that paths under csrc must contain")
    parser.add_argument("--folder", type=Path, help="where the library goes, beside its usual place")
    options = parser.parse_args()
    try:
        switches = Switches.read()
        if options.what == "kernel":
            return kernel(*options.arguments)
        if options.only and not options.folder:
            parser.error("--only makes a library of a few kernels: give a --folder of its own")
        if options.what == "emulated":
            library = libraries.emulated(options.folder or EMULATED, options.only)
            library.build(switches.jobs, options.verbose)
            print(library.file)
        else:
            folder = options.folder or LIBRARIES
            library = building.build_one(options.what, switches, folder, options.verbose)
            entries = record.write({options.what: record.built(library, switches)}, folder)
            if options.what == "cuda":
                kernels = record.kernel_usages(library)
                record.write_table(building.record_folder(folder) / building.TABLE, entries, kernels)
            print(folder / library.file.name)
    except (BuildError, SwitchError, toolchain.Missing) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def kernel(file: str, archs: str = "80,90,120") -> int:
    """Compiles one file alone and prints registers, stack, spills and shared memory of its kernels."""
    source, cxx, nvcc = Path(file).resolve(), toolchain.cxx(), toolchain.nvcc()
    chosen = tuple(archs.replace(";", ",").split(","))
    targets = [each for each in libraries.generate(chosen, sources.is_specific(source)) if "code=sm_" in each]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc.path, *libraries.nvcc_options(cxx), *targets, "--threads", "2", f"-I{libraries.CSRC}"]
        done = subprocess.run(
            [*command, "-c", str(source), "-o", f"{folder}/kernel.o"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return 1
    print(f"{'arch':>5} {'regs':>5} {'stack':>6} {'spill st':>8} {'spill ld':>8} {'smem':>6}  kernel")
    for each in ptxas.usages(done.stdout):
        print(
            f"{each.arch:>5} {each.registers:>5} {each.stack_bytes:>6} {each.spill_store_bytes:>8} "
            f"{each.spill_load_bytes:>8} {each.shared_bytes:>6}  {each.kernel}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
