"""Tensors as one safetensors file: written whole or not at all, and read only once its header is sound."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError, safe_open, serialize_file
from torch import Tensor

from ..checks import check_dtype, check_tensor
from .atomic import written_beside
from .digest import memory, swapped, whole
from .reading import check_header, check_header_size, check_regular, parse_json

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""

METADATA = "__metadata__"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FIELDS = {"dtype", "shape", "data_offsets"}
"""The fields of each tensor in the header."""


def check_values(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises TypeError for what is no floating tensor, ValueError for one with NaN or infinity in it."""
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor)
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite; got NaN or infinity in it")


def check_stored(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises TypeError for what is no tensor, ValueError for a meta, sparse, nested or quantised one."""
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
        if tensor.is_meta:
            raise ValueError(f"{op}: {name} must have values; it is on the meta device, which holds none")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{op}: {name} must be a dense tensor; got {tensor.layout}, {tensor.dtype}")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors with `metadata`, beside the place and renamed (`written_beside`).

    Raises OSError with the path where the disk refuses, ValueError for a header too large to be read again;
    nothing half-written is left. The same tensors give
    the same bytes with at most one entry of metadata: safetensors writes several in a changing order.
    """
    kept = {name: whole(tensor) for name, tensor in tensors.items()}
    records = {name: _record(tensor) for name, tensor in kept.items()}
    with written_beside(path) as beside:
        beside.touch()
        mode = stat.S_IMODE(
            beside.stat().st_mode
        )  # as the user's umask has it; safetensors makes files private
        try:
            serialize_file(records, os.fspath(beside), None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot write the tensors: {error}", str(path)) from error
        beside.chmod(mode)
        try:
            _read_header(beside)
        except ValueError as error:
            raise ValueError(f"{path} would not be read again: {error}") from error


def _record(tensor: Tensor) -> Any:
    """A tensor as safetensors' own functions take it; its functions for torch need NumPy, which torch does not."""
    described: dict[str, Any] = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    if hasattr(safetensors, "TensorSpec"):  # since 0.8
        return safetensors.TensorSpec(**described, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
    return {**described, "data": bytes(memory(tensor))}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header is sound and fits its size; no tensor has been read.

    path:     where it lies
    metadata: its texts by name
    shapes:   name -> sizes of every tensor
    dtypes:   name -> dtype as safetensors writes it
    starts:   name -> where its bytes begin in the file
    """

    op: str
    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    starts: Mapping[str, int]

    def read(self) -> dict[str, Tensor]:
        """Read every tensor into memory of its own, which later changes of the file do not reach.

        Raises ValueError for one that is not floating. safetensors' own reader maps the file instead: the numbers
        change with it, the process ends if it is cut, and copies of them need the memory twice.
        """
        tensors = {}
        with open(self.path, "rb") as file:
            for name, shape in self.shapes.items():
                dtype = DTYPES.get(self.dtypes[name])
                if dtype is None:
                    raise ValueError(
                        f"{self.op}: {self.path}: {name} must be float32, float16, bfloat16 or float64; got"
                        f" {self.dtypes[name]}"
                    )
                tensor = torch.empty(shape, dtype=dtype)
                file.seek(self.starts[name])
                if file.readinto(memory(tensor)) != tensor.nbytes:
                    raise ValueError(f"{self.op}: {self.path} was cut while it was read, at {name}")
                tensors[name] = tensor if sys.byteorder == "little" else swapped(tensor)
        return tensors


def open_tensors(op: str, path: str | os.PathLike[str]) -> TensorFile:
    """Read the header of a safetensors file.

    Raises ValueError for what is not a regular file, for a header that does not fit the file's size, is too
    large, has a key twice or says anything else than safetensors does, and OSError.
    """
    path = Path(path)
    check_regular(op, path)
    try:
        text = _read_header(path)
        described = _described(parse_json(text))
        with safe_open(path, framework="pt") as file:  # checks that sizes, dtypes and places fit the file
            metadata = file.metadata() or {}
            if set(file.keys()) != set(described):
                raise ValueError("its header is read in two ways")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{op}: {path} is not a whole safetensors file: {error}") from error
    begin = LENGTH_BYTES + len(text)
    return TensorFile(
        op,
        path,
        metadata,
        {name: tuple(each["shape"]) for name, each in described.items()},
        {name: each["dtype"] for name, each in described.items()},
        {name: begin + each["data_offsets"][0] for name, each in described.items()},
    )


def _read_header(path: Path) -> bytes:
    """The text of a safetensors file's header. Raises ValueError for one that does not fit, or is too large."""
    size = path.stat().st_size
    if size < LENGTH_BYTES:  # files of /proc say 0 and may wait for ever
        raise ValueError(f"it has {size:,} bytes, fewer than the length of a header")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > size - LENGTH_BYTES:
            raise ValueError(f"it has {size:,} bytes, and its header would have {length:,}")
        check_header_size(length)
        text = file.read(length)
    check_header(text)
    return text


def _described(header: Any) -> dict[str, dict[str, Any]]:
    """Name -> what the header says of a tensor, if it says what safetensors does and nothing else."""
    if not isinstance(header, dict):
        raise ValueError(f"its header must be an object; it is {type(header).__name__}")
    tensors = {name: each for name, each in header.items() if name != METADATA}
    for name, each in tensors.items():
        if not isinstance(each, dict) or set(each) != FIELDS:
            raise ValueError(f"its header must say {', '.join(sorted(FIELDS))} of {name!r} and nothing else")
        for field in ("shape", "data_offsets"):
            sizes = each[field]
            if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError(f"{field} of {name!r} must be a list of integers")
    return tensors
