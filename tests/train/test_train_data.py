"""Image folders and the order in which they are read."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from kronafuse.train.data import ImageFolder, StepBatches, TensorExamples, collate
from PIL import Image

ORIENTATION = 0x0112
Write = Callable[..., Path]


def test_class_folders(class_folder: Path) -> None:
    examples = ImageFolder(class_folder, 8, 3)
    assert len(examples) == 6
    assert list(examples.conditions) == ["cat", "dog"]
    pixels, conditions = collate([examples[0], examples[5]])
    assert pixels.shape == (2, 3, 8, 8)
    assert conditions == ["cat", "dog"]
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1


def test_grey_images(class_folder: Path) -> None:
    assert ImageFolder(class_folder, 8, 1)[0][0].shape == (1, 8, 8)


def test_photographs_stand_upright(tmp_path: Path) -> None:
    """A camera's orientation tag counts: 6 is a quarter turn clockwise."""
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))
    exif = image.getexif()
    exif[ORIENTATION] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    pixels, _ = ImageFolder(tmp_path, 8, 1, caption="x")[0]
    assert pixels[0, :, :4].eq(-1).all()
    assert pixels[0, :, 4:].eq(1).all()


def test_caption_with_the_class(class_folder: Path) -> None:
    examples = ImageFolder(class_folder, 8, 3, caption="a photo of a {label}")
    assert list(examples.conditions) == ["a photo of a cat", "a photo of a dog"]


def test_captions_beside_images(captioned_folder: Path) -> None:
    examples = ImageFolder(captioned_folder, 8, 3, caption="not used")
    assert [examples[i][1] for i in range(3)] == ["a red cat", "a dog", "nothing"]


def test_one_caption_for_all(tmp_path: Path, write_image: Write) -> None:
    write_image(tmp_path / "a.png", 0)
    assert ImageFolder(tmp_path, 8, 3, caption="a sks dog")[0][1] == "a sks dog"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata(tmp_path: Path, write_image: Write, name: str) -> None:
    for each in ("a.png", "deep/b.png", "unlisted.png"):
        write_image(tmp_path / each, 0)
    rows = [("a.png", "first, of two"), ("deep/b.png", "second")]
    if name.endswith("csv"):
        text = "file_name,text\n" + "".join(f'{path},"{caption}"\n' for path, caption in rows)
    else:
        text = "".join(json.dumps({"file_name": path, "text": caption}) + "\n" for path, caption in rows)
    (tmp_path / name).write_text(text)
    examples = ImageFolder(tmp_path, 8, 3)
    assert [examples[i][1] for i in range(len(examples))] == ["first, of two", "second"]


def test_rejects_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image folder .*absent does not exist"):
        ImageFolder(tmp_path / "absent", 8, 3)


def test_rejects_folder_that_may_not_be_read(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since nothing is forbidden to root."""

    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(PermissionError, match=r"image folder .*images cannot be read: Permission denied"):
        ImageFolder(class_folder, 8, 3)


def test_rejects_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(ValueError, match=r"has no images; names that count end in .*\.png"):
        ImageFolder(tmp_path, 8, 3)


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_rejects_truncated_image_by_name(class_folder: Path, write_image: Write, extension: str) -> None:
    path = write_image(class_folder / "dog" / f"broken.{extension}", 1, side=64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"image .*broken\.{extension} cannot be read"):
        ImageFolder(class_folder, 8, 3)


def test_rejects_text_named_as_image(class_folder: Path) -> None:
    (class_folder / "cat" / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"image .*text\.png cannot be read"):
        ImageFolder(class_folder, 8, 3)


def test_rejects_image_without_condition(tmp_path: Path, write_image: Write) -> None:
    write_image(tmp_path / "alone.png", 0)
    with pytest.raises(ValueError, match=r"alone\.png has no condition: .*alone\.txt"):
        ImageFolder(tmp_path, 8, 3)


def test_rejects_metadata_of_absent_image(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        ImageFolder(tmp_path, 8, 3)


def test_rejects_metadata_without_captions(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,x\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: every row needs file_name and text"):
        ImageFolder(tmp_path, 8, 3)


def test_rejects_tensors_without_conditions() -> None:
    with pytest.raises(ValueError, match="got 2 images and 1 conditions"):
        TensorExamples(torch.zeros(2, 1, 8, 8), ["a"])


def test_batches_cover_every_epoch() -> None:
    batches = list(StepBatches(10, 4, seed=3, start=0, stop=5, rank=0, ranks=1))
    flat = list(chain.from_iterable(batches))
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_batches_start_anywhere() -> None:
    whole = list(StepBatches(7, 3, seed=0, start=0, stop=9, rank=0, ranks=1))
    assert list(StepBatches(7, 3, seed=0, start=4, stop=9, rank=0, ranks=1)) == whole[4:]


def test_processes_share_the_batches() -> None:
    both = [list(StepBatches(12, 2, seed=0, start=0, stop=3, rank=rank, ranks=2)) for rank in range(2)]
    assert sorted(chain.from_iterable(both[0] + both[1])) == list(range(12))
