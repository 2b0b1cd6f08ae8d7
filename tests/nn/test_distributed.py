"""Adapted layers under DistributedDataParallel and fully_shard: one process, gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from kronafuse import LoKr, LoRA, attach, formats
from kronafuse.nn import KronLinear
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class Two(nn.Module):
    """Two adapted layers, one of them with two adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = KronLinear(nn.Linear(32, 64), LoKr(4, 2))
        self.second = KronLinear(nn.Linear(64, 32), LoRA(4))
        self.second.add(LoKr(4).layout(32, 64))
        for layer in (self.first, self.second):
            layer.base.requires_grad_(False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model: nn.Module, steps: int = 3) -> list[torch.Tensor]:
    """Losses and final factors after a few steps of Adam."""
    generator = torch.Generator().manual_seed(3)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 32, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    full = [each.full_tensor() if isinstance(each, DTensor) else each for each in parameters]
    return [*losses, *(each.detach().clone() for each in full)]


def made() -> Two:
    torch.manual_seed(0)
    return Two()


def test_distributed_data_parallel(group):
    reference = trained(made())
    model = made()
    results = trained(DistributedDataParallel(model))
    assert model.first.unfused is None
    for each, other in zip(results, reference, strict=True):
        assert torch.allclose(each, other, atol=1e-6)
    assert (results[0] - results[2]).abs() > 1e-4


def test_fully_shard_around_the_layers(group):
    """Unsharded for the forward, the weights are plain: the layers stay fused."""
    reference = trained(made())
    model = made()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(each, DTensor) for each in model.parameters())
    results = trained(model)
    assert model.first._input_reason is None
    for each, other in zip(results, reference, strict=True):
        assert torch.allclose(each, other, atol=1e-6)


def test_fully_shard_of_an_attachment_is_saved_and_loaded(group, tmp_path):
    """The factors are DTensors then: gathered into the file, distributed again from it."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    attachment = attach(model, LoKr(4, 2, targets=("0", "1")))
    for factor in attachment.parameters():
        nn.init.normal_(factor)
    wanted = {name: each.clone() for name, each in attachment.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(each, DTensor) for each in attachment.parameters())
    formats.save(tmp_path / "a.safetensors", attachment)
    state = formats.load(tmp_path / "a.safetensors").tensors
    assert state.keys() == wanted.keys()
    assert all(torch.equal(each, wanted[name]) for name, each in state.items())
    sharded = {name: each.detach() for name, each in attachment.named_parameters()}
    for factor, new in (
        (3.0, {name: 3 * each for name, each in state.items()}),
        (2.0, {name: 2 * each for name, each in sharded.items()}),
    ):
        attachment.load_state_dict(new)
        assert all(isinstance(each, DTensor) for each in attachment.parameters())
        assert all(torch.equal(each, factor * wanted[name]) for name, each in attachment.state_dict().items())


def test_fully_shard_of_the_base_itself(group):
    """Then only a call of the base gathers its weight, so it is called."""
    reference = trained(made())
    model = made()
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model.first, model.second):
        fully_shard(layer.base, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results = trained(model)
    assert model.first.unfused == "the base is FSDPLinear, not nn.Linear"
    for each, other in zip(results, reference, strict=True):
        assert torch.allclose(each, other, atol=1e-6)
