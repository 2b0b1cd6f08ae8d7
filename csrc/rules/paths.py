"""Where sources, objects and libraries lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
LIBRARIES = ROOT / "kronafuse" / "lib"
BUILD = ROOT / "build" / "native"
"""Objects and ninja files, a folder for each library; an installation and a wheel share them."""
EMULATED = ROOT / ".cache" / "emulated"
