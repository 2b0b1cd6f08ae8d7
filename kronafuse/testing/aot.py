"""Compiles the Triton kernels ahead of time for every supported architecture, without a GPU, and reads what they use.

    python -m kronafuse.testing.aot [--record | --all] [--architectures 80 90] [--kernels linear] [--output DIR]

What is compiled is what the launchers launch: they run on meta tensors and are recorded. TRITON_INTERPRET must be
unset: under it there is no compiler. Beside what a kernel uses stands the time that `ops/costs.py` predicts for it,
which is no measurement.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..env import triton_interprets
from ..formats.atomic import written_beside
from ..ops.costs import shared_limit
from ..ops.launch import OPTIONS, Architecture, Launch, recording
from .aot_problems import ARCHITECTURES, DTYPES, Extent, problems
from .launch_costs import launch_us

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"(?<!g)\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
    "cp_async": r"cp\.async\.c[ag]",
    "atomic": r"\b(?:atom|red)\.",
}
"""Name -> pattern of the PTX instructions that are counted."""


TOLERATED_SPILL = 64
"""Bytes a thread that ptxas may set aside before a loop and fetch after it, to keep to 64, 96 or 128 registers;
where registers run out, hundreds of bytes spill."""


@dataclass(frozen=True)
class Record:
    """One compiled kernel: registers and spilled bytes a thread, shared memory a program, instructions by name.

    stack:        bytes a thread that the compiled code sets aside, spilled ones among them
    predicted_us: of its launch in this problem, by the cost model
    """

    kernel: str
    problem: str
    dtype: str
    architecture: int
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]
    seconds: float
    triton: str
    stack: int = 0
    predicted_us: float = 0.0

    def problems(self) -> list[str]:
        """What keeps this kernel from being shipped; empty where nothing does."""
        found = []
        if self.spilled > TOLERATED_SPILL:
            found.append(f"registers spill {self.spilled} bytes a thread")
        limit = shared_limit(self.architecture)
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, sm_{self.architecture} has {limit}")
        if self.instructions["atomic"]:
            found.append("atomics: the result would not repeat")
        return found


def launches(architecture: Architecture, dtype: torch.dtype, extent: Extent) -> list[tuple[str, Launch]]:
    """(problem, launch) of every kernel to compile, each specialisation once."""
    found: dict[str, tuple[str, Launch]] = {}
    for name, run in problems(architecture, dtype, extent):
        with recording(architecture) as recorded:
            run()
        for launch in recorded:
            key = repr((launch.kernel.__name__, *specialise(launch), launch.warps, launch.stages))
            found.setdefault(key, (name, launch))
    return list(found.values())


TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes that Triton's launcher would compile these arguments with."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPE_NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:  # a tensor descriptor
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(problem: str, launch: Launch, dtype: str, architecture: int) -> Record:
    """Compiles one recorded launch for sm_`architecture`, reads its resources and predicts its time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    started = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS},
    )
    seconds = time.perf_counter() - started
    ptx = compiled.asm["ptx"]
    registers, stack, spilled = resource_usage(compiled.asm["cubin"], ptx)
    return Record(
        launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        problem,
        dtype,
        architecture,
        dict(launch.constants),
        launch.warps,
        launch.stages,
        registers,
        spilled,
        compiled.metadata.shared,
        {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        round(seconds, 2),
        triton.__version__,
        stack,
        round(launch_us(Architecture(architecture, ARCHITECTURES[architecture]), launch), 2),
    )


def resource_usage(cubin: bytes, ptx: str) -> tuple[int, int, int]:
    """(registers, stack, spilled bytes) a thread, from cuobjdump; a stack may hold other things: ptxas is asked."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = tool_output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path)
        usage = re.findall(r"REG:(\d+) STACK:(\d+)", text)
        if len(usage) != 1:
            raise RuntimeError(f"cuobjdump: expected one kernel's resource usage; got {text!r}")
        registers, stack = (int(number) for number in usage[0])
        return registers, stack, spilled_bytes(ptx, folder) if stack else 0


def spilled_bytes(ptx: str, folder: str) -> int:
    """Bytes of spill stores and loads that ptxas reports for this PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.findall(r"^\.target (sm_(\d+)\w*)", ptx, flags=re.MULTILINE)
    if len(target) != 1:
        raise RuntimeError(f"expected one .target in the PTX; got {target}")
    name, capability = target[0]
    source = Path(folder, "kernel.ptx")
    source.write_text(ptx)
    text = tool_output(
        get_ptxas(int(capability)).path,
        "--verbose",
        f"--gpu-name={name}",
        source,
        "-o",
        Path(folder, "again.cubin"),
    )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if not spills:
        raise RuntimeError(f"ptxas: expected a report of spills; got {text!r}")
    return sum(int(number) for pair in spills for number in pair)


def tool_output(*command: str | Path) -> str:
    """What a program prints on both of its outputs."""
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def compile_all(task: tuple[int, str], *, extent: Extent, kernels: Sequence[str] = ()) -> list[Record]:
    """Records of every kernel for one (architecture, dtype); `kernels` limits them to these names."""
    capability, dtype = task
    architecture = Architecture(capability, ARCHITECTURES[capability])
    return [
        compile_launch(problem, launch, dtype, capability)
        for problem, launch in launches(architecture, DTYPES[dtype], extent)
        if not kernels or any(name in launch.kernel.__name__ for name in kernels)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints one line or one JSON object a kernel, and returns 1 where one cannot be shipped."""
    parser = argparse.ArgumentParser(prog="python -m kronafuse.testing.aot", description=__doc__)
    parser.add_argument(
        "--all", action="store_true", help="every shipped tile, odd sizes, and fp16 and fp32 beside bf16"
    )
    parser.add_argument(
        "--record", action="store_true", help="every shipped tile and the rules' choices, bf16"
    )
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bf16; with --all: all")
    parser.add_argument("--kernels", nargs="+", default=[], help="names, such as linear; default: every one")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, help="folder of CSV files, one each architecture and dtype")
    options = parser.parse_args(arguments)
    if triton_interprets():
        parser.error("TRITON_INTERPRET is set: kernels defined under it cannot be compiled")
    dtypes = options.dtypes or (list(DTYPES) if options.all else ["bf16"])
    tasks = [(capability, dtype) for capability in options.architectures for dtype in dtypes]
    extent: Extent = "all" if options.all else "record" if options.record else "fast"
    compile_one = partial(compile_all, extent=extent, kernels=options.kernels)
    records = []
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (capability, dtype), done in zip(tasks, pool.map(compile_one, tasks), strict=True):
            records += done
            if options.output is not None:
                write_csv(csv_path(options.output, capability, dtype), done)
            if not options.json:
                print(*map(line, done), sep="\n", flush=True)
    if options.json:
        print(json.dumps([asdict(record) for record in records]))
    return int(any(record.problems() for record in records))


COLUMNS = (
    "architecture", "kernel", "dtype", "problem", "configuration", "warps", "stages", "registers", "stack", "spilled",
    "shared", "instructions", "predicted_us", "triton",
)  # fmt: skip
"""Of a CSV file: what of a record is the same at every compilation."""


def csv_path(folder: Path, architecture: int, dtype: str) -> Path:
    """The file of one architecture and dtype."""
    return folder / f"sm_{architecture}-{dtype}.csv"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of one file, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row(record: Record) -> dict[Any, Any]:
    """A record as a line of its CSV file."""
    fields = {name: getattr(record, name) for name in COLUMNS if hasattr(record, name)}
    constants = " ".join(f"{name}={_short(value)}" for name, value in record.constants.items())
    counts = " ".join(f"{name}={count}" for name, count in record.instructions.items() if count)
    return {**fields, "configuration": constants, "instructions": counts}


def _short(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _sortable(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:012}"


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """The records in a fixed order, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(map(row, records), key=lambda each: [_sortable(each[name]) for name in COLUMNS])
    with written_beside(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def line(record: Record) -> str:
    """One record as a line of a table."""
    instructions = " ".join(f"{name} {count}" for name, count in record.instructions.items() if count)
    return (
        f"sm_{record.architecture:<4}{record.kernel:<20}{record.dtype:<5}{record.problem:<34}"
        f"{record.registers:>4} registers {record.spilled:>5} spilled {record.shared:>7} shared  "
        f"{record.predicted_us:>7.1f} µs predicted  {record.seconds:>5} s  "
        f"{instructions}  {'; '.join(record.problems())}"
    )


if __name__ == "__main__":
    sys.exit(main())
