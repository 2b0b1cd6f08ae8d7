"""The scale of one adapter over time: its value now, and the value of each forward whose backward is still to come.

A setter may be called between a forward and its backward: a reference pass without the adapter, or +1 and -1 in
one loss. The gradient is then that at the scale of the forward:

- An eager call hands its scale to the operators as a Python number, which nothing can change afterwards.
- Gradient checkpointing runs a forward a second time, during backward. The autograd node that is being executed then
  tells when the first one ran: nodes are numbered as they are made, and every change of the scale is remembered with
  the number that was due at the time.
- A compiled program reads the buffer when it runs, through `kronafuse::scale_of_forward`, which copies it, or does as
  above during backward. No value of the scale is part of the program, so a new one compiles nothing.
- A CUDA graph reads the buffer, which stays where it is and is written in place: a replay uses the value that was
  set last, forward and backward alike. Set it between replays.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..checks import check_number
from ..torch_private import (
    at_end_of_backward,
    current_backward,
    current_node,
    node_sequence_number,
    sequence_number,
)

REMEMBERED = 256
"""Changes of a scale that are remembered; a checkpointed forward from before them can no longer be repeated."""

_UNPLACED = -1


class Scale:
    """The value that multiplies one adapter's delta, and the 0-d fp32 buffer that holds it for graphs.

    Every call of the adapter asks `of_this_call`. Numbers of autograd nodes are counted for each thread, so the
    scale is to be set on the thread that calls the model; where it was not, a repeated forward raises.
    """

    __slots__ = (
        "__weakref__", "_address", "_ends", "_lost", "_outer", "_replaced", "_thread", "_values", "buffer", "value",
    )  # fmt: skip

    def __init__(self, buffer: Tensor, value: float) -> None:
        self.value = _rounded(value)
        self._address: int | None = None
        self._forget(None)
        self.at(buffer)

    def __getstate__(self) -> tuple[float, Tensor]:
        return self.value, self.buffer

    def __setstate__(self, state: tuple[float, Tensor]) -> None:
        self.__init__(state[1], state[0])

    def set(self, value: float, buffer: Tensor) -> None:
        """The value from now on, rounded to fp32, in the buffer too."""
        value = _rounded(value)
        if value != self.value:
            self._remember()
            self.value = value
        self.at(buffer)

    def at(self, buffer: Tensor) -> None:
        """The buffer is this tensor from now on; the value is written to it."""
        self.buffer = buffer
        if self._address is not None and _BY_ADDRESS.get(self._address) is self:
            del _BY_ADDRESS[self._address]
        self._address = None
        if not buffer.is_meta:
            # Past the version counter: what a compiled program keeps for backward is a copy or read again.
            buffer.data.fill_(self.value)
            if type(buffer) is Tensor:
                self._address = buffer.data_ptr()
                _BY_ADDRESS[self._address] = self

    def tensors_replaced(self) -> None:
        """The adapter's tensors were overwritten: a forward from before cannot be repeated."""
        if self._placed():
            self._replaced = sequence_number()

    def of_this_call(self) -> float:
        """The value for the call that is being made; in a repeated forward, that of the first one.

        Raises RuntimeError for a repeated forward that is too old, from before the adapter's tensors were
        overwritten, or whose thread is not the one that set the scale since.
        """
        node = current_node()
        if node is None:
            thread = get_ident()
            if thread != self._thread:
                self._forget(thread)
            self._outer = None  # left over where a backward ended by an error
            return self.value
        return self._of_repeated(node)

    def _of_repeated(self, node: Any) -> float:
        if self._thread == _UNPLACED:
            raise RuntimeError(
                "adapter scale: it was set, or tensors were loaded, on another thread than the one that calls the"
                " model, between a checkpointed forward and its backward; set it on the thread that calls the model"
            )
        if not self._ends and not self._replaced:
            return self.value
        number = self._number_of_first(node)
        if number < self._lost:
            raise RuntimeError(
                f"adapter scale: it was set more than {REMEMBERED} times between a checkpointed forward and its"
                " backward"
            )
        if number < self._replaced:
            raise RuntimeError(
                "load_state_dict: the adapter's tensors were overwritten between a checkpointed forward and its"
                " backward, which would repeat the forward with the new ones; call backward first"
            )
        index = bisect_right(self._ends, number)
        return self.value if index == len(self._ends) else self._values[index]

    def _number_of_first(self, node: Any) -> int:
        """The number of a node that the first forward made.

        A re-entrant checkpoint starts a backward inside the one that is running, whose nodes are those of the repeated
        forward: a checkpoint among them repeats what the outer one has repeated before.
        """
        backward = current_backward()
        if self._outer is not None and self._outer[0] != backward:
            return self._outer[1]
        if self._outer is None:
            at_end_of_backward(self._leave_backward)
        number = node_sequence_number(node)
        self._outer = backward, number
        return number

    def _leave_backward(self) -> None:
        self._outer = None

    def _remember(self) -> None:
        """Nodes made up to now belong to calls with the value of now."""
        if self._placed():
            self._ends.append(sequence_number())
            self._values.append(self.value)
            if len(self._ends) > REMEMBERED:
                self._lost = self._ends.pop(0)
                del self._values[0]

    def _placed(self) -> bool:
        """Whether calls were made on this thread, whose nodes a number can be compared with."""
        if self._thread is None:
            return False
        if self._thread != get_ident():
            self._forget(_UNPLACED)
            return False
        return True

    def _forget(self, thread: int | None) -> None:
        self._thread = thread
        self._ends: list[int] = []
        self._values: list[float] = []
        self._outer: tuple[int, int] | None = None
        self._lost = self._replaced = 0


_BY_ADDRESS: WeakValueDictionary[int, Scale] = WeakValueDictionary()
"""The scale of each buffer by the address of its memory, which is all that a compiled program passes on."""


def _rounded(value: float) -> float:
    """The number as fp32 holds it. Raises ValueError for one that is not finite there."""
    check_number("adapter", "scale", value)
    return struct.unpack("f", struct.pack("f", value))[0]


torch.library.define("kronafuse::scale_of_forward", "(Tensor scale) -> Tensor")


@torch.library.impl("kronafuse::scale_of_forward", "default")
def _scale_of_forward(scale: Tensor) -> Tensor:
    known = None if scale.is_meta else _BY_ADDRESS.get(scale.data_ptr())
    if known is None or is_capturing(scale):
        return scale.clone()
    value = known.of_this_call()
    return scale.clone() if value == known.value else torch.full_like(scale, value)


@torch.library.register_fake("kronafuse::scale_of_forward")
def _scale_of_forward_fake(scale: Tensor) -> Tensor:
    return torch.empty_like(scale)


scale_of_forward = torch.ops.kronafuse.scale_of_forward.default


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured with this tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
