"""What was promised, against what was measured: per case, and in the geometric mean.

On CUDA the figures are of device time by graph replay in bfloat16, over cases whose frozen layer takes at least
`LONG_US`; a smaller one may instead take the launches it makes, each as long as an empty one, and a tenth more.
On a CPU they are of wall time: `cpu_targets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..testing.bottleneck_cases import CASES as BOTTLENECK_CASES
from ..testing.cases import CASES
from .best import Problem, by_problem, no_slower, same_basis, times_faster
from .cpu_targets import cpu_targets
from .promises import Target, at_least, at_most, every, known, mean_within, verdict_of, with_failures
from .records import NOT_COVERED, Ceilings, Results, Row

LONG_US = 15.0
LAUNCH_SLACK = 1.1
TO_FROZEN = {
    (True, "forward"): 1.18,
    (True, "forward_backward"): 1.25,
    (False, "forward"): 1.20,
    (False, "forward_backward"): 1.30,
}
"""Thin or fat, and mode -> largest ratio to the frozen layer."""
LYCORIS_ARMS = ("lycoris_rebuild", "lycoris_bypass", "lycoris_bypass_auto", "lycoris_bypass_triton")
FASTER_THAN_LYCORIS, FASTER_THAN_AUTOCAST, FASTER_THAN_PEFT = 1.3, 2.2, 4.0
HOST_US = 15.0
"""Host time of our CUDA implementation beyond the frozen layer's, with gradients."""
COPY_SHARE, NARROW, BOTTLENECK_FASTER = 0.75, 160, 2.0
"""Of the copy bandwidth, forward, at widths up to NARROW; times faster than eager, forward and backward."""

Arms = Mapping[str, Row]
Measured = Mapping[Problem, Arms]


def targets(results: Results) -> list[Target]:
    """All targets of the machine that ran; without a case to judge one by, it is not measured.

    A case on which ours is wrong or fails has no figure; what it would be judged by is then missed.
    """
    measured = by_problem(results.rows)
    failed = [row for row in results.rows if _has_failed(row)]
    if results.machine.gpu is None:
        return cpu_targets(measured, failed)
    found = []
    for impl in dict.fromkeys(row.impl for row in results.rows if row.impl in ("triton", "cuda")):
        found += _cuda(measured, f"ours_{impl}", results.ceilings, failed)
    return found


def _has_failed(row: Row) -> bool:
    """Whether it is ours and has no figures, though nothing was said against the case."""
    return row.impl is not None and row.error is not None and not row.error.startswith(NOT_COVERED)


def lines(results: Results) -> list[str]:
    """The targets, one a line."""
    return [
        f"target {each.verdict}: {each.name}, {each.limit}: {each.figure} ({each.cases} cases)"
        for each in targets(results)
    ]


def judged(rows: Sequence[Row], ceilings: Ceilings | None) -> list[Row]:
    """The rows of one case, ours with the target of the case and whether it is met."""
    arms = next(iter(by_problem(rows).values()), {})
    return [
        _judged(row, arms, ceilings) if row.impl is not None and row.error is None else row for row in rows
    ]


def _judged(row: Row, arms: Arms, ceilings: Ceilings | None) -> Row:
    if row.device_us is None:
        chain = arms.get("chain" if row.suite == "bottleneck" else "einsum")
        if chain is None or row.arm == chain.arm or not same_basis(row, chain):
            return row
        return replace(row, target="no slower than the chain", verdict=verdict_of(no_slower(row, chain)))
    if row.suite == "bottleneck":
        return _judged_bottleneck(row, ceilings)
    limit = TO_FROZEN[bool(row.thin), row.mode]
    if row.ratio_to_frozen is None:
        return row
    met = row.ratio_to_frozen <= limit or within_launches(row, arms, ceilings)
    return replace(row, target=f"≤ {limit} × frozen", verdict=verdict_of(met))


def _judged_bottleneck(row: Row, ceilings: Ceilings | None) -> Row:
    share = copy_share(row, ceilings)
    if row.mode == "forward_backward" and row.ratio_to_chain is not None:
        met = row.ratio_to_chain <= 1 / BOTTLENECK_FASTER
        return replace(row, target=f"≥ {BOTTLENECK_FASTER} × eager", verdict=verdict_of(met))
    if row.mode == "forward" and share is not None and _narrow(row):
        return replace(row, target=f"≥ {COPY_SHARE:.0%} of copy", verdict=verdict_of(share >= COPY_SHARE))
    return row


def is_long(arms: Arms) -> bool:
    """Whether the frozen layer takes long enough for ratios to say something."""
    frozen = arms.get("frozen")
    return frozen is not None and frozen.device_us is not None and frozen.device_us.median >= LONG_US


def within_launches(row: Row, arms: Arms, ceilings: Ceilings | None) -> bool:
    """Whether a small case takes no longer than its launches and a tenth."""
    if is_long(arms) or ceilings is None or ceilings.launch_us is None or row.launches is None:
        return False
    assert row.device_us is not None
    return row.device_us.median <= LAUNCH_SLACK * row.launches * ceilings.launch_us


def copy_share(row: Row, ceilings: Ceilings | None) -> float | None:
    """Bytes that must move, over the time, as a part of the copy bandwidth."""
    if ceilings is None or row.bytes_moved is None or row.from_memory_us is None:
        return None
    return row.bytes_moved / (row.from_memory_us.median * 1e-6) / ceilings.copy_bytes_per_s


def _narrow(row: Row) -> bool:
    case = BOTTLENECK_CASES.get(row.case)
    return case is not None and case.width <= NARROW


def _cuda(measured: Measured, arm: str, ceilings: Ceilings | None, failed: Sequence[Row]) -> list[Target]:
    found = []
    failed = [row for row in failed if row.arm == arm and row.dtype == "bfloat16"]
    broken = [row for row in failed if row.suite == "kron_linear"]
    broken_training = [row for row in broken if row.mode == "forward_backward"]
    broken_lokr = [row for row in broken_training if _has_lokr(row)]
    measured = {problem: _on_device(arms) for problem, arms in measured.items()}
    long = [
        arms
        for (suite, *_, dtype, _mode), arms in measured.items()
        if suite == "kron_linear" and dtype == "bfloat16" and arm in arms and is_long(arms)
    ]
    for (thin, mode), limit in TO_FROZEN.items():
        ratios = [
            arms[arm].ratio_to_frozen for arms in long if (arms[arm].thin, arms[arm].mode) == (thin, mode)
        ]
        kind = "thin" if thin else "fat"
        target = at_most(f"{arm}, {kind}, {mode}", limit, known(ratios), " × frozen")
        without = [row for row in broken if (row.thin, row.mode) == (thin, mode)]
        found.append(with_failures(target, without))
    training = [arms for arms in long if arms[arm].mode == "forward_backward"]
    lycoris = [ratio for arms in training if (ratio := _faster(arms, arm, LYCORIS_ARMS)) is not None]
    for target in (
        at_least(f"{arm}, LyCORIS' best mode, forward_backward", FASTER_THAN_LYCORIS, lycoris),
        every(f"{arm}, LyCORIS' best mode, each case", "no slower", lycoris, lambda r: r >= 1, " ×"),
    ):
        found.append(with_failures(target, broken_lokr))
    for other, limit in (("peft_lokr_autocast", FASTER_THAN_AUTOCAST), ("peft_lokr", FASTER_THAN_PEFT)):
        ratios = [_faster(arms, arm, (other,)) for arms in training]
        target = at_least(f"{arm}, {other}, forward_backward", limit, known(ratios))
        found.append(with_failures(target, broken_lokr))
    small = [
        arms
        for (suite, *_, dtype, _mode), arms in measured.items()
        if suite == "kron_linear"
        and dtype == "bfloat16"
        and arm in arms
        and "frozen" in arms
        and not is_long(arms)
    ]
    shares = [share for arms in small if (share := _launch_share(arms[arm], ceilings)) is not None]
    found.append(
        every(
            f"{arm}, frozen layer below {LONG_US:.0f} µs", f"at most {LAUNCH_SLACK} × its launches", shares,
            lambda share: share <= LAUNCH_SLACK, " ×",
        )
    )  # fmt: skip
    if arm == "ours_cuda":
        host = [_host_beyond(arms, arm) for arms in (*long, *small) if arms[arm].mode == "forward_backward"]
        found.append(
            every(
                f"{arm}, host time beyond frozen", f"at most {HOST_US:.0f} µs", known(host),
                lambda spent: spent <= HOST_US, " µs",
            )
        )  # fmt: skip
    broken_forward = [row for row in broken if row.mode == "forward"]
    found.append(with_failures(_memory(long, arm), broken_forward))
    return found + _cuda_bottleneck(measured, arm, ceilings, failed)


def _on_device(arms: Arms) -> Arms:
    """The arms with device time: others compare with none of them."""
    return {name: row for name, row in arms.items() if row.device_us is not None}


def _has_lokr(row: Row) -> bool:
    """Whether other libraries' LoKr computes the case."""
    case = CASES.get(row.case)
    return case is None or (case.has_a and not case.shuffled)


def _cuda_bottleneck(
    measured: Measured, arm: str, ceilings: Ceilings | None, failed: Sequence[Row]
) -> list[Target]:
    failed = [row for row in failed if row.suite == "bottleneck" and _narrow(row)]
    rows = [arms[arm] for (suite, *_), arms in measured.items() if suite == "bottleneck" and arm in arms]
    rows = [row for row in rows if row.dtype == "bfloat16" and _narrow(row)]
    shares = [copy_share(row, ceilings) for row in rows if row.mode == "forward"]
    ratios = [row.ratio_to_chain for row in rows if row.mode == "forward_backward"]
    found = [
        mean_within(
            f"{arm}, bottleneck, forward", f"at least {COPY_SHARE:.0%} of the copy bandwidth", known(shares),
            lambda mean: mean >= COPY_SHARE,
        ),
        at_least(
            f"{arm}, bottleneck, eager chain, forward_backward", BOTTLENECK_FASTER,
            [1 / ratio for ratio in known(ratios)],
        ),
    ]  # fmt: skip
    return [
        with_failures(target, (row for row in failed if row.mode == mode))
        for target, mode in zip(found, ("forward", "forward_backward"), strict=True)
    ]


def _memory(long: Sequence[Arms], arm: str) -> Target:
    """What a forward allocates beyond y and a thin T, over the smallest buffer that must not be there."""
    shares = []
    for arms in long:
        row, case = arms[arm], CASES.get(arms[arm].case)
        if row.mode != "forward" or row.peak_bytes is None or case is None:
            continue
        size = 2
        y, dense = row.tokens * case.shape.n * size, case.shape.n * case.shape.k * size
        forbidden = dense if row.thin else min(dense, y)
        thin_t = row.tokens * min(256, case.shape.k // 4) * size if row.thin else 0
        shares.append(max(0.0, row.peak_bytes - y - thin_t) / forbidden)
    return every(
        f"{arm}, memory beyond y, forward",
        "no N×K, nothing M×N",
        shares,
        lambda share: share < 1,
        " × such a buffer",
    )


def _launch_share(row: Row, ceilings: Ceilings | None) -> float | None:
    if ceilings is None or ceilings.launch_us is None or not row.launches or row.device_us is None:
        return None
    return row.device_us.median / (row.launches * ceilings.launch_us)


def _host_beyond(arms: Arms, arm: str) -> float | None:
    ours, frozen = arms[arm].host_us, arms["frozen"].host_us
    return None if ours is None or frozen is None else ours.median - frozen.median


def _faster(arms: Arms, arm: str, others: Sequence[str]) -> float | None:
    """How many times faster than the fastest of the others; None where none of them ran."""
    ratios = [
        times_faster(arms[arm], arms[other])
        for other in others
        if other in arms and same_basis(arms[arm], arms[other])
    ]
    return min(ratios, default=None)
