"""Our own adapter file: what it holds, that it is whole or absent, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kronafuse import KronA, LoKr, LoRA, __version__, attach, formats
from kronafuse.formats import AdapterFile
from safetensors import safe_open
from safetensors import torch as safetensors_torch
from torch import nn

SPECS = [
    KronA((8, 4), targets=("to_q", "to_v"), shuffled=True, scale=0.5),
    LoKr(4, 2, 1.0, decompose_both=True, targets=("to_q", "to_v"), per_target={"to_v": {"factor": 8}}),
    LoRA(3, targets=("to_v",), dtype=torch.bfloat16),
]


class Net(nn.Module):
    """Two blocks of projections; the seed fixes the weights in every process."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(width, width), "to_v": nn.Linear(width, width)})
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["to_v"](torch.tanh(block["to_q"](x)))
        return x


def x_of() -> torch.Tensor:
    return torch.linspace(-2, 2, 3 * 32).view(3, 32)


def adapted(spec=SPECS[0], seed: int = 1):
    model = Net()
    attachment = attach(model, spec)
    torch.manual_seed(seed)
    for factor in attachment.parameters():
        nn.init.normal_(factor)
    return model, attachment


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_round_trip(spec, tmp_path):
    model, attachment = adapted(spec)
    attachment.scale = 0.75
    path = tmp_path / "adapter.safetensors"
    formats.save(path, attachment)
    file = formats.load(path)
    assert file.spec == spec
    assert dict(file.modules) == attachment.modules
    assert file.scale == 0.75
    assert {name: each.dtype for name, each in file.tensors.items()} == {
        name: each.dtype for name, each in attachment.state_dict().items()
    }
    other = Net()
    before = other(x_of())
    with attach(other, file) as loaded:
        assert loaded.scale == 0.75
        assert loaded.spec == spec
        assert torch.equal(other(x_of()), model(x_of()))
        assert not torch.equal(other(x_of()), before)
    formats.save(tmp_path / "again.safetensors", file)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert files(tmp_path) == ["adapter.safetensors", "again.safetensors"]


def test_one_file_with_everything_in_its_metadata(tmp_path):
    _, attachment = adapted()
    formats.save(tmp_path / "a.safetensors", attachment)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert names == set(attachment.state_dict())
    assert list(metadata) == ["kronafuse"]
    header = json.loads(metadata["kronafuse"])
    assert (header["format_version"], header["kronafuse_version"]) == (1, __version__)
    assert header["spec"]["factors"] == [8, 4]
    assert header["modules"]["blocks.1.to_v"] == [32, 32]


def test_identical_outputs_in_another_process(tmp_path):
    model, attachment = adapted(SPECS[1])
    attachment.scale = 0.5
    formats.save(tmp_path / "a.safetensors", attachment)
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); torch.set_num_threads(1)\n"
        "from test_save_and_load import Net, x_of\n"
        "from kronafuse import attach, formats\n"
        "from safetensors.torch import save_file\n"
        "model = Net(); attach(model, formats.load(sys.argv[1] + '/a.safetensors'))\n"
        "save_file({'y': model(x_of()).detach()}, sys.argv[1] + '/y.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], check=True)
    assert torch.equal(safetensors_torch.load_file(tmp_path / "y.safetensors")["y"], model(x_of()))


def test_saved_after_remove(tmp_path):
    _, attachment = adapted()
    wanted = {name: each.clone() for name, each in attachment.state_dict().items()}
    attachment.remove()
    formats.save(tmp_path / "a.safetensors", attachment)
    assert all(
        torch.equal(each, wanted[name])
        for name, each in formats.load(tmp_path / "a.safetensors").tensors.items()
    )


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_save_leaves_the_old_file(error, existing, tmp_path, monkeypatch):
    """The error comes when half of the bytes are written."""
    path = tmp_path / "a.safetensors"
    _, attachment = adapted()
    if existing:
        formats.save(path, attachment)
        old = path.read_bytes()
    _, newer = adapted(seed=2)
    real = safetensors_torch.save_file

    def half(tensors, filename, metadata):
        real(tensors, filename, metadata)
        os.truncate(filename, os.path.getsize(filename) // 2)
        raise error

    monkeypatch.setattr(safetensors_torch, "save_file", half)
    with pytest.raises(type(error)):
        formats.save(path, newer)
    assert files(tmp_path) == (["a.safetensors"] if existing else [])
    if existing:
        assert path.read_bytes() == old


def test_interrupt_between_writing_and_renaming(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    old = path.read_bytes()

    def interrupt(_file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        formats.save(path, adapted(seed=2)[1])
    assert path.read_bytes() == old
    assert files(tmp_path) == ["a.safetensors"]


def test_a_disk_that_takes_no_more(tmp_path):
    """The system's own refusal, through a limit on the size of files."""
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    old = path.read_bytes()
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_save_and_load import SPECS, adapted\n"
        "from kronafuse import formats\n"
        "made = adapted(SPECS[0], 2)[1]\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try: formats.save(sys.argv[1], made)\n"
        "except OSError as error: print('OSError', error)\n"
    )
    command = [sys.executable, "-c", script, str(path), str(Path(__file__).parent)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "OSError" in result.stdout
    assert path.read_bytes() == old
    assert files(tmp_path) == ["a.safetensors"]


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real" / "a.safetensors")
    formats.save(tmp_path / "link.safetensors", adapted()[1])
    assert (tmp_path / "link.safetensors").is_symlink()
    assert files(tmp_path / "real") == ["a.safetensors"]


def test_save_refuses_other_formats_and_missing_folders(tmp_path):
    _, attachment = adapted()
    with pytest.raises(ValueError, match="format must be 'kronafuse' or 'unet_finetune'; got 'peft'"):
        formats.save(tmp_path / "a.safetensors", attachment, format="peft")
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        formats.save(tmp_path / "nowhere" / "a.safetensors", attachment)
    with pytest.raises(IsADirectoryError, match="a folder is there, not a file"):
        formats.save(tmp_path, attachment)
    for wrong in (Net(), attachment.state_dict(), attachment.spec):
        with pytest.raises(TypeError, match=f"or what formats.load returned; got {type(wrong).__name__}"):
            formats.save(tmp_path / "a.safetensors", wrong)
    next(attachment.parameters()).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"formats\.save: blocks\.0\.to_q\.lokr_a must be finite"):
        formats.save(tmp_path / "a.safetensors", attachment)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "spec",
    [
        KronA((8, 4), targets=("to_q",), scale=torch.tensor(0.5), shuffled=np.bool_(True)),
        LoRA(4, np.float32(8), targets=("to_q",)),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_every_spec_that_can_be_attached_can_be_saved(spec, tmp_path):
    formats.save(tmp_path / "a.safetensors", adapted(spec)[1])
    assert formats.load(tmp_path / "a.safetensors").spec == spec


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_file(keep, tmp_path):
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    size = path.stat().st_size
    os.truncate(path, keep if isinstance(keep, int) else int(keep * size))
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole safetensors file"):
        formats.load(path)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        formats.load(path)
    safetensors_torch.save_file({"unet.to_q.lora_A.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"has no entries, its first tensors are unet\.to_q\.lora_A\.weight"):
        formats.load(path)
    safetensors_torch.save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match="not one of kronafuse's: its metadata has format, its first tensors are weight"
    ):
        formats.load(path)
    with pytest.raises(FileNotFoundError, match=r"no such adapter file.*absent\.safetensors"):
        formats.load(tmp_path / "absent.safetensors")
    with pytest.raises(IsADirectoryError, match=r"formats\.load: a folder; name the adapter file in it"):
        formats.load(tmp_path)


def rewritten(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["kronafuse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    safetensors_torch.save_file(tensors, path, {"kronafuse": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda header, _: header.update(format_version=2), "has format version 2, written by kronafuse"),
        (lambda header, _: header.update(format_version="new"), "metadata of .* is damaged: ValueError"),
        (lambda header, _: header.update(format_version=-1), "format_version must be a positive .* got -1"),
        (lambda header, _: header.update(format_version=1.5), "format_version must be a positive .* got 1.5"),
        (lambda header, _: header.update(scale=math.nan), "scale must be a finite number; got nan"),
        (lambda header, _: header["spec"].update(targets="to_q"), "targets must be a tuple"),
        (
            lambda _, tensors: tensors.update({"blocks.0.to_q.lokr_a": torch.ones(8, 4, dtype=torch.int8)}),
            r"a\.safetensors: blocks\.0\.to_q\.lokr_a must be float32, .* got int8",
        ),
        (
            lambda _, tensors: tensors["blocks.0.to_q.lokr_a"].fill_(math.inf),
            r"a\.safetensors: blocks\.0\.to_q\.lokr_a must be finite; got NaN or infinity",
        ),
        (lambda header, _: header.pop("spec"), "metadata of .* is damaged: KeyError"),
        (lambda header, _: header.update(spec="{"), "metadata of .* is damaged"),
        (lambda header, _: header.update(spec={"kind": "DoRA"}), "kind must be one of KronA, LoKr, LoRA"),
        (lambda header, _: header.update(modules=[1]), "metadata of .* is damaged"),
        (lambda header, _: header.update(modules={"blocks.0.to_q": [7, 32]}), "does not divide N = 7"),
        (lambda header, _: header.update(scale="much"), "metadata of .* is damaged"),
        (
            lambda _, tensors: tensors.pop("blocks.0.to_q.lokr_a"),
            r"1 factors differ, the first blocks\.0\.to_q\.lokr_a",
        ),
        (
            lambda _, tensors: tensors.update(extra=torch.zeros(1)),
            r"the first extra: none by the metadata, \(1,\) in",
        ),
        (
            lambda _, tensors: tensors.update({"blocks.0.to_q.lokr_a": torch.zeros(4, 8)}),
            r"\(8, 4\) by the metadata, \(4, 8\) in the file",
        ),
    ],
)
def test_damaged_and_newer_files(change, text, tmp_path):
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    rewritten(path, change)
    with pytest.raises(ValueError, match=text):
        formats.load(path)


def test_file_of_another_model(tmp_path):
    formats.save(tmp_path / "a.safetensors", adapted()[1])
    file = formats.load(tmp_path / "a.safetensors")
    fewer = Net(blocks=1)
    with pytest.raises(
        ValueError,
        match=r"another model than this Net: 2 of its layers are missing: blocks\.1\.to_q, blocks\.1\.to_v",
    ):
        attach(fewer, file)
    wider = Net(width=64)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.to_q is \(32, 32\) in the file, \(64, 64\) in the model"
    ):
        attach(wider, file)
    for model in (fewer, wider):
        assert all(
            type(module) in (Net, nn.ModuleList, nn.ModuleDict, nn.Linear) for module in model.modules()
        )
        assert all(each.requires_grad for each in model.parameters())


def test_a_record_made_by_hand_is_checked(tmp_path):
    file = adapted()[1].adapter_file()
    tensors = dict(file.tensors) | {"blocks.0.to_q.lokr_a": torch.zeros(2, 2)}
    with pytest.raises(
        ValueError, match=r"1 of another shape: blocks\.0\.to_q\.lokr_a is \(2, 2\), expected \(8, 4\)"
    ):
        attach(Net(), AdapterFile(file.spec, file.modules, 1.0, tensors))
