"""fat_linear: x Wᵀ with a fat term added, x read once. Both directions against float64, beside the eager chain."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from kronafuse.ops.kron_linear.maps import KronMap
from kronafuse.ops.kron_linear.ref import kron_linear_group_ref
from kronafuse.ops.kron_linear.terms import FrozenLinear, KronTerm
from kronafuse.ops.outputs import new_output, poisoned
from kronafuse.testing.accuracy import assert_accurate, noise_of, run
from kronafuse.testing.chain import eager_chain
from kronafuse.testing.inputs import generator, random
from torch import Tensor

CONFIGS = (0, 1, 2)
"""Rows of fat_linear_configurations; 1 and 2 have four stages, 0 has three."""
HOPPER = (100, 101, 102, 103)
"""Rows of fat_linear_sm90a_configurations: 96, 128, 160 and 192 columns; those of 96 and 160 have boxes of 32."""


class Sizes(NamedTuple):
    """A (n1, k1) ⊗ B (n2, k2) on m tokens."""

    m: int
    n1: int
    k1: int
    n2: int
    k2: int


SIZES = {
    "even": Sizes(70, 4, 4, 40, 48),
    "groups_wider_than_units": Sizes(33, 2, 5, 168, 40),
    "groups_narrower_than_units": Sizes(33, 5, 3, 24, 32),
    "odd_number_of_units": Sizes(130, 3, 7, 80, 72),
    "primes": Sizes(131, 3, 5, 13, 19),
    "one_token": Sizes(1, 4, 4, 40, 40),
    "a_scalar": Sizes(9, 1, 1, 96, 80),
    "a_column": Sizes(9, 3, 1, 40, 136),
    "two_left": Sizes(17, 2, 2, 40, 104),
    "b_scalar": Sizes(9, 12, 20, 1, 1),
    "many_bands": Sizes(1100, 1, 2, 88, 8),
}


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Problem:
    """A layer with one fat term and both gradients' ends, on the CPU; `assert_served` runs the kernel on it."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, **options: bool) -> None:
        source, (m, n1, k1, n2, k2) = generator(0), sizes
        self.sizes, self.dtype = sizes, dtype
        factors = torch.float32 if options.get("wide_factors", True) else dtype
        n, k = n1 * n2, k1 * k2
        self.x = random(source, m, k).to(dtype)
        self.dy = random(source, m, n).to(dtype)
        rows = random(source, n).abs() if options.get("row_scale", False) else None
        term = KronTerm(
            (random(source, n1, k1) / k1**0.5).to(factors),
            (random(source, n2, k2) / k2**0.5).to(factors),
            None,
            0.7,
            options.get("shuffled", False),
            None if rows is None else rows.to(dtype),
        )
        self.layer = FrozenLinear(
            (random(source, n, k) / k**0.5).to(dtype) if options.get("weight", True) else None,
            (term,),
            random(source, n).to(dtype) if options.get("bias", True) else None,
            random(source, m, n).to(dtype) if options.get("base", True) else None,
        )

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, KronMap]:
        """x, W, bias, base and the map of y."""
        layer = self.layer
        return self.x, layer.weight, layer.bias, layer.base, KronMap.of(layer.terms[0], None)

    def backward(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, KronMap]:
        """dy, Wᵀ and the map of dx."""
        weight = self.layer.weight
        return self.dy, None if weight is None else weight.t(), None, None, self.forward()[-1].adjoint()

    def assert_accurate(self, y: Tensor | None, dx: Tensor | None) -> None:
        """Raises unless both are about as close to float64 as the eager chain's."""
        layers, dys = [self.layer], [self.dy]
        truth = run(kron_linear_group_ref, self.x, layers, dys, ["x"], torch.float64)
        yardstick = run(eager_chain, self.x, layers, dys, ["x"])
        noise = noise_of(self.x, layers, dys, ["x"])
        for name, actual in (("y0", y), ("dx", dx)):
            if actual is not None:
                assert_accurate(name, actual, yardstick[name], truth[name], noise[name], self.dtype)


def fat(cuda_ops, x, weight, bias, base, kron: KronMap, config: int = -1, y: Tensor | None = None) -> Tensor:
    """The kernel's y, on the CPU."""

    def there(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == cuda_ops.device:
            return tensor
        # Strides travel along, so that the layout under test is the same on a GPU.
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=cuda_ops.device)
        return moved.copy_(tensor)

    with poisoned():
        if y is None:
            y = new_output(there(x), (x.shape[0], kron.left[0] * kron.right[0]))
    tensor_scale = isinstance(kron.scale, Tensor)
    cuda_ops.ops.fat_linear(
        there(x), there(weight), there(bias), there(base), there(kron.a), there(kron.b), there(kron.in_scale),
        there(kron.out_scale), 1.0 if tensor_scale else kron.scale, there(kron.scale) if tensor_scale else None,
        kron.in_shuffled, kron.out_shuffled, config, y,
    )  # fmt: skip
    return y.cpu()


def assert_served(cuda_ops, problem: Problem, config: int = -1) -> None:
    y = fat(cuda_ops, *problem.forward(), config)
    dx = fat(cuda_ops, *problem.backward(), config)
    problem.assert_accurate(y, dx)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_both_directions(cuda_ops, sizes, dtype, config):
    assert_served(cuda_ops, Problem(sizes, dtype), config)


HOPPER_SIZES = {
    "one_tile": Sizes(70, 2, 3, 64, 48),
    "rows_beyond": Sizes(150, 3, 4, 96, 80),
    "a_token": Sizes(1, 4, 4, 40, 40),
    "groups_wider_than_tiles": Sizes(33, 2, 5, 328, 72),
    "a_scalar": Sizes(9, 1, 1, 96, 200),
    "a_column": Sizes(9, 3, 1, 40, 136),
    "many_left": Sizes(17, 2, 23, 40, 16),
    "several_tiles_a_block": Sizes(400, 5, 2, 168, 104),
}
"""Every K-step of 16 to 64 at the end of I2; stages and buffers of B taken several times; blocks with several tiles."""


def on_hopper(cuda_ops) -> None:
    """Skips where the device lacks wgmma; the emulation has it."""
    if cuda_ops.device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs sm_90a")


@pytest.mark.parametrize("config", HOPPER)
@pytest.mark.parametrize("sizes", HOPPER_SIZES.values(), ids=HOPPER_SIZES.keys())
def test_both_directions_on_hopper(cuda_ops, sizes, dtype, config):
    on_hopper(cuda_ops)
    assert_served(cuda_ops, Problem(sizes, dtype), config)


@pytest.mark.parametrize("config", HOPPER)
@pytest.mark.parametrize("options", [{"bias": False, "base": False}, {"wide_factors": False}], ids=str)
def test_parts_on_hopper(cuda_ops, options, dtype, config):
    on_hopper(cuda_ops)
    assert_served(cuda_ops, Problem(Sizes(37, 3, 4, 48, 40), dtype, **options), config)


@pytest.mark.parametrize("config", HOPPER)
def test_scaled_rows_on_hopper(cuda_ops, dtype, config):
    """Forward alone: the adjoint's in_scale is for the plain form."""
    on_hopper(cuda_ops)
    problem = Problem(Sizes(37, 3, 4, 48, 40), dtype, row_scale=True)
    problem.assert_accurate(fat(cuda_ops, *problem.forward(), config), fat(cuda_ops, *problem.backward()))


@pytest.mark.parametrize("config", HOPPER)
def test_no_neighbour_is_read_on_hopper(cuda_ops, dtype, config):
    on_hopper(cuda_ops)
    assert_no_neighbour_is_read(cuda_ops, Problem(Sizes(140, 3, 4, 48, 40), dtype), config)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("config", [2, 102])
def test_threads_in_any_order(cuda_ops, config, seed):
    """Emulated threads take turns in a random order, and copies land at random: nothing but barriers may hold it."""
    if cuda_ops.device.type == "cuda":
        pytest.skip("the device is what it is")
    problem = Problem(Sizes(300, 5, 1, 96, 328), torch.float16, wide_factors=False)
    expected = fat(cuda_ops, *problem.forward(), config)
    cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, seed)
    try:
        assert torch.equal(fat(cuda_ops, *problem.forward(), config), expected)
    finally:
        cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, 0)


@pytest.mark.parametrize("layout", ["transposed", "misaligned", "every_other"])
@pytest.mark.parametrize("operand", ["a", "b"])
def test_factor_layouts_on_hopper(cuda_ops, operand, layout, dtype):
    on_hopper(cuda_ops)
    x, weight, bias, base, kron = Problem(Sizes(37, 3, 4, 48, 40), dtype).forward()
    expected = fat(cuda_ops, x, weight, bias, base, kron, 102)
    setattr(kron, operand, LAYOUTS[layout](getattr(kron, operand)))
    assert torch.equal(fat(cuda_ops, x, weight, bias, base, kron, 102), expected)


def test_hopper_refuses(cuda_ops):
    """By name an error; by choice the plain form serves."""
    on_hopper(cuda_ops)
    for options in ({"weight": False}, {"shuffled": True}):
        problem = Problem(Sizes(37, 3, 4, 48, 40), torch.float16, **options)
        with pytest.raises(RuntimeError, match="the Hopper form, cannot serve"):
            fat(cuda_ops, *problem.forward(), 102)
        assert_served(cuda_ops, problem)
    for sizes in (SIZES["primes"], SIZES["b_scalar"]):
        with pytest.raises(RuntimeError, match="the Hopper form, cannot serve"):
            fat(cuda_ops, *Problem(sizes, torch.float16).forward(), 102)
    x, weight, bias, base, kron = Problem(Sizes(37, 3, 4, 48, 40), torch.float16).forward()
    for name in ("x", "weight", "base"):
        given = {"x": x, "weight": weight, "bias": bias, "base": base}
        given[name] = LAYOUTS["misaligned"](given[name])
        with pytest.raises(RuntimeError, match="the Hopper form, cannot serve"):
            fat(cuda_ops, **given, kron=kron, config=102)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {"weight": False},
        {"weight": False, "base": False, "bias": False},
        {"bias": False},
        {"base": False},
        {"wide_factors": False},
        {"row_scale": True},
        {"shuffled": True},
        {"shuffled": True, "row_scale": True, "weight": False},
    ],
    ids=lambda options: "-".join(f"{name}_{value}" for name, value in options.items()),
)
def test_parts(cuda_ops, options, dtype, config):
    """Each part of the sum absent, factors of x's dtype, rows scaled, features shuffled."""
    assert_served(cuda_ops, Problem(Sizes(37, 3, 4, 48, 40), dtype, **options), config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sizes", [SIZES["even"], SIZES["primes"]], ids=["even", "primes"])
def test_no_neighbour_is_read(cuda_ops, sizes, dtype, config):
    assert_no_neighbour_is_read(cuda_ops, Problem(sizes, dtype), config)


def assert_no_neighbour_is_read(cuda_ops, problem: Problem, config: int) -> None:
    """Raises unless both directions are right with every operand among NaN, with gaps between its rows."""
    x, weight, bias, base, kron = problem.forward()

    def among_nan(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        # Rows stay a multiple of 16 bytes apart where they were.
        whole = torch.full((rows + 2, columns + 32), float("nan"), dtype=tensor.dtype, device=cuda_ops.device)
        view = whole[1 : 1 + rows, 16 : 16 + columns]
        return view.copy_(tensor)

    kron.a, kron.b = among_nan(kron.a), among_nan(kron.b)
    y = fat(cuda_ops, among_nan(x), among_nan(weight), bias, among_nan(base), kron, config)
    dx = fat(cuda_ops, among_nan(problem.dy), among_nan(weight).t(), None, None, kron.adjoint(), config)
    problem.assert_accurate(y, dx)


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "every_other": lambda tensor: torch.stack([tensor, tensor], dim=2).flatten(1)[:, ::2],
    "misaligned": lambda tensor: torch.cat([tensor[:, :1], tensor], dim=1)[:, 1:],
    "reversed_rows": lambda tensor: torch.cat([tensor, tensor])[: tensor.shape[0]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("operand", ["x", "weight", "base", "a", "b"])
def test_layouts(cuda_ops, operand, layout, dtype):
    """Each operand in every layout gives the same bits: what is loaded differs, not what is computed."""
    problem = Problem(Sizes(37, 3, 4, 48, 40), dtype, wide_factors=operand != "b")
    x, weight, bias, base, kron = problem.forward()
    expected = fat(cuda_ops, x, weight, bias, base, kron, 2)
    operands = {"x": x, "weight": weight, "base": base, "a": kron.a, "b": kron.b}
    operands[operand] = layout(operands[operand])
    kron.a, kron.b = operands["a"], operands["b"]
    y = fat(cuda_ops, operands["x"], operands["weight"], bias, operands["base"], kron, 2)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", ["rows_apart", "columns_apart", "transposed"])
def test_output_views(cuda_ops, layout, dtype):
    """y as a view: what lies between its elements is left alone."""
    problem = Problem(Sizes(19, 3, 4, 40, 40), dtype)
    given = problem.forward()
    expected = fat(cuda_ops, *given, 2)
    rows, columns = expected.shape
    whole = torch.full(
        (2 * columns + 16, 2 * columns + 16), float("nan"), dtype=dtype, device=cuda_ops.device
    )
    view = {
        "rows_apart": whole[:rows, 8 : 8 + columns],
        "columns_apart": whole[:rows, 1 : 1 + 2 * columns : 2],
        "transposed": whole[:columns, :rows].t(),
    }[layout]
    fat(cuda_ops, *given, 2, view)
    assert torch.equal(view.cpu(), expected)
    assert int((~whole.isnan()).sum()) == expected.numel()


def test_adds_to_its_base_in_place(cuda_ops, dtype):
    x, _, _, base, kron = Problem(SIZES["even"], dtype, weight=False, bias=False).forward()
    expected = fat(cuda_ops, x, None, None, base, kron)
    y = base.to(cuda_ops.device, copy=True)
    assert torch.equal(fat(cuda_ops, x, None, None, y, kron, y=y), expected)


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_scale_as_a_tensor(cuda_ops, scale_dtype, dtype):
    x, weight, bias, base, kron = Problem(SIZES["even"], dtype).forward()
    kron.scale = 0.625
    expected = fat(cuda_ops, x, weight, bias, base, kron)
    kron.scale = torch.tensor(0.625, dtype=scale_dtype)
    assert torch.equal(fat(cuda_ops, x, weight, bias, base, kron), expected)


def test_wide_bias_is_added_unrounded(cuda_ops):
    """An fp32 bias joins the fp32 sum."""
    x, weight, _, _, kron = Problem(Sizes(5, 2, 2, 40, 16), torch.bfloat16).forward()
    x, weight, kron.scale = torch.zeros_like(x), torch.zeros_like(weight), 0.0
    bias = torch.full((80,), 1.0 + 2**-7 - 2**-9)
    base = torch.full((5, 80), 2**-8, dtype=torch.bfloat16)
    y = fat(cuda_ops, x, weight, bias, base, kron)
    assert torch.equal(y, (bias + base.float()).to(torch.bfloat16))


def test_an_infinite_factor_stays_in_its_group(cuda_ops):
    """Padding is zero times A: it must not turn an infinity of one group into NaN of another."""
    x, weight, bias, base, kron = Problem(Sizes(5, 2, 3, 24, 17), torch.float16).forward()
    expected = fat(cuda_ops, x, weight, bias, base, kron, 0)
    kron.a = kron.a.clone()
    kron.a[1, 2] = float("inf")
    y = fat(cuda_ops, x, weight, bias, base, kron, 0)
    assert torch.equal(y[:, :24], expected[:, :24])
    assert not y[:, 24:].isfinite().any()


def test_no_tokens(cuda_ops, dtype):
    x, weight, bias, base, kron = Problem(Sizes(0, 3, 4, 40, 40), dtype).forward()
    assert fat(cuda_ops, x, weight, bias, base, kron).shape == (0, 120)


@pytest.mark.parametrize("config", CONFIGS)
def test_repeatable(cuda_ops, config):
    problem = Problem(SIZES["odd_number_of_units"], torch.bfloat16)
    assert torch.equal(fat(cuda_ops, *problem.forward(), config), fat(cuda_ops, *problem.forward(), config))


def test_chosen_config_fits_small_devices(cuda_ops):
    """With fp32 factors and two left features the widest tile takes more than 99 KiB."""
    if cuda_ops.device.type == "cuda":
        pytest.skip("the device is what it is")
    problem = Problem(SIZES["two_left"], torch.float16)
    cuda_ops.ops.emulation_settings(4, 99 * 1024, 8, 6, 0)
    try:
        assert_served(cuda_ops, problem)
        with pytest.raises(RuntimeError, match="shared"):
            fat(cuda_ops, *problem.forward(), 0)
    finally:
        cuda_ops.ops.emulation_settings(4, 227 * 1024, 9, 0, 0)


REJECTED = {
    "x": (
        lambda given: given.update(x=given["x"][:, 1:]),
        r"fat_linear: x must be \(37, 160\); got \(37, 159\)",
    ),
    "weight": (lambda given: given.update(weight=given["weight"].t()), r"weight must be \(144, 160\)"),
    "weight_dtype": (
        lambda given: given.update(weight=given["weight"].float()),
        "weight must be float16 as y; got float32",
    ),
    "bias": (lambda given: given.update(bias=given["bias"][1:]), r"bias must be \(144,\); got \(143\)"),
    "base": (lambda given: given.update(base=given["base"][1:]), r"base must be \(37, 144\)"),
    "a": (lambda given: given.update(a=given["a"][:0]), "a must be a matrix of at least 1×1"),
    "a_dtype": (
        lambda given: given.update(a=given["a"].double()),
        "a must be float16 or float32; got float64",
    ),
    "in_scale": (lambda given: given.update(in_scale=given["bias"]), r"in_scale must be \(160,\)"),
    "out_scale": (lambda given: given.update(out_scale=given["bias"][1:]), r"out_scale must be \(144,\)"),
    "scale_tensor": (
        lambda given: given.update(scale_tensor=given["bias"]),
        "scale_tensor must have one element",
    ),
    "config": (lambda given: given.update(config=3), "config must be -1 .. 2 or 100 .. 103; got 3"),
    "y_dtype": (
        lambda given: given.update(y=given["y"].float()),
        "y must be float16 or bfloat16; got float32",
    ),
    "y_expanded": (
        lambda given: given.update(y=given["y"][:1].expand(37, -1)),
        "y must not name an element twice",
    ),
}


@pytest.mark.parametrize(("change", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_rejects(cuda_ops, change, message):
    x, weight, bias, base, kron = Problem(Sizes(37, 3, 4, 48, 40), torch.float16).forward()
    given = {
        "x": x, "weight": weight, "bias": bias, "base": base, "a": kron.a, "b": kron.b, "in_scale": None,
        "out_scale": None, "scale": 1.0, "scale_tensor": None, "in_shuffled": False, "out_shuffled": False,
        "config": -1, "y": torch.empty(37, 144, dtype=torch.float16),
    }  # fmt: skip
    change(given)
    there = [
        each.to(cuda_ops.device) if isinstance(each, Tensor) and each.stride(0) else each
        for each in given.values()
    ]
    with pytest.raises(RuntimeError, match=message):
        cuda_ops.ops.fat_linear(*there)
