"""`reduce`, the factor gradients' kernel: against float64, in every form, orientation and dtype."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .conftest import CudaOps

HALVES = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """Sizes of p (M, G, P) and q (M, G, Q)."""

    m: int
    g: int
    p: int
    q: int


# tiny, narrow (either side small), medium, wide; sizes that tiles and vectors divide and do not.
CASES = (
    Case(40, 16, 8, 8),
    Case(700, 3, 5, 16),
    Case(70, 5, 16, 200),
    Case(70, 5, 130, 7),
    Case(33, 20, 20, 320),
    Case(50, 7, 64, 64),
    Case(29, 8, 80, 100),
    Case(16, 8, 161, 168),
    Case(1, 1, 3, 2),
)


def _random(ops: CudaOps, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(ops.device)


def _operands(ops: CudaOps, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, g, p, q = case
    return _random(ops, m, g, p, dtype=dtype, seed=1), _random(ops, m, g, q, dtype=dtype, seed=2)


def _reduce(
    ops: CudaOps,
    p: Tensor,
    q: Tensor,
    *,
    p_scale: Tensor | None = None,
    scale: float = 1.0,
    scale_tensor: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.full((p.shape[2], q.shape[2]), torch.nan, dtype=torch.float32, device=ops.device)
    size = ops.ops.reduce_workspace(p, q)
    workspace = torch.full((size,), torch.nan, dtype=torch.float32, device=ops.device)
    ops.ops.reduce(p, q, p_scale, scale, scale_tensor, workspace, out)
    return out


def _expected(p: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("mgp,mgq->pq", p.double(), q.double())


def _assert_close(got: Tensor, expected: Tensor, rows: int) -> None:
    """fp32 sums of `rows` products of unit size; beyond that, the result's own rounding."""
    rounding = torch.finfo(got.dtype).eps if got.dtype in HALVES else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=1e-5 + rounding, atol=2e-6 * rows**0.5 + 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form(cuda_ops: CudaOps, case: Case, dtype: torch.dtype) -> None:
    p, q = _operands(cuda_ops, case, dtype)
    _assert_close(_reduce(cuda_ops, p, q), _expected(p, q), case.m * case.g)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("which", ["p", "q", "both"])
def test_groups_side_by_side(cuda_ops: CudaOps, case: Case, which: str) -> None:
    """Views of A's gradients: (M, P, G) in memory, the groups contiguous."""
    p, q = _operands(cuda_ops, case, torch.bfloat16)
    expected = _expected(p, q)
    if which != "q":
        p = p.transpose(1, 2).contiguous().transpose(1, 2)
    if which != "p":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    _assert_close(_reduce(cuda_ops, p, q), expected, case.m * case.g)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_strides(cuda_ops: CudaOps, case: Case) -> None:
    """Rows apart, an odd offset, a broadcast, tokens contiguous."""
    p, q = _operands(cuda_ops, case, torch.float16)
    padded = torch.full((case.m, case.g, 2 * case.p + 3), torch.nan, dtype=p.dtype, device=p.device)
    padded[..., 1 : 1 + 2 * case.p : 2] = p
    odd = padded[..., 1 : 1 + 2 * case.p : 2]
    _assert_close(_reduce(cuda_ops, odd, q), _expected(p, q), case.m * case.g)
    tokens = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    _assert_close(_reduce(cuda_ops, p, tokens), _expected(p, q), case.m * case.g)
    expanded = q[:1].expand_as(q)
    _assert_close(_reduce(cuda_ops, p, expanded), _expected(p, expanded), case.m * case.g)


@pytest.mark.parametrize("m", [64, 61])
def test_one_group(cuda_ops: CudaOps, m: int) -> None:
    """Rank factors: a plain product of matrices, also of transposed ones."""
    p, q = _operands(cuda_ops, Case(m, 1, 16, 96), torch.bfloat16)
    expected = _expected(p, q)
    by_tokens = p.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for left in (p, by_tokens):
        _assert_close(_reduce(cuda_ops, left, q), expected, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_scales_and_the_gradients_dtype(cuda_ops: CudaOps, dtype: torch.dtype) -> None:
    case = Case(30, 6, 24, 40)
    p, q = _operands(cuda_ops, case, torch.float16)
    out = torch.full((case.q, case.p), torch.nan, dtype=dtype, device=p.device).t()
    scale_tensor = torch.tensor(-1.5, dtype=torch.float64, device=p.device)
    _reduce(cuda_ops, p, q, scale=0.5, scale_tensor=scale_tensor, out=out)
    _assert_close(out, -0.75 * _expected(p, q), case.m * case.g)


SCALED = (Case(30, 6, 24, 40), Case(30, 6, 90, 9), Case(11, 16, 24, 36))


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scale_of_p_is_rounded_once(cuda_ops: CudaOps, case: Case, dtype: torch.dtype) -> None:
    p, q = _operands(cuda_ops, case, torch.float16)
    p_scale = _random(cuda_ops, case.p, case.g, dtype=dtype, seed=3).t()
    expected = _expected((p.float() * p_scale.float()).to(p.dtype), q)
    for left in (p, p.transpose(1, 2).contiguous().transpose(1, 2)):
        _assert_close(_reduce(cuda_ops, left, q, p_scale=p_scale), expected, case.m * case.g)


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_float32_beside_a_half_is_rounded_as_it_is_read(
    cuda_ops: CudaOps, case: Case, dtype: torch.dtype
) -> None:
    p, q = _operands(cuda_ops, case, torch.float32)
    expected = _expected(p.to(dtype), q.to(dtype))
    _assert_close(_reduce(cuda_ops, p, q.to(dtype)), expected, case.m * case.g)
    _assert_close(_reduce(cuda_ops, p.to(dtype), q), expected, case.m * case.g)
    by_groups = p.transpose(1, 2).contiguous().transpose(1, 2)
    _assert_close(_reduce(cuda_ops, by_groups, q.to(dtype)), expected, case.m * case.g)


def test_no_tokens_give_zeros(cuda_ops: CudaOps) -> None:
    p, q = _operands(cuda_ops, Case(0, 4, 24, 40), torch.bfloat16)
    assert torch.equal(_reduce(cuda_ops, p, q), torch.zeros(24, 40, device=p.device))


def test_the_same_bits_each_time(cuda_ops: CudaOps) -> None:
    p, q = _operands(cuda_ops, Case(300, 4, 24, 40), torch.bfloat16)
    assert torch.equal(_reduce(cuda_ops, p, q), _reduce(cuda_ops, p, q))


def test_rows_beyond_int32_elements(cuda_ops: CudaOps) -> None:
    """Two tokens 2³¹ elements apart, without the memory between them being touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=cuda_ops.device)
    p = far.as_strided((2, 1, 32), (2**31, 32, 1))
    p.copy_(_random(cuda_ops, 2, 1, 32, dtype=torch.bfloat16, seed=1))
    q = _random(cuda_ops, 2, 1, 48, dtype=torch.bfloat16, seed=2)
    _assert_close(_reduce(cuda_ops, p, q), _expected(p, q), 2)


def test_bad_calls_are_errors(cuda_ops: CudaOps) -> None:
    p, q = _operands(cuda_ops, Case(30, 6, 24, 40), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"out must be \(P, Q\) = \(24, 40\); got \(40, 24\)"):
        _reduce(cuda_ops, p, q, out=torch.empty(40, 24, device=p.device))
    with pytest.raises(RuntimeError, match="elements must not overlap"):
        _reduce(cuda_ops, p, q, out=torch.empty(1, 40, device=p.device).expand(24, 40))
    with pytest.raises(RuntimeError, match="one of them float32; got bfloat16 and float16"):
        _reduce(cuda_ops, p, q.half())
    with pytest.raises(RuntimeError, match="one of them float32; got float32 and float32"):
        _reduce(cuda_ops, p.float(), q.float())
    with pytest.raises(RuntimeError, match=r"p must be \(M, G, P\)"):
        _reduce(cuda_ops, p, q[:20])
    with pytest.raises(RuntimeError, match=r"p_scale must be \(G, P\) = \(6, 24\); got \(24, 6\)"):
        _reduce(cuda_ops, p, q, p_scale=torch.ones(24, 6, device=p.device))
    out = torch.empty(24, 40, device=p.device)
    with pytest.raises(RuntimeError, match="workspace must be contiguous float32 of at least"):
        cuda_ops.ops.reduce(p, q, None, 1.0, None, torch.empty(1, device=p.device), out)


def test_any_order_of_warps(cuda_ops: CudaOps) -> None:
    """The emulation draws which warp runs next: a missing barrier would show."""
    if cuda_ops.device.type != "cpu":
        pytest.skip("a GPU has its own order")
    default = (4, 227 * 1024, 9, 0)
    try:
        for case in (Case(700, 3, 5, 16), Case(70, 5, 16, 200), Case(70, 5, 60, 50), Case(29, 8, 80, 100)):
            p, q = _operands(cuda_ops, case, torch.bfloat16)
            for seed in range(1, 6):
                cuda_ops.ops.emulation_settings(*default, seed)
                _assert_close(_reduce(cuda_ops, p, q), _expected(p, q), case.m * case.g)
    finally:
        cuda_ops.ops.emulation_settings(*default, 0)


def _random_view(ops: CudaOps, draw: random.Random, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """A view of these sizes: permuted, with gaps, an offset, or a broadcast dimension."""
    order = draw.sample(range(len(sizes)), len(sizes))
    gaps = [draw.choice((0, 0, 1, 8)) for _ in sizes]
    stored = [sizes[i] + gaps[i] for i in order]
    base = torch.randn(stored, generator=torch.Generator().manual_seed(draw.randrange(1 << 30))).to(dtype)
    base = base.to(ops.device).permute([order.index(i) for i in range(len(sizes))])
    for dimension, gap in enumerate(gaps):
        base = base.narrow(dimension, draw.randint(0, gap), sizes[dimension])
    if draw.random() < 0.1 and sizes and all(sizes):
        dimension = draw.randrange(len(sizes))
        base = base.narrow(dimension, 0, 1).expand(sizes)
    return base


def _refusal(ops: CudaOps, p: Tensor, q: Tensor, workspace: Tensor, out: Tensor) -> str | None:
    try:
        ops.ops.reduce(p, q, None, 1.0, None, workspace, out)
    except RuntimeError as error:
        return str(error)
    return None


def test_random_calls_are_right_or_errors(cuda_ops: CudaOps) -> None:
    """300 calls, half of them broken in one place; none may crash or give a wrong sum without a word."""
    draw = random.Random(5)
    served = refused = 0
    for _ in range(300):
        m, g = draw.choice((0, 1, 2, 33, 64)), draw.choice((1, 2, 3, 8))
        p_sizes, q_sizes = [m, g, draw.choice((1, 4, 20, 65))], [m, g, draw.choice((1, 6, 16, 72))]
        out_sizes = [p_sizes[2], q_sizes[2]]
        dtypes = [draw.choice(HALVES)] * 2 + [draw.choice((torch.float32, torch.float64, *HALVES))]
        fault = draw.choice(("none", "none", "none", "size", "dim", "dtype", "workspace"))
        broken = draw.choice((p_sizes, q_sizes, out_sizes))
        if fault == "size":
            broken[draw.randrange(len(broken))] += 1
        elif fault == "dim":
            broken.append(2)
        elif fault == "dtype":
            dtypes[draw.randrange(2)] = draw.choice((torch.int32, torch.float64, torch.bool))
        p = _random_view(cuda_ops, draw, p_sizes, dtypes[0])
        q = _random_view(cuda_ops, draw, q_sizes, dtypes[1])
        out = torch.full(out_sizes, torch.nan, dtype=dtypes[2], device=p.device)
        size = cuda_ops.ops.reduce_workspace(p, q) if fault in ("none", "workspace") else 1 << 16
        workspace = torch.full((size,), torch.nan, device=p.device)
        if fault == "workspace":
            workspace = workspace[:-1] if size and draw.random() < 0.5 else workspace.double()
        message = _refusal(cuda_ops, p, q, workspace, out)
        assert (message is None) == (fault == "none"), (message, fault, p.shape, q.shape, out.shape, dtypes)
        if message is None:
            _assert_close(out, _expected(p, q), max(1, m * g))
            served += 1
        else:
            assert message.startswith("reduce: ")
            refused += 1
    assert served > 80
    assert refused > 80
