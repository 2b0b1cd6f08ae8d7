"""Training steps of a small model with every arm, on the CPU."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from kronafuse.bench.e2e import configs, memory, step
from kronafuse.bench.e2e.arms import ARMS, Adapted, StepArm, adapted_layers
from kronafuse.bench.e2e.configs import MODELS, StepModel
from kronafuse.bench.e2e.models import build, make_batch, sharing_copy
from kronafuse.bench.e2e.run import Request, run
from torch import nn

pytest.importorskip("diffusers")

CPU = torch.device("cpu")
TINY = StepModel(
    name="tiny",
    kind="unet",
    class_name="UNet2DConditionModel",
    config={
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    parameters=3_152_644,
    source="this test",
    side=16,
    text_tokens=5,
    cpu_side=8,
    cpu_tokens=5,
)


def request(**changes) -> Request:
    values = {
        "models": (TINY,),
        "batches": (2,),
        "arms": tuple(ARMS.values()),
        "forms": ("eager",),
        "device": CPU,
        "dtype": torch.bfloat16,
        "steps": 2,
    }
    return Request(**values | changes)


def rows_of(asked: Request):
    rows = []
    run(asked, rows.append)
    return {(row.form, row.arm): row for row in rows}


def meta(model: StepModel) -> nn.Module:
    """The model without memory."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, model.class_name)(**model.config)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_published_configurations(model):
    """The counts that `configs` states, and adapters on every attention block."""
    from kronafuse.models.sites import attention_blocks

    built = meta(model)
    assert sum(each.numel() for each in built.parameters()) == model.parameters
    names = adapted_layers(built, model)
    assert all(any(name.startswith(f"{block}.") for name in names) for block in attention_blocks(built))
    attention = [
        name for name, each in built.named_modules() if ".attn" in name and isinstance(each, nn.Linear)
    ]
    assert sorted(names) == sorted(attention)


ALIKE = (
    {"ours_lora_r16", "peft_lora_r16"},
    {"ours_lokr_f8", "peft_lokr_f8", "lycoris_rebuild_f8"},
    {"ours_krona_64x4"},
)
"""Arms that put the same adapter on a model."""


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_adapters_fit_the_published_sizes(model):
    """Every library puts equally many parameters on the same layers, those of the whole model."""
    pytest.importorskip("peft")
    pytest.importorskip("lycoris")
    layers = len(adapted_layers(meta(model), model))
    for arms in ALIKE:
        trained = set()
        for name in arms:
            built = nn.Module.to(meta(model), dtype=torch.bfloat16)
            with torch.device("meta"):
                adapted = ARMS[name].put(built, model)
            trained.add(sum(each.numel() for each in adapted.parameters))
            assert len(adapted.parameters) == 2 * layers
        assert len(trained) == 1


def test_dit_counts_as_published_without_the_repeated_embedding():
    blocks = meta(configs.DIT_XL).transformer_blocks
    repeated = sum(each.numel() for each in blocks[0].norm1.emb.parameters())
    assert round((configs.DIT_XL.parameters - (len(blocks) - 1) * repeated) / 1e6) == 675


SMALL = {
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
        "transformer_layers_per_block": (1, 1, 2),
    },
    "dit_xl": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64},
    "flux2_klein": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
    },
}
"""What makes a published configuration small; everything else stays."""


def small(name: str) -> StepModel:
    of = replace(MODELS[name], config={**MODELS[name].config, **SMALL[name]})
    return replace(of, parameters=sum(each.numel() for each in meta(of).parameters()))


@pytest.mark.parametrize("name", SMALL)
def test_inputs_of_every_kind(name):
    """A step of ours and of the frozen model through the real classes, with their own kinds of input."""
    model = small(name)
    arms = (ARMS["frozen"], ARMS["ours_lokr_f8"])
    rows = rows_of(request(models=(model,), batches=(1,), arms=arms, side=8, text_tokens=6))
    assert [row.error for row in rows.values()] == [None, None]
    assert rows["eager", "ours_lokr_f8"].trained_parameters > 0


def test_every_arm():
    again = ("frozen", "ours_krona_64x4", "peft_lora_r16")
    rows = rows_of(request())
    rows |= rows_of(request(arms=[ARMS[each] for each in again], forms=("checkpointed",)))
    assert len(adapted_layers(meta(TINY), TINY)) == 32
    assert set(rows) == {("eager", arm) for arm in ARMS} | {("checkpointed", arm) for arm in again}
    absent = {"peft": "peft", "lycoris": "lycoris"}
    for (form, arm), row in rows.items():
        if arm == "lycoris_bypass_triton_f8":
            assert "no operator of lycoris:: ran in a step" in row.error
            continue
        library = arm.split("_")[0]
        if library in absent and importlib.util.find_spec(absent[library]) is None:
            assert "install with: pip install " in row.error
            continue
        assert row.error is None, row
        assert (row.model, row.batch, row.form) == ("tiny 8x8", 2, form)
        assert row.step_ms.rounds == 2
        assert row.step_ms.low <= row.step_ms.median <= row.step_ms.high
        assert row.ratio_to_frozen == pytest.approx(row.step_ms.median / rows[form, "frozen"].step_ms.median)
        assert "run at 8x8 latents and 5 text tokens, published for 16x16" in row.notes
        # 20 calls a step: 8 groups of q, k and v or of k and v, 4 q alone, 8 out; twice forward where checkpointed.
        if library == "ours":
            forwards = 40 if form == "checkpointed" else 20
            assert f"kronafuse::kron_forward ×{forwards}" in " ".join(row.notes)
    trained = {arm: row.trained_parameters for (form, arm), row in rows.items() if form == "eager"}
    assert trained["frozen"] == 0
    assert trained["ours_krona_64x4"] == 9024
    same = {"ours_lokr_f8", "peft_lokr_f8", "lycoris_rebuild_f8", "lycoris_bypass_f8"}
    assert {trained[arm] for arm in same if trained[arm] is not None} == {5376}
    assert trained["ours_lora_r16"] == trained["peft_lora_r16"] == trained["peft_lora_r16_autocast"] == 79_872
    # On a CPU LyCORIS chooses torch for all of its layers.
    automatic = rows["eager", "lycoris_bypass_auto_f8"]
    if automatic.error is None:
        assert "a step over 32 adapted layers ran no operator of lycoris::" in automatic.notes


def test_arms_share_the_frozen_weights_and_train():
    model, batch = build(TINY, torch.float32, CPU), make_batch(TINY, 1, 8, 5, torch.float32, CPU)
    before = [each.clone() for each in model.parameters()]
    copied = sharing_copy(model)
    assert all(one is other for one, other in zip(model.parameters(), copied.parameters(), strict=True))
    arm = ARMS["ours_lora_r16"]
    adapted = arm.put(copied, TINY)
    training = step.Step(arm, adapted, "eager", batch)
    losses = [float(training()) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert batch.x.grad is None
    assert all(torch.equal(one, each) for one, each in zip(before, model.parameters(), strict=True))
    assert len(list(model.modules())) < len(list(copied.modules()))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning"
)  # diffusers' own
def test_compiled(monkeypatch):
    """The form's own steps; inductor would take minutes here, and adds nothing to them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = rows_of(request(arms=(ARMS["ours_krona_64x4"],), forms=("compiled",)))
    ours = rows["compiled", "ours_krona_64x4"]
    assert ours.error is None
    assert "0 graph breaks" in ours.notes
    assert "kronafuse::kron_forward" in " ".join(ours.notes)


def failing(name: str, at: int) -> StepArm:
    """An arm that raises in call number `at` of its model."""

    def put(model, _of):
        calls = iter(range(1, 1000))

        def check(*_arguments):
            if next(calls) == at:
                raise MemoryError(f"call {at}\nmore")

        model.register_forward_pre_hook(check)
        return Adapted(model, [])

    return StepArm(name, put)


def test_a_failing_arm_is_a_row_and_stops_nothing():
    def refuse(_model, _of):
        raise ValueError("cannot be put")

    class Endless(nn.Module):
        def forward(self, sample, **_inputs):
            return (sample * float("nan"),)

    arms = (
        ARMS["frozen"],
        StepArm("at_once", refuse),
        failing("first_step", 1),
        failing("while_timed", 3),
        StepArm("not_finite", lambda _model, _of: Adapted(Endless(), [])),
        StepArm("no_library", lambda model, _of: Adapted(model, []), ("no_such_library", "extra")),
        StepArm("no_operator", lambda model, _of: Adapted(model, []), operator="kronafuse::"),
        replace(ARMS["ours_lora_r16"], name="ours"),
    )
    rows = {arm: row for (_, arm), row in rows_of(request(arms=arms)).items()}
    errors = {arm: row.error for arm, row in rows.items()}
    assert errors == {
        "frozen": None,
        "ours": None,
        "at_once": "ValueError: cannot be put",
        "first_step": "MemoryError: call 1",
        "while_timed": "MemoryError: call 3",
        "not_finite": "RuntimeError: not_finite: the loss is nan",
        "no_library": "ImportError: no_library: needs no_such_library; install with: pip install extra",
        "no_operator": "RuntimeError: no_operator: no operator of kronafuse:: ran in a step: its library took"
        " another path",
    }
    assert rows["ours"].ratio_to_frozen is not None
    assert rows["while_timed"].step_ms is None


def test_without_a_frozen_row_there_is_no_ratio():
    arms = (replace(failing("frozen", 1)), ARMS["ours_lora_r16"])
    rows = rows_of(request(arms=arms))
    assert rows["eager", "frozen"].error == "MemoryError: call 1"
    assert rows["eager", "ours_lora_r16"].step_ms is not None
    assert rows["eager", "ours_lora_r16"].ratio_to_frozen is None


def test_a_model_that_cannot_be_built_is_rows_too():
    other = replace(TINY, parameters=TINY.parameters + 1)
    rows = rows_of(request(models=(other,), arms=(ARMS["frozen"], ARMS["ours_lora_r16"])))
    assert len(rows) == 2
    for row in rows.values():
        assert "has 3,152,644 parameters with the configuration of tiny, expected 3,152,645" in row.error


def test_autocast_needs_a_bf16_model():
    rows = rows_of(request(arms=(ARMS["frozen"], ARMS["peft_lokr_f8_autocast"]), dtype=torch.float32))
    error = rows["eager", "peft_lokr_f8_autocast"].error
    if importlib.util.find_spec("peft") is not None:
        assert "bf16 autocast would change the frozen model too, which is torch.float32" in error


def test_environment_holds_for_the_arm_alone(monkeypatch):
    monkeypatch.delenv("KRONAFUSE_TEST_A", raising=False)
    monkeypatch.setenv("KRONAFUSE_TEST_B", "before")
    arm = StepArm(
        "arm",
        lambda model, _of: Adapted(model, []),
        environment={"KRONAFUSE_TEST_A": "1", "KRONAFUSE_TEST_B": "2"},
    )

    def fail():
        with arm.surroundings(CPU):
            assert (os.environ["KRONAFUSE_TEST_A"], os.environ["KRONAFUSE_TEST_B"]) == ("1", "2")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert "KRONAFUSE_TEST_A" not in os.environ
    assert os.environ["KRONAFUSE_TEST_B"] == "before"


@pytest.mark.skipif(
    not memory.CLEAR.exists(), reason="the system does not report the peak of the resident set"
)
def test_peak_of_the_resident_set():
    def step_of(size_bytes):
        return lambda: torch.ones(size_bytes // 4).sum()

    small, what = memory.peak_bytes(step_of(2**20), CPU, 0)
    large, _ = memory.peak_bytes(step_of(2**27), CPU, 0)
    again, _ = memory.peak_bytes(step_of(2**20), CPU, 0)
    assert what == "peak: growth of the resident set in a step"
    assert 0.9 * 2**27 < large < 1.5 * 2**27
    assert max(small, again) < 2**25
