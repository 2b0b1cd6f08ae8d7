"""Bottleneck adapters inside one block: hooks that read the positions as a call passes them and add what is due."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.bottleneck import BottleneckAdapter
from ..nn.bottleneck_spec import KRONA_FORMS, Bottleneck
from ..nn.positions import CONTEXT, RESNET

ATTRIBUTE = "bottlenecks"
"""Where a block holds its adapters, as a submodule."""

GATED = ("ada_norm_zero", "ada_norm_single")
"""`norm_type` of the blocks that multiply what attn1 and ff return by a gate before adding it to the stream."""


class BlockAdapters(nn.Module, ABC):
    """All bottleneck adapters of one block.

    Adapters that share a block are added up. One whose sink is its own source reads without what others add
    there; one that adds later reads its source with all that was added up to there. The block's own classes and
    methods stay as they are. What a call has read is kept for the thread that makes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self._specs: dict[str, Bottleneck] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._by_thread: dict[int, dict[str, Tensor]] = {}
        self._traced: dict[str, Tensor] = {}

    @property
    def _seen(self) -> dict[str, Tensor]:
        """What this call has read so far, by position."""
        if torch.compiler.is_compiling():
            return self._traced  # Dynamo knows no threads
        return self._by_thread.setdefault(threading.get_ident(), {})

    def add(self, block: nn.Module, spec: Bottleneck, adapter: BottleneckAdapter) -> None:
        """One more adapter with the spec's positions."""
        name = str(max((int(each) for each in self.adapters), default=-1) + 1)
        self.adapters[name] = adapter
        self._specs[name] = spec
        self._hook_up(block)

    def discard(self, block: nn.Module, adapter: BottleneckAdapter) -> None:
        """Take one adapter off; after the last, no hook is left."""
        for name in [name for name, each in self.adapters.items() if each is adapter]:
            del self.adapters[name]
            del self._specs[name]
        self._hook_up(block)

    def _hook_up(self, block: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if len(self.adapters):
            self._register(block)
            # Called after an error too: checkpointing ends its second pass by one, and what was seen would stay.
            self._handles.append(block.register_forward_hook(self._forget, always_call=True))

    def _forget(self, _block: nn.Module, _args: Any, _output: Any) -> None:
        self._traced.clear()
        if not torch.compiler.is_compiling():
            self._by_thread.pop(threading.get_ident(), None)

    @abstractmethod
    def _register(self, block: nn.Module) -> None:
        """Register the hooks that these adapters need."""

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _reads(self, source: str) -> bool:
        return any(spec.source == source for spec in self._tapping())

    def _adds(self, sink: str, *, source: str | None = None) -> bool:
        return any(spec.sink == sink and source in (None, spec.source) for spec in self._tapping())

    def _tapping(self) -> list[Bottleneck]:
        """The adapters between two positions; KronA^B is beside the feed-forward itself."""
        return [spec for spec in self._specs.values() if spec.form not in KRONA_FORMS]

    def _at(self, sink: str, value: Tensor | None, here: Tensor | None) -> Tensor | None:
        """value + what the adapters of a sink add; `here` is the sink's own position before they do."""
        for name, adapter in self.adapters.items():
            spec = self._specs[name]
            if spec.sink == sink and spec.form not in KRONA_FORMS:
                x = here if spec.source == sink else self._seen[spec.source]
                value = adapter(x, value)
        return value


class TransformerAdapters(BlockAdapters):
    """The adapters of a BasicTransformerBlock.

    Something is added to the residual stream where the block adds a branch to it ungated: to the branch.
    Where a gate stands between, it is added to what the next branch reads, and carried to the next ungated
    addition.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self._gated = block.norm_type in GATED
        self._crosses = block.attn2 is not None

    def _register(self, block: Any) -> None:
        norm2_feeds_ff = block.norm_type == "ada_norm_single"
        # Where a sum is added to attn1's branch; ff_in is one where there is no attn2, whose branch is ungated.
        at_attn1 = "attn2_in" if self._crosses else "ff_in"
        deferred = self._gated and self._adds(at_attn1)
        stands_at_attn1 = not self._gated and self._adds(at_attn1, source=at_attn1)
        stands_at_attn2 = self._crosses and self._adds("ff_in", source="ff_in")
        beside_ff = any(spec.form in KRONA_FORMS for spec in self._specs.values())
        if self._reads("attn1_in") or self._adds("attn1_in") or stands_at_attn1:
            self._before(block, self._enter)
        if self._reads("attn1_out") or (self._adds(at_attn1) and not self._gated):
            self._after(block.attn1, self._leave_attn1)
        if self._crosses:
            if self._reads("attn2_in") or deferred or stands_at_attn2:
                self._before(block.attn2 if norm2_feeds_ff else block.norm2, self._enter_attn2)
            if self._adds(CONTEXT):
                self._before(block.attn2, self._read_context)
            if self._reads("attn2_out") or self._adds("ff_in") or deferred:
                self._after(block.attn2, self._leave_attn2)
        if self._reads("ff_in") or (deferred and not self._crosses):
            self._before(block.norm2 if norm2_feeds_ff else block.norm3, self._enter_ff)
        if beside_ff:
            self._before(block.ff, self._read_ff)
        if self._reads("ff_out") or beside_ff:
            self._after(block.ff, self._leave_ff)
        if self._adds("block_out") or (deferred and not self._crosses):
            self._after(block, self._leave)

    def _enter(self, _block: nn.Module, args: Any, kwargs: Any) -> Any:
        (hidden,), rest, kwargs = _first(args, kwargs, "hidden_states")
        self._seen["attn1_in"] = self._stream(self._at("attn1_in", hidden, hidden))
        return (self._seen["attn1_in"], *rest), kwargs

    def _leave_attn1(self, _attn1: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        self._seen["attn1_out"] = output
        sink = "attn2_in" if self._crosses else "ff_in"
        if self._gated or not self._adds(sink):
            return None
        here = output + self._seen["attn1_in"] if self._adds(sink, source=sink) else None
        return self._at(sink, output, here)

    def _enter_attn2(self, _norm: nn.Module, args: Any, kwargs: Any) -> Any:
        stream, *rest = args
        self._seen["held"] = self._seen["attn2_in"] = stream
        if self._gated and self._adds("attn2_in"):
            carried = self._stream(self._at("attn2_in", None, stream))
            self._seen["carried"] = carried
            self._seen["attn2_in"] = stream + carried
        return (self._seen["attn2_in"], *rest), kwargs

    def _read_context(self, _attn2: nn.Module, args: Any, kwargs: Any) -> Any:
        text = kwargs.get("encoder_hidden_states")
        if not isinstance(text, Tensor):
            raise ValueError(
                f"Bottleneck: {CONTEXT!r} reads the text that cross-attention gets, (B, L, K); got"
                f" {type(text).__name__}"
            )
        return args, {**kwargs, "encoder_hidden_states": self._at(CONTEXT, text, text)}

    def _leave_attn2(self, _attn2: nn.Module, _args: Any, output: Tensor) -> Tensor:
        self._seen["attn2_out"] = output
        carried = self._seen.pop("carried", None)
        value = output if carried is None else output + carried
        here = value + self._seen["held"] if self._adds("ff_in", source="ff_in") else None
        return self._stream(self._at("ff_in", value, here))

    def _enter_ff(self, _norm: nn.Module, args: Any, kwargs: Any) -> Any:
        stream, *rest = args
        self._seen["ff_in"] = stream
        if self._gated and not self._crosses and self._adds("ff_in"):
            carried = self._stream(self._at("ff_in", None, stream))
            self._seen["carried"] = carried
            self._seen["ff_in"] = stream + carried
        return (self._seen["ff_in"], *rest), kwargs

    def _read_ff(self, _ff: nn.Module, args: Any, kwargs: Any) -> None:
        self._seen["ff_read"] = args[0]

    def _leave_ff(self, _ff: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if self._reads("ff_out") and "ff_out" in self._seen:
            raise RuntimeError(
                "Bottleneck: source 'ff_out' needs the feed-forward in one piece; it is called chunk by chunk here:"
                " disable_forward_chunking() first"
            )
        self._seen["ff_out"] = output
        for name, adapter in self.adapters.items():
            if self._specs[name].form in KRONA_FORMS:
                output = adapter(self._seen["ff_read"], output)
        return output

    def _leave(self, _block: nn.Module, _args: Any, output: Tensor) -> Tensor:
        carried = self._seen.pop("carried", None)
        value = output if carried is None else output + carried
        return self._stream(self._at("block_out", value, value))

    @staticmethod
    def _stream(value: Tensor | None) -> Tensor:
        assert value is not None
        return value


class ResnetAdapters(BlockAdapters):
    """The adapters of a ResnetBlock2D."""

    def __init__(self, block: Any) -> None:
        super().__init__()

    def _register(self, block: nn.Module) -> None:
        self._before(block, self._enter)
        self._after(block, self._leave)

    def _enter(self, _block: nn.Module, args: Any, kwargs: Any) -> Any:
        (features,), rest, kwargs = _first(args, kwargs, "input_tensor")
        value = self._at("res_in", features, features)
        assert value is not None
        self._seen["res_in"] = value
        return (value, *rest), kwargs

    def _leave(self, _block: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        return self._at("res_out", output, output)


def adapters_of(block: nn.Module) -> BlockAdapters | None:
    """What a block holds its adapters in, or None without any."""
    found = block._modules.get(ATTRIBUTE)
    return found if isinstance(found, BlockAdapters) else None


def put_on(block: nn.Module, spec: Bottleneck, adapter: BottleneckAdapter) -> None:
    """Put an adapter into a block."""
    holder = adapters_of(block)
    if holder is None:
        holder = (ResnetAdapters if spec.block == RESNET else TransformerAdapters)(block)
        holder.train(block.training)
        block.add_module(ATTRIBUTE, holder)
    holder.add(block, spec, adapter)


def take_off(block: nn.Module, adapter: BottleneckAdapter) -> None:
    """Take an adapter out of a block; after the last, the block is as it was."""
    holder = adapters_of(block)
    if holder is not None:
        holder.discard(block, adapter)
        if len(holder.adapters) == 0:
            del block._modules[ATTRIBUTE]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A call's first argument by position or by name, those after it, and what is left by name."""
    if args:
        return args[:1], args[1:], kwargs
    return (kwargs[name],), (), {key: value for key, value in kwargs.items() if key != name}
