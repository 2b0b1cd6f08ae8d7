"""What the Triton kernels are compiled for ahead of time: the launches of these problems, recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from .. import checks
from ..ops.bottleneck.call import Call, Needs
from ..ops.costs import PEAKS
from ..ops.kron_linear import one_pass_tuning, tuning
from ..ops.kron_linear.algorithm import backward, forward
from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from ..ops.launch import Architecture
from ..shapes import KronShape
from . import bottleneck_cases
from .bottleneck_cases import BottleneckCase
from .cases import CASES, ODD_CASES, Case

ARCHITECTURES = {capability: peaks.multiprocessors for capability, peaks in PEAKS.items()}
"""Compute capability -> multiprocessors of the GPU of that kind whose peaks the cost model has."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


Make = Callable[..., Tensor]
"""`torch.empty` or its like, with the device bound."""
META: Make = partial(torch.empty, device="meta")


def train_step(case: Case, dtype: torch.dtype, *, everything: bool = False) -> None:
    """Forward and backward of one adapted layer on meta tensors, all gradients but those of W and bias.

    everything: no W, but a base, three terms, tensor scales and row scales, whose gradients are asked for too
    """
    prepare_train_step(case, dtype, META, everything=everything)()


def prepare_train_step(
    case: Case,
    dtype: torch.dtype,
    make: Make,
    *,
    everything: bool = False,
    layers: int = 1,
    factor_dtype: torch.dtype | None = None,
) -> Callable[[], None]:
    """`train_step` on tensors that `make` makes now, to be run any number of times.

    layers:       adapted layers that share x
    factor_dtype: of the adapter's parameters; None for `dtype`
    """
    from ..ops.kron_linear import kernels

    n, k, tokens = case.shape.n, case.shape.k, case.tokens
    factors = dtype if factor_dtype is None else factor_dtype

    def layer() -> FrozenLinear:
        terms = tuple(_term(case, factors, make, everything) for _ in range(3 if everything else 1))
        weight = None if everything else make(n, k, dtype=dtype)
        base = make(tokens, n, dtype=dtype) if everything else None
        return FrozenLinear(weight, terms, make(n, dtype=dtype), base)

    frozen = [layer() for _ in range(layers)]
    x, dys = make(tokens, k, dtype=dtype), [make(tokens, n, dtype=dtype) for _ in frozen]
    needs = [True, *(False for _ in range(2 * layers))]
    for each in frozen:
        for term in each.terms:
            needs += [term.a is not None, True, term.b_down is not None, everything, everything]

    def step() -> None:
        _, saved = forward(x, frozen, kernels)
        backward(dys, x, frozen, saved, needs, kernels)

    return step


def trained(case: Case, dtype: torch.dtype, layers: int = 1, **forms: str) -> None:
    """`train_step` as mixed-precision training has it, parameters in fp32, for layers that share x; by these routes."""
    from ..ops.kron_linear.route import forced

    step = prepare_train_step(case, dtype, META, layers=layers, factor_dtype=torch.float32)
    with forced(**forms):
        step()


def row_scaled(case: Case, dtype: torch.dtype) -> None:
    """Forward of one layer with a row scale, on meta tensors: the dense L of a thin term is a launch of its own."""
    from ..ops.kron_linear import kernels

    n, k = case.shape.n, case.shape.k
    term = _term(case, torch.float32, META, everything=False)._replace(row_scale=META(n, dtype=torch.float32))
    forward(META(case.tokens, k, dtype=dtype), [FrozenLinear(META(n, k, dtype=dtype), (term,))], kernels)


def _term(case: Case, dtype: torch.dtype, make: Make, everything: bool) -> KronTerm:
    shape = case.shape
    return KronTerm(
        make(shape.n1, shape.k1, dtype=dtype) if case.has_a else None,
        make(shape.n2, shape.rank or shape.k2, dtype=dtype),
        None if shape.rank is None else make(shape.rank, shape.k2, dtype=dtype),
        make((), dtype=torch.float32) if everything else 0.5,
        case.shuffled,
        make(shape.n, dtype=dtype) if everything else None,
    )


def merge_weight(case: Case, dtype: torch.dtype) -> None:
    """The case's delta folded into its weight, on meta tensors."""
    from ..ops.kron_merge import kernels

    term = _term(case, dtype, META, everything=False)
    weight, scale = meta(case.shape.n, case.shape.k, dtype=dtype), meta(dtype=torch.float32)
    kernels.merge(weight, term.a, term.b, term.b_down, scale, case.shuffled)


def bottleneck_step(case: BottleneckCase, dtype: torch.dtype, *, everything: bool = False) -> None:
    """Forward and backward of one bottleneck on meta tensors, all gradients of tensors.

    everything: a tensor scale whose gradient is asked for, x, residual and parameters in fp32 as autocast leaves them
    """
    prepare_bottleneck_step(case, dtype, META, everything=everything)()


def prepare_bottleneck_step(
    case: BottleneckCase, dtype: torch.dtype, make: Make, *, everything: bool = False
) -> Callable[[], None]:
    """`bottleneck_step` on tensors that `make` makes now, to be run any number of times."""
    from ..ops.bottleneck import kernels

    wide = torch.float32 if everything else dtype
    x = make(case.tokens, case.in_features, dtype=wide)
    other = make(case.tokens, case.out_features, dtype=wide) if case.residual == "other" else None
    call = Call(
        x,
        x if case.residual == "x" else other,
        make(case.width, case.in_features, dtype=wide),
        make(case.out_features, case.width, dtype=wide),
        make(case.width, dtype=wide) if case.biases else None,
        make(case.out_features, dtype=wide) if case.biases else None,
        make((), dtype=torch.float32) if everything else 0.5,
        case.activation,
        dtype,
        case.residual == "x",
    )

    def step() -> None:
        y, pre = kernels.forward(call, True)
        kernels.backward(y, call, pre, Needs(True, True, True, case.biases, case.biases, everything))

    return step


Problem = tuple[str, Callable[[], object]]
FAST = (Case("krona_64x4", 4096, KronShape(64, 4, 20, 320)), Case("lokr_f8", 4096, KronShape(8, 8, 160, 160)))
"""Thin and fat: with a row scale every kernel, every kind of tail but multiply-adds of B, and W in both layouts."""
FAST_LAYERS, TRAINED_LAYERS = (1, 3), (1, 3, 4)
"""Adapted layers that share x, as q, k and v do: of FAST, and of the case list."""
RECORDED_LAYER = "sdxl_1280"
"""Layer of the case list that is recorded, alone and as q, k and v; --all compiles those of every layer."""
RECORDED_BOTTLENECKS = ("sdxl_640", "sd15_1280")
"""Layers, many tokens and few, whose bottlenecks are recorded at every width."""
FAST_BOTTLENECKS = ("sdxl_640-width_160", "sd15_1280-width_256")
"""A width in two parts, and the widest."""
BATCH = 16
"""Images of a batch whose tokens fill the largest tiles."""
OTHERS = (
    Case("krona_4x64", 1024, KronShape(4, 64, 160, 10)),
    Case("krona_shuffled", 1024, KronShape(64, 8, 20, 160), shuffled=True),
    Case("lokr_square", 4096, KronShape(32, 32, 40, 40)),
    Case("lokr_square_shuffled", 1024, KronShape(32, 32, 40, 40), shuffled=True),
    Case("lokr_f8_r16", 1024, KronShape(8, 8, 160, 160, 16)),
    Case("lora_r16", 256, KronShape(1, 1, 1280, 1280, 16), has_a=False),
    Case("cross_k", 77, KronShape(64, 4, 10, 512)),
    Case("tiny_right", 1024, KronShape(640, 640, 2, 2)),
)
"""Further shapes: split K, narrow tiles, permuted features, multiply-adds of B."""
ODD_ARCHITECTURES = (80, 90)
"""The odd cases are about sizes of one, which Triton's front end turns into constants, on all architectures alike."""


def tiles(architecture: Architecture, dtype: torch.dtype) -> Iterator[Problem]:
    """Every tile of the linear kernel that the architecture ships, with every kind of tail, W in both layouts."""
    from ..ops.kron_linear import tails
    from ..ops.kron_linear.linear_kernel import accumulators_beside, linear_with_tails

    tokens, n = 1024, 1280
    x, weight, wide = (meta(rows, n, dtype=dtype) for rows in (tokens, n, tokens))
    dense = tails.DenseTail(meta(tokens, 80, dtype=dtype), meta(n, 80, dtype=dtype))
    sides, descriptors = (8, n // 8), architecture.capability >= 90
    block = tails.StructuredTail(
        tails.BLOCK_TAIL.value, wide, meta(n // 8, n // 8, dtype=dtype), sides, None, False
    )
    mix = tails.StructuredTail(tails.MIX_TAIL.value, wide, meta(8, 8, dtype=dtype), sides, None, False)
    yield from one_pass_tiles(architecture, dtype)
    for name, dense_tails, structured in (("dense", [dense], None), ("block", [], block), ("mix", [], mix)):
        for tile in tuning.tiles_of(architecture, dtype, descriptors, accumulators_beside(structured, False)):
            config = tuning.LinearConfig(
                tile.block_m, tile.block_n, tile.block_k, 32, 8, tile.warps, tile.stages, descriptors
            )  # fmt: skip
            for layout, w in (("", weight), ("-transposed", weight.t())):
                yield (
                    f"tile-{tile.block_m}x{tile.block_n}x{tile.block_k}-{tile.warps}-{name}{layout}",
                    partial(linear_with_tails, x, w, None, None, n, dense_tails, structured, config),
                )


def one_pass_tiles(architecture: Architecture, dtype: torch.dtype) -> Iterator[Problem]:
    """Every configuration of the one-pass form that FAST's fat case may take, beside W."""
    from ..ops.kron_linear.maps import KronMap
    from ..ops.kron_linear.one_pass_kernel import linear_in_one_pass

    case = FAST[1]
    shape, descriptors = case.shape, architecture.capability >= 90
    x, weight = meta(case.tokens, shape.k, dtype=dtype), meta(shape.n, shape.k, dtype=dtype)
    kron = KronMap.of(_term(case, dtype, META, everything=False), dtype)
    for config in one_pass_tuning.one_pass_candidates(architecture, dtype, shape.n1, shape.n2, descriptors):
        yield (
            f"one_pass-{config.block_m}x{config.block_n}x{config.block_k}-{config.groups}-{config.span}",
            partial(linear_in_one_pass, x, weight, None, None, kron, config),
        )


def bottlenecks(dtype: torch.dtype) -> Iterator[Problem]:
    """The case list; every activation once; what autocast leaves in fp32 beside 16-bit products, at every width."""
    for case in bottleneck_cases.CASES.values():
        yield case.name, partial(bottleneck_step, case, dtype)
        batch = replace(case, tokens=BATCH * case.tokens)
        yield f"{case.name}-batch_{BATCH}", partial(bottleneck_step, batch, dtype)
        if case.name.startswith("sd15_1280"):
            yield f"{case.name}-everything", partial(bottleneck_step, case, dtype, everything=True)
    for activation in checks.ACTIVATIONS:
        case = replace(bottleneck_cases.CASES[FAST_BOTTLENECKS[0]], activation=activation)
        yield f"{case.name}-{activation}", partial(bottleneck_step, case, dtype)


def by_route(case: Case, dtype: torch.dtype, **forms: str) -> None:
    """`train_step` by these routes, wherever the case has them."""
    from ..ops.kron_linear.route import forced

    with forced(**forms):
        train_step(case, dtype)


def routes(case: Case, dtype: torch.dtype) -> Iterator[Problem]:
    """The case by the routes that the rule takes, then by each of the others."""
    yield case.name, partial(train_step, case, dtype)
    yield f"{case.name}-one_pass", partial(by_route, case, dtype, fat="one_pass")
    yield f"{case.name}-two_kernels", partial(by_route, case, dtype, fat="two_kernels")
    yield f"{case.name}-base_by_torch", partial(by_route, case, dtype, base="torch")
    yield f"{case.name}-base_by_torch-one_pass", partial(by_route, case, dtype, base="torch", fat="one_pass")


def groups(dtype: torch.dtype, extent: Extent) -> Iterator[Problem]:
    """The case list with parameters in fp32 beside bf16 activations, one layer and several that share x."""
    if dtype != torch.bfloat16:
        return
    for (name, case), layers in product(CASES.items(), TRAINED_LAYERS):
        if extent == "all" or (name.startswith(RECORDED_LAYER) and layers in FAST_LAYERS):
            yield f"{name}-layers_{layers}", partial(trained, case, dtype, layers)


Extent = Literal["fast", "record", "all"]
"""How much is compiled: each kernel, each configuration that is shipped or chosen by rule, each branch beside."""


def problems(architecture: Architecture, dtype: torch.dtype, extent: Extent) -> Iterator[Problem]:
    """What to run for the launches to compile; float16's code is bfloat16's but for the types."""
    thin, fat = FAST
    for layers in FAST_LAYERS:
        yield f"{thin.name}-layers_{layers}", partial(trained, thin, dtype, layers)
        yield (
            f"{fat.name}-two_kernels-layers_{layers}",
            partial(trained, fat, dtype, layers, fat="two_kernels"),
        )
    yield f"{fat.name}-one_pass", partial(trained, fat, dtype, fat="one_pass")
    yield f"{thin.name}-base_by_torch", partial(trained, thin, dtype, base="torch")
    yield f"{thin.name}-row_scale", partial(row_scaled, thin, dtype)
    yield f"{thin.name}-merge", partial(merge_weight, thin, dtype)
    for name in FAST_BOTTLENECKS:
        case = bottleneck_cases.CASES[name]
        yield name, partial(bottleneck_step, case, dtype)
        yield (
            f"{name}-batch_{BATCH}",
            partial(bottleneck_step, replace(case, tokens=BATCH * case.tokens), dtype),
        )
    if extent == "fast" or dtype == torch.float16:
        return
    for case in (*FAST, *OTHERS):
        yield case.name, partial(train_step, case, dtype)
    yield from groups(dtype, extent)
    yield from tiles(architecture, dtype)
    for name, case in bottleneck_cases.CASES.items():
        if name.startswith(RECORDED_BOTTLENECKS):
            yield name, partial(bottleneck_step, case, dtype)
    if extent == "record":
        return
    for case in (*FAST, *OTHERS):
        yield from routes(case, dtype)
        yield f"{case.name}-merge", partial(merge_weight, case, dtype)
    yield from bottlenecks(dtype)
    if dtype == torch.bfloat16 and architecture.capability in ODD_ARCHITECTURES:
        for case in ODD_CASES.values():
            yield case.name, partial(train_step, case, dtype)
            yield f"{case.name}-everything", partial(train_step, case, dtype, everything=True)
        for case in bottleneck_cases.ODD_CASES.values():
            yield case.name, partial(bottleneck_step, case, dtype)
            yield f"{case.name}-everything", partial(bottleneck_step, case, dtype, everything=True)
