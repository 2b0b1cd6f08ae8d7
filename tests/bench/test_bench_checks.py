"""What is wrong with an arm is found before it is timed: in any row, in the delta alone, in each gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kronafuse.bench.arms import Arm
from kronafuse.bench.arms.plain import adapted
from kronafuse.bench.checking import Checks, WrongArm
from kronafuse.bench.problems import KronProblem
from kronafuse.testing.chain import eager_chain
from test_bench_arms import SMALL, arm_named, off_by, spec_of


def test_a_wrong_baseline_is_found():
    with pytest.raises(WrongArm, match=r"y0: RMS error .* of results whose RMS is"):
        Checks(spec_of(SMALL["thin-krona"]).make()).check(off_by(1.1))
    Checks(spec_of(SMALL["thin-krona"]).make()).check(off_by(1.001))


def test_ours_must_be_as_accurate_as_the_chain():
    with pytest.raises(WrongArm, match=r"y0: RMS error .*limit"):
        Checks(spec_of(SMALL["thin-krona"]).make()).check(off_by(1.001, impl="eager"))


def test_a_broken_delta_is_found_where_the_base_hides_it():
    """The delta a thousand times too small against W: y alone would pass."""

    def build(problem: KronProblem):
        tiny = tuple(layer._replace(terms=()) for layer in problem.layers)
        built = adapted(problem, lambda x, layers: eager_chain(x, tiny))
        return replace(built, leaves={"x": built.leaves["x"]})

    spec = spec_of(SMALL["thin-krona"], "forward")
    problem = spec.make()
    small = tuple(
        layer._replace(terms=tuple(term._replace(b=1e-3 * term.b) for term in layer.terms))
        for layer in problem.layers
    )
    with pytest.raises(WrongArm, match="y0 of the delta alone"):
        Checks(replace(problem, layers=small)).check(Arm("no delta", build))


def test_a_wrong_gradient_is_found():
    def build(problem: KronProblem):
        built = adapted(problem, eager_chain)
        leaves = {**built.leaves, "a0.0": built.leaves["b0.0"], "b0.0": built.leaves["a0.0"]}
        return replace(built, leaves=leaves)

    with pytest.raises(WrongArm, match=r"da0\.0: shape"):
        Checks(spec_of(SMALL["thin-krona"]).make()).check(Arm("swapped", build))


def test_gradients_come_from_the_compared_tokens_alone(monkeypatch):
    monkeypatch.setattr("kronafuse.bench.checking.TRUTH_TOKENS", 7)
    checks = Checks(spec_of(SMALL["thin-krona"]).make())
    assert checks.tokens == 7
    checks.check(arm_named("ours_eager"))

    def build(problem: KronProblem):
        built = adapted(problem, lambda x, layers: [y.roll(1, 0) for y in eager_chain(x, layers)])
        return built

    with pytest.raises(WrongArm, match="dx: not zero where dy is zero"):
        checks.check(Arm("rolled", build))


@pytest.mark.parametrize("impl", [None, "eager"])
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_rows_are_compared_from_the_first_to_the_last(mode, impl):
    """An arm that is right on the first 512 tokens alone: 7 in the others, and no gradients from them."""

    def build(problem: KronProblem):
        def head(x, layers):
            ys = eager_chain(x[:512], layers)
            return [torch.cat([y, y.new_full((len(x) - 512, y.shape[1]), 7.0)]) for y in ys]

        return adapted(problem, head)

    checks = Checks(spec_of(replace(SMALL["thin-krona"], tokens=700), mode).make())
    assert checks.tokens == len(set(checks.rows.tolist())) == 512
    assert (checks.rows[0], checks.rows[-1]) == (0, 699)
    checks.check(arm_named("ours_eager"))
    with pytest.raises(WrongArm, match="y0: RMS error"):
        checks.check(Arm("head", build, impl=impl))


def test_gradients_of_late_rows_are_compared():
    """The outputs are right everywhere; the factors' gradients lack the rows from 512 on."""

    def build(problem: KronProblem):
        def head(x, layers):
            cut = [
                layer._replace(
                    terms=tuple(term._replace(a=term.a.detach(), b=term.b.detach()) for term in layer.terms)
                )
                for layer in layers
            ]
            first, rest = eager_chain(x[:512], layers), eager_chain(x[512:], cut)
            return [torch.cat(both) for both in zip(first, rest, strict=True)]

        return adapted(problem, head)

    checks = Checks(spec_of(replace(SMALL["thin-krona"], tokens=700)).make())
    with pytest.raises(WrongArm, match=r"d[ab]0\.0: RMS error"):
        checks.check(Arm("head", build))


def test_a_row_that_is_not_compared_must_be_finite(monkeypatch):
    monkeypatch.setattr("kronafuse.bench.checking.TRUTH_TOKENS", 2)  # the first and the last

    def build(problem: KronProblem):
        def hole(x, layers):
            ys = [y.clone() for y in eager_chain(x, layers)]
            ys[0][20, 3] = float("nan")
            return ys

        return adapted(problem, hole)

    with pytest.raises(WrongArm, match="y0: not finite everywhere"):
        Checks(spec_of(SMALL["thin-krona"], "forward").make()).check(Arm("hole", build))
