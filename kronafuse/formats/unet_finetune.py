"""Bottleneck adapters as their paper released them: a folder with one torch.save file for each adapted block.

A file is named by the block's path in the LDM code: `<path>.adapter_inout.pt` with `adp.0.weight, adp.0.bias,
adp.2.weight, adp.2.bias` for a transformer block, `<path>.adapter.pt` with the same of 0 (GroupNorm), 2 and 4
for a ResBlock. The released code also writes each transformer adapter's only child, `<path>.adapter_inout.adp.pt`,
and reads without it; here it is read where it is there and has to be equal, and is not written.

Nothing there says where the adapters read and write, nor their activation, scale and start. `save` adds
`kronafuse.json` with them and a digest of itself and the tensors of all files by our names (`formats.digest`), which
the released code passes over, as it does whatever is not named like a module. There the scale comes from its
configuration: what belongs there is the spec's scale times the attachment's.

Source: Xiang et al. 2023, arXiv 2303.18181, released code.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.bottleneck_layout import GROUPS
from ..nn.bottleneck_spec import Bottleneck
from ..nn.positions import RESNET
from .adapter_file import AdapterFile
from .atomic import replace_folder, write_json, written_beside
from .contents import check_contents, parse_modules
from .header import check_digest, damaged, header_of, parse_header, sealed, spec_and_scale
from .pickles import load_tensors
from .reading import read_small
from .tensors import check_values
from .unet_blocks import UNetBlock, absent, from_diffusers, from_ldm

FORMAT = "unet_finetune"
HEADER = "kronafuse.json"
TRANSFORMER, CHILD, RESBLOCK = ".adapter_inout.pt", ".adapter_inout.adp.pt", ".adapter.pt"
"""How the files of a transformer block, of its adapter's child and of a ResBlock end."""

MAPS = {"down": "0.weight", "down_bias": "0.bias", "up": "2.weight", "up_bias": "2.bias"}
KEYS = {
    TRANSFORMER: {name: f"adp.{key}" for name, key in MAPS.items()},
    CHILD: MAPS,
    RESBLOCK: {
        "norm_weight": "0.weight",
        "norm_bias": "0.bias",
        "down": "2.weight",
        "down_bias": "2.bias",
        "up": "4.weight",
        "up_bias": "4.bias",
    },
}
"""Our name -> theirs, by the end of the file's name."""

ACTIVATIONS = ("identity", "relu", "sigmoid", "silu")
"""What the released code can put between the maps."""


def save(path: str | os.PathLike[str], file: AdapterFile) -> None:
    """Write the folder, beside its place and renamed; called by `formats.save`, which has checked the tensors."""
    spec = file.spec
    if not isinstance(spec, Bottleneck):
        raise ValueError(f"formats.save: format {FORMAT!r} holds Bottleneck adapters; got {spec}")
    if spec.form != "dense":
        raise ValueError(f"formats.save: format {FORMAT!r} holds the form 'dense'; got {spec.form!r}")
    if spec.activation not in ACTIVATIONS:
        raise ValueError(
            f"formats.save: format {FORMAT!r} is for the activations {', '.join(ACTIVATIONS)}; got"
            f" {spec.activation!r}"
        )
    end, blocks = _end(spec), _ldm_blocks(file)
    _check_record(file, spec)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(Path(path).parent))
    _check_replaceable(target)
    header = sealed(header_of(file), file.tensors)
    with replace_folder(target) as folder:
        for name, block in blocks.items():
            buffer = io.BytesIO()
            tensors = {
                key: file.tensors[f"{name}.{ours}"].detach().cpu().clone() for ours, key in KEYS[end].items()
            }
            torch.save(tensors, buffer)
            with written_beside(folder / f"{block.ldm}{end}") as beside:
                beside.write_bytes(buffer.getvalue())
        write_json(folder / HEADER, header)


def _ldm_blocks(file: AdapterFile) -> dict[str, UNetBlock]:
    """Module name -> block, of a whole U-Net."""
    blocks = {name: from_diffusers(name) for name in file.modules}
    known = {name: block for name, block in blocks.items() if block is not None}
    wrong = [f"{name} is in no such U-Net" for name in blocks if name not in known]
    wrong += [f"{block.diffusers} is missing" for block in absent(known.values())]
    if wrong:
        raise ValueError(
            f"formats.save: format {FORMAT!r} is for U-Nets with two ResBlocks a down level and an adapter on"
            f" every block: {wrong[0]}"
        )
    return known


def _check_record(file: AdapterFile, spec: Bottleneck) -> None:
    """The tensors are those of the spec, and the released code can normalise them."""
    for name, (_, k) in file.modules.items():
        if spec.block == RESNET and k % GROUPS:
            raise ValueError(
                f"formats.save: format {FORMAT!r} normalises ResBlocks in {GROUPS} groups, which must divide their"
                f" channels K; got K = {k} at {name}"
            )
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
        check_contents(spec, parse_modules(file.modules), shapes)
    except ValueError as error:
        raise ValueError(f"formats.save: {error}") from error


def is_layout(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of these: it has our description, or a file named like an adapter's."""
    return any(name == HEADER or _parse(name) is not None for name in os.listdir(path))


def load(path: str | os.PathLike[str], spec: Bottleneck | None = None) -> AdapterFile:
    """Read a folder in the released layout; `attach(model, load(path, spec))` puts it on a model.

    spec: where the adapters read and write, their activation and scale, as the configuration says with which
          they were trained; its width is taken from the files. None where `formats.save` wrote the folder

    Nothing in the files is executed. Raises NotADirectoryError, and ValueError for missing, unknown, damaged
    and mismatched files, for tensors that are not floating or not finite, for a folder that `save` wrote and that
    is not as it was written, and for a spec that differs from what the folder says. Warns for a folder that
    `save` wrote in format version 1, which has no digest.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "formats.unet_finetune.load: no folder", os.fspath(path))
    spec, scale, header = _described(folder, spec)
    if spec.form != "dense":
        raise ValueError(f"formats.unet_finetune.load: the layout holds the form 'dense'; got {spec.form!r}")
    end = _end(spec)
    blocks = _blocks(folder, end)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, tuple[int, int]] = {}
    sized: Bottleneck | None = None
    for block in blocks:
        found = _read(folder, block, end)
        sized = sized or _with_width(folder, spec, found["down_bias"].numel())
        modules[block.diffusers] = _sizes(folder / f"{block.ldm}{end}", found, sized, KEYS[end])
        tensors |= {f"{block.diffusers}.{name}": each for name, each in found.items()}
    assert sized is not None
    if header is not None:
        check_digest(folder / HEADER, header, tensors)
    return AdapterFile(sized, modules, scale, tensors)


def _with_width(folder: Path, spec: Bottleneck, width: int) -> Bottleneck:
    try:
        return replace(spec, width=width, budget=None)
    except ValueError as error:
        raise ValueError(f"formats.unet_finetune.load: {folder}: {error}") from error


def _end(spec: Bottleneck) -> str:
    return RESBLOCK if spec.block == RESNET else TRANSFORMER


def _parse(name: str) -> tuple[UNetBlock, str] | None:
    """The block and the end of an adapter file's name, None for another file."""
    for end in KEYS:
        block = from_ldm(name.removesuffix(end)) if name.endswith(end) else None
        if block is not None and (block.layer is None) == (end == RESBLOCK):
            return block, end
    return None


def _check_replaceable(target: Path) -> None:
    """Nothing but an older folder of this layout is replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is there, not a folder", str(target))
    for name in sorted(os.listdir(target)):
        if name != HEADER and _parse(name) is None:
            raise FileExistsError(
                errno.EEXIST, f"formats.save: the folder holds {name}, which is no adapter's", str(target)
            )


def _described(folder: Path, spec: Bottleneck | None) -> tuple[Bottleneck, float, Mapping[str, Any] | None]:
    """Return the spec that is asked for, or the folder's own, with its description; both must agree."""
    path = folder / HEADER
    if spec is not None and not isinstance(spec, Bottleneck):
        raise TypeError(
            f"formats.unet_finetune.load: spec must be a Bottleneck or None; got {type(spec).__name__}"
        )
    if not path.exists():
        if spec is None:
            raise ValueError(
                f"formats.load: {folder} does not say where its adapters read and write, nor their activation and"
                " scale: call formats.unet_finetune.load(path, Bottleneck(source=..., sink=..., activation=...,"
                " scale=...)) with what they were trained with"
            )
        return spec, 1.0, None
    header = parse_header(path, read_small("formats.unet_finetune.load", path))
    with damaged(path):
        saved, scale = spec_and_scale(header)
        if not isinstance(saved, Bottleneck):
            raise ValueError(f"spec must be a Bottleneck; got {saved}")
    if spec is None:
        return saved, scale, header
    for field in ("source", "sink", "activation", "scale"):
        asked, found = getattr(spec, field), getattr(saved, field)
        if asked != found:
            raise ValueError(
                f"formats.unet_finetune.load: {path} says {field}={found!r}; the spec says {field}={asked!r}"
            )
    return spec, scale, header


def _blocks(folder: Path, end: str) -> list[UNetBlock]:
    """The blocks whose adapters the folder holds: all of a U-Net's."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".pt"))
    if not names:
        raise ValueError(f"formats.unet_finetune.load: {folder} holds no .pt file")
    known = {TRANSFORMER: (TRANSFORMER, CHILD), RESBLOCK: (RESBLOCK,)}[end]
    found: set[UNetBlock] = set()
    for name in names:
        parsed = _parse(name)
        if parsed is None or parsed[1] not in known:
            raise ValueError(
                f"formats.unet_finetune.load: {folder} holds {name}, which is no adapter of a"
                f" {'ResBlock' if end == RESBLOCK else 'transformer block'}, as the spec says: files are named"
                f" <path in the LDM U-Net>{end}"
            )
        if parsed[1] == end:
            found.add(parsed[0])
        elif f"{parsed[0].ldm}{end}" not in names:
            raise ValueError(
                f"formats.unet_finetune.load: {folder} holds {name} but not {parsed[0].ldm}{end}"
            )
    missing = absent(found)
    if missing:
        raise ValueError(
            f"formats.unet_finetune.load: {folder} must hold an adapter for every block of a U-Net with two"
            f" ResBlocks a down level; {len(missing)} are missing, the first {missing[0].ldm}{end}"
        )
    return sorted(found, key=lambda block: block.order)


def _read(folder: Path, block: UNetBlock, end: str) -> dict[str, Tensor]:
    """The tensors of one block by our names."""
    path = folder / f"{block.ldm}{end}"
    tensors = _named(path, end)
    child = folder / f"{block.ldm}{CHILD}"
    if end == TRANSFORMER and child.exists():
        for name, each in _named(child, CHILD).items():
            if each.dtype != tensors[name].dtype or not torch.equal(each, tensors[name]):
                raise ValueError(
                    f"formats.unet_finetune.load: {child} must repeat {path.name}; {MAPS[name]} differs"
                )
    return tensors


def _named(path: Path, end: str) -> dict[str, Tensor]:
    ours = KEYS[end]
    found = load_tensors("formats.unet_finetune.load", path)
    if set(found) != set(ours.values()):
        raise ValueError(
            f"formats.unet_finetune.load: {path} must hold {', '.join(ours.values())}; got"
            f" {', '.join(sorted(found)) or 'nothing'}"
        )
    try:
        check_values(f"formats.unet_finetune.load: {path}", found)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return {name: found[key] for name, key in ours.items()}


def _sizes(
    path: Path, found: Mapping[str, Tensor], spec: Bottleneck, keys: Mapping[str, str]
) -> tuple[int, int]:
    """(N, K) of one adapter, whose tensors fit each other and the spec's width."""
    for name in ("down", "up"):
        if found[name].ndim < 2:
            raise ValueError(
                f"formats.unet_finetune.load: {path}: {keys[name]} must have two dimensions or four; got"
                f" {tuple(found[name].shape)}"
            )
    k = found["down"].shape[1]
    n = found["up"].shape[0] if (spec.source, spec.sink) == ("res_in", "res_out") else k
    for name, size in spec.layout(n, k).sizes.items():
        if tuple(found[name].shape) != size:
            raise ValueError(
                f"formats.unet_finetune.load: {path}: {keys[name]} must be {size}, with width H = {spec.width} and"
                f" (N, K) = ({n}, {k}); got {tuple(found[name].shape)}"
            )
    return n, k
