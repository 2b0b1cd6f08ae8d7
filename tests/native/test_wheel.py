"""The wheel: for every Python on this platform, and running where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from csrc.rules.paths import ROOT
from kronafuse import native

sys.path.insert(0, str(ROOT / "tests" / "formats"))
from base_install import lend

CHOSEN = "not triton" if torch.cuda.is_available() else "not triton and not cuda"
"""Triton's kernels are no part of the wheel, and the emulation of CUDA is none either."""
OPERATORS = ("tests/ops/test_kron_linear.py", "tests/ops/test_kron_merge.py", "tests/ops/test_bottleneck.py")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; fails with all it said instead."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, with the libraries and instances that were compiled for its tests."""
    folder = tmp_path_factory.mktemp("wheel")
    cpu, cuda = (native.build_record().get(name, {}) for name in ("cpu", "cuda"))
    switches = {
        "KRONAFUSE_BUILD_CPU": "1" if cpu.get("built") else "0",
        "KRONAFUSE_BUILD_CUDA": "1" if cuda.get("built") else "0",
        "KRONAFUSE_CUDA_ARCHS": ";".join(cuda.get("archs", ("80",))),
        "KRONAFUSE_CUDA_INSTANCES": cuda.get("instances", "one"),
    }
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, ROOT, **switches)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment that has the wheel; torch and pytest it borrows from the one that tests run in."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


@pytest.mark.slow
def test_the_wheel_alone_is_enough(wheel, tmp_path):
    """In an environment of the wheel and of what it requires, `pip check` is content and a base install works."""
    run(sys.executable, "-m", "venv", tmp_path / "base")
    python = tmp_path / "base" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (metadata,) = site.glob("kronafuse-*.dist-info/METADATA")
    lend(site, Parser().parsestr(metadata.read_text()).get_all("Requires-Dist"))
    run(python, "-m", "pip", "check")
    script = Path(lend.__code__.co_filename)
    said = run(python, "-I", script, cwd=tmp_path, TRITON_INTERPRET="0")  # Triton's interpreter needs NumPy
    assert Path(said.splitlines()[-1]).parent == site / "kronafuse"


@pytest.mark.slow
def test_wheel_is_for_every_python(wheel):
    """py3-none-platform: the libraries in it hold no Python symbol; kronafuse._C is there for one version."""
    names = zipfile.ZipFile(wheel).namelist()
    built = {name: native.build_record().get(name, {}).get("built", False) for name in ("cpu", "cuda")}
    assert ("-py3-none-any" in wheel.name) != any(built.values())
    assert "-py3-none-" in wheel.name
    assert "kronafuse/lib/build.json" in names
    assert ("kronafuse/lib/libkronafuse_cpu.so" in names) == built["cpu"]
    assert ("kronafuse/lib/libkronafuse_cuda.so" in names) == built["cuda"]
    assert not [name for name in names if name.startswith(("csrc", "tests", "build"))]


@pytest.mark.slow
def test_operators_run_without_a_compiler(python, tmp_path):
    """Operator tests beside the wheel, from a folder where the tree is not, with nothing on PATH."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {"PATH": str(python.parent), "PYTHONPATH": "", "CXX": "", "CC": ""}
    where = (
        "import kronafuse, shutil, sys; from kronafuse import native\n"
        "assert kronafuse.__file__.startswith(sys.prefix), kronafuse.__file__\n"
        "assert not any(shutil.which(name) for name in ('c++', 'g++', 'gcc', 'clang', 'nvcc'))\n"
        "print(*native.cpu_reasons(), sep='; ')"
    )
    reasons = run(python, "-c", where, cwd=tmp_path, **environment).strip()
    assert bool(reasons) != native.build_record().get("cpu", {}).get("built", False), reasons
    tests = run(
        python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, "-m", "not slow", *OPERATORS,
        cwd=tmp_path, **environment,
    )  # fmt: skip
    assert " passed" in tests, tests
