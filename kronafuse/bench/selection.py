"""Which cases a run takes: named sets, or globs on the names of cases, layers and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar, get_args

import torch

from ..testing.bottleneck_cases import CASES as BOTTLENECK_CASES
from ..testing.bottleneck_cases import BottleneckCase
from ..testing.cases import CASES, Case
from .problems import Spec
from .records import Mode, Suite

Value = TypeVar("Value")
SUITES: tuple[Suite, ...] = get_args(Suite)
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""Name on the command line -> dtype."""

SETS: dict[str, dict[Suite, tuple[str, ...]]] = {
    "core": {
        "kron_linear": (
            "sdxl_1280-krona_64x4",
            "sdxl_1280-lokr_f8",
            "sdxl_1280-lora_r16",
            "sdxl_1280-lokr_square",
            "sdxl_640-krona_4x64",
            "sdxl_640-lokr_f4",
            "flux2_3072-lokr_f16",
            "ff_in-krona_64x4",
            "sd15_320-krona_64x8",
            "sd15_320-lokr_f8",
            "sdxl_cross_k_1280-lokr_f8_r16",
            "sdxl_1280-diffusekrona_official",
        ),
        "kron_linear_group": (
            "sdxl_1280-krona_64x4",
            "sdxl_1280-lokr_f8",
            "sdxl_640-krona_64x4",
            "sdxl_1280-lora_r16",
        ),
        "bottleneck": (
            "sdxl_1280-width_60",
            "sdxl_1280-width_160",
            "sd15_320-width_60",
            "sd15_context-width_60",
        ),
    },
    "quick": {
        "kron_linear": ("sd15_1280-krona_64x4", "sd15_1280-lokr_f8", "sd15_1280-lora_r16"),
        "kron_linear_group": ("sd15_1280-krona_64x4",),
        "bottleneck": ("sd15_1280-width_60",),
    },
    "all": {
        "kron_linear": tuple(CASES),
        "kron_linear_group": tuple(name for name in CASES if not name.startswith("ff_")),
        "bottleneck": tuple(BOTTLENECK_CASES),
    },
}
"""Set -> suite -> cases, those that say most first. Core has every kind of adapter, thin and fat, and every width."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None is the default for the device.

    factors: "compute", the adapter's parameters in the layer's dtype, or "float32"
    """

    set_name: str = "core"
    cases: Sequence[str] = ()
    layers: Sequence[str] = ()
    adapters: Sequence[str] = ()
    batches: Sequence[int] = ()
    tokens: int | None = None
    dtypes: Sequence[str] = ()
    modes: Sequence[str] = ()
    factors: str = "compute"
    device: str | None = None


def specs(suites: Sequence[Suite], options: Options) -> list[Spec]:
    """All questions, suite by suite. Raises ValueError for a name that does not exist, listing those that do."""
    device = _device(options.device)
    on_gpu = device.type == "cuda"
    dtypes = [
        _one("dtype", each, DTYPES) for each in options.dtypes or ("bfloat16" if on_gpu else "float32",)
    ]
    modes: list[Mode] = [_mode(each) for each in options.modes] or list(MODES)
    if options.factors not in ("compute", "float32"):
        raise ValueError(f"kronafuse bench: --factors must be compute or float32; got {options.factors!r}")
    tokens = 1 if options.tokens is None else options.tokens
    for name, value in (("--batch", min(options.batches, default=1)), ("--tokens", tokens)):
        if value < 1:
            raise ValueError(f"kronafuse bench: {name} must be at least 1; got {value}")
    if options.tokens is not None and options.batches:
        raise ValueError("kronafuse bench: --tokens is the number in all; give it or --batch, not both")
    found = []
    for suite in suites:
        for case in chosen_cases(suite, options):
            for batch in options.batches or (4 if on_gpu and options.tokens is None else 1,):
                tokens = batch * case.tokens if options.tokens is None else options.tokens
                for dtype in dtypes:
                    factors = dtype if options.factors == "compute" else torch.float32
                    found += [
                        Spec(suite, case, batch, tokens, dtype, mode, device, factors) for mode in modes
                    ]
    return found


def chosen_cases(suite: Suite, options: Options) -> list[Case] | list[BottleneckCase]:
    """Cases of the suite that the globs leave; of the named set where there is none."""
    known = BOTTLENECK_CASES if suite == "bottleneck" else CASES
    patterns = {"case": options.cases, "layer": options.layers, "adapter": options.adapters}
    if not any(patterns.values()):
        sets = _one("set", options.set_name, SETS)
        return [known[name] for name in sets[suite]]  # type: ignore[return-value]
    kept = []
    for name in known:
        layer, adapter = name.rsplit("-", 1)
        parts = {"case": name, "layer": layer, "adapter": adapter}
        if all(not globs or _matches(parts[part], globs) for part, globs in patterns.items()):
            kept.append(known[name])
    if not kept:
        asked = ", ".join(f"--{part} {' '.join(globs)}" for part, globs in patterns.items() if globs)
        layers = dict.fromkeys(name.rsplit("-", 1)[0] for name in known)
        adapters = dict.fromkeys(name.rsplit("-", 1)[1] for name in known)
        raise ValueError(
            f"kronafuse bench: no case of {suite} matches {asked}; cases are LAYER-ADAPTER with layers"
            f" {', '.join(layers)} and adapters {', '.join(adapters)}"
        )
    return kept


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, each) for each in globs)


def _one(what: str, name: str, known: Mapping[str, Value]) -> Value:
    if name not in known:
        raise ValueError(f"kronafuse bench: --{what} must be one of {', '.join(known)}; got {name!r}")
    return known[name]


def suites_named(names: Sequence[str]) -> list[Suite]:
    """The suites of these names; all where there are none. ValueError for a name that is none."""
    return [_one("suite", name, {each: each for each in SUITES}) for name in names] or list(SUITES)


def _mode(name: str) -> Mode:
    return _one("mode", name, {each: each for each in MODES})


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"kronafuse bench: --device must be cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("kronafuse bench: --device cuda, but torch sees no CUDA device")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
