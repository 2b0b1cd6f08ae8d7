"""The problems that tests and benchmarks name: layers × adapters, and the odd ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..nn.factorization import factorization
from ..shapes import KronShape


@dataclass(frozen=True)
class Case:
    """One adapted layer: M tokens per image through a (N, K) linear with an adapter of these sizes."""

    name: str
    tokens: int
    shape: KronShape
    shuffled: bool = False
    has_a: bool = True

    def __str__(self) -> str:
        return self.name


LAYERS = {
    "sd15_320": (4096, 320, 320),
    "sd15_640": (1024, 640, 640),
    "sd15_1280": (256, 1280, 1280),
    "sdxl_640": (4096, 640, 640),
    "sdxl_1280": (1024, 1280, 1280),
    "sdxl_cross_k_640": (77, 640, 2048),
    "sdxl_cross_k_1280": (77, 1280, 2048),
    "dit_xl_1152": (256, 1152, 1152),
    "flux2_3072": (1536, 3072, 3072),
    "ff_in": (1024, 10240, 1280),
    "ff_out": (1024, 1280, 5120),
}
"""Layer -> tokens per image, N, K."""


def krona(n1: int, k1: int) -> Callable[[int, int], KronShape]:
    """A of a fixed (N1, K1) and a full B."""
    return lambda n, k: KronShape(n1, k1, n // n1, k // k1)


def lokr(factor: int, rank: int | None = None) -> Callable[[int, int], KronShape]:
    """LyCORIS's rule: the smaller divisor of each side goes left."""

    def shape(n: int, k: int) -> KronShape:
        (n1, n2), (k1, k2) = factorization(n, factor), factorization(k, factor)
        return KronShape(n1, k1, n2, k2, rank)

    return shape


ADAPTERS: dict[str, Callable[[int, int], KronShape]] = {
    "krona_64x4": krona(64, 4),
    "krona_64x8": krona(64, 8),
    "krona_4x64": krona(4, 64),
    "lokr_f4": lokr(4),
    "lokr_f8": lokr(8),
    "lokr_f16": lokr(16),
    "lokr_square": lokr(-1),
    "lokr_f8_r16": lokr(8, 16),
    "lora_r16": lambda n, k: KronShape(1, 1, n, k, 16),
    "diffusekrona_official": krona(64, 8),
}
"""Adapter -> its sizes on a (N, K) layer; KronA is named N1 x K1."""


def _case(layer: str, adapter: str) -> Case:
    tokens, n, k = LAYERS[layer]
    shape = ADAPTERS[adapter](n, k)
    assert (shape.n, shape.k) == (n, k), f"{adapter} does not divide {layer}"
    shuffled = adapter == "diffusekrona_official"
    return Case(f"{layer}-{adapter}", tokens, shape, shuffled, adapter != "lora_r16")


CASES = {case.name: case for case in (_case(layer, adapter) for layer in LAYERS for adapter in ADAPTERS)}
"""The case list by name, as in sdxl_1280-krona_64x4."""

ODD_CASES = {
    case.name: case
    for case in (
        Case("one_token", 1, KronShape(8, 4, 5, 10)),
        Case("empty", 0, KronShape(8, 4, 5, 10)),
        Case("primes", 7, KronShape(3, 5, 7, 11)),
        Case("primes_shuffled", 7, KronShape(5, 3, 11, 7), shuffled=True),
        Case("a_scalar", 9, KronShape(1, 1, 12, 20), has_a=True),
        Case("b_scalar", 9, KronShape(12, 20, 1, 1)),
        Case("a_absent", 9, KronShape(1, 1, 12, 20), has_a=False),
        Case("a_row", 9, KronShape(1, 6, 10, 4)),
        Case("thin_b_first", 33, KronShape(16, 2, 3, 32)),
        Case("thin_b_first_shuffled", 33, KronShape(16, 2, 3, 32), shuffled=True),
        Case("thin_a_first", 33, KronShape(2, 16, 32, 3)),
        Case("thin_a_first_shuffled", 33, KronShape(2, 16, 32, 3), shuffled=True),
        Case("fat_b_first", 17, KronShape(6, 6, 5, 20)),
        Case("fat_b_first_shuffled", 17, KronShape(6, 6, 5, 20), shuffled=True),
        Case("fat_a_first", 17, KronShape(6, 6, 20, 8)),
        Case("low_rank", 17, KronShape(2, 4, 24, 40, 5)),
        Case("low_rank_fat", 17, KronShape(3, 4, 8, 6, 5)),
        Case("low_rank_shuffled", 17, KronShape(4, 2, 24, 80, 3), shuffled=True),
        Case("many_tokens_a_first", 257, KronShape(4, 8, 8, 4)),
        Case("many_tokens_b_first", 257, KronShape(8, 4, 4, 8)),
        Case("many_tokens_low_rank", 257, KronShape(4, 2, 8, 10, 2)),
        Case("lora", 17, KronShape(1, 1, 40, 64, 4), has_a=False),
        Case("lora_shuffled", 17, KronShape(1, 1, 40, 64, 4), shuffled=True, has_a=False),
    )
}
"""Small ones, each for a branch that the case list's shapes or token counts leave out."""
