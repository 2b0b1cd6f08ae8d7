"""Predicted time of a recorded launch alone, read from its arguments and constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops import kernel_costs
from ..ops.bottleneck.tuning import BottleneckConfig
from ..ops.costs import elementwise_us, sum_us
from ..ops.kron_linear import one_pass_tuning, reduction_tuning, tuning
from ..ops.launch import Architecture, Launch


def launch_us(architecture: Architecture, launch: Launch) -> float:
    """Predicted µs on the architecture; a kernel without products takes the time of its tensors, once each."""
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    if name in READERS:
        return READERS[name](architecture, launch, {**launch.arguments, **launch.constants})
    tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}
    return elementwise_us(architecture, sum(each.nbytes for each in tensors.values()))


def _linear(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
    dots = of["width0"] + of["width1"]
    if of["TAIL"] == 1:
        dots += kernel_costs.block_tail_width(of["BLOCK_N"], of["O1"], of["O2"], of["J"])
    sizes = kernel_costs.LinearSizes(
        of["M"],
        of["N"],
        0 if of["weight"] is None else of["K"],
        dots,
        of["J"] if of["TAIL"] in (2, 3) else 0,
        of["base_ptr"] is not None,
    )
    config = tuning.LinearConfig(
        of["BLOCK_M"], of["BLOCK_N"], of["BLOCK_K"], of["BLOCK_R"], of["GROUP_M"], launch.warps, launch.stages,
        of["DESCRIPTORS"],
    )  # fmt: skip
    return kernel_costs.linear_us(architecture, of["y_ptr"].dtype, sizes, config)


def _one_pass(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
    sizes = kernel_costs.OnePassSizes(
        of["M"],
        (of["O1"], of["I1"]),
        (of["O2"], of["I2"]),
        of["weight"] is not None,
        of["base_ptr"] is not None,
    )
    config = one_pass_tuning.OnePassConfig(
        of["BLOCK_M"], of["BLOCK_N"], of["BLOCK_K"], of["GROUP_M"], launch.warps, launch.stages, of["GROUPS"],
        of["span"], of["DESCRIPTORS"],
    )  # fmt: skip
    return kernel_costs.one_pass_us(architecture, of["y_ptr"].dtype, sizes, config)


def _shrink(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
    dtype = of["x_ptr"].dtype
    config = reduction_tuning.ShrinkConfig(
        of["BLOCK_M"],
        of["BLOCK_W"],
        of["BLOCK_K"],
        of["SPLIT"],
        of["k_per_split"],
        launch.warps,
        launch.stages,
    )
    both = kernel_costs.shrink_us(architecture, dtype, of["rows"], of["W"], of["K"], config)
    return both - sum_us(architecture, config.split, of["rows"] * of["W"], dtype.itemsize)


def _mix(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
    config = reduction_tuning.MixConfig(
        of["BLOCK_J"], of["BLOCK_O"], of["BLOCK_I"], launch.warps, launch.stages
    )
    out = of["COUNT"] * of["O1"]
    return kernel_costs.mix_us(architecture, of["p_ptr"].dtype, of["elements"], out, of["I1"], config)


def _reduce(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
    dtype, height = of["p0_ptr"].dtype, of["COUNT"] * of["P"]
    config = reduction_tuning.ReduceConfig(
        of["BLOCK_R"], of["BLOCK_P"], of["BLOCK_Q"], of["SPLIT"], launch.warps, launch.stages
    )
    both = kernel_costs.reduce_us(architecture, dtype, of["rows"], height, of["Q"], config)
    return both - sum_us(architecture, config.split, height * of["Q"], dtype.itemsize)


def _shrink_reduce(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
    dtype, split = of["x_ptr"].dtype, of["split"]
    config = reduction_tuning.ShrinkReduceConfig(
        of["BLOCK_R"], of["BLOCK_F"], of["BLOCK_L"], of["BLOCK_O"], split, launch.warps, launch.stages
    )
    both = kernel_costs.shrink_reduce_us(architecture, dtype, of["rows"], of["F"], of["O"], config)
    return both - sum_us(architecture, split, of["F"] * of["O"], dtype.itemsize)


def _bottleneck(
    source: str, inner: str, outer: str
) -> Callable[[Architecture, Launch, dict[str, Any]], float]:
    def predict(architecture: Architecture, launch: Launch, of: dict[str, Any]) -> float:
        config = BottleneckConfig(
            of["BLOCK_M"], of[f"BLOCK_{inner}"], of[f"BLOCK_{outer}"], of["WIDTH"], of["SECOND"], of["SPLIT"],
            of["columns"], launch.warps, launch.stages,
        )  # fmt: skip
        sizes = kernel_costs.BottleneckSizes(of["M"], of[inner], of["H"], of[outer])
        return kernel_costs.bottleneck_us(architecture, of["pre_ptr"].dtype, of[source].dtype, sizes, config)

    return predict


READERS = {
    "linear": _linear,
    "one_pass": _one_pass,
    "shrink": _shrink,
    "mix": _mix,
    "reduce": _reduce,
    "shrink_reduce": _shrink_reduce,
    "bottleneck_forward": _bottleneck("x_ptr", "K", "N"),
    "bottleneck_backward": _bottleneck("dy_ptr", "N", "K"),
}
"""Kernel -> how its launch is read."""
