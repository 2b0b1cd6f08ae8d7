"""A frozen linear layer with Kronecker adapters on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_dtype, check_tensor
from ..ops.calls import compute_dtype
from ..ops.kron_linear.op import kron_linear_group
from ..ops.kron_linear.terms import FrozenLinear, KronTerm
from .factors import KronFactors
from .fusing import has_global_hooks, has_hooks, input_reason, module_reason
from .layout import Layout
from .merging import MergedWeight
from .specs import AdapterSpec


class KronLinear(nn.Module):
    """y = base(x) + Σ scale · x (A ⊗ B)ᵀ over the layer's adapters.

    base: nn.Linear (K -> N), or another layer with `in_features` and `out_features` that acts like one
    spec: the first adapter, KronA, LoKr or LoRA; None for none yet

    The product with the base's weight and the adapters run in one operator where a call of `base` is a plain
    F.linear (`nn/fusing.py`); elsewhere base(x) is computed and the delta added. `unfused` says why, or is
    None. `base` is a submodule, so a state_dict names its tensors `base.weight` and `base.bias`; one that was
    written without adapters, as `weight` and `bias`, is loaded too. `weight` and `bias` of this module are its
    own. The name is not PEFT's `base_layer`, by which diffusers finds the layers that `unload_lora` replaces.
    """

    def __init__(self, base: nn.Module, spec: AdapterSpec | None = None) -> None:
        super().__init__()
        for size in ("in_features", "out_features"):
            if not isinstance(getattr(base, size, None), int):
                raise TypeError(
                    f"KronLinear: base must have in_features and out_features; {type(base).__name__} has not"
                )
        self.base = base
        self.adapters = nn.ModuleDict()
        self._merging = MergedWeight()
        self._input_reason: str | None = None
        if spec is not None:
            self.add(spec.layout(self.out_features, self.in_features))

    @property
    def in_features(self) -> int:
        """K"""
        return int(self.base.in_features)  # pyright: ignore[reportArgumentType]

    @property
    def out_features(self) -> int:
        """N"""
        return int(self.base.out_features)  # pyright: ignore[reportArgumentType]

    @property
    def weight(self) -> Tensor:
        """(N, K), the base's."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """(N,), the base's."""
        return self.base.bias  # pyright: ignore[reportReturnType]

    @property
    def unfused(self) -> str | None:
        """Why the base is called and not read by the kernel, for the last input too; None if it is read."""
        return module_reason(self.base) or self._input_reason

    def add(self, layout: Layout) -> KronFactors:
        """Stack one more adapter, on the base's device; its factors start at a delta of 0."""
        shape = layout.shape
        if (shape.n, shape.k) != (self.out_features, self.in_features):
            raise ValueError(
                f"KronLinear: factors {layout} make ({shape.n}, {shape.k});"
                f" the layer's (N, K) is ({self.out_features}, {self.in_features})"
            )
        tensors = (*self.base.parameters(), *self.base.buffers())
        if tensors and tensors[0].is_meta and has_hooks(self.base):
            raise ValueError(
                "KronLinear: the base's weight is offloaded (on meta, with hooks that bring it back at a call);"
                " add adapters first, then offload"
            )
        factors = KronFactors(layout, device=tensors[0].device if tensors else None)
        names = [int(name) for name in self.adapters]
        self.adapters[str(max(names, default=-1) + 1)] = factors
        return factors

    def discard(self, factors: KronFactors) -> None:
        """Take one adapter off the layer if it is there; what was merged with keep=False stays in the weight."""
        self._merging.drop(factors)
        for name in [name for name, each in self.adapters.items() if each is factors]:
            del self.adapters[name]

    def merge(self, factors: KronFactors, *, keep: bool = True, name: str = "the layer") -> None:
        """Replace the base's weight by weight + delta.

        `keep` holds on to the original Parameter for `unmerge`; without it every delta now in the weight of
        this layer, of other adapters too, stays there for good. Raises RuntimeError where the base is no
        plain Linear.
        """
        if factors not in self._merging:
            self._merging.add(name, self.base, factors)
            factors.forbid_repeats("merge: the adapter was folded into its layer's weight")
        if not keep:
            self._merging.forget()

    def unmerge(self, factors: KronFactors, *, name: str = "the layer") -> None:
        """Undo `merge`: the last one to go puts back the original Parameter, the same object and bits."""
        if factors in self._merging:
            self._merging.take_out(name, self.base, factors)
            factors.forbid_repeats("unmerge: the adapter was taken out of its layer's weight")

    def is_merged(self, factors: KronFactors) -> bool:
        """Whether this adapter's delta is in the weight now."""
        return factors in self._merging

    def is_final(self, factors: KronFactors) -> bool:
        """Whether this adapter's delta is in the weight for good."""
        return any(each is factors for each in self._merging.final)

    def active(self) -> list[KronFactors]:
        """The adapters whose deltas a call adds: those that are not merged."""
        adapters: list[KronFactors] = list(self.adapters.values())  # pyright: ignore[reportAssignmentType]
        merging = self._merging
        return [each for each in adapters if each not in merging] if merging else adapters

    def terms(self) -> tuple[KronTerm, ...]:
        """The deltas that a call adds, as the operators take them."""
        for each in self._merging.merged:
            each.check_repeat()
        return tuple(each() if has_hooks(each) else each.term() for each in self.active())

    def frozen_linear(self, x: Tensor, terms: tuple[KronTerm, ...]) -> FrozenLinear:
        """The layer as the operators take it: its weight where that is safe, else its output for x.

        Raises TypeError for an x that is no floating tensor.
        """
        check_tensor("KronLinear", "x", x)
        check_dtype("KronLinear", "x", x)
        base = self.base
        reason = module_reason(base)
        if reason is None:
            assert isinstance(base, nn.Linear)
            reason = input_reason(base, x)
            if not torch.compiler.is_compiling():
                self.__dict__["_input_reason"] = reason
            if reason is None:
                return FrozenLinear(base.weight, terms, base.bias)
        return FrozenLinear(None, terms, None, base(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype that the base gives."""
        terms = self.terms()
        if not terms:
            return self.base(x)
        return _evaluate(x, [self.frozen_linear(x, terms)])[0]

    def extra_repr(self) -> str:
        """Sizes, factors, scales, and whether the layer is fused."""
        adapters: list[KronFactors] = list(self.adapters.values())  # pyright: ignore[reportAssignmentType]
        parts = [f"{self.in_features} -> {self.out_features}"]
        for each in adapters:
            merged = ", merged" if self.is_merged(each) else ""
            parts.append(f"as {each.layout}, scale={round(each.scale_value, 6)}{merged}")
        reason = self.unfused
        return (
            " ".join(parts[:2])
            + "".join(f" + {part}" for part in parts[2:])
            + ", "
            + ("fused" if reason is None else f"base + delta: {reason}")
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [each for each in state_dict if each.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.partition(".")[0] not in self._modules:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KronLinear:
        super()._apply(fn, recurse)
        self._merging.apply(fn)
        return self


def joins_a_group(module: nn.Module) -> bool:
    """Whether a layer may be evaluated together with others that share its input instead of being called."""
    return (
        type(module) is KronLinear
        and not has_hooks(module)
        and not has_global_hooks()
        and len(module.active()) > 0
    )


def linear_group(x: Tensor, layers: Sequence[KronLinear]) -> list[Tensor]:
    """[layer(x) for layer in layers], from one read of x. Every layer must satisfy `joins_a_group`."""
    with_terms = [(layer, layer.terms()) for layer in layers]
    return _evaluate(x, [layer.frozen_linear(x, terms) for layer, terms in with_terms])


def _evaluate(x: Tensor, layers: list[FrozenLinear]) -> list[Tensor]:
    """One operator call; to a base output of another dtype than the call's, the delta is added in that dtype."""
    dtype = compute_dtype(x)
    apart = [each.base if each.base is not None and each.base.dtype != dtype else None for each in layers]
    joined = [
        layer if base is None else layer._replace(base=None)
        for layer, base in zip(layers, apart, strict=True)
    ]
    results = kron_linear_group(x, joined)
    return [y if base is None else base + y.to(base.dtype) for y, base in zip(results, apart, strict=True)]
