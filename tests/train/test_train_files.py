"""Folders are whole or absent, whatever interrupts the writing; an output that refuses is named at once."""

from __future__ import annotations

import errno
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from kronafuse.train.files import file_name, prepare_output, replace_folder, write_json

FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def break_off(writing: AbstractContextManager[Path], failure: BaseException) -> None:
    """Writes a part of a file in a folder and fails."""
    with writing as partial:
        (partial / "a").write_text("sec")
        raise failure


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


@pytest.mark.parametrize("stop", [1, 2])
def test_ctrl_c_between_the_renames_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Right after the old folder is put aside, and right after the new one took its place."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("first")
    rename, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(target)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replace_folder(path) as partial:
        partial.joinpath("a").write_text("second")
    assert (path / "a").read_text() == ("first" if stop == 1 else "second")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("folder", f".folder.{2**22 + 1}.partial", ".folder.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("left")
    with replace_folder(path) as partial:
        (partial / "a").write_text("new")
    assert (path / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_output_that_refuses_is_named(tmp_path: Path) -> None:
    prepare_output(tmp_path / "new" / "output")
    assert list((tmp_path / "new" / "output").iterdir()) == []
    (tmp_path / "file").write_text("here already")
    with pytest.raises(OSError, match=r"output folder .*file cannot be written to: File exists"):
        prepare_output(tmp_path / "file")
    with pytest.raises(OSError, match=r"output folder .*below cannot be written to: Not a directory"):
        prepare_output(tmp_path / "file" / "below")


def test_json_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_names_of_users_become_names_of_files_that_differ() -> None:
    plain = ["lr", "clip_similarity", "a-b.c", "FID", "0", "com10"]
    assert [file_name(name) for name in plain] == plain
    odd = {
        "optim/lr": "optim_lr~", "optim\\lr": "optim_lr~", "optim:lr": "optim_lr~", "..": "__~", ".a": "_a~",
        "a.": "a_~", "": "~", "con": "_con~", "COM1.x": "_COM1.x~", "x~y": "x_y~", "größe": "größe~",
        "a b": "a_b~", "\udcff\0\n": "___~", "x" * 300: "x" * 100 + "~", "é" * 300: "é" * 50 + "~",
    }  # fmt: skip
    for name, begin in odd.items():
        assert re.fullmatch(re.escape(begin) + "[0-9a-f]{10}", file_name(name))
        assert file_name(name) == file_name(name)
    assert len({file_name(name).casefold() for name in (*plain, *odd)}) == len(plain) + len(odd)
    assert len({file_name(name, ["Lr", "lr", "LR"]).casefold() for name in ("Lr", "lr", "LR")}) == 3
