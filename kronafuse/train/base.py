"""The frozen model that adapters are trained on, loaded from a diffusers folder."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import SafetensorError
from torch import Tensor, nn

from .conditioning import CLASS_TOKENS, ClassTokens, Conditioning
from .reading import reading


@dataclass
class Base:
    """A U-Net, its noise schedule, what it is conditioned on, and a VAE where it works on latents."""

    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    conditioning: Conditioning
    vae: AutoencoderKL | None = None

    @property
    def channels(self) -> int:
        """Channels of the images: the VAE's input, or the U-Net's."""
        return int((self.unet if self.vae is None else self.vae).config["in_channels"])

    @property
    def reduction(self) -> int:
        """Pixels to a side of one latent; 1 without a VAE."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        """Side of the images the U-Net was made for."""
        return int(self.unet.config["sample_size"]) * self.reduction

    def check_resolution(self, resolution: int) -> None:
        """ValueError where the U-Net cannot halve its input as often as it has levels."""
        multiple = self.reduction * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if resolution % multiple:
            raise ValueError(
                f"resolution must be a multiple of {multiple} for this base model; got {resolution}"
            )

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """What the U-Net learns: the pixels (batch, channels, height, width), or scaled latents."""
        if self.vae is None:
            return pixels
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist  # type: ignore[union-attr]
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        shift = self.vae.config.get("shift_factor") or 0.0
        return (posterior.mean + posterior.std * noise - shift) * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], on the CPU in float32, decoded one by one; NaN stays, and so does inf as NaN."""
        if self.vae is not None:
            latents = latents / self.vae.config["scaling_factor"] + (
                self.vae.config.get("shift_factor") or 0.0
            )
            decoded = [
                self.vae.decode(each[None].to(self.vae.dtype)).sample.cpu()  # type: ignore[union-attr]
                for each in latents
            ]
            latents = torch.cat(decoded)
        latents = latents.float()
        return latents.clamp(-1, 1).where(latents.isfinite(), torch.nan).cpu()

    def to(self, device: torch.device) -> Base:
        """Moves everything."""
        for model in (self.unet, self.vae):
            if model is not None:
                nn.Module.to(model, device)
        self.conditioning.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Writes a class-conditional base as a diffusers folder with its class tokens; OSError if the disk refuses."""
        if not isinstance(self.conditioning, ClassTokens):
            raise TypeError(f"only a base with class tokens is saved; got {type(self.conditioning).__name__}")
        try:
            self.unet.save_pretrained(folder / "unet")
        except SafetensorError as error:
            raise OSError(errno.EIO, f"base model {folder} cannot be written: {error}") from error
        self.scheduler.save_pretrained(folder / "scheduler")
        self.conditioning.save(folder)


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """A frozen base model from a local folder.

    folder: `unet/` and `scheduler/` as diffusers saves them, `vae/` where there is one, and either the class tokens
            of `Base.save` or `tokenizer/` and `text_encoder/` (CLIP; for SDXL the same twice, the second with _2)
    dtype:  of U-Net and conditioning; the VAE stays in float32, whose range half precision lacks

    Raises NotADirectoryError (a single file, with how to convert it), FileNotFoundError (no folder, a part that is
    missing), ValueError (a part of another kind, or one that
    cannot be read).
    """
    if folder.is_file():
        raise NotADirectoryError(
            f"base model {folder} is a file, and a folder as diffusers saves it is needed, with unet/ and scheduler/."
            f' diffusers makes one of a single file: StableDiffusionPipeline.from_single_file("{folder.as_posix()}")'
            '.save_pretrained("FOLDER"), or StableDiffusionXLPipeline for SDXL; then give FOLDER'
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"base model {folder} does not exist or is not a folder (hub names are not taken)"
        )
    with_classes = (folder / CLASS_TOKENS).is_file()
    needed = ["unet", "scheduler", *([] if with_classes else ["tokenizer", "text_encoder"])]
    absent = [name for name in needed if not (folder / name).is_dir()]
    if absent:
        found = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"base model {folder} lacks {', '.join(absent)}; it needs unet/, scheduler/"
            f" and either tokenizer/ and text_encoder/ or {CLASS_TOKENS}; it has {found}"
        )
    if (folder / "text_encoder_2").is_dir() and not (folder / "tokenizer_2").is_dir():
        raise FileNotFoundError(f"base model {folder} has text_encoder_2/ and lacks tokenizer_2/")
    _check_kind(folder, "unet", "UNet2DConditionModel")
    with reading(folder / "unet"):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, local_files_only=True)
    vae = None
    if (folder / "vae").is_dir():
        _check_kind(folder, "vae", "AutoencoderKL")
        with reading(folder / "vae"):
            vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
        vae.requires_grad_(False).eval()
    with reading(folder / "scheduler"):
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    assert isinstance(scheduler, DDPMScheduler)
    conditioning = ClassTokens.load(folder, dtype) if with_classes else _text(folder, unet, dtype)
    return Base(unet.requires_grad_(False).eval(), scheduler, conditioning, vae)


def sampling_scheduler(base: Base) -> DDIMScheduler:
    """DDIM on the base's noise schedule. Latents are never clipped: their range is not that of images."""
    options = {} if base.vae is None else {"clip_sample": False}
    scheduler = DDIMScheduler.from_config(base.scheduler.config, **options)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def _text(folder: Path, unet: UNet2DConditionModel, dtype: torch.dtype) -> Conditioning:
    from .text import OneEncoder, TwoEncoders

    two, kind = (folder / "text_encoder_2").is_dir(), unet.config.get("addition_embed_type")
    if kind != ("text_time" if two else None):
        raise ValueError(
            f"base model {folder}: a U-Net with addition_embed_type {kind!r} and {'two' if two else 'one'} text"
            " encoders is neither a Stable Diffusion nor a Stable Diffusion XL"
        )
    return (TwoEncoders if two else OneEncoder).load(folder, dtype)


def _check_kind(folder: Path, name: str, kind: str) -> None:
    with reading(folder / name / "config.json"):
        found = json.loads((folder / name / "config.json").read_text(encoding="utf-8")).get(
            "_class_name", kind
        )
    if found != kind:
        raise ValueError(f"base model {folder}: {name}/ must be a {kind}; it is a {found}")
