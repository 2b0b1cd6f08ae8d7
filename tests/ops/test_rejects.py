"""What a wrong call prints: op, rule in letters, rule in numbers, what came."""

from __future__ import annotations

import re

import kronafuse
import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, kron_delta, kron_linear, kron_linear_group, kron_merge, plan


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def raises(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_rejects_x_of_another_width():
    message = "kron_delta: x must end in K = K1·K2 = 16·80 = 1280; got x (2, 77, 768), a (16, 16), b (80, 80)"
    with raises(ValueError, message):
        kron_delta(rand(2, 77, 768), rand(16, 16), rand(80, 80))


def test_rejects_x_that_the_weight_does_not_fit():
    with raises(ValueError, "kron_linear: x must end in K = 12; got x (2, 8), weight (6, 12)"):
        kron_linear(rand(2, 8), rand(6, 12), rand(2, 2), rand(3, 4))


def test_rejects_factors_of_another_out_size():
    message = "kron_linear: N1·N2 = 2·4 = 8 must be the layer's N = 6; got a (2, 2), b (4, 4)"
    with raises(ValueError, message):
        kron_linear(rand(2, 8), rand(6, 8), rand(2, 2), rand(4, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_rejects_dtypes(dtype):
    name = str(dtype).removeprefix("torch.")
    with raises(TypeError, f"kron_delta: x must be float32, float16, bfloat16 or float64; got {name}"):
        kron_delta(torch.ones(2, 8).to(dtype), rand(2, 2), rand(3, 4))
    with raises(TypeError, f"kron_delta: b must be float32, float16, bfloat16 or float64; got {name}"):
        kron_delta(rand(2, 8), rand(2, 2), torch.ones(3, 4).to(dtype))


def test_rejects_a_weight_of_another_dtype():
    with raises(TypeError, "kron_linear: weight must have x's dtype bfloat16; got float32"):
        kron_linear(rand(2, 8, dtype=torch.bfloat16), rand(6, 8), rand(2, 2), rand(3, 4))


def test_rejects_factors_that_are_no_matrices():
    with raises(ValueError, "kron_delta: a must be (N1, K1) with sizes of at least 1; got (2,)"):
        kron_delta(rand(2, 8), rand(2), rand(3, 4))
    with raises(ValueError, "kron_delta: b must be (N2, K2) with sizes of at least 1; got (0, 4)"):
        kron_delta(rand(2, 8), rand(2, 2), rand(0, 4))


def test_rejects_ranks_that_differ():
    message = "kron_delta: b (N2, R) and b_down (R, K2) must share R; got b (3, 2), b_down (5, 4)"
    with raises(ValueError, message):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 2), b_down=rand(5, 4))


def test_rejects_a_base_of_another_shape():
    with raises(ValueError, "kron_delta: base must be (..., N) = (2, 6), as x (2, 8) says; got (2, 7)"):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 4), base=rand(2, 7))


def test_rejects_a_bias_and_row_scale_of_another_size():
    with raises(ValueError, "kron_linear: bias must be (N,) = (6,); got (5,)"):
        kron_linear(rand(2, 8), rand(6, 8), rand(2, 2), rand(3, 4), bias=rand(5))
    term = KronTerm(rand(2, 2), rand(3, 4), row_scale=rand(8))
    with raises(ValueError, "kron_linear_group: row_scale must be (N,) = (6,); got (8,)"):
        kron_linear_group(rand(2, 8), [FrozenLinear(None, (term,))])


def test_rejects_scales():
    with raises(ValueError, "kron_delta: scale must be a float or a 0-d tensor; got (3,)"):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 4), scale=rand(3))
    with raises(TypeError, "kron_delta: scale must be a float or a 0-d tensor; got str"):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 4), scale="1")


def test_rejects_another_device():
    with raises(ValueError, "kron_delta: b must be on x's device cpu; got meta"):
        kron_delta(rand(2, 8), rand(2, 2), torch.empty(3, 4, device="meta"))


def test_rejects_empty_groups_and_says_which_layer_is_wrong():
    with raises(ValueError, "kron_linear_group: layers must hold at least one FrozenLinear; got none"):
        kron_linear_group(rand(2, 8), [])
    with raises(
        ValueError, "kron_linear_group: layer 1: a layer needs a weight or at least one term; got neither"
    ):
        kron_linear_group(rand(2, 8), [FrozenLinear(rand(4, 8)), FrozenLinear(None)])
    with raises(
        ValueError, "kron_linear_group: layer 1: term 1: x must end in K = K1·K2 = 2·5 = 10; got x (2, 8)"
    ):
        good, bad = KronTerm(rand(2, 2), rand(3, 4)), KronTerm(rand(2, 2), rand(3, 5))
        kron_linear_group(rand(2, 8), [FrozenLinear(rand(4, 8)), FrozenLinear(None, (good, bad))])


def test_rejects_implementations():
    with raises(
        ValueError, "kron_delta: impl must be one of auto, reference, eager, cpu, triton, cuda; got 'fast'"
    ):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 4), impl="fast")
    with raises(
        NotImplementedError, "kron_delta: impl='cuda' cannot serve this call:\n    kron_delta has no"
    ):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 4), impl="cuda")


def test_rejects_merges_of_another_shape():
    message = "kron_merge: weight must be (N, K) = (N1·N2, K1·K2) = (2·3, 2·4) = (6, 8); got (6, 9)"
    with raises(ValueError, message):
        kron_merge(rand(6, 9), rand(2, 2), rand(3, 4))


def test_rejects_plans():
    with raises(ValueError, "plan: sizes must be at least 1 and M at least 0; got M=4"):
        plan(4, 0, 4, 5, 6)


def test_backend_choice():
    """`auto` on a CPU is eager; a named implementation that cannot serve raises with its reasons."""
    from kronafuse import backends
    from kronafuse.ops.kron_linear.op import IMPLEMENTATIONS

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert backends.choose("kron_delta", IMPLEMENTATIONS, "auto", cpu, torch.float32).name == "eager"
    no = backends.Implementation("triton", lambda *_: ["no compiler"], lambda: None)
    backends._warn_eager.cache_clear()
    with pytest.warns(RuntimeWarning, match="kron_delta: running on torch's own GEMMs.*no compiler"):
        chosen = backends.choose("kron_delta", (no, IMPLEMENTATIONS[0]), "auto", cuda, torch.float32)
    assert chosen.name == "eager"
    with raises(NotImplementedError, "no implementation serves cuda:0"):
        backends.choose("kron_delta", (no, IMPLEMENTATIONS[1]), "auto", cuda, torch.float32)


def test_available_impls_gives_reasons():
    impls = kronafuse.available_impls()
    assert list(impls) == ["reference", "eager", "cpu", "triton", "cuda"]
    assert impls["eager"] == []
    assert impls["reference"] == []
    assert impls["cuda"] == ["not built yet"]
