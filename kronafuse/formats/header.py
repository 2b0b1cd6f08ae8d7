"""The JSON object that our own files hold in addition to an adapter's tensors, with a digest of both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..nn.fields import number
from ..nn.spec import Spec
from ..nn.spec_json import spec_from_dict, spec_to_dict
from ..version import VERSION
from .adapter_file import AdapterFile
from .digest import digest
from .reading import parse_json

FORMAT_VERSION = 2
"""Version 1 was the same without a digest."""

DIGEST = "digest"
FIELDS = frozenset({"format_version", "kronafuse_version", "spec", "scale"})


def header_of(file: AdapterFile) -> dict[str, Any]:
    """`format_version`, `kronafuse_version`, `spec` and `scale`."""
    return {
        "format_version": FORMAT_VERSION,
        "kronafuse_version": VERSION,
        "spec": spec_to_dict(file.spec),
        "scale": number("formats.save", "scale", file.scale),
    }


def sealed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header with the digest of itself and the tensors."""
    return {**header, DIGEST: digest(header, tensors)}


def parse_header(path: str | os.PathLike[str], text: bytes, more: Collection[str] = ()) -> Mapping[str, Any]:
    """The object that the text holds, with every field that its version has and no other.

    more: fields in addition to those of `header_of`

    Raises ValueError for anything else, for a key that is there twice and for a newer format.
    """
    with damaged(path):
        header = parse_json(text)
        version, writer = header["format_version"], header["kronafuse_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version must be a positive integer; got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"formats.load: {path} has format version {version}, written by kronafuse {writer};"
            f" kronafuse {VERSION} reads up to {FORMAT_VERSION}"
        )
    fields = {*FIELDS, *more} | ({DIGEST} if version > 1 else set())
    with damaged(path):
        for names, what in ((fields - set(header), "lacks"), (set(header) - fields, "has unknown fields")):
            if names:
                raise ValueError(f"it {what} {', '.join(sorted(names))}")
    return header


def check_digest(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raises ValueError if header or tensors are not those that were written; warns if nothing can tell."""
    if header["format_version"] == 1:
        warnings.warn(
            f"formats.load: {path} has format version 1, which has no digest, so that damage to it may go unnoticed;"
            " formats.save(path, formats.load(path)) writes it with one",
            UserWarning,
            stacklevel=3,
        )
        return
    found = digest({name: value for name, value in header.items() if name != DIGEST}, tensors)
    if found != header[DIGEST]:
        raise ValueError(
            f"formats.load: {path} is not as it was written: the digest of its header and tensors is"
            f" {found}, and it says {header[DIGEST]!r}"
        )


def spec_and_scale(header: Mapping[str, Any]) -> tuple[Spec, float]:
    """The spec, and the attachment's scale when it was saved."""
    return spec_from_dict(header["spec"]), number("formats.load", "scale", header["scale"])


@contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of a block that reads a header become a ValueError that names its file."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"formats.load: the metadata of {path} is damaged: {error!r}") from error
