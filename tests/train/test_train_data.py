"""Image folders and the order in which they are read."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
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


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.repeat(np.array([[0, 0x8080, 0xFFFF, 0]], dtype=np.uint16), 4, axis=0)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    pixels, _ = ImageFolder(tmp_path, 4, 3, caption="x")[0]
    torch.testing.assert_close(pixels[:, 0], torch.tensor([[-1, 128 / 127.5 - 1, 1, -1]]).expand(3, 4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_over_white(tmp_path: Path, mode: str) -> None:
    """Black that is hidden in the upper half, and black that is seen in the lower."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 4, 8, 8))
    image.convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == mode
    for channels in (1, 3):
        pixels, _ = ImageFolder(tmp_path, 8, channels, caption="x")[0]
        assert pixels[:, :4].eq(1).all()
        assert pixels[:, 4:].eq(-1).all()


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_rejects_pixels_without_a_known_white(tmp_path: Path, kind: str) -> None:
    Image.fromarray(np.ones((8, 8), dtype=kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"image .*a\.tif cannot be read: its pixels are 32-bit numbers"):
        ImageFolder(tmp_path, 8, 1, caption="x")


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


def test_metadata_of_a_spreadsheet(tmp_path: Path, write_image: Write) -> None:
    """A byte order mark, lines that end in CR LF, a caption of two lines."""
    for each in ("a.png", "b.png"):
        write_image(tmp_path / each, 0)
    text = '\ufefffile_name,text\r\na.png,"a cat\non a mat"\r\nb.png,b\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert list(ImageFolder(tmp_path, 8, 3).conditions) == ["a cat\non a mat", "b"]


def test_caption_file_of_an_editor_with_byte_order_marks(captioned_folder: Path) -> None:
    (captioned_folder / "1.txt").write_bytes("\ufeffa dög\r\n".encode())
    assert ImageFolder(captioned_folder, 8, 3)[1][1] == "a dög"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1.txt", b"caf\xe9", r"1\.txt is not UTF-8"),
        ("1.txt", b" \n", r"1\.txt: the caption is empty"),
        ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", r"metadata\.csv is not UTF-8"),
        ("metadata.csv", b"file_name,text\n0.png,\n", r"metadata\.csv, 0\.png: the caption is empty"),
        ("metadata.csv", b"file_name,text\n0.png\n", r"metadata\.csv: file_name and text .* must be text"),
        (
            "metadata.csv",
            b"file_name,text\n0.png,a\n0.png,b\n",
            r"metadata\.csv lists an image more than once",
        ),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": null}\n', r"metadata\.jsonl: .* must be text"),
    ],
)
def test_rejects_captions(captioned_folder: Path, name: str, content: bytes, message: str) -> None:
    (captioned_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ImageFolder(captioned_folder, 8, 3)


def test_rejects_images_in_deeper_folders(class_folder: Path, write_image: Write) -> None:
    write_image(class_folder / "cat" / ".cache" / "hidden.png", 0)
    assert len(ImageFolder(class_folder, 8, 3)) == 6
    for place in ("left/1.png", "left/2.png", "right/far/3.png"):
        write_image(class_folder / "cat" / place, 0)
    with pytest.raises(
        ValueError, match=r"deeper than one folder of each class, in cat/left, cat/right/far;"
    ):
        ImageFolder(class_folder, 8, 3)


def test_identity_is_that_of_names_and_conditions(class_folder: Path, write_image: Write) -> None:
    first = ImageFolder(class_folder, 8, 3).identity
    assert first.startswith("6 images, ")
    moved = class_folder.rename(class_folder.with_name("moved"))
    assert ImageFolder(moved, 8, 3).identity == first
    assert ImageFolder(moved, 8, 3, caption="x").identity != first
    write_image(moved / "cat" / "more.png", 0)
    assert ImageFolder(moved, 8, 3).identity.startswith("7 images, ")


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
