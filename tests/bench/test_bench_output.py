"""What a run is turned into: tables, documents, plots, a page, a comparison."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

import pytest
from kronafuse.bench.best import best_baseline, by_problem, times_faster
from kronafuse.bench.compare import compare_results
from kronafuse.bench.machine import describe
from kronafuse.bench.markdown import filled, table_of
from kronafuse.bench.records import Accuracy, Ceilings, Gpu, Results, Row, Spread, StepRow
from kronafuse.bench.report import NAME, write_report
from kronafuse.bench.tables import COLUMNS, cells, left_out, machine_lines, problem_table
from PIL import Image
from rich.console import Console

TIMES = {
    "frozen": 1000.0,
    "peft_lokr": 3000.0,
    "peft_lora_r16": 1100.0,
    "einsum": 1500.0,
    "ours_eager": 1250.0,
}


def spread(median: float) -> Spread:
    return Spread(median, 0.98 * median, 1.02 * median, 10, (median, median))


def row(arm: str, median: float, **changes) -> Row:
    base = Row(
        "kron_linear", "sdxl_1280-krona_64x4", 1, 1024, "float32", "forward", arm,
        impl="eager" if arm == "ours_eager" else None, wall_us=spread(median), wall_cold_us=spread(1.1 * median),
        ratio_to_frozen=median / 1000, ratio_to_chain=median / 1500, flops=2_000_000, bytes_moved=50_000,
        floor_us=500.0, percent_of_floor=100 * 500 / median, accuracy=Accuracy(1e-7, 1e-6, 2e-7, 3e-6),
        kernels=("aten::mm",), truth_tokens=512,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture
def results() -> Results:
    rows = [row(arm, median) for arm, median in TIMES.items()]
    rows.append(
        replace(row("ours_cuda", 1.0), impl="cuda", wall_us=None, error="does not cover this case: <none>")
    )
    rows.append(row("frozen", 2000.0, mode="forward_backward"))
    step = StepRow("sd15", 1, "ours_krona", "eager", Spread(20.0, 19.0, 21.0, 5), 1.1, 2**30, 12345)
    failed = StepRow("sd15", 1, "peft_lokr", "compiled", error="OutOfMemoryError: no room")
    machine = describe(["kronafuse", "bench", "run"])
    return Results(machine, Ceilings(1e10, {"float32": 1e11}), tuple(rows), (step, failed))


def text_of(table) -> str:
    console = Console(width=220, file=StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_best_baseline_computes_the_case_and_is_not_ours(results):
    arms = next(iter(by_problem(results.rows).values()))
    best = best_baseline(arms)
    assert best is not None
    assert best.arm == "einsum"
    assert times_faster(arms["ours_eager"], best) == pytest.approx(1.2)


def test_a_table_has_fixed_columns(results):
    group = [each for each in results.rows if each.mode == "forward"]
    text = text_of(problem_table(group))
    for name in COLUMNS:
        assert name in text
    ours = cells(group[4], group[3])
    assert ours[COLUMNS.index("time µs")] == "1250"
    assert ours[COLUMNS.index("±")] == "2 %"
    assert ours[COLUMNS.index("× frozen")] == "1.25"
    assert ours[COLUMNS.index("× best")] == "1.20"
    assert ours[COLUMNS.index("% floor")] == "40"
    assert ours[COLUMNS.index("TFLOP/s")] == "0.0016"
    assert ours[COLUMNS.index("RMS Δ")] == "2.0e-07"
    assert cells(group[3], group[3])[COLUMNS.index("× best")] == ""
    assert cells(row("ours_eager", 1510.0), group[3])[COLUMNS.index("× best")] == "="
    assert "ours_cuda" not in text
    assert left_out(group) == ["ours_cuda: does not cover this case: <none>"]


def test_notes_that_arms_share_are_one_line(results):
    rows = [replace(each, notes=("parameters in float32",)) for each in results.rows[:2]]
    assert left_out(rows) == ["frozen, peft_lokr: parameters in float32"]


def test_the_machine_is_told_in_a_few_lines(results):
    gpu = Gpu("NVIDIA H200", "9.0", 132, 2**37, 2**26, "13.0", "580", None)
    machine = replace(results.machine, gpu=gpu, dirty=True, commit="abc")
    text = "\n".join(machine_lines(machine, Ceilings(1e10, {"float32": 1e11}, 1.5)))
    assert "NVIDIA H200, sm_90, 132 multiprocessors, 64 MiB L2, driver 580, CUDA 13.0" in text
    assert "commit abc with changes" in text
    assert "ceilings: copy 10 GB/s, float32 GEMM 0.1 TFLOP/s, 1.5 µs a launch" in text
    assert "command: kronafuse bench run" in text


def test_plots_are_images_of_what_was_measured(results, tmp_path):
    folder = tmp_path / "report"
    written = write_report(results, folder)
    names = {path.name for path in written}
    assert names == {
        NAME, "speed_kron_linear_forward.png", "speed_kron_linear_forward_backward.png", "roofline.png",
    }  # fmt: skip
    for path in written[1:]:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 1000
    with_memory = [replace(each, peak_bytes=10**6) for each in results.rows if each.error is None]
    names = {path.name for path in write_report(replace(results, rows=tuple(with_memory)), folder)}
    assert "memory.png" in names


def test_the_page_needs_no_other_file(results, tmp_path):
    write_report(results, tmp_path)
    page = (tmp_path / NAME).read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;none&gt;" in page  # texts are escaped
    assert "OutOfMemoryError: no room" in page
    assert "12,345" in page
    assert "sdxl_1280-krona_64x4" in page
    assert "{{" not in page


def test_a_run_without_figures_still_makes_a_page(results, tmp_path):
    failed = tuple(replace(each, error="wrong", wall_us=None) for each in results.rows)
    written = write_report(replace(results, rows=failed, steps=()), tmp_path)
    assert [path.name for path in written] == [NAME]


def test_markdown_tables(results):
    table = table_of("kron_linear", {}, results)
    assert (
        table[0]
        == "| case | tokens | dtype | mode | frozen | peft_lokr | peft_lora_r16 | einsum | ours_eager |"
    )
    assert table[2] == (
        "| `sdxl_1280-krona_64x4` | 1024 | float32 | forward | 1 ms | 3.00 | 1.10 | 1.50 | 1.25 |"
    )
    assert len(table_of("kron_linear", {"mode": "forward"}, results)) == 3
    steps = table_of("steps", {}, results)
    assert steps[2] == "| `sd15` | 1 | eager | ours_krona | 20 | 1.10 | 1.07 | 12,345 |"
    assert "OutOfMemoryError: no room" in steps[3]
    assert len(table_of("targets", {}, results)) == 10


def test_the_table_of_layers_counts_what_is_slower(results):
    slow = [
        replace(row(arm, median), case="sdxl_1280-lokr_f8")
        for arm, median in {**TIMES, "ours_eager": 1800.0}.items()
    ]
    lines = table_of("layers", {}, replace(results, rows=(*results.rows, *slow)))
    assert len(lines) == 3
    mean = (1250 / 1500 * 1800 / 1500) ** 0.5
    figures = f"2 | {mean:.2f} | 0.83 | 1.20 | 1 |"
    assert lines[2] == f"| `sdxl_1280` | 1024 | float32 | forward | {figures}"


def test_tables_are_written_between_their_marks(results, tmp_path):
    results.write(tmp_path / "bench.json")
    mark = "<!-- table: kron_linear mode=forward from bench.json -->"
    text = f"before\n\n{mark}\nold\n<!-- end -->\n\nafter\n"
    once = filled(text, tmp_path)
    assert once.startswith(f"before\n\n{mark}\n| case |")
    assert once.endswith("1.25 |\n<!-- end -->\n\nafter\n")
    assert "old" not in once
    assert filled(once, tmp_path) == once
    assert filled("no marks\n", tmp_path) == "no marks\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- table: speed from b.json -->\n<!-- end -->",
            "there is no table 'speed'; there are kron_linear",
        ),
        (
            "<!-- table: kron_linear from b.json -->\n",
            "the table kron_linear from b.json has no <!-- end -->",
        ),
        (
            "<!-- table: steps from b.json -->\n<!-- table: steps from b.json -->\n<!-- end -->",
            "the table steps from b.json has no <!-- end -->",
        ),
        ("<!-- table: kron_linear colour=red from b.json -->\n<!-- end -->", "rows have no field 'colour'"),
        ("<!-- table: bottleneck from b.json -->\n<!-- end -->", "no row of bottleneck with figures"),
    ],
)
def test_wrong_marks_are_named(results, tmp_path, text, message):
    results.write(tmp_path / "b.json")
    with pytest.raises(ValueError, match=message):
        filled(text, tmp_path)


def slower(results: Results, arm: str, factor: float) -> Results:
    rows = [
        replace(
            each, wall_us=spread(factor * each.wall_us.median), ratio_to_frozen=factor * each.ratio_to_frozen
        )
        if each.arm == arm and each.wall_us is not None
        else each
        for each in results.rows
    ]
    return replace(results, rows=tuple(rows))


def test_changes_are_told_from_noise(results):
    same = compare_results(results, results, relative=False)
    assert len(same.changes) == 7
    assert all(each.equal for each in same.changes)
    assert same.worst() == 0.0
    noise = compare_results(results, slower(results, "ours_eager", 1.03), relative=False)
    assert noise.worst() == 0.0  # 3 % with a spread of 2 % on both sides
    worse = compare_results(results, slower(results, "ours_eager", 1.2), relative=False)
    (change,) = [each for each in worse.changes if not each.equal]
    assert (change.arm, change.basis, change.unit) == ("ours_eager", "wall", "µs")
    assert worse.worst() == pytest.approx(20.0)
    better = compare_results(slower(results, "ours_eager", 1.2), results, relative=False)
    assert better.worst() == 0.0


def test_ratios_can_be_compared_between_machines(results):
    cpu = replace(results.machine.cpu, brand="another")
    elsewhere = replace(
        slower(results, "ours_eager", 1.2), machine=replace(results.machine, cpu=cpu, torch="9")
    )
    found = compare_results(results, elsewhere, relative=True)
    assert found.worst() == pytest.approx(20.0)
    assert {each.unit for each in found.changes} == {"×"}
    assert any("another" in each for each in found.different)
    assert any(each.startswith("torch:") for each in found.different)


def test_what_is_in_one_run_only_is_named(results):
    fewer = replace(results, rows=results.rows[:3], steps=())
    found = compare_results(results, fewer, relative=False)
    assert len(found.changes) == 3
    assert any("einsum" in each for each in found.only_before)
    assert found.only_after == ()
    assert compare_results(fewer, results, relative=False).only_after
