"""The CUDA operators under test: on a GPU where there is one, else emulated on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch


class CudaOps(NamedTuple):
    """ops: what `torch.ops` calls the library; device: where its tensors lie."""

    ops: Any
    device: torch.device


@pytest.fixture(scope="session")
def cuda_ops() -> CudaOps:
    """kronafuse_cuda on a GPU, the same kernels compiled for the host otherwise. Fails where neither was built."""
    from kronafuse import native

    if torch.cuda.is_available():
        device = torch.device("cuda")
        return CudaOps(native.cuda(device), device)
    return CudaOps(native.emulated(), torch.device("cpu"))
