"""Predicted time of one launch: the largest of what its multiprocessors, their latencies and the memory need.

It puts configurations in an order before anything is measured; it is not a speed. What it assumes:

1. Multiprocessors share the programs evenly; the one with the most of them sets the time.
2. Programs resident on a multiprocessor share its tensor cores (fp32 products: its FMA units), its port to the L2 and
   its shared memory; a step of the loop takes the longest of the three, padding included, and STEP_CLOCKS for its
   addresses and barriers.
3. A program of `stages` stages has stages - 1 steps in flight, each for LATENCY_US; resident programs overlap.
4. Each round of resident programs fills and drains its pipeline once, FILL_US; each launch costs LAUNCH_US more.
5. Operands come from device memory once where what is read in between fits half of the L2, else once a wave of tiles
   or a band of rows of tiles.
6. 16-bit products of fewer than 64 rows do without wgmma and tcgen05 and run at half of the peak there.
7. Vector instructions, clock drops, bank conflicts, partition camping and everything else cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .launch import Architecture

LAUNCH_US, FILL_US, LATENCY_US = 2.0, 1.0, 0.6
"""Assumed: a launch within a graph, a program's first loads and last stores, one load from device memory under load."""
STEP_CLOCKS = 100
"""Assumed: what a step of a program's loop costs beside its products and loads."""
BESIDE = 0.1
"""Assumed: of multiprocessors, latencies and memory, the two that are not the longest hide but for this part."""
PORT_BYTES, SHARED_BYTES = 48, 128
"""Bytes a clock and multiprocessor from the L2 (A100 whitepaper: 5,120 over 108) and from shared memory (32 banks)."""


@dataclass(frozen=True)
class Peaks:
    """What a GPU can do at most; `tensor_flops` are of 16-bit products summed in fp32.

    clock_hz: the one that the datasheet's tensor peak implies. A measured `tensor_flops` was reached at a lower clock
              or with gaps between products: loads and fp32 products, which count at this one, come out too fast beside
              it by up to that part, on an H200 a fifth
    """

    gpu: str
    multiprocessors: int
    clock_hz: float
    tensor_flops: float
    single_flops: float
    bytes_per_s: float
    l2_bytes: int
    shared_bytes: int
    threads: int
    source: str


PEAKS = {
    80: Peaks("A100 80 GB SXM", 108, 1.41e9, 312e12, 19.5e12, 2.04e12, 40 << 20, 163 << 10, 2048, "datasheet"),
    86: Peaks("A10", 72, 1.695e9, 125e12, 31.2e12, 0.6e12, 6 << 20, 99 << 10, 1536, "datasheet"),
    89: Peaks("RTX 4090", 128, 2.52e9, 165.2e12, 82.6e12, 1.008e12, 72 << 20, 99 << 10, 1536, "datasheet"),
    90: Peaks(
        "H200", 132, 1.83e9, 790e12, 67e12, 4.3e12, 50 << 20, 227 << 10, 2048,
        "measured: bytes_per_s (copy) and tensor_flops (8192³ bf16 GEMM); datasheet: the rest, the clock among it",
    ),
    100: Peaks("B200", 148, 1.856e9, 2250e12, 75e12, 8e12, 126 << 20, 227 << 10, 2048, "datasheet"),
    120: Peaks("RTX 5090", 170, 2.407e9, 209.5e12, 104.8e12, 1.792e12, 96 << 20, 99 << 10, 1536, "datasheet"),
}  # fmt: skip
"""Compute capability -> a GPU of that kind; shared memory is what one program may use, threads what fit at a time."""
REFERENCE = Architecture(90, 132)
"""Where choices that must not depend on the machine are predicted."""


def peaks_of(capability: int) -> Peaks:
    """The row of sm_`capability`; an unknown one counts as the next lower known, below all as the lowest."""
    known = [each for each in PEAKS if each <= capability]
    return PEAKS[max(known) if known else min(PEAKS)]


def shared_limit(capability: int) -> int:
    """Shared memory that one program may use on sm_`capability`; an unknown one counts as the next lower known."""
    known = [each for each in PEAKS if each <= capability]
    return PEAKS[max(known)].shared_bytes if known else min(each.shared_bytes for each in PEAKS.values())


def blocks(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


@dataclass(frozen=True)
class Work:
    """What one launch does; a program runs `steps` steps, each a product of (rows, depth) and (depth, columns).

    step_bytes:   what a step loads
    memory_bytes: what the launch reads from and writes to device memory
    shared_bytes: what a program keeps in shared memory
    fma:          multiply-adds of a step outside of its product, in fp32
    held:         registers of a program beside its accumulators and what every kernel has
    """

    programs: int
    steps: float
    rows: int
    columns: int
    depth: int
    step_bytes: float
    memory_bytes: float
    shared_bytes: int
    warps: int
    stages: int
    fma: float = 0.0
    held: int = 0


def predicted_us(architecture: Architecture, dtype: torch.dtype, work: Work) -> float:
    """Time of one launch of `work` whose products have operands of this dtype."""
    peaks = peaks_of(architecture.capability)
    share = max(1, blocks(work.programs, architecture.multiprocessors))
    together = min(share, resident(architecture, work))
    busy = share * work.steps * step_us(architecture, dtype, work)
    waiting = blocks(share, together) * work.steps * LATENCY_US / max(1, work.stages - 1)
    memory = 1e6 * work.memory_bytes / peaks.bytes_per_s
    longest = max(busy, waiting, memory)
    return (
        LAUNCH_US + FILL_US * blocks(share, together) + longest + BESIDE * (busy + waiting + memory - longest)
    )


def resident(architecture: Architecture, work: Work) -> int:
    """Programs that a multiprocessor holds at a time, by shared memory, threads and an estimate of the registers."""
    threads = 32 * work.warps
    registers = registers_of(architecture, work.rows * work.columns + work.held, threads)
    limits = (
        (shared_limit(architecture.capability) + 1024) // (work.shared_bytes + 1024),
        peaks_of(architecture.capability).threads // threads,
        65536 // (registers * threads),
    )
    return max(1, min(limits))


def registers_of(architecture: Architecture, values: int, threads: int) -> int:
    """Registers a thread of a program that keeps so many values: the compiler's, but for tens of them either way."""
    asynchronous = architecture.capability in ASYNCHRONOUS_ROWS
    return min(255, (ASYNCHRONOUS_REGISTERS if asynchronous else REGISTERS) + values // threads)


def step_us(architecture: Architecture, dtype: torch.dtype, work: Work) -> float:
    """A step on a multiprocessor of its own: products, the loads of its operands, their way to the products."""
    peaks = peaks_of(architecture.capability)
    clocks_us = peaks.clock_hz / 1e6
    single = peaks.single_flops / peaks.multiprocessors / 1e6
    wide = dtype.itemsize > 2
    flops_us = single if wide else peaks.tensor_flops / peaks.multiprocessors / 1e6
    whole_rows = 0 if wide else ASYNCHRONOUS_ROWS.get(architecture.capability, 0)
    if whole_rows and work.rows < 64:
        flops_us /= 2
    product = 2 * work.rows * work.columns * work.depth / flops_us
    reads = work.depth * dtype.itemsize * operand_lines(whole_rows, work.rows, work.columns, work.warps)
    loads = work.step_bytes / (PORT_BYTES * clocks_us)
    longest = max(product + 2 * work.fma / single, loads, reads / (SHARED_BYTES * clocks_us))
    return longest + STEP_CLOCKS / clocks_us


ASYNCHRONOUS_ROWS = {90: 64, 100: 128}
"""Compute capability -> rows of one wgmma of a group of warps, or of one tcgen05.mma."""
REGISTERS, ASYNCHRONOUS_REGISTERS = 96, 64
"""Registers a thread beside accumulators, the median of what is compiled: operands and addresses; without operands."""


@lru_cache(maxsize=4096)
def operand_lines(whole_rows: int, rows: int, columns: int, warps: int) -> int:
    """Rows and columns of the operands that a step's products read from shared memory, repeats included.

    Warps in a grid read their rows once a column of the grid and their columns once a row of it; asynchronous products
    of `whole_rows` rows read them from shared memory themselves, the columns once each.
    """
    if whole_rows and rows >= 64:
        return rows + columns * blocks(rows, whole_rows)
    grids = [
        (down, warps // down) for down in (1, 2, 4, 8, 16) if down <= warps and 16 * down <= max(16, rows)
    ]
    return min(rows * across + columns * down for down, across in grids)


def reads_of(architecture: Architecture, times: int, working_bytes: float) -> int:
    """How often device memory gives an operand that is read `times` times, with so much in use between two reads."""
    return 1 if working_bytes <= peaks_of(architecture.capability).l2_bytes / 2 else times


def elementwise_us(architecture: Architecture, memory_bytes: float) -> float:
    """A launch that only moves so much."""
    return LAUNCH_US + FILL_US + 1e6 * memory_bytes / peaks_of(architecture.capability).bytes_per_s


def sum_us(architecture: Architecture, split: int, elements: int, itemsize: int) -> float:
    """The second stage of a split: fp32 partial sums into one result; without a split there is none.

    It counts as a launch of its own, also where several sums share one.
    """
    return elementwise_us(architecture, elements * (4 * split + itemsize)) if split > 1 else 0.0
