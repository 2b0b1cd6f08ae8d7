"""The handle of an adapter on a model: what every family of adapters has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.adapter_file import AdapterFile
from ..nn.fields import number
from ..nn.scale import in_float32
from ..nn.sharding import gathered, sharded_like
from ..nn.spec import Spec
from ..nn.trained import LOADED, TrainedTensors
from .checks import check_tensors
from .host import Host
from .offloading import Stores


class Attachment(ABC):
    """One adapter on one model; as a context manager, removed at the end of the block.

    spec: what was attached
    """

    def __init__(self, model: nn.Module, spec: Spec, host: Host, unmatched: dict[str, list[str]]) -> None:
        self.model = model
        self.spec = spec
        self._host: Host | None = host
        self._unmatched = unmatched
        self._trained: dict[str, TrainedTensors] = {}
        self._scale = 1.0

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(module name + "." + tensor name, tensor) of every trained tensor, in the model's order."""
        for name, trained in self._trained.items():
            for tensor_name, tensor in trained.named_parameters():
                yield f"{name}.{tensor_name}", tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained tensor, for an optimizer."""
        for _, tensor in self.named_parameters():
            yield tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Every trained tensor by name, sharing memory with the parameters.

        Tensors that fully_shard has distributed are gathered: call it on every process, and write its file
        on one. Those that accelerate has offloaded are read from its store. Raises RuntimeError for tensors
        whose values are not to be had here: offloaded to disk by diffusers, or cut into parts.
        """
        stores = self._stores("state_dict")
        return {
            f"{place}.{name}": gathered(stores.read(place, trained, name).detach())
            for place, trained in self._trained.items()
            for name in trained.layout.sizes
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy tensors into place, without a recompile of a compiled model.

        Where fully_shard has distributed the tensors, call it on every process with the same ones. What
        accelerate has offloaded is written to its store. A backward whose forward ran before raises, as after
        any change of a parameter in place. Raises ValueError for missing, unknown or mismatched tensors and for
        NaN and infinity, TypeError for tensors that are not floating, RuntimeError while a delta is merged and
        for tensors that cannot be written here; all before anything is copied.
        """
        self._unmerged("load_state_dict")
        sizes = {name: trained.layout.sizes for name, trained in self._trained.items()}
        whole = {
            name: gathered(each) if isinstance(each, Tensor) else each for name, each in state_dict.items()
        }
        check_tensors("load_state_dict", sizes, whole)
        stores = self._stores("load_state_dict")
        writers = {
            f"{place}.{name}": stores.writer(place, trained, name)
            for place, trained in self._trained.items()
            for name in trained.layout.sizes
        }
        with torch.no_grad():
            for name, tensor in self.named_parameters():
                write = writers[name]
                if write is None:
                    tensor.copy_(sharded_like(tensor, whole[name]))
                else:
                    write(whole[name])
        for trained in self._trained.values():
            trained.forbid_repeats(LOADED)

    @property
    @abstractmethod
    def modules(self) -> dict[str, tuple[int, int]]:
        """Module name -> (N, K) of every adapted layer or block."""

    @property
    def scale(self) -> float:
        """Multiplies every delta on top of the spec's scales; 1.0 at first. Setting it never recompiles.

        It counts for the calls that come. A backward whose forward ran before gets the gradient at the scale of
        that forward, checkpointed or not; set it on the thread that calls the model. A captured CUDA graph uses
        the value at each replay. Setting raises TypeError for what is no number, ValueError for NaN, infinity and
        numbers beyond float32, RuntimeError while a delta is merged.
        """
        self._scale = self._strength()
        return self._scale

    def _strength(self) -> float:
        """The scale that the modules have, which the model's own load_state_dict may have changed."""
        strength = self._scale
        found = [(trained.scale_value, trained.layout.scale) for trained in self._trained.values()]
        if any(value != in_float32(strength * own) for value, own in found):
            strength = next((value / own for value, own in found if own), strength)
            if any(value != in_float32(strength * own) for value, own in found):
                raise RuntimeError(
                    "Attachment: the scales of its layers are not one number times the spec's, since something else"
                    " has written them; set scale"
                )
        return strength

    @scale.setter
    def scale(self, value: float) -> None:
        self._live("scale")
        self._unmerged("scale")
        strength = number("Attachment", "scale", value)
        for trained in self._trained.values():
            trained.check_strength(strength)
        offloaded = [trained for trained in self._trained.values() if trained.scale.is_meta]
        writers = []
        if offloaded:
            stores = self._stores("scale")
            writers = [stores.scale_writer(trained) for trained in offloaded]
        for trained in self._trained.values():
            trained.set_strength(strength)
        for trained, write in zip(offloaded, writers, strict=True):
            write(torch.tensor(trained.scale_value))
        self._scale = strength

    @abstractmethod
    def merge(self, keep: bool = True) -> None:
        """Fold every delta into its layer's weight.

        keep: hold on to the original weights, so that `unmerge` gives back the same Parameters with the same
              bits. False frees them: `unmerge` then raises, and `remove` leaves the merged weights in the
              model.

        Raises RuntimeError, with nothing merged, where a base is no plain Linear (quantised, hooked,
        sharded), and for a Bottleneck, which is no change of a weight.
        """

    @abstractmethod
    def unmerge(self) -> None:
        """Put the original weights back, bit for bit. Raises RuntimeError after merge(keep=False)."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the model as it was before: the same modules, processors, hooks and requires_grad.

        The trained tensors stay readable and can still be saved. Raises RuntimeError, with nothing changed,
        where another library has since replaced an adapted layer. What merge(keep=False) folded in stays.
        """

    @property
    @abstractmethod
    def report(self) -> Any:
        """What is adapted, how it runs and what is not; `print(attachment.report)` gives it as a table."""

    def adapter_file(self) -> AdapterFile:
        """Return the record that `formats.save` writes: spec, modules with their sizes, scale, and tensors.

        The spec's dtype is that of the tensors, if a cast of the whole model has changed it. Raises RuntimeError for
        a model on meta, whose tensors have no values.
        """
        tensors = self.state_dict()
        on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
        if on_meta:
            raise RuntimeError(
                f"adapter_file: {len(on_meta)} tensors are on meta and have no values, the first {on_meta[0]}"
            )
        return AdapterFile(self._spec_of(tensors), self.modules, self.scale, tensors)

    def _spec_of(self, tensors: Mapping[str, Tensor]) -> Spec:
        """The spec with the dtype that the tensors have; as it is where they differ."""
        dtypes = {tensor.dtype for tensor in tensors.values()}
        return self.spec.stored_as(dtypes.pop()) if len(dtypes) == 1 else self.spec

    def _recast(self) -> Counter[tuple[str, str]]:
        """How many trained tensors are in another dtype than the spec's, by (found, asked)."""
        return Counter(
            (_name(tensor.dtype), _name(trained.layout.dtype))
            for trained in self._trained.values()
            for tensor in trained.parameters()
            if tensor.dtype != trained.layout.dtype
        )

    def _stores(self, op: str) -> Stores:
        return Stores(op, self.model, self._trained.values())

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        count = sum(trained.layout.parameters for trained in self._trained.values())
        state = "" if self._host is not None else ", removed"
        size = f"{len(self._trained)} {self._places}, {count:,} parameters"
        return f"Attachment({self.spec!r} on {type(self.model).__name__}, {size}{state})"

    _places = "layers"
    """What the adapters sit in."""

    @abstractmethod
    def _unmerged(self, what: str) -> None:
        """Raises RuntimeError while a delta is merged."""

    def _live(self, what: str) -> Host:
        if self._host is None:
            raise RuntimeError(f"{what}: the attachment has been removed from its model")
        return self._host


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
