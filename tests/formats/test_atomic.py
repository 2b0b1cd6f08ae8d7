"""Files are whole or not there, and nothing is left of a writer that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kronafuse.formats.atomic import name_beside, remove_stale, replace_folder, written_beside
from kronafuse.formats.tensors import save_tensors
from safetensors.torch import load_file


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones((), requires_grad=True)}
    save_tensors(tensors, tmp_path / "t.safetensors", {"kind": "state"})
    found = load_file(tmp_path / "t.safetensors")
    assert {name: each.tolist() for name, each in found.items()} == {
        name: each.tolist() for name, each in tensors.items()
    }
    assert names(tmp_path) == ["t.safetensors"]


def test_tensors_on_a_disk_that_takes_no_more(tmp_path):
    """The system's own refusal, through a limit on the size of files, names the path."""
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from kronafuse.formats.tensors import save_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try: save_tensors({'a': torch.zeros(4096)}, Path(sys.argv[1]))\n"
        "except OSError as error: print(error.filename, error)\n"
    )
    path = tmp_path / "t.safetensors"
    command = [sys.executable, "-c", script, str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.startswith(f"{path} [Errno 5] cannot write the tensors: ")
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "t.safetensors"
    script = (
        "import os, signal, sys\n"
        "from kronafuse.formats.atomic import written_beside\n"
        "with written_beside(sys.argv[1]) as beside:\n"
        "    beside.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(".t.safetensors.")
    (tmp_path / left.replace(".t.", ".other.")).write_bytes(b"of another target")
    with written_beside(path) as beside:
        beside.write_bytes(b"whole")
    assert names(tmp_path) == [left.replace(".t.", ".other."), "t.safetensors"]
    assert path.read_bytes() == b"whole"


def test_folders_are_removed_and_writers_at_work_are_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = tmp_path / f".checkpoint.{ended.pid}.partial"
    stale.mkdir()
    (stale / "a").write_bytes(b"half")
    (tmp_path / f".checkpoint.{ended.pid}.0123abcd.partial").mkdir()
    at_work = name_beside(tmp_path / "checkpoint")
    at_work.mkdir()
    kept = [
        at_work.name,
        ".checkpoint.one.partial",
        f".checkpoint.{os.getppid()}.partial",
        f".checkpoint.7.{ended.pid}.0123abcd.partial",  # of checkpoint.7
    ]
    for name in kept[1:]:
        (tmp_path / name).write_bytes(b"")
    remove_stale(tmp_path / "checkpoint")
    assert names(tmp_path) == sorted(kept)


LEGAL_NAMES = {
    "248 characters": "n" * 248,
    "255 bytes": "n" * 255,
    "255 bytes of other letters": "é" * 127 + "n",
    "255 bytes of wide letters": "雪" * 85,
    "dots at the end": "name...",
    "spaces and a line break": " a\nb ",
    "undecodable bytes": os.fsdecode(b"\xff\xfe name"),
}


@pytest.mark.parametrize("name", LEGAL_NAMES.values(), ids=LEGAL_NAMES)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_every_legal_name_can_be_written_and_written_again(name, kind, tmp_path):
    """Temporary names are legal too, half-written ones are found again, and nothing is left."""
    path, ended = tmp_path / name, subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = name_beside(path)
    stale = stale.with_name(stale.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    stale.write_bytes(b"half")
    for text in (b"first", b"second"):
        if kind == "file":
            with written_beside(path) as beside:
                beside.write_bytes(text)
        else:
            with replace_folder(path) as folder:
                (folder / "part").write_bytes(text)
        assert (path if kind == "file" else path / "part").read_bytes() == text
        assert os.listdir(tmp_path) == [name]
    with pytest.raises(InterruptedError), written_beside(path) if kind == "file" else replace_folder(path):
        raise InterruptedError
    assert os.listdir(tmp_path) == [name]


def test_two_writers_of_one_process_do_not_share_a_file(tmp_path):
    """Each has its own temporary file, so that the bytes of the last to end are there whole."""
    first = written_beside(tmp_path / "a")
    with first as one, written_beside(tmp_path / "a") as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with (
            pytest.raises(FileExistsError, match=f"what is there is not a regular file: '.*{name}'"),
            written_beside(tmp_path / name),
        ):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_missing_folder(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"the folder does not exist: '.*nowhere'"),
        written_beside(tmp_path / "nowhere" / "a"),
    ):
        pass
