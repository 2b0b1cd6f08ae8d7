"""Images from a base model and an adapter file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from kronafuse import KronA, attach, formats
from kronafuse.train.base import load_base, sampling_scheduler
from kronafuse.train.draw import draw_images
from kronafuse.train.sampling import check_finite, sample
from PIL import Image

OPTIONS: dict[str, Any] = {"steps": 2, "guidance": 2.0, "seed": 0, "batch_size": 4}


@pytest.fixture
def adapter(class_base: Path, tmp_path: Path) -> Path:
    """An adapter that changes the images."""
    attachment = attach(load_base(class_base).unet, KronA((4, 2)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    formats.save(tmp_path / "adapter.safetensors", attachment)
    return tmp_path / "adapter.safetensors"


def test_images_depend_on_seed_and_place_alone(class_base: Path) -> None:
    base = load_base(class_base)
    images = sample(base, ["cat", "dog", "cat"], **OPTIONS)
    assert images.shape == (3, 1, 8, 8)
    assert torch.equal(images, sample(base, ["cat", "dog", "cat"], **OPTIONS))
    torch.testing.assert_close(sample(base, ["cat", "dog", "cat"], **{**OPTIONS, "batch_size": 2}), images)
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(sample(base, ["cat"], **{**OPTIONS, "seed": 1})[0], images[0])


def test_guidance_of_one_is_the_conditional_model(class_base: Path) -> None:
    base = load_base(class_base)
    plain, almost, strong = (
        sample(base, ["cat"], **{**OPTIONS, "guidance": guidance}) for guidance in (1.0, 1.0 + 1e-7, 3.0)
    )
    torch.testing.assert_close(plain, almost, rtol=0, atol=1e-4)
    assert not torch.equal(plain, strong)


def test_training_mode_comes_back(class_base: Path) -> None:
    base = load_base(class_base)
    base.unet.train()
    sample(base, ["cat"], **OPTIONS)
    assert base.unet.training


def test_latents_become_images(text_base: Path) -> None:
    images = sample(load_base(text_base), ["a cat"], **OPTIONS, resolution=32)
    assert images.shape == (1, 3, 32, 32)


def test_batches_are_small_and_latents_are_decoded_one_by_one(
    text_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = load_base(text_base), []
    assert base.vae is not None
    decode = base.vae.decode
    monkeypatch.setattr(base.vae, "decode", lambda latents: (seen.append(len(latents)), decode(latents))[1])
    base.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    images = sample(base, ["a cat"] * 3, **{**OPTIONS, "steps": 1, "batch_size": 2})
    assert seen == [4, 1, 1, 2, 1]
    assert len(images) == 3


def test_latents_are_not_clipped(text_base: Path, class_base: Path, tmp_path: Path) -> None:
    """Schedulers whose files have no `clip_sample`, as most of Stable Diffusion's, would clip by default."""
    folder = tmp_path / "base"
    shutil.copytree(text_base, folder)
    shutil.rmtree(folder / "scheduler")
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    assert sampling_scheduler(load_base(folder)).config["clip_sample"] is False
    assert sampling_scheduler(load_base(class_base)).config["clip_sample"] is True


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("unet/config.json", "unet/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "unet"),
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("text_encoder/model.safetensors", "text_encoder"),
        ("tokenizer/tokenizer.json", "tokenizer"),
    ],
)
def test_rejects_truncated_base(text_base: Path, tmp_path: Path, part: str, named: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(text_base, folder)
    (folder / part).write_bytes((folder / part).read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"base model part .*base/{named} cannot be read: "):
        load_base(folder)


def test_rejects_class_names_that_are_none(class_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(class_base, folder)
    (folder / "class_names.json").write_text("5")
    with pytest.raises(
        ValueError, match=r"base cannot be read: class_names\.json must be a list of names; got 5"
    ):
        load_base(folder)


def test_unconditional_of_two_encoders_is_zero(sdxl_base: Path) -> None:
    given = load_base(sdxl_base).conditioning.encode(["a cat", ""], 16)
    pooled = given["added_cond_kwargs"]["text_embeds"]
    assert given["encoder_hidden_states"].shape == (2, 12, 16)
    assert pooled.shape == (2, 8)
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    for each in (given["encoder_hidden_states"], pooled):
        assert float(each[0].abs().min()) > 0
        assert float(each[1].abs().max()) == 0


def test_half_precision(class_base: Path, adapter: Path, tmp_path: Path) -> None:
    paths = draw_images(
        class_base, adapter, ["cat"], tmp_path / "a.png", count=1, precision="bf16", **OPTIONS
    )
    assert paths == [tmp_path / "a.png"]
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16; got 'fp8'"):
        draw_images(class_base, adapter, ["cat"], tmp_path / "b.png", count=1, precision="fp8", **OPTIONS)


def test_rejects_unknown_class(class_base: Path) -> None:
    with pytest.raises(ValueError, match="has no class 'bird'; its classes are: cat, dog"):
        sample(load_base(class_base), ["bird"], **OPTIONS)


def test_adapter_file_changes_the_images(class_base: Path, adapter: Path, tmp_path: Path) -> None:
    written = {
        name: draw_images(
            class_base, path, ["cat", "dog"], tmp_path / f"{name}", count=2, scale=scale, **OPTIONS
        )
        for name, path, scale in (("base", None, None), ("adapted", adapter, None), ("scaled", adapter, 0.0))
    }
    assert [path.name for path in written["base"]] == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    pictures = {name: [Image.open(path).tobytes() for path in paths] for name, paths in written.items()}
    assert pictures["scaled"] == pictures["base"]
    assert all(
        with_it != without for with_it, without in zip(pictures["adapted"], pictures["base"], strict=True)
    )


def test_one_grid(class_base: Path, adapter: Path, tmp_path: Path) -> None:
    """In the format that the suffix names, under the name that was given."""
    for name, format in (("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")):
        given = tmp_path / name
        drawn = draw_images(class_base, adapter, ["cat", "dog"], given, count=3, **OPTIONS)
        assert drawn == [given]
        with Image.open(given) as image:
            assert image.format == format
            assert image.size == (3 * 65 + 1, 2 * 65 + 1)


def test_a_suffix_is_a_format_or_part_of_a_folders_name(class_base: Path, tmp_path: Path) -> None:
    (tmp_path / "there.final").mkdir()
    (tmp_path / "there.png").mkdir()
    for name in ("sd1.5", "there.final", "there.png"):
        (path,) = draw_images(class_base, None, ["cat"], tmp_path / name, count=1, **OPTIONS)
        assert path == tmp_path / name / "0-0.png"
    with pytest.raises(
        ValueError, match=r"output must be a folder or end in \.png, \.jpg, \.jpeg, \.webp; got .*x\.bmp"
    ):
        draw_images(tmp_path / "absent", None, ["cat"], tmp_path / "x.bmp", count=1, **OPTIONS)
    assert not (tmp_path / "x.bmp").exists()


@pytest.mark.parametrize(
    ("value", "guidance", "clips"),
    [("nan", 2.0, True), ("inf", 2.0, True), ("inf", 1.0, True), ("inf", 1.0, False)],
)
def test_rejects_images_that_are_not_finite(
    class_base: Path, monkeypatch: pytest.MonkeyPatch, value: str, guidance: float, clips: bool
) -> None:
    """Also where a scheduler that clips makes a black or white picture of inf."""
    base = load_base(class_base)
    base.scheduler.register_to_config(clip_sample=clips)
    predict = base.unet.forward

    def overflows(inputs: torch.Tensor, *others: Any, **options: Any) -> Any:
        output: Any = predict(inputs, *others, **options)
        output.sample[-1] = float(value)  # of the last image, under its condition
        return output

    monkeypatch.setattr(base.unet, "forward", overflows)
    message = (
        r"sample: image 2, 'dog', has NaN or inf in it where it is denoised \(1 of 3 images .*in float32\)"
    )
    with pytest.raises(FloatingPointError, match=message):
        sample(base, ["cat", "cat", "dog"], **{**OPTIONS, "guidance": guidance})
    base.unet.half()
    with pytest.raises(FloatingPointError, match=r"float16 ends at 65504, .*: use bf16 or fp32"):
        check_finite("denoised", torch.full((1, 1, 2, 2), float(value)), ["cat"], 0, base, 1.0)


def test_rejects_images_that_the_vae_overflows(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(text_base)
    assert base.vae is not None
    decode = base.vae.decode

    def overflows(latents: Any) -> Any:
        output: Any = decode(latents)
        output.sample[..., 0] = float("inf")
        return output

    monkeypatch.setattr(base.vae, "decode", overflows)
    with pytest.raises(FloatingPointError, match="where it is decoded by the VAE"):
        sample(base, ["a cat"], **OPTIONS)


def test_a_single_file_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        NotADirectoryError,
        match=r"base model .*model\.safetensors is a file, and a folder .*from_single_file\(\".*\"\)\.save_pretrained",
    ):
        load_base(tmp_path / "model.safetensors")


def test_rejects_adapter_of_another_model(
    text_base: Path, adapter: Path, tmp_path: Path, class_base: Path
) -> None:
    attachment = attach(load_base(text_base).unet, KronA((8, 2), targets=("ff.net.2",)), allow_partial=True)
    tensors = formats.load(adapter)
    foreign = tmp_path / "foreign.safetensors"
    renamed = {f"other.{name}": size for name, size in tensors.modules.items()}
    formats.save(foreign, formats.AdapterFile(
        tensors.spec, renamed, 1.0, {f"other.{name}": each for name, each in tensors.tensors.items()}
    ))  # fmt: skip
    attachment.remove()
    with pytest.raises(ValueError, match="other"):
        draw_images(class_base, foreign, ["cat"], tmp_path / "out", count=1, **OPTIONS)
    assert not list((tmp_path / "out").iterdir())


def test_rejects_files_that_are_no_adapter(class_base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter file .*absent\.safetensors does not exist"):
        draw_images(
            class_base, tmp_path / "absent.safetensors", ["cat"], tmp_path / "out", count=1, **OPTIONS
        )
    path = tmp_path / "text.safetensors"
    path.write_text("not safetensors")
    with pytest.raises(ValueError, match=r"text\.safetensors is not a whole safetensors file"):
        draw_images(class_base, path, ["cat"], tmp_path / "out", count=1, **OPTIONS)


def test_rejects_scale_without_adapter(class_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without an adapter file"):
        draw_images(class_base, None, ["cat"], tmp_path / "out", count=1, scale=0.5, **OPTIONS)


@pytest.mark.parametrize("name", ["scale", "guidance"])
def test_rejects_numbers_that_are_none(class_base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite; got nan"):
        draw_images(
            class_base, adapter, ["cat"], tmp_path / "out", count=1, **{**OPTIONS, name: float("nan")}
        )


def test_rejects_output_before_reading_the_model(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"output folder .*out cannot be written to: File exists"):
        draw_images(tmp_path / "absent", None, ["cat"], tmp_path / "out", count=1, **OPTIONS)


def test_rejects_an_adapter_that_is_a_folder(class_base: Path, tmp_path: Path) -> None:
    """The output folder of a training run, given in place of the file in it."""
    with pytest.raises(IsADirectoryError, match="a folder; name the adapter file in it"):
        draw_images(class_base, tmp_path, ["0"], tmp_path / "images", count=1, scale=None, resolution=None,
                    precision="fp32", **OPTIONS)  # fmt: skip
