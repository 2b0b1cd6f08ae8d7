"""The demo's data and judges."""

from __future__ import annotations

import numpy as np
import pytest
from kronafuse.train.digits.data import CLASSES, NEW, OLD, read_digits
from kronafuse.train.digits.judge import Judge, frechet_distance
from kronafuse.train.digits.recipe import FULL, SMOKE, base_key


def test_halves_share_no_scan_and_have_all() -> None:
    digits = read_digits(0)
    learnt, judging = (
        {each.numpy().tobytes() for each in half.pixels} for half in (digits.learnt, digits.judging)
    )
    assert len(digits.learnt.labels) + len(digits.judging.labels) == 1797
    assert not learnt & judging
    for half in (digits.learnt, digits.judging):
        assert set(half.labels) == set(CLASSES)
        assert float(half.pixels.min()) == -1
        assert float(half.pixels.max()) == 1


def test_base_never_sees_the_new_classes() -> None:
    assert not set(OLD) & set(NEW)
    assert set(read_digits(0).learnt.of(OLD).examples().conditions) == set(OLD)


def test_judge_knows_real_digits_it_was_not_fitted_on() -> None:
    digits = read_digits(0)
    judge = Judge(digits.judging)
    assert judge.accuracy(digits.learnt.pixels, digits.learnt.labels) > 0.97
    wrong = np.roll(digits.learnt.labels, 1)
    assert judge.accuracy(digits.learnt.pixels, wrong) < 0.3
    near = judge.frechet(digits.learnt.pixels, digits.judging.pixels)
    assert near < 0.1 * judge.frechet(-digits.learnt.pixels, digits.judging.pixels)


def test_frechet_distance_of_gaussians() -> None:
    """For diagonal Gaussians it is the sum of (μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    standard = np.random.default_rng(0).standard_normal((200_000, 3))
    first, second = standard * [1, 2, 3] + [0, 0, 1], standard * [2, 2, 1] + [1, 0, 0]
    assert frechet_distance(first, second) == pytest.approx((1 + 0 + 1) + (1 + 0 + 4), rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_base_is_keyed_by_what_decides_its_weights() -> None:
    assert base_key(FULL) != base_key(SMOKE)
    assert base_key(FULL) == base_key(type(FULL)(per_new_class=1))
