"""Without any extra: what torch, triton and safetensors bring is all that attaching, saving and merging need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from base_install import lend

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def test_a_base_install_attaches_trains_saves_loads_merges_and_removes(tmp_path):
    """In a process whose only packages are the project's dependencies and theirs; NumPy is none of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lend(tmp_path, project["dependencies"])
    assert not (tmp_path / "numpy").exists()
    script = (
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(Path(__file__).with_name('base_install.py'))!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "kronafuse"
