"""Groups with parameters in fp32, sizes of one, and what memory a step holds on to: nothing longer than it is read."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronafuse import FrozenLinear, KronTerm, env
from kronafuse.ops.kron_linear import eager, kernels, reduction_tuning, sum_kernel
from kronafuse.ops.kron_linear.algorithm import backward, forward
from kronafuse.ops.kron_linear.mix_kernel import Left, mix_tokens
from kronafuse.ops.kron_linear.shrink_kernel import Down, shrink_rows
from kronafuse.ops.kron_linear.sum_kernel import MOST_SPLITS, SLOTS, SecondStages, block_splits
from kronafuse.ops.kron_linear.tuning import SHARED_BYTES
from kronafuse.ops.launch import Architecture, Launch, recording
from kronafuse.ops.outputs import poisoned
from kronafuse.testing.cases import CASES
from kronafuse.testing.inputs import generator, random
from kronafuse.testing.launch_costs import launch_us
from kronafuse.testing.launches import recorded_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
H200 = Architecture(90, 132)

COMPILED = """
from kronafuse.ops.launch import Architecture, recording
from kronafuse.shapes import KronShape
from kronafuse.testing.aot import compile_launch
from kronafuse.testing.aot_problems import META, bottleneck_step, prepare_train_step
from kronafuse.testing.bottleneck_cases import CASES as BOTTLENECKS
from kronafuse.testing.cases import CASES, Case
import torch

one_token = Case("one_token", 1, KronShape(1, 1, 640, 2048, 16), has_a=False)
one_feature = Case("one_feature", 1, KronShape(1, 1, 64, 64, 1), has_a=False)
problems = [
    (90, CASES["sdxl_1280-krona_64x4"], 4), (90, CASES["flux2_3072-krona_64x4"], 3),
    (86, CASES["sdxl_1280-krona_64x4"], 3), (86, CASES["sdxl_1280-krona_4x64"], 4),
    (90, one_token, 1), (90, one_token, 3), (90, one_feature, 1),
]
kernels = ("_shrink_kernel", "_mix_kernel", "_sum_kernel")
for capability, case, layers in problems:
    with recording(Architecture(capability, 100)) as launches:
        prepare_train_step(case, torch.bfloat16, META, layers=layers, factor_dtype=torch.float32)()
    chosen = [launch for launch in launches if launch.kernel.__name__ in kernels]
    for launch in {repr((each.kernel.__name__, each.constants)): each for each in chosen}.values():
        for problem in compile_launch(case.name, launch, "bf16", capability).problems():
            print(f"sm_{capability} {layers} x {case.name} {launch.kernel.__name__}: {problem}")
for capability, name in ((90, "sd15_320-width_256"), (86, "sd15_320-width_60")):
    with recording(Architecture(capability, 100)) as launches:
        bottleneck_step(BOTTLENECKS[name], torch.bfloat16, everything=True)
    for launch in launches:
        if "bottleneck" in launch.kernel.__name__:
            for problem in compile_launch(name, launch, "bf16", capability).problems():
                print(f"sm_{capability} {name} {launch.kernel.__name__}: {problem}")
print("done")
"""


@pytest.mark.parametrize("older", [False, True], ids=["pinned", "oldest"])
def test_groups_and_sizes_of_one_compile(older, tmp_path):
    """q, k and v with fp32 factors beside bf16 activations; one token, whose size is a constant, with a split sum."""
    path = ROOT / ".cache" / "triton-3.6.0"
    if older and not path.is_dir():
        pytest.skip(f"no {path.relative_to(ROOT)}: run `make aot`")
    environment = {name: value for name, value in os.environ.items() if name != env.TRITON_INTERPRET}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    if older:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["done"]


def test_one_tile_of_factors_whatever_their_number():
    """fp32 factors count as such, and every choice of the rule fits the smallest shared memory."""
    for rows in (16, 4096, 1 << 20):
        for width in (16, 64, 80, 128, 320):
            for features in (64, 320, 2048):
                config = reduction_tuning.shrink_config(torch.bfloat16, rows, width, features)
                for capability in SHARED_BYTES:
                    assert config.reasons(Architecture(capability, 100), torch.bfloat16) == []
    wide = reduction_tuning.ShrinkConfig(64, 128, 64, 1, 320, 4, 3)
    assert wide.reasons(Architecture(86, 84), torch.bfloat16) == [
        "122880 bytes of shared memory, sm_86 has 101376"
    ]


def test_slots_take_their_own_factors():
    """Four maps of different widths side by side, over the border of a tile, with and without a split K."""
    source = generator(0)
    view = random(source, 37, 3, 100, dtype=torch.float16).to(DEVICE)
    downs = [
        Down(random(source, width, 100, dtype=torch.float32).to(DEVICE), 0.5 + index)
        for index, width in enumerate((5, 16, 1, 30))
    ]
    for split, k_per_split in ((1, 112), (3, 48)):
        config = reduction_tuning.ShrinkConfig(16, 16, 16, split, k_per_split, 4, 2)
        with poisoned():
            ts = shrink_rows(view, downs, None, config=config)
        for t, down in zip(ts, downs, strict=True):
            truth = down.scale * view.double() @ down.d.half().double().t()
            assert (t.view(37, 3, -1).double() - truth).abs().max() < 0.02 * truth.abs().max()
    lefts = [Left(random(source, 7, 20, dtype=torch.float32).to(DEVICE), 0.5 + index) for index in range(4)]
    p = random(source, 37, 20, 6, dtype=torch.float16).to(DEVICE)
    with poisoned():
        mixed = mix_tokens(p, lefts, config=reduction_tuning.MixConfig(32, 16, 16, 4, 2))
    for t, left in zip(mixed, lefts, strict=True):
        truth = left.scale * left.a.half().double() @ p.double()
        assert (t.double() - truth).abs().max() < 0.02 * truth.abs().max()


def test_factors_of_two_dtypes_share_no_tile():
    """Thin maps whose parameters differ in dtype go by dense forms of x's dtype."""
    source = generator(1)
    x = random(source, 9, 60, dtype=torch.float16).to(DEVICE)

    def factor(*shape: int, dtype: torch.dtype) -> Tensor:
        return random(source, *shape, dtype=dtype).to(DEVICE)

    weight = factor(60, 60, dtype=torch.float16)
    layers = [
        FrozenLinear(weight, (KronTerm(None, factor(60, 3, dtype=dtype), factor(3, 60, dtype=dtype)),))
        for dtype in (torch.float32, torch.float16)
    ]
    with recording(H200) as launches:
        forward(x, layers, kernels)
    assert [each.kernel.__name__ for each in launches].count("_shrink_kernel") == 1
    ys, _ = forward(x, layers, kernels)
    for y, layer in zip(ys, layers, strict=True):
        (term,) = layer.terms
        assert term.b_down is not None
        assert layer.weight is not None
        truth = x.double() @ layer.weight.double().t()
        truth = truth + x.double() @ term.b_down.double().t() @ term.b.double().t()
        assert (y.double() - truth).abs().max() < 0.02 * truth.abs().max()


def watched(alive: list[int], *names: str) -> Any:
    """`eager`, which notes, whenever it computes first products, how many of the earlier ones are still there."""
    seen: list[weakref.ref[Tensor]] = []

    def watch(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            alive.append(sum(each() is not None for each in seen))
            result = getattr(eager, name)(*arguments)
            seen.extend(weakref.ref(each) for each in (result if name == "shrink" else result[0]))
            return result

        return call

    return SimpleNamespace(**{**vars(eager), **{name: watch(name) for name in names}})


def fat_layers(count: int) -> tuple[Tensor, list[FrozenLinear]]:
    def layer() -> FrozenLinear:
        return FrozenLinear(torch.randn(48, 48), (KronTerm(torch.randn(4, 4), torch.randn(12, 12)),))

    return torch.randn(64, 48), [layer() for _ in range(count)]


def test_fat_first_products_go_before_the_next_layers_come():
    """Forward and backward of a fat group hold one layer's first product at a time, as large as x."""
    x, layers = fat_layers(3)
    alive: list[int] = []
    _, saved = forward(x, layers, watched(alive, "shrink"))
    assert [part.numel() for part in saved] == [0, 0, 0], "the layers are not fat"
    assert alive == [0, 0, 0]
    alive.clear()
    needs = [True, *[False] * 6, *[True, True, False, False, False] * 3]
    backward([torch.randn(64, 48) for _ in layers], x, layers, saved, needs, watched(alive, "shrink_reduce"))
    assert alive == [0, 0, 0]


def test_small_fat_first_products_share_the_read_of_x():
    """Those that are saved all the same are there at once anyway."""
    x, layers = fat_layers(3)
    alive: list[int] = []
    _, saved = forward(x, layers, watched(alive, "shrink"), small_bytes=1 << 20)
    assert [part.shape for part in saved] == [(64, 48)] * 3
    assert alive == [0]


def ups_built(launches: list[Launch]) -> int:
    return sum(each.constants.get("UPS", 0) for each in launches)


def dense_layers(count: int) -> tuple[Tensor, list[FrozenLinear], list[Tensor]]:
    """Layers whose dx multiplies a thin T by a dense L: x, the layers, what forward saved."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(4096, 1280, dtype=torch.bfloat16)
    weight = meta(1280, 1280, dtype=torch.bfloat16)
    layers = [FrozenLinear(weight, (KronTerm(meta(4, 64), meta(320, 20)),)) for _ in range(count)]
    with recording(H200):
        _, saved = forward(x, layers, kernels)
    return x, layers, saved


def test_dense_ups_are_built_only_for_a_second_product():
    """Where dx is not asked for, no launch of backward builds an L."""
    x, layers, saved = dense_layers(1)
    for need_x in (True, False):
        with recording(H200) as launches:
            backward([x], x, layers, saved, [need_x, False, False, True, True, False, False, False], kernels)
        assert ups_built(launches) == need_x


def test_dense_ups_go_with_their_layer(monkeypatch):
    """The L that dx of one layer took is gone when the next layer's dx comes."""
    built: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    linear = kernels.linear
    x, layers, saved = dense_layers(3)
    with recording(H200) as launches:

        def watch(dy: Tensor, weight: Any, bias: Any, base: Any, maps: Any, *others: Any) -> Tensor:
            alive.append(sum(each() is not None for each in built))
            built.extend(weakref.ref(kron.dense_up) for kron in maps)
            result = linear(dy, weight, bias, base, maps, *others)
            # What is recorded would hold on to it.
            launches.clear()
            return result

        monkeypatch.setattr(kernels, "linear", watch)
        needs = [True, *[False] * 6, *[True, True, False, False, False] * 3]
        backward([x] * 3, x, layers, saved, needs, kernels)
    assert len(built) == 3
    assert alive == [0, 0, 0]


def sums(*splits: int) -> list[tuple[Tensor, Tensor]]:
    source = generator(2)
    return [
        (random(source, split, 40, dtype=torch.float32).to(DEVICE), torch.empty(40, device=DEVICE))
        for split in splits
    ]


def test_the_order_of_a_sum_is_its_own():
    """What shares a launch changes neither how many partial sums are added at a time nor the result."""
    splits = (3, 300, 17, 1)
    together = sums(*splits)
    with recording(H200) as launches:
        stages = SecondStages()
        for partial, out in together:
            stages.add(partial, out, 0.5)
        stages.finish()
    (launch,) = launches
    assert [launch.constants[f"BLOCK_S{slot}"] for slot in range(SLOTS)] == [4, MOST_SPLITS, 32, 1]
    for index, split in enumerate(splits):
        partial = sums(*splits)[index][0]
        alone, among = torch.empty(40, device=DEVICE), torch.empty(40, device=DEVICE)
        stages = SecondStages()
        stages.add(partial, alone, 0.5)
        with recording(H200) as launches:
            sum_kernel.sum_partials([sum_kernel.PartialSum(partial, alone, 0.5)])
        assert launches[0].constants["BLOCK_S0"] == block_splits(split)
        stages.finish()
        for other, out in sums(*splits[:index]):
            stages.add(other, out, 1.0)
        stages.add(partial, among, 0.5)
        stages.finish()
        assert torch.equal(alone, among)


def test_waiting_sums_take_so_much_memory_at_most(monkeypatch):
    monkeypatch.setattr(sum_kernel, "WAITING_BYTES", 2 * 3 * 40 * 4)
    stages, done = SecondStages(), [torch.full((40,), float("nan"), device=DEVICE) for _ in range(4)]
    source = generator(3)
    partials = [random(source, 3, 40, dtype=torch.float32).to(DEVICE) for _ in done]
    for partial, out in zip(partials, done, strict=True):
        stages.add(partial, out, 1.0)
    assert [bool(out.isnan().any()) for out in done] == [False, False, False, True]
    stages.finish()
    for partial, out in zip(partials, done, strict=True):
        assert torch.allclose(out, partial.sum(0))


def test_partial_sums_are_finished_after_their_launch(monkeypatch):
    """With no memory to wait, each gradient is finished at once, and is the same to the bit."""
    from kronafuse.testing.accuracy import run
    from kronafuse.testing.cases import ODD_CASES
    from kronafuse.testing.inputs import case_inputs

    def triton_group(x: Tensor, layers: Any) -> list[Tensor]:
        from kronafuse import kron_linear_group

        with poisoned():
            return kron_linear_group(x, layers, impl="triton")

    case = ODD_CASES["many_tokens_b_first"]
    x, layer = case_inputs(case, torch.float16, factor_dtype=torch.float32)
    dys = [random(generator(5), case.tokens, case.shape.n, dtype=torch.float16)]
    expected = run(triton_group, x.to(DEVICE), [layer], dys)
    monkeypatch.setattr(sum_kernel, "WAITING_BYTES", 0)
    found = run(triton_group, x.to(DEVICE), [layer], dys)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


PREDICTED_SHARES = {
    ("krona_64x4", 1): 0.14,
    ("lokr_f8", 1): 0.09,
    ("krona_64x4", 4): 0.07,
    ("lokr_f8", 4): 0.04,
}
"""(Adapter, images) -> the predicted share of second stages in a backward at sdxl_1280, as the op's README has it."""


@pytest.mark.parametrize(("adapter", "images"), PREDICTED_SHARES)
def test_the_cost_of_ordered_sums(adapter, images):
    launches = recorded_step([CASES[f"sdxl_1280-{adapter}"]], H200, batch=images).backward
    times_us = [(each.kernel.__name__, launch_us(H200, each)) for each in launches]
    sums_us = [time_us for name, time_us in times_us if name == "_sum_kernel"]
    share = sum(sums_us) / sum(time_us for _, time_us in times_us)
    assert len(sums_us) == 1
    assert 3 <= sums_us[0] <= 4
    assert share == pytest.approx(PREDICTED_SHARES[adapter, images], abs=0.01)
    text = " ".join((ROOT / "kronafuse/ops/kron_linear/README.md").read_text().split())
    assert (
        "14 % for the thin `krona_64x4` and 9 % for the fat `lokr_f8` with one image, 7 % and 4 % with"
        in text
    )


def test_bottleneck_factors_are_cast_as_they_are_read():
    """fp32 parameters under autocast: the kernels take them as they are, and torch launches nothing for them."""
    from kronafuse.ops.bottleneck import kernels as bottleneck
    from kronafuse.ops.bottleneck.call import Call, Needs

    source = generator(6)
    x = random(source, 37, 40, dtype=torch.float16).to(DEVICE)
    down, up = (random(source, *shape, dtype=torch.float32).to(DEVICE) for shape in ((24, 40), (40, 24)))
    call = Call(x, x, down, up, None, None, 0.5, "relu", torch.float16, True)
    with recording(H200) as launches:
        _, pre = bottleneck.forward(call, True)
        bottleneck.backward(x, call, pre, Needs(True, True, True, False, False, False))
    own = [each for each in launches if "bottleneck" in each.kernel.__name__]
    assert len(own) == 2
    assert all(each.arguments["down_ptr"] is down and each.arguments["up_ptr"] is up for each in own)
    cast = call._replace(down=down.half(), up=up.half())
    for keep in (True, False):
        with poisoned():
            found, expected = bottleneck.forward(call, keep), bottleneck.forward(cast, keep)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
        assert found[1].shape == ((37, 24) if keep else (0,))
