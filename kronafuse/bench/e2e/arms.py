"""What trains a model end to end: the frozen model, our adapters, and those of PEFT and LyCORIS.

All of them sit on the same layers, hold their parameters in fp32 as training scripts do, and start with a
delta of 0. PEFT's LoKr has no option for a full second factor: a rank beyond every layer gives it, and alpha
of the same size keeps its scale at 1.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...models.attach import attach
from ...models.sites import linear_places, select
from ...nn.specs import AdapterSpec, KronA, LoKr, LoRA
from .configs import StepModel

RANK = 16
"""Of every LoRA."""
FACTOR = 8
"""Of every LoKr."""
FULL_RANK = 1_000_000
"""A rank beyond every layer, with which PEFT's LoKr keeps its second factor full."""


@dataclass
class Adapted:
    """A model with one arm's adapters: what is called, and what is trained."""

    model: nn.Module
    parameters: list[nn.Parameter]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StepArm:
    """One way to train.

    put:         puts the adapters on a model that is the arm's own
    library:     the distribution that it needs in addition to ours, by import name and distribution
    operator:    starts the name of an operator that must be seen to run, None for none
    kernels:     on a GPU, kernels of that operator's library must be seen too
    counted:     starts the names of operators whose calls a note counts, though none need run
    autocast:    the step runs under bf16 autocast
    environment: variables that hold while the arm runs
    """

    name: str
    put: Callable[[nn.Module, StepModel], Adapted]
    library: tuple[str, str] | None = None
    operator: str | None = None
    kernels: bool = False
    counted: str | None = None
    autocast: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)

    def require(self) -> None:
        """ImportError that names the library which is absent, and the distribution that brings it."""
        if self.library is not None and importlib.util.find_spec(self.library[0]) is None:
            name, distribution = self.library
            raise ImportError(f"{self.name}: needs {name}; install with: pip install {distribution}")

    @contextmanager
    def surroundings(self, device: torch.device) -> Iterator[None]:
        """The arm's environment variables and autocast, for as long as the block lasts."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def adapted_layers(model: nn.Module, of: StepModel) -> list[str]:
    """Names of the layers that every arm adapts."""
    return [place.name for place in select(model, of.targets)]


def frozen(model: nn.Module, of: StepModel) -> Adapted:
    """No adapter: forward, and backward to the latents."""
    return Adapted(model, [])


def ours(spec: AdapterSpec) -> Callable[[nn.Module, StepModel], Adapted]:
    """`kronafuse.attach`, with the attention processors that read x once."""

    def put(model: nn.Module, of: StepModel) -> Adapted:
        attachment = attach(model, spec_for(spec, of))
        return Adapted(model, list(attachment.parameters()))

    return put


def spec_for(spec: AdapterSpec, of: StepModel) -> AdapterSpec:
    """The same adapter on this model's layers."""
    return replace(spec, targets=of.targets)


def peft(make: Callable[[list[str]], object]) -> Callable[[nn.Module, StepModel], Adapted]:
    """`peft.get_peft_model`, which keeps adapters in fp32."""

    def put(model: nn.Module, of: StepModel) -> Adapted:
        from peft import get_peft_model

        wrapped = get_peft_model(model, make(adapted_layers(model, of)))  # type: ignore[arg-type]
        return Adapted(wrapped, [each for each in wrapped.parameters() if each.requires_grad])

    return put


def peft_lora(layers: list[str]) -> object:
    """LoRA with alpha = rank."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)


def peft_lokr(layers: list[str]) -> object:
    """LoKr with a full second factor, started as LyCORIS does."""
    from peft import LoKrConfig

    return LoKrConfig(
        r=FULL_RANK,
        alpha=FULL_RANK,
        decompose_factor=FACTOR,
        target_modules=layers,
        init_weights="lycoris",  # type: ignore[arg-type]
    )


def lycoris(*, bypass: bool) -> Callable[[nn.Module, StepModel], Adapted]:
    """LyCORIS' LoKr modules, applied to the layers as its wrapper does; rebuild is its default."""

    def put(model: nn.Module, of: StepModel) -> Adapted:
        from lycoris.modules.lokr import LokrModule

        places = linear_places(model)
        modules = []
        for name in adapted_layers(model, of):
            layer = places[name].module
            weight = layer.weight
            assert isinstance(weight, torch.Tensor)
            module = LokrModule(
                name.replace(".", "_"), layer, lora_dim=1, alpha=1, factor=FACTOR, full_matrix=True,
                bypass_mode=bypass,
            ).to(weight.device)  # fmt: skip
            module.apply_to()
            modules.append(module)
        # The layers hold the modules' bound methods alone; the model keeps the modules.
        model.add_module("lycoris", nn.ModuleList(modules))
        return Adapted(model, [each for module in modules for each in module.parameters()])

    return put


PEFT, LYCORIS = ("peft", "peft"), ("lycoris", "lycoris-lora")
BACKEND = "LYCORIS_KERNEL_BACKEND"

ARMS = {
    arm.name: arm
    for arm in (
        StepArm("frozen", frozen),
        StepArm("ours_krona_64x4", ours(KronA((64, 4))), operator="kronafuse::", kernels=True),
        StepArm("ours_lokr_f8", ours(LoKr(FACTOR)), operator="kronafuse::", kernels=True),
        StepArm("ours_lora_r16", ours(LoRA(RANK)), operator="kronafuse::", kernels=True),
        StepArm("peft_lora_r16", peft(peft_lora), PEFT),
        StepArm("peft_lora_r16_autocast", peft(peft_lora), PEFT, autocast=True),
        StepArm("peft_lokr_f8", peft(peft_lokr), PEFT),
        StepArm("peft_lokr_f8_autocast", peft(peft_lokr), PEFT, autocast=True),
        StepArm("lycoris_rebuild_f8", lycoris(bypass=False), LYCORIS, environment={BACKEND: "auto"}),
        StepArm("lycoris_bypass_f8", lycoris(bypass=True), LYCORIS, environment={BACKEND: "torch"}),
        StepArm(
            "lycoris_bypass_auto_f8",
            lycoris(bypass=True),
            LYCORIS,
            counted="lycoris::",
            environment={BACKEND: "auto"},
        ),
        StepArm(
            "lycoris_bypass_triton_f8",
            lycoris(bypass=True),
            LYCORIS,
            operator="lycoris::",
            kernels=True,
            environment={BACKEND: "triton"},
        ),
    )
}
"""Every arm by name; the frozen one comes first, since the others are compared with it."""
