"""The build: switches, rules by file name, what is compiled again, and what is said where a compiler is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from csrc.rules import building, commands, libraries, ptxas, record, sources, toolchain
from csrc.rules.ninja_file import BuildError, NinjaFile
from csrc.rules.paths import CSRC, ROOT
from csrc.rules.switches import DEFAULT_ARCHS, SwitchError, Switches
from setuptools import Distribution

NVCC = toolchain.Nvcc(
    "nvcc", "13.0.88", ("75", "80", "86", "89", "90", "100", "120"), Path("/usr/local/cuda")
)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


def test_switches_by_default():
    switches = Switches.read({})
    assert (switches.cpu, switches.cuda, switches.archs, switches.one) == ("auto", "auto", None, False)
    assert switches.jobs == os.cpu_count()


def test_switches_as_asked():
    switches = Switches.read(
        {
            "KRONAFUSE_BUILD_CPU": "1",
            "KRONAFUSE_BUILD_CUDA": "0",
            "KRONAFUSE_CUDA_ARCHS": "80;90a, 90 90a",
            "KRONAFUSE_CUDA_INSTANCES": "one",
            "MAX_JOBS": "3",
        }
    )
    assert switches == Switches(cpu="1", cuda="0", archs=("80", "90a", "90"), one=True, jobs=3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("KRONAFUSE_BUILD_CPU", "yes", "KRONAFUSE_BUILD_CPU must be one of auto, 1, 0; got 'yes'"),
        ("KRONAFUSE_BUILD_CUDA", "", "KRONAFUSE_BUILD_CUDA must be one of auto, 1, 0; got ''"),
        ("KRONAFUSE_CUDA_INSTANCES", "two", "KRONAFUSE_CUDA_INSTANCES must be one of all, one; got 'two'"),
        ("KRONAFUSE_CUDA_ARCHS", "8.0", "compute capabilities from 80 on without a dot, as '80;90a'"),
        ("KRONAFUSE_CUDA_ARCHS", "80;100a", "of which 90a alone has a letter; got '80;100a'"),
        ("KRONAFUSE_CUDA_ARCHS", "75", "compute capabilities from 80 on without a dot, as '80;90a'"),
        ("KRONAFUSE_CUDA_ARCHS", "", "got ''"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer; got '0'"),
    ],
)
def test_rejects_switches(name, value, message):
    with pytest.raises(SwitchError) as caught:
        Switches.read({name: value})
    assert message in str(caught.value)


def test_architectures_are_those_nvcc_knows():
    assert libraries.architectures(None, NVCC) == DEFAULT_ARCHS
    older = toolchain.Nvcc("nvcc", "12.4.0", ("80", "86", "89", "90"), NVCC.home)
    assert libraries.architectures(None, older) == ("80", "86", "89", "90", "90a")
    assert libraries.architectures(("90a", "90"), NVCC) == ("90a", "90")
    with pytest.raises(
        toolchain.Missing, match=r"nvcc 12\.4\.0 does not know 100, 120 .* knows 80, 86, 89, 90"
    ):
        libraries.architectures(("80", "100", "120"), older)
    with pytest.raises(toolchain.Missing, match="must name an architecture beside 90a"):
        libraries.architectures(("90a",), NVCC)


def test_code_is_generated_for_each_architecture_and_ptx_for_those_to_come():
    assert libraries.generate(("120", "80", "90a"), specific=False) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert libraries.generate(("80", "90a"), specific=True) == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A csrc of empty files."""
    files = (
        "cpu/bind.cpp", "cpu/mix_kernels.cpp", "cpu/mix.h", "cuda/bind.cpp", "cuda/linear.cu",
        "cuda/linear_sm90a.cu", "cuda/emulation/machine.cpp",
    )  # fmt: skip
    for name in files:
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(sources, "CSRC", tmp_path / "csrc")
    return tmp_path / "csrc"


def test_files_are_compiled_as_their_names_say(tree):
    assert [unit.name for unit in sources.cpu_units(x86=True)] == [
        "cpu.bind.cpp.o",
        "cpu.mix_kernels.cpp.scalar.o",
        "cpu.mix_kernels.cpp.avx2.o",
        "cpu.mix_kernels.cpp.avx512.o",
    ]
    assert [unit.level for unit in sources.cpu_units(x86=False)] == [None, "scalar"]
    with_hopper = [unit.source.name for unit in sources.cuda_units(("80", "90a"))]
    assert with_hopper == ["bind.cpp", "linear.cu", "linear_sm90a.cu"]
    assert [unit.source.name for unit in sources.cuda_units(("80",))] == ["bind.cpp", "linear.cu"]
    assert "machine.cpp" in [unit.source.name for unit in sources.emulated_units()]


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4kernILi4EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z4kernILi4EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4kernILi8EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z4kernILi8EEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem
"""


def test_reads_what_ptxas_says():
    first, second = ptxas.usages(PTXAS)
    assert (first.arch, first.registers, first.stack_bytes, first.shared_bytes) == ("80", 20, 0, 0)
    assert (second.arch, second.registers, second.stack_bytes) == ("90a", 255, 16)
    assert (second.spill_store_bytes, second.spill_load_bytes, second.shared_bytes) == (8, 12, 1024)
    if shutil.which("c++filt"):
        assert [first.kernel, second.kernel] == ["kern<4>", "kern<8>"]
    with pytest.raises(ValueError, match="not what it uses"):
        ptxas.usages("ptxas info    : Compiling entry function 'f' for 'sm_80'\n")


def test_kernel_names_lose_what_is_the_same_in_all():
    names = ["_ZN9kronafuse4cuda5plain4kernILi4EEEvPf", "plain_c"]
    if shutil.which("c++filt"):
        assert ptxas.demangled(names) == ["plain::kern<4>", "plain_c"]


@needs_compiler
def test_compiles_again_what_changed(tmp_path):
    compiler, folder = shutil.which("c++") or "", tmp_path / "with space"
    folder.mkdir()
    for name in ("first", "second"):
        include = '#include "shared.h"\n' if name == "first" else ""
        (folder / f"{name}.cpp").write_text(f"{include}int {name}() {{ return 1; }}\n")
    (folder / "shared.h").write_text("// one\n")

    def build() -> dict[str, int]:
        ninja, objects = NinjaFile(folder / "out"), []
        for name in ("first", "second"):
            objects.append(folder / "out" / f"{name}.o")
            command = [compiler, "-fPIC", "-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
            ninja.compile(objects[-1], folder / f"{name}.cpp", command)
        ninja.link(folder / "out" / "both.so", objects, [compiler, "-shared", "-o", "$out", "$in"])
        ninja.run(jobs=2)
        built = (path for path in (folder / "out").iterdir() if path.suffix in (".o", ".so"))
        return {path.name: path.stat().st_mtime_ns for path in built}

    before = build()
    assert set(before) == {"first.o", "second.o", "both.so"}
    assert build() == before
    time.sleep(0.02)
    (folder / "shared.h").write_text("// two\n")
    after = build()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"first.o", "both.so"}
    (folder / "second.cpp").write_text("int second() { return nothing; }\n")
    with pytest.raises(BuildError, match="nothing") as caught:
        build()
    assert "error" in caught.value.brief


def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without compilers."""
    for name in ("PATH", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    for function in (toolchain.cxx, toolchain.nvcc):
        monkeypatch.setattr(toolchain, function.__name__, function.__wrapped__)


def test_without_a_compiler_says_what_is_missing(monkeypatch, tmp_path, capsys):
    without_tools(monkeypatch)
    monkeypatch.setattr(building, "BUILD", tmp_path / "build")
    (tmp_path / "libkronafuse_cpu.so").write_text("of an earlier build")
    building.build(tmp_path, Switches(cuda="0"))
    cpu, cuda = capsys.readouterr().out.splitlines()
    assert cpu.startswith("kronafuse: libkronafuse_cpu.so is not built: no C++ compiler was found")
    assert cuda == "kronafuse: libkronafuse_cuda.so is not built: KRONAFUSE_BUILD_CUDA was 0"
    assert not (tmp_path / "libkronafuse_cpu.so").exists()
    entries = json.loads((tmp_path / record.NAME).read_text())
    assert [entries[key]["built"] for key in ("cpu", "cuda")] == [False, False]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (
            Switches(cpu="1", cuda="0"),
            "libkronafuse_cpu.so was asked for and cannot be built: no C\\+\\+ compiler",
        ),
        (
            Switches(cpu="0", cuda="1"),
            "libkronafuse_cuda.so was asked for and cannot be built: no C\\+\\+ compiler",
        ),
    ],
)
def test_what_was_asked_for_must_be_built(monkeypatch, tmp_path, switches, message):
    without_tools(monkeypatch)
    with pytest.raises(BuildError, match=message):
        building.build(tmp_path, switches)


@needs_compiler
def test_without_nvcc_says_so(monkeypatch):
    def missing() -> toolchain.Nvcc:
        raise toolchain.Missing("nvcc was not found")

    monkeypatch.setattr(toolchain, "nvcc", missing)
    assert building.refusal("cuda", Switches()) == "nvcc was not found"
    assert building.refusal("cpu", Switches()) is None


@needs_compiler
def test_what_cannot_be_built_is_said_before_anything_is_compiled(monkeypatch, tmp_path):
    refusals = {"cpu": None, "cuda": "nvcc was not found"}
    monkeypatch.setattr(building, "refusal", lambda key, _: refusals[key])
    monkeypatch.setattr(building, "build_one", lambda *_: pytest.fail("it compiled"))
    with pytest.raises(BuildError, match=r"libkronafuse_cuda\.so was asked for .* nvcc was not found"):
        building.build(tmp_path, Switches(cuda="1"))


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Makes an executable that prints something, found by nothing remembered."""

    def make(name: str, prints: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat << 'END' | tee /dev/stderr\n{prints}\nEND\n")
        path.chmod(0o755)
        return path

    for function in (toolchain.nvcc, toolchain.ninja):
        monkeypatch.setattr(toolchain, function.__name__, function.__wrapped__)
    return make


def test_cuda_home_is_taken_at_its_word(monkeypatch, tmp_path, tool):
    monkeypatch.setenv("PATH", f"{tool('path/nvcc', 'V13.0.88').parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    with pytest.raises(toolchain.Missing, match=r"nvcc was not found \(.*/home/bin/nvcc\)"):
        toolchain.nvcc()
    tool("home/bin/nvcc", "#$ TOP=/usr/local\nV11.8.89")
    with pytest.raises(
        toolchain.Missing, match=r"nvcc must be 12\.5 or later; .*/home/bin/nvcc is 11\.8\.89"
    ):
        toolchain.nvcc()


def test_finds_ninja_of_the_path(monkeypatch, tool):
    """As in pip's build isolation, where ninja is importable and its program is elsewhere than Python's."""
    path = tool("overlay/bin/ninja")
    monkeypatch.setattr(toolchain.sys, "executable", str(path.parents[2] / "environment" / "bin" / "python"))
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR="", __spec__=object()))
    monkeypatch.setenv("PATH", str(path.parent))
    assert toolchain.ninja() == str(path)
    path.unlink()
    with pytest.raises(toolchain.Missing, match="ninja was not found"):
        toolchain.ninja()


@pytest.mark.parametrize(
    ("said", "brief"),
    [
        ("[1/1] FAILED: a.o\ng++ -c a.cpp -o a.o\na.cpp:1: error: no\n", "a.cpp:1: error: no"),
        (
            "[2/2] a.so\nFAILED: a.so\ng++ -o a.so a.o\n/bin/sh: 1: mv: not found\n",
            "/bin/sh: 1: mv: not found",
        ),
        ("ninja: Entering directory `b'\n[1/2] a.cpp\nFAILED: a.o\ng++ -o a.o\nKilled\n", "Killed"),
        (
            "[3/3] a.so\na.cpp:(.text+0x9): undefined reference to `f()'\ncollect2: error: ld returned 1\n",
            "a.cpp:(.text+0x9): undefined reference to `f()'; collect2: error: ld returned 1",
        ),
    ],
)
def test_the_brief_of_a_failure_is_what_failed(said, brief):
    assert BuildError(said).brief == brief


@needs_compiler
def test_an_interrupted_link_leaves_the_earlier_library(tmp_path):
    source, library = tmp_path / "one.cpp", tmp_path / "out" / "one.so"
    source.write_text("int one() { return 1; }\n")
    compile_ = [shutil.which("c++") or "", "-fPIC", "-c", "$in", "-o", "$out"]

    def build(linker: list[str]) -> None:
        ninja = NinjaFile(tmp_path / "out")
        ninja.compile(tmp_path / "out" / "one.o", source, [*compile_, "-MD", "-MF", "$out.d"])
        ninja.link(library, [tmp_path / "out" / "one.o"], linker)
        ninja.run(jobs=1)

    build(["cp", "$in", "$out"])
    whole = library.read_bytes()
    with pytest.raises(BuildError):
        build(["sh", "-c", 'echo half > "$0"; exit 1', "$out"])
    assert library.read_bytes() == whole


@pytest.mark.parametrize("inplace", [True, False])
def test_what_an_earlier_build_left_goes(monkeypatch, tmp_path, inplace):
    """A module of the tree stays; of a build folder, which a wheel is packed from, nothing does."""
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "LIBRARIES", tmp_path / "kronafuse" / "lib")
    monkeypatch.setattr(building, "BUILD", tmp_path / "build")
    monkeypatch.setattr(record, "BUILD", tmp_path / "build")
    for name in ("KRONAFUSE_BUILD_CPU", "KRONAFUSE_BUILD_CUDA"):
        monkeypatch.setenv(name, "0")
    command = commands.build_native(Distribution())
    command.inplace, command.build_lib = inplace, str(tmp_path / "build" / "lib")
    package = command.folder.parent
    package.mkdir(parents=True)
    for name in ("_C.cpython-311-x86_64-linux-gnu.so", "module.py"):
        (package / name).touch()
    command.run()
    assert {path.name for path in package.iterdir()} == ({"lib", "module.py"} if inplace else {"lib"})
    assert json.loads((package / "lib" / record.NAME).read_text())["cpu"]["built"] is False


def test_elsewhere_than_on_linux_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(toolchain, "cxx", toolchain.cxx.__wrapped__)
    monkeypatch.setattr(building, "BUILD", tmp_path / "build")
    monkeypatch.setattr(record, "BUILD", tmp_path / "build")
    building.build(tmp_path, Switches())
    entries = json.loads((tmp_path / record.NAME).read_text())
    reason = "native libraries are built on Linux only; this is win32"
    assert entries == {key: {"built": False, "reason": reason} for key in ("cpu", "cuda")}


def test_a_failed_compilation_is_a_reason(monkeypatch, tmp_path, capsys):
    def failing(*_: object) -> libraries.Library:
        raise BuildError("[1/2] mix.cpp\nmix.cpp:3: error: 'y' was not declared\n1 error generated.")

    monkeypatch.setattr(building, "BUILD", tmp_path / "build")
    monkeypatch.setattr(building, "refusal", lambda key, _: None if key == "cpu" else "not here")
    monkeypatch.setattr(building, "build_one", failing)
    building.build(tmp_path, Switches())
    entry = json.loads((tmp_path / record.NAME).read_text())["cpu"]
    assert entry["reason"].startswith("it did not compile: mix.cpp:3: error: 'y' was not declared")
    with pytest.raises(BuildError, match="was asked for and cannot be built: it did not compile"):
        building.build(tmp_path, Switches(cpu="1"))


def test_the_installation_asks_for_torch_only_to_compile(monkeypatch):
    from csrc.rules import backend

    assert backend.native_requirements() == backend.REQUIREMENTS or shutil.which("c++") is None
    monkeypatch.setenv("KRONAFUSE_BUILD_CPU", "0")
    monkeypatch.setenv("KRONAFUSE_BUILD_CUDA", "0")
    assert backend.native_requirements() == []


def test_the_source_distribution_holds_csrc(tmp_path):
    """Everything that a build reads, and nothing that one wrote."""
    files = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--formats", "gztar", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "KRONAFUSE_BUILD_CPU": "0", "KRONAFUSE_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert files.returncode == 0, files.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.run(
        ["tar", "tzf", archive], capture_output=True, text=True, check=True
    ).stdout.split()
    held = {name.partition("/")[2] for name in listed}
    suffixes = {".h", ".cuh", ".cpp", ".cu", ".py", ".md", ".map"}
    needed = {str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.suffix in suffixes}
    assert needed <= held, sorted(needed - held)
    assert not {name for name in held if name.endswith((".so", ".pyc", ".o"))}
