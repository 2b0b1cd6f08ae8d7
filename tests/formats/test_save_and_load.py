"""Our own adapter file: what it holds, that it is whole or absent, and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from kronafuse import KronA, LoKr, LoRA, __version__, attach, formats
from kronafuse.formats import AdapterFile, digest, reading
from kronafuse.formats import tensors as tensors_module
from kronafuse.formats.header import sealed
from safetensors import safe_open
from safetensors import torch as safetensors_torch
from torch import nn

SPECS = [
    KronA((8, 4), targets=("to_q", "to_v"), shuffled=True, scale=0.5),
    LoKr(4, 2, 1.0, decompose_both=True, targets=("to_q", "to_v"), per_target={"to_v": {"factor": 8}}),
    LoRA(3, targets=("to_v",), dtype=torch.bfloat16),
]


A = "blocks.0.to_q.lokr_a"


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
    assert (header["format_version"], header["kronafuse_version"]) == (2, __version__)
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
    real = tensors_module.serialize_file

    def half(tensors, filename, metadata):
        real(tensors, filename, metadata)
        os.truncate(filename, os.path.getsize(filename) // 2)
        raise error

    monkeypatch.setattr(tensors_module, "serialize_file", half)
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


def rewritten(path: Path, change, seal: bool = True) -> None:
    """Change header and tensors of a file; `seal` gives it the digest of what it holds then."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["kronafuse"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    if seal:
        header.pop("digest", None)
        header = sealed(header, tensors)
    safetensors_torch.save_file(tensors, path, {"kronafuse": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda header, _: header.update(format_version=3), "has format version 3, written by kronafuse"),
        (lambda header, _: header.update(format_version=1), "is damaged: .*has unknown fields digest"),
        (lambda header, _: header.update(format_version="new"), "metadata of .* is damaged: ValueError"),
        (lambda header, _: header.update(format_version=-1), "format_version must be a positive .* got -1"),
        (lambda header, _: header.update(format_version=1.5), "format_version must be a positive .* got 1.5"),
        (lambda header, _: header.update(scale=math.nan), "scale must be a finite number; got nan"),
        (lambda header, _: header["spec"].update(targets="to_q"), "targets must be a tuple"),
        (
            lambda _, tensors: tensors.update({"blocks.0.to_q.lokr_a": torch.ones(8, 4, dtype=torch.int8)}),
            r"a\.safetensors: blocks\.0\.to_q\.lokr_a must be float32, .* got I8",
        ),
        (
            lambda _, tensors: tensors["blocks.0.to_q.lokr_a"].fill_(math.inf),
            r"a\.safetensors: blocks\.0\.to_q\.lokr_a must be finite; got NaN or infinity",
        ),
        (lambda header, _: header.pop("spec"), "metadata of .* is damaged: .*it lacks spec"),
        (lambda header, _: header.pop("modules"), "metadata of .* is damaged: .*it lacks modules"),
        (lambda header, _: header.pop("format_version"), "metadata of .* is damaged: KeyError"),
        (lambda header, _: header.update(more=1), "metadata of .* is damaged: .*has unknown fields more"),
        (lambda header, _: header["spec"].pop("shuffled"), "is damaged: .*KronA lacks fields shuffled"),
        (lambda header, _: header.update(spec="{"), "metadata of .* is damaged"),
        (lambda header, _: header.update(spec={"kind": "DoRA"}), "kind must be one of KronA, LoKr, LoRA"),
        (lambda header, _: header.update(modules=[1]), "metadata of .* is damaged"),
        (lambda header, _: header["modules"].update({"blocks.0.to_q": [7, 32]}), "does not divide N = 7"),
        (
            lambda header, _: header["modules"].update({"blocks.0.to_q": [True, 32]}),
            "integers from 1 to 2147483647; got",
        ),
        (
            lambda header, _: header["modules"].update({"blocks.0.to_q": [32]}),
            "must be \\[N, K\\], integers from 1",
        ),
        (lambda header, _: header.update(scale="much"), "metadata of .* is damaged"),
        (
            lambda _, tensors: tensors.pop("blocks.0.to_q.lokr_a"),
            r"metadata says: blocks\.0\.to_q\.lokr_a must be \(8, 4\), as the spec and the modules say; got none",
        ),
        (
            lambda _, tensors: tensors.update(extra=torch.zeros(1)),
            r"metadata says: extra must be none, as the spec and the modules say; got \(1,\)",
        ),
        (
            lambda _, tensors: tensors.update({"blocks.0.to_q.lokr_a": torch.zeros(4, 8)}),
            r"must be \(8, 4\), as the spec and the modules say; got \(4, 8\)",
        ),
    ],
)
def test_damaged_and_newer_files(change, text, tmp_path):
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    rewritten(path, change)
    with pytest.raises(ValueError, match=text):
        formats.load(path)


CHANGED = {
    "scale": lambda header, _: header.update(scale=0.25),
    "shuffled": lambda header, _: header["spec"].update(shuffled=False),
    "a module's order": lambda header, _: header.update(modules=dict(reversed(header["modules"].items()))),
    "a value": lambda _, tensors: tensors["blocks.0.to_q.lokr_a"][0, 0].add_(1e-6),
    "dtype": lambda _, tensors: tensors.update(
        {name: each.view(torch.float16) for name, each in tensors.items() if each.dtype == torch.bfloat16}
    ),
    "names": lambda _, tensors: tensors.update(
        {
            "blocks.0.to_v.lokr_b": tensors["blocks.1.to_v.lokr_b"],
            "blocks.1.to_v.lokr_b": tensors["blocks.0.to_v.lokr_b"],
        }
    ),
    "digest": lambda header, _: header.update(digest="0" * 64),
    "kind of digest": lambda header, _: header.update(digest=None),
}
"""What each leaves is a file that is right in itself."""


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_not_as_it_was_written_is_refused(change, tmp_path):
    path = tmp_path / "a.safetensors"
    spec = LoRA(3, targets=("to_q", "to_v"), dtype=torch.bfloat16) if change == "dtype" else SPECS[0]
    formats.save(path, adapted(spec)[1])
    if change == "a module's order":  # says nothing else
        rewritten(path, CHANGED[change], seal=False)
        assert formats.load(path).spec == spec
        return
    rewritten(path, CHANGED[change], seal=False)
    with pytest.raises(
        ValueError, match=r"a\.safetensors is not as it was written: the digest of its header and"
    ):
        formats.load(path)
    if not change.endswith("digest"):
        rewritten(path, lambda *_: None)
        formats.load(path)


def test_a_file_without_a_digest_loads_with_a_warning(tmp_path):
    """Format version 1: the same fields, all of them required, and no digest."""
    path = tmp_path / "a.safetensors"
    attachment = adapted()[1]
    formats.save(path, attachment)

    def older(header, _):
        header.update(format_version=1)
        del header["digest"]

    rewritten(path, older, seal=False)
    with pytest.warns(
        UserWarning, match=r"a\.safetensors has format version 1, which has no digest, .*save\(path"
    ):
        file = formats.load(path)
    assert file.spec == attachment.spec
    assert all(torch.equal(each, attachment.state_dict()[name]) for name, each in file.tensors.items())
    formats.save(path, file)
    formats.load(path)  # warnings are errors here
    rewritten(path, lambda *parts: (older(*parts), parts[0]["spec"].pop("scale")), seal=False)
    with pytest.raises(ValueError, match=r"is damaged: .*KronA lacks fields scale"):
        formats.load(path)


def with_header(path: Path, change) -> None:
    """Change the bytes of a safetensors file's own header, and what says how long it is."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = change(raw[8:end])
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (rb"\"scale\": 1.0", rb"\"scale\": 1.0, \"scale\": 2.0", "key 'scale' is there twice in one object"),
        (
            rb"\"shuffled\": true",
            rb"\"shuffled\": true, \"shuffled\": false",
            "key 'shuffled' is there twice",
        ),
        (b'{"__meta', b'{"__metadata__":{"kronafuse":"{}"},"__meta', "key '__metadata__' is there twice"),
        (b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"', "key 'dtype' is there twice"),
        (b'"dtype":"F32"', b'"dtype":"F32","more":1', "must say data_offsets, dtype, shape of 'blocks"),
        (b'"shape":[8,4]', b'"shape":[8.0,4]', "shape of 'blocks.* must be a list of integers"),
    ],
)
def test_keys_that_are_there_twice_or_unknown_are_refused(old, new, text, tmp_path):
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    assert old in path.read_bytes()
    with_header(path, lambda header: header.replace(old, new, 1))
    with pytest.raises(ValueError, match=text):
        formats.load(path)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    name = b'"blocks.0.to_q.lokr_a":'
    with_header(
        path,
        lambda header: header.replace(
            name, name + b'{"dtype":"I8","shape":[1],"data_offsets":[0,1]},' + name
        ),
    )
    with pytest.raises(ValueError, match=r"key 'blocks\.0\.to_q\.lokr_a' is there twice"):
        formats.load(path)


def contents(path: Path):
    file = formats.load(path)
    return file.spec, file.modules, file.scale, {name: each.tolist() for name, each in file.tensors.items()}


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """All bits of the header and some of the data. An E for an e in a number may say the same as before."""
    path = tmp_path / "a.safetensors"
    model = Net(width=8, blocks=1)
    formats.save(path, attach(model, LoKr(2, 1, 0.1, scale=1e-05, targets=("to_v",))))
    raw = path.read_bytes()
    wanted = contents(path)
    header = 8 * (8 + int.from_bytes(raw[:8], "little"))
    silent = []
    for bit in [*range(header), *range(header, 8 * len(raw), 7)]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = contents(path)
        except ValueError:
            continue
        assert found == wanted, bit
        silent.append(bit)
    assert len(silent) <= 2


def test_a_loaded_file_does_not_change_with_the_disk(tmp_path):
    """Another program may write over the file in its place."""
    path = tmp_path / "a.safetensors"
    formats.save(path, adapted()[1])
    file = formats.load(path)
    before = {name: each.clone() for name, each in file.tensors.items()}
    size = path.stat().st_size
    with path.open("r+b") as at:
        at.write(bytes(size))
    assert all(torch.equal(each, before[name]) for name, each in file.tensors.items())


def test_the_digest_is_what_is_documented(tmp_path):
    """Computed here again with hashlib and NumPy, for every dtype and for tensors that lie in columns."""
    header = {"b": [1, 2.5, None], "a": "é"}
    tensors = {
        "y": torch.arange(6.0).view(2, 3).T,
        "x": torch.tensor(2.0, dtype=torch.bfloat16),
        "w": torch.tensor([1.5], dtype=torch.float64),
        "v": torch.empty(0, 3, dtype=torch.float16),
    }
    expected = hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5,null]}')
    expected.update(b'["v","float16",[0,3]]')
    expected.update(b'["w","float64",[1]]' + np.array([1.5]).tobytes())
    expected.update(b'["x","bfloat16",[]]' + b"\x00\x40")
    expected.update(b'["y","float32",[3,2]]' + np.array([0, 3, 1, 4, 2, 5], dtype="<f4").tobytes())
    assert digest.digest(header, tensors) == expected.hexdigest()
    swapped = digest.swapped(tensors["y"].contiguous())
    assert bytes(digest.memory(swapped)) == np.array([0, 3, 1, 4, 2, 5], dtype=">f4").tobytes()
    assert swapped.shape == (3, 2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_the_bytes_are_those_that_safetensors_writes(spec, tmp_path):
    formats.save(tmp_path / "a.safetensors", adapted(spec)[1])
    rewritten(tmp_path / "a.safetensors", lambda *_: None)  # by safetensors' own function, which needs NumPy
    again = (tmp_path / "a.safetensors").read_bytes()
    formats.save(tmp_path / "a.safetensors", adapted(spec)[1])
    assert again == (tmp_path / "a.safetensors").read_bytes()


def test_older_safetensors_get_the_same_bytes(tmp_path, monkeypatch):
    """Before 0.8 it took bytes in the place of addresses."""
    written = {}
    monkeypatch.delattr(safetensors, "TensorSpec", raising=False)
    monkeypatch.setattr(
        tensors_module, "serialize_file", lambda records, path, _: written.update(records, path=path)
    )
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T
    with pytest.raises(ValueError, match="it has 0 bytes"):  # nothing was written
        tensors_module.save_tensors({"a": tensor}, tmp_path / "a")
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert written["a"] == {"dtype": "bfloat16", "shape": [3, 2], "data": data}


RECORDS = {
    "a factor too few": (
        lambda tensors: tensors.pop("blocks.0.to_q.lokr_a"),
        ValueError,
        r"lokr_a must be \(8, 4\), .*none",
    ),
    "a factor too many": (
        lambda tensors: tensors.update(x=torch.ones(1)),
        ValueError,
        r"x must be none, .*got \(1,\)",
    ),
    "meta": (
        lambda tensors: tensors.update({A: tensors[A].to("meta")}),
        ValueError,
        "lokr_a must have values; it is on",
    ),
    "sparse": (
        lambda tensors: tensors.update({A: tensors[A].to_sparse()}),
        TypeError,
        r"must be a dense tensor \(layout torch.strided\); got layout torch.sparse_coo",
    ),
    "no tensor": (lambda tensors: tensors.update({A: [1.0]}), TypeError, "lokr_a must be a tensor; got list"),
    "integers": (
        lambda tensors: tensors.update({A: tensors[A].int()}),
        TypeError,
        "lokr_a must be float32, .*got int32",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_could_not_be_loaded_is_not_written(case, tmp_path):
    change, error, text = RECORDS[case]
    file = adapted()[1].adapter_file()
    tensors = dict(file.tensors)
    change(tensors)
    with pytest.raises(error, match=rf"formats\.save: .*{text}"):
        formats.save(tmp_path / "a.safetensors", AdapterFile(file.spec, file.modules, 1.0, tensors))
    assert files(tmp_path) == []


def test_a_header_that_would_not_be_read_is_not_written(tmp_path, monkeypatch):
    file = adapted()[1].adapter_file()
    long = {f"{'n' * 1001}": (32, 32)}
    with pytest.raises(
        ValueError, match=r"formats\.save: names of modules must have at most 1000 char.* has 1001"
    ):
        formats.save(tmp_path / "a", AdapterFile(file.spec, long, 1.0, {}))
    monkeypatch.setattr(reading, "MAX_COMMAS", 50)
    with pytest.raises(
        ValueError, match=r"formats\.save: .*/a would not be read again: .*at most 50 commas; it has"
    ):
        formats.save(tmp_path / "a", file)
    assert files(tmp_path) == []


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


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_saved_file_has_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        formats.save(tmp_path / "a.safetensors", adapted()[1])
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
