"""KronA, LoKr and LoRA: the factors they make, how those start, and what they refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from kronafuse import Bottleneck, KronA, LoKr, LoRA
from kronafuse.nn import DEFAULT, KronFactors
from kronafuse.nn.factorization import divisors, factorization
from kronafuse.nn.spec_json import spec_from_dict, spec_to_dict

# facts of the published systems: (N, K) -> trained numbers
KRONA_64X4 = {(640, 640): 1856, (640, 2048): 5376, (1280, 1280): 6656, (1280, 2048): 10496, (320, 320): 656,
              (320, 768): 1216, (640, 768): 2176, (1280, 768): 4096, (768, 768): 2560}  # fmt: skip
KRONA_64X8 = {(640, 640): 1312, (640, 2048): 3072, (1280, 1280): 3712, (1280, 2048): 5632, (320, 320): 712,
              (320, 768): 992, (640, 768): 1472, (1280, 768): 2432, (768, 768): 1664}  # fmt: skip
LORA_4 = {(640, 640): 5120, (640, 2048): 10752, (1280, 1280): 10240, (1280, 768): 8192, (768, 768): 6144}


@pytest.mark.parametrize(
    ("spec", "counts"), [(KronA(), KRONA_64X4), (KronA((64, 8)), KRONA_64X8), (LoRA(4), LORA_4)], ids=str
)
def test_parameter_counts_of_layers(spec, counts):
    assert {size: spec.layout(*size).parameters for size in counts} == counts


def test_divisors():
    for size in range(1, 200):
        assert divisors(size) == [each for each in range(1, size + 1) if size % each == 0]


@pytest.mark.parametrize(
    ("size", "factor", "pair"),
    [(320, -1, (16, 20)), (640, -1, (20, 32)), (768, -1, (24, 32)), (1280, -1, (32, 40)), (2048, -1, (32, 64)),
     (3072, -1, (48, 64)), (3072, 4, (4, 768)), (1280, 8, (8, 160)), (12, 6, (2, 6)), (12, 5, (3, 4)), (10, 4, (2, 5)),
     (7, 8, (1, 7)), (7, -1, (1, 7)), (1, 8, (1, 1)), (36, -1, (6, 6)), (1280, 1280, (1, 1280))],
)  # fmt: skip
def test_factorization(size, factor, pair):
    assert factorization(size, factor) == pair


def test_krona_factors_are_out_first():
    layout = KronA(factors=(64, 4)).layout(1280, 2048)
    assert layout.sizes == {"lokr_a": (64, 4), "lokr_b": (20, 512)}


def test_krona_start():
    torch.manual_seed(0)
    factors = KronFactors(KronA(factors=(64, 64)).layout(128, 128))
    assert factors.lokr_b.abs().max() == 0
    assert factors.lokr_a.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert factors.lokr_a.mean().item() == pytest.approx(0, abs=1e-3)


def test_krona_kaiming_start():
    torch.manual_seed(0)
    factors = KronFactors(KronA(factors=(64, 16), init="kaiming").layout(128, 128))
    bound = math.sqrt(6 / ((1 + 5) * 16))
    assert factors.lokr_b.abs().max() == 0
    assert 0.9 * bound < factors.lokr_a.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("spec", "sizes", "scale"),
    [
        (LoKr(8), {"lokr_a": (8, 8), "lokr_b": (80, 160)}, 1.0),
        (LoKr(8, alpha=3.0, scale=2.0), {"lokr_a": (8, 8), "lokr_b": (80, 160)}, 2.0),
        (LoKr(8, 4), {"lokr_a": (8, 8), "lokr_b": (80, 4), "lokr_b_down": (4, 160)}, 1.0),
        (LoKr(8, 4, 1.0), {"lokr_a": (8, 8), "lokr_b": (80, 4), "lokr_b_down": (4, 160)}, 0.25),
        (LoKr(8, 79, 1.0), {"lokr_a": (8, 8), "lokr_b": (80, 79), "lokr_b_down": (79, 160)}, 1 / 79),
        (LoKr(8, 80, 1.0), {"lokr_a": (8, 8), "lokr_b": (80, 160)}, 1.0),
        (
            LoKr(8, 3, 1.0, decompose_both=True),
            {"lokr_a_up": (8, 3), "lokr_a_down": (3, 8), "lokr_b": (80, 3), "lokr_b_down": (3, 160)},
            1 / 3,
        ),
        (
            LoKr(8, 4, decompose_both=True),
            {"lokr_a": (8, 8), "lokr_b": (80, 4), "lokr_b_down": (4, 160)},
            1.0,
        ),
        (LoRA(4, 8.0, scale=0.5), {"lokr_b": (640, 4), "lokr_b_down": (4, 1280)}, 1.0),
    ],
    ids=str,
)
def test_sizes_and_scale(spec, sizes, scale):
    layout = spec.layout(640, 1280)
    assert layout.sizes == sizes
    assert layout.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    "spec", [KronA((8, 4)), LoKr(4), LoKr(4, 2), LoKr(8, 1, decompose_both=True), LoRA(2)], ids=str
)
def test_delta_starts_at_zero_and_can_learn(spec):
    """Exactly one factor of the product is zero: no more, or no gradient would ever reach any."""
    factors = KronFactors(spec.layout(32, 64))
    zero = [name for name, factor in factors.named_parameters() if factor.abs().max() == 0]
    assert len(zero) == 1
    assert zero == (["lokr_b_down"] if isinstance(spec, LoKr) and spec.rank else ["lokr_b"])


@pytest.mark.parametrize(
    "spec",
    [
        KronA(
            (8, 4),
            targets=("to_q", "ff.net.2"),
            shuffled=True,
            scale=0.5,
            dtype=torch.bfloat16,
            init="kaiming",
        ),
        LoKr(-1, 8, 4.0, decompose_both=True, per_target={"to_k": {"factor": 4}, "ff.net.2": LoRA(2)}),
        LoRA(),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_json_round_trip(spec):
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize("kind", [KronA, LoKr, LoRA, Bottleneck], ids=lambda kind: kind.__name__)
def test_no_missing_field_takes_its_default(kind):
    whole = spec_to_dict(kind())
    for name in whole:
        part = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(
            ValueError, match=f"lacks fields {name};" if name != "kind" else "kind must be one of"
        ):
            spec_from_dict(part)


def test_json_of_something_else():
    with pytest.raises(ValueError, match="kind must be one of KronA, LoKr, LoRA, Bottleneck; got 'DoRA'"):
        spec_from_dict({"kind": "DoRA"})
    with pytest.raises(ValueError, match="LoRA has no fields colour"):
        spec_from_dict({**spec_to_dict(LoRA()), "colour": 1})
    for name in ("float12", "half", "int8"):
        with pytest.raises(ValueError, match=f"dtype must be one of float32, .*; got '{name}'"):
            spec_from_dict({**spec_to_dict(LoRA()), "dtype": name})
    with pytest.raises(ValueError, match="per_target must be an object or null; got list"):
        spec_from_dict({**spec_to_dict(LoRA()), "per_target": [1]})
    with pytest.raises(ValueError, match="spec: must be an object; got list"):
        spec_from_dict([1])


def test_a_spec_of_another_class_is_not_written():
    class Mine(LoRA):
        """Nothing that reads a file knows of it."""

    with pytest.raises(TypeError, match="spec: must be KronA, LoKr, LoRA, Bottleneck; got Mine"):
        spec_to_dict(Mine())


def test_per_target_takes_the_longest_suffix():
    spec = KronA(
        (8, 4), per_target={"to_k": {"factors": (4, 4)}, "attn2.to_k": LoRA(2), "to_v": {"scale": 3.0}}
    )
    assert spec.at("mid.attn1.to_k").layout(32, 32).sizes == {"lokr_a": (4, 4), "lokr_b": (8, 8)}
    assert spec.at("mid.attn2.to_k") == LoRA(2)
    assert spec.at("attn2.to_v").layout(32, 32).scale == 3.0
    assert spec.at("attn2.to_q") is spec
    assert spec.at("attn2.xto_k") is spec


def test_rejects_factors_that_do_not_divide():
    with pytest.raises(ValueError) as caught:
        KronA((64, 5)).layout(100, 768, "mid.to_q")
    text = str(caught.value)
    assert "of mid.to_q" in text
    assert "N1 = 64 does not divide N = 100, whose divisors are 1, 2, 4, 5, 10, 20, 25, 50, 100" in text
    assert "K1 = 5 does not divide K = 768, whose divisors are 1, 2, 3, 4" in text


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: KronA((64,)), ValueError, r"two positive integers \(N1, K1\); got \(64,\)"),
        (lambda: KronA((64, 0)), ValueError, "two positive integers"),
        (lambda: KronA((64, 2.0)), ValueError, "two positive integers"),
        (lambda: KronA(targets="to_q"), TypeError, "targets must be a tuple .* got 'to_q'"),
        (lambda: KronA(targets=()), TypeError, "targets must be a tuple"),
        (lambda: KronA(init="xavier"), ValueError, "init must be one of diffusekrona, kaiming; got 'xavier'"),
        (lambda: KronA(dtype=torch.int8), TypeError, "dtype must be torch.float32.*got torch.int8"),
        (lambda: KronA(dtype=torch.float8_e4m3fn), TypeError, "dtype must be torch.float32"),
        (lambda: KronA(scale=math.nan), ValueError, "scale must be a finite number; got nan"),
        (lambda: KronA(scale=1e39), ValueError, "KronA: scale must be a finite number of float32, from -3.4"),
        (
            lambda: KronA(scale=10**400),
            ValueError,
            "KronA: scale must be a finite number of float32, from -3.4",
        ),
        (
            lambda: KronA(per_target={"to_q": {"rank": 3}}),
            ValueError,
            "per_target.'to_q'. has unknown fields rank",
        ),
        (lambda: LoKr(0), ValueError, "factor must be a positive integer or -1; got 0"),
        (lambda: LoKr(8, 0), ValueError, "LoKr: rank must be a positive integer; got 0"),
        (lambda: LoKr(8, decompose_both=True), ValueError, "decompose_both needs a rank"),
        (lambda: LoKr(8, 4, math.inf), ValueError, "alpha must be a finite number; got inf"),
        (lambda: LoRA(None), ValueError, "LoRA: rank must be a positive integer; got None"),
        (lambda: factorization(0, 4), ValueError, "got 0, 4"),
        (lambda: KronA(8), ValueError, r"two positive integers \(N1, K1\); got 8"),
        (lambda: KronA("64"), ValueError, "two positive integers .* got '64'"),
        (lambda: KronA(dtype="float32"), TypeError, "dtype must be torch.float32, .* got 'float32'"),
        (lambda: KronA(scale="x"), TypeError, "KronA: scale must be a finite number; got 'x'"),
        (lambda: KronA(scale=True), TypeError, "scale must be a finite number; got True"),
        (lambda: KronA(scale=None), TypeError, "scale must be a finite number; got None"),
        (lambda: KronA(scale=torch.ones(2)), TypeError, r"scale must be a finite number; got tensor\("),
        (lambda: LoRA(4, "8"), TypeError, "LoRA: alpha must be a finite number; got '8'"),
        (lambda: KronA(shuffled=1), TypeError, "shuffled must be True or False; got 1"),
        (lambda: KronA(init=["lora"]), ValueError, "init must be one of diffusekrona, kaiming"),
        (lambda: KronA(targets=5), TypeError, "targets must be a tuple of module-name suffixes; got 5"),
        (lambda: KronA(per_target=["to_q"]), TypeError, r"per_target must map suffixes .* got \['to_q'\]"),
        (
            lambda: KronA(per_target={"to_q": 5}),
            TypeError,
            "per_target must map each suffix .* got 'to_q': 5",
        ),
        (lambda: KronA(per_target={5: LoRA(2)}), TypeError, "per_target must map each suffix .* got 5: "),
    ],
)
def test_rejects_bad_fields(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("made", "same"),
    [
        (KronA(scale=np.float32(0.5)), KronA(scale=0.5)),
        (KronA(scale=torch.tensor(0.5)), KronA(scale=0.5)),
        (KronA(scale=np.array(2)), KronA(scale=2.0)),
        (KronA((np.int64(8), 4), shuffled=np.bool_(True)), KronA((8, 4), shuffled=True)),
        (KronA([8, 4], targets=["to_q"]), KronA((8, 4), targets=("to_q",))),
        (LoRA(np.int64(4), np.float32(8)), LoRA(4, 8.0)),
        (
            LoKr(np.int64(4), torch.tensor(2), 1, decompose_both=np.bool_(True)),
            LoKr(4, 2, 1.0, decompose_both=True),
        ),
        (KronA(per_target={"to_q": {"scale": np.float64(2)}}), KronA(per_target={"to_q": {"scale": 2.0}})),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_scalars_of_other_libraries_become_plain_ones(made, same):
    """So that every spec that can be made can be written."""
    assert made == same
    assert json.dumps(spec_to_dict(made)) == json.dumps(spec_to_dict(same))


def test_defaults():
    assert (
        KronA().targets == LoKr().targets == LoRA().targets == DEFAULT == ("to_q", "to_k", "to_v", "to_out.0")
    )
    assert KronA() == KronA((64, 4), targets=DEFAULT, init="diffusekrona", dtype=torch.float32)
