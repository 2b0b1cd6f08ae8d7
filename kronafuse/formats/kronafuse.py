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

from . import unet_finetune
from .adapter_file import AdapterFile
from .header import damaged, header_of, parse_header, spec_and_scale
from .tensors import check_values, save_tensors

FORMAT = "kronafuse"
FORMATS = (FORMAT, unet_finetune.FORMAT)


@runtime_checkable
class HasAdapterFile(Protocol):
    """What `save` takes beside a file's record: an Attachment."""

    def adapter_file(self) -> AdapterFile:
        """The record to write."""
        ...


def save(path: str | os.PathLike[str], adapter: AdapterFile | HasAdapterFile, format: str = FORMAT) -> None:
    """Write an adapter: beside the place and renamed, so that an old file stays whole until the new one is.

    path:    the file, conventionally *.safetensors, or the folder; the one it is in must exist
    adapter: an Attachment, or what `load` returned
    format:  "kronafuse", one safetensors file; "unet_finetune", a folder as the bottleneck adapters of the
             paper were released (`formats.unet_finetune`)

    Raises TypeError for what is no adapter, ValueError for another format, for factors with NaN or infinity
    and for an adapter that the format cannot hold, OSError where the disk refuses; nothing half-written is
    left.
    """
    if format not in FORMATS:
        raise ValueError(f"formats.save: format must be {' or '.join(map(repr, FORMATS))}; got {format!r}")
    if not isinstance(adapter, (AdapterFile, HasAdapterFile)):
        raise TypeError(
            "formats.save: adapter must be an Attachment or what formats.load returned; got"
            f" {type(adapter).__name__}"
        )
    file = adapter if isinstance(adapter, AdapterFile) else adapter.adapter_file()
    check_values("formats.save", file.tensors)
    if format == unet_finetune.FORMAT:
        return unet_finetune.save(path, file)
    header = {**header_of(file), "modules": {name: list(size) for name, size in file.modules.items()}}
    save_tensors(file.tensors, Path(path), {FORMAT: json.dumps(header)})


def load(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file whole, or a folder that `save` wrote; `attach(model, load(path))` puts it on a model.

    Raises FileNotFoundError, IsADirectoryError for another folder, and ValueError for a truncated file, one of
    another kind, one of a newer format, and factors that are not floating or not finite. A folder in the
    released layout of bottleneck adapters that `save` did not write is for `formats.unet_finetune.load`.
    """
    if os.path.isdir(path):
        if unet_finetune.is_layout(path):
            return unet_finetune.load(path)
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
    header = parse_header(path, text)
    with damaged(path):
        spec, scale = spec_and_scale(header)
        modules = {name: (int(n), int(k)) for name, (n, k) in header["modules"].items()}
        expected = {
            f"{name}.{factor}": size
            for name, (n, k) in modules.items()
            for factor, size in spec.at(name).layout(n, k, name).sizes.items()
        }
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
