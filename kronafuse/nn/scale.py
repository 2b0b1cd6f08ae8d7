"""The scale of one adapter over time: its value now, and the value of each forward whose backward is still to come.

A setter may be called between a forward and its backward: a reference pass without the adapter, or +1 and -1 in
one loss. The gradient is then that at the scale of the forward:

- An eager call hands its scale to the operators as a Python number, which nothing can change afterwards.
- Gradient checkpointing runs a forward a second time, during backward. The autograd node that is being executed then
  tells when the first one ran: nodes are numbered as they are made, and every change of the scale is remembered with
  the number that was due at the time. Each thread numbers its own nodes. Where threads make it impossible to tell, the
  repeated forward raises.
- A compiled program reads the buffer when it runs, through `kronafuse::scale_of_forward`, which copies it, or does as
  above during backward. No value of the scale is part of the program, so a new one compiles nothing.
- A CUDA graph reads the buffer, which stays where it is and is written in place: a replay of a forward uses the value
  that was set last, and its backward the copy that this forward made. Set it between replays.
"""

from __future__ import annotations

import struct
import warnings
from bisect import bisect_right
from threading import local
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ..checks import check_number
from ..torch_private import (
    KNOWS_BACKWARD,
    current_backward,
    current_node,
    node_sequence_number,
    outermost_node,
    sequence_number,
)

REMEMBERED = 256
"""Changes of a scale that are remembered; a checkpointed forward from before them can no longer be repeated."""

REENTRANT = "CheckpointFunctionBackward"
"""The node of a re-entrant checkpoint, which is made before what it repeats."""


class _Unknown:
    """Stands for the value of calls of which it is not known before or after which change they were made."""


UNKNOWN = _Unknown()


class _Calls:
    """The values that one thread's calls used.

    values:   values[i] is of the nodes with numbers below ends[i] and not below ends[i - 1]
    later:    of nodes from the last end on, if not the value of now: the thread has not called since it was changed
    lost:     nodes below this number are from before what is remembered
    replaced: nodes below this number are from before the tensors were overwritten, or merged
    records:  whether the thread has made nodes by now, so that a call of its own may be repeated
    """

    __slots__ = ("ends", "later", "lost", "records", "replaced", "values")

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.values: list[float | _Unknown] = []
        self.later: float | _Unknown | None = None
        self.lost = self.replaced = 0
        self.records = False

    def end(self, number: int, value: float | _Unknown) -> None:
        """Calls up to this number used the value."""
        self.ends.append(number)
        self.values.append(value)
        if len(self.ends) > REMEMBERED:
            self.lost = self.ends.pop(0)
            del self.values[0]

    def at(self, number: int) -> float | _Unknown | None:
        """Return the value that the call which made the node of this number used; None for the value of now."""
        index = bisect_right(self.ends, number)
        return self.later if index == len(self.ends) else self.values[index]


class _Token:
    """A thread; thread identifiers are used again after a thread has ended, and its numbers start anew."""


class _Local(local):
    def __init__(self) -> None:
        self.token = _Token()


_here = _Local()


class Scale:
    """The value that multiplies one adapter's delta, and the 0-d fp32 buffer that holds it for graphs.

    Every call of the adapter asks `of_this_call`.
    """

    __slots__ = (
        "__weakref__", "_address", "_calls", "_changed", "_looked", "_repeating", "_threads", "_token", "_version",
        "_why", "buffer", "value",
    )  # fmt: skip

    def __init__(self, buffer: Tensor, value: float) -> None:
        self.value = in_float32(value)
        self._address: int | None = None
        self._threads: WeakKeyDictionary[_Token, _Calls] = WeakKeyDictionary()
        self._token: _Token | None = None
        self._calls = _Calls()
        self._changed = False
        self._repeating: tuple[int, int] | None = None
        self._looked: tuple[tuple[int, int], float] | None = None
        self._why = ""
        self.at(buffer)

    def __getstate__(self) -> tuple[float, Tensor]:
        return self.value, self.buffer

    def __setstate__(self, state: tuple[float, Tensor]) -> None:
        self.__init__(state[1], state[0])

    def set(self, value: float, buffer: Tensor) -> None:
        """The value from now on, rounded to fp32, in the buffer too. Raises ValueError unless it is finite there."""
        if torch.compiler.is_compiling():
            buffer.fill_(value)  # the next eager call finds that the buffer was written to
            return
        value = in_float32(value)
        node = current_node()
        if node is not None:
            # Set within what is being repeated: there the value of the moment counts, as it did the first time.
            first = outermost_node(node)
            repeating = current_backward(), node_sequence_number(first)
            if self._repeating != repeating and type(first).__name__ != REENTRANT:
                self._check_start(repeating, value)
            self._repeating = repeating
        if value != self.value:
            self._remember(self.value, node is not None)
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
        self._version = _version_of(buffer)

    def written_by_others(self) -> bool:
        """Whether something else has written to the buffer since, as DistributedDataParallel does at every call."""
        return _version_of(self.buffer) != self._version

    def forbid_repeats(self, why: str) -> None:
        """A forward from before cannot be repeated: `why` says what has been done to the adapter."""
        self._why = why
        for token, calls in self._threads.items():
            self._changed = True
            if token is _here.token:
                calls.replaced = sequence_number()
            else:
                calls.later = UNKNOWN

    def of_this_call(self) -> float:
        """The value for the call that is being made; in a repeated forward, that of the first one.

        Raises RuntimeError for a repeated forward that is too old, from before the adapter's tensors were
        overwritten, or where threads make it impossible to tell.
        """
        node = current_node()
        if node is not None:
            return self._of_repeated(node) if self._changed else self.value
        token = _here.token
        if token is not self._token:
            self._token, self._calls = token, self._threads.setdefault(token, _Calls())
        if self._calls.later is not None:
            self._end_later()
        if not self._calls.records:
            self._calls.records = torch.is_grad_enabled() or sequence_number() > 0
        return self.value

    def is_of_now(self) -> bool:
        """Whether the call being made uses the value of now, as every call does that repeats none from before it."""
        node = current_node()
        return node is None or not self._changed or self._of_repeated(node) == self.value

    def _of_repeated(self, node: Any) -> float:
        number = _number_of_first(node)
        if self._repeating == (current_backward(), number):
            return self.value
        found: set[Any] = set()
        for calls in self._threads.values():
            if not calls.records:
                continue  # it has called without gradients only, as for a validation
            if number < calls.lost:
                raise RuntimeError(
                    f"adapter scale: it was set more than {REMEMBERED} times between a checkpointed forward and its"
                    " backward"
                )
            if number < calls.replaced:
                raise RuntimeError(
                    f"{self._why} between a checkpointed forward and its backward, which would repeat the forward as"
                    " it is now; call backward first"
                )
            value = calls.at(number)
            found.add(self.value if value is None else value)
        if UNKNOWN in found or len(found) > 1:
            raise RuntimeError(
                "adapter scale: several threads have set it, loaded tensors or called the model, and it cannot be told"
                " which scale a checkpointed forward had that its backward repeats; set it, and call the model, on"
                " one thread, or run backward before the scale is set"
            )
        value = found.pop() if found else self.value
        self._looked = (current_backward(), number), value
        return value

    def _check_start(self, repeating: tuple[int, int], value: float) -> None:
        """A checkpoint that is not re-entrant is repeated for a node from its end; calls before the first change inside
        it may have had another value than those at the end.
        """
        if self._looked is None or self._looked[0] != repeating:
            return
        number = repeating[1]
        starts = {
            before
            for calls in self._threads.values()
            for end, before, after in zip(
                calls.ends, calls.values, [*calls.values, self.value][1:], strict=True
            )
            if end <= number and after == value
        }
        if starts - {self._looked[1]}:
            raise RuntimeError(
                "adapter scale: it was set inside what gradient checkpointing repeats, after a call of the adapter"
                " there, and it cannot be told which scale that call had the first time; set it before the first call"
                " inside"
            )

    def _end_later(self) -> None:
        """This thread calls for the first time since another one, or a backward, has changed the value."""
        assert self._calls.later is not None
        # The node of a re-entrant checkpoint, inside which gradients are off, was made just before this call.
        self._calls.end(sequence_number() - (not torch.is_grad_enabled()), self._calls.later)
        self._calls.later = None

    def _remember(self, value: float, in_backward: bool) -> None:
        """Calls up to now have used this value."""
        if self._threads and not KNOWS_BACKWARD:
            warnings.warn(
                "kronafuse: this torch does not tell which backward runs; a scale that is set between a checkpointed"
                " forward and its backward gives the gradient at the new scale",
                stacklevel=4,
            )
        for token, calls in self._threads.items():
            self._changed = True
            if token is _here.token:
                if calls.later is not None:
                    calls.end(sequence_number(), calls.later)
                    calls.later = None
                calls.end(sequence_number(), value)
            elif calls.later is None:
                # While a backward runs, the thread that called it makes no calls of its own.
                calls.later = value if in_backward else UNKNOWN


def _number_of_first(node: Any) -> int:
    """The number of the node of the first forward that is being repeated, by way of others inside it or directly."""
    return node_sequence_number(outermost_node(node))


def _version_of(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


_BY_ADDRESS: WeakValueDictionary[int, Scale] = WeakValueDictionary()
"""The scale of each buffer by the address of its memory, which is all that a compiled program passes on."""


def in_float32(value: float) -> float:
    """The number as float32 holds it. Raises ValueError for one that is not finite there."""
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
