"""Analysis of variance: the published cells, tables against their definitions, what is missing and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from kronafuse.nn.positions import PAIRS, SINKS, SOURCES
from kronafuse.study.anova.analysis import analyse
from kronafuse.study.anova.design import Design, make_design
from kronafuse.study.anova.linear import type_two
from kronafuse.study.anova.one_way import one_way
from kronafuse.study.anova.plots import interval, position_means
from kronafuse.study.anova.table import filtered, level, parse_condition, read_results
from PIL import Image
from scipy import stats

PUBLISHED = Path(__file__).with_name("published.csv")
"""The twenty cells of Xiang et al. 2023, arXiv 2303.18181: DreamBooth CLIP similarity, read from its figure."""

TRANSFORMER = ["source!=res_in,res_out,attn2_context"]


def crossed(replicates: int = 3, seed: int = 0, ragged: bool = False) -> pd.DataFrame:
    """Activations × scales with effects of both and noise; ragged, every other cell has one seed more."""
    random = np.random.default_rng(seed)
    rows = []
    for (a, activation), (b, scale) in itertools.product(
        enumerate(("relu", "silu", "identity")), enumerate((0.5, 1.0, 2.0, 4.0))
    ):
        for replicate in range(replicates + ragged * (a + b) % 2):
            value = 0.5 + 0.1 * a - 0.05 * b + 0.05 * random.standard_normal()
            rows.append(
                {
                    "id": f"{a}{b}{replicate}",
                    "activation": activation,
                    "scale": scale,
                    "seed": replicate,
                    "score": value,
                }
            )
    return pd.DataFrame(rows)


def positions(replicates: int = 2) -> pd.DataFrame:
    """All pairs with a score that depends on the source."""
    random = np.random.default_rng(1)
    return pd.DataFrame([
        {
            "id": f"{source}-{sink}-{seed}", "status": "finished", "family": "bottleneck", "source": source,
            "sink": sink, "scale": 1.0, "seed": seed, "score": SOURCES.index(source) + random.standard_normal(),
        }
        for source, sink in PAIRS
        for seed in range(replicates)
    ])  # fmt: skip


def design_of(table: pd.DataFrame, response: str = "score", **options: Any) -> Design:
    values = {"factors": None, "conditions": [], "allow_missing": False, **options}
    return make_design(table, response, **values)


def saved(table: pd.DataFrame, folder: Path, name: str = "results.csv") -> Path:
    path = folder / name
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ([], {"source": (9, 10, 12.1), "sink": (6, 13, 0.77)}),
        (TRANSFORMER, {"source": (6, 9, 13.8), "sink": (3, 12, 0.45)}),
    ],
    ids=["all_twenty", "transformer_blocks"],
)
def test_published_cells(
    tmp_path: Path, where: list[str], expected: dict[str, tuple[int, int, float]]
) -> None:
    analysis = analyse(PUBLISHED, tmp_path, response="clip_similarity", where=where)
    assert not analysis.design.replicated
    assert analysis.configurations == analysis.runs
    found = {
        each.factor: (each.df_between, each.df_within, each.f)
        for each in analysis.configurations
        if each.f is not None
    }
    for factor, (between, within, f) in expected.items():
        assert found[factor][:2] == (between, within)
        assert float(f"{found[factor][2]:.{3 if f > 1 else 2}g}") == f


def test_one_way_is_scipys() -> None:
    table = crossed(ragged=True)
    for result in one_way(design_of(table, allow_missing=True)):
        groups = [group["score"].to_numpy() for _, group in table.groupby(result.factor)]
        expected = stats.f_oneway(*groups)
        np.testing.assert_allclose(
            np.array([result.f, result.p], float), [expected.statistic, expected.pvalue], rtol=1e-10
        )


def residual_sum(columns: list[np.ndarray], values: np.ndarray) -> tuple[float, int]:
    """Residual sum of squares and rank of indicator columns beside a mean, by least squares alone."""
    matrix = np.column_stack([np.ones(len(values)), *columns])
    fitted = matrix @ np.linalg.lstsq(matrix, values, rcond=None)[0]
    return float(((values - fitted) ** 2).sum()), int(np.linalg.matrix_rank(matrix))


def indicators(design: Design, factor: str) -> np.ndarray:
    column = design.data[factor].to_numpy()
    return np.stack([column == level for level in design.factors[factor]], axis=1).astype(float)


@pytest.mark.parametrize("table", [crossed(ragged=True), positions()], ids=["full_rank", "rank_deficient"])
def test_type_two_is_its_definition(table: pd.DataFrame) -> None:
    """Sums of squares, degrees of freedom, F, p and effect sizes from differences of residual sums."""
    design = design_of(table, allow_missing=True)
    result = type_two(design)
    values = design.values
    full, rank = residual_sum([indicators(design, each) for each in design.factors], values)
    total = float(((values - values.mean()) ** 2).sum())
    ms = full / (len(values) - rank)
    assert (result.rank, result.df_residual) == (rank, len(values) - rank)
    np.testing.assert_allclose([result.ss_residual, result.ss_total], [full, total], rtol=1e-9)
    for term in result.terms:
        others = [indicators(design, each) for each in design.factors if each != term.factor]
        reduced, reduced_rank = residual_sum(others, values)
        df, ss = rank - reduced_rank, reduced - full
        assert term.df == df
        found = [term.ss, term.f, term.p, term.eta_squared, term.partial_eta_squared, term.omega_squared]
        f = ss / df / ms
        expected = [
            ss,
            f,
            stats.f.sf(f, df, len(values) - rank),
            ss / total,
            ss / (ss + full),
            (ss - df * ms) / (total + ms),
        ]
        np.testing.assert_allclose(np.array(found, float), expected, rtol=1e-7, atol=1e-12)


def test_aliased_positions_are_named(tmp_path: Path) -> None:
    """Of nine and six degrees of freedom seven and four can be told apart: the design falls into three parts."""
    analysis = analyse(saved(positions(), tmp_path), tmp_path, response="score")
    assert analysis.type_two.aliased == {"source": (7, 9), "sink": (4, 6)}
    (parts,) = analysis.type_two.parts
    assert parts.factors == ("source", "sink")
    assert {part["sink"] for part in parts.parts} == {
        ("attn1_in", "attn2_in", "ff_in", "block_out"), ("attn2_context",), ("res_in", "res_out"),
    }  # fmt: skip
    text = (tmp_path / "anova.md").read_text()
    assert "can be told from the other factors: source 7 of 9, sink 4 of 6" in text
    assert "No run connects these 3 parts" in text
    assert "(source: attn2_context, sink: attn2_context)" in text


def test_a_factor_aliased_whole_has_no_figures(tmp_path: Path) -> None:
    table = crossed()
    table["init"] = table["activation"].map({"relu": "one", "silu": "two", "identity": "three"})
    result = type_two(design_of(table, allow_missing=True))
    terms = {each.factor: each for each in result.terms}
    for name in ("activation", "init"):
        assert (terms[name].df, terms[name].nominal, terms[name].f, terms[name].p) == (0, 2, None, None)
    assert terms["scale"].df == 3
    analyse(saved(table, tmp_path), tmp_path, response="score", allow_missing=True)
    assert "| init (aliased) | 0 of 2 |  |  |  |  |  |  |" in (tmp_path / "anova.md").read_text()


def test_configurations_are_means_over_seeds() -> None:
    table = positions()
    design = design_of(table).over_configurations()
    assert len(design.data) == 20
    means = table.groupby(["source", "sink"])["score"].mean()
    for _, row in design.data.iterrows():
        assert row["score"] == pytest.approx(means[row["source"], row["sink"]])
    assert {each.factor: each.df_within for each in one_way(design)} == {"source": 10, "sink": 13}
    assert {each.factor: each.df_within for each in one_way(design_of(table))} == {"source": 30, "sink": 33}


def test_seeds_do_not_raise_the_f_over_configurations(tmp_path: Path) -> None:
    """Copies of every run under new seeds leave it as it is, and raise the one over runs."""
    table = positions(1)
    copies = pd.concat([table.assign(seed=seed) for seed in range(10)])
    once = analyse(saved(table, tmp_path), tmp_path / "once", response="score")
    often = analyse(saved(copies, tmp_path), tmp_path / "often", response="score")
    for before, after, pooled in zip(once.configurations, often.configurations, often.runs, strict=True):
        assert (after.df_between, after.df_within) == (before.df_between, before.df_within)
        assert (before.f, after.f) == (pytest.approx(after.f), pytest.approx(before.f))
        assert before.f is not None
        assert pooled.f is not None
        assert pooled.f > 2 * before.f
    text = (tmp_path / "often" / "anova.md").read_text()
    over_configurations = text.index("## One factor at a time, over configurations")
    over_runs = text.index("## One factor at a time, over runs")
    assert over_configurations < over_runs < text.index("(type II), over runs: seeds are replicates")
    text = (tmp_path / "once" / "anova.md").read_text()
    assert "## One factor at a time, over configurations" in text
    assert "over runs" not in text


def test_configurations_are_told_apart_by_every_axis() -> None:
    """Scales that are no factor here do not melt the configurations of an activation together."""
    design = design_of(crossed(), factors=["activation"])
    assert (len(design.configurations), len(design.data)) == (12, 36)
    (result,) = one_way(design.over_configurations())
    assert (result.df_between, result.df_within) == (2, 9)


def test_a_factor_with_one_configuration_a_level_has_no_replicate(tmp_path: Path) -> None:
    path = saved(crossed()[lambda table: table["scale"] == 1.0], tmp_path)
    analysis = analyse(path, tmp_path, response="score")
    (alone,), (pooled,) = analysis.configurations, analysis.runs
    assert (alone.f, alone.p, alone.df_within, alone.note) == (None, None, 0, "no replicate")
    assert pooled.f is not None
    assert "| activation | 2 | 0 |" in (tmp_path / "anova.md").read_text()
    assert "| no replicate |" in (tmp_path / "anova.md").read_text()
    numbers = json.loads((tmp_path / "anova.json").read_text())
    assert numbers["one_way_configurations"][0]["f"] is None
    assert numbers["one_way_runs"][0]["f"] == pytest.approx(pooled.f)


@pytest.mark.parametrize("name", ["results.csv", "results.parquet"])
def test_report_has_tables_plots_and_numbers(tmp_path: Path, name: str) -> None:
    path = saved(positions(), tmp_path, name)
    analysis = analyse(path, tmp_path / "out", response="score", where=["source!=ff_out"])
    out = tmp_path / "out"
    numbers = json.loads((out / "anova.json").read_text())
    text = (out / "anova.md").read_text()
    assert numbers["runs"] == len(analysis.design.data) == 38
    assert numbers["configurations"] == 19
    assert numbers["filters"] == ["source!=ff_out"]
    for name_of, results in (("configurations", analysis.configurations), ("runs", analysis.runs)):
        assert [each["factor"] for each in numbers[f"one_way_{name_of}"]] == ["source", "sink"]
        assert numbers[f"one_way_{name_of}"][0]["f"] == pytest.approx(results[0].f)
    assert [each["factor"] for each in numbers["type_two"]["terms"]] == ["source", "sink"]
    assert "| term | df | SS |" in text
    assert "No map of positions" not in text
    assert numbers["left_out"] == {"family": "one level: bottleneck", "scale": "one level: 1"}
    assert "- Left out: scale (one level: 1)" in text
    assert "`source!=ff_out`" in text
    assert "| family | bottleneck |" in text
    assert set(numbers["plots"].values()) == {"factor-source.png", "factor-sink.png", "positions.png"}
    for plot in numbers["plots"].values():
        assert f"]({plot})" in text
        with Image.open(out / plot) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
    assert {each.name for each in out.iterdir()} == {"anova.json", "anova.md", *numbers["plots"].values()}


def test_position_means_leave_illegal_and_missing_pairs_empty() -> None:
    table = positions()
    table = table[table["source"] != "ff_out"]
    means = position_means(design_of(table, allow_missing=True))
    assert means.shape == (10, 7)
    filled = {
        (SOURCES[row], SINKS[column]) for row, column in zip(*np.nonzero(~np.isnan(means)), strict=True)
    }
    assert filled == {pair for pair in PAIRS if pair[0] != "ff_out"}


def test_interval_is_students() -> None:
    values = np.array([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(interval(values), expected)
    assert interval(values[:1]) == (1.0, 1.0)


def test_missing_responses_and_pairs_are_listed(tmp_path: Path) -> None:
    table = positions()
    table.loc[3, "score"] = np.nan
    table = table[(table["source"] != "attn1_out") | (table["sink"] != "ff_in")]
    path = saved(table, tmp_path)
    with pytest.raises(ValueError, match=r"2 runs or cells are missing score: ") as caught:
        analyse(path, tmp_path / "out", response="score")
    message = str(caught.value)
    assert "attn1_in-attn2_in-1 bottleneck attn1_in -> attn2_in scale=1 seed=1" in message
    assert "pair attn1_out -> ff_in (no runs)" in message
    assert "--allow-missing" in message
    assert not (tmp_path / "out").exists()
    analysis = analyse(path, tmp_path / "out", response="score", allow_missing=True)
    assert len(analysis.design.data) == 37
    text = (tmp_path / "out" / "anova.md").read_text()
    assert "- Missing, and gone on without: 2, listed below" in text
    assert "- pair attn1_out -> ff_in (no runs)" in text
    left = analyse(path, tmp_path, response="score", where=["source!=attn1_out,attn1_in"])
    assert len(left.design.data) == sum(source not in ("attn1_out", "attn1_in") for source, _ in PAIRS) * 2


def test_missing_combinations_of_other_factors_are_listed() -> None:
    table = crossed()
    table = table[~((table["activation"] == "silu") & (table["scale"] == 2))]
    with pytest.raises(
        ValueError, match=r"1 runs or cells are missing score: activation=silu, scale=2 \(no runs\)"
    ):
        design_of(table)


def test_a_cell_is_a_pair_with_the_other_factors() -> None:
    """Every pair and every activation has runs, but not every pair with every activation."""
    table = pd.concat([positions().assign(activation=each) for each in ("relu", "silu")], ignore_index=True)
    table["score"] += np.random.default_rng(2).standard_normal(len(table))
    gone = (table["source"] == "ff_in") & (table["sink"] == "ff_in") & (table["activation"] == "silu")
    with pytest.raises(
        ValueError,
        match=r"1 runs or cells are missing score: pair ff_in -> ff_in, activation=silu \(no runs\)",
    ):
        design_of(table[~gone])
    assert design_of(table).missing == ()


def test_a_configuration_without_one_of_the_seeds_is_named() -> None:
    table = crossed()
    gone = (table["activation"] == "silu") & (table["scale"] == 2) & (table["seed"] == 1)
    with pytest.raises(
        ValueError, match=r"1 runs or cells are missing score: silu scale=2 seed=1 \(no run\)"
    ):
        design_of(table[~gone])
    # also where the axis that tells the configurations apart is no factor
    with pytest.raises(ValueError, match=r"silu scale=2 seed=1 \(no run\)"):
        design_of(table[~gone], factors=["activation"])


def test_runs_that_are_not_finished_are_missing() -> None:
    table = positions()
    table.loc[0, ["status", "score"]] = ["pending", np.nan]
    table.loc[5, "status"] = "failed"
    with pytest.raises(ValueError, match=r"2 runs or cells are missing score") as caught:
        design_of(table)
    assert "attn1_in-attn1_in-0 bottleneck attn1_in -> attn1_in scale=1 seed=0 (pending)" in str(caught.value)
    assert "(failed)" in str(caught.value)
    assert len(design_of(table, allow_missing=True).data) == 38
    with pytest.raises(ValueError, match=r"none of the 40 runs has finished \(40 failed\)"):
        design_of(table.assign(status="failed"), allow_missing=True)


def test_a_part_of_the_pairs_is_a_whole_design(tmp_path: Path) -> None:
    """What a sweep of two sources and one sink, or of one pair with other axes, was asked for."""
    table = positions(3)
    two = table[table["source"].isin(["attn2_in", "attn2_out"]) & (table["sink"] == "ff_in")]
    analysis = analyse(saved(two, tmp_path), tmp_path, response="score")
    assert list(analysis.design.factors) == ["source"]
    one = crossed().assign(source="ff_in", sink="ff_in")
    assert list(analyse(saved(one, tmp_path), tmp_path, response="score").design.factors) == [
        "activation", "scale",
    ]  # fmt: skip


def test_two_rows_of_one_run_are_refused() -> None:
    table = crossed()
    twice = pd.concat([table, table.iloc[[4]].assign(id="other")], ignore_index=True)
    with pytest.raises(
        ValueError, match=r"2 rows have the axes and the seed of another one: 011 relu .*; other relu"
    ):
        design_of(twice, allow_missing=True)
    # other settings are other runs where they are a factor
    steps = pd.concat([table.assign(steps=100), table.assign(steps=200)], ignore_index=True)
    assert len(design_of(steps, factors=["steps"]).data) == 72


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "source",
            "middle",
            r"source must be one of attn1_in, .*; got 'middle' in row attn1_out-.*-0 bottleneck",
        ),
        ("sink", "attn1_out", r"sink must be one of .*; got 'attn1_out' in row"),
        (
            "sink",
            "attn1_in",
            r"may not come before its source; got 'attn1_out -> attn1_in' in row attn1_out-",
        ),
    ],
)
def test_positions_that_cannot_be_are_refused(tmp_path: Path, column: str, value: str, message: str) -> None:
    table = positions(1)
    table.loc[table.index[table["source"] == "attn1_out"][0], column] = value
    with pytest.raises(ValueError, match=message):
        read_results(saved(table, tmp_path))


def test_text_among_the_responses_is_named(tmp_path: Path) -> None:
    table = crossed().astype({"score": object})
    table.loc[3, "score"] = "n/a?"
    table.loc[7, "score"] = None
    with pytest.raises(
        ValueError,
        match=r"response score must be a number in every row; got 'n/a\?' in row 10 relu scale=1 seed=0$",
    ):
        analyse(saved(table, tmp_path), tmp_path, response="score")


def test_levels_that_differ_stay_apart() -> None:
    values = [0.1, 0.1 + 1e-9, 1234567.0, 1234568, 2**53 + 1, 1e20, 1e-7, True, "relu"]
    names = [level(each) for each in values]
    assert names == [
        "0.1", "0.100000001", "1234567", "1234568", "9007199254740993", "1e+20", "1e-07", "true", "relu",
    ]  # fmt: skip
    assert level(1.0) == level(1) == level(np.float64(1)) == level(np.int64(1)) == "1"
    assert [level(each) for each in (None, float("nan"), pd.NA)] == [""] * 3


def test_without_both_positions_there_is_no_map(tmp_path: Path) -> None:
    analyse(saved(crossed(), tmp_path), tmp_path, response="score")
    assert "No map of positions: it needs source and sink" in (tmp_path / "anova.md").read_text()
    assert not (tmp_path / "positions.png").exists()


def test_a_factor_that_some_rows_lack_is_left_out() -> None:
    table = pd.concat(
        [
            crossed().assign(family="bottleneck"),
            crossed(seed=1).query("activation == 'relu'").assign(family="lora", rank=2.0),
        ]
    )
    table.loc[table["family"] == "lora", "activation"] = None
    design = design_of(table.reset_index(drop=True))
    assert design.left_out["activation"] == "no level in 12 of 48 rows"
    assert design.left_out["rank"] == "no level in 36 of 48 rows"
    assert list(design.factors) == ["family", "scale"]
    with pytest.raises(
        ValueError, match=r"factor activation is empty in .* rows; leave those out by --where"
    ):
        design_of(table, factors=["activation"])


def test_filters() -> None:
    table = crossed()
    kept = filtered(table, [parse_condition("scale=0.5, 2"), parse_condition("activation!=relu")])
    assert set(kept["scale"]) == {0.5, 2.0}
    assert set(kept["activation"]) == {"silu", "identity"}
    for same in ("scale=1", "scale=1.0", "scale=1e0"):
        assert set(filtered(table, [parse_condition(same)])["scale"]) == {1.0}
    assert set(filtered(table, [parse_condition("scale!=1.0,2")])["scale"]) == {0.5, 4.0}
    for text, message in {
        "scale": "a filter is written column=value,... or column!=value,...; got 'scale'",
        "=1": "a filter is written",
        "scale=1,": "a filter is written",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_condition(text)
    with pytest.raises(ValueError, match=r"filter on depth: no such column; the file has id, activation"):
        filtered(table, [parse_condition("depth=1")])
    with pytest.raises(ValueError, match=r"filter scale=3: column scale has no 3; it has 0.5, 1, 2, 4"):
        filtered(table, [parse_condition("scale=3")])
    with pytest.raises(ValueError, match=r"no row is left by the filters scale=1; scale!=1"):
        filtered(table, [parse_condition("scale=1"), parse_condition("scale!=1")])


def test_rejects_designs() -> None:
    table = crossed()
    for options, message in (
        ({"response": "loss"}, "response must be a numeric column, one of score; got 'loss'"),
        ({"response": "activation"}, "response must be a numeric column, one of score; got 'activation'"),
        ({"factors": ["depth"]}, "factors depth: no such column; the file has id, activation"),
        (
            {"factors": ["scale", "seed"]},
            "seed is no factor: the seeds of a configuration are its replicates",
        ),
        ({"factors": ["scale", "scale"]}, "factors must be different columns; got scale, scale"),
    ):
        with pytest.raises(ValueError, match=message):
            design_of(table, **options)
    one_level = table[(table["activation"] == "relu") & (table["scale"] == 1)]
    with pytest.raises(
        ValueError, match=r"a factor needs at least two levels; activation has one level: relu"
    ):
        design_of(one_level)
    with pytest.raises(
        ValueError, match=r"a factor needs at least two levels; activation has one level: relu"
    ):
        design_of(table[table["activation"] == "relu"], factors=["activation", "scale"])
    with pytest.raises(ValueError, match=r"the response score is 1 in all .* observations"):
        design_of(table.assign(score=1.0))


def test_rejects_designs_without_replicates() -> None:
    cells = crossed().drop_duplicates(["activation", "scale"])
    table = cells.assign(init=[f"i{index}" for index in range(len(cells))])
    with pytest.raises(ValueError, match=r"factor init has 12 levels in 12 observations: no replicate"):
        one_way(design_of(table, factors=["init"]))
    with pytest.raises(
        ValueError, match=r"leave no residual degree of freedom beside init, scale: no replicate"
    ):
        type_two(design_of(table, factors=["init", "scale"], allow_missing=True))
    exact = crossed().assign(score=crossed()["scale"])
    with pytest.raises(ValueError, match=r"score does not vary within the levels of factor scale"):
        one_way(design_of(exact, factors=["scale"]))
    with pytest.raises(ValueError, match=r"scale leave no residual variance of score"):
        type_two(design_of(exact, factors=["scale"]))


def test_pair_can_be_a_factor(tmp_path: Path) -> None:
    analysis = analyse(saved(positions(), tmp_path), tmp_path, response="score", factors=["pair"])
    assert (analysis.runs[0].df_between, analysis.runs[0].df_within) == (19, 20)
    assert analysis.configurations[0].note == "no replicate"


def test_rejects_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results file .*absent.csv does not exist"):
        read_results(tmp_path / "absent.csv")
    other = tmp_path / "other.csv"
    other.write_text("height,weight\n1,2\n")
    with pytest.raises(
        ValueError,
        match=r"is no results file: it has none of the columns family, source.*; it has height, weight",
    ):
        read_results(other)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty.csv cannot be read as csv: No columns to parse"):
        read_results(tmp_path / "empty.csv")
    (tmp_path / "head.csv").write_text("source,sink,score\n")
    with pytest.raises(ValueError, match=r"head.csv has no rows"):
        read_results(tmp_path / "head.csv")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a results file ends in .csv or .parquet; got .*results.json"):
        read_results(tmp_path / "results.json")
    whole = saved(crossed(), tmp_path, "results.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.parquet cannot be read as parquet: "):
        read_results(tmp_path / "half.parquet")


@pytest.mark.parametrize("missing", [False, True], ids=["full_rank", "a_cell_missing"])
def test_interactions_are_what_least_squares_says(tmp_path: Path, missing: bool) -> None:
    """activation × scale against residual sums by least squares, by statsmodels and, with a hole, by contrasts."""
    table = crossed(ragged=True)
    table["score"] += 0.1 * (table["activation"] == "silu") * (table["scale"] == 4.0)
    if missing:
        table = table[~((table["activation"] == "relu") & (table["scale"] == 2.0))]
    analysis = analyse(
        saved(table, tmp_path), tmp_path / "out", response="score", interactions=True, allow_missing=True
    )
    design, two = analysis.design, analysis.type_two
    first, second = indicators(design, "activation"), indicators(design, "scale")
    products = np.stack([a * b for a in first.T for b in second.T], axis=1)
    apart, apart_rank = residual_sum([first, second], design.values)
    whole, whole_rank = residual_sum([first, second, products], design.values)
    term = next(each for each in two.terms if each.factor == "activation × scale")
    assert (term.df, term.nominal) == (whole_rank - apart_rank, 6)
    assert term.df == (5 if missing else 6)
    assert ("activation × scale" in two.aliased) == missing
    df_residual = len(design.data) - whole_rank
    f = (apart - whole) / term.df / (whole / df_residual)
    np.testing.assert_allclose([term.ss, term.f], [apart - whole, f], rtol=1e-8)
    np.testing.assert_allclose(term.p, stats.f.sf(f, term.df, df_residual), rtol=1e-6)
    alone, _ = residual_sum([second], design.values)
    main = next(each for each in two.terms if each.factor == "activation")
    np.testing.assert_allclose(main.ss, alone - apart, rtol=1e-8)
    assert "| activation × scale |" in (tmp_path / "out" / "anova.md").read_text()


def families(folder: Path) -> Path:
    """Bottlenecks of two activations beside KronA, whose start is called otherwise; three seeds."""
    random = np.random.default_rng(3)
    rows = [
        {"id": f"{family}{value}{seed}", "family": family, "init": init, "activation": activation, "scale": value,
         "seed": seed, "score": value + random.standard_normal()}
        for family, init, activation in (("bottleneck", "zero_up", "relu"), ("krona", "diffusekrona", ""))
        for value in (0.5, 1.0)
        for seed in range(3)
    ]  # fmt: skip
    return saved(pd.DataFrame(rows), folder)


def test_families_need_not_take_the_levels_of_each_other(tmp_path: Path) -> None:
    analysis = analyse(families(tmp_path), tmp_path / "out", response="score")
    assert analysis.design.missing == ()
    assert list(analysis.design.factors) == ["family", "scale"]
    assert analysis.design.left_out["init"] == "decided by family"


def test_a_sweep_of_which_nothing_has_finished(tmp_path: Path) -> None:
    table = positions().assign(status="pending", score=np.nan)
    with pytest.raises(
        ValueError, match=r"none of the 40 runs has finished \(40 pending\); the same kronafuse sweep"
    ):
        analyse(saved(table, tmp_path), tmp_path / "out", response="score")


def test_words_for_nothing_are_levels_of_a_factor_and_empty_cells_of_a_response(tmp_path: Path) -> None:
    table = crossed().astype({"score": object})
    renamed = table["activation"].map({"relu": "None", "silu": "NA", "identity": "nan"})
    table.loc[3, "score"], table.loc[5, "score"] = "NA", None
    path = saved(table.assign(activation=renamed), tmp_path)
    design = analyse(path, tmp_path, response="score", allow_missing=True).design
    assert design.factors["activation"] == ["None", "NA", "nan"]
    assert len(design.data) == len(table) - 2


def test_a_percent_sign_names_the_cell(tmp_path: Path) -> None:
    table = crossed()
    table["score"] = [f"{value:.1%}" for value in table["score"]]
    message = r"response score must be a number in every row; got '.*%' in row 0 relu .*; and 31 more$"
    with pytest.raises(ValueError, match=message):
        analyse(saved(table, tmp_path), tmp_path, response="score")


def test_a_boolean_column_is_filtered_by_its_words(tmp_path: Path) -> None:
    table = crossed().assign(flip=[bool(row % 2) for row in range(36)])
    holes = table.astype({"flip": object})
    holes.loc[0, "flip"] = None
    for name, each in (("whole.csv", table), ("whole.parquet", table), ("holes.csv", holes)):
        read = read_results(saved(each, tmp_path, name))
        for word in ("True", "true", "TRUE"):
            assert len(filtered(read, [parse_condition(f"flip={word}")])) == 18
    with pytest.raises(ValueError, match=r"filter flip=yes: column flip has no yes; it has"):
        filtered(read, [parse_condition("flip=yes")])


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("activation, activation,seed,accuracy_new\nrelu,gelu,0,0.5\n")
    with pytest.raises(
        ValueError, match=r"each column must have a name of its own; activation is there twice"
    ):
        read_results(path)


def test_a_byte_order_mark_and_blanks_behind_commas_change_nothing(tmp_path: Path) -> None:
    table = crossed()[["activation", "scale", "seed", "score"]]
    text = table.to_csv(index=False)
    path = tmp_path / "results.csv"
    path.write_text(text.replace(",", ", "), encoding="utf-8-sig")
    pd.testing.assert_frame_equal(read_results(path), read_results(saved(table, tmp_path, "plain.csv")))


def test_names_that_are_no_file_names_are_analysed_too(tmp_path: Path) -> None:
    """Columns and levels with slashes, markup, formulas, bars: each has a plot of its own, linked in the report."""
    names = {"optim/lr": "optim_lr~", "LR": "LR~", "lr": "lr~", "[/b]": "__b_~", "a|b": "a_b~"}
    levels = ["a/b", "$x^$", "[red]"]
    table = crossed().rename(columns={"scale": "depth"}).assign(seed=range(36))
    random = np.random.default_rng(2)
    for name in names:
        table[name] = random.choice(levels, len(table))
    path = saved(table, tmp_path)
    analysis = analyse(path, tmp_path / "out", response="score", factors=list(names), allow_missing=True)
    files = [analysis.plots[f"score by {name}"] for name in names]
    for begin, file in zip(names.values(), files, strict=True):
        assert file.startswith(f"factor-{begin}")
        assert (tmp_path / "out" / file).is_file()
    assert len({file.casefold() for file in files}) == len(names)
    report = (tmp_path / "out" / "anova.md").read_text(encoding="utf-8")
    assert "](factor-optim_lr~" in report
    assert r"| a\|b | " in report
