"""Without a CUDA device Triton kernels run in its interpreter and those of csrc/cuda in their emulation.

Both variables are read when the packages are imported or first asked.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["KRONAFUSE_EMULATED"] = "1"
    # One thread a test process: the suite runs in several.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, visibly, without one, and tests of Triton if its interpreter cannot run."""
    if torch.cuda.is_available():
        return
    from kronafuse import env  # what it imports reads the variables above

    problem = env.interpreter_problem() if env.has_triton() else None
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif problem is not None and "triton" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=problem))
