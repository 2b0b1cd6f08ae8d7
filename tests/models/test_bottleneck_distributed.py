"""Bottleneck adapters under DistributedDataParallel and fully_shard: one process, gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from kronafuse import Bottleneck, attach, formats
from small_models import build, output, randomize
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

PAIRS = {
    "sd15": ("attn2_out", "ff_in"),
    "sdxl": ("res_in", "res_out"),
    "dit": ("ff_in", "ff_in"),
    "pixart": ("attn2_in", "attn2_in"),
}
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(name):
    model, inputs = build(name)
    attachment = attach(model, Bottleneck(*PAIRS[name], 8))
    randomize(attachment)
    return model, inputs, attachment


def trained(model, inputs, steps=2):
    """Losses of a few steps of SGD on what is trained, and the trained tensors after them."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = output(model, inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [
        *losses,
        *(each.full_tensor() if isinstance(each, DTensor) else each.detach() for each in parameters),
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_distributed_data_parallel(group, name):
    model, inputs, _ = made(name)
    reference = trained(model, inputs)
    assert reference[0] != reference[1]
    model, inputs, _ = made(name)
    for each, other in zip(trained(DistributedDataParallel(model), inputs), reference, strict=True):
        assert torch.allclose(each, other, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_fully_shard_of_every_block(group, name, tmp_path):
    """The adapters are sharded with their blocks, whose hooks bring them back before ours run."""
    model, inputs, _ = made(name)
    reference = trained(model, inputs)
    model, inputs, attachment = made(name)
    wanted = {key: each.clone() for key, each in attachment.state_dict().items()}
    mesh = init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        # DiT calls a part of its first block from outside of it, past any hook.
        if type(module).__name__ in BLOCKS and name != "dit":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(each, DTensor) for each in attachment.parameters())
    formats.save(tmp_path / "a.safetensors", attachment)
    saved = formats.load(tmp_path / "a.safetensors").tensors
    assert all(torch.equal(saved[key], each) for key, each in wanted.items())
    for each, other in zip(trained(model, inputs), reference, strict=True):
        assert torch.allclose(each, other, atol=1e-6)
    attachment.load_state_dict(wanted)
    assert all(torch.equal(each, wanted[key]) for key, each in attachment.state_dict().items())
