"""Random calls straight at torch.ops.kronafuse_cpu, good and bad: a right result or an error, never a crash.

`test_cpu_fuzz.py` runs it in a process of its own: python tests/native/cpu_fuzz.py SEED CALLS
It prints how many calls of each op were served and refused, and exits with 1 at the first that is wrong.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from kronafuse import native
from torch import Tensor

COMPUTES = [torch.float32, torch.bfloat16]
DTYPES = [*COMPUTES, torch.float64, torch.float16]
OTHERS = [torch.int64, torch.int8, torch.bool, torch.complex64]
SIZES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 20, 31, 33]
HUGE = [2**31, 2**31 + 3, 2**40, 2**48]
COMPARED = 1 << 20
"""Elements up to which a call's inputs are copied, to check its result."""
Arguments = dict[str, Any]


class Source:
    """Random arguments, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        # Never touched but for the rows that a call takes: address space, not memory.
        self.far = torch.empty(2**31 + 4096, dtype=torch.bfloat16)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def sizes(self, count: int) -> list[int]:
        return [self.random.choice(SIZES) for _ in range(count)]

    def input(self, shape: list[int], dtypes: list[torch.dtype]) -> Tensor:
        """A tensor with the strides of any view: gaps, dimensions in any order, expanded, far apart."""
        dtype = self.random.choice(dtypes)
        kind = self.random.choice(["plain", "gaps", "order", "expanded", "far"])
        if kind == "expanded":
            return torch.randn([1 if self.chance(0.5) else size for size in shape]).to(dtype).expand(shape)
        if kind == "far" and dtype == torch.bfloat16 and shape[0] == 2:
            rows = torch.randn(shape).to(dtype)
            return self.far.as_strided(shape, (2**31, *rows.stride()[1:])).copy_(rows)
        return self.output(shape, [dtype], kind)

    def output(self, shape: list[int], dtypes: list[torch.dtype], kind: str | None = None) -> Tensor:
        """The same without elements that share memory."""
        dtype = self.random.choice(dtypes)
        kind = kind or self.random.choice(["plain", "gaps", "order"])
        if kind == "gaps":
            return torch.randn(*shape[:-1], 3 * shape[-1] + 2).to(dtype)[..., 2 : 2 + 3 * shape[-1] : 3]
        if kind == "order":
            order = self.random.sample(range(len(shape)), len(shape))
            inverse = [order.index(at) for at in range(len(shape))]
            return torch.randn([shape[at] for at in order]).to(dtype).permute(inverse)
        return torch.randn(shape).to(dtype)

    def maybe(self, shape: list[int], dtypes: list[torch.dtype]) -> Tensor | None:
        return self.input(shape, dtypes) if self.chance(0.5) else None

    def scale(self) -> float:
        return self.random.choice([1.0, 0.0, -0.5, 0.37, 3.0])


def good_mix(source: Source) -> Arguments:
    m, i, o, c = source.sizes(4)
    compute = [source.random.choice(COMPUTES)]
    left = source.input([o, i], DTYPES) if source.chance(0.7) else None
    i = i if left is not None else o
    p = source.input([m, i, c], compute) if left is not None or source.chance(0.7) else None
    return {
        "p": p,
        "left": left,
        "in_scale": None if p is None else source.maybe([i, c], DTYPES),
        "out_scale": source.maybe([o, c], DTYPES),
        "bias": source.maybe([o, c], DTYPES),
        "base": source.maybe([m, o, c], compute),
        "scale": source.scale(),
        "accumulate": source.chance(0.5),
        "y": source.output([m, o, c], compute),
    }


def truth_of_mix(wide: Arguments, part: Callable[[Tensor], Tensor]) -> Tensor:
    p, left, y = wide["p"], wide["left"], wide["y"]
    truth = torch.zeros_like(y)
    if p is not None:
        p = p if wide["in_scale"] is None else p * wide["in_scale"]
        product = p if left is None else torch.einsum("oi,mic->moc", part(left), part(p))
        truth = part(product) * part(torch.tensor(wide["scale"], dtype=torch.float64))
    if wide["out_scale"] is not None:
        truth = truth * part(wide["out_scale"])
    for name in ("bias", "base"):
        truth = truth if wide[name] is None else truth + part(wide[name])
    return truth + part(y) if wide["accumulate"] else truth


def good_reduce(source: Source) -> Arguments:
    m, g, height, width = source.sizes(4)
    compute = [source.random.choice(COMPUTES)]
    return {
        "p": source.input([m, g, height], compute),
        "q": source.input([m, g, width], compute),
        "p_scale": source.maybe([g, height], DTYPES),
        "scale": source.scale(),
        "accumulate": source.chance(0.5),
        "out": source.output([height, width], DTYPES),
    }


def truth_of_reduce(wide: Arguments, part: Callable[[Tensor], Tensor]) -> Tensor:
    p = wide["p"] if wide["p_scale"] is None else wide["p"] * wide["p_scale"]
    scale = part(torch.tensor(wide["scale"], dtype=torch.float64))
    sums = scale * torch.einsum("mgp,mgq->pq", part(p), part(wide["q"]))
    return sums + part(wide["out"]) if wide["accumulate"] else sums


def good_column_sums(source: Source) -> Arguments:
    m, n = source.sizes(2)
    compute = [source.random.choice(COMPUTES)]
    return {
        "p": source.input([m, n], compute),
        "q": source.maybe([m, n], compute),
        "accumulate": source.chance(0.5),
        "out": source.output([n], DTYPES),
    }


def truth_of_column_sums(wide: Arguments, part: Callable[[Tensor], Tensor]) -> Tensor:
    product = wide["p"] if wide["q"] is None else wide["p"] * wide["q"]
    sums = part(product).sum(0)
    return sums + part(wide["out"]) if wide["accumulate"] else sums


def good_cast(source: Source) -> Arguments:
    shape = source.sizes(2)
    return {"source": source.input(shape, DTYPES), "out": source.output(shape, DTYPES)}


def truth_of_cast(wide: Arguments, part: Callable[[Tensor], Tensor]) -> Tensor:
    return part(wide["source"])


def good_merge(source: Source) -> Arguments:
    n1, k1, n2, k2 = source.sizes(4)
    compute = [source.random.choice(COMPUTES)]
    return {
        "weight": source.input([n1 * n2, k1 * k2], compute),
        "left": source.input([n1, k1], DTYPES),
        "right": source.input([n2, k2], DTYPES),
        "scale": source.scale(),
        "shuffled": source.chance(0.5),
        "out": source.output([n1 * n2, k1 * k2], compute, "plain"),
    }


def truth_of_merge(wide: Arguments, part: Callable[[Tensor], Tensor]) -> Tensor:
    delta = torch.einsum("ij,pq->ipjq", part(wide["left"]), part(wide["right"]))
    delta = delta.transpose(0, 1) if wide["shuffled"] else delta
    scale = part(torch.tensor(wide["scale"], dtype=torch.float64))
    return part(wide["weight"]) + scale * delta.reshape(wide["weight"].shape)


OPS = {
    "mix": (good_mix, truth_of_mix),
    "reduce": (good_reduce, truth_of_reduce),
    "column_sums": (good_column_sums, truth_of_column_sums),
    "cast": (good_cast, truth_of_cast),
    "merge": (good_merge, truth_of_merge),
}


def spoil(source: Source, op: str, arguments: Arguments) -> str:
    """Changes one argument, most often for the worse; says how."""
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    name = source.random.choice(names)
    tensor, output = arguments[name], names[-1]
    ways = ["dtype", "size", "dim", "meta", "none", "huge", "overlap", "shared", "sparse", "number", "five"]
    way = source.random.choice(ways)
    if way == "dtype":
        tensor = tensor.to(source.random.choice([*DTYPES, *OTHERS]))
    elif way == "size":
        shape = list(tensor.shape)
        shape[source.random.randrange(len(shape))] = source.random.choice(SIZES)
        tensor = source.output(shape, [tensor.dtype])
    elif way == "dim":
        tensor = tensor.unsqueeze(0) if source.chance(0.5) else tensor.flatten()
    elif way == "meta":
        tensor = tensor.to("meta")
    elif way == "none":
        tensor = None
    elif way == "huge":
        at = source.random.randrange(1 if op == "column_sums" else 0, tensor.dim()) if tensor.dim() > 1 else 0
        tensor = (
            tensor.select(at, 0).unsqueeze(at) if tensor.shape[at] else tensor.new_zeros([1] * tensor.dim())
        )
        shape = list(tensor.shape)
        shape[at] = source.random.choice(HUGE)
        tensor = tensor.expand(shape)
    elif way == "overlap":
        name, tensor = output, arguments[output]
        tensor = torch.randn(4096).to(tensor.dtype).as_strided(tensor.shape, [1] * tensor.dim())
    elif way == "shared":
        name, tensor = output, arguments[source.random.choice(names)]
    elif way == "sparse":
        tensor = tensor.to_sparse()
    elif way == "number":
        name, tensor = source.random.choice(list(arguments)), source.random.choice([3, -1.5, "x", True, None])
    else:
        tensor = torch.zeros([1] * 5, dtype=tensor.dtype)
    arguments[name] = tensor
    return f"{name}: {way}"


def describe(arguments: Arguments) -> str:
    return ", ".join(
        f"{name}={value.dtype} {tuple(value.shape)} {value.stride() if value.layout == torch.strided else value.layout}"
        if isinstance(value, Tensor)
        else f"{name}={value!r}"
        for name, value in arguments.items()
    )


def widened(arguments: Arguments) -> Arguments | None:
    """Copies in float64, factors and tables as the compute dtype holds them; None for what cannot be served."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if any(each.is_meta or each.layout != torch.strided or each.numel() > COMPARED for each in tensors):
        return None
    if any(each.is_complex() for each in tensors):
        return None
    compute = next(iter(arguments.values()))
    wide: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            table = name in ("left", "in_scale", "out_scale", "bias", "p_scale") and "weight" not in arguments
            main = arguments.get("y", compute)
            value = value.to(main.dtype) if table and isinstance(main, Tensor) else value
            value = value.clone().double()
        wide[name] = value
    return wide


def check(op: str, arguments: Arguments, wide: Arguments | None) -> None:
    """Raises AssertionError unless what the call wrote is the truth, to the rounding of its dtypes."""
    out = list(arguments.values())[-1]
    if out.numel() == 0:
        return
    assert wide is not None, "served, though it is too large or not on the CPU"
    truth = OPS[op][1](wide, lambda value: value)
    size = OPS[op][1](wide, lambda value: value.abs())
    limit = torch.finfo(out.dtype).eps * truth.abs() + 1e-5 * size + torch.finfo(out.dtype).tiny
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    wrong = ~((out.double() - truth).abs() <= limit)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements wrong"


def main(seed: int, calls: int) -> int:
    ops, source, seen = native.cpu(), Source(seed), Counter()
    for call in range(calls):
        op = source.random.choice(list(OPS))
        arguments = OPS[op][0](source)
        bad = spoil(source, op, arguments) if source.chance(0.5) else ""
        ops.set_level(source.random.randint(0, ops.best_level()))
        wide, given = widened(arguments), describe(arguments)
        try:
            getattr(ops, op)(*arguments.values())
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            text = str(error)
            if not bad or not any(character.isdigit() for character in text):
                print(f"seed {seed}, call {call}: {op}({given}) [{bad}] raised {error!r}")
                return 1
            seen[f"{op} refused"] += 1
            continue
        try:
            check(op, arguments, wide)
        except Exception as error:
            print(f"seed {seed}, call {call}: {op}({given}) [{bad}] gave a wrong result: {error!r}")
            return 1
        seen[f"{op} served"] += 1
    print(dict(sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
