"""Our own format: one safetensors file, with the spec in its metadata.

Tensors are named as in `Attachment.state_dict()`. The metadata has one entry, `kronafuse`, a JSON object of
`format_version`, `kronafuse_version`, `spec`, `scale`, `modules` (name -> [N, K]) and `digest`; one entry, because
safetensors writes several in a different order each time. The same adapter gives the same bytes.

`digest` is SHA-256 over the object without it and the tensors, as `formats.digest` defines it: `load` compares it,
so that a changed number, name, dtype, shape or byte is an error; only a change of the text that leaves all of
them as they were, as E for e in a number, is none. Every field of the object and of the spec in it is
written and required, and a key that is there twice is refused.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from . import unet_finetune
from .adapter_file import AdapterFile
from .contents import check_contents, parse_modules
from .digest import whole
from .header import check_digest, damaged, header_of, parse_header, sealed, spec_and_scale
from .tensors import TensorFile, check_stored, check_values, open_tensors, save_tensors

FORMAT = "kronafuse"
FORMATS = (FORMAT, unet_finetune.FORMAT)
MODULES = "modules"
"""The field that names the modules, which a folder of files does by their names."""


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

    Raises TypeError for what is no adapter, ValueError for another format, for factors with NaN or infinity,
    for factors that are not those of the spec, and for an adapter that the format cannot hold, OSError where
    the disk refuses; nothing half-written is left.
    """
    if format not in FORMATS:
        raise ValueError(f"formats.save: format must be {' or '.join(map(repr, FORMATS))}; got {format!r}")
    if not isinstance(adapter, (AdapterFile, HasAdapterFile)):
        raise TypeError(
            "formats.save: adapter must be an Attachment or what formats.load returned; got"
            f" {type(adapter).__name__}"
        )
    file = adapter if isinstance(adapter, AdapterFile) else adapter.adapter_file()
    check_stored("formats.save", file.tensors)
    check_values("formats.save", file.tensors)
    if format == unet_finetune.FORMAT:
        return unet_finetune.save(path, file)
    header = header_of(file)
    try:
        modules = parse_modules(file.modules)
        names = check_contents(
            file.spec, modules, {name: tuple(each.shape) for name, each in file.tensors.items()}
        )
    except ValueError as error:
        raise ValueError(f"formats.save: {error}") from error
    tensors = {name: whole(file.tensors[name]) for name in names}
    header = {**header, MODULES: {name: list(size) for name, size in modules.items()}}
    metadata = {FORMAT: json.dumps(sealed(header, tensors))}
    try:
        save_tensors(tensors, Path(path), metadata)
    except ValueError as error:
        raise ValueError(f"formats.save: {error}") from error


def load(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter file whole, or a folder that `save` wrote; `attach(model, load(path))` puts it on a model.

    Raises FileNotFoundError, IsADirectoryError for another folder, and ValueError for a truncated file, one of
    another kind, one of a newer format, one that is not as it was written, and factors that are not floating
    or not finite. Warns for a file of format version 1, which has no digest. A folder in the released layout
    of bottleneck adapters that `save` did not write is for `formats.unet_finetune.load`.
    """
    if os.path.isdir(path):
        if unet_finetune.is_layout(path):
            return unet_finetune.load(path)
        raise IsADirectoryError(
            errno.EISDIR, "formats.load: a folder; name the adapter file in it", os.fspath(path)
        )
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "formats.load: no such adapter file", os.fspath(path))
    file = open_tensors("formats.load", path)
    if FORMAT not in file.metadata:
        raise ValueError(_foreign(file))
    header = parse_header(path, file.metadata[FORMAT].encode(), more=(MODULES,))
    with damaged(path):
        spec, scale = spec_and_scale(header)
        modules = parse_modules(header[MODULES])
    try:
        names = check_contents(spec, modules, file.shapes)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"formats.load: {path} does not hold what its metadata says: {error}") from error
    tensors = file.read()
    _check_read(path, tensors)
    check_digest(path, header, tensors)
    return AdapterFile(spec, modules, scale, {name: tensors[name] for name in names})


def _check_read(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    try:
        check_values(f"formats.load: {path}", tensors)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _foreign(file: TensorFile) -> str:
    entries, tensors = ", ".join(sorted(file.metadata)[:3]), ", ".join(list(file.shapes)[:3])
    return (
        f"formats.load: {file.path} is a safetensors file but not one of kronafuse's: its metadata has"
        f" {entries or 'no entries'}, its first tensors are {tensors or 'none'}"
    )
