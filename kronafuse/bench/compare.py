"""What changed between two runs, with the spread that tells a change from noise."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Results, Row, Spread, StepRow


@dataclass(frozen=True)
class Change:
    """One arm in both runs; percent above 0 is slower. `equal`: the two cannot be told apart."""

    what: str
    arm: str
    before: Spread
    after: Spread
    unit: str
    basis: str

    @property
    def percent(self) -> float:
        """Of the median before."""
        return 100 * (self.after.median / self.before.median - 1)

    @property
    def equal(self) -> bool:
        """Whether the intervals overlap."""
        return self.before.equals(self.after)


@dataclass(frozen=True)
class Comparison:
    """Changes, arms with figures in one run only, and why the machines differ, if they do."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    different: tuple[str, ...]

    def worst(self) -> float:
        """The largest slowdown in percent among what can be told apart; 0 where nothing is slower."""
        return max(
            (each.percent for each in self.changes if not each.equal and each.percent > 0), default=0.0
        )


def compare_results(before: Results, after: Results, *, relative: bool) -> Comparison:
    """Rows of the same problem and arm, and steps of the same model, arm and form.

    relative: times over the frozen layer's (of a bottleneck: the chain's) in the same run, so that runs of
              different machines or clocks can be compared
    """
    old, new = _spreads(before, relative), _spreads(after, relative)
    changes = tuple(
        Change(*key, old[key][0], new[key][0], new[key][1], new[key][2]) for key in new if key in old
    )
    return Comparison(
        changes,
        tuple(f"{what}, {arm}" for what, arm in old if (what, arm) not in new),
        tuple(f"{what}, {arm}" for what, arm in new if (what, arm) not in old),
        _differences(before, after),
    )


def _spreads(results: Results, relative: bool) -> dict[tuple[str, str], tuple[Spread, str, str]]:
    """(problem, arm) -> times, their unit, and what they are."""
    found = {}
    for row in results.rows:
        spent = _relative(row) if relative else row.time_us
        if spent is not None and row.error is None:
            what = f"{row.suite} {row.case}, {row.tokens} tokens, {row.dtype}, {row.mode}"
            unit = "×" if relative else "µs"
            found[what, row.arm] = spent, unit, "device" if row.device_us else "wall"
    for step in results.steps:
        spent = _relative_step(step) if relative else step.step_ms
        if spent is not None:
            found[f"{step.model}, batch {step.batch}, {step.form}", step.arm] = (
                spent,
                "×" if relative else "ms",
                "step",
            )
    return found


def _relative(row: Row) -> Spread | None:
    ratio = row.ratio_to_chain if row.suite == "bottleneck" else row.ratio_to_frozen
    return _scaled(row.time_us, ratio)


def _relative_step(step: StepRow) -> Spread | None:
    return _scaled(step.step_ms, step.ratio_to_frozen)


def _scaled(spread: Spread | None, ratio: float | None) -> Spread | None:
    """The spread of the arm's own times around its ratio."""
    if spread is None or ratio is None:
        return None
    factor = ratio / spread.median
    passes = tuple(factor * each for each in spread.passes)
    return Spread(ratio, factor * spread.low, factor * spread.high, spread.rounds, passes)


def _differences(before: Results, after: Results) -> tuple[str, ...]:
    """What of the machines and versions is not the same, and so may be the reason for a change."""
    found = []
    for name in ("python", "torch", "triton", "peft", "lycoris", "diffusers"):
        old, new = getattr(before.machine, name), getattr(after.machine, name)
        if old != new:
            found.append(f"{name}: {old}, then {new}")
    tables = before.machine.tuned, after.machine.tuned
    if tables[0] != tables[1]:
        found.append(f"tuned table: {tables[0] or 'unknown'}, then {tables[1] or 'unknown'}")
    cpu, other = before.machine.cpu, after.machine.cpu
    if (cpu.brand, cpu.threads) != (other.brand, other.threads):
        found.append(f"CPU: {cpu.brand} with {cpu.threads} threads, then {other.brand} with {other.threads}")
    gpu = before.machine.gpu.name if before.machine.gpu else None
    later = after.machine.gpu.name if after.machine.gpu else None
    if gpu != later:
        found.append(f"GPU: {gpu}, then {later}")
    return tuple(found)
