"""A digest over what a file says and the tensors that it holds."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute SHA-256 over a JSON object and named tensors, as 64 hexadecimal digits.

    header:  JSON values; hashed as compact JSON in ASCII with sorted keys
    tensors: on any device; in the order of their names, each is hashed as the compact JSON array
             [name, dtype, [sizes]], followed by its elements in row-major order, little-endian
    """
    found = hashlib.sha256(canonical(dict(header)))
    for name in sorted(tensors):
        tensor = whole(tensors[name])
        found.update(canonical([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
        found.update(memory(tensor))
    return found.hexdigest()


def canonical(value: Any) -> bytes:
    """Write JSON in the one way in which it is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def whole(tensor: Tensor) -> Tensor:
    """The values on the CPU in row-major, little-endian order; the tensor itself if it has them so."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if sys.byteorder == "little" else swapped(tensor)


def swapped(tensor: Tensor) -> Tensor:
    """A copy with the bytes of every element in reverse order."""
    size = tensor.element_size()
    return (
        tensor.reshape(-1, 1).view(torch.uint8).view(-1, size).flip(-1).view(tensor.dtype).view(tensor.shape)
    )


def memory(tensor: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """The bytes of a `whole` tensor, not copied, for as long as it lives; torch itself needs NumPy for this."""
    if not tensor.nbytes:
        return (ctypes.c_ubyte * 0)()
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
