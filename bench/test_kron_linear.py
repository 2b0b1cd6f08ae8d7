"""Forward and backward of one adapted layer on this CPU beside the frozen layer, the eager chain and PEFT.

    pytest bench --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

These are contributors' runs: compare the arms of one group, and only within one run. `ratio_to_frozen` in a saved run
comes from turns of both arms in alternation and is what travels between machines. The arms are those of
`kronafuse bench kron_linear`, which times all of them and more.
"""

from __future__ import annotations

import pytest
import torch
from kronafuse.bench.arms import ARMS
from kronafuse.bench.arms.arm import Arm, step_of
from kronafuse.bench.problems import Problem, Spec
from kronafuse.bench.timing import interleave
from kronafuse.testing.cases import CASES

TOKENS = 2048
TURNS = 9
ADAPTERS = ("krona_64x4", "krona_4x64", "lokr_f8", "lokr_square", "lokr_f8_r16", "lora_r16")
DTYPES = (torch.float32, torch.bfloat16)
NAMES = {"frozen": "frozen", "chain": "einsum", "eager": "ours_eager", "peft": "peft_lokr"}
"""Name in a saved run -> arm of the suite."""
BY_NAME: dict[str, Arm] = {arm.name: arm for arm in ARMS["kron_linear"]}


def problem_of(adapter: str, dtype: torch.dtype) -> Problem:
    case = CASES[f"sdxl_1280-{adapter}"]
    spec = Spec("kron_linear", case, 1, TOKENS, dtype, "forward_backward", torch.device("cpu"), dtype)
    return spec.make()


@pytest.mark.parametrize("arm", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_forward_and_backward(benchmark, adapter, dtype, arm):
    if arm == "peft" and not adapter.startswith("lokr"):
        pytest.skip("PEFT has no KronA; LoKr alone is compared")
    problem, chosen = problem_of(adapter, dtype), BY_NAME[NAMES[arm]]
    reasons = chosen.reasons(problem.spec)
    if reasons:
        pytest.skip("; ".join(reasons))
    step = step_of(chosen.build(problem), problem)
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"sdxl_1280-{adapter}-{name}, {TOKENS} tokens, forward + backward"
    grads = benchmark.pedantic(step, rounds=TURNS, warmup_rounds=2)
    if arm != "frozen":
        frozen = step_of(BY_NAME["frozen"].build(problem), problem)
        times = interleave({"arm": step, "frozen": frozen}, 0.0, least_rounds=TURNS)
        ratio = times["arm"].median / times["frozen"].median
        benchmark.extra_info["ratio_to_frozen"] = round(ratio, 3)
    assert all(torch.isfinite(grad).all() for grad in grads)
