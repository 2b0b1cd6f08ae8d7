"""The handle of a Kronecker or low-rank adapter on linear layers."""

from __future__ import annotations

from typing import cast

from torch import nn

from .. import planner
from ..nn.factors import KronFactors
from ..nn.kron import KronLinear
from ..nn.specs import AdapterSpec
from .attachment import Attachment
from .host import Host
from .report import LayerReport, Report
from .sites import Place, listed, unadapted_projections


class LinearAttachment(Attachment):
    """Deltas on linear layers: fused with the base where that is safe, and mergeable into its weight."""

    def __init__(
        self, model: nn.Module, spec: AdapterSpec, host: Host, unmatched: dict[str, list[str]]
    ) -> None:
        super().__init__(model, spec, host, unmatched)
        self._layers: dict[str, KronLinear] = {}

    def add(self, place: Place, factors: KronFactors) -> None:
        """Take the factors on one layer into the handle."""
        assert self._host is not None
        self._trained[place.name] = factors
        self._layers[place.name] = self._host.layers[place.name][0]

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Module name -> (N, K) of every adapted layer."""
        return {name: (each.out_features, each.in_features) for name, each in self._layers.items()}

    def merge(self, keep: bool = True) -> None:
        """Fold every delta into its layer's weight; see `Attachment.merge`."""
        self._live("merge")
        done: list[str] = []
        try:
            for name, layer in self._layers.items():
                if not self._is_merged(name):
                    layer.merge(self._factors(name), name=name)
                    done.append(name)
        except BaseException:
            for name in done:
                self._layers[name].unmerge(self._factors(name), name=name)
            raise
        if not keep:
            for name, layer in self._layers.items():
                layer.merge(self._factors(name), keep=False, name=name)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit; see `Attachment.unmerge`."""
        self._live("unmerge")
        for name, layer in self._layers.items():
            layer.unmerge(self._factors(name), name=name)

    def remove(self) -> None:
        """Leave the model as it was before; see `Attachment.remove`."""
        if self._host is None:
            return
        displaced = [name for name in self._host.displaced() if name in self._layers]
        if displaced:
            raise RuntimeError(
                f"remove: {listed(displaced)}: the adapted layer has been replaced in the model since attach;"
                " put it back first"
            )
        for name, layer in self._layers.items():
            if not layer.is_final(self._factors(name)):
                layer.unmerge(self._factors(name), name=name)
        for name in self._trained:
            self._host.unwrap(name, self._factors(name))
        self._host.leave(self)
        self._host = None

    @property
    def report(self) -> Report:
        """What is adapted, how it runs and what is not."""
        host = self._live("report")
        layers = tuple(self._layer_report(name, layer) for name, layer in self._layers.items())
        sharing, unshared = host.sharing(self.model)
        return Report(
            type(self.model).__name__,
            layers,
            dict(self._unmatched),
            sharing,
            unshared,
            unadapted_projections(self.model, self._layers),
            self._recast(),
        )

    def _factors(self, name: str) -> KronFactors:
        return cast(KronFactors, self._trained[name])

    def _is_merged(self, name: str) -> bool:
        return self._layers[name].is_merged(self._factors(name))

    def _layer_report(self, name: str, layer: KronLinear) -> LayerReport:
        layout = self._factors(name).layout
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
        merged = [name for name in self._trained if self._is_merged(name)]
        if merged:
            raise RuntimeError(f"{what}: {len(merged)} layers are merged; unmerge() first")
