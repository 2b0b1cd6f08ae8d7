"""`kronafuse sweep` and `kronafuse anova`: what they print, what they write, and their exit codes."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from accelerate.state import AcceleratorState, GradientState
from kronafuse.cli.app import app
from kronafuse.env import install_extra
from typer.testing import CliRunner, Result

SMOKE_SECONDS = 180
"""What a smoke run may take, the base model's training included."""

PUBLISHED = Path(__file__).parents[1] / "study" / "published.csv"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision for a process; every test starts without it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_smoke_sweep_and_its_analysis(tmp_path: Path) -> None:
    """Every family on a base model trained for three steps; again, nothing is redone."""
    started = time.monotonic()
    result = invoke("sweep", "--smoke", "--output", tmp_path, "--cpus", 1)
    assert result.exit_code == 0, result.output
    assert time.monotonic() - started < SMOKE_SECONDS
    assert "Smoke run" in result.stdout
    assert "4 runs of job digits, into" in result.stdout
    assert "4 finished, 0 failed; 0 of them were there before" in result.stdout
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["family"]) == ["bottleneck", "bottleneck", "krona", "lora"]
    assert (table["parameters"] > 0).all()
    assert set(table["steps"]) == {3}
    again = invoke("sweep", "--smoke", "--output", tmp_path, "--cpus", 1)
    assert "4 finished, 0 failed; 4 of them were there before" in again.stdout

    result = invoke(
        "anova",
        tmp_path / "results.parquet",
        "--response",
        "last_loss",
        "--factors",
        "family",
        "--out",
        tmp_path / "out",
    )
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "anova.json").read_text())
    assert numbers["one_way_configurations"] == numbers["one_way_runs"]
    assert numbers["one_way_runs"][0]["df_within"] == 1


def test_illegal_pairs_of_a_cross_product_are_counted(tmp_path: Path) -> None:
    positions = ("--source", "ff_in,block_out", "--sink", "attn1_in,block_out", "--width", "4")
    result = invoke("sweep", *positions, "--output", tmp_path / "out", "--retries", "-1")
    assert "6 runs of job digits" in result.stdout
    assert "Left out, not legal: 2 pairs (ff_in -> attn1_in, block_out -> attn1_in)" in result.stdout
    assert result.exit_code == 2
    assert "retries must be at least 0; got -1" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "ff_in -> attn1_in"], "sink 'attn1_in' comes before source 'ff_in' in the block"),
        (["--source", "ff_in", "--sink", "attn1_in"], "sink 'attn1_in' comes before source 'ff_in'"),
        (["--width", "0"], "width must be a positive integer; got 0"),
        (["--width", "300"], "width H must be 1 to 256"),
        (["--set", "step=3"], "unknown key step (closest: steps)"),
        (["--seeds", "a"], "seeds must be integers separated by commas; got 'a'"),
        (["--cpus", "0"], "cpus must be at least 1; got 0"),
        (["--width", "4", "--budget", "2"], "give width or budget, not both"),
        (["--pairs", "all", "--sink", "ff_in"], "give pairs, or source and sink, not both"),
        (["--seeds", str(2**63)], "seeds must be below 2**63"),
        (["--set", "steps=5"], "warmup must be at most its steps; got warmup=20, steps=5"),
        # what is set by name counts over the smoke run's own
        (["--smoke", "--set", "warmup=9"], "warmup must be at most its steps; got warmup=9, steps=3"),
    ],
)
def test_a_wrong_sweep_ends_before_anything_runs(tmp_path: Path, options: list[str], message: str) -> None:
    result = invoke("sweep", *options, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_smoke_run_has_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options, folder in ((["--smoke"], "runs/sweep-smoke"), ([], "runs/sweep")):
        result = invoke("sweep", *options, "--retries", "-1")
        assert result.exit_code == 2
        assert f"runs of job digits, into {folder}\n" in result.stdout


def test_a_budget_that_no_width_meets_is_refused_before_the_base_model_is_trained(tmp_path: Path) -> None:
    result = invoke("sweep", "--smoke", "--budget", "0.01", "--output", tmp_path / "out", "--cpus", 1)
    assert result.exit_code == 2
    assert "no width meets a budget of 0.01 %" in result.stderr
    assert not (tmp_path / "out").exists()


def test_anova_prints_the_published_values(tmp_path: Path) -> None:
    result = invoke("anova", PUBLISHED, "--response", "clip_similarity", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "clip_similarity: One factor at a time, over configurations" in " ".join(result.stdout.split())
    assert "over runs" not in result.stdout
    for text in ("12.14", "0.7682", "7 of 9", "No run connects these 3 parts", "anova.md"):
        assert text in result.stdout
    result = invoke(
        "anova", PUBLISHED, "--response", "clip_similarity", "--out", tmp_path,
        "--where", "source!=res_in,res_out", "--where", "source!=attn2_context",
    )  # fmt: skip
    for text in ("13.79", "0.4466"):
        assert text in result.stdout
    assert "Aliased" not in result.stdout


def test_anova_lists_what_is_missing(tmp_path: Path) -> None:
    table = pd.read_csv(PUBLISHED)
    table.loc[4, "clip_similarity"] = float("nan")
    table.to_csv(tmp_path / "results.csv", index=False)
    options = ("anova", tmp_path / "results.csv", "--response", "clip_similarity")
    result = invoke(*options)
    assert result.exit_code == 2
    assert "1 runs or cells are missing clip_similarity: attn1_out -> attn2_in. Run them" in result.stderr
    result = invoke(*options, "--allow-missing")
    assert result.exit_code == 0, result.output
    assert "Missing: attn1_out -> attn2_in." in result.stdout
    assert (tmp_path / "anova-clip_similarity" / "anova.md").is_file()


@pytest.mark.parametrize(
    ("command", "absent", "part", "extra"),
    [
        (("sweep", "--smoke"), "ray", "study", "study"),
        (("sweep", "--smoke"), "diffusers", "train", "train"),
        (("anova", PUBLISHED), "statsmodels", "study", "study"),
    ],
    ids=["ray", "diffusers", "statsmodels"],
)
def test_without_a_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], absent: str, part: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    result = invoke(*command)
    assert result.exit_code == 2
    assert result.stderr == (f"kronafuse: kronafuse.{part}: needs {absent}; {install_extra(extra)}\n")


def test_help_keeps_what_looks_like_markup() -> None:
    assert "the tables settings and adapters" in " ".join(
        invoke("sweep", "--help").stdout.replace("│", " ").split()
    )


def test_anova_of_a_column_whose_name_is_no_file_name(tmp_path: Path) -> None:
    table = pd.read_csv(PUBLISHED).rename(columns={"clip_similarity": "eval/[/clip]"})
    table["optim/[/lr]"] = ["1/2", "[red]", "3|4", "None"] * 5
    table.to_csv(tmp_path / "results.csv", index=False)
    result = invoke(
        "anova",
        tmp_path / "results.csv",
        "--response",
        "eval/[/clip]",
        "--factors",
        "optim/[/lr], source",
        "--allow-missing",
    )
    assert result.exit_code == 0, result.output
    assert "eval/[/clip]: One factor at a time" in " ".join(result.stdout.split())
    (folder,) = tmp_path.glob("anova-eval*")
    assert f"Written: {folder / 'anova.md'}" in result.stdout
    assert len(list(folder.glob("factor-*.png"))) == 2
