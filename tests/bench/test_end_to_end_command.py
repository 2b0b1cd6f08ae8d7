"""What is asked of training steps, and what is written of them: options, labels, rows and the command."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from kronafuse.bench.e2e import configs
from kronafuse.bench.e2e.arms import ARMS, spec_for
from kronafuse.bench.e2e.options import request_of
from kronafuse.bench.e2e.run import NOT_TIMED, label, run
from kronafuse.bench.e2e.table import step_table
from kronafuse.bench.machine import describe
from kronafuse.bench.records import Results
from kronafuse.nn.specs import LoRA
from rich.console import Console
from test_end_to_end import TINY, failing, request, rows_of

pytest.importorskip("diffusers")


def test_rows_are_written_as_arms_become_ready():
    """What a round keeps where it is stopped before the turns."""
    written = []
    arms = (ARMS["frozen"], ARMS["ours_lora_r16"])
    assert run(request(arms=arms), written.append) == []
    assert [(row.arm, row.step_ms is None, NOT_TIMED in row.notes) for row in written] == [
        ("frozen", True, True),
        ("ours_lora_r16", True, True),
        ("frozen", False, False),
        ("ours_lora_r16", False, False),
    ]
    assert written[1].trained_parameters == written[3].trained_parameters
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(step_table(written[:2]))
    assert console.export_text().count("not timed") == 2


def test_eager_steps_of_all_models_come_first():
    other = replace(TINY, name="other")
    asked = request(models=(TINY, other), arms=(ARMS["frozen"],), forms=("eager", "checkpointed"))
    written = []
    run(asked, written.append)
    places = list(dict.fromkeys((row.form, row.model) for row in written))
    models = ("tiny 8x8", "other 8x8")
    assert places == [(form, model) for form in ("eager", "checkpointed") for model in models]


def test_the_budget_ends_a_run_and_times_what_is_ready():
    """The clock: a reading at the start, one for the model, one an arm."""
    ticks = iter(range(100))
    asked = request(arms=(ARMS["frozen"], ARMS["ours_lora_r16"]), forms=("eager", "checkpointed"), budget=2.5)
    written = []
    skipped = run(asked, written.append, clock=lambda: next(ticks))
    assert [(row.arm, row.step_ms is not None) for row in written] == [("frozen", False), ("frozen", True)]
    assert skipped == ["tiny 8x8, batch 2, eager, ours_lora_r16", "tiny 8x8, checkpointed"]


def test_labels_say_what_is_scaled_down():
    assert label(TINY, request(side=16)) == "tiny"
    assert label(TINY, request()) == "tiny 8x8"
    assert label(TINY, request(side=16, text_tokens=3, dtype=torch.float32)) == "tiny 3 text float32"
    on_gpu = request(device=torch.device("cuda"))
    assert on_gpu.size_of(configs.SDXL) == (128, 77)
    assert on_gpu.size_of(configs.FLUX2_KLEIN) == (64, 512)
    assert on_gpu.size_of(configs.DIT_XL) == (32, 0)


def test_spec_sits_on_the_models_own_targets():
    assert spec_for(LoRA(4), configs.FLUX2_KLEIN).targets == configs.FLUX2_TARGETS


def test_options():
    asked = request_of(device="cpu")
    assert [each.name for each in asked.models] == ["sd15", "dit_xl"]
    assert (asked.batches, asked.forms, asked.dtype) == ((1,), ("eager",), torch.float32)
    asked = request_of(
        models=["s*"], arms=["peft_*", "ours_lora_r16"], forms=["comp*"], dtype="bfloat16", batches=[4]
    )
    assert [each.name for each in asked.models] == ["sd15", "sdxl"]
    names = [
        "frozen",
        "ours_lora_r16",
        "peft_lora_r16",
        "peft_lora_r16_autocast",
        "peft_lokr_f8",
        "peft_lokr_f8_autocast",
    ]
    assert [each.name for each in asked.arms] == names
    assert asked.forms == ("compiled",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"models": ["sd3"]}, "no model matches 'sd3'; there are sd15, sdxl, dit_xl, flux2_klein"),
        ({"arms": ["lora"]}, "no arm matches 'lora'; there are frozen, ours_krona_64x4"),
        ({"forms": ["graph"]}, "no form matches 'graph'; there are eager, compiled, checkpointed"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"device": "mps"}, "device must be cuda or cpu; got 'mps'"),
        ({"batches": [1, 0]}, "batch must be at least 1; got 1, 0"),
        ({"side": 0}, "size must be at least 1; got 0"),
        ({"budget": 0.0}, "budget must be above 0; got 0"),
    ],
)
def test_rejects_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        request_of(**{"device": "cpu", **wrong})


def test_rows_survive_the_file_and_the_table(tmp_path):
    rows = rows_of(request(arms=(ARMS["frozen"], failing("broken", 1))))
    results = Results(describe(["kronafuse", "bench", "e2e"]))
    for row in rows.values():
        results = results.with_step(row)
    results.write(tmp_path / "e2e.json")
    assert Results.read(tmp_path / "e2e.json") == results
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(step_table(results.steps))
    text = console.export_text()
    assert "MemoryError: call 1" in text
    assert "ratio to frozen" in text


def test_the_command_writes_as_it_goes(tmp_path, monkeypatch):
    """An interrupt after the second row leaves a file with both."""
    from kronafuse.bench.e2e import options
    from kronafuse.bench.e2e import run as running
    from kronafuse.cli.bench.e2e import e2e

    monkeypatch.setitem(options.MODELS, "tiny", TINY)
    measure = running.run

    def interrupted(asked, write):
        seen = []

        def counting(row):
            write(row)
            seen.append(row)
            if len(seen) == 2:
                raise KeyboardInterrupt

        measure(asked, counting)

    monkeypatch.setattr(running, "run", interrupted)
    out = tmp_path / "steps.json"
    with pytest.raises(KeyboardInterrupt):
        e2e(
            model=["tiny"], batch=[1], arm=["ours_l*"], form=None, steps=2, dtype="bfloat16", size=None,
            text_tokens=None, device="cpu", budget=None, out=out,
        )  # fmt: skip
    assert [row.arm for row in Results.read(out).steps] == ["frozen", "ours_lokr_f8"]
    assert json.loads(out.read_text())["machine"]["torch"] == torch.__version__
