"""Files made to cost time or memory, or to break their reader: each is refused as a ValueError, at once."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kronafuse import Bottleneck, KronA, LoKr, LoRA, attach, formats
from kronafuse.formats import AdapterFile
from kronafuse.formats.header import FORMAT_VERSION
from kronafuse.nn.spec_json import spec_to_dict
from torch import nn

SECONDS, MEGABYTES = 1.0, 100
"""What a refusal may take: time of the CPU, and memory that was not there before."""

HUGE = 10**400


def safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header, which may say that it has another length."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def metadata(text: str) -> bytes:
    return json.dumps({"__metadata__": {"kronafuse": text}}).encode()


def entry(*shape: int, start: int = 0) -> dict:
    size = 4
    for each in shape:
        size *= each
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, start + size]}


def adapter(path: Path, spec, modules, tensors=None, **fields) -> None:
    """A file of ours with these numbers, of which no tensor is right unless it is given."""
    described = spec if isinstance(spec, dict) else spec_to_dict(spec)
    header = {
        "format_version": FORMAT_VERSION,
        "kronafuse_version": "0",
        "spec": described,
        "scale": 1.0,
        "modules": modules,
        "digest": "0" * 64,
    } | fields
    tensors = {"m.lokr_a": entry(2, 2)} if tensors is None else tensors
    end = max((each["data_offsets"][1] for each in tensors.values()), default=0)
    safetensors(
        path, json.dumps({"__metadata__": {"kronafuse": json.dumps(header)}, **tensors}).encode(), bytes(end)
    )


def many_layers(path: Path) -> None:
    """1,000 layers with a record of their own each: right in everything but the digest."""
    whole = spec_to_dict(LoRA(1))
    names = [f"blocks.{place}.to_q" for place in range(1000)]
    tensors, start = {}, 0
    for name in names:
        for tensor, shape in (("lokr_b", (8, 1)), ("lokr_b_down", (1, 8))):
            tensors[f"{name}.{tensor}"] = entry(*shape, start=start)
            start += 32
    spec = {**whole, "per_target": dict.fromkeys(names, whole)}
    adapter(path, spec, {name: [8, 8] for name in names}, tensors)


def with_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "must be a regular file; it is a named pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "must be a regular file; it is a device"),
    "a socket": (
        with_socket,
        "must be a regular file; it is a socket",
    ),
    "a file of the kernel that waits": (
        lambda path: path.symlink_to("/proc/kmsg"),
        "it has 0 bytes, fewer than the length of a header",
    ),
    "an empty file": (lambda path: path.write_bytes(b""), "it has 0 bytes, fewer than the length of a header"),
    "a header longer than the file": (
        lambda path: safetensors(path, b"{}", length=2**63),
        "it has 10 bytes, and its header would have 9,223,372,036,854,775,808",
    ),
    "a header of 100 MB": (
        lambda path: (safetensors(path, b"{", length=10**8), os.truncate(path, 10**8 + 8)),
        "must have at most 8,388,608 bytes; it has 100,000,000",
    ),
    "a million values": (
        lambda path: safetensors(path, metadata(f'{{"modules": [{"{}," * 1_000_000}{{}}]}}')),
        "must have at most 300,000 commas; it has 1,000,000",
    ),
    "200,000 names": (
        lambda path: adapter(path, KronA(), {str(place): [1, 1] for place in range(70_000)}),
        "m.lokr_a must be none, as the spec and the modules say; got (2, 2)",
    ),
    "200,000 objects": (
        lambda path: safetensors(path, metadata(f'{{"modules": [{"{}," * 200_000}{{}}]}}')),
        "metadata of",
    ),
    "lists in lists": (lambda path: safetensors(path, b"[" * 10**6), "its JSON is nested too deep"),
    "lists in lists of the metadata": (
        lambda path: safetensors(path, metadata("[" * 10**6)),
        "its JSON is nested too deep",
    ),
    "specs in specs": (
        lambda path: adapter(path, json.loads('{"kind": "LoRA", "per_target": {"a": ' * 400 + "1" + "}}" * 400), {}),
        "LoRA lacks fields",
    ),
    "no UTF-8": (lambda path: safetensors(path, b"\xff\xfe{}"), "can't decode byte 0xff"),
    "a list for a header": (lambda path: safetensors(path, b"[]"), "its header must be an object; it is list"),
    "a shape of text": (lambda path: safetensors(path, b'{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}'),
                        "shape of 'a' must be a list of integers"),
    "N of 19 digits": (
        lambda path: adapter(path, KronA((1, 1)), {"m": [1_000_000_000_000_000_003, 32]}),
        "modules['m'] must be [N, K], integers from 1 to 2147483647; got [1000000000000000003, 32]",
    ),
    "N of 400 digits": (lambda path: adapter(path, LoKr(), {"m": [HUGE, 32]}), "integers from 1 to 2147483647"),
    "N of 0": (lambda path: adapter(path, LoKr(), {"m": [0, 32]}), "integers from 1 to 2147483647; got [0, 32]"),
    "N of -1": (lambda path: adapter(path, LoKr(), {"m": [-1, 32]}), "integers from 1 to 2147483647; got [-1"),
    "N of true": (lambda path: adapter(path, LoKr(), {"m": [True, 32]}), "from 1 to 2147483647; got [True, 32]"),
    "N of 2.0": (lambda path: adapter(path, LoKr(), {"m": [2.0, 32]}), "integers from 1 to 2147483647; got [2.0"),
    "a prime N in many layers": (
        lambda path: adapter(path, LoKr(), {f"m{place}": [2**31 - 1 - place, 32] for place in range(20_000)},
                             {f"m{place}.lokr_a": entry(1, 1, start=4 * place) for place in range(20_000)}),
        "m0.lokr_a must be",
    ),
    "no dividing factors": (
        lambda path: adapter(path, KronA((5, 7)), {f"m{place}": [2**31 - 1, 2**31 - 1] for place in range(9000)},
                             {f"m{place}.lokr_a": entry(1, 1, start=4 * place) for place in range(9000)}),
        "N1 = 5 does not divide N = 2147483647, whose divisors are 1, 2147483647",
    ),
    "a scale of 400 digits": (lambda path: adapter(path, KronA(), {"m": [64, 64]}, scale=HUGE), "is damaged"),
    "an alpha of 400 digits": (
        lambda path: adapter(path, {**spec_to_dict(LoRA()), "alpha": HUGE}, {"m": [64, 64]}),
        "is damaged",
    ),
    "a rank of 400 digits": (
        lambda path: adapter(path, {**spec_to_dict(LoRA()), "rank": HUGE}, {"m": [64, 64]}),
        "m.lokr_b must be (64, 1000000",
    ),
    "a scale of 10,000 digits": (
        lambda path: safetensors(path, metadata('{"format_version": 2, "scale": ' + "9" * 10_000 + "}")),
        "Exceeds the limit",
    ),
    "a Bottleneck of 400 digits": (
        lambda path: adapter(path, {**spec_to_dict(Bottleneck(form="compacter", width=8)), "terms": HUGE}, {}),
        "terms must divide the width H",
    ),
    "a Bottleneck of N = 2147483647": (
        lambda path: adapter(path, Bottleneck(), {"m": [2**31 - 1, 2**31 - 1]}),
        "m.down must be (60, 2147483647), as the spec and the modules say; got none",
    ),
    "a shape with 0": (
        lambda path: adapter(path, KronA((2, 2)), {"m": [2**31 - 2, 2]}, {"m.lokr_a": entry(2**31 - 2, 0)}),
        "m.lokr_a must be (2, 2), as the spec and the modules say; got (2147483646, 0)",
    ),
    "a shape of 400 digits": (
        lambda path: safetensors(path, b'{"a":{"dtype":"F32","shape":[%d,0],"data_offsets":[0,0]}}' % HUGE),
        "is not a whole safetensors file",
    ),
    "a name of a million dots": (
        lambda path: adapter(path, {**spec_to_dict(LoRA()), "per_target": {"x": spec_to_dict(LoRA())}},
                             {"." * 10**6: [8, 8]}),
        "names of modules must have at most 1000 characters; one has 1000000",
    ),
    "a record for each of 1,000 layers": (many_layers, "is not as it was written"),
    "tensors outside the file": (
        lambda path: adapter(path, LoRA(1), {"m": [8, 8]}, {"m.lokr_b": entry(8, 1, start=10**6)}),
        "is not a whole safetensors file",
    ),
}  # fmt: skip

NAME = "middle_block.1.transformer_blocks.0.adapter_inout.pt"
"""A U-Net may have this adapter alone."""
OTHER = "input_blocks.1.1.transformer_blocks.0.adapter_inout.pt"
STATE = {
    "adp.0.weight": torch.ones(4, 32),
    "adp.0.bias": torch.ones(4),
    "adp.2.weight": torch.ones(32, 4),
    "adp.2.bias": torch.ones(32),
}


def compressed(path: Path) -> None:
    """A file of torch.save whose tensors are packed a thousand times smaller, which torch's reader unpacks."""
    torch.save({name: torch.zeros(2**22) for name in STATE}, path)
    with zipfile.ZipFile(path) as whole:
        records = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in records.items():
            packed.writestr(name, data)


class Call:
    """A call that a pickle asks for."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def folder_with(write: Callable[[Path], object], name: str = NAME) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        folder.mkdir()
        write(folder / name)

    return make


def saved(**changes) -> Callable[[Path], object]:
    return folder_with(lambda path: torch.save(STATE | changes, path))


NOT_EXECUTED = "is no torch.save file of tensors alone; it has not been executed"

FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (folder_with(os.mkfifo), "adapter_inout.pt must be a regular file; it is a named pipe"),
    "a file of the kernel that waits": (
        folder_with(lambda path: path.symlink_to("/proc/kmsg")),
        "is not a whole torch.save file: it is empty",
    ),
    "a folder": (folder_with(Path.mkdir), "adapter_inout.pt must be a regular file; it is a folder"),
    "a repeated element": (
        saved(**{"adp.0.weight": torch.zeros(1).expand(60_000, 60_000)}),
        "its tensors would have 14,400,000",
    ),
    "repeated elements of no stride": (
        saved(**{"adp.0.weight": torch.zeros(17_999).as_strided((9000, 9000), (1, 1))}),
        "its tensors would have 324,000",
    ),
    "compressed records": (folder_with(compressed), "is compressed, which torch.save does not do"),
    "a pickle of 100 MB": (
        folder_with(lambda path: (path.write_bytes(b"\x80\x02" + b"N0" * 50_000), os.truncate(path, 10**8))),
        "is not a whole torch.save file: ",
    ),
    "a pickle of 1 MB in a zip file": (
        saved(**{f"more {place}": torch.zeros(1) for place in range(900)}),
        "data.pkl has ",
    ),
    "many records": (
        saved(**{f"more {place}": torch.zeros(1) for place in range(1100)}),
        "records, more than 1,000",
    ),
    "a tensor that is made by a call": (saved(x=Call(torch.Tensor, 60_000, 60_000)), NOT_EXECUTED),
    "bytes that are made by a call": (saved(x=Call(bytearray, 10**9)), NOT_EXECUTED),
    "bytes that are made by a call, without a zip file": (
        folder_with(lambda path: path.write_bytes(pickle.dumps({"x": Call(bytearray, 10**9)}, 2))),
        NOT_EXECUTED,
    ),
    "a call without a name": (
        folder_with(lambda path: path.write_bytes(pickle.dumps({"x": Call(bytearray, 10**9)}, 4))),
        NOT_EXECUTED,
    ),
    "a sparse tensor": (saved(**{"adp.0.bias": torch.ones(4).to_sparse()}), NOT_EXECUTED),
    "a meta tensor": (saved(**{"adp.0.bias": torch.ones(4, device="meta")}), NOT_EXECUTED),
    "a block of level 333": (
        folder_with(lambda path: torch.save(STATE, path), OTHER.replace("blocks.1.", "blocks.999.")),
        "input_blocks.999.1.transformer_blocks.0.adapter_inout.pt, which is no adapter",
    ),
    "a block of a long number": (
        folder_with(lambda path: torch.save(STATE, path), OTHER.replace("blocks.1.", f"blocks.{'9' * 150}.")),
        "which is no adapter",
    ),
    "layer 999": (
        folder_with(lambda path: torch.save(STATE, path), OTHER.replace("blocks.0.", "blocks.999.")),
        "which is no adapter",
    ),
    "the last level and layer that are named": (
        folder_with(lambda path: torch.save(STATE, path), "input_blocks.34.1.transformer_blocks.63.adapter_inout.pt"),
        "are missing, the first",
    ),
    "a description that is a pipe": (folder_with(os.mkfifo, "kronafuse.json"), "must be a regular file; it is a named"),
    "a description of 1 GB": (
        folder_with(lambda path: (path.touch(), os.truncate(path, 10**9)), "kronafuse.json"),
        "kronafuse.json must have at most 8,388,608 bytes; it has 1,000,000,000",
    ),
    "lists in lists of the description": (
        folder_with(lambda path: path.write_bytes(b"[" * 10**6), "kronafuse.json"),
        "its JSON is nested too deep",
    ),
    "a key of the description that is there twice": (
        folder_with(lambda path: path.write_bytes(b'{"scale": 1.0, "scale": 2.0}'), "kronafuse.json"),
        "the key 'scale' is there twice",
    ),
}  # fmt: skip

MEASURE = """
import json, sys, time
from pathlib import Path
from kronafuse import Bottleneck, formats

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}

spec = Bottleneck("attn1_out", "block_out", 4)
loads = {"files": formats.load, "folders": lambda path: formats.unet_finetune.load(path, spec)}
results = {}
for path in sorted(Path(sys.argv[1]).glob("*/*")):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, start = peak()["VmRSS"], time.process_time()
    try:
        loads[path.parent.name](path)
        said = ["nothing", ""]
    except BaseException as error:
        said = [type(error).__name__, str(error)]
    results[f"{path.parent.name}/{path.name}"] = [*said, time.process_time() - start, peak()["VmHWM"] - before]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What loading every file in one process says, and the time and memory that each takes."""
    folder = tmp_path_factory.mktemp("hostile")
    for kind, cases in (("files", FILES), ("folders", FOLDERS)):
        (folder / kind).mkdir()
        for name, (make, _) in cases.items():
            make(folder / kind / name)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 10**6:
            path.unlink()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux says it")
@pytest.mark.parametrize(
    "case", [*(f"files/{name}" for name in FILES), *(f"folders/{name}" for name in FOLDERS)]
)
def test_each_is_refused_at_once(refusals, case):
    kind, _, name = case.partition("/")
    _, text = (FILES if kind == "files" else FOLDERS)[name]
    error, said, seconds, megabytes = refusals[case]
    assert error == "ValueError", said
    assert text in said
    assert name in said, "the file is not named"
    assert len(said) < 2000
    assert seconds < SECONDS, seconds
    assert megabytes < MEGABYTES, megabytes


def test_a_record_made_by_hand_with_mad_numbers():
    """`attach` compares its sizes with the model's before it works on them; `save` before it writes them."""
    model = nn.Sequential(nn.Linear(8, 8))
    for size in ((1_000_000_000_000_000_003, 8), (0, 8), (-8, 8), (HUGE, 8)):
        record = AdapterFile(LoKr(targets=("0",)), {"0": size}, 1.0, {})
        with pytest.raises(ValueError, match=r"1 have another \(N, K\)"):
            attach(model, record)
        with pytest.raises(
            ValueError, match=r"formats\.save: modules\['0'\] must be \[N, K\], integers from 1"
        ):
            formats.save("unused", record)
