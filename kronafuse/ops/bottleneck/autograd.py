"""The autograd.Function around the raw ops: what is saved, and which gradients are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls import bind_by_position
from ..transforms import explained
from .raw import OP, Options, backward, forward


class Bottleneck(torch.autograd.Function):
    """(y, pre-activation) of x, residual, down, up, down_bias, up_bias and the scale where it is a tensor."""

    @staticmethod
    def forward(options: Options, keep: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return forward(tensors, options, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, _, x, residual, down, up, down_bias, up_bias, scale = inputs
        _, pre = output
        # The pre-activation stays part of the graph: by it a second derivative finds its way here, and raises.
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.residual_dtype = None if residual is None else residual.dtype
        if not ctx.needs_input_grad[4]:
            # Only the down layer's gradient reads x: else its shape and dtype alone are kept.
            x = x.new_empty(()).expand(x.shape)
        ctx.save_for_backward(x, down, up, down_bias, up_bias, scale, pre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        _, _, need_x, need_residual, *need = ctx.needs_input_grad
        needs = [need_x, *need]
        results: list[Tensor | None] = [None] * len(needs)
        dresidual = None
        if dy is not None and any(needs):
            # Under create_graph the products are recorded, to raise where they are differentiated again.
            recorded = torch.is_grad_enabled()
            products = BottleneckGradient.apply if recorded else BottleneckGradient.forward
            computed = explained(OP, products, ctx.options, needs, dy, *ctx.saved_tensors)
            results = [grad if wanted else None for grad, wanted in zip(computed, needs, strict=True)]
        if dy is not None and need_residual:
            dresidual = dy.to(ctx.residual_dtype)
        return None, None, results[0], dresidual, *results[1:]


class BottleneckGradient(torch.autograd.Function):
    """The gradients of a bottleneck, themselves not differentiable."""

    @staticmethod
    def forward(options: Options, needs: list[bool], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(backward(tensors, options, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{OP}: second derivatives are not implemented")


bind_by_position(Bottleneck)
