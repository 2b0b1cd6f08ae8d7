"""The trained tensors of one adapter in one place, and the scale that goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_number
from .scale import Scale, is_capturing, scale_of_forward
from .spec import TensorLayout

LOADED = "load_state_dict: the adapter's tensors were overwritten"


class TrainedTensors(nn.Module):
    """Parameters as a layout says, and a scale that may be set at any time without a recompile.

    layout: sizes, start and dtype of the tensors
    device: where they are made; "meta" works

    The scale is held as a number and in the 0-d fp32 buffer named SCALE, which is saved with a model's state_dict.
    `set_strength` and `load_state_dict` change both; a value that something else writes into the buffer in place, as
    DistributedDataParallel does, counts from the next call on. The modules are none of those that diffusers'
    layerwise casting stores in fp8, so that the tensors
    stay in their own dtype.
    """

    SCALE: ClassVar[str]

    def __init__(self, layout: TensorLayout, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        for name, size in layout.sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=layout.dtype, device=device)))
        self.register_buffer(self.SCALE, torch.empty((), dtype=torch.float32, device=device))
        self._scale = Scale(self.scale, layout.scale)
        self.reset_parameters()

    @property
    def scale(self) -> Tensor:
        """The factor of the delta, as the buffer: the layout's scale times the strength set last."""
        return self.get_buffer(self.SCALE)

    @property
    def scale_value(self) -> float:
        """The same as a number, also while the buffer is on meta."""
        self._read_buffer()
        return self._scale.value

    def _read_buffer(self) -> None:
        """Take over what something else has written into the buffer."""
        buffer = self._scale.buffer
        if not buffer.is_meta and self._scale.written_by_others():
            self._scale.set(float(buffer), buffer)

    def scale_of_call(self) -> float | Tensor:
        """Return the factor of the delta in the call being made: a number, or a tensor where a graph is being recorded.

        A forward that gradient checkpointing repeats gets the value that it had the first time. Raises
        RuntimeError where that is not known any more (`nn/scale.py`).
        """
        buffer = self._buffers[self.SCALE]
        assert buffer is not None
        if torch.compiler.is_compiling():
            # Only training differentiates or repeats a forward; elsewhere the buffer itself costs nothing.
            repeats = (torch.is_grad_enabled() or self.training) and not buffer.requires_grad
            return scale_of_forward(buffer) if repeats else buffer
        if is_capturing(buffer):
            return buffer.clone()
        if buffer is not self._scale.buffer:
            # Put there by torch.func.functional_call, or by a library that places tensors.
            if not self._scale.is_of_now():
                raise RuntimeError(
                    "adapter scale: it was set between a checkpointed forward and its backward, and another library has"
                    f" since replaced the buffer {self.SCALE} that a repeated forward reads; run backward first"
                )
            return buffer.clone()
        if buffer.is_cuda and self._scale.written_by_others():
            return buffer.clone()  # to read a number here would wait for the GPU
        self._read_buffer()
        return self._scale.of_this_call()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again as the spec says; torch's meta initialisation calls this by name."""
        for name, tensor in self._parameters.items():
            assert tensor is not None
            self.layout.start(name, tensor)
        self._scale.set(self.layout.scale, self.scale)

    def check_strength(self, strength: float) -> None:
        """Raises ValueError unless strength · the layout's scale is finite in float32."""
        check_number("adapter", "scale times the spec's", strength * self.layout.scale)

    def set_strength(self, strength: float) -> None:
        """scale := strength · the layout's scale, for the calls that come; see `nn/scale.py` for earlier ones.

        Raises ValueError unless that is finite in float32.
        """
        self.check_strength(strength)
        self._scale.set(strength * self.layout.scale, self.scale)

    def forbid_repeats(self, why: str) -> None:
        """Let a checkpointed forward from before now raise where its backward repeats it; `why` opens the message."""
        self._scale.forbid_repeats(why)

    def check_repeat(self) -> None:
        """Raises RuntimeError where the call being made repeats a forward from before `forbid_repeats`."""
        if not torch.compiler.is_compiling():
            self._scale.of_this_call()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedTensors:
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            # .half() is for the trained tensors: alpha / R stays fp32
            setattr(self, self.SCALE, torch.empty((), dtype=torch.float32, device=self.scale.device))
        self._scale.at(self.scale)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(prefix + self.SCALE)
        if isinstance(given, Tensor) and not given.is_meta and not torch.isfinite(given).all():
            error_msgs.append(f"{prefix}{self.SCALE} must be a finite number; got {given}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.forbid_repeats(LOADED)
        buffer = self.scale
        if given is not None and not buffer.is_meta:
            self._scale.set(float(buffer), buffer)

    def extra_repr(self) -> str:
        """The layout."""
        return str(self.layout)
