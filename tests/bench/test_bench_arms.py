"""Every arm computes what it is timed for; what does not becomes a row with its error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kronafuse.bench.arms import ARMS, CHAINS, Arm
from kronafuse.bench.arms.arm import step_of
from kronafuse.bench.arms.ours import EVIDENCE, triton_kernel_names
from kronafuse.bench.arms.plain import EINSUM, FROZEN, adapted
from kronafuse.bench.checking import Checks, observe
from kronafuse.bench.device import is_fatal
from kronafuse.bench.floors import cost
from kronafuse.bench.problems import KronProblem, Spec
from kronafuse.bench.records import Ceilings, Mode, Suite
from kronafuse.bench.suites import NOT_COVERED, arms_named, copies_of, lost_by, run_spec
from kronafuse.bench.timing import CpuTimer
from kronafuse.shapes import KronShape
from kronafuse.testing.bottleneck_cases import BottleneckCase
from kronafuse.testing.cases import CASES, Case
from kronafuse.testing.chain import eager_chain

CPU = torch.device("cpu")
COMPILED = ("einsum_compiled", "chain_compiled")
SMALL = {
    case.name: case
    for case in (
        Case("thin-krona", 40, KronShape(16, 2, 3, 32)),
        Case("thin-transposed", 40, KronShape(2, 16, 32, 3)),
        Case("thin-shuffled", 40, KronShape(16, 2, 3, 32), shuffled=True),
        Case("fat-lokr", 40, KronShape(4, 4, 10, 12)),
        Case("thin-low_rank", 40, KronShape(2, 4, 24, 40, 5)),
        Case("thin-lora", 40, KronShape(1, 1, 40, 64, 4), has_a=False),
    )
}
NARROW = BottleneckCase("small-width_6", 40, 24, 6, 24)


def spec_of(
    case: Case | BottleneckCase,
    mode: Mode = "forward_backward",
    suite: Suite | None = None,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
) -> Spec:
    chosen: Suite = suite or ("bottleneck" if isinstance(case, BottleneckCase) else "kron_linear")
    return Spec(chosen, case, 1, case.tokens, dtype, mode, CPU, factors or dtype)


def arm_named(name: str, suite: Suite = "kron_linear") -> Arm:
    return next(arm for arm in ARMS[suite] if arm.name == name)


def covering(spec: Spec) -> list[Arm]:
    """The arms that cover the case and are not compiled."""
    return [arm for arm in ARMS[spec.suite] if arm.name not in COMPILED and not arm.reasons(spec)]


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("suite", ["kron_linear", "kron_linear_group"])
@pytest.mark.parametrize("case", SMALL.values(), ids=str)
def test_arms_compute_the_case(case, suite, mode):
    spec = spec_of(case, mode, suite)
    arms = covering(spec)
    expected = {"frozen", "peft_lora_r16", "einsum", "merge_gemm", "ours_eager", "ours_cpu"}
    if case.has_a and not case.shuffled:
        expected |= {"peft_lokr", "lycoris_rebuild", "lycoris_bypass"}
    if case.name.startswith("thin") and (suite, mode) == ("kron_linear", "forward"):
        expected |= {"concat_gemm"}
    assert {arm.name for arm in arms} == expected
    checks = Checks(spec.make())
    for arm in arms:
        checked = checks.check(arm)
        assert checked.tokens == 40
        assert 0 < checked.accuracy.y_rms < 1e-5
        assert (checked.accuracy.delta_rms is None) == (arm.name == "frozen")


def test_arms_compute_the_case_in_16_bits():
    """With parameters in float32, as they are trained."""
    spec = spec_of(SMALL["fat-lokr"], dtype=torch.bfloat16, factors=torch.float32)
    arms, checks = covering(spec), Checks(spec.make())
    assert "peft_lokr_autocast" in {arm.name for arm in arms}
    for arm in arms:
        assert 1e-4 < checks.check(arm).accuracy.y_rms < 0.05


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_arms_compute_the_bottleneck(mode):
    spec = spec_of(NARROW, mode)
    arms, checks = covering(spec), Checks(spec.make())
    assert [arm.name for arm in arms] == ["chain", "minimal", "ours_eager", "ours_cpu"]
    for arm in arms:
        checked = checks.check(arm)
        assert checked.accuracy.y_rms < 1e-5
        assert checked.accuracy.delta_rms is not None


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL["thin-krona"], NARROW])
def test_compiled_arms_compute_the_case(case):
    torch.compiler.reset()
    spec = spec_of(case)
    arm = arm_named(COMPILED[spec.suite == "bottleneck"], spec.suite)
    assert Checks(spec.make()).check(arm).accuracy.y_rms < 1e-5


def test_arms_say_what_they_do_not_cover():
    shuffled, lora = spec_of(SMALL["thin-shuffled"]), spec_of(SMALL["thin-lora"])
    fat, forward = spec_of(SMALL["fat-lokr"], "forward"), spec_of(SMALL["thin-krona"], "forward")
    assert arm_named("peft_lokr").reasons(shuffled) == ["no LoKr has DiffuseKronA's shuffled output"]
    assert arm_named("lycoris_bypass").reasons(lora) == ["the case is LoRA, not LoKr"]
    assert arm_named("peft_lokr_autocast").reasons(fat) == ["autocast needs a 16-bit dtype"]
    assert arm_named("concat_gemm").reasons(forward) == []
    assert arm_named("concat_gemm").reasons(fat) == [
        "T is 40 wide, as x is: the GEMM would be twice as large"
    ]
    assert "forward only" in arm_named("concat_gemm").reasons(spec_of(SMALL["thin-krona"]))[0]
    assert "CUDA device" in arm_named("lycoris_bypass_triton").reasons(fat)[0]
    assert "see lycoris_bypass" in arm_named("lycoris_bypass_auto").reasons(fat)[0]
    Checks(fat.make()).check(arm_named("lycoris_bypass_auto"))
    assert arm_named("ours_eager").reasons(fat) == []
    assert arm_named("ours_cuda").reasons(fat)
    assert arm_named("ours_triton").reasons(fat) == [
        "kernels run in Triton's interpreter, whose speed says nothing"
    ]


def test_absent_libraries_are_named_with_their_distribution(monkeypatch):
    import importlib.util

    spec = spec_of(SMALL["fat-lokr"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, distribution in (
        ("peft_lokr", "peft"),
        ("peft_lora_r16", "peft"),
        ("lycoris_rebuild", "lycoris-lora"),
    ):
        assert arm_named(name).reasons(spec)[0].endswith(f"install with: pip install {distribution}")


def off_by(factor: float, impl: str | None = None) -> Arm:
    """The chain, with outputs that are too large."""

    def build(problem: KronProblem):
        return adapted(problem, lambda x, layers: [factor * y for y in eager_chain(x, layers)])

    return Arm("off", build, impl=impl)


def test_a_lost_device_ends_the_case():
    """Rows are those of the arms that failed; the others may run in another process."""

    def fatal(_problem: KronProblem):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    rows = run_small([FROZEN, off_by(1.1), Arm("fatal", fatal), EINSUM])
    assert list(rows) == ["off", "fatal"]
    assert rows["fatal"].error == (
        "the device was lost by fatal: RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered"
    )
    assert lost_by(row.error for row in rows.values()) == rows["fatal"].error
    assert lost_by([None, rows["off"].error]) is None


def test_a_device_lost_while_it_is_timed_ends_the_case():
    calls = []

    def late(problem: KronProblem):
        built = adapted(problem, eager_chain)

        def forward():
            calls.append(1)
            if len(calls) > 8:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return built.forward()

        return replace(built, forward=forward)

    rows = run_small([FROZEN, Arm("late", late), EINSUM])
    assert list(rows) == ["late"]
    assert lost_by(row.error for row in rows.values()) is not None


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("Triton Error [CUDA]: invalid argument", False),
        ("the case has an illegal address", False),
    ],
)
def test_which_errors_lose_the_device(text, fatal):
    assert is_fatal(RuntimeError(text)) is fatal


def run_small(arms: list[Arm], mode: Mode = "forward"):
    ceilings = Ceilings(1e10, {"float32": 1e11})
    timer = CpuTimer(1024, least_rounds=1)
    return {row.arm: row for row in run_spec(spec_of(SMALL["fat-lokr"], mode), arms, timer, ceilings, 0.02)}


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_every_arm_gets_a_row(mode):
    arms = [arm for arm in ARMS["kron_linear"] if arm.name not in COMPILED]
    rows = run_small(arms, mode)
    assert list(rows) == [arm.name for arm in arms]
    done = {name for name, row in rows.items() if row.error is None}
    assert done >= {
        "frozen",
        "einsum",
        "merge_gemm",
        "peft_lokr",
        "lycoris_rebuild",
        "lycoris_bypass",
        "ours_eager",
    }
    assert all(rows[name].error.startswith(NOT_COVERED) for name in set(rows) - done)
    for name in done:
        row = rows[name]
        assert row.wall_us is not None
        assert row.wall_cold_us is not None
        assert row.device_us is row.host_us is row.peak_bytes is row.launches is None
        assert row.floor_us is not None
        assert row.percent_of_floor == pytest.approx(100 * row.floor_us / row.wall_us.median)
        assert row.ratio_to_frozen == pytest.approx(row.wall_us.median / rows["frozen"].wall_us.median)
        assert row.ratio_to_chain == pytest.approx(row.wall_us.median / rows["einsum"].wall_us.median)
        assert row.kernels
        assert row.truth_tokens == 40
    assert rows["frozen"].floor_us < rows["ours_eager"].floor_us
    assert any(name.startswith("kronafuse::") for name in rows["ours_eager"].kernels)


def test_failing_arms_become_rows_and_stop_nothing():
    calls = []

    def late(problem: KronProblem):
        built = adapted(problem, eager_chain)

        def forward():
            calls.append(1)
            if len(calls) > 8:
                raise MemoryError("out of\n memory")
            return built.forward()

        return replace(built, forward=forward)

    def broken(_problem: KronProblem):
        raise RuntimeError("does not build")

    lost = Arm("lost", EINSUM.build, evidence=lambda: ("never_seen_kernel",))
    rows = run_small([FROZEN, off_by(1.1), Arm("late", late), Arm("broken", broken), lost, EINSUM])
    assert rows["off"].error is not None
    assert rows["off"].error.startswith("WrongArm: y0: RMS error")
    assert rows["late"].error == "while it was timed: MemoryError: out of memory"
    assert rows["broken"].error == "RuntimeError: does not build"
    assert rows["lost"].error is not None
    assert rows["lost"].error.startswith("WrongArm: lost did not run: none of never_seen_kernel")
    for name in ("off", "late", "broken", "lost"):
        assert rows[name].wall_us is rows[name].accuracy is None
    assert rows["frozen"].error is rows["einsum"].error is None


def test_the_profiler_sees_our_operators():
    problem = spec_of(SMALL["fat-lokr"]).make()
    seen = observe(step_of(arm_named("ours_eager").build(problem), problem), CPU)
    assert not seen.lacks(EVIDENCE["eager"]())
    assert seen.lacks(("kronafuse_cuda::",))
    assert not seen.lacks(())
    assert seen.kernels == ()
    assert seen.launches is None


def test_triton_kernels_are_known_by_name():
    from kronafuse.ops.bottleneck import kernels as _bottleneck  # noqa: F401
    from kronafuse.ops.kron_linear import kernels as _linear  # noqa: F401

    names = triton_kernel_names()
    assert any("linear" in name for name in names)
    assert "_kernel" not in names
    assert len(names) >= 6


def test_copies_exceed_the_cache_and_lie_elsewhere():
    problem = spec_of(SMALL["thin-krona"]).make()
    size = problem.read_bytes()
    copies, notes = copies_of(problem, 10 * size)
    assert len(copies) == 11
    assert notes == ()
    assert len({copy.x.data_ptr() for copy in copies}) == 11
    assert len({copy.layers[0].weight.data_ptr() for copy in copies}) == 11
    assert all(torch.equal(copy.x, problem.x) for copy in copies)
    few, notes = copies_of(problem, 1000 * size)
    assert len(few) == 64
    assert notes == (f"cold: 64 copies of {size} bytes read, less than {1000 * size} bytes together",)


def test_what_is_written_does_not_make_the_cache_cold():
    """y, and dy where nothing is trained, are not read."""
    forward, both = (spec_of(SMALL["thin-krona"], mode).make() for mode in ("forward", "forward_backward"))
    x_and_weight, factors, dy = 4 * (40 * 64 + 48 * 64), 4 * (16 * 2 + 3 * 32), 4 * 40 * 48
    assert forward.read_bytes() == x_and_weight + factors
    assert both.read_bytes() == x_and_weight + factors + dy
    assert forward.size_bytes() == both.size_bytes() == both.read_bytes()
    narrow = [spec_of(NARROW, mode).make() for mode in ("forward", "forward_backward")]
    assert narrow[1].read_bytes() - narrow[0].read_bytes() == 4 * 40 * 24


def test_costs_are_those_of_the_planner():
    case = CASES["sdxl_1280-krona_64x4"]
    spec = Spec("kron_linear", case, 1, 1024, torch.bfloat16, "forward", CPU, torch.bfloat16)
    frozen, ours = cost(spec, adapted=False), cost(spec)
    assert frozen.flops == 2 * 1024 * 1280 * 1280
    assert frozen.size_bytes == 2 * (2 * 1024 * 1280 + 1280 * 1280)
    assert ours.flops == frozen.flops + 2 * 1024 * (20 * 1280 + 4 * 1280)
    assert ours.size_bytes == frozen.size_bytes + 2 * (64 * 4 + 20 * 320)
    both = replace(spec, mode="forward_backward")
    assert cost(both, adapted=False).flops == 2 * frozen.flops
    assert cost(both).flops == 2 * frozen.flops + 3 * (ours.flops - frozen.flops)
    group = cost(replace(spec, suite="kron_linear_group"), adapted=False)
    assert group.flops == 3 * frozen.flops
    assert group.size_bytes == frozen.size_bytes + 2 * 2 * (1024 * 1280 + 1280 * 1280)  # x is read once


def test_arms_are_chosen_by_name():
    chosen = arms_named(["kron_linear", "bottleneck"], ["peft*", "minimal"])
    assert [arm.name for arm in chosen["kron_linear"]] == [
        "frozen", "peft_lokr", "peft_lokr_autocast", "peft_lora_r16", "einsum",
    ]  # fmt: skip
    assert [arm.name for arm in chosen["bottleneck"]] == ["chain", "minimal"]
    assert set(CHAINS) == set(ARMS)
    with pytest.raises(ValueError, match="no arm of bottleneck matches 'fastest'; there are chain, minimal"):
        arms_named(["bottleneck"], ["fastest"])
