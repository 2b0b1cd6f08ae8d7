"""AdamW's moments between an optimizer and the tensors of a file, named PARAMETER.NAME."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NAMES = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter that ever had a gradient."""


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments by name."""
    return {
        f"{parameter}.{name}": torch.as_tensor(value)
        for parameter, each in optimizer.state_dict()["state"].items()
        for name, value in each.items()
    }


def check_moments(moments: Mapping[str, Tensor], parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    """ValueError where the moments are not those of these names, or not those of these parameters."""
    sizes = {
        f"{index}.{name}": () if name == "step" else tuple(parameter.shape)
        for index, parameter in enumerate(parameters)
        for name in NAMES
    }
    found = {name: tuple(tensor.shape) for name, tensor in moments.items()}
    expected = {name: sizes.get(name, "no parameter") for name in names}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the optimizer's tensors differ, the first {wrong[0]}:"
            f" {expected.get(wrong[0], 'none')} expected, {found.get(wrong[0], 'none')} in the file"
        )


def put_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Loads checked moments."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
