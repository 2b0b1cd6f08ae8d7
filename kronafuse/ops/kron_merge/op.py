"""`kron_merge`: a new weight with the delta folded in, without a dense delta in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends, checks
from .. import cpu_reasons, cuda_reasons, triton_reasons
from ..calls import runs_directly
from ..flop_counting import formula, give_formulas
from ..transforms import apply, explained
from . import eager, native_cuda
from .eager import dense_factors, kron_blocks, wide_dtype

torch.library.define(
    "kronafuse::kron_merge",
    "(Tensor weight, Tensor? a, Tensor b, Tensor? b_down, Tensor scale, bool shuffled, str impl) -> Tensor",
)


def _load_triton() -> Any:
    from . import kernels

    return kernels


def _load_cpu() -> Any:
    from . import native_cpu

    return native_cpu


IMPLEMENTATIONS = (
    backends.Implementation("cpu", cpu_reasons.reasons, _load_cpu),
    backends.Implementation("cuda", native_cuda.reasons, lambda: native_cuda, cuda_reasons.UNMEASURED),
    backends.Implementation("triton", triton_reasons.reasons, _load_triton),
    backends.Implementation("eager", backends.never, lambda: eager),
)
"""What can run the op, in order of preference; `auto` chooses."""


def _merge(
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    b_down: Tensor | None,
    scale: Tensor,
    shuffled: bool,
    impl: str,
) -> Tensor:
    checks.check_merge("kron_merge", weight, a, b, b_down)
    chosen = backends.choose("kron_merge", IMPLEMENTATIONS, impl, weight.device, weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        return chosen.load().merge(weight, a, b, b_down, scale, shuffled)


def _merge_fake(
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    b_down: Tensor | None,
    scale: Tensor,
    shuffled: bool,
    impl: str,
) -> Tensor:
    checks.check_merge("kron_merge", weight, a, b, b_down)
    return weight.new_empty(weight.shape)


torch.library.impl("kronafuse::kron_merge", "default", _merge)
torch.library.register_fake("kronafuse::kron_merge", _merge_fake)
_kron_merge = torch.ops.kronafuse.kron_merge.default


def _flops(_weight: Tensor, _a: Tensor | None, b: Tensor, b_down: Tensor | None, *_: Any, **__: Any) -> int:
    """B_up · B_down, 2 a multiply-accumulate; A ⊗ B is no product of matrices."""
    return 0 if b_down is None else 2 * b.numel() * b_down.shape[1]


formula(_kron_merge, _flops)


def kron_merge(
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    *,
    b_down: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
) -> Tensor:
    """W + scale · (A ⊗ B), a new weight; the sum is formed in fp32 (fp64 for fp64) and rounded once.

    weight:   (N, K)     fp64, fp32, fp16 or bf16; any strides
    a:        (N1, K1)   left factor; None for the 1×1 identity
    b:        (N2, K2)   right factor, or (N2, R) with b_down
    b_down:   (R, K2)    B = b · b_down
    scale:    float or 0-d tensor
    shuffled: row n2·N1 + n1 of W takes what row n1·N2 + n2 of A ⊗ B holds

    Returns (N, K), contiguous, in the weight's dtype; differentiable in all tensors. Autocast changes nothing.
    A scale of 0 is multiplied by: where the factors hold NaN or infinity, the result is NaN.
    Raises ValueError (shapes), TypeError (dtypes).
    """
    return merge_by("auto", weight, a, b, b_down, scale, shuffled)


def merge_by(
    impl: str,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor,
    b_down: Tensor | None = None,
    scale: float | Tensor = 1.0,
    shuffled: bool = False,
) -> Tensor:
    """`kron_merge` by an implementation's name: "eager", "cpu", "triton" or "cuda".

    Raises NotImplementedError with the reasons where it cannot serve.
    """
    checks.check_merge("kron_merge", weight, a, b, b_down)
    checks.check_scale("kron_merge", scale, weight)
    checks.check_shuffled("kron_merge", shuffled)
    if not isinstance(scale, Tensor):
        scale = weight.new_ones((), dtype=wide_dtype(weight)) * scale
    tensors = (weight, a, b, b_down, scale)
    give_formulas()
    if runs_directly(tensors):
        return explained("kron_merge", _kron_merge, *tensors, shuffled, impl)
    return apply("kron_merge", _KronMerge, *tensors, shuffled, impl)


class _KronMerge(torch.autograd.Function):
    @staticmethod
    def forward(
        weight: Tensor,
        a: Tensor | None,
        b: Tensor,
        b_down: Tensor | None,
        scale: Tensor,
        shuffled: bool,
        impl: str,
    ) -> Tensor:
        return _kron_merge(weight, a, b, b_down, scale, shuffled, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *factors, ctx.shuffled, _ = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        need_weight, need_a, need_b, need_b_down, need_scale, _, _ = ctx.needs_input_grad
        of_factors: tuple[Tensor | None, ...] = (None, None, None, None)
        needs = (need_a, need_b, need_b_down, need_scale)
        if any(needs):
            of_factors = explained(
                "kron_merge", _factor_gradients, grad, *ctx.saved_tensors, ctx.shuffled, needs
            )
        return grad if need_weight else None, *of_factors, None, None


def _factor_gradients(
    grad: Tensor,
    a: Tensor | None,
    b: Tensor,
    b_down: Tensor | None,
    scale: Tensor,
    shuffled: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of a, b, b_down and the scale from dW, where they are asked for."""
    need_a, need_b, need_b_down, need_scale = needs
    da = db = db_down = dscale = None
    wide = wide_dtype(grad)
    with torch.autocast(grad.device.type, enabled=False):
        left, right = dense_factors(a, b, b_down, wide)
        blocks = kron_blocks(grad, left, right, shuffled).to(wide)  # (N1, N2, K1, K2)
        if need_a or need_scale:
            through_b = torch.einsum("ipjq,pq->ij", blocks, right)
            da = (scale.to(wide) * through_b).to(a.dtype) if need_a and a is not None else None
            dscale = (through_b * left).sum().to(scale.dtype) if need_scale else None
        if need_b or need_b_down:
            db = scale.to(wide) * torch.einsum("ipjq,ij->pq", blocks, left)
            if b_down is not None:
                db_down = (b.to(wide).t() @ db).to(b_down.dtype) if need_b_down else None
                db = db @ b_down.to(wide).t()
            db = db.to(b.dtype) if need_b else None
    return da, db, db_down, dscale
