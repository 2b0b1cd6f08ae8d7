"""Tensors from torch.save files, of which nothing is executed, and whose sizes are compared with the file's first."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from .reading import check_regular
from .tensors import check_stored

ZIP = b"PK\x03\x04"
"""Begins a file that torch reads as a zip file."""

MAX_PICKLE_BYTES = 2**16
"""Bytes of the pickle that names a file's tensors, which has some 200 for each of them."""

MAX_RECORDS = 1000
"""Records of a zip file: one for each tensor and a few more."""

MAKES_TENSORS = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|collections OrderedDict|torch [A-Za-z0-9]+Storage"
)
"""The functions that the pickle of a state_dict calls, as module and name."""

OTHER_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
"""Operations that call something without its name next to them; torch.save writes none."""

OLD_PICKLES = 5
"""Pickles that a file of the format before zip files begins with: magic, protocol, system, tensors, storages."""


def load_tensors(op: str, path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, each in memory of its own.

    Raises ValueError for what is not a regular file, for a file that is truncated, compressed or holds anything
    else, and for tensors that have more elements than the file; OSError.
    """
    check_regular(op, path)
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{op}: {path} is not a whole torch.save file: it is empty")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about protocols of pickles that torch.save did not write: refused below
        try:
            if file.read(len(ZIP)) == ZIP:
                _check_zip(file, size)
            else:
                file.seek(0)
                _check_old(file)
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise ValueError(
                f"{op}: {path} is no torch.save file of tensors alone; it has not been executed"
            ) from error
        except Exception as error:  # torch's readers raise whatever a damaged file leads them to
            raise ValueError(f"{op}: {path} is not a whole torch.save file: {error!r}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{op}: {path} must hold named tensors; got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{op}: {path} must hold named tensors; got {name!r}: {type(value).__name__}")
    check_stored(f"{op}: {path}", found)
    elements = sum(tensor.nbytes for tensor in found.values())
    if elements > size:
        raise ValueError(
            f"{op}: {path} has {size:,} bytes; its tensors would have {elements:,}, of elements that it repeats"
        )
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _check_zip(file: io.BufferedReader, size: int) -> None:
    """Raise for records that are compressed, that have more bytes than the file, or that ask for other calls."""
    with zipfile.ZipFile(file) as records:
        infos = records.infolist()
        if len(infos) > MAX_RECORDS:
            raise ValueError(f"it has {len(infos):,} records, more than {MAX_RECORDS:,}")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"its record {info.filename} is compressed, which torch.save does not do")
        total = sum(info.file_size for info in infos)
        if total > size:
            raise ValueError(f"its records have {total:,} bytes, more than the file's {size:,}")
        for info in infos:
            if info.filename.endswith(".pkl"):
                if info.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(
                        f"its record {info.filename} has {info.file_size:,} bytes, more than {MAX_PICKLE_BYTES:,}"
                    )
                _check_calls(io.BytesIO(records.read(info)))


def _check_old(file: io.BufferedReader) -> None:
    """Raise if the pickles that the file begins with ask for other calls, or are longer than those of tensors."""
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for _ in range(OLD_PICKLES):
        _check_calls(pickles)


def _check_calls(pickle: io.BytesIO) -> None:
    """Raise UnpicklingError if a pickle asks for anything but tensors: torch lets more be made, of any size."""
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name in OTHER_CALLS or (
            operation.name == "GLOBAL" and not MAKES_TENSORS.fullmatch(str(argument))
        ):
            raise UnpicklingError(f"{operation.name} {argument}")
