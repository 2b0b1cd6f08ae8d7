"""Tiny base models, image folders and configurations, made on the spot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from kronafuse.train.base import Base
from kronafuse.train.conditioning import ClassTokens
from kronafuse.train.config import TrainConfig
from kronafuse.train.options import build
from kronafuse.train.run import LOSSES
from PIL import Image

CLASSES = ("cat", "dog")
TINY = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "dropout": 0.1,
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision for a process; every test starts without it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_unet(channels: int, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(in_channels=channels, out_channels=channels, **{**TINY, **options})


def save_text(folder: Path, suffix: str = "", kind: str = "CLIPTextModel") -> None:
    """A random CLIP text encoder of width 8 and a tokenizer of single letters."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    source = folder / "vocabulary"
    source.mkdir(exist_ok=True)
    (source / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(words)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source, model_max_length=12)
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=8,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    getattr(transformers, kind)(config).save_pretrained(folder / f"text_encoder{suffix}")


def save_vae(folder: Path) -> None:
    """A random VAE that halves the sides."""
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")


@pytest.fixture(scope="session")
def class_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net on 8×8 grey images with two classes."""
    folder = tmp_path_factory.mktemp("base") / "classes"
    folder.mkdir()
    Base(tiny_unet(1), DDPMScheduler(), ClassTokens.random(CLASSES, 2, 8, seed=0)).save(folder)
    return folder


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion in miniature: 16×16 colour images, latents of half the side, CLIP captions."""
    folder = tmp_path_factory.mktemp("base") / "text"
    tiny_unet(4).save_pretrained(folder / "unet")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    save_vae(folder)
    save_text(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL in miniature: two text encoders, their projection and the image's size."""
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    tiny_unet(
        4,
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    ).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    save_vae(folder)
    save_text(folder)
    save_text(folder, "_2", "CLIPTextModelWithProjection")
    return folder


def _write_image(path: Path, seed: int, side: int = 10) -> Path:
    """A colour image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """`write_image(path, seed, side=10)` writes a colour image of noise."""
    return _write_image


@pytest.fixture
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    """`with file_limit(bytes):` the system refuses larger files, as a full disk does."""
    if sys.platform == "win32":
        pytest.skip("resource limits are POSIX's")
    import resource

    @contextmanager
    def limited(size_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Three images of each class."""
    folder = tmp_path / "images"
    for row, name in enumerate(CLASSES):
        for column in range(3):
            _write_image(folder / name / f"{column}.png", 10 * row + column)
    return folder


@pytest.fixture
def captioned_folder(tmp_path: Path) -> Path:
    """Three images with captions beside them."""
    folder = tmp_path / "captioned"
    for column, caption in enumerate(("a red cat", "a dog", "nothing")):
        _write_image(folder / f"{column}.png", column, side=20).with_suffix(".txt").write_text(caption + "\n")
    return folder


@pytest.fixture
def configure(class_base: Path, class_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration of four steps in `tmp_path / "out"`, and what differs from it."""

    def make(**values: Any) -> TrainConfig:
        standard = {
            "base": class_base,
            "data": class_folder,
            "output": tmp_path / "out",
            "factors": (4, 2),
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "warmup": 2,
            "condition_dropout": 0.3,
            "flip": True,
            "checkpoint_every": 2,
            "sampling_steps": 2,
        }
        return build(TrainConfig, standard | values)

    return make


@pytest.fixture
def losses_of() -> Callable[[TrainConfig], list[float]]:
    """The losses that a run wrote."""
    return lambda config: json.loads((config.output / LOSSES).read_text())
