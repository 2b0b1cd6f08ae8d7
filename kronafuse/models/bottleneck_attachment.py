"""The handle of a bottleneck adapter in a model's blocks."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from ..nn.bottleneck import BottleneckAdapter
from ..nn.bottleneck_spec import Bottleneck
from ..nn.fusing import has_hooks
from .attachment import Attachment
from .blocks import Block
from .host import Host
from .report import BlockReport, BottleneckReport
from .taps import put_on, take_off


class BottleneckAttachment(Attachment):
    """Bottleneck adapters between two positions of every block; nothing in them is a change of a weight."""

    spec: Bottleneck
    _places = "blocks"

    def __init__(
        self, model: nn.Module, spec: Bottleneck, host: Host, unmatched: dict[str, list[str]]
    ) -> None:
        super().__init__(model, spec, host, unmatched)
        self._blocks: dict[str, Block] = {}

    def add(self, block: Block) -> None:
        """A new adapter in one block, on the block's device."""
        tensors = (*block.module.parameters(), *block.module.buffers())
        if any(each.is_meta for each in tensors) and any(has_hooks(each) for each in block.module.modules()):
            raise ValueError(
                f"attach: the weights of {block.name} are offloaded (on meta, with hooks that bring them back at a"
                " call); attach adapters first, then offload"
            )
        layout = self.spec.layout(*block.size, block.name)
        adapter = BottleneckAdapter(layout, device=tensors[0].device if tensors else None)
        self._trained[block.name] = adapter
        self._blocks[block.name] = block
        put_on(block.module, self.spec, adapter)

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Block name -> (N, K) of every adapter."""
        return {name: block.size for name, block in self._blocks.items()}

    def merge(self, keep: bool = True) -> NoReturn:
        """Raises RuntimeError: an activation stands between the two maps, or a whole branch beside them."""
        self._live("merge")
        raise RuntimeError(
            "merge: a Bottleneck is not the change of any weight and cannot be merged; it runs beside the model"
            " until remove()"
        )

    def unmerge(self) -> NoReturn:
        """Raises RuntimeError, as `merge` does."""
        self._live("unmerge")
        raise RuntimeError("unmerge: a Bottleneck is never merged")

    def remove(self) -> None:
        """Leave the model as it was before: no hooks, no modules, the same requires_grad."""
        if self._host is None:
            return
        for name, adapter in self._trained.items():
            assert isinstance(adapter, BottleneckAdapter)
            take_off(self._blocks[name].module, adapter)
        self._host.leave(self)
        self._host = None

    @property
    def report(self) -> BottleneckReport:
        """Which blocks are adapted, where, how large the adapters are, and what has none."""
        self._live("report")
        blocks = tuple(
            BlockReport(name, str(trained.layout), trained.layout.parameters)
            for name, trained in self._trained.items()
        )
        own = {id(parameter) for parameter in self.parameters()}
        model = sum(each.numel() for each in self.model.parameters() if id(each) not in own)
        spec = self.spec
        size = (
            f"width {spec.width}" if spec.factors is None else f"factors {spec.factors[0]}x{spec.factors[1]}"
        )
        return BottleneckReport(
            type(self.model).__name__,
            spec.source,
            spec.sink,
            size,
            blocks,
            dict(self._unmatched),
            model,
            self._recast(),
        )

    def _unmerged(self, what: str) -> None:
        """Nothing is ever merged."""
