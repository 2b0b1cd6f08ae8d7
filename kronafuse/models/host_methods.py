"""Methods of a model that read its module tree, on a model that carries adapters.

Saving writes the model's own layers under their own names, with the adapters in files of their own; PEFT's
methods find the layers that they know; fusing of projections, which would drop deltas, raises.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from ..formats import save
from ..formats.adapter_file import AdapterFile
from ..formats.tensors import check_values
from ..nn.kron import KronLinear
from .instance_methods import InstanceMethod
from .sites import ends_in
from .taps import ATTRIBUTE, BlockAdapters
from .unadapted import HOST, taken_off, unadapted

if TYPE_CHECKING:
    from .host import Host

FUSING_METHODS = ("fuse_qkv_projections", "fuse_projections")
"""diffusers' methods that copy the frozen weights of q, k and v into one layer, without the deltas."""

SAVING_METHODS = ("save_pretrained",)
"""Of diffusers, transformers and huggingface_hub; `push_to_hub` and a pipeline's call them."""

PEFT_FUNCTIONS = ("get_peft_model_state_dict", "set_peft_model_state_dict")
"""PEFT's functions by which training scripts save and load its adapters; they name layers by where they are."""

ADDING_METHODS = ("add_adapter", "load_lora_adapter", "load_adapter", "load_attn_procs")
"""diffusers' and transformers' methods that let PEFT replace layers by its own."""

TREE_METHODS = (
    *ADDING_METHODS,
    "save_lora_adapter",
    "save_attn_procs",
    "get_adapter_state_dict",
    "tie_weights",
)
"""Methods that find layers by class and name, or write their names."""

ADAPTER_NAME = "kronafuse_adapter"
"""File name of the first adapter that `save_pretrained` writes; the others end in _2, _3 and so on."""


class Refusal(InstanceMethod):
    """A method that would drop the deltas of linear layers, and raises."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raises RuntimeError."""
        before = (
            " Where the adapters sit on a part of a model that was fusing its blocks in turn, those before this"
            " one now hold fused copies of their weights; the outputs are unchanged."
            if self.name == "fuse_projections"
            else ""
        )
        raise RuntimeError(
            f"{self.label}: the model carries kronafuse adapters, whose deltas a fused projection would drop."
            " Fuse first and adapt the fused layers, or merge(keep=False) and remove() the attachment"
            f" first.{before}"
        )


class StateDict(InstanceMethod):
    """The `state_dict` of a model that got adapters, which is not for two callers.

    They are a `save_pretrained` of a larger model around this one, and PEFT's function that saves its adapters.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns.

        Raises RuntimeError within a `save_pretrained` of a model that attach did not see: the folder would load
        with random weights in the adapted layers. Raises it for PEFT's function where both adapt a layer.
        """
        prefix = kwargs.get("prefix") or (args[1] if len(args) > 1 else "")
        frame = sys._getframe(1) if prefix else None
        while frame is not None:
            if frame.f_code.co_name in SAVING_METHODS:
                raise RuntimeError(
                    f"save_pretrained: a part of the model, {prefix.rstrip('.')}, carries kronafuse adapters that"
                    " were attached to this part only, and the folder would not load; attach to the whole model, or"
                    " save it before attach or after remove()"
                )
            frame = frame.f_back
        refuse_peft(self.module, sys._getframe(1).f_code.co_name)
        return self.original()(*args, **kwargs)


class LoadStateDict(InstanceMethod):
    """The `load_state_dict` of a model that got adapters, which is not for PEFT's function that loads its adapters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns. Raises RuntimeError where PEFT would find none of its layers' names."""
        refuse_peft(self.module, sys._getframe(1).f_code.co_name)
        return self.original()(*args, **kwargs)


def refuse_peft(model: nn.Module, caller: str) -> None:
    """Raises RuntimeError in a function of PEFT that would save its adapters under names with ours, or load none."""
    if caller not in PEFT_FUNCTIONS:
        return
    both = [
        name
        for name, each in model.named_modules()
        if isinstance(each, KronLinear) and hasattr(each.base, "base_layer")
    ]
    if both:
        raise RuntimeError(
            f"{caller}: {len(both)} layers of the model carry kronafuse adapters too, the first {both[0]}, and PEFT's"
            " names of them would not be those of a file; use the model's save_lora_adapter and load_lora_adapter, or"
            " remove() the kronafuse adapters first"
        )


class WithoutAdapters(InstanceMethod):
    """A method that runs on the model's own layers; what it puts in their places gets the adapters again.

    While it runs, a call of the model by another thread finds no adapters.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns.

        Raises RuntimeError if the method would replace layers while a delta is merged.
        """
        if self.name in ADDING_METHODS:
            merged = [name for name, each in self.module.named_modules() if _can_unmerge(each)]
            if merged:
                raise RuntimeError(
                    f"{self.label}: {len(merged)} layers of the model are merged, and their original weights"
                    " could not be put back under another adapter; unmerge() first"
                )
        hosts = hosts_of(self)
        with taken_off(self.module, adapted_layers(hosts)):
            for host in hosts:
                host.thaw(self.module)
            try:
                return self.original()(*args, **kwargs)
            finally:
                for host in hosts:
                    host.freeze_again(self.module)


class Saving(InstanceMethod):
    """`save_pretrained` of the model's own layers, and the adapters in files of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the model as its class does, as if it had no adapters, and each adapter into a file.

        A weight that holds a merged delta is written as it is, and that adapter gets no file. Raises
        RuntimeError, with nothing written, where that cannot be done.
        """
        bound = self.__signature__.bind(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        folder = given.get("save_directory")
        if folder is None:
            raise RuntimeError(
                f"{self.label}: the files of kronafuse adapters go to the argument save_directory, which is"
                " missing; write the adapters with formats.save, and the model before attach or after remove()"
            )
        if os.path.isfile(folder):
            return self.original()(*args, **kwargs)  # refuses it
        self._check(given)
        files = self._adapter_files()
        main = bool(given.get("is_main_process", True))
        paths = [
            Path(folder) / f"{ADAPTER_NAME}{f'_{index}' if index > 1 else ''}.safetensors"
            for index in range(1, len(files) + 1)
        ]
        if main:
            self._check_folder(Path(folder), paths)
        layers = adapted_layers(hosts_of(self))
        for file in files:
            check_values(self.label, file.tensors)
        if isinstance(bound.arguments.get("state_dict"), dict):
            bound.arguments["state_dict"] = own_names(self.module, layers, given["state_dict"])
        result = self.original(unadapted(self.module, layers))(*bound.args, **bound.kwargs)
        if main:
            for path, file in zip(paths, files, strict=True):
                save(path, file)
            written = f"; its adapters are in {', '.join(each.name for each in paths)}" if paths else ""
            warnings.warn(
                f"{self.label}: wrote the model without its kronafuse adapters{written}. Adapters that are"
                " merged are in the weights.",
                stacklevel=2,
            )
        return result

    def _check(self, given: dict[str, Any]) -> None:
        if given.get("push_to_hub"):
            raise RuntimeError(
                f"{self.label}: push_to_hub=True would upload before the files of the kronafuse adapters are"
                " written; call push_to_hub(repo_id), or upload the folder after this method"
            )
        sharded = any(hasattr(each, "full_tensor") for each in self.module.parameters())
        if sharded or given.get("distributed_checkpoint"):
            raise RuntimeError(
                f"{self.label}: the model carries kronafuse adapters and its weights are distributed over"
                " processes; write the adapters with formats.save, and the model before attach or after remove()"
            )

    def _check_folder(self, folder: Path, paths: list[Path]) -> None:
        pattern = re.compile(rf"{ADAPTER_NAME}(_\d+)?\.safetensors")
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        others = [each.name for each in found if pattern.fullmatch(each.name) and each not in paths]
        if others:
            raise RuntimeError(
                f"{self.label}: {folder} has {', '.join(others)} of an earlier call, which would be taken for an"
                f" adapter of this model; {len(paths)} adapters are to be written here: use another folder, or"
                " move those files"
            )

    def _adapter_files(self) -> list[AdapterFile]:
        """Return one for each attachment that has unmerged adapters in this model, in this model's names."""
        files = []
        for host in hosts_of(self):
            for attachment in host.attachments:
                if not host.in_weights(attachment):
                    files.append(self._renamed(attachment.model, attachment.adapter_file()))
        return [each for each in files if each.modules]

    def _renamed(self, root: nn.Module, file: AdapterFile) -> AdapterFile:
        if root is self.module:
            return file
        shorter, longer = _prefix(root, self.module), _prefix(self.module, root)
        names = {
            name: name.removeprefix(shorter) if shorter else f"{longer or ''}{name}"
            for name in file.modules
            if name.startswith(shorter or "")
        }
        spec: Any = file.spec
        if getattr(spec, "per_target", None):
            used = {
                suffix: each
                for suffix, each in spec.per_target.items()
                if any(ends_in(name, suffix) for name in names.values())
            }
            spec = replace(spec, per_target=used or None)
        modules = {new: file.modules[name] for name, new in names.items()}
        for name, new in names.items():
            size = modules[new]
            if spec.at(new).layout(*size, new) != file.spec.at(name).layout(*size, name):
                raise RuntimeError(
                    f"{self.label}: a per_target of the adapter on {type(root).__name__} names {name} by more"
                    f" than its name here, {new}; write the adapter with formats.save, and this model before"
                    " attach or after remove()"
                )
        tensors = {
            f"{new}.{tensor}": file.tensors[f"{name}.{tensor}"]
            for name, new in names.items()
            for tensor in spec.at(new).layout(*modules[new], new).sizes
        }
        return AdapterFile(spec, modules, file.scale, tensors)


def own_names(model: nn.Module, adapted: Set[nn.Module], state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict of a model with adapters under the names that it has without them."""
    layers = [f"{name}." for name, each in model.named_modules() if each in adapted]
    blocks = {
        f"{name}.{ATTRIBUTE}."
        for name, each in model.named_modules()
        if isinstance(each._modules.get(ATTRIBUTE), BlockAdapters)
    }
    result = {}
    for key, tensor in state_dict.items():
        layer = next((each for each in layers if key.startswith(each)), None)
        if layer is not None:
            if key.startswith(f"{layer}base."):
                result[layer + key.removeprefix(f"{layer}base.")] = tensor
            elif not key.startswith(f"{layer}adapters."):
                result[key] = tensor
        elif not any(key.startswith(each) for each in blocks):
            result[key] = tensor
    return result


def hosts_of(method: InstanceMethod) -> list[Host]:
    """Return the hosts that have put the method there and those of modules below, once each."""
    below = [each.__dict__[HOST] for each in method.module.modules() if HOST in each.__dict__]
    return list({id(each): each for each in (*method.hosts, *below)}.values())


def adapted_layers(hosts: Iterable[Host]) -> set[nn.Module]:
    """Return the layers of these hosts that attach made."""
    return {layer for host in hosts for layer, _ in host.layers.values()}


def _prefix(model: nn.Module, part: nn.Module) -> str | None:
    """Return what a part's names begin with in a model, None if the part is not in it."""
    for name, module in model.named_modules():
        if module is part:
            return f"{name}." if name else ""
    return None


def _can_unmerge(module: nn.Module) -> bool:
    return isinstance(module, KronLinear) and any(
        module.is_merged(each) and not module.is_final(each)  # pyright: ignore[reportArgumentType]
        for each in module.adapters.values()
    )
