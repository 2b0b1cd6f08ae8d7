"""Our own format: one safetensors file, with the spec in its metadata.

Tensors are named as in `Attachment.state_dict()`. The metadata has one entry, `kronafuse`, a JSON object of
`format_version`, `kronafuse_version`, `spec`, `modules` (name -> [N, K]) and `scale`; one entry, because
safetensors writes several in a different order each time. The same adapter gives the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..nn.fields import number
from ..nn.spec_json import spec_from_dict, spec_to_dict
from ..version import VERSION
from .adapter_file import AdapterFile
from .tensors import check_values, save_tensors

FORMAT = "kronafuse"
FORMAT_VERSION = 1


@runtime_checkable
class HasAdapterFile(Protocol):
    """What `save` takes beside a file's record: an Attachment."""

    def adapter_file(self) -> AdapterFile:
        """The record to write."""
        ...


def save(path: str | os.PathLike[str], adapter: AdapterFile | HasAdapterFile, format: str = FORMAT) -> None:
    """Write an adapter: beside the place and renamed, so that an old file stays whole until the new one is.

    path:    the file, conventionally *.safetensors; its folder must exist
    adapter: an Attachment, or what `load` returned
    format:  "kronafuse"

    Raises TypeError for what is no adapter, ValueError for another format and for factors with NaN or
    infinity, OSError where the disk refuses; nothing half-written is left.
    """
    if format != FORMAT:
        raise ValueError(f"formats.save: format must be {FORMAT!r}; got {format!r}")
    if not isinstance(adapter, (AdapterFile, HasAdapterFile)):
        raise TypeError(
            "formats.save: adapter must be an Attachment or what formats.load returned; got"
            f" {type(adapter).__name__}"
        )
    file = adapter if isinstance(adapter, AdapterFile) else adapter.adapter_file()
    check_values("formats.save", file.tensors)
    header = {
        "format_version": FORMAT_VERSION,
        "kronafuse_version": VERSION,
        "spec": spec_to_dict(file.spec),
        "modules": {name: list(size) for name, size in file.modules.items()},
        "scale": number("formats.save", "scale", file.scale),
    }
    save_tensors(file.tensors, Path(path), {FORMAT: json.dumps(header)})


def load(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file whole; `attach(model, load(path))` puts it on a model.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a truncated file, one of another kind,
    one of a newer format, and factors that are not floating or not finite.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(
            errno.EISDIR, "formats.load: a folder; name the adapter file in it", os.fspath(path)
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, "formats.load: no such adapter file", os.fspath(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if FORMAT not in metadata:
                raise ValueError(_foreign(path, metadata, names))
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"formats.load: {path} is not a whole safetensors file: {error}") from error
    return _parse(path, metadata[FORMAT], tensors)


def _parse(path: str | os.PathLike[str], text: str, tensors: dict[str, Tensor]) -> AdapterFile:
    try:
        header = json.loads(text)
        version, writer = header["format_version"], header["kronafuse_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version must be a positive integer; got {version!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"formats.load: the metadata of {path} is damaged: {error!r}") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"formats.load: {path} has format version {version}, written by kronafuse {writer};"
            f" kronafuse {VERSION} reads up to {FORMAT_VERSION}"
        )
    try:
        spec = spec_from_dict(header["spec"])
        modules = {name: (int(n), int(k)) for name, (n, k) in header["modules"].items()}
        scale = number("formats.load", "scale", header["scale"])
        expected = {
            f"{name}.{factor}": size
            for name, (n, k) in modules.items()
            for factor, size in spec.at(name).layout(n, k, name).sizes.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"formats.load: the metadata of {path} is damaged: {error!r}") from error
    found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"formats.load: {path} does not hold what its metadata says: {len(wrong)} factors differ, the"
            f" first {name}: {expected.get(name, 'none')} by the metadata, {found.get(name, 'none')} in the"
            " file"
        )
    try:
        check_values(f"formats.load: {path}", tensors)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return AdapterFile(spec, modules, scale, {name: tensors[name] for name in expected})


def _foreign(path: str | os.PathLike[str], metadata: Mapping[str, str], names: list[str]) -> str:
    entries, tensors = ", ".join(sorted(metadata)[:3]), ", ".join(names[:3])
    return (
        f"formats.load: {path} is a safetensors file but not one of kronafuse's: its metadata has"
        f" {entries or 'no entries'}, its first tensors are {tensors or 'none'}"
    )
