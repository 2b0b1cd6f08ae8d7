"""Files and folders are whole or absent, whatever interrupts the writing."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from kronafuse.train.files import replace_file, replace_folder, write_json

FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def break_off(writing: AbstractContextManager[Path], failure: BaseException) -> None:
    """Writes a part of a file, or of a file in a folder, and fails."""
    with writing as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("sec")
        raise failure


@pytest.mark.parametrize("failure", FAILURES, ids=["full_disk", "ctrl_c"])
def test_file_stays_whole(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "new" / "file"
    with replace_file(path) as partial:
        partial.write_text("first")
    with pytest.raises(type(failure)):
        break_off(replace_file(path), failure)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", FAILURES, ids=["full_disk", "ctrl_c"])
def test_folder_stays_whole(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "folder"
    with replace_folder(path) as partial:
        (partial / "a").write_text("first")
    with pytest.raises(type(failure)):
        break_off(replace_folder(path), failure)
    assert (path / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("a", "b"):
        with replace_folder(path) as partial:
            (partial / name).write_text(name)
    assert [each.name for each in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
