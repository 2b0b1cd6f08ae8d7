"""`attach`: adapters on a model, and the handle that trains, scales, merges, saves and removes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from .. import planner
from ..formats.adapter_file import AdapterFile
from ..nn.factors import KronFactors
from ..nn.fields import number
from ..nn.kron import KronLinear
from ..nn.sharding import gathered, sharded_like
from ..nn.specs import AdapterSpec
from .checks import check_file_modules, check_model, check_places, check_tensors, make_layouts
from .host import Host
from .report import LayerReport, Report
from .sites import Place, linear_places, listed, resolve_targets, select, unmatched_blocks


def attach(model: nn.Module, spec: AdapterSpec | AdapterFile, *, allow_partial: bool = False) -> Attachment:
    """Put adapters on a model's linear layers; the outputs stay as they are until the adapters are trained.

    model:         a diffusers U-Net or transformer, a transformers CLIP text encoder, or any module with
                   Linears
    spec:          KronA, LoKr or LoRA; or what `formats.load` returned, which brings its own factors and
                   scale
    allow_partial: accept attention blocks that no target matches; they are listed in the report either way

    The adapters' parameters alone require gradients: the model's own are frozen, and `remove()` gives each
    back the `requires_grad` it had. Attention processors of known classes evaluate q, k and v from one read
    of x, and diffusers' `fuse_qkv_projections()`, which would drop the deltas, raises until the adapters are
    removed. A second call stacks another adapter. Call it before DistributedDataParallel or fully_shard wrap
    the model.

    `copy.deepcopy(attachment)` copies the model together with its handle, as for a moving average of the
    weights: the copy's `.model` is the new one. A copy of the model alone computes the same, and no handle
    takes its adapters off.

    Raises ValueError for targets that do not exist, factors that do not divide a layer, attention blocks that
    no target matches, and a file of another model; TypeError for a spec that is none. The model is then
    unchanged.
    """
    if not isinstance(spec, (AdapterSpec, AdapterFile)):
        raise TypeError(
            f"attach: spec must be KronA, LoKr, LoRA or a loaded adapter file; got {type(spec).__name__}"
        )
    model = getattr(model, "_orig_mod", model)
    check_model(model)
    if isinstance(spec, AdapterFile):
        all_places = linear_places(model)
        check_file_modules(type(model).__name__, all_places, spec)
        places, adapter = [all_places[name] for name in spec.modules], spec.spec
        targets = tuple(spec.modules)
        unmatched = unmatched_blocks(model, targets)
    else:
        targets = resolve_targets(model, spec.targets)
        places, adapter = select(model, targets), spec
        unmatched = unmatched_blocks(model, targets)
        if unmatched and not allow_partial:
            raise ValueError(
                f"attach: no target of {', '.join(targets)} matches {len(unmatched)} attention blocks of"
                f" {type(model).__name__}: "
                + listed([f"{name} (has {', '.join(layers)})" for name, layers in unmatched.items()], 4)
                + ". Add targets for them, or pass allow_partial=True to leave them without adapters."
            )
    check_places(model, places)
    layouts = make_layouts(adapter, places)
    if isinstance(spec, AdapterFile):
        check_tensors("attach", {name: layout.sizes for name, layout in layouts.items()}, spec.tensors)
    host = Host.of(model)
    host.users += 1
    attachment = Attachment(model, adapter, host, unmatched)
    try:
        for place in places:
            attachment._add(place, host.wrap(place).add(layouts[place.name]))
        host.share_inputs(model)
        if isinstance(spec, AdapterFile):
            attachment.load_state_dict(spec.tensors)
            attachment.scale = spec.scale
    except BaseException:
        attachment.remove()
        raise
    return attachment


class Attachment:
    """One adapter on one model; as a context manager, removed at the end of the block.

    spec: what was attached
    """

    def __init__(
        self, model: nn.Module, spec: AdapterSpec, host: Host, unmatched: dict[str, list[str]]
    ) -> None:
        self.model = model
        self.spec = spec
        self._host: Host | None = host
        self._unmatched = unmatched
        self._factors: dict[str, KronFactors] = {}
        self._layers: dict[str, KronLinear] = {}
        self._scale = 1.0

    def _add(self, place: Place, factors: KronFactors) -> None:
        assert self._host is not None
        self._factors[place.name] = factors
        self._layers[place.name] = self._host.layers[place.name][0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(module name + "." + factor name, factor) of every trained factor, in the model's order."""
        for name, factors in self._factors.items():
            for factor_name, factor in factors.named_parameters():
                yield f"{name}.{factor_name}", factor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained factor, for an optimizer."""
        for _, factor in self.named_parameters():
            yield factor

    def state_dict(self) -> dict[str, Tensor]:
        """Every factor by name, sharing memory with the parameters.

        Factors that fully_shard has distributed are gathered: call it on every process, and write its file
        on one.
        """
        return {name: gathered(factor.detach()) for name, factor in self.named_parameters()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy factors into place, without a recompile of a compiled model.

        Where fully_shard has distributed the factors, call it on every process with the same tensors. Raises
        ValueError for missing, unknown or mismatched tensors and for NaN and infinity, TypeError for tensors
        that are not floating, RuntimeError while a delta is merged; all before anything is copied.
        """
        self._unmerged("load_state_dict")
        sizes = {name: factors.layout.sizes for name, factors in self._factors.items()}
        whole = {
            name: gathered(each) if isinstance(each, Tensor) else each for name, each in state_dict.items()
        }
        check_tensors("load_state_dict", sizes, whole)
        with torch.no_grad():
            for name, factor in self.named_parameters():
                factor.copy_(sharded_like(factor, whole[name]))

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Module name -> (N, K) of every adapted layer."""
        return {name: (each.out_features, each.in_features) for name, each in self._layers.items()}

    @property
    def scale(self) -> float:
        """Multiplies every delta on top of the spec's scales; 1.0 at first. Setting it never recompiles.

        Setting raises TypeError for what is no number, ValueError for NaN and infinity, RuntimeError while a
        delta is merged.
        """
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._live("scale")
        self._unmerged("scale")
        strength = number("Attachment", "scale", value)
        for factors in self._factors.values():
            factors.set_strength(strength)
        self._scale = strength

    def merge(self, keep: bool = True) -> None:
        """Fold every delta into its layer's weight.

        keep: hold on to the original weights, so that `unmerge` gives back the same Parameters with the same
              bits. False frees them: `unmerge` then raises, and `remove` leaves the merged weights in the
              model.

        Raises RuntimeError, with nothing merged, where a base is no plain Linear (quantised, hooked,
        sharded).
        """
        self._live("merge")
        done: list[str] = []
        try:
            for name, layer in self._layers.items():
                if not self._is_merged(name):
                    layer.merge(self._factors[name], name=name)
                    done.append(name)
        except BaseException:
            for name in done:
                self._layers[name].unmerge(self._factors[name], name=name)
            raise
        if not keep:
            for name, layer in self._layers.items():
                layer.merge(self._factors[name], keep=False, name=name)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit. Raises RuntimeError after merge(keep=False)."""
        self._live("unmerge")
        for name, layer in self._layers.items():
            layer.unmerge(self._factors[name], name=name)

    def remove(self) -> None:
        """Leave the model as it was before: the same modules, processors and requires_grad.

        The factors stay readable and can still be saved. Raises RuntimeError, with nothing changed, where
        another library has since replaced an adapted layer. What merge(keep=False) folded in stays.
        """
        if self._host is None:
            return
        displaced = [name for name in self._host.displaced() if name in self._layers]
        if displaced:
            raise RuntimeError(
                f"remove: {listed(displaced)}: the adapted layer has been replaced in the model since attach;"
                " put it back first"
            )
        for name, layer in self._layers.items():
            if not layer.is_final(self._factors[name]):
                layer.unmerge(self._factors[name], name=name)
        for name, factors in self._factors.items():
            self._host.unwrap(name, factors)
        self._host.leave(self.model)
        self._host = None

    @property
    def report(self) -> Report:
        """What is adapted, how it runs and what is not; `print(attachment.report)` gives it as a table."""
        host = self._live("report")
        layers = tuple(self._layer_report(name, layer) for name, layer in self._layers.items())
        sharing = () if host.processors is None else tuple(host.processors.exchanged)
        unshared = {} if host.processors is None else dict(host.processors.left)
        return Report(type(self.model).__name__, layers, dict(self._unmatched), sharing, unshared)

    def adapter_file(self) -> AdapterFile:
        """What `formats.save` writes: the spec, the layers with their sizes, the scale, and the factors."""
        return AdapterFile(self.spec, self.modules, self._scale, self.state_dict())

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        count = sum(factors.layout.parameters for factors in self._factors.values())
        state = "" if self._host is not None else ", removed"
        size = f"{len(self._factors)} layers, {count:,} parameters"
        return f"Attachment({self.spec!r} on {type(self.model).__name__}, {size}{state})"

    def _is_merged(self, name: str) -> bool:
        return self._layers[name].is_merged(self._factors[name])

    def _layer_report(self, name: str, layer: KronLinear) -> LayerReport:
        layout = self._factors[name].layout
        return LayerReport(
            name,
            layer.out_features,
            layer.in_features,
            str(layout),
            layout.parameters,
            planner.choose(layout.shape).order,
            layer.unfused,
            self._is_merged(name),
        )

    def _unmerged(self, what: str) -> None:
        merged = [name for name in self._factors if self._is_merged(name)]
        if merged:
            raise RuntimeError(f"{what}: {len(merged)} layers are merged; unmerge() first")

    def _live(self, what: str) -> Host:
        if self._host is None:
            raise RuntimeError(f"{what}: the attachment has been removed from its model")
        return self._host
