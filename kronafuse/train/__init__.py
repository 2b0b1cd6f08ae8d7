"""Training and sampling of adapters on diffusers models, and the digits demo.

`data` and `conditioning` say what is learnt, `base` on which model, `objective` by which loss; `loop` is the
only training loop, for whole models and for adapters. Needs the libraries of the `train` extra.
"""

from __future__ import annotations

import importlib.util

LIBRARIES = (
    "accelerate",
    "diffusers",
    "filelock",
    "matplotlib",
    "numpy",
    "PIL",
    "sklearn",
    "tqdm",
    "transformers",
)
"""What the `train` extra brings, by import name."""


def require_libraries() -> None:
    """ImportError that names what is absent and the extra that brings it; the commands call it first."""
    absent = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if absent:
        from ..env import install_extra

        raise ImportError(f"kronafuse.train: needs {', '.join(absent)}; {install_extra('train')}")
