"""What a wrong call prints: op, rule in letters, rule in numbers, what came."""

from __future__ import annotations

import re

import kronafuse
import pytest
import torch
from kronafuse import FrozenLinear, KronTerm, kron_delta, kron_linear, kron_linear_group, kron_merge, plan
from kronafuse.ops.bottleneck.op import bottleneck


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


def operations():
    """Every public operator with all its tensors."""
    x, weight, a, b, b_down = rand(4, 8), rand(6, 8), rand(2, 2), rand(3, 2), rand(2, 4)
    yield (
        "kron_linear",
        kron_linear,
        {"x": x, "weight": weight, "a": a, "b": b, "b_down": b_down, "bias": rand(6)},
    )
    yield "kron_delta", kron_delta, {"x": x, "a": a, "b": b, "b_down": b_down, "base": rand(4, 6)}
    yield "kron_linear_group", group_of_one, {"x": x, "a": a, "b": rand(3, 4), "row_scale": rand(6)}
    yield "kron_merge", kron_merge, {"weight": weight, "a": a, "b": b, "b_down": b_down}
    biases = {"down_bias": rand(3), "up_bias": rand(8)}
    yield (
        "bottleneck",
        bottleneck,
        {"x": x, "residual": rand(4, 8), "down": rand(3, 8), "up": rand(8, 3), **biases},
    )


def group_of_one(x, a, b, row_scale, scale=1.0):
    return kron_linear_group(x, [FrozenLinear(None, (KronTerm(a, b, None, scale, row_scale=row_scale),))])


LAYOUTS = {
    "layout torch.sparse_coo": lambda tensor: tensor.to_sparse(),
    "layout torch.sparse_csr": lambda tensor: tensor.to_sparse_csr(),
    "layout torch._mkldnn": lambda tensor: tensor.to_mkldnn(),
    "a nested tensor": lambda tensor: torch.nested.nested_tensor(list(tensor)),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors):UserWarning")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rejects_tensors_that_are_not_dense(layout, autocast):
    for op, function, tensors in operations():
        for name, tensor in tensors.items():
            if layout == "layout torch.sparse_csr" and tensor.dim() == 1:
                continue
            other = LAYOUTS[layout](tensor)
            message = f"{op}: {name} must be a dense tensor (layout torch.strided); got {layout}"
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), raises(TypeError, message):
                function(**{**tensors, name: other})
        with raises(TypeError, f"{op}: scale must be a dense tensor"):
            function(**tensors, scale=torch.tensor(1.0).to_sparse())


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantize:DeprecationWarning")
def test_rejects_complex_and_quantized_tensors():
    for op, function, tensors in operations():
        for name, tensor in tensors.items():
            with raises(
                TypeError, f"{op}: {name} must be float32, float16, bfloat16 or float64; got complex64"
            ):
                function(**{**tensors, name: tensor.to(torch.complex64)})
            with raises(TypeError, f"{op}: {name} must be float32, float16, bfloat16 or float64; got qint8"):
                function(**{**tensors, name: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)})


@pytest.mark.parametrize("scale", [1e39, -1e39, float("nan"), float("inf"), 10**400])
def test_rejects_scales_that_are_not_finite_in_float32(scale):
    rule = "scale must be a finite number of float32, from -3.402823e+38 to 3.402823e+38; got"
    for op, function, tensors in operations():
        with raises(ValueError, f"{op}: {rule}"):
            function(**tensors, scale=scale)


def test_takes_scales_of_float64_beside_float64():
    y = kron_delta(rand(2, 8).double(), rand(2, 2), rand(3, 4), scale=1e39)
    assert y.isfinite().all()
    assert y.abs().max() > 1e37


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
    with raises(NotImplementedError, "kron_delta: impl='cuda' cannot serve this call:\n    "):
        kron_delta(rand(2, 8), rand(2, 2), rand(3, 4), impl="cuda")


def test_rejects_merges_of_another_shape():
    message = "kron_merge: weight must be (N, K) = (N1·N2, K1·K2) = (2·3, 2·4) = (6, 8); got (6, 9)"
    with raises(ValueError, message):
        kron_merge(rand(6, 9), rand(2, 2), rand(3, 4))


def test_rejects_plans():
    with raises(ValueError, "plan: sizes must be at least 1 and M at least 0; got M=4"):
        plan(4, 0, 4, 5, 6)


def test_backend_choice(monkeypatch):
    """`auto` takes the first that can serve; a named implementation that cannot raises with its reasons."""
    from kronafuse import backends, native
    from kronafuse.ops.kron_linear.raw import IMPLEMENTATIONS

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    named = {each.name: each for each in IMPLEMENTATIONS}
    first = "eager" if native.cpu_reasons() else "cpu"
    assert backends.choose("kron_delta", IMPLEMENTATIONS, "auto", cpu, torch.float32).name == first
    from kronafuse.ops import triton_reasons

    monkeypatch.setattr(triton_reasons.env, "triton_interprets", lambda: False)
    with raises(NotImplementedError, "no CUDA device: tensors are on cpu"):
        backends.choose("kron_delta", IMPLEMENTATIONS, "triton", cpu, torch.float32)
    no = backends.Implementation("triton", lambda *_: ["no compiler"], lambda: None)
    backends._warn_eager.cache_clear()
    with pytest.warns(RuntimeWarning, match="kron_delta: running on torch's own GEMMs.*no compiler"):
        chosen = backends.choose("kron_delta", (no, named["eager"]), "auto", cuda, torch.float32)
    assert chosen.name == "eager"
    with raises(NotImplementedError, "no implementation serves cuda:0"):
        backends.choose("kron_delta", (no, named["reference"]), "auto", cuda, torch.float32)


def test_available_impls_gives_reasons():
    impls = kronafuse.available_impls()
    assert list(impls) == ["reference", "eager", "cpu", "triton", "cuda"]
    assert impls["eager"] == []
    assert impls["reference"] == []
    # It runs by name at most: no GPU has measured it.
    assert impls["cuda"]


def test_rejects_arguments_that_are_no_tensors():
    x, a, b = rand(2, 8), rand(2, 2), rand(3, 4)
    with raises(TypeError, "kron_delta: b must be a tensor; got NoneType"):
        kron_delta(x, a, None)
    with raises(TypeError, "kron_delta: x must be a tensor; got list"):
        kron_delta([1.0], a, b)
    with raises(TypeError, "kron_linear: weight must be a tensor; got NoneType"):
        kron_linear(x, None, a, b)
    with raises(TypeError, "kron_delta: shuffled must be True or False; got 'no'"):
        kron_delta(x, a, b, shuffled="no")
    with raises(TypeError, "kron_delta: impl must be a string; got NoneType"):
        kron_delta(x, a, b, impl=None)
    with raises(TypeError, "kron_linear_group: layers must be a list of FrozenLinears; got FrozenLinear"):
        kron_linear_group(x, FrozenLinear(rand(4, 8)))
    with raises(TypeError, "kron_linear_group: terms must be a tuple of KronTerms; got KronTerm"):
        kron_linear_group(x, [FrozenLinear(None, KronTerm(a, b))])
    with raises(TypeError, "kron_linear_group: terms must be KronTerms; got Tensor"):
        kron_linear_group(x, [FrozenLinear(None, (a, b))])
    with raises(TypeError, "kron_merge: weight must be a tensor; got NoneType"):
        kron_merge(None, a, b)
    with raises(TypeError, "plan: M must be an integer; got 4.5"):
        plan(4.5, 2, 2, 3, 4)


def test_takes_scales_of_numpy():
    import numpy as np

    x, a, b = rand(2, 8), rand(2, 2), rand(3, 4)
    assert torch.equal(kron_delta(x, a, b, scale=np.float32(0.5)), kron_delta(x, a, b, scale=0.5))


def test_rejects_integers_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16), raises(TypeError, "kron_linear: weight must be float32"):
        kron_linear(rand(2, 8), torch.ones(6, 8, dtype=torch.int64), rand(2, 2), rand(3, 4))
