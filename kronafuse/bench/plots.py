"""Plots of one run: speed beside the frozen layer, the roofline, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .best import Problem, best_baseline, by_problem
from .records import Results, Row

DPI = 120
WIDTH_INCHES = 12.0


def plots(results: Results) -> dict[str, bytes]:
    """Name -> PNG; what the results do not hold is left out."""
    measured = {problem: arms for problem, arms in by_problem(results.rows).items() if arms}
    found: dict[str, bytes] = {}
    for suite, mode in dict.fromkeys((suite, mode) for suite, *_, mode in measured):
        chosen = {
            problem: arms for problem, arms in measured.items() if (problem[0], problem[-1]) == (suite, mode)
        }
        found[f"speed_{suite}_{mode}"] = _png(_speed(suite, mode, chosen))
    if results.ceilings is not None and measured:
        found["roofline"] = _png(_roofline(results, measured))
    if any(row.peak_bytes is not None for row in results.rows):
        found["memory"] = _png(_memory(measured))
    return found


def _png(figure: Figure) -> bytes:
    figure.legend(loc="outside lower center", fontsize=7, ncols=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _label(problem: Problem) -> str:
    _, case, _, tokens, dtype, _ = problem
    return f"{case}\n{tokens} tokens, {dtype}"


def _bars(axes: Axes, measured: Mapping[Problem, Mapping[str, float]]) -> None:
    """Groups of bars: a group a problem, a bar an arm."""
    arms = list(dict.fromkeys(arm for each in measured.values() for arm in each))
    colors = colormaps["tab20"].resampled(max(len(arms), 1))
    width = 0.8 / max(len(arms), 1)
    for number, arm in enumerate(arms):
        at = [index for index, each in enumerate(measured.values()) if arm in each]
        heights = [each[arm] for each in measured.values() if arm in each]
        edge = "black" if arm.startswith("ours") else "none"
        axes.bar(
            [place + (number - len(arms) / 2 + 0.5) * width for place in at], heights, width,
            label=arm, color=colors(number), edgecolor=edge,
        )  # fmt: skip
    axes.set_xticks(
        range(len(measured)), [_label(each) for each in measured], rotation=30, ha="right", fontsize=7
    )


def _figure(groups: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(max(WIDTH_INCHES, 1.5 * groups), 5.5), layout="constrained")
    return figure, figure.subplots()


def _speed(suite: str, mode: str, measured: Mapping[Problem, Mapping[str, Row]]) -> Figure:
    figure, axes = _figure(len(measured))
    yardstick = "chain" if suite == "bottleneck" else "frozen"
    speeds = {}
    for problem, arms in measured.items():
        ratios = {
            arm: row.ratio_to_chain if suite == "bottleneck" else row.ratio_to_frozen
            for arm, row in arms.items()
        }
        speeds[problem] = {arm: 1 / ratio for arm, ratio in ratios.items() if ratio}
    _bars(axes, speeds)
    axes.axhline(1.0, color="black", linewidth=0.8)
    what = "the eager chain" if yardstick == "chain" else "the frozen layer"
    axes.set_ylabel(f"speed; 1 is {what}")
    axes.set_title(f"{suite}, {mode.replace('_', ' + ')}: higher is faster")
    return figure


def _roofline(results: Results, measured: Mapping[Problem, Mapping[str, Row]]) -> Figure:
    """FLOP/s over FLOPs a byte, under the measured ceilings: ours and the best baseline."""
    figure, axes = _figure(0)
    ceilings = results.ceilings
    assert ceilings is not None
    points: dict[str, list[tuple[float, float]]] = {}
    for arms in measured.values():
        best = best_baseline(arms)
        shown = [row for row in arms.values() if row.impl is not None or row.arm in ("frozen", "chain")]
        for row in [*shown, *([best] if best is not None and best not in shown else [])]:
            if row.flops and row.bytes_moved and row.from_memory_us:
                name = row.arm if row in shown else "best baseline"
                rate = row.flops / (row.from_memory_us.median * 1e-6)
                points.setdefault(name, []).append((row.flops / row.bytes_moved, rate))
    for name, values in points.items():
        axes.scatter(*zip(*values, strict=True), label=name, s=18)
    ends = _ends([x for values in points.values() for x, _ in values])
    for dtype, peak in ceilings.gemm_flops_per_s.items():
        ridge = peak / ceilings.copy_bytes_per_s
        xs = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
        axes.plot(xs, [min(peak, x * ceilings.copy_bytes_per_s) for x in xs], label=f"ceiling, {dtype}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte that must move")
    axes.set_ylabel("FLOP/s")
    axes.set_title("Roofline of this machine's own copy and GEMM")
    return figure


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return (min(values) / 2, max(values) * 2) if values else (1.0, 1000.0)


def _memory(measured: Mapping[Problem, Mapping[str, Row]]) -> Figure:
    groups = {
        problem: {arm: row.peak_bytes / 1e6 for arm, row in arms.items() if row.peak_bytes is not None}
        for problem, arms in measured.items()
        if problem[-1] == "forward_backward" and any(row.peak_bytes is not None for row in arms.values())
    }
    figure, axes = _figure(len(groups))
    _bars(axes, groups)
    axes.set_ylabel("MB above what was there before the call")
    axes.set_title("Peak memory of one call, forward + backward: lower is better")
    return figure
