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
from kronafuse.study.anova.table import filtered, parse_condition, read_results
from PIL import Image
from scipy import stats

PUBLISHED = Path(__file__).with_name("published.csv")
"""The twenty cells of Xiang et al. 2023, arXiv 2303.18181: DreamBooth CLIP similarity, read from its figure."""

TRANSFORMER = ["source!=res_in,res_out,attn2_context"]


def crossed(replicates: int = 3, seed: int = 0) -> pd.DataFrame:
    """Activations × scales with effects of both, an unbalanced number of replicates and noise."""
    random = np.random.default_rng(seed)
    rows = []
    for (a, activation), (b, scale) in itertools.product(
        enumerate(("relu", "silu", "identity")), enumerate((0.5, 1.0, 2.0, 4.0))
    ):
        for replicate in range(replicates + (a + b) % 2):
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
    values = {"factors": None, "over": "runs", "conditions": [], "allow_missing": False, **options}
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
    found = {each.factor: (each.df_between, each.df_within, each.f) for each in analysis.one_way}
    for factor, (between, within, f) in expected.items():
        assert found[factor][:2] == (between, within)
        assert float(f"{found[factor][2]:.{3 if f > 1 else 2}g}") == f


def test_one_way_is_scipys() -> None:
    table = crossed()
    for result in one_way(design_of(table)):
        groups = [group["score"].to_numpy() for _, group in table.groupby(result.factor)]
        expected = stats.f_oneway(*groups)
        np.testing.assert_allclose([result.f, result.p], [expected.statistic, expected.pvalue], rtol=1e-10)


def residual_sum(columns: list[np.ndarray], values: np.ndarray) -> tuple[float, int]:
    """Residual sum of squares and rank of indicator columns beside a mean, by least squares alone."""
    matrix = np.column_stack([np.ones(len(values)), *columns])
    fitted = matrix @ np.linalg.lstsq(matrix, values, rcond=None)[0]
    return float(((values - fitted) ** 2).sum()), int(np.linalg.matrix_rank(matrix))


def indicators(design: Design, factor: str) -> np.ndarray:
    column = design.data[factor].to_numpy()
    return np.stack([column == level for level in design.factors[factor]], axis=1).astype(float)


@pytest.mark.parametrize("table", [crossed(), positions()], ids=["full_rank", "rank_deficient"])
def test_type_two_is_its_definition(table: pd.DataFrame) -> None:
    """Sums of squares, degrees of freedom, F, p and effect sizes from differences of residual sums."""
    design = design_of(table)
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


def test_cells_are_means_over_runs() -> None:
    table = positions()
    design = design_of(table, over="cells")
    assert len(design.data) == 20
    means = table.groupby(["source", "sink"])["score"].mean()
    for _, row in design.data.iterrows():
        assert row["score"] == pytest.approx(means[row["source"], row["sink"]])
    assert {each.factor: each.df_within for each in one_way(design)} == {"source": 10, "sink": 13}
    assert {each.factor: each.df_within for each in one_way(design_of(table))} == {"source": 30, "sink": 33}


@pytest.mark.parametrize("name", ["results.csv", "results.parquet"])
def test_report_has_tables_plots_and_numbers(tmp_path: Path, name: str) -> None:
    path = saved(positions(), tmp_path, name)
    analysis = analyse(path, tmp_path / "out", response="score", where=["source!=ff_out"])
    out = tmp_path / "out"
    numbers = json.loads((out / "anova.json").read_text())
    text = (out / "anova.md").read_text()
    assert numbers["observations"] == len(analysis.design.data) == 38
    assert numbers["filters"] == ["source!=ff_out"]
    assert [each["factor"] for each in numbers["one_way"]] == ["source", "sink"]
    assert numbers["one_way"][0]["f"] == pytest.approx(analysis.one_way[0].f)
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
    table = table[table["source"] != "attn2_context"]
    path = saved(table, tmp_path)
    with pytest.raises(ValueError, match=r"2 cells are missing score: ") as caught:
        analyse(path, tmp_path / "out", response="score")
    message = str(caught.value)
    assert "attn1_in-attn2_in-1 bottleneck attn1_in -> attn2_in scale=1 seed=1" in message
    assert "pair attn2_context -> attn2_context (no runs)" in message
    assert "--allow-missing" in message
    assert not (tmp_path / "out").exists()
    analysis = analyse(path, tmp_path / "out", response="score", allow_missing=True)
    assert len(analysis.design.data) == 37
    text = (tmp_path / "out" / "anova.md").read_text()
    assert "- Missing, and gone on without: 2, listed below" in text
    assert "- pair attn2_context -> attn2_context (no runs)" in text
    assert (
        len(analyse(path, tmp_path, response="score", where=["source!=attn2_context,attn1_in"]).design.data)
        == 30
    )


def test_missing_combinations_of_other_factors_are_listed() -> None:
    table = crossed()
    table = table[~((table["activation"] == "silu") & (table["scale"] == 2))]
    with pytest.raises(ValueError, match=r"1 cells are missing score: activation=silu, scale=2 \(no runs\)"):
        design_of(table)


def test_a_factor_that_some_rows_lack_is_left_out() -> None:
    table = pd.concat(
        [crossed().assign(family="bottleneck"), crossed(seed=1).assign(family="lora", rank=2.0)]
    )
    table.loc[table["family"] == "lora", "activation"] = None
    design = design_of(table.reset_index(drop=True))
    assert design.left_out["activation"] == f"no level in {len(crossed())} of {len(table)} rows"
    assert design.left_out["rank"] == f"no level in {len(crossed())} of {len(table)} rows"
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
        ({"factors": ["scale", "scale"]}, "factors must be different columns; got scale, scale"),
        ({"over": "seeds"}, "over must be one of runs, cells; got 'seeds'"),
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
    assert (analysis.one_way[0].df_between, analysis.one_way[0].df_within) == (19, 20)


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
    table = crossed()
    table["score"] += 0.1 * (table["activation"] == "silu") * (table["scale"] == 4.0)
    if missing:
        table = table[~((table["activation"] == "relu") & (table["scale"] == 2.0))]
    analysis = analyse(
        saved(table, tmp_path), tmp_path / "out", response="score", interactions=True, allow_missing=missing
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
