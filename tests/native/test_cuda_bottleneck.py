"""The CUDA kernels of the bottleneck by themselves, against float64: every tile, reading, dtype and set of outputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bottleneck_problems import Problem, assert_close, double
from kronafuse import checks
from kronafuse.ops.bottleneck import eager
from kronafuse.ops.bottleneck.activation_numbers import ACTIVATIONS
from kronafuse.ops.bottleneck.activations import FORWARD
from kronafuse.ops.bottleneck.call import Call, Needs
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16]
CONFIGS = {"wide": 0, "narrow": 1, "small": 2}
WIDTHS = {"wide": 256, "narrow": 64, "small": 256}


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def packed_of(call: Call) -> Tensor:
    """Room for both factors, NaN all over."""
    elements = sum(each.shape[0] * -(-each.shape[1] // 8) * 8 for each in (call.down, call.up))
    return nan(call, elements)


def nan(call: Call, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype or call.dtype, device=call.x.device)


def scale_of(call: Call) -> tuple[Tensor | None, float]:
    return (call.scale, 1.0) if isinstance(call.scale, Tensor) else (None, call.scale)


def assert_forward(ops: Any, call: Call, config: int, *, keep: bool = True) -> Tensor:
    """y and the pre-activation on poisoned outputs; returns the latter."""
    tokens, width, out_features = call.x.shape[0], call.down.shape[0], call.up.shape[0]
    y_dtype = call.dtype if call.residual is None else torch.promote_types(call.dtype, call.residual.dtype)
    y = nan(call, tokens, out_features, dtype=y_dtype)
    pre = nan(call, tokens, width) if keep else nan(call, 0)
    factors = (call.down, call.up, call.down_bias, call.up_bias)
    options = (*scale_of(call), ACTIVATIONS[call.activation], config, packed_of(call))
    ops.bottleneck_forward(call.x, call.residual, *factors, *options, y, pre)
    true_y, true_pre = eager.forward(double(call), True)
    assert_close("y", y, true_y, call.dtype)
    if keep:
        assert_close("pre", pre, true_pre, call.dtype)
    return pre


OUTPUTS = ("dx", "hidden", "dpre", "ddown_bias", "dup_bias")


def assert_backward(
    ops: Any, call: Call, dy: Tensor, pre: Tensor, config: int, wanted: tuple[str, ...] = OUTPUTS
) -> None:
    """The outputs asked for, on poisoned memory, against eager in float64 from the same pre-activation."""
    tokens, width, (out_features, _) = dy.shape[0], call.down.shape[0], call.up.shape
    shapes = {
        "dx": (tokens, call.x.shape[1]),
        "hidden": (tokens, width),
        "dpre": (tokens, width),
        "ddown_bias": (width,),
        "dup_bias": (out_features,),
    }
    dtypes = {"dx": call.x.dtype, "ddown_bias": torch.float32, "dup_bias": torch.float32}
    outputs = {
        name: nan(call, *shapes[name], dtype=dtypes.get(name)) if name in wanted else None for name in OUTPUTS
    }
    sums = nan(call, -(-tokens // 32) * (width + out_features), dtype=torch.float32)
    tensor, number = scale_of(call)
    ops.bottleneck_backward(
        dy, pre, call.down, call.up, tensor, number, ACTIVATIONS[call.activation], call.residual_is_x, True, config,
        packed_of(call), sums, *outputs.values(),
    )  # fmt: skip
    wide, low = double(call), dy.to(call.dtype).double()
    zeros = wide._replace(down_bias=low.new_zeros(width), up_bias=low.new_zeros(out_features))
    # dy is rounded where it is multiplied, and not where it is added.
    alone = zeros._replace(residual_is_x=False)
    truth = eager.backward(low, alone, pre.double(), Needs(True, True, True, True, True, False))
    assert truth.x is not None
    expected = {
        "dx": truth.x + dy.double() if call.residual_is_x else truth.x,
        "hidden": FORWARD[call.activation](pre.double()),
        "dpre": eager.BACKWARD[call.activation](wide.scale * (low @ wide.up), pre.double()),
        "ddown_bias": truth.down_bias,
        "dup_bias": truth.up_bias,
    }
    for name in wanted:
        assert_close(name, outputs[name], expected[name], call.dtype)


def assert_step(
    ops: Any, problem: Problem, dtype: torch.dtype, device: torch.device, config: int = -1
) -> None:
    call, dy = problem.call(dtype, device)
    pre = assert_forward(ops, call, config)
    assert_backward(ops, call, dy, pre, config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_tiles_and_activations(cuda_ops, dtype, activation, config):
    """More rows than a block, a width that is no multiple of a fragment, every activation."""
    problem = Problem(150, 72, 40, 136, "other", activation)
    assert_step(cuda_ops.ops, problem, dtype, cuda_ops.device, CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("residual", ["x", "other", "none"])
@pytest.mark.parametrize("width", [8, 60, 64, 160, 256])
def test_widths(cuda_ops, width, residual, config):
    if width > WIDTHS[config]:
        pytest.skip("wider than the tile takes")
    assert_step(
        cuda_ops.ops, Problem(130, 80, width, 80, residual), torch.bfloat16, cuda_ops.device, CONFIGS[config]
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("factor", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("stream", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes(cuda_ops, stream, factor, config):
    """What autocast leaves: features and factors of other dtypes beside products in bfloat16."""
    problem = Problem(45, 72, 24, 72, "x", "silu", stream=stream, factor=factor)
    assert_step(cuda_ops.ops, problem, torch.bfloat16, cuda_ops.device, CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stream", [None, torch.float32], ids=["narrow", "float32"])
def test_strided(cuda_ops, dtype, stream, config):
    """Features with gaps, transposed factors, biases with gaps, a tensor scale; no size that a chunk divides."""
    scale = torch.tensor(0.6, dtype=torch.float64)
    problem = Problem(37, 53, 12, 53, "x", "sigmoid", strided=True, stream=stream, scale=scale)
    assert_step(cuda_ops.ops, problem, dtype, cuda_ops.device, CONFIGS[config])


@pytest.mark.parametrize(("config", "multiprocessors", "kibibytes"), [
    ("wide", 4, 227), ("wide", 4, 200), ("wide", 4, 150), ("narrow", 4, 58), ("small", 4, 99), ("small", 100, 99),
])  # fmt: skip
def test_devices(cuda_ops, config, multiprocessors, kibibytes):
    """Rings of four, three and two stages, as shared memory allows; rows shared among blocks where they are few."""
    if cuda_ops.device.type == "cuda":
        pytest.skip("the emulated device alone can be another one")
    problem = Problem(
        150, 200, WIDTHS[config], 392, "other", stream=None if config == "narrow" else torch.float32
    )
    cuda_ops.ops.emulation_settings(multiprocessors, kibibytes * 1024, 9, 0, 7)
    try:
        assert_step(cuda_ops.ops, problem, torch.bfloat16, cuda_ops.device, CONFIGS[config])
    finally:
        cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, 0)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 40, 8, 40),
        Problem(0, 40, 8, 40),
        Problem(9, 24, 1, 24, biases=False),
        Problem(7, 37, 5, 37),
        Problem(33, 19, 12, 330, "other"),
        Problem(33, 330, 12, 19, "none"),
        Problem(9, 1, 3, 1),
    ],
    ids=["one_token", "empty", "width_1", "primes", "widening", "narrowing", "one_feature"],
)
def test_odd_sizes(cuda_ops, dtype, problem):
    assert_step(cuda_ops.ops, problem, dtype, cuda_ops.device)


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_alone(cuda_ops, dtype, name):
    call, dy = Problem(70, 48, 20, 56, "other").call(dtype, cuda_ops.device)
    pre = assert_forward(cuda_ops.ops, call, -1)
    assert_backward(cuda_ops.ops, call, dy, pre, -1, (name,))


def test_pre_activation_is_optional(cuda_ops, dtype):
    call, _ = Problem(40, 48, 20, 48).call(dtype, cuda_ops.device)
    assert_forward(cuda_ops.ops, call, -1, keep=False)


def test_expanded_rows(cuda_ops, dtype):
    """One token for all, and a dy of one number."""
    call, dy = Problem(40, 48, 16, 48).call(dtype, cuda_ops.device)
    x, dy = call.x[:1].expand(40, 48), dy[:1, :1].expand(40, 48)
    call = call._replace(x=x, residual=x)
    pre = assert_forward(cuda_ops.ops, call, -1)
    assert_backward(cuda_ops.ops, call, dy, pre, -1)


def test_a_float32_stream_is_not_rounded(cuda_ops):
    """A delta of nothing leaves the residual's bits alone."""
    call, _ = Problem(20, 48, 16, 48, stream=torch.float32, scale=0.0).call(torch.float16, cuda_ops.device)
    y = torch.full((20, 48), float("nan"), device=cuda_ops.device)
    options = (None, 0.0, 0, -1, packed_of(call), y, nan(call, 0))
    cuda_ops.ops.bottleneck_forward(call.x, call.x, call.down, call.up, None, None, *options)
    assert torch.equal(y, call.x)


def refuses(ops: Any, message: str, **changes: Any) -> None:
    """A forward with these arguments in place of good ones."""
    device = changes.pop("device")
    rand = partial(torch.zeros, dtype=torch.float16, device=device)
    arguments: dict[str, Any] = {
        "x": rand(4, 16), "residual": None, "down": rand(8, 16), "up": rand(24, 8), "down_bias": None,
        "up_bias": None, "scale_tensor": None, "scale": 1.0, "activation": 1, "config": -1, "packed": None,
        "y": rand(4, 24), "pre": rand(4, 8),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.bottleneck_forward(*(arguments | changes).values())


def test_refuses(cuda_ops):
    refuse = partial(refuses, cuda_ops.ops, device=cuda_ops.device)
    rand = partial(torch.zeros, dtype=torch.float16, device=cuda_ops.device)
    refuse(r"x must be \(M, K\) with K = 16; got \(4, 17\)", x=rand(4, 17))
    refuse(r"H from 1 to 256; got \(257, 16\)", down=rand(257, 16), up=rand(24, 257))
    refuse(r"must share H; got down \(8, 16\), up \(24, 9\)", up=rand(24, 9))
    refuse(r"residual must be \(M, N\) = \(4, 24\); got \(4, 16\)", residual=rand(4, 16))
    refuse(r"y must be \(4, 24\); got \(5, 24\)", y=rand(5, 24))
    refuse(r"y must be contiguous; got strides \(1, 4\)", y=rand(24, 4).t())
    refuse(r"pre must be \(4, 8\); got \(4, 9\)", pre=rand(4, 9))
    refuse("pre must lie on 4 bytes where H is even; got H = 8", pre=rand(33)[1:].view(4, 8))
    refuse("pre must be float16 or bfloat16; got float32", pre=rand(4, 8).float())
    refuse(r"down_bias must be \(H,\) = \(8,\); got \(9\)", down_bias=rand(9))
    refuse("activation must be from 0 to 4; got 7", activation=7)
    refuse("config must be from -1 to 2; got 3", config=3)
    refuse('tile "narrow" takes H up to 64', config=1, down=rand(72, 16), up=rand(24, 72), pre=rand(4, 72))
    refuse("must be packed: `packed` must have 320 elements; got none", up=rand(24, 8).float())
    refuse(r"packed must be 192 contiguous elements", up=rand(24, 8).float(), packed=rand(100))
    refuse("a tensor scale must have one element; got", scale_tensor=rand(2))
