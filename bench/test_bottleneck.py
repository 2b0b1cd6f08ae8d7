"""Forward, and forward and backward, of one bottleneck on this CPU beside plain torch.

    pytest bench/test_bottleneck.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

These are contributors' runs: compare the arms of one group, and only within one run. `ratio_to_chain` in a saved run
comes from turns of both arms in alternation and is what travels between machines. The arms are those of
`kronafuse bench bottleneck`: `chain` is two F.linear, the activation, a multiplication by the scale and an addition;
`minimal` leaves the up bias out, so that scale and residual go through one addmm: the least that torch's own
operators can do, for a smaller problem.
"""

from __future__ import annotations

import pytest
import torch
from kronafuse.bench.arms import ARMS
from kronafuse.bench.arms.arm import Arm, step_of
from kronafuse.bench.problems import Spec
from kronafuse.bench.records import Mode
from kronafuse.bench.timing import interleave
from kronafuse.testing.bottleneck_cases import CASES

TURNS = 15
CASE_NAMES = (
    "sd15_320-width_60",
    "sd15_320-width_256",
    "sd15_640-width_60",
    "sd15_640-width_256",
    "sd15_1280-width_60",
    "sd15_1280-width_256",
    "sdxl_640-width_160",
    "dit_xl_1152-width_4",
    "sd15_context-width_60",
)
DTYPES = (torch.float32, torch.bfloat16)
NAMES = {"chain": "chain", "minimal": "minimal", "eager": "ours_eager"}
"""Name in a saved run -> arm of the suite."""
MODES: dict[str, Mode] = {"forward": "forward", "forward + backward": "forward_backward"}
BY_NAME: dict[str, Arm] = {arm.name: arm for arm in ARMS["bottleneck"]}


@pytest.mark.parametrize("arm", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))
@pytest.mark.parametrize("name", CASE_NAMES)
def test_bottleneck(benchmark, name, dtype, mode, arm):
    case = CASES[name]
    spec = Spec("bottleneck", case, 1, case.tokens, dtype, MODES[mode], torch.device("cpu"), dtype)
    problem = spec.make()
    step = step_of(BY_NAME[NAMES[arm]].build(problem), problem)
    benchmark.group = f"{name}-{str(dtype).removeprefix('torch.')}, {case.tokens} tokens, {mode}"
    results = benchmark.pedantic(step, rounds=TURNS, warmup_rounds=3)
    if arm != "chain":
        chain = step_of(BY_NAME["chain"].build(problem), problem)
        times = interleave({"arm": step, "chain": chain}, 0.0, least_rounds=TURNS)
        ratio = times["arm"].median / times["chain"].median
        benchmark.extra_info["ratio_to_chain"] = round(ratio, 3)
    assert all(torch.isfinite(each).all() for each in results)
