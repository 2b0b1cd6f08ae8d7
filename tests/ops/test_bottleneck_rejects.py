"""What a wrong call of bottleneck prints: op, rule in letters, rule in numbers, what came."""

from __future__ import annotations

import re

import pytest
import torch
from kronafuse.ops.bottleneck.op import bottleneck


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def raises(error, message):
    return pytest.raises(error, match=re.escape(f"bottleneck: {message}"))


X, DOWN, UP = rand(2, 8), rand(3, 8), rand(8, 3)


def test_rejects_x_of_another_width():
    with raises(ValueError, "x must end in K = 8; got x (2, 77, 768), down (3, 8)"):
        bottleneck(rand(2, 77, 768), None, DOWN, UP)
    with raises(ValueError, "x must be (..., K); got a 0-d tensor"):
        bottleneck(torch.tensor(1.0), None, DOWN, UP)


def test_rejects_widths_that_differ():
    with raises(ValueError, "down (H, K) and up (N, H) must share H; got down (3, 8), up (8, 4)"):
        bottleneck(X, X, DOWN, rand(8, 4))


@pytest.mark.parametrize("width", [257, 1024])
def test_rejects_widths_above_the_limit(width):
    with raises(ValueError, f"down (H, K) must have H from 1 to 256; got ({width}, 8)"):
        bottleneck(X, X, rand(width, 8), rand(8, width))


def test_rejects_factors_that_are_no_matrices():
    with raises(ValueError, "down must be (H, K) with sizes of at least 1; got (0, 8)"):
        bottleneck(X, X, rand(0, 8), rand(8, 0))
    with raises(ValueError, "up must be (N, H) with sizes of at least 1; got (8,)"):
        bottleneck(X, X, DOWN, rand(8))


def test_rejects_biases_of_another_size():
    with raises(ValueError, "down_bias must be (H,) = (3,); got (8,)"):
        bottleneck(X, X, DOWN, UP, down_bias=rand(8))
    with raises(ValueError, "up_bias must be (N,) = (8,); got (1, 8)"):
        bottleneck(X, X, DOWN, UP, up_bias=rand(1, 8))


def test_rejects_residuals_of_another_shape():
    message = "residual must be (..., N) = (2, 5), as x (2, 8) and up (5, 3) say; got (2, 8)"
    with raises(ValueError, message):
        bottleneck(X, X.clone(), DOWN, rand(5, 3))
    message = "x as its own residual needs N = K; got K = 8, N = 5, as down (3, 8) and up (5, 3) say"
    with raises(ValueError, message):
        bottleneck(X, X, DOWN, rand(5, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_rejects_dtypes(dtype):
    name = str(dtype).removeprefix("torch.")
    for argument in ("x", "down", "up"):
        given = {"x": X, "down": DOWN, "up": UP}
        given[argument] = given[argument].to(dtype)
        with raises(TypeError, f"{argument} must be float32, float16, bfloat16 or float64; got {name}"):
            bottleneck(given["x"], None, given["down"], given["up"])
    with raises(TypeError, f"residual must be float32, float16, bfloat16 or float64; got {name}"):
        bottleneck(X, X.to(dtype), DOWN, UP)
    with (
        torch.autocast("cpu", torch.bfloat16),
        raises(TypeError, f"residual must be float32, float16, bfloat16 or float64; got {name}"),
    ):
        bottleneck(X, X.to(dtype), DOWN, UP)


def test_rejects_a_residual_of_another_dtype_outside_autocast():
    with raises(TypeError, "residual must have x's dtype bfloat16; got float32"):
        bottleneck(X.bfloat16(), X, DOWN, UP)
    with torch.autocast("cpu", torch.bfloat16):
        assert bottleneck(X.bfloat16(), X, DOWN, UP).dtype == torch.float32


def test_rejects_another_device():
    for name in ("down", "up", "residual", "up_bias"):
        given = {"down": DOWN, "up": UP, "residual": X.clone(), "up_bias": rand(8)}
        given[name] = given[name].to("meta")
        with raises(ValueError, f"{name} must be on x's device cpu; got meta"):
            bottleneck(X, given["residual"], given["down"], given["up"], up_bias=given["up_bias"])


def test_rejects_activations():
    for activation in ("tanh", "ReLU", None, torch.relu):
        message = f"activation must be one of identity, relu, sigmoid, silu, gelu; got {activation!r}"
        with raises(ValueError, message):
            bottleneck(X, X, DOWN, UP, activation=activation)


def test_rejects_scales():
    with raises(ValueError, "scale must be a float or a 0-d tensor; got (3,)"):
        bottleneck(X, X, DOWN, UP, scale=rand(3))
    with raises(TypeError, "scale must be a float or a 0-d tensor; got str"):
        bottleneck(X, X, DOWN, UP, scale="1")
    with raises(ValueError, "scale must be on x's device cpu; got meta"):
        bottleneck(X, X, DOWN, UP, scale=torch.tensor(1.0, device="meta"))


def test_rejects_arguments_that_are_no_tensors():
    with raises(TypeError, "x must be a tensor; got list"):
        bottleneck([1.0], None, DOWN, UP)
    with raises(TypeError, "residual must be a tensor or None; got float"):
        bottleneck(X, 1.0, DOWN, UP)
    with raises(TypeError, "down must be a tensor; got NoneType"):
        bottleneck(X, None, None, UP)
    with raises(TypeError, "up_bias must be a tensor or None; got float"):
        bottleneck(X, None, DOWN, UP, up_bias=0.0)
    with raises(TypeError, "impl must be a string; got NoneType"):
        bottleneck(X, None, DOWN, UP, impl=None)


def test_the_fake_checks_as_the_kernel_does():
    """Meta tensors and compiled programs meet the same texts."""
    with raises(ValueError, "x must end in K = 8; got x (2, 9), down (3, 8)"):
        bottleneck(*(each.to("meta") for each in (rand(2, 9), rand(2, 8), DOWN, UP)))
