"""Bad input at the CPU library's operators is an error with values, never a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kronafuse import native

CALLS = 3000


def test_random_calls():
    """In a process of its own: a crash is this test's failure, not the end of the run."""
    program = Path(__file__).with_name("cpu_fuzz.py")
    command = [sys.executable, str(program), "20261122", str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("refused") == done.stdout.count("served") == 5


def refuses(call, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        call()


def test_rejects_by_rule():
    """One of each kind of message, with the numbers that broke the rule."""
    ops, t = native.cpu(), torch.randn
    y = t(2, 3, 4)
    nothing = (None, None, None, None)
    refuses(
        lambda: ops.mix(t(2, 5, 4), t(3, 6), *nothing, 1.0, False, y), r"left must be \(3, 5\); got \(3, 6\)"
    )
    refuses(lambda: ops.mix(None, t(3, 6), *nothing, 1.0, False, y), r"got left \(3, 6\) and no p")
    refuses(
        lambda: ops.mix(t(2, 3, 5), None, *nothing, 1.0, False, y),
        r"p must be \(M, I, C\) with y's M = 2 and C = 4",
    )
    refuses(
        lambda: ops.mix(None, None, *nothing, 1.0, False, y.to(torch.float16)),
        "y must be float32 or bfloat16; got float16",
    )
    refuses(
        lambda: ops.mix(None, None, *nothing, 1.0, False, t(2, 3, 1).expand(2, 3, 4)),
        r"elements of y must not share memory; got shape \(2, 3, 4\), strides \(3, 1, 0\)",
    )
    refuses(lambda: ops.mix(y, t(3, 3), *nothing, 1.0, False, y), "p must not share memory with the output")
    refuses(
        lambda: ops.mix(None, None, *nothing, 1.0, False, t(2, 3)), r"y must have 3 dimensions; got \(2, 3\)"
    )
    refuses(
        lambda: ops.reduce(t(2, 3, 4), t(2, 4, 4), None, 1.0, False, t(4, 4)),
        r"one M and one G; got \(2, 3, 4\) and \(2, 4, 4\)",
    )
    refuses(
        lambda: ops.reduce(t(2, 3, 4), t(2, 3, 5), None, 1.0, False, t(4, 4)),
        r"out must be \(P, Q\) = \(4, 5\); got \(4, 4\)",
    )
    refuses(lambda: ops.column_sums(t(2, 3), None, False, t(4)), r"out must be \(N\) = \(3\); got \(4\)")
    refuses(lambda: ops.cast(t(2, 3), t(3, 2)), r"out must have source's shape \(2, 3\); got \(3, 2\)")
    refuses(
        lambda: ops.merge(t(6, 8), t(2, 2), t(3, 5), 1.0, False, t(6, 8)),
        r"weight must be \(N1·N2, K1·K2\); got \(6, 8\)",
    )
    refuses(
        lambda: ops.cast(t(2, 3).to(torch.int64), t(2, 3)),
        "source must be float64, float32, bfloat16 or float16",
    )
    refuses(lambda: ops.cast(t(1, 1, 1, 1, 1), t(2, 3)), "source must have at most 4 dimensions; got 5")


def test_rejects_products_of_sizes_past_64_bits():
    """Expanded views reach any size with one element of memory."""
    ops, one = native.cpu(), torch.ones(1)
    rows = one.expand(1, 2**62)
    nothing = (None, None, None, None)
    refuses(
        lambda: ops.mix(one.expand(1, 2**62, 1), rows, *nothing, 1.0, False, one.new_empty(1, 1, 1)),
        rf"left must have at most 2\^48 elements; dimension 1 of 2 has {2**62}",
    )
    refuses(lambda: ops.cast(one.expand(2**30, 2**20), one.new_empty(1, 1)), r"at most 2\^48 elements")
