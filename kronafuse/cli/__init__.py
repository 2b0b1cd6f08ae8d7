"""The `kronafuse` command. Its libraries come with the `train` and `bench` extras and are imported at first use."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Runs the command line. Exit codes: 0, 1 (a target missed), 2 (a wrong call), 130 (Ctrl-C)."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"kronafuse: the command line needs {' and '.join(missing)};"
            " install with: pip install kronafuse[train] or kronafuse[bench]",
            file=sys.stderr,
        )
        sys.exit(2)
    from .app import app

    app(prog_name="kronafuse")
