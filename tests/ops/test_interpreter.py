"""What the machine has that rules Triton's interpreter out is told before a kernel fails in it."""

from __future__ import annotations

import re

import pytest
import torch
from kronafuse import env, kron_delta


@pytest.fixture
def call(monkeypatch):
    """A call of the kernels in the interpreter, with these versions of Triton and NumPy installed."""
    monkeypatch.setattr(env, "triton_interprets", lambda: True)
    monkeypatch.setattr(env, "has_triton", lambda: True)

    def with_versions(**versions: str | None) -> torch.Tensor:
        monkeypatch.setattr(env, "package_version", versions.get)
        return kron_delta(torch.ones(3, 4), torch.ones(2, 2), torch.ones(2, 2), impl="triton")

    return with_versions


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.4.6", "the interpreter of Triton 3.6.0 needs NumPy before 2.4, and 2.4.6 is installed"),
        ("3.6.0+git1", "3.0.0", "the interpreter of Triton 3.6.0+git1 needs NumPy before 2.4, and 3.0.0 is"),
        ("3.9.0", None, "Triton's interpreter needs NumPy, which is not installed"),
    ],
)
def test_an_interpreter_that_cannot_run_says_what_it_needs(call, triton, numpy, reason):
    with pytest.raises(NotImplementedError, match="kron_delta: .*(\n.*)*" + re.escape(reason)):
        call(triton=triton, numpy=numpy)


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.0", "2.4.6"), ("3.10.0", "2.10.0")])
def test_an_interpreter_that_can_run_is_not_ruled_out(monkeypatch, triton, numpy):
    monkeypatch.setattr(env, "package_version", {"triton": triton, "numpy": numpy}.get)
    assert env.interpreter_problem() is None
