"""The Triton kernels of the bottleneck by themselves: poisoned outputs, small tiles, mixed dtypes, launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronafuse import checks
from kronafuse.ops import launch as launching
from kronafuse.ops.bottleneck import eager, kernels, tuning
from kronafuse.ops.bottleneck.call import Call, Needs
from kronafuse.ops.kron_linear.tuning import SHARED_BYTES
from kronafuse.ops.launch import Architecture
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.bottleneck_cases import CASES, ODD_CASES, BottleneckCase
from kronafuse.testing.inputs import bottleneck_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SPACINGS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}
"""Largest error, in spacings of the dtype at the largest element of the result."""
ALL = Needs(True, True, True, True, True, True)


@pytest.fixture(params=["chosen", "small"])
def configurations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule's tiles, and with tiles so small that every loop and every grid repeats."""
    if request.param == "small":
        chosen = tuning.bottleneck_config

        def small(*arguments: Any) -> tuning.BottleneckConfig:
            columns = tuning.blocks(tuning.blocks(arguments[-1], 16), 3) * 16
            split = tuning.blocks(arguments[-1], columns)
            blocks = {"block_m": 16, "block_in": 16, "block_out": 16}
            return replace(chosen(*arguments), **blocks, split=split, columns=columns)

        monkeypatch.setattr(tuning, "bottleneck_config", small)


def make_call(
    case: BottleneckCase,
    dtype: torch.dtype,
    *,
    x_dtype: torch.dtype | None = None,
    scale: float | Tensor = 0.7,
    strided: bool = False,
) -> Call:
    tensors = {
        name: tensor.to(DEVICE) for name, tensor in bottleneck_inputs(case, dtype, strided=strided).items()
    }
    x = tensors["x"] if x_dtype is None else tensors["x"].to(x_dtype)
    residual = {"x": x, "other": tensors.get("residual"), "none": None}[case.residual]
    if residual is not None and x_dtype is not None:
        residual = residual.to(x_dtype)
    return Call(
        x,
        residual,
        tensors["down"],
        tensors["up"],
        tensors.get("down_bias"),
        tensors.get("up_bias"),
        scale,
        case.activation,
        dtype,
        case.residual == "x",
    )


def double(call: Call) -> Call:
    """The same in float64."""
    wide = {name: value.double() for name, value in call._asdict().items() if isinstance(value, Tensor)}
    return call._replace(**wide, dtype=torch.float64)


def assert_close(name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype, spacings: int) -> None:
    """Fails where an element of `actual` is NaN or too far from `truth`."""
    assert actual.shape == truth.shape, name
    assert actual.is_contiguous(), name
    if truth.numel() == 0:
        return
    error = (actual.double() - truth).abs().max().item()
    limit = spacings * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
    assert error <= limit, f"{name}: error {error:.3e}, limit {limit:.3e}"


def assert_step(call: Call, needs: Needs, dtype: torch.dtype) -> None:
    """Forward and backward on poisoned outputs against eager in float64, from the same pre-activation."""
    with poisoned():
        y, pre = kernels.forward(call, True)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype).to(DEVICE)
        grads = kernels.backward(dy, call, pre, needs)
    wide = double(call)
    true_y, true_pre = eager.forward(wide, True)
    truth = eager.backward(dy.double(), wide, pre.double(), needs)
    assert_close("y", y, true_y, dtype, SPACINGS[dtype])
    assert_close("pre", pre, true_pre, dtype, SPACINGS[dtype])
    for name, actual, expected, needed in zip(Needs._fields, grads, truth, needs, strict=True):
        assert (actual is not None) == (expected is not None) == needed, name
        if actual is not None and expected is not None:
            assert_close(name, actual, expected, dtype, 4 * SPACINGS[dtype])


@pytest.mark.usefixtures("configurations")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", ODD_CASES.values(), ids=str)
def test_every_element_is_written(case, dtype):
    has = case.biases
    needs = Needs(True, True, True, has, has, True)
    assert_step(make_call(case, dtype, scale=torch.tensor(0.6, device=DEVICE)), needs, dtype)


@pytest.mark.usefixtures("configurations")
@pytest.mark.parametrize("case", ["primes", "narrowing", "no_residual", "width_two_parts"])
def test_wide_stream_beside_narrow_products(case):
    """What autocast leaves: x, residual, y and their gradients in float32, products in float16."""
    call = make_call(ODD_CASES[case], torch.float16, x_dtype=torch.float32)
    assert_step(call, ALL._replace(scale=False), torch.float16)
    y, pre = kernels.forward(call, True)
    assert (y.dtype, pre.dtype) == (
        torch.float16 if case == "no_residual" else torch.float32,
        torch.float16,
    )


def test_a_float32_stream_is_not_rounded():
    """A delta of nothing leaves the residual's bits alone."""
    call = make_call(ODD_CASES["primes"], torch.float16, x_dtype=torch.float32, scale=0.0)
    y, _ = kernels.forward(call, False)
    assert torch.equal(y, call.x)


NEEDED = [Needs(*(name == each for each in Needs._fields)) for name in Needs._fields]


@pytest.mark.parametrize("needs", NEEDED, ids=Needs._fields)
def test_each_gradient_alone(needs):
    call = make_call(ODD_CASES["narrowing"], torch.float32, scale=torch.tensor(0.6, device=DEVICE))
    assert_step(call, needs, torch.float32)


def recorded(call: Call, needs: Needs) -> tuple[list[str], list[str]]:
    """Names of the kernels that forward and backward launch."""
    with launching.recording(Architecture(90, 132)) as launches:
        y, pre = kernels.forward(call, any(needs))
        forward = [each.kernel.__name__ for each in launches]
        launches.clear()
        kernels.backward(y, call, pre, needs)
    return forward, [each.kernel.__name__ for each in launches]


def test_forward_is_one_kernel_and_backward_one_pass():
    """Then one reduction a factor, which has its bias's gradient too, and the second stages of both."""
    call = make_call(ODD_CASES["primes"], torch.float32)
    forward, backward = recorded(call, ALL._replace(scale=False))
    assert forward == ["_bottleneck_forward_kernel"]
    assert backward == ["_bottleneck_backward_kernel", "_reduce_kernel", "_reduce_kernel"]
    assert recorded(call, Needs(True, False, False, False, False, False))[1] == [
        "_bottleneck_backward_kernel"
    ]
    assert recorded(call, Needs(False, False, True, False, True, False))[1] == ["_reduce_kernel"]
    assert recorded(call, Needs(False, False, False, False, True, False))[1] == []


def test_tf32_follows_torch():
    previous = torch.get_float32_matmul_precision()
    call = make_call(ODD_CASES["primes"], torch.float32)
    found = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with launching.recording(Architecture(90, 132)) as launches:
                kernels.forward(call, False)
            found.append(launches[0].constants["PRECISION"])
    finally:
        torch.set_float32_matmul_precision(previous)
    assert found == ["ieee", "tf32"]


def test_width_in_parts():
    """One or two powers of two hold every width, padded by less than a third of it or by 15 columns at most."""
    for width in range(1, checks.MAX_WIDTH + 1):
        first, second = tuning.width_parts(width)
        padding = first + second - width
        assert 0 <= padding <= checks.MAX_WIDTH - width, width
        assert padding < 16 or 3 * padding < width, width
        for part in (first, second):
            assert part == 0 or (part >= 16 and part & (part - 1) == 0), width
    assert [tuning.width_parts(width) for width in (7, 60, 160, 256)] == [
        (16, 0),
        (64, 0),
        (128, 32),
        (256, 0),
    ]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_configurations_fit_the_work(capability, dtype):
    """Columns are shared out whole, few rows give many programs, and the tiles fit the shared memory."""
    for case in CASES.values():
        for tokens in (1, case.tokens, 16 * case.tokens):
            config = tuning.bottleneck_config(
                Architecture(capability, 1),
                dtype,
                torch.float32,
                tokens,
                case.in_features,
                case.width,
                case.out_features,
            )
            assert (config.split - 1) * config.columns < case.out_features <= config.split * config.columns
            assert config.columns % config.block_out == 0
            assert config.split <= tuning.MOST_SPLITS
            assert config.stages >= 2
            assert config.block_in >= 16
            width = config.width + config.second
            tiles = config.stages * config.block_in * (config.block_m * 4 + width * dtype.itemsize)
            assert tiles + config.block_m * width * dtype.itemsize <= SHARED_BYTES[capability]
            programs = tuning.blocks(tokens, config.block_m) * config.split
            assert config.split == 1 or programs <= tuning.PROGRAMS


def test_interpreted_activations_are_torchs():
    """Far from 0 on both sides and at it."""
    numbers = torch.cat((torch.linspace(-30, 30, 60), torch.zeros(1)))[:, None].to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    for activation in ("identity", "relu", "sigmoid", "silu", "gelu"):
        call = Call(numbers, None, one, one, None, None, 1.0, activation, torch.float32, False)
        assert_step(call, Needs(True, True, True, False, False, False), torch.float32)
