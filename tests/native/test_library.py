"""What a library needs of others and shows them: it loads beside any Python, in torch 2.11 and later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import objects
import pytest
import torch
from kronafuse import native

OF_TORCH_2_11 = set((Path(__file__).parent / "torch_2_11_symbols.txt").read_text().split())
"""The C functions that libtorch_cpu.so of torch 2.11.0 exports: the stable ABI's and those it stands on."""
ALLOWED = {
    "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0",
    "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip
LIBRARIES = ("cpu", "cuda")
library = objects.built_library


@pytest.mark.parametrize("key", LIBRARIES)
def test_needs_torch_and_the_system_alone(key):
    assert objects.needed_libraries(library(key)) <= ALLOWED


@pytest.mark.parametrize("key", LIBRARIES)
def test_takes_no_symbol_that_torch_2_11_lacks(key):
    undefined = objects.undefined_symbols(library(key))
    of_torch = {name for name in undefined if name.startswith(("aoti_torch_", "torch_"))}
    assert of_torch, "a library without the dispatcher registers nothing"
    assert of_torch <= OF_TORCH_2_11, sorted(of_torch - OF_TORCH_2_11)


@pytest.mark.parametrize("key", LIBRARIES)
def test_takes_nothing_of_python_nor_of_unstable_torch(key):
    undefined = objects.undefined_symbols(library(key))
    assert not {name for name in undefined if name.lstrip("_").startswith("Py")}
    mangled = {name for name in undefined if name.startswith("_Z") and ("c10" in name or "2at" in name)}
    assert not mangled, "C++ functions of torch are no stable ABI"


@pytest.mark.parametrize("key", LIBRARIES)
def test_shows_nothing(key):
    """Operators register themselves at load; a symbol that is shown could stand in for another library's."""
    assert objects.exported_symbols(library(key)) == set()


def test_the_symbol_tests_see_symbols():
    with_shim = torch.__path__[0] + "/lib/libtorch_python.so"
    undefined = objects.undefined_symbols(Path(with_shim))
    assert {name for name in undefined if name.startswith("Py")}
    assert "libtorch_cpu.so" in objects.needed_libraries(Path(with_shim))


def test_loads_at_first_use_alone():
    """Importing kronafuse loads no library; asking for one does, and its operators are there."""
    library("cpu")
    code = (
        "import kronafuse, json\n"
        "maps = lambda: 'libkronafuse_cpu' in open('/proc/self/maps').read()\n"
        "before = maps()\n"
        "from kronafuse import native\n"
        "reasons, names = native.cpu_reasons(), dir(native.cpu())\n"
        "print(json.dumps([before, reasons, maps()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, [], True]


def test_the_cuda_library_loads_without_a_gpu():
    """It needs neither libcuda nor libtorch_cuda: what it registers is there under a torch without CUDA too."""
    path = library("cuda")
    code = f"import torch\ntorch.ops.load_library({str(path)!r})\nprint(torch.ops.kronafuse_cuda.merge)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kronafuse_cuda.merge" in done.stdout


@pytest.mark.parametrize(
    ("archs", "ptx", "capability", "runs"),
    [
        (["80"], None, (8, 0), True),
        (["80"], None, (8, 9), True),  # machine code runs on later minor versions
        (["86"], None, (8, 0), False),
        (["80"], None, (9, 0), False),  # and on no other major one
        (["80"], "80", (9, 0), True),  # where PTX serves
        (["80", "120"], "120", (10, 0), False),
        (["90a"], None, (9, 0), False),  # the plain kernels are not in it
        (["100"], "100", (10, 3), True),
    ],
)
def test_which_devices_a_build_serves(archs, ptx, capability, runs):
    assert native.runs_on(archs, ptx, capability) is runs


def fresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets `native` look into another folder, with nothing remembered."""
    monkeypatch.setattr(native, "LIBRARIES", folder)
    for function in (native.build_record, native._library_reasons, native._cuda_device_reasons):
        monkeypatch.setattr(native, function.__name__, function.__wrapped__)


def test_says_why_a_library_is_missing(monkeypatch, tmp_path):
    (tmp_path / native.RECORD).write_text(
        json.dumps({"cpu": {"built": False, "reason": "no C++ compiler was found"}})
    )
    fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(native.env, "emulates_cuda", lambda: False)
    assert native.cpu_reasons() == ["libkronafuse_cpu.so is not built: no C++ compiler was found"]
    with pytest.raises(
        RuntimeError, match=r"CPU kernels cannot run here:\n    libkronafuse_cpu.so is not built"
    ):
        native.cpu()
    device, library_reason = native.cuda_reasons(torch.device("cpu"))
    assert device == "its kernels run on CUDA devices, and the tensors are on cpu"
    assert library_reason == "libkronafuse_cuda.so is not built: kronafuse was not installed by its setup.py"
    with pytest.raises(RuntimeError, match="CUDA kernels cannot run here"):
        native.cuda(torch.device("cpu"))


@pytest.mark.parametrize(("driver", "runs"), [((12, 8), False), ((13, 0), True), ((14, 1), True)])
def test_a_driver_older_than_the_run_time_is_a_reason(monkeypatch, tmp_path, driver, runs):
    """The library brings its own CUDA run time, which an older driver refuses whatever torch was built with."""
    (tmp_path / native.CUDA).touch()
    entry = {"built": True, "nvcc": "13.0.88", "archs": ["90", "90a"], "ptx": None}
    (tmp_path / native.RECORD).write_text(json.dumps({"cuda": entry}))
    fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(native, "_load", lambda path: ())
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(native.env, "cuda_capability", lambda index: (9, 0))
    monkeypatch.setattr(native.env, "cuda_driver", lambda: driver)
    found = native.cuda_reasons(torch.device("cuda", 0))
    if runs:
        assert found == []
    else:
        (reason,) = found
        assert (
            "built by CUDA 13.0.88, whose run time needs a driver of CUDA 13 or later; this one's is 12.8"
            in reason
        )


@pytest.mark.parametrize(("status", "version"), [(0, (13, 2)), (3, None)])
def test_the_driver_itself_is_asked_for_its_version(monkeypatch, status, version):
    def get_version(pointer):
        pointer._obj.value = 13020
        return status

    names = []
    driver = SimpleNamespace(cuDriverGetVersion=get_version)
    monkeypatch.setattr(native.env.ctypes, "CDLL", lambda name: names.append(name) or driver)
    assert native.env.cuda_driver.__wrapped__() == version
    assert names == ["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"]


def test_without_a_driver_its_version_is_unknown(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(native.env.ctypes, "CDLL", missing)
    assert native.env.cuda_driver.__wrapped__() is None


def test_says_how_to_build_the_emulation(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "EMULATED", tmp_path / "libkronafuse_emulated.so")
    monkeypatch.setattr(native.env, "emulates_cuda", lambda: True)
    (reason,) = native.cuda_reasons(torch.device("cpu"))
    assert reason.endswith(
        "libkronafuse_emulated.so is not built: run python -m csrc.rules emulated in a clone"
    )
    with pytest.raises(RuntimeError, match="emulated CUDA kernels cannot run here"):
        native.emulated()


def test_a_library_that_does_not_load_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / native.CPU).write_bytes(b"not a library")
    fresh(monkeypatch, tmp_path)
    (reason,) = native.cpu_reasons()
    assert reason.startswith("libkronafuse_cpu.so does not load: ")
    with pytest.raises(RuntimeError, match="does not load"):
        native.cpu()


def test_a_build_for_other_architectures_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / native.CUDA).write_bytes(b"")
    record = {"cuda": {"built": True, "archs": ["80", "90a"], "ptx": None}}
    (tmp_path / native.RECORD).write_text(json.dumps(record))
    fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native.env, "cuda_capability", lambda index: (9, 0))
    (reason,) = native.cuda_reasons(torch.device("cuda", 0))
    assert reason == (
        "libkronafuse_cuda.so was built for 80, 90a (KRONAFUSE_CUDA_ARCHS), and this device is sm_90"
    )


def test_a_torch_without_cuda_is_a_reason(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.cuda_reasons(torch.device("cuda", 0)) == ["torch was built without CUDA"]
