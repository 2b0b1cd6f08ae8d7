"""Trained tensors that another library keeps elsewhere between calls: read from its store, and written to it.

accelerate's `cpu_offload` and `disk_offload` leave tensors on meta and bring them back for each call from a mapping
that their hooks hold. diffusers' group offloading to disk leaves memory without values. What can be neither read nor
written raises RuntimeError with the reason, before anything is changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.trained import TrainedTensors


class Stores:
    """Access to the tensors of a model's adapters in the place where each is kept at the moment.

    op:      named in errors
    model:   the model that the adapters are on
    trained: the adapters, which may have been removed from it
    """

    def __init__(self, op: str, model: nn.Module, trained: Iterable[TrainedTensors]) -> None:
        self._op = op
        self._modules = [*model.modules(), *trained]

    @cached_property
    def _keepers(self) -> dict[int, _Keeper]:
        return dict(_keepers(self._modules))

    @cached_property
    def _on_disk(self) -> set[int]:
        return set(_in_disk_groups(self._modules))

    def read(self, place: str, trained: TrainedTensors, name: str) -> Tensor:
        """The tensor with its values, on the device where they are; a tensor on meta that nothing keeps, as it is.

        Raises RuntimeError where the values cannot be had, or are only a part of the tensor.
        """
        tensor = self._whole(place, trained, name)
        keeper = self._keepers.get(id(trained)) if tensor.is_meta else None
        return tensor if keeper is None else keeper.read(name)

    def writer(self, place: str, trained: TrainedTensors, name: str) -> Callable[[Tensor], None] | None:
        """Return what writes new values into the store of a library; None if the tensor itself is to be written.

        Raises RuntimeError where that is not possible.
        """
        tensor = self._whole(place, trained, name)
        if not tensor.is_meta:
            return None
        keeper = self._keepers.get(id(trained))
        if keeper is None:
            raise RuntimeError(
                f"{self._op}: {place}.{name} is on meta and no hook of accelerate on the model keeps its values: give"
                " the model memory first, with to_empty() or load_state_dict(assign=True)"
            )
        return keeper.writer(f"{self._op}: {place}.{name}", name)

    def scale_writer(self, trained: TrainedTensors) -> Callable[[Tensor], None]:
        """Return what writes the scale into the store that a call takes the buffer from, if there is one.

        Raises RuntimeError where that store cannot be written.
        """
        keeper = self._keepers.get(id(trained))
        if keeper is None or not keeper.has(trained.SCALE):
            return lambda value: None
        return keeper.writer(f"{self._op}: {trained.SCALE}", trained.SCALE)

    def _whole(self, place: str, trained: TrainedTensors, name: str) -> Tensor:
        tensor = trained.get_parameter(name)
        if id(tensor) in self._on_disk:
            raise RuntimeError(
                f"{self._op}: {place}.{name} is offloaded to disk by diffusers' group offloading, whose files hold"
                " groups of layers; remove its hooks first, or offload without offload_to_disk_path"
            )
        size = trained.layout.sizes[name]
        if tuple(tensor.shape) != size:
            raise RuntimeError(
                f"{self._op}: {place}.{name} must be {size} to be read or written; it is {tuple(tensor.shape)} here,"
                " a part that another library has made of it (ZeRO stage 3, FSDP's first version): gather it first"
            )
        return tensor


class _Keeper:
    """The values of one module's tensors in the mapping of an accelerate hook."""

    def __init__(self, values: Mapping[str, Tensor], prefix: str) -> None:
        self._values = values
        self._prefix = prefix

    def has(self, name: str) -> bool:
        try:
            self._values[self._prefix + name]
        except KeyError:
            return False
        return True

    def read(self, name: str) -> Tensor:
        return self._values[self._prefix + name]

    def writer(self, what: str, name: str) -> Callable[[Tensor], None]:
        from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

        values: Any = self._values
        key = self._prefix + name
        while isinstance(values, PrefixedDataset):
            values, key = values.dataset, f"{values.prefix}{key}"
        if not isinstance(values, OffloadedWeightsLoader):
            return _copy_to(values[key])
        if key in values.state_dict:
            return _copy_to(values.state_dict[key])
        info = values.index[key]
        if info.get("safetensors_file") is not None:
            raise RuntimeError(
                f"{what} is offloaded into {info['safetensors_file']}, a file that is not the offload folder's own;"
                " remove the hooks first (accelerate.hooks.remove_hook_from_submodules)"
            )
        dtype = getattr(torch, info["dtype"])
        return lambda value: _write_offloaded(value.to("cpu", dtype), key, str(values.save_folder))


def _copy_to(kept: Tensor) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def write(value: Tensor) -> None:
        kept.copy_(value)

    return write


def _write_offloaded(value: Tensor, key: str, folder: str) -> None:
    """Replace one file of accelerate's offload folder, whole or not at all."""
    from accelerate.utils import offload_weight

    with tempfile.TemporaryDirectory(dir=folder) as beside:
        offload_weight(value, key, beside)
        os.replace(os.path.join(beside, f"{key}.dat"), os.path.join(folder, f"{key}.dat"))


def _keepers(modules: Iterable[nn.Module]) -> Iterator[tuple[int, _Keeper]]:
    """(id of an adapter's module, what keeps its tensors) under accelerate's offloading hooks."""
    for holder in modules:
        for hook in _hooks(holder):
            values = getattr(hook, "weights_map", None)
            if not getattr(hook, "offload", False) or values is None:
                continue
            below = holder.named_modules() if hook.place_submodules else [("", holder)]
            for name, module in below:
                if isinstance(module, TrainedTensors):
                    yield id(module), _Keeper(values, f"{name}." if name else "")


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of one module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _in_disk_groups(modules: Iterable[nn.Module]) -> Iterator[int]:
    """ids of the tensors that diffusers' group offloading keeps in files."""
    for module in modules:
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            group = getattr(hook, "group", None)
            if getattr(group, "offload_to_disk_path", None) is not None:
                yield from map(id, getattr(group, "tensor_to_key", ()))
