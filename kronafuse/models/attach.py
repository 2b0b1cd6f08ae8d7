"""`attach`: adapters on a model."""

from __future__ import annotations

from torch import nn

from ..formats.adapter_file import AdapterFile
from ..nn.bottleneck_spec import Bottleneck
from ..nn.specs import AdapterSpec
from ..nn.trained import TrainedTensors
from .attachment import Attachment
from .blocks import select_blocks
from .bottleneck_attachment import BottleneckAttachment
from .checks import check_file_modules, check_model, check_places, check_tensors, make_layouts, size_of
from .host import Host
from .linear_attachment import LinearAttachment
from .sites import linear_places, listed, resolve_targets, select, unmatched_blocks

__all__ = ["Attachment", "attach"]


def attach(
    model: nn.Module, spec: AdapterSpec | Bottleneck | AdapterFile, *, allow_partial: bool = False
) -> Attachment:
    """Put adapters on a model; its outputs stay as they are until the adapters are trained.

    model:         a diffusers U-Net or transformer, a transformers CLIP text encoder, or any module with
                   Linears; for a Bottleneck, a diffusers model with BasicTransformerBlocks or ResnetBlock2Ds
    spec:          KronA, LoKr or LoRA on linear layers, or Bottleneck in whole blocks; or what `formats.load`
                   returned, which brings its own tensors and scale
    allow_partial: accept attention blocks that get no adapter; they are listed in the report either way

    The adapters' parameters alone require gradients: the model's own are frozen, and `remove()` gives each
    back the `requires_grad` it had. Attention blocks whose processor is of a known class evaluate q, k and v
    from one read of x, and diffusers' `fuse_qkv_projections()`, which would drop the deltas of linear layers,
    raises until they are removed. A second call stacks another adapter. Call it before DistributedDataParallel
    or fully_shard wrap the model. With Bottleneck(init="paper") the outputs change at once, as in the paper.

    The model's `save_pretrained`, a pipeline's and `push_to_hub` write the model as it would be without
    adapters, and each adapter that is not merged into a file of its own in the same folder:
    `kronafuse_adapter.safetensors`, then `kronafuse_adapter_2.safetensors` and so on. The model's `state_dict`
    has the adapters in it: a layer `to_q` has the keys `to_q.base.weight` and `to_q.adapters.0.lokr_a`. PEFT
    adapters can be added and unloaded before or after, through the methods of diffusers and transformers; they
    sit below these adapters, which then add their delta to the output of PEFT's layer.

    `copy.deepcopy(attachment)` copies the model together with its handle, as for a moving average of the
    weights: the copy's `.model` is the new one. A copy of the model alone computes the same, and no handle
    takes its adapters off.

    Raises ValueError for targets and positions that do not exist, factors that do not divide a layer, a budget
    that no width meets, attention blocks that get no adapter, and a file of another model; TypeError for a
    spec that is none. The model is then unchanged.
    """
    inner = spec.spec if isinstance(spec, AdapterFile) else spec
    if not isinstance(inner, (AdapterSpec, Bottleneck)):
        raise TypeError(
            "attach: spec must be KronA, LoKr, LoRA, Bottleneck or a loaded adapter file; got"
            f" {type(inner).__name__}"
        )
    model = getattr(model, "_orig_mod", model)
    check_model(model)
    file = spec if isinstance(spec, AdapterFile) else None
    if isinstance(inner, Bottleneck):
        return _attach_bottlenecks(model, inner, file, allow_partial)
    return _attach_linear(model, inner, file, allow_partial)


def _attach_linear(
    model: nn.Module, spec: AdapterSpec, file: AdapterFile | None, allow_partial: bool
) -> LinearAttachment:
    if file is not None:
        all_places = linear_places(model)
        check_file_modules(
            type(model).__name__,
            "layers",
            {name: size_of(all_places[name].module) for name in file.modules if name in all_places},
            file,
        )
        places = [all_places[name] for name in file.modules]
        unmatched = unmatched_blocks(model, tuple(file.modules))
    else:
        targets = resolve_targets(model, spec.targets)
        places = select(model, targets)
        unmatched = unmatched_blocks(model, targets)
        if unmatched and not allow_partial:
            raise ValueError(
                f"attach: no target of {', '.join(targets)} matches {len(unmatched)} attention blocks of"
                f" {type(model).__name__}: "
                + listed([f"{name} (has {', '.join(layers)})" for name, layers in unmatched.items()], 4)
                + ". Add targets for them, or pass allow_partial=True to leave them without adapters."
            )
    check_places(model, places)
    layouts = make_layouts(spec, places)
    if file is not None:
        check_tensors("attach", {name: layout.sizes for name, layout in layouts.items()}, file.tensors)
    host = Host.of(model)
    attachment = LinearAttachment(model, spec, host, unmatched)
    host.join(attachment)
    try:
        host.refuse_fusing(model)
        for place in places:
            attachment.add(place, host.wrap(place).add(layouts[place.name]))
        host.share_inputs(model)
        _fill(attachment, file)
    except BaseException:
        attachment.remove()
        raise
    return attachment


def _attach_bottlenecks(
    model: nn.Module, spec: Bottleneck, file: AdapterFile | None, allow_partial: bool
) -> BottleneckAttachment:
    blocks, unmatched = select_blocks(model, spec, allow_partial=allow_partial or file is not None)
    if file is not None:
        sizes = {block.name: block.size for block in blocks}
        check_file_modules(type(model).__name__, "blocks", sizes, file)
        unmatched |= {block.name: ["not in the file"] for block in blocks if block.name not in file.modules}
        blocks = [block for block in blocks if block.name in file.modules]
    spec = spec.within(_own_parameters(model), {block.name: block.size for block in blocks})
    layouts = {block.name: spec.layout(*block.size, block.name) for block in blocks}
    if file is not None:
        check_tensors("attach", {name: layout.sizes for name, layout in layouts.items()}, file.tensors)
    host = Host.of(model)
    attachment = BottleneckAttachment(model, spec, host, unmatched)
    host.join(attachment)
    try:
        for block in blocks:
            attachment.add(block)
        _fill(attachment, file)
    except BaseException:
        attachment.remove()
        raise
    return attachment


def _fill(attachment: Attachment, file: AdapterFile | None) -> None:
    if file is not None:
        attachment.load_state_dict(file.tensors)
        attachment.scale = file.scale


def _own_parameters(model: nn.Module) -> int:
    """The model's parameters without those of adapters."""
    trained = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TrainedTensors)
        for parameter in module.parameters()
    }
    return sum(each.numel() for each in model.parameters() if id(each) not in trained)
