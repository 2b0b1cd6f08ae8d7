"""The bottlenecks that tests and benchmarks name: layers × widths, and the odd ones."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import LAYERS


@dataclass(frozen=True)
class BottleneckCase:
    """M tokens per image through (H, K) and (N, H); `residual` is "x", "other" or "none"."""

    name: str
    tokens: int
    in_features: int
    width: int
    out_features: int
    residual: str = "x"
    activation: str = "relu"
    biases: bool = True

    def __str__(self) -> str:
        return self.name


BLOCKS = {
    **{name: LAYERS[name][:2] for name in ("sd15_320", "sd15_640", "sd15_1280")},
    **{name: LAYERS[name][:2] for name in ("sdxl_640", "sdxl_1280", "dit_xl_1152")},
    "sd15_context": (77, 768),
}
"""Transformer block, or the text context of one -> tokens per image, D."""
WIDTHS = (4, 60, 160, 256)
"""The least that a budget rounds to, the paper's two, and one between that is no power of two."""

CASES = {
    case.name: case
    for case in (
        BottleneckCase(f"{block}-width_{width}", tokens, features, width, features)
        for block, (tokens, features) in BLOCKS.items()
        for width in WIDTHS
    )
}
"""The case list by name, as in sd15_320-width_60; each is its own residual."""

ODD_CASES = {
    case.name: case
    for case in (
        BottleneckCase("one_token", 1, 40, 8, 40),
        BottleneckCase("empty", 0, 40, 8, 40),
        BottleneckCase("width_1", 9, 24, 1, 24, activation="sigmoid"),
        BottleneckCase("width_7", 9, 24, 7, 24, activation="silu"),
        BottleneckCase("width_16", 9, 24, 16, 24, activation="gelu"),
        BottleneckCase("width_two_parts", 17, 48, 40, 48, activation="identity"),
        BottleneckCase("width_two_parts_even", 17, 64, 48, 64, "other", "gelu"),
        BottleneckCase("width_limit", 5, 32, 256, 32, activation="silu"),
        BottleneckCase("primes", 7, 37, 5, 37, activation="gelu"),
        BottleneckCase("narrowing", 33, 53, 12, 19, "other", "sigmoid"),
        BottleneckCase("widening", 33, 19, 12, 130, "other"),
        BottleneckCase("no_residual", 17, 40, 12, 30, "none", "silu"),
        BottleneckCase("no_biases", 17, 40, 12, 40, biases=False),
        BottleneckCase("no_biases_identity", 17, 40, 12, 30, "none", "identity", biases=False),
        BottleneckCase("many_tokens", 257, 16, 8, 16, "other"),
        BottleneckCase("one_feature", 9, 1, 3, 1, activation="sigmoid"),
    )
}
"""Small ones, each for a branch that the case list's shapes or options leave out."""
