"""What our own files say about an adapter beside its tensors: a JSON object."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..nn.fields import number
from ..nn.spec import Spec
from ..nn.spec_json import spec_from_dict, spec_to_dict
from ..version import VERSION
from .adapter_file import AdapterFile

FORMAT_VERSION = 1


def header_of(file: AdapterFile) -> dict[str, Any]:
    """`format_version`, `kronafuse_version`, `spec` and `scale`."""
    return {
        "format_version": FORMAT_VERSION,
        "kronafuse_version": VERSION,
        "spec": spec_to_dict(file.spec),
        "scale": number("formats.save", "scale", file.scale),
    }


def parse_header(path: str | os.PathLike[str], text: str | bytes) -> Mapping[str, Any]:
    """The object that the text holds. Raises ValueError where it is none, and for a newer format."""
    with damaged(path):
        header = json.loads(text)
        version, writer = header["format_version"], header["kronafuse_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version must be a positive integer; got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"formats.load: {path} has format version {version}, written by kronafuse {writer};"
            f" kronafuse {VERSION} reads up to {FORMAT_VERSION}"
        )
    return header


def spec_and_scale(header: Mapping[str, Any]) -> tuple[Spec, float]:
    """The spec, and the attachment's scale when it was saved."""
    return spec_from_dict(header["spec"]), number("formats.load", "scale", header["scale"])


@contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of a block that reads a header become a ValueError that names its file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"formats.load: the metadata of {path} is damaged: {error!r}") from error
