"""Bad input at the bottleneck's CPU operators is an error with values, never a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kronafuse import native

CALLS = 2000


def test_random_calls():
    """In a process of its own: a crash is this test's failure, not the end of the run."""
    program = Path(__file__).with_name("cpu_fuzz_bottleneck.py")
    command = [sys.executable, str(program), "20261123", str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("refused") == done.stdout.count("served") == 2


rand = torch.zeros


def refuses_forward(message: str, **changes: Any) -> None:
    """A forward with these arguments in place of good ones."""
    arguments: dict[str, Any] = {
        "x": rand(4, 16), "residual": None, "down": rand(8, 16), "up": rand(24, 8), "down_bias": None,
        "up_bias": None, "scale_tensor": None, "scale": 1.0, "activation": 1, "y": rand(4, 24), "pre": rand(4, 8),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        native.cpu().bottleneck_forward(*(arguments | changes).values())


def refuses_backward(message: str, **changes: Any) -> None:
    """A backward with these arguments in place of good ones."""
    arguments: dict[str, Any] = {
        "dy": rand(4, 24), "x": rand(4, 16), "pre": rand(4, 8), "down": rand(8, 16), "up": rand(24, 8),
        "up_bias": None, "scale_tensor": None, "scale": 1.0, "activation": 1, "adds_dy": False,
        "dx": rand(4, 16), "ddown": None, "dup": None, "ddown_bias": None, "dup_bias": None, "dscale": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        native.cpu().bottleneck_backward(*(arguments | changes).values())


def test_forward_rejects_by_rule():
    """One of each kind of message, with the numbers that broke the rule."""
    y = rand(4, 24)
    refuses = refuses_forward
    refuses(r"x must be \(M, K\) with K = 16; got \(4, 17\)", x=rand(4, 17))
    refuses(r"must share H; got down \(8, 16\), up \(24, 9\)", up=rand(24, 9))
    refuses(r"sizes of at least 1; got \(0, 16\)", down=rand(0, 16))
    refuses(r"residual must be \(4, 24\); got \(4, 16\)", residual=rand(4, 16))
    refuses(r"y must be \(4, 24\); got \(5, 24\)", y=rand(5, 24))
    refuses(r"y must be contiguous; got strides \(1, 4\)", y=rand(24, 4).t())
    refuses(r"y must not share memory with residual", y=y, residual=y)
    refuses(r"pre must be \(4, 8\), or \(0\) where it is not kept; got \(9\)", pre=rand(9))
    refuses("pre must be float32 or bfloat16; got float64", pre=rand(4, 8).double())
    refuses(r"down_bias must be \(8\); got \(9\)", down_bias=rand(9))
    refuses("activation must be from 0 to 4; got 7", activation=7)
    refuses(r"a tensor scale must have one element; got \(2\)", scale_tensor=rand(2))


def test_backward_rejects_by_rule():
    refuses = refuses_backward
    refuses(r"dy must be \(M, N\) with N = 24; got \(4, 23\)", dy=rand(4, 23))
    refuses(r"ddown \(8, 16\) needs x; got none", x=None, ddown=rand(8, 16))
    refuses("where the residual is x, N must equal K = 16; got 24", adds_dy=True)
    refuses(r"dup must be \(24, 8\); got \(8, 24\)", dup=rand(8, 24))
    refuses(r"pre must be \(4, 8\); got \(0\)", pre=rand(0))
    refuses(r"elements of ddown_bias must not share memory; got strides \(0\)", ddown_bias=rand(1).expand(8))
    refuses("dscale must have one element; got", dscale=rand(2))


def test_rejects_products_of_sizes_past_64_bits():
    """Expanded views reach any size with one element of memory."""
    one = rand(1)
    refuses_forward(
        rf"x must have at most 2\^48 elements; dimension 1 of 2 has {2**62}",
        x=one.expand(1, 2**62), down=one.expand(1, 2**62), up=rand(1, 1), y=rand(1, 1), pre=rand(0),
    )  # fmt: skip
    width = 2**47
    refuses_forward(
        f"a buffer of {width} floats: sizes out of range",
        x=rand(2**15, 1), down=one.as_strided((width, 1), (0, 1)), up=one.as_strided((1, width), (1, 0)),
        y=rand(2**15, 1), pre=rand(0),
    )  # fmt: skip
