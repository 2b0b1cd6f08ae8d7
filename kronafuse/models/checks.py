"""What `attach` refuses, before it changes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..checks import check_tensor
from ..formats.adapter_file import AdapterFile
from ..formats.tensors import check_values
from ..nn.kron import KronLinear
from ..nn.layout import Layout
from ..nn.specs import AdapterSpec
from .host import Host
from .sites import Place, attention_blocks, leaf, listed
from .unadapted import HOST

FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""diffusers' fused projections, and those that are not called any more once it has made them."""

READ_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that hand their layers' weights to a kernel of torch's own, past any adapter inside."""


def check_model(model: nn.Module) -> None:
    """Raises TypeError for what is no module, ValueError for a model already wrapped for many processes."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"attach: model must be a torch.nn.Module, of a pipeline its unet or transformer;"
            f" got {type(model).__name__}"
        )
    wrapped = [
        type(each).__name__
        for each in model.modules()
        if type(each).__name__.startswith(("FSDP", "FullyShardedData"))
    ]
    if isinstance(model, nn.parallel.DistributedDataParallel) or wrapped:
        raise ValueError(
            f"attach: the model is already wrapped by {(wrapped or [type(model).__name__])[0]}, which"
            " would not see the new parameters; attach first, then wrap"
        )


def check_places(model: nn.Module, places: Sequence[Place]) -> None:
    """Raises ValueError for layers where an adapter would not count, or would belong to two models.

    Those are adapted layers of another root, layers whose parent reads the weight without calling them, and
    projections that a fused one has replaced.
    """
    host: Host | None = model.__dict__.get(HOST)
    owned = {} if host is None else host.layers
    foreign = [
        place.name for place in places if isinstance(place.module, KronLinear) and place.name not in owned
    ]
    if foreign:
        raise ValueError(
            f"attach: {listed(foreign)} already carry adapters that were not attached to this"
            f" {type(model).__name__} object; attach to the same model object as before"
        )
    adapted = {id(place.module) for place in places}
    passed_over = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, READ_DIRECTLY) and any(id(each) in adapted for each in module.modules())
    ]
    if passed_over:
        raise ValueError(
            "attach: these modules hand their layers' weights to a kernel of torch's own, which would pass"
            f" over an adapter: {listed(passed_over)}. Choose targets outside of them."
        )
    names = {place.name for place in places}
    for name, block in attention_blocks(model).items():
        dropped = [
            f"{name}.{projection}"
            for fused, projections in FUSED_PROJECTIONS.items()
            if _uses_fused(block) and isinstance(getattr(block, fused, None), nn.Module)
            for projection in projections
            if f"{name}.{projection}" in names
        ]
        if dropped:
            raise ValueError(
                f"attach: {listed(dropped)} are replaced by a fused projection and would not be called; call"
                " unfuse_qkv_projections() first, or target the fused layers"
            )


def _uses_fused(block: nn.Module) -> bool:
    """Whether diffusers calls the fused projections: older classes by their processor, newer ones by a flag."""
    if hasattr(block, "unfuse_projections"):
        return bool(getattr(block, "fused_projections", False))
    return type(getattr(block, "processor", None)).__name__.startswith("Fused")


def make_layouts(spec: AdapterSpec, places: Sequence[Place]) -> dict[str, Layout]:
    """The factors of every layer. Raises ValueError listing the layers that the spec's do not divide."""
    unused = [
        suffix
        for suffix in spec.per_target or {}
        if not any(place.name == suffix or place.name.endswith("." + suffix) for place in places)
    ]
    if unused:
        raise ValueError(
            f"attach: per_target names {listed(unused)}, which end none of the {len(places)} targeted layers'"
            f" names; those end in {', '.join(dict.fromkeys(leaf(place.name) for place in places))}"
        )
    layouts: dict[str, Layout] = {}
    refused: dict[tuple[int, int], tuple[str, list[str]]] = {}
    for place in places:
        size = size_of(place.module)
        try:
            layouts[place.name] = spec.at(place.name).layout(*size, place.name)
        except ValueError as error:
            refused.setdefault(size, (str(error), []))[1].append(place.name)
    if refused:
        texts = [
            text + (f" Likewise {len(names) - 1} more layers of this size." if len(names) > 1 else "")
            for text, names in refused.values()
        ]
        raise ValueError("attach: " + "\n".join(texts))
    return layouts


def check_file_modules(
    model_name: str, kind: str, sizes: Mapping[str, tuple[int, int]], file: AdapterFile
) -> None:
    """Raises ValueError where the file's layers or blocks are not in the model, or have other sizes there.

    kind:  "layers" or "blocks"
    sizes: name -> (N, K) of those in the model
    """
    missing = [name for name in file.modules if name not in sizes]
    other = [
        f"{name} is {size} in the file, {sizes[name]} in the model"
        for name, size in file.modules.items()
        if name in sizes and sizes[name] != size
    ]
    if missing or other:
        parts = [f"{len(missing)} of its {kind} are missing: {listed(missing)}"] if missing else []
        parts += [f"{len(other)} have another (N, K): {listed(other, 4)}"] if other else []
        raise ValueError(f"attach: the file is for another model than this {model_name}: " + "; ".join(parts))


def check_tensors(
    op: str, sizes: Mapping[str, Mapping[str, tuple[int, ...]]], tensors: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for missing, unknown or mismatched tensors, listing them, and for NaN and infinity.

    Raises TypeError for what are no floating tensors.
    """
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
    expected = {
        f"{name}.{factor}": size for name, factors in sizes.items() for factor, size in factors.items()
    }
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    other = [
        f"{name} is {tuple(tensors[name].shape)}, expected {size}"
        for name, size in expected.items()
        if name in tensors and tuple(tensors[name].shape) != size
    ]
    parts = [
        f"{len(found)} {what}: {listed(found, 4)}"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", other))
        if found
    ]
    if parts:
        raise ValueError(f"{op}: factors do not fit this attachment: " + "; ".join(parts))
    check_values(op, tensors)


def size_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer."""
    return int(module.out_features), int(module.in_features)  # pyright: ignore[reportArgumentType]
