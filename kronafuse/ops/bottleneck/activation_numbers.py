"""The numbers by which compiled kernels know the activations; imports no Triton."""

from __future__ import annotations

ACTIVATIONS = {"identity": 0, "relu": 1, "sigmoid": 2, "silu": 3, "gelu": 4}
"""Activation -> the number that the kernels know it by."""
