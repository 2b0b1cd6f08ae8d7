"""What a training run is told: `LoopSettings` for the loop, `TrainConfig` for `kronafuse train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .options import about, option


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop steps. Equal settings, data and seed give equal losses on the CPU."""

    steps: int = option("optimizer steps", 1000, least=1)
    batch_size: int = option("images per forward pass and process", 4, least=1)
    accumulation: int = option("forward passes per optimizer step", 1, least=1)
    learning_rate: float = option("peak learning rate", 5e-4, above=0)
    warmup: int = option("steps over which the learning rate rises from 0", 0, least=0)
    decay: str = option("learning rate after the warm-up", "constant", choices=("constant", "cosine"))
    weight_decay: float = option("AdamW's weight decay", 1e-2, least=0)
    clip: float = option("largest gradient norm; 0 does not clip", 1.0, least=0)
    condition_dropout: float = option("share of images trained without their condition", 0.0, least=0, most=1)
    flip: bool = option("mirror every other image, at random", False)
    seed: int = option("decides noise, time steps and the order of the images", 0, least=0)
    mixed_precision: str = option(
        "precision of the frozen model and of the products", "no", choices=("no", "fp16", "bf16")
    )
    gradient_checkpointing: bool = option("compute activations twice instead of keeping them", False)
    workers: int = option("processes that read images", 0, least=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopSettings):
    """The keys of a `kronafuse train` TOML file, and its flags."""

    base: Path = field(metadata=about("base model: a diffusers folder with unet/ and scheduler/"))
    data: Path = field(
        metadata=about("image folder, with class folders, NAME.txt captions or a metadata file")
    )
    output: Path = field(
        default=Path("runs/train"),
        metadata=about("folder for checkpoints, validation images and the adapter"),
    )
    caption: str | None = option(
        "caption of images that have none; {label} stands for the class folder", None
    )
    resolution: int | None = option(
        "side of the square training images; the base model's own if absent", None, least=1
    )

    adapter: str = option("kind of adapter", "krona", choices=("krona", "lokr", "lora", "bottleneck"))
    factors: tuple[int, int] | None = option(
        "krona: rows and columns of the left factor, 64x4 if absent; bottleneck: of its krona forms", None
    )
    factor: int | None = option("lokr: size of the left factor, 8 if absent; -1 for near-square", None)
    rank: int | None = option(
        "lokr and lora: rank; lokr has a full right factor if absent, lora 16; bottleneck: of its compacter form",
        None,
        least=1,
    )
    alpha: float | None = option("lokr and lora: the delta is scaled by alpha / rank", None, above=0)
    scale: float | None = option("multiplies the delta, 1 if absent", None)
    shuffled: bool | None = option("interleave output features as DiffuseKronA's released code does", None)
    targets: tuple[str, ...] | None = option(
        "suffixes of the layers adapted; all attention projections if absent", None
    )

    source: str | None = option("bottleneck: where it reads, attn2_out if absent", None)
    sink: str | None = option("bottleneck: where it adds, ff_in if absent", None)
    width: int | None = option("bottleneck: hidden width, 60 if absent", None, least=1)
    budget: float | None = option("bottleneck: percent of the model's parameters, instead of a width", None)
    activation: str | None = option("bottleneck: identity, relu, sigmoid, silu or gelu, relu if absent", None)
    form: str | None = option(
        "bottleneck: dense, compacter, or from ff_in to block_out krona or krona_res; dense if absent",
        None,
    )
    terms: int | None = option(
        "bottleneck: Kronecker products that its compacter form sums, 4 if absent", None
    )
    init: str | None = option("how the adapter starts, the kind's own default if absent", None)

    checkpoint_every: int = option("steps between checkpoints; 0 saves at the end alone", 500, least=0)
    resume: str | None = option(
        'continue from a checkpoint folder, or from the "latest" in the output folder', None
    )
    validate_every: int = option("steps between validation images; 0 draws none", 0, least=0)
    validation: tuple[str, ...] | None = option(
        "captions or classes drawn; the first 8 of the data if absent", None
    )
    validation_count: int = option("images drawn for each", 4, least=1)
    sampling_steps: int = option("denoising steps of a validation image", 25, least=1)
    guidance: float = option("classifier-free guidance of a validation image", 2.0, least=0)


FREE_ON_RESUME = frozenset({
    "base", "data", "output", "steps", "workers", "gradient_checkpointing", "checkpoint_every", "resume",
    "validate_every", "validation", "validation_count", "sampling_steps", "guidance",
})  # fmt: skip
"""Keys that may differ between a checkpoint and the run that continues it; the others decide the losses."""
