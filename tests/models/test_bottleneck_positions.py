"""Bottleneck adapters read and write where the paper says: all pairs, against blocks written out."""

from __future__ import annotations

from itertools import product

import pytest
import small_models
import torch
from bottleneck_reference import ACTIVATIONS, with_reference
from kronafuse import Bottleneck, attach
from test_counts import sd1_unet, sdxl_unet
from torch import nn

pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel

SINKS = {
    "attn1_in": ("attn1_in", "attn2_in", "ff_in", "block_out"),
    "attn1_out": ("attn2_in", "ff_in", "block_out"),
    "attn2_in": ("attn2_in", "ff_in", "block_out"),
    "attn2_context": ("attn2_context",),
    "attn2_out": ("ff_in", "block_out"),
    "ff_in": ("ff_in", "block_out"),
    "ff_out": ("block_out",),
    "block_out": ("block_out",),
    "res_in": ("res_in", "res_out"),
    "res_out": ("res_out",),
}
"""Source -> its sinks, as the paper's released configurations list them."""

PAIRS = [(source, sink) for source, sinks in SINKS.items() for sink in sinks]
IN_TRANSFORMERS = [pair for pair in PAIRS if not pair[0].startswith("res")]
WITHOUT_ATTN2 = [pair for pair in IN_TRANSFORMERS if not any(each.startswith("attn2") for each in pair)]


def sd() -> tuple[nn.Module, small_models.Inputs]:
    """As Stable Diffusion 1.x: two ResBlocks a level, channels that 32 groups divide."""
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        layers_per_block=2,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }


def sdxl() -> tuple[nn.Module, small_models.Inputs]:
    """As Stable Diffusion XL: attentions of depth 2, linear projections, added embeddings."""
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        layers_per_block=2,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        norm_num_groups=16,
    )
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 9]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)},
    }


def pixart() -> tuple[nn.Module, small_models.Inputs]:
    """Gated, with a mask over the text."""
    model, inputs = small_models.pixart()
    return model, {**inputs, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}


MODELS = {"sd": sd, "sdxl": sdxl, "pixart": pixart, "dit": small_models.dit}
CASES = [
    *[("sd", *pair) for pair in PAIRS],
    *[("sdxl", *pair) for pair in PAIRS],
    *[("pixart", *pair) for pair in IN_TRANSFORMERS],
    *[("dit", *pair) for pair in WITHOUT_ATTN2],
]


def build(name: str) -> tuple[nn.Module, small_models.Inputs]:
    """The model in float64, with weights that let every branch count, and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval(), as_double(inputs)


def as_double(value):
    if isinstance(value, dict):
        return {key: as_double(each) for key, each in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def randomize(attachment) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in attachment.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def assert_as_reference(model: nn.Module, inputs, spec: Bottleneck) -> None:
    """Output and every gradient, and that the adapter and each of its tensors count."""
    with torch.no_grad():
        base = model(**inputs)[0]
    attachment = attach(model, spec)
    randomize(attachment)
    tensors = {name: each.clone() for name, each in attachment.state_dict().items()}
    got = model(**inputs)[0]
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    (got * weights).sum().backward()
    gradients = {name: each.grad for name, each in attachment.named_parameters()}
    attachment.remove()

    reference, leaves = with_reference(model, spec, tensors)
    expected = reference(**inputs)[0]
    (expected * weights).sum().backward()
    assert_close(got, expected, "the output")
    assert (got - base).abs().max() > 1e-3
    assert set(gradients) == set(leaves)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0, f"{name} does not count"
        assert_close(gradients[name], leaf.grad, name)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], base)


def assert_close(got: torch.Tensor | None, expected: torch.Tensor, name: str) -> None:
    assert got is not None, f"{name} has no gradient"
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < 1e-10, f"{name} is {error:.1e} off"


@pytest.mark.parametrize(("name", "source", "sink"), CASES)
def test_every_pair(name, source, sink):
    activation = list(ACTIVATIONS)[PAIRS.index((source, sink)) % len(ACTIVATIONS)]
    model, inputs = build(name)
    spec = Bottleneck(source, sink, 6, activation=activation, scale=0.75, dtype=torch.float64)
    assert_as_reference(model, inputs, spec)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("source", "sink"), [("attn2_out", "ff_in"), ("res_in", "res_out")])
def test_every_activation(source, sink, activation):
    model, inputs = build("sd")
    spec = Bottleneck(source, sink, 3, activation=activation, scale=2.0, dtype=torch.float64)
    assert_as_reference(model, inputs, spec)


def test_the_comparison_tells_positions_apart():
    """Every pair has outputs of its own, so that none of them passes for another; gated blocks too."""
    for name, pairs in (("sd", IN_TRANSFORMERS), ("pixart", IN_TRANSFORMERS), ("dit", WITHOUT_ATTN2)):
        model, inputs = build(name)
        sizes = attach(model, Bottleneck("ff_in", "ff_in", 6, dtype=torch.float64))
        randomize(sizes)
        tensors = {key: each.clone() for key, each in sizes.state_dict().items()}
        sizes.remove()
        outputs = []
        for source, sink in pairs:
            if source == "attn2_context":
                continue
            spec = Bottleneck(source, sink, 6, activation="silu", dtype=torch.float64)
            with torch.no_grad():
                outputs.append(with_reference(model, spec, tensors)[0](**inputs)[0])
        for first, one in enumerate(outputs):
            for other in outputs[:first]:
                assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(("source", "sink"), list(product(SINKS, SINKS)))
def test_exactly_twenty_pairs(source, sink):
    assert len(PAIRS) == 20
    if sink in SINKS[source]:
        spec = Bottleneck(source, sink)
        assert (spec.source, spec.sink) == (source, sink)
        return
    with pytest.raises(ValueError, match=r"^Bottleneck: ") as error:
        Bottleneck(source, sink)
    text = str(error.value)
    assert repr(sink) in text
    _, _, listed = text.rpartition("sinks")
    assert all(each in listed for each in SINKS[source]), text


@pytest.mark.parametrize("wrong", ["attn3_in", "", None, 3, ("attn1_in",)])
def test_names_that_are_no_position(wrong):
    with pytest.raises(ValueError, match=r"Bottleneck: source must be one of attn1_in, .*, res_out; got"):
        Bottleneck(wrong, "ff_in")
    with pytest.raises(
        ValueError, match=r"Bottleneck: sink must be one of attn1_in, attn2_in, .*, res_out; got"
    ):
        Bottleneck("attn1_in", wrong)


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        *[("dit", pair) for pair in PAIRS if pair not in WITHOUT_ATTN2],
        *[("pixart", pair) for pair in PAIRS if pair not in IN_TRANSFORMERS],
    ],
)
def test_positions_a_model_does_not_have(name, pair):
    model, inputs = build(name)
    with torch.no_grad():
        before = model(**inputs)[0]
    missing = next(each for each in pair if each.startswith(("attn2", "res")))
    with pytest.raises(ValueError, match=f"attach: .*{missing}"):
        attach(model, Bottleneck(*pair, 4))
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
    assert all(each.requires_grad for each in model.parameters())


def sd2_unet() -> nn.Module:
    """Stable Diffusion 2.x: 16 transformer blocks, context 1024."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )


UNETS = {"sd1": sd1_unet, "sd2": sd2_unet, "sdxl": sdxl_unet}
WIDTHS = {
    "sd1": [320] * 5 + [640] * 5 + [1280] * 6,
    "sd2": [320] * 5 + [640] * 5 + [1280] * 6,
    "sdxl": [640] * 10 + [1280] * 60,
}
"""Of the transformer blocks."""

CHANNELS = {
    "sd1": [
        *[(320, 320), (320, 320), (320, 640), (640, 640), (640, 1280), (1280, 1280)],
        *[(1280, 1280)] * 4,
        *[(2560, 1280)] * 5,
        *[(1920, 1280), (1920, 640), (1280, 640), (960, 640), (960, 320), (640, 320), (640, 320)],
    ],
    "sdxl": [
        *[
            (320, 320),
            (320, 320),
            (320, 640),
            (640, 640),
            (640, 1280),
            (1280, 1280),
            (1280, 1280),
            (1280, 1280),
        ],
        *[(2560, 1280), (2560, 1280), (1920, 1280), (1920, 640), (1280, 640), (960, 640)],
        *[(960, 320), (640, 320), (640, 320)],
    ],
}
CHANNELS["sd2"] = CHANNELS["sd1"]
"""In and out channels of the ResBlocks."""


@pytest.mark.parametrize(
    ("name", "total"), [("sd1", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684)]
)
def test_size_of_the_full_models(name, total):
    assert sum(each.numel() for each in UNETS[name]().parameters()) == total


@pytest.mark.parametrize(
    ("name", "options", "width", "expected"),
    [
        ("sd1", {"width": 60}, 60, 1_511_040),
        ("sd1", {"width": None, "budget": 0.75}, 256, 6_406_336),
        ("sd1", {"width": None, "budget": 0.17}, 56, 1_411_136),
        ("sd2", {"width": 60}, 60, 1_511_040),
        ("sd2", {"width": None, "budget": 0.75}, 256, 6_406_336),
        ("sdxl", {"width": 60}, 60, 10_071_400),
        ("sdxl", {"width": None, "budget": 0.75}, 112, 18_727_840),
    ],
)
def test_parameters_in_transformer_blocks(name, options, width, expected):
    """Σ over blocks of 2·d·H + H + d."""
    with attach(UNETS[name](), Bottleneck(**options)) as attachment:
        assert attachment.spec.width == width
        assert sorted(attachment.modules.values()) == [(d, d) for d in sorted(WIDTHS[name])]
        assert sum(each.numel() for each in attachment.parameters()) == expected
    assert sum(2 * d * width + width + d for d in WIDTHS[name]) == expected


@pytest.mark.parametrize(
    ("name", "blocks", "text", "expected"),
    [("sd1", 16, 768, 1_487_808), ("sd2", 16, 1024, 1_983_424), ("sdxl", 70, 2048, 17_350_760)],
)
def test_parameters_on_the_text(name, blocks, text, expected):
    with attach(UNETS[name](), Bottleneck("attn2_context", "attn2_context")) as attachment:
        assert list(attachment.modules.values()) == [(text, text)] * blocks
        assert sum(each.numel() for each in attachment.parameters()) == expected
    assert blocks * (2 * text * 60 + 60 + text) == expected


@pytest.mark.parametrize(
    ("name", "source", "sink", "width", "expected"),
    [
        ("sd1", "res_in", "res_in", 6, 3_303_492),
        ("sd1", "res_in", "res_out", 7, 3_224_794),
        ("sd1", "res_out", "res_out", 9, 3_326_598),
        ("sd2", "res_in", "res_out", 7, 3_224_794),
        ("sdxl", "res_in", "res_in", 6, 2_166_822),
        ("sdxl", "res_in", "res_out", 7, 2_149_559),
        ("sdxl", "res_out", "res_out", 9, 2_270_553),
    ],
)
def test_parameters_in_resblocks(name, source, sink, width, expected):
    """Σ over blocks of 2·K for the norm, 9·K·H + H down, 9·N·H + N up."""
    at = {"res_in": 0, "res_out": 1}
    sizes = [(channels[at[sink]], channels[at[source]]) for channels in CHANNELS[name]]
    with attach(UNETS[name](), Bottleneck(source, sink, width)) as attachment:
        assert sorted(attachment.modules.values()) == sorted(sizes)
        assert sum(each.numel() for each in attachment.parameters()) == expected
    assert sum(2 * k + 9 * k * width + width + 9 * n * width + n for n, k in sizes) == expected


def test_no_width_meets_the_budget():
    """Width 4 takes 4 · 24,976 + 12,480 parameters."""
    unet = sd1_unet()
    with pytest.raises(
        ValueError, match=r"no width meets a budget of 0\.01 % .*: the smallest, 4, takes 112,384 in 16"
    ):
        attach(unet, Bottleneck(width=None, budget=0.01))
    assert sum(each.numel() for each in unet.parameters()) == 859_520_964
