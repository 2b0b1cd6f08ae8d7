"""What was promised for a CPU, by wall time: of the implementation that `auto` takes there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .best import Problem, no_slower, times_faster
from .promises import Target, at_least, at_most, verdict_of, with_failures
from .records import Row, Verdict

FASTER_THAN_PEFT = {"sdxl_1280-krona_64x4": 2.0, "sdxl_1280-lokr_f8": 1.5}
"""Case -> times faster than PEFT LoKr in float32, at `TOKENS` and forward + backward as all that follows."""
TO_FROZEN = {
    ("sdxl_1280-krona_64x4", "float32"): 1.15,
    ("sdxl_1280-krona_64x4", "bfloat16"): 1.5,
    ("sdxl_1280-lokr_f8", "float32"): 1.35,
    ("sdxl_1280-lokr_f8", "bfloat16"): 2.0,
}
"""Case and dtype -> largest ratio of the native implementation to the frozen layer."""
TOKENS = 2048

Arms = Mapping[str, Row]
Measured = Mapping[Problem, Arms]


def cpu_targets(measured: Measured, failed: Sequence[Row]) -> list[Target]:
    """All of them; `failed` are rows of ours without figures."""
    return [
        _nowhere_slower(
            measured, failed, ("kron_linear", "kron_linear_group"), "einsum", "the best eager order"
        ),
        _nowhere_slower(measured, failed, ("bottleneck",), "chain", "the chain"),
        *(_faster_than_peft(measured, failed, case, limit) for case, limit in FASTER_THAN_PEFT.items()),
        *(_to_frozen(measured, failed, *key, limit) for key, limit in TO_FROZEN.items()),
    ]


def auto_takes(arms: Arms) -> Row | None:
    """The row of the implementation that `auto` takes on a CPU, of those that ran."""
    return arms.get("ours_cpu") or arms.get("ours_eager")


def _nowhere_slower(
    measured: Measured, failed: Sequence[Row], suites: tuple[str, ...], chain: str, what: str
) -> Target:
    pairs = [
        (ours, arms[chain])
        for (suite, *_), arms in measured.items()
        if suite in suites and chain in arms and (ours := auto_takes(arms)) is not None
    ]
    ratios = [1 / times_faster(ours, other) for ours, other in pairs]
    slower = sum(not no_slower(ours, other) for ours, other in pairs)
    figure = f"slower on {slower}, ratios {min(ratios):.2f} to {max(ratios):.2f}" if pairs else ""
    verdict: Verdict = verdict_of(slower == 0) if pairs else "not measured"
    name = "ours, adapted layers" if chain == "einsum" else "ours, bottlenecks"
    target = Target(name, f"nowhere slower than {what}", figure, len(pairs), verdict)
    return with_failures(target, (row for row in failed if row.suite in suites))


def _faster_than_peft(measured: Measured, failed: Sequence[Row], case: str, limit: float) -> Target:
    ratios = [
        times_faster(ours, arms["peft_lokr"])
        for arms in _training(measured, case, "float32")
        if "peft_lokr" in arms and (ours := auto_takes(arms)) is not None
    ]
    target = at_least(f"ours, PEFT LoKr, {case}, {TOKENS} tokens", limit, ratios)
    return with_failures(target, _asked(failed, case, "float32"))


def _to_frozen(measured: Measured, failed: Sequence[Row], case: str, dtype: str, limit: float) -> Target:
    ratios = [
        1 / times_faster(arms["ours_cpu"], arms["frozen"])
        for arms in _training(measured, case, dtype)
        if "ours_cpu" in arms and "frozen" in arms
    ]
    target = at_most(f"ours_cpu, {case}, {dtype}, {TOKENS} tokens", limit, ratios, " × frozen")
    return with_failures(target, (row for row in _asked(failed, case, dtype) if row.arm == "ours_cpu"))


def _training(measured: Measured, case: str, dtype: str) -> list[Arms]:
    """The arms of one case's training step at `TOKENS`."""
    asked = ("kron_linear", case, TOKENS, dtype, "forward_backward")
    return [
        arms
        for (suite, name, _batch, tokens, kind, mode), arms in measured.items()
        if (suite, name, tokens, kind, mode) == asked
    ]


def _asked(failed: Iterable[Row], case: str, dtype: str) -> list[Row]:
    """Rows of that step without figures."""
    asked = ("kron_linear", case, TOKENS, dtype, "forward_backward")
    return [row for row in failed if (row.suite, row.case, row.tokens, row.dtype, row.mode) == asked]
