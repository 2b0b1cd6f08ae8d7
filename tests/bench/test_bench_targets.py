"""Targets: the arithmetic, and what is judged by which rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kronafuse.bench.best import best_baseline
from kronafuse.bench.machine import describe
from kronafuse.bench.records import NOT_COVERED, Ceilings, Gpu, Mode, Results, Row, Spread
from kronafuse.bench.tables import cells
from kronafuse.bench.targets import copy_share, judged, lines, targets

GPU = Gpu("H200", "9.0", 132, 2**37, 2**26, "13.0", "580", None)
CEILINGS = Ceilings(4e12, {"bfloat16": 8e14}, launch_us=2.0)


def at(microseconds: float, spread: float = 0.01) -> Spread:
    return Spread(microseconds, (1 - spread) * microseconds, (1 + spread) * microseconds, 10)


def cuda_case(
    times: dict[str, float], *, case: str = "sdxl_1280-krona_64x4", mode: Mode = "forward", thin: bool = True
) -> list[Row]:
    """Rows of one case by arm, as the suite makes them."""
    return [
        Row(
            "kron_linear", case, 4, 4096, "bfloat16", mode, arm,
            impl=arm.removeprefix("ours_") if arm.startswith("ours") else None, thin=thin, device_us=at(time),
            wall_us=at(2 * time), host_us=at(10.0 if arm == "frozen" else 22.0), launches=2,
            peak_bytes=4096 * 1280 * 2,
            ratio_to_frozen=time / times["frozen"] if "frozen" in times else None,
        )
        for arm, time in times.items()
    ]  # fmt: skip


def on_gpu(*cases: list[Row]) -> Results:
    machine = replace(describe(["kronafuse"]), gpu=GPU)
    return Results(machine, CEILINGS, tuple(row for case in cases for row in case))


def verdicts(results: Results) -> dict[str, str]:
    return {each.name: each.verdict for each in targets(results)}


def test_ratios_are_judged_in_the_geometric_mean():
    first = cuda_case({"frozen": 20.0, "ours_triton": 22.0})
    second = cuda_case({"frozen": 20.0, "ours_triton": 26.0}, case="sdxl_640-krona_64x4")
    found = {each.name: each for each in targets(on_gpu(first, second))}
    target = found["ours_triton, thin, forward"]
    assert target.verdict == "missed"
    assert target.cases == 2
    assert target.figure == "geometric mean 1.2, 1.1 to 1.3"  # sqrt(1.1 · 1.3) = 1.196
    assert verdicts(on_gpu(first))["ours_triton, thin, forward"] == "met"
    assert found["ours_triton, fat, forward"].verdict == "not measured"


@pytest.mark.parametrize(
    ("thin", "mode", "limit"),
    [
        (True, "forward", 1.18),
        (True, "forward_backward", 1.25),
        (False, "forward", 1.20),
        (False, "forward_backward", 1.30),
    ],
)
def test_thin_and_fat_have_limits_of_their_own(thin, mode, limit):
    kind = "thin" if thin else "fat"
    for factor, verdict in ((limit - 0.005, "met"), (limit + 0.005, "missed")):
        rows = cuda_case({"frozen": 100.0, "ours_cuda": 100 * factor}, mode=mode, thin=thin)
        assert verdicts(on_gpu(rows))[f"ours_cuda, {kind}, {mode}"] == verdict
        assert judged(rows, CEILINGS)[1].verdict == verdict
        assert judged(rows, CEILINGS)[1].target == f"≤ {limit} × frozen"
        assert judged(rows, CEILINGS)[0].verdict is None


def test_small_cases_are_judged_by_their_launches():
    small = cuda_case({"frozen": 3.0, "ours_triton": 4.3})
    found = verdicts(on_gpu(small))
    assert found["ours_triton, thin, forward"] == "not measured"
    assert found["ours_triton, frozen layer below 15 µs"] == "met"  # 4.3 ≤ 1.1 · 2 launches · 2 µs
    assert judged(small, CEILINGS)[1].verdict == "met"
    slow = cuda_case({"frozen": 3.0, "ours_triton": 4.5})
    assert verdicts(on_gpu(slow))["ours_triton, frozen layer below 15 µs"] == "missed"
    assert judged(slow, CEILINGS)[1].verdict == "missed"


def test_the_best_mode_of_lycoris_counts():
    times = {"frozen": 20.0, "ours_triton": 20.0, "lycoris_rebuild": 60.0, "lycoris_bypass": 25.0}
    found = verdicts(on_gpu(cuda_case(times, mode="forward_backward")))
    assert found["ours_triton, LyCORIS' best mode, forward_backward"] == "missed"  # 25 / 20
    assert found["ours_triton, LyCORIS' best mode, each case"] == "met"
    faster = {**times, "lycoris_bypass": 19.0}
    found = verdicts(on_gpu(cuda_case(faster, mode="forward_backward")))
    assert found["ours_triton, LyCORIS' best mode, each case"] == "missed"
    forward = verdicts(on_gpu(cuda_case(times)))
    assert forward["ours_triton, LyCORIS' best mode, forward_backward"] == "not measured"


def test_peft_is_judged_as_shipped_and_under_autocast():
    times = {"frozen": 20.0, "ours_triton": 20.0, "peft_lokr_autocast": 45.0, "peft_lokr": 79.0}
    found = verdicts(on_gpu(cuda_case(times, mode="forward_backward")))
    assert found["ours_triton, peft_lokr_autocast, forward_backward"] == "met"
    assert found["ours_triton, peft_lokr, forward_backward"] == "missed"


def test_host_time_is_what_is_added_to_the_frozen_layers():
    rows = cuda_case({"frozen": 20.0, "ours_cuda": 20.0}, mode="forward_backward")
    assert verdicts(on_gpu(rows))["ours_cuda, host time beyond frozen"] == "met"  # 22 - 10
    slow = [replace(row, host_us=at(26.0)) if row.impl else row for row in rows]
    assert verdicts(on_gpu(slow))["ours_cuda, host time beyond frozen"] == "missed"
    assert "ours_triton, host time beyond frozen" not in verdicts(
        on_gpu(cuda_case({"frozen": 20.0, "ours_triton": 20.0}, mode="forward_backward"))
    )


def test_a_dense_buffer_is_seen_in_the_memory():
    rows = cuda_case({"frozen": 20.0, "ours_triton": 20.0})
    name = "ours_triton, memory beyond y, forward"
    assert verdicts(on_gpu(rows))[name] == "met"
    y, thin_t, dense = 4096 * 1280 * 2, 4096 * 256 * 2, 1280 * 1280 * 2
    heavy = [replace(row, peak_bytes=y + thin_t + dense) for row in rows]
    assert verdicts(on_gpu(heavy))[name] == "missed"


def test_bottlenecks_are_judged_by_copy_bandwidth_and_eager():
    def rows(mode: Mode, time: float) -> list[Row]:
        return [
            Row(
                "bottleneck", "sdxl_1280-width_60", 4, 4096, "bfloat16", mode, arm, impl=impl, device_us=at(each),
                bytes_moved=32_000_000, ratio_to_chain=each / 40.0,
            )
            for arm, impl, each in (("chain", None, 40.0), ("ours_triton", "triton", time))
        ]  # fmt: skip

    name = "ours_triton, bottleneck, forward"
    assert verdicts(on_gpu(rows("forward", 10.0)))[name] == "met"  # 3.2 TB/s of 4
    assert verdicts(on_gpu(rows("forward", 11.0)))[name] == "missed"
    name = "ours_triton, bottleneck, eager chain, forward_backward"
    assert verdicts(on_gpu(rows("forward_backward", 20.0)))[name] == "met"
    assert verdicts(on_gpu(rows("forward_backward", 21.0)))[name] == "missed"
    assert judged(rows("forward_backward", 21.0), CEILINGS)[1].verdict == "missed"
    assert judged(rows("forward", 10.0), CEILINGS)[1].verdict == "met"


def cpu_case(times: dict[str, float], spread: float = 0.01, **changes) -> list[Row]:
    row = Row("kron_linear", "sdxl_1280-krona_64x4", 1, 2048, "float32", "forward_backward", "")
    row = replace(row, **changes)
    return [
        replace(
            row, arm=arm, impl=arm.removeprefix("ours_") if "ours" in arm else None, wall_us=at(time, spread)
        )
        for arm, time in times.items()
    ]


def on_cpu(*cases: list[Row]) -> Results:
    return Results(
        describe(["kronafuse"]),
        Ceilings(1e10, {"float32": 1e11}),
        tuple(row for case in cases for row in case),
    )


def test_on_a_cpu_ours_must_not_be_slower_than_the_chain():
    name = "ours, adapted layers"
    assert verdicts(on_cpu(cpu_case({"einsum": 100.0, "ours_eager": 99.0})))[name] == "met"
    slow = cpu_case({"einsum": 100.0, "ours_eager": 110.0})
    assert verdicts(on_cpu(slow))[name] == "missed"
    assert judged(slow, None)[1].verdict == "missed"
    noisy = cpu_case({"einsum": 100.0, "ours_eager": 110.0}, spread=0.1)
    assert verdicts(on_cpu(noisy))[name] == "met"  # cannot be told apart
    assert judged(noisy, None)[1].verdict == "met"


def test_on_a_cpu_ours_must_be_faster_than_peft():
    name = "ours, PEFT LoKr, sdxl_1280-krona_64x4, 2048 tokens"
    times = {"einsum": 100.0, "ours_eager": 100.0, "peft_lokr": 201.0}
    assert verdicts(on_cpu(cpu_case(times)))[name] == "met"
    assert verdicts(on_cpu(cpu_case({**times, "peft_lokr": 199.0})))[name] == "missed"
    assert verdicts(on_cpu(cpu_case(times, tokens=1024)))[name] == "not measured"
    fat = "ours, PEFT LoKr, sdxl_1280-lokr_f8, 2048 tokens"
    assert verdicts(on_cpu(cpu_case({**times, "peft_lokr": 151.0}, case="sdxl_1280-lokr_f8")))[fat] == "met"
    assert any(line.startswith("target met: ours, PEFT LoKr") for line in lines(on_cpu(cpu_case(times))))


def test_on_a_cpu_the_one_that_auto_takes_is_judged():
    times = {"einsum": 100.0, "ours_eager": 90.0, "ours_cpu": 110.0}
    assert verdicts(on_cpu(cpu_case(times)))["ours, adapted layers"] == "missed"
    assert verdicts(on_cpu(cpu_case({**times, "ours_cpu": 95.0})))["ours, adapted layers"] == "met"


@pytest.mark.parametrize(
    ("case", "dtype", "limit"),
    [
        ("sdxl_1280-krona_64x4", "float32", 115.0),
        ("sdxl_1280-krona_64x4", "bfloat16", 150.0),
        ("sdxl_1280-lokr_f8", "float32", 135.0),
        ("sdxl_1280-lokr_f8", "bfloat16", 200.0),
    ],
)
def test_on_a_cpu_the_native_one_must_stay_near_the_frozen_layer(case, dtype, limit):
    name = f"ours_cpu, {case}, {dtype}, 2048 tokens"

    def found(time: float, **changes) -> str:
        times = {"frozen": 100.0, "ours_eager": 100.0, "ours_cpu": time}
        return verdicts(on_cpu(cpu_case(times, case=case, dtype=dtype, **changes)))[name]

    assert found(limit - 1) == "met"
    assert found(limit + 1) == "missed"
    assert found(limit - 1, mode="forward") == "not measured"
    assert found(limit - 1, tokens=1024) == "not measured"
    broken = [
        replace(row, error="wrong", wall_us=None) if row.arm == "ours_cpu" else row
        for row in cpu_case({"frozen": 100.0, "ours_cpu": limit - 1}, case=case, dtype=dtype)
    ]
    assert verdicts(on_cpu(broken))[name] == "missed"


def test_errors_are_no_figures():
    """A baseline's leaves the target open; ours misses what it would be judged by, whatever the others reach."""
    good, bad = (
        cpu_case({"einsum": 100.0, "ours_eager": 99.0}),
        cpu_case({"einsum": 100.0, "ours_eager": 99.0}),
    )
    bad = [replace(row, case="sdxl_1280-lokr_f8") for row in bad]
    name = "ours, adapted layers"
    assert verdicts(on_cpu([replace(good[0], error="wrong"), good[1]]))[name] == "not measured"
    wrong = [bad[0], replace(bad[1], error="wrong", wall_us=None)]
    found = {each.name: each for each in targets(on_cpu(good, wrong))}
    assert found[name].verdict == "missed"
    assert found[name].figure == "slower on 0, ratios 0.99 to 0.99; 1 of 2, 1 failed"
    assert found["ours, PEFT LoKr, sdxl_1280-lokr_f8, 2048 tokens"].verdict == "missed"
    assert found["ours, PEFT LoKr, sdxl_1280-lokr_f8, 2048 tokens"].figure == "0 of 1, 1 failed"
    assert found["ours, PEFT LoKr, sdxl_1280-krona_64x4, 2048 tokens"].verdict == "not measured"
    uncovered = [bad[0], replace(bad[1], error=f"{NOT_COVERED}: no such kernel", wall_us=None)]
    assert verdicts(on_cpu(good, uncovered))[name] == "met"


def test_errors_of_ours_miss_targets_on_a_gpu():
    times = {"frozen": 20.0, "ours_triton": 20.0, "lycoris_bypass": 60.0}
    good = cuda_case(times, mode="forward_backward")
    wrong = [
        replace(row, error="WrongArm: y0", device_us=None) if row.impl else row
        for row in cuda_case(times, case="sdxl_1280-lokr_f8", mode="forward_backward")
    ]
    found = {each.name: each for each in targets(on_gpu(good, wrong))}
    for name in ("ours_triton, thin, forward_backward", "ours_triton, LyCORIS' best mode, each case"):
        assert found[name].verdict == "missed"
        assert found[name].figure.endswith("; 1 of 2, 1 failed")
    assert found["ours_triton, thin, forward"].verdict == "not measured"


def test_wall_time_is_never_beside_device_time():
    """LyCORIS could not be captured: its wall time would make it look slow."""
    rows = cuda_case({"frozen": 20.0, "ours_triton": 20.0, "lycoris_bypass": 60.0}, mode="forward_backward")
    rows = [replace(row, device_us=None) if row.arm == "lycoris_bypass" else row for row in rows]
    assert verdicts(on_gpu(rows))["ours_triton, LyCORIS' best mode, forward_backward"] == "not measured"
    arms = {row.arm: row for row in rows}
    assert best_baseline(arms) is None
    assert "lycoris_bypass" in cells(arms["lycoris_bypass"], arms["ours_triton"])
    assert cells(arms["lycoris_bypass"], arms["ours_triton"])[10] == ""


def test_lora_is_a_baseline_of_lora():
    times = {"frozen": 20.0, "einsum": 40.0, "peft_lora_r16": 30.0, "ours_triton": 25.0}
    for case, best in (("sdxl_1280-lora_r16", "peft_lora_r16"), ("sdxl_1280-krona_64x4", "einsum")):
        found = best_baseline({row.arm: row for row in cuda_case(times, case=case)})
        assert found is not None
        assert found.arm == best


def test_the_choice_of_lycoris_counts():
    times = {"frozen": 20.0, "ours_triton": 20.0, "lycoris_bypass": 60.0, "lycoris_bypass_auto": 19.0}
    found = verdicts(on_gpu(cuda_case(times, mode="forward_backward")))
    assert found["ours_triton, LyCORIS' best mode, each case"] == "missed"


def test_shares_of_bandwidth_are_of_cold_time():
    row = Row(
        "bottleneck", "sdxl_1280-width_60", 4, 4096, "bfloat16", "forward", "ours_triton", impl="triton",
        device_us=at(5.0), device_cold_us=at(11.0), bytes_moved=32_000_000,
    )  # fmt: skip
    assert copy_share(row, CEILINGS) == pytest.approx(32e6 / 11e-6 / 4e12)
    assert copy_share(replace(row, device_cold_us=None), CEILINGS) == pytest.approx(32e6 / 5e-6 / 4e12)
    assert cells(row, None)[6] == "2.91e+03"
    assert judged([row], CEILINGS)[0].verdict == "missed"
