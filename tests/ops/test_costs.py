"""The cost model's behaviour: what makes a launch longer or shorter, not how long it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from kronafuse.ops import costs, kernel_costs, tuned
from kronafuse.ops.costs import PEAKS, Work, predicted_us
from kronafuse.ops.kernel_costs import LinearSizes, linear_us
from kronafuse.ops.kron_linear import reduction_tuning, tuning
from kronafuse.ops.launch import Architecture, recording
from kronafuse.testing.aot import csv_path, read_csv

RECORDED = Path(__file__).parents[2] / "bench" / "results" / "aot"
H200, A100 = Architecture(90, 132), Architecture(80, 108)
BF16, FP32 = torch.bfloat16, torch.float32
TILE = tuning.LinearConfig(128, 128, 64, 32, 8, 8, 4, True)
WORK = Work(132, 20, 128, 128, 64, 32768, 1e6, 131072, 8, 4)


@pytest.mark.parametrize(
    ("tokens", "features", "percents"),
    [
        (4096, 320, (61, 30, 48, 97)),
        (4096, 640, (61, 61, 97, 97)),
        (4096, 1152, (73, 55, 87, 87)),
        (4096, 1280, (81, 61, 97, 97)),
        (4096, 3072, (97, 97, 93, 93)),
        (16384, 1280, (97, 97, 97, 97)),
    ],
)
def test_wave_efficiency(tokens, features, percents):
    """Tiles of 128×128, 128×256, 128×160 and 64×160 on the 132 multiprocessors of an H200: area over whole waves."""
    for (rows, columns), percent in zip(
        ((128, 128), (128, 256), (128, 160), (64, 160)), percents, strict=True
    ):
        tiles = costs.blocks(tokens, rows) * costs.blocks(features, columns)
        # So many steps that nothing but the waves counts.
        wave = replace(WORK, steps=10**7, rows=rows, columns=columns, shared_bytes=200_000, programs=132)
        waves = predicted_us(H200, BF16, replace(wave, programs=tiles)) / predicted_us(H200, BF16, wave)
        assert round(100 * tokens * features / (waves * 132 * rows * columns)) == percent


def test_time_jumps_where_a_wave_begins():
    """One program more than multiprocessors costs as much as a whole second wave; up to there none costs any."""
    times = [
        predicted_us(H200, BF16, replace(WORK, programs=programs)) for programs in (1, 132, 133, 264, 265)
    ]
    assert times[0] == times[1]
    assert times[1] < times[2] == times[3] < times[4]


@pytest.mark.parametrize("architecture", [Architecture(each, PEAKS[each].multiprocessors) for each in PEAKS])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_more_work_takes_longer(architecture, dtype):
    """Tokens, features on either side and tails; a base to read."""
    config = tuning.linear_config(architecture, dtype, 4096, 1280, 1280, False, 80, 128, False)
    times = [
        linear_us(architecture, dtype, LinearSizes(m, 1280, 1280), config) for m in (256, 4096, 16384, 65536)
    ]
    assert times == sorted(times)
    assert times[-1] > 3 * times[-2]
    base = LinearSizes(16384, 1280, 1280)
    for longer in (
        replace(base, in_features=2560),
        replace(base, features=2560),
        replace(base, tail_width=160),
        replace(base, base=True),
    ):
        assert linear_us(architecture, dtype, longer, config) > linear_us(architecture, dtype, base, config)


def test_large_products_approach_the_peak_and_never_pass_it():
    """On sm_100 the largest shipped tile is too small for its peak: the port to the L2 is what limits it."""
    for capability, peaks in PEAKS.items():
        architecture = Architecture(capability, peaks.multiprocessors)
        config = tuning.linear_config(architecture, BF16, 8192, 8192, 8192, False, 0, 128, capability >= 90)
        rate = 2 * 8192**3 / linear_us(architecture, BF16, LinearSizes(8192, 8192, 8192), config) * 1e6
        assert (0.35 if capability == 100 else 0.65) * peaks.tensor_flops < rate < peaks.tensor_flops


def test_shrink_is_bound_by_memory_where_there_are_many_rows():
    """Near the copy's time, whatever the width of T; one column more than a tile reads x from cache, not memory."""
    rows, features = 262144, 320
    times = {
        width: kernel_costs.shrink_us(
            H200, BF16, rows, width, features, reduction_tuning.shrink_config(BF16, rows, width, features)
        )
        for width in (16, 64)
    }
    copy_us = 1e6 * rows * features * 2 / PEAKS[90].bytes_per_s
    assert all(copy_us < time_us < 2 * copy_us for time_us in times.values())
    assert times[64] < 1.3 * times[16]


def test_split_pays_where_rows_are_few():
    """A sum of its own costs a launch: it pays behind a long K and few rows alone."""
    split = {
        (rows, features): reduction_tuning.shrink_config(BF16, rows, 80, features).split
        for rows in (256, 65536)
        for features in (320, 5120)
    }
    assert split == {(256, 320): 1, (256, 5120): 8, (65536, 320): 1, (65536, 5120): 1}


def test_a_second_stage_costs_a_launch():
    assert costs.sum_us(H200, 1, 1000, 2) == 0
    assert costs.sum_us(H200, 2, 1000, 2) > costs.LAUNCH_US
    assert costs.sum_us(H200, 8, 1 << 20, 2) > costs.sum_us(H200, 2, 1 << 20, 2)


def test_small_tiles_do_without_wgmma():
    """Half the peak below 64 rows on sm_90 and sm_100, not where mma.sync serves every tile."""
    tall, flat = (
        replace(WORK, rows=rows, columns=columns, step_bytes=0) for rows, columns in ((64, 128), (32, 256))
    )
    assert costs.step_us(H200, BF16, flat) > 1.5 * costs.step_us(H200, BF16, tall)
    assert costs.step_us(A100, BF16, flat) < 1.2 * costs.step_us(A100, BF16, tall)


@pytest.mark.parametrize("kernel", ["linear", "one_pass"])
@pytest.mark.parametrize("capability", PEAKS)
def test_registers_as_compiled(capability, kernel):
    """The estimate behind how many programs a multiprocessor holds: as compiled, to 40 in the median."""
    architecture = Architecture(capability, PEAKS[capability].multiprocessors)
    errors = []
    for row in read_csv(csv_path(RECORDED, capability, "bf16")):
        if row["kernel"] == kernel:
            of = {name: int(value) for name, _, value in configuration(row) if value.isdigit()}
            values = of["BLOCK_M"] * of["BLOCK_N"]
            if kernel == "one_pass":
                values += kernel_costs.one_pass_held(
                    of["GROUPS"], of["BLOCK_M"], of["BLOCK_N"], of["BLOCK_K"], BF16.itemsize
                )
            estimate = costs.registers_of(architecture, values, 32 * int(row["warps"]))
            errors.append(int(row["registers"]) - estimate)
    assert len(errors) >= 15
    assert abs(median(errors)) <= 40, errors


def configuration(row: dict[str, str]) -> list[tuple[str, str, str]]:
    return [each.partition("=") for each in row["configuration"].split()]


def test_sums_of_one_pass_leave_fewer_programs():
    """A X of two groups takes registers that the accumulators alone would leave to another program."""
    alone = replace(WORK, rows=64, columns=64, warps=4, shared_bytes=16384)
    held = kernel_costs.one_pass_held(2, 64, 64, 64, 2)
    assert held == 3 * 64 * 64 + 64 * 64 // 2
    assert costs.resident(H200, replace(alone, held=held)) < costs.resident(H200, alone)


def test_block_tail_width():
    """Columns of T a tile: of one group where tiles end with groups, of 1.5 where every second one crosses a border."""
    assert kernel_costs.block_tail_width(128, 8, 256, 32) == 32
    assert kernel_costs.block_tail_width(128, 8, 192, 32) == round(32 * (1 + 64 / 192))
    assert kernel_costs.block_tail_width(128, 64, 20, 4) == round(4 * (1 + 124 / 20))
    assert kernel_costs.block_tail_width(128, 2, 20, 4) == 8


def test_stages_hide_latency():
    """A lone program of few products waits for memory; each stage more shortens that, one stage alone hides nothing."""
    short = replace(WORK, programs=1, rows=16, columns=16, step_bytes=4096, shared_bytes=4096)
    times = [predicted_us(H200, BF16, replace(short, stages=stages)) for stages in (1, 2, 3, 4)]
    assert times[0] == times[1] > times[2] > times[3]


def test_operands_that_leave_the_cache_are_read_again():
    """W of 16 MB on an A10 with 6 MB of L2: a band of tiles more reads it once more; on an RTX 4090 it stays."""
    sizes = LinearSizes(8192, 2048, 4096)
    wide, narrow = (replace(TILE, group_m=group_m, descriptors=False) for group_m in (16, 1))
    small = Architecture(86, 72)
    assert linear_us(small, BF16, sizes, narrow) > 1.05 * linear_us(small, BF16, sizes, wide)
    large = Architecture(89, 128)
    assert linear_us(large, BF16, sizes, narrow) == linear_us(large, BF16, sizes, wide)


def test_operand_lines():
    """Of 128 rows and 128 columns: eight warps of mma.sync repeat them, wgmma the columns alone, tcgen05 none."""
    assert costs.operand_lines(64, 128, 128, 8) == 128 + 2 * 128
    assert costs.operand_lines(128, 128, 128, 8) == 128 + 128
    assert costs.operand_lines(0, 128, 128, 8) == 2 * 128 + 4 * 128
    assert costs.operand_lines(0, 16, 64, 4) == 4 * 16 + 64


def test_unknown_architectures_count_as_the_next_lower():
    assert costs.peaks_of(103) is PEAKS[100]
    assert costs.peaks_of(75) is PEAKS[80]
    assert costs.shared_limit(103) == PEAKS[100].shared_bytes
    assert costs.shared_limit(75) == min(each.shared_bytes for each in PEAKS.values())


def test_every_peak_says_where_it_is_from():
    for capability, peaks in PEAKS.items():
        assert "datasheet" in peaks.source
        assert (peaks.source != "datasheet") == (capability == 90)
    assert (PEAKS[90].tensor_flops, PEAKS[90].bytes_per_s) == (790e12, 4.3e12)


def test_clocks_are_those_of_the_datasheets():
    """A multiprocessor has a power of two of FLOPs a clock at a datasheet's peak; a measured peak stays below it."""
    per_clock = {512: (89, 120), 1024: (86,), 2048: (80,), 4096: (90,), 8192: (100,)}
    for flops, capabilities in per_clock.items():
        for peaks in (PEAKS[each] for each in capabilities):
            datasheet = peaks.multiprocessors * peaks.clock_hz * flops
            if peaks.source == "datasheet":
                assert peaks.tensor_flops == pytest.approx(datasheet, rel=0.01)
            else:
                assert 0.75 * datasheet < peaks.tensor_flops < 0.85 * datasheet


def test_one_gpu_stands_for_an_architecture():
    """What is compiled ahead is predicted for the GPU that the peaks are of."""
    pytest.importorskip("triton")
    from kronafuse.testing.aot_problems import ARCHITECTURES

    assert {capability: peaks.multiprocessors for capability, peaks in PEAKS.items()} == ARCHITECTURES


def test_every_launch_is_predicted():
    """Of the cases that reach every kernel, above the launch's floor; those with products by their own sizes."""
    pytest.importorskip("triton")
    from kronafuse.testing.aot_problems import problems
    from kronafuse.testing.launch_costs import READERS, launch_us

    seen = set()
    for name, run in problems(H200, BF16, "fast"):
        with recording(H200) as launches:
            run()
        for launch in launches:
            time_us = launch_us(H200, launch)
            assert costs.LAUNCH_US + costs.FILL_US < time_us < 200, (name, launch.kernel)
            seen.add(launch.kernel.__name__.strip("_").removesuffix("_kernel"))
    assert seen > set(READERS)


def test_a_launch_is_predicted_as_its_choice_was():
    """What a recorded launch is read as has the sizes that its configuration was chosen for."""
    pytest.importorskip("triton")
    from kronafuse.testing.aot_problems import FAST, train_step
    from kronafuse.testing.launch_costs import launch_us

    asked: list[tuned.Choice] = []
    with recording(H200) as launches, tuned.deciding(asked.append):
        train_step(FAST[0], BF16)
    (shrink,) = [launch for launch in launches if launch.kernel.__name__ == "_shrink_kernel"]
    (choice,) = [choice for choice in asked if choice.kernel == "shrink"]
    dtype, rows, width, features = choice.values
    config = reduction_tuning.shrink_config(dtype, rows, width, features)
    second_us = costs.sum_us(H200, config.split, rows * width, BF16.itemsize)
    expected = kernel_costs.shrink_us(H200, dtype, rows, width, features, config)
    assert launch_us(H200, shrink) == pytest.approx(expected - second_us)
    linears = [launch for launch in launches if launch.kernel.__name__ == "_linear_kernel"]
    chosen = [choice for choice in asked if choice.kernel == "linear"]
    for launch, choice in zip(linears, chosen, strict=True):
        dtype, tokens, features, in_features, *_ = choice.values
        bare = linear_us(
            H200,
            dtype,
            LinearSizes(tokens, features, in_features),
            tuning.linear_config(H200, *choice.values),
        )
        assert bare <= launch_us(H200, launch) < 1.3 * bare
