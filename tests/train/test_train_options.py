"""Configuration: keys, values and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kronafuse.train.config import TrainConfig
from kronafuse.train.options import build, read_toml

NEEDED = {"base": "model", "data": "images"}


def test_values_take_their_types() -> None:
    config = build(
        TrainConfig, {**NEEDED, "factors": "8x4", "targets": "to_q, to_v", "learning_rate": 1, "flip": True}
    )
    assert config.base == Path("model")
    assert config.factors == (8, 4)
    assert config.targets == ("to_q", "to_v")
    assert config.learning_rate == 1.0
    assert config.flip is True


def test_lists_are_tuples() -> None:
    config = build(TrainConfig, {**NEEDED, "factors": [16, 2], "validation": ["a cat"]})
    assert config.factors == (16, 2)
    assert config.validation == ("a cat",)


def test_rejects_unknown_keys_and_lists_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"unknown key batchsize \(closest: batch_size\).*learning_rate, .*factors"
    ):
        build(TrainConfig, {**NEEDED, "batchsize": 2})


def test_rejects_missing_keys() -> None:
    with pytest.raises(ValueError, match="missing key data"):
        build(TrainConfig, {"base": "model"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "ten", "steps must be an integer; got 'ten'"),
        ("steps", True, "steps must be an integer; got True"),
        ("steps", 0, "steps must be at least 1; got 0"),
        ("learning_rate", 0, "learning_rate must be above 0; got 0.0"),
        ("factors", "8by4", "factors must be two integers, as 64x4; got"),
        ("factors", [8, 4, 2], "factors must be two integers, as 64x4; got"),
        ("targets", "", "targets must be a list of names; got"),
        ("decay", "linear", "decay must be one of constant, cosine; got 'linear'"),
        ("mixed_precision", "fp8", "mixed_precision must be one of no, fp16, bf16; got 'fp8'"),
        ("learning_rate", float("inf"), "learning_rate must be finite; got inf"),
        ("scale", float("nan"), "scale must be finite; got nan"),
        ("alpha", float("inf"), "alpha must be finite; got inf"),
        ("condition_dropout", 1.5, "condition_dropout must be at most 1; got 1.5"),
    ],
)
def test_rejects_wrong_values(key: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build(TrainConfig, {**NEEDED, key: value})


def test_rejects_files_that_are_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    with pytest.raises(FileNotFoundError, match=r"train\.toml does not exist"):
        read_toml(path)
    path.write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"train\.toml is not valid TOML"):
        read_toml(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("steps = 3\n", encoding="utf-8-sig")
    assert read_toml(path) == {"steps": 3}
