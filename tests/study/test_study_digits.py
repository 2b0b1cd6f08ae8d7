"""The shipped job: what a run reports, that it repeats, and that its seed decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kronafuse import Bottleneck, attach
from kronafuse.study.digits import JOB, recipe_of
from kronafuse.study.grid import make_grid
from kronafuse.study.sweep import sweep
from kronafuse.train.digits.base import base_folder, read_base

SETTINGS = JOB.complete(JOB.smoke)
TIMES = ("training_seconds", "sampling_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the smoke base model."""
    path = tmp_path_factory.mktemp("sweep")
    assert JOB.prepare is not None
    JOB.prepare(SETTINGS, path)
    return path


def figures(folder: Path, table: dict[str, Any], seed: int = 0, **settings: Any) -> dict[str, float]:
    (config,) = make_grid([table], [seed]).configs
    return dict(JOB.run({**SETTINGS, **settings, **config}, folder))


def untimed(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in TIMES}


def test_the_base_model_is_trained_once(folder: Path) -> None:
    (base,) = folder.glob("base-*")
    assert base == base_folder(folder, recipe_of(SETTINGS))
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    assert JOB.prepare is not None
    JOB.prepare(SETTINGS, folder)
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before
    other = recipe_of({**SETTINGS, "base_steps": 4})
    assert base_folder(folder, other) != base


@pytest.mark.parametrize(
    "table",
    [
        {"family": "bottleneck", "pairs": ["attn2_out -> ff_in"], "width": 4, "init": "paper"},
        {"family": "bottleneck", "pairs": ["res_in -> res_out"], "width": 4},
        {"family": "bottleneck", "pairs": ["attn2_context -> attn2_context"], "budget": 1},
        {"family": "bottleneck", "pairs": ["ff_in -> block_out"], "form": "krona_res", "factors": "4x8"},
        {"family": "krona", "factors": "4x8"},
        {"family": "lokr", "factor": 4},
        {"family": "lora", "rank": 2},
    ],
    ids=["transformer", "resnet", "context", "krona_res", "krona", "lokr", "lora"],
)
def test_a_run_repeats_and_its_seed_decides(folder: Path, table: dict[str, Any]) -> None:
    first = figures(folder, table)
    assert set(first) == {"accuracy_new", "accuracy_old", "frechet_new", "last_loss", "parameters", *TIMES}
    assert untimed(figures(folder, table)) == untimed(first)
    other = figures(folder, table, seed=1)
    assert other["parameters"] == first["parameters"]
    assert other["last_loss"] != first["last_loss"]
    assert other["frechet_new"] != first["frechet_new"]


def test_the_adapter_is_trained_and_counted(folder: Path) -> None:
    """A learning rate and a scale change the result, so that what is judged is the adapted model."""
    table = {"family": "bottleneck", "width": 4, "init": "paper"}
    first = figures(folder, table)
    base, _ = read_base(base_folder(folder, recipe_of(SETTINGS)))
    with attach(base.unet, Bottleneck(width=4)) as attachment:
        assert first["parameters"] == sum(parameter.numel() for parameter in attachment.parameters())
    assert figures(folder, table, learning_rate=0.5)["frechet_new"] != first["frechet_new"]
    assert figures(folder, {**table, "scale": 4.0})["last_loss"] != first["last_loss"]


def test_a_run_without_the_base_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the cached base model .* cannot be used"):
        figures(tmp_path, {"family": "lora", "rank": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"decay": "linear"}, "decay must be one of constant, cosine"),
        ({"images_per_new_class": 4}, "images_per_new_class must be at least 5"),
        ({"momentum": 0.9}, "unknown key momentum"),
    ],
)
def test_rejects_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JOB.complete(settings)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"family": "bottleneck", "budget": 0.01},
            r"ff_in relu .*budget=0\.01.*: .*no width meets a budget of 0\.01 %",
        ),
        ({"family": "krona", "factors": "5x8"}, r"krona factors=5x8 .*: .*N1 = 5 does not divide N = 32"),
    ],
)
def test_what_no_run_can_do_is_refused_before_anything_runs(
    tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"the digits job cannot train .*{message}"):
        sweep(JOB, JOB.smoke, make_grid([table], [0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_warm_up_longer_than_the_training_is_refused(tmp_path: Path) -> None:
    settings = {**JOB.smoke, "steps": 3, "warmup": 4}
    with pytest.raises(ValueError, match=r"warmup must be at most its steps; got warmup=4, steps=3"):
        sweep(JOB, settings, make_grid([{"family": "lora"}], [0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
