"""Bottleneck records: positions, widths and budgets, the forms' tensors, how they start, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from kronafuse import Bottleneck
from kronafuse.nn import BottleneckAdapter
from kronafuse.nn.positions import PAIRS, POSITIONS, SINKS, SOURCES
from kronafuse.nn.spec_json import spec_from_dict, spec_to_dict

PUBLISHED = {
    "SA_in": ["SA_in", "CA_in", "FFN_in", "Trans_out"],
    "SA_out": ["CA_in", "FFN_in", "Trans_out"],
    "CA_in": ["CA_in", "FFN_in", "Trans_out"],
    "CA_c": ["CA_c"],
    "CA_out": ["FFN_in", "Trans_out"],
    "FFN_in": ["FFN_in", "Trans_out"],
    "FFN_out": ["Trans_out"],
    "Trans_out": ["Trans_out"],
    "Res_in": ["Res_in", "Res_out"],
    "Res_out": ["Res_out"],
}
"""arXiv 2303.18181: the configurations that were released."""


def test_the_twenty_pairs_are_the_published_ones():
    symbols = [(POSITIONS[source].symbol, POSITIONS[sink].symbol) for source, sink in PAIRS]
    assert symbols == [(source, sink) for source, sinks in PUBLISHED.items() for sink in sinks]
    assert (len(SOURCES), len(SINKS), len(PAIRS)) == (10, 7, 20)


def test_every_other_pair_is_refused():
    refused = 0
    for source, sink in product(SOURCES, SOURCES):
        if (source, sink) in PAIRS:
            assert Bottleneck(source, sink).sink == sink
        else:
            with pytest.raises(ValueError, match=r"^Bottleneck: sink .*(allowed sinks:|sinks are) "):
                Bottleneck(source, sink)
            refused += 1
    assert refused == 80


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("attn1_out", "attn1_in"), r"sink 'attn1_in' comes before source 'attn1_out' in the block; allowed sinks:"
         r" attn2_in, ff_in, block_out$"),
        (("ff_out", "ff_out"), r"sink 'ff_out': adding there is the same as adding at 'block_out'"),
        (("attn1_in", "res_out"), r"another kind of block \(resnet\) than source 'attn1_in' \(transformer\)"),
        (("attn2_context", "ff_in"), r"the text context is no part of the residual stream"),
        (("attn1_in", "attn2_context"), r"the text context is no part of the residual stream"),
        (("middle", "ff_in"), r"source must be one of attn1_in, .*; got 'middle'"),
        (("ff_in", None), r"sink must be one of attn1_in, .*; got None"),
    ],
)  # fmt: skip
def test_rejects_pairs(arguments, text):
    with pytest.raises(ValueError, match=text):
        Bottleneck(*arguments)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"width": 0}, "width must be a positive integer; got 0"),
        ({"width": True}, "width must be a positive integer; got True"),
        ({"width": 6.0}, "width must be a positive integer; got 6.0"),
        ({"width": 257}, "width H must be 1 to 256, what the operator takes; got 257"),
        ({"width": None}, "give a width or a budget; got neither"),
        ({"budget": 1.0}, "give width=None with a budget, which chooses the width; got width=60, budget=1.0"),
        ({"width": None, "budget": 0.0}, "budget must be more than 0 percent; got 0.0"),
        ({"width": None, "budget": math.nan}, "budget must be a finite number; got nan"),
        ({"activation": "tanh"}, "activation must be one of identity, relu, sigmoid, silu, gelu; got 'tanh'"),
        ({"init": "zero"}, "init must be one of zero_up, paper; got 'zero'"),
        ({"form": "lora"}, "form must be one of dense, compacter, krona, krona_res; got 'lora'"),
        ({"scale": math.inf}, "scale must be a finite number; got inf"),
        ({"factors": (4, 4)}, "factors are for the forms krona, krona_res; got"),
        ({"rank": 2}, "rank is for the form 'compacter'; got 2"),
        ({"form": "compacter", "width": 6}, "terms must divide the width H; got terms=4, width=6"),
        ({"form": "compacter", "terms": 0}, "terms must be a positive integer; got 0"),
        ({"form": "compacter", "rank": 0}, "rank must be a positive integer; got 0"),
        ({"form": "compacter", "source": "res_in", "sink": "res_in"}, "'compacter' is for transformer blocks"),
        ({"form": "krona", "factors": (4, 4)}, "beside the whole feed-forward: source, sink must be 'ff_in'"),
        ({"form": "krona", "source": "ff_in", "sink": "block_out"}, "needs factors, two positive integers"),
        ({"form": "krona", "source": "ff_in", "sink": "block_out", "factors": (4, 0)}, "needs factors"),
        ({"form": "krona", "source": "ff_in", "sink": "block_out", "factors": (4, 4), "activation": "gelu"},
         "is linear and has no activation; got 'gelu'"),
        ({"form": "krona", "source": "ff_in", "sink": "block_out", "factors": (4, 4), "budget": 1.0},
         "has its size by factors"),
        ({"form": "krona", "source": "ff_in", "sink": "block_out", "factors": (4, 4), "width": 300},
         "has neither width nor terms; got width=300"),
        ({"terms": 7}, "terms are for the form 'compacter'; got 7"),
        ({"form": "krona_res", "source": "ff_in", "sink": "block_out", "factors": (4, 4), "scale": 0.0},
         "needs a scale other than 0"),
    ],
)  # fmt: skip
def test_rejects_fields(fields, text):
    with pytest.raises(ValueError, match=f"^Bottleneck: .*{text}" if "^" not in text else text):
        Bottleneck(**fields)


def test_rejects_dtype():
    with pytest.raises(TypeError, match=r"Bottleneck: dtype must be torch\.float32.*; got torch\.int32"):
        Bottleneck(dtype=torch.int32)


def test_rejects_sizes_that_do_not_divide():
    with pytest.raises(
        ValueError, match=r"terms must divide the sizes \(N, K\) of here: 4 does not divide N = 30"
    ):
        Bottleneck(form="compacter", width=8).layout(30, 32, "here")
    with pytest.raises(
        ValueError, match=r"rank must be at most min\(N, K, H\) / terms = 2 for .* of here; got 3"
    ):
        Bottleneck(form="compacter", width=8, rank=3).layout(32, 32, "here")
    spec = Bottleneck("ff_in", "block_out", form="krona", factors=(5, 3))
    with pytest.raises(
        ValueError, match=r"factors \(N1, K1\) must .*: 5 does not divide N = 32; 3 does not divide K"
    ):
        spec.layout(32, 32)
    with pytest.raises(ValueError, match=r"the budget of 1\.0 % has no width before `attach` chooses it"):
        Bottleneck(width=None, budget=1.0).layout(32, 32)


def test_plain_values_and_json():
    spec = Bottleneck(width=np.int64(8), scale=torch.tensor(0.5), form="compacter", rank=np.int32(2))
    assert (type(spec.width), type(spec.scale), type(spec.rank)) == (int, float, int)
    krona = Bottleneck("ff_in", "block_out", form="krona_res", factors=[4, 8], dtype=torch.bfloat16)
    for each in (spec, krona, Bottleneck("res_in", "res_out", None, budget=0.5), Bottleneck()):
        assert spec_from_dict(json.loads(json.dumps(spec_to_dict(each)))) == each


def test_tensors_of_the_forms():
    assert Bottleneck(width=8).layout(20, 12).sizes == {
        "down": (8, 12), "down_bias": (8,), "up": (20, 8), "up_bias": (20,),
    }  # fmt: skip
    assert Bottleneck("res_in", "res_out", 6).layout(20, 12).sizes == {
        "norm_weight": (12,), "norm_bias": (12,),
        "down": (6, 12, 3, 3), "down_bias": (6,), "up": (20, 6, 3, 3), "up_bias": (20,),
    }  # fmt: skip
    assert Bottleneck(width=8, form="compacter", terms=2).layout(20, 12).sizes == {
        "down_a": (2, 2, 2), "down_b": (2, 4, 6), "down_bias": (8,),
        "up_a": (2, 2, 2), "up_b": (2, 10, 4), "up_bias": (20,),
    }  # fmt: skip
    assert Bottleneck(width=8, form="compacter", terms=2, rank=3).layout(20, 12).sizes == {
        "down_a": (2, 2, 2), "down_b": (2, 4, 3), "down_b_down": (2, 3, 6), "down_bias": (8,),
        "up_a": (2, 2, 2), "up_b": (2, 10, 3), "up_b_down": (2, 3, 4), "up_bias": (20,),
    }  # fmt: skip
    krona = Bottleneck("ff_in", "block_out", form="krona_res", factors=(5, 2)).layout(20, 20)
    assert krona.sizes == {"a": (5, 2), "b": (4, 10), "residual_scale": ()}
    assert krona.parameters == 10 + 40 + 1


@pytest.mark.parametrize(
    "spec",
    [
        Bottleneck(width=64),
        Bottleneck("res_in", "res_out", 16),
        Bottleneck(width=64, form="compacter"),
        Bottleneck(width=64, form="compacter", rank=2),
        Bottleneck("ff_in", "block_out", form="krona_res", factors=(8, 16)),
    ],
    ids=["dense", "convolution", "compacter", "compacter-rank", "krona_res"],
)
def test_starts(spec):
    """zero_up adds exactly nothing; the paper's start adds something, with every matrix drawn."""
    torch.manual_seed(0)
    size = (2, 64, 5, 5) if spec.source == "res_in" else (2, 7, 64)
    x, residual = torch.randn(size), torch.randn(size)
    adapter = BottleneckAdapter(spec.layout(64, 64))
    assert torch.equal(adapter(x, residual), residual)
    paper = BottleneckAdapter(replace(spec, init="paper").layout(64, 64))
    assert (paper(x, residual) - residual).abs().max() > 1e-3
    norm = ("norm_weight", "norm_bias", "residual_scale")
    for name, tensor in paper.named_parameters():
        assert name in norm or tensor.unique().numel() > 0.99 * tensor.numel(), name


def test_paper_start_is_that_of_torch_layers():
    torch.manual_seed(0)
    adapter = BottleneckAdapter(Bottleneck(width=200, init="paper").layout(150, 300))
    for tensor, fan_in in (
        (adapter.down, 300),
        (adapter.down_bias, 300),
        (adapter.up, 200),
        (adapter.up_bias, 200),
    ):
        bound = 1 / math.sqrt(fan_in)
        assert tensor.abs().max() <= bound
        assert tensor.abs().max() > 0.9 * bound
    convolution = BottleneckAdapter(Bottleneck("res_in", "res_in", 32, init="paper").layout(64, 64))
    assert 0.9 / math.sqrt(9 * 32) < convolution.up.abs().max() <= 1 / math.sqrt(9 * 32)


def test_compacter_maps_start_with_the_variance_of_a_linear():
    torch.manual_seed(0)
    for rank in (None, 4):
        spec = Bottleneck(width=240, form="compacter", rank=rank, init="paper")
        down = BottleneckAdapter(spec.layout(240, 240))._map("down")
        assert down.std().item() == pytest.approx(1 / math.sqrt(3 * 240), rel=0.35)


def test_budget_takes_the_largest_multiple_of_four():
    sizes = {"one": (64, 64), "two": (32, 32)}
    cost = lambda width: sum(2 * d * width + width + d for d, _ in sizes.values())  # noqa: E731
    for width in (4, 20, 252):
        for more, expected in ((0, width), (1, width), (cost(width + 4) - cost(width) - 1, width)):
            spec = Bottleneck(width=None, budget=100.0).within(cost(width) + more, sizes)
            assert (spec.width, spec.budget) == (expected, None)
    # 0.57 % of 100,000 is 570, although 0.57 / 100 * 100,000 is less in floating point
    exact = {"one": (22, 22)}
    assert Bottleneck(width=12).layout(22, 22).parameters == 562
    assert Bottleneck(width=None, budget=0.57).within(100_000, {"one": (22, 22)}).width == 12
    assert Bottleneck(width=None, budget=0.562).within(100_000, exact).width == 12
    assert Bottleneck(width=None, budget=0.561).within(100_000, exact).width == 8
    assert Bottleneck(width=None, budget=50.0).within(10**9, sizes).width == 256
    six = Bottleneck(width=None, budget=100.0, form="compacter", terms=6)
    assert six.within(10**6, {"one": (48, 48)}).width == 252
    assert Bottleneck(width=9).within(10, sizes).width == 9


def test_budget_that_no_width_meets():
    text = r"no width meets a budget of 0\.5 % of 1,000 parameters, which is 5: the smallest, 4, takes 580 in 1 blocks"
    with pytest.raises(ValueError, match=text):
        Bottleneck(width=None, budget=0.5).within(1000, {"one": (64, 64)})
