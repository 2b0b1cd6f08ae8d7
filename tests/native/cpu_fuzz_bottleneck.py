"""Random calls of the bottleneck's operators in torch.ops.kronafuse_cpu, as `cpu_fuzz.py` makes them of the others.

`test_cpu_fuzz_bottleneck.py` runs it in a process of its own: python tests/native/cpu_fuzz_bottleneck.py SEED CALLS
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from cpu_fuzz import COMPUTES, DTYPES, Arguments, Source, describe, spoil, widened
from kronafuse import native
from kronafuse.ops.bottleneck import eager
from kronafuse.ops.bottleneck.activation_numbers import ACTIVATIONS
from kronafuse.ops.bottleneck.call import Call, Needs
from torch import Tensor

GRADIENTS = ("dx", "ddown", "dup", "ddown_bias", "dup_bias", "dscale")
FACTORS = ("down", "up", "down_bias", "up_bias")


def _sizes(source: Source) -> tuple[int, int, int, int]:
    m, *others = source.sizes(4)
    k, h, n = (max(1, size) for size in others)
    return m, k, h, n


def good_forward(source: Source) -> Arguments:
    m, k, h, n = _sizes(source)
    compute = source.random.choice(COMPUTES)
    streams = [compute, torch.float32]
    scale = torch.randn(1).to(source.random.choice(DTYPES)) if source.chance(0.3) else None
    residual = source.maybe([m, n], streams)
    y_dtype = compute if residual is None else torch.promote_types(compute, residual.dtype)
    return {
        "x": source.input([m, k], streams),
        "residual": residual,
        "down": source.input([h, k], DTYPES),
        "up": source.input([n, h], DTYPES),
        "down_bias": source.maybe([h], DTYPES),
        "up_bias": source.maybe([n], DTYPES),
        "scale_tensor": scale,
        "scale": source.scale(),
        "activation": source.random.choice(list(ACTIVATIONS.values())),
        "y": torch.full((m, n), float("nan"), dtype=y_dtype),
        "pre": torch.full((m, h) if source.chance(0.7) else (0,), float("nan"), dtype=compute),
    }


def good_backward(source: Source) -> Arguments:
    m, k, h, n = _sizes(source)
    compute = source.random.choice(COMPUTES)
    streams = [compute, torch.float32]
    adds_dy = source.chance(0.5)
    n = k if adds_dy else n
    scale = torch.randn(1).to(source.random.choice(DTYPES)) if source.chance(0.5) else None
    shapes = {
        "dx": ([m, k], streams),
        "ddown": ([h, k], DTYPES),
        "dup": ([n, h], DTYPES),
        "ddown_bias": ([h], DTYPES),
        "dup_bias": ([n], DTYPES),
    }
    if scale is not None:
        shapes["dscale"] = ([1], [scale.dtype])
    wanted = {name for name in shapes if source.chance(0.6)}

    def output(name: str) -> Tensor | None:
        if name not in wanted:
            return None
        shape, dtypes = shapes[name]
        return torch.full(shape, float("nan"), dtype=source.random.choice(dtypes))

    return {
        "dy": source.input([m, n], streams),
        "x": source.input([m, k], streams) if "ddown" in wanted or source.chance(0.3) else None,
        "pre": torch.randn(m, h).to(compute),
        "down": source.input([h, k], DTYPES),
        "up": source.input([n, h], DTYPES),
        "up_bias": source.maybe([n], DTYPES),
        "scale_tensor": scale,
        "scale": source.scale(),
        "activation": source.random.choice(list(ACTIVATIONS.values())),
        "adds_dy": adds_dy,
        **{name: output(name) for name in GRADIENTS},
    }


def _held(wide: Arguments, name: str, compute: torch.dtype) -> Tensor | None:
    """A factor as the compute dtype holds it."""
    value = wide.get(name)
    return None if value is None else value.to(compute).double()


def _call(wide: Arguments, compute: torch.dtype, x: Tensor, *, adds_dy: bool = False) -> Call:
    scale = wide["scale"] * (1.0 if wide["scale_tensor"] is None else float(wide["scale_tensor"]))
    activation = next(name for name, number in ACTIVATIONS.items() if number == wide["activation"])
    factors = (_held(wide, name, compute) for name in FACTORS)
    return Call(
        x, wide.get("residual"), *factors, torch.tensor(scale).double(), activation, torch.float64, adds_dy
    )


def _close(name: str, actual: Tensor, truth: Tensor, size: float, dtype: torch.dtype) -> None:
    """Every element within a few roundings of the intermediate results."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    eps = max(torch.finfo(dtype).eps, torch.finfo(actual.dtype).eps)
    limit = (8 if dtype == torch.bfloat16 else 64) * eps * max(size, truth.abs().max().item(), 1e-3)
    error = (actual.double() - truth).abs().max().item()
    assert error <= limit, f"{name}: error {error:.3e}, limit {limit:.3e}"


def check_forward(arguments: Arguments, wide: Arguments) -> None:
    y, pre = arguments["y"], arguments["pre"]
    compute = pre.dtype
    call = _call(wide, compute, wide["x"].to(compute).double())
    true_y, true_pre = eager.forward(call, True)
    norms = [call.x.square().sum(-1).max().sqrt().item() if call.x.numel() else 0.0]
    norms += [factor.square().sum(-1).max().sqrt().item() for factor in (call.down, call.up)]
    spread = norms[0] * norms[1] + (0.0 if call.down_bias is None else call.down_bias.abs().max().item())
    if pre.dim() == 2:
        _close("pre", pre, true_pre, spread, compute)
    width = call.down.shape[0] ** 0.5
    _close("y", y, true_y, abs(float(call.scale)) * width * (spread + 1) * norms[2], compute)


def check_backward(arguments: Arguments, wide: Arguments) -> None:
    pre = arguments["pre"]
    compute = pre.dtype
    low = wide["dy"].to(compute).double()
    x = low.new_zeros(low.shape[0], wide["down"].shape[1])
    x = x if wide["x"] is None else wide["x"].to(compute).double()
    call = _call(wide | {"down_bias": None}, compute, x)
    zeros = low.new_zeros(call.down.shape[0]), call.up_bias
    if call.up_bias is None:
        zeros = zeros[0], low.new_zeros(call.up.shape[0])
    needs = Needs(True, True, True, True, True, True)
    call = call._replace(down_bias=zeros[0], up_bias=zeros[1])
    truth = eager.backward(low, call, pre.double(), needs)._asdict()
    if wide["adds_dy"]:
        truth["x"] = truth["x"] + wide["dy"].double()
    if arguments["dscale"] is not None:
        truth["scale"] = truth["scale"].reshape(arguments["dscale"].shape)
    sizes = [
        max(1.0, each.abs().max().item()) if each.numel() else 1.0
        for each in (low, x, call.down, call.up, pre)
    ]
    terms = max(low.shape) * max(call.down.shape)
    size = (
        terms**0.5
        * sizes[0]
        * max(sizes[1], 1)
        * sizes[2]
        * sizes[3]
        * sizes[4]
        * max(1.0, abs(float(call.scale)))
    )
    for name, field in zip(GRADIENTS, Needs._fields, strict=True):
        if arguments[name] is not None:
            _close(name, arguments[name], truth[field], size, compute)


OPS = {
    "bottleneck_forward": (good_forward, check_forward),
    "bottleneck_backward": (good_backward, check_backward),
}


def main(seed: int, calls: int) -> int:
    ops, source, seen = native.cpu(), Source(seed), Counter()
    for call in range(calls):
        op = source.random.choice(list(OPS))
        good, check = OPS[op]
        arguments = good(source)
        bad = spoil(source, op, arguments) if source.chance(0.5) else ""
        ops.set_level(source.random.randint(0, ops.best_level()))
        wide, given = widened(arguments), describe(arguments)
        try:
            getattr(ops, op)(*arguments.values())
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if not bad or not any(character.isdigit() for character in str(error)):
                print(f"seed {seed}, call {call}: {op}({given}) [{bad}] raised {error!r}")
                return 1
            seen[f"{op} refused"] += 1
            continue
        try:
            assert wide is not None, "served, though it is too large or not on the CPU"
            check(arguments, wide)
        except Exception as error:
            print(f"seed {seed}, call {call}: {op}({given}) [{bad}] gave a wrong result: {error!r}")
            return 1
        seen[f"{op} served"] += 1
    print(dict(sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
