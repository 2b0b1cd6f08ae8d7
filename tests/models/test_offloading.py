"""Adapters whose tensors another library keeps elsewhere between calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from kronafuse import Bottleneck, KronA, attach, formats
from small_models import build, output, randomize
from torch import nn

KRONA = KronA((4, 2))
CPU = torch.device("cpu")


def offload(model: nn.Module, folder: Path, where: str) -> None:
    if where == "disk":
        disk_offload(model, str(folder), CPU, offload_buffers=True)
    else:
        cpu_offload(model, CPU, offload_buffers=where == "cpu with buffers")


@pytest.mark.parametrize("spec", [KRONA, Bottleneck("ff_in", "ff_in", width=4)], ids=["krona", "bottleneck"])
@pytest.mark.parametrize("where", ["cpu", "cpu with buffers", "disk"])
@torch.no_grad()
def test_offloaded_adapters_are_set_saved_and_loaded(tmp_path, spec, where):
    model, inputs = build("dit")
    attachment = attach(model, spec)
    randomize(attachment)
    state = {name: each.clone() for name, each in attachment.state_dict().items()}
    expected = {}
    for scale in (1.0, 0.0, 0.5):
        attachment.scale = scale
        expected[scale] = output(model, inputs)
    attachment.load_state_dict({name: 2 * each for name, each in state.items()})
    doubled = output(model, inputs)
    attachment.load_state_dict(state)

    (tmp_path / "weights").mkdir()
    offload(model, tmp_path / "weights", where)
    for scale in (0.0, 1.0, 0.5):
        attachment.scale = scale
        torch.testing.assert_close(output(model, inputs), expected[scale])
    found = attachment.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], each) for name, each in state.items())
    attachment.load_state_dict({name: 2 * each for name, each in state.items()})
    torch.testing.assert_close(output(model, inputs), doubled)
    formats.save(tmp_path / "adapter.safetensors", attachment)
    attachment.remove()
    other, _ = build("dit")
    attach(other, formats.load(tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(output(other, inputs), doubled)


def test_weights_that_a_parent_places_are_found():
    """One hook of accelerate may hold the tensors of everything below its module."""
    model = nn.Sequential(nn.Linear(8, 8))
    attachment = attach(model, KronA((4, 2), targets=("0",)))
    randomize(attachment)
    state = {name: each.clone() for name, each in attachment.state_dict().items()}
    hook = AlignDevicesHook(CPU, offload=True, offload_buffers=True, place_submodules=True)
    add_hook_to_module(model, hook)
    assert all(each.is_meta for each in attachment.parameters())
    assert all(torch.equal(each, state[name]) for name, each in attachment.state_dict().items())
    attachment.scale = 0.0
    x = torch.randn(3, 8)
    with torch.no_grad():
        adapted = model(x)
    attachment.remove()
    torch.testing.assert_close(adapted, nn.functional.linear(x, hook.weights_map["0.base.weight"],
                                                            hook.weights_map["0.base.bias"]))  # fmt: skip


def test_what_cannot_be_read_or_written_is_refused_before_anything_changes(tmp_path):
    model, inputs = build("dit")
    attachment = attach(model, KRONA)
    randomize(attachment)
    state = {name: each.clone() for name, each in attachment.state_dict().items()}
    with torch.no_grad():
        adapted = output(model, inputs)
    apply_group_offloading(
        model,
        CPU,
        CPU,
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
        num_blocks_per_group=None,
    )
    refused = r"lokr_a is offloaded to disk by diffusers' group offloading"
    with pytest.raises(RuntimeError, match=f"state_dict: .*{refused}"):
        attachment.state_dict()
    with pytest.raises(RuntimeError, match=f"load_state_dict: .*{refused}"):
        attachment.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), adapted)


def test_an_offload_file_that_is_not_the_folders_own_is_not_written(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    attachment = attach(model, KronA((4, 2), targets=("0",)))
    state = attachment.state_dict()
    (tmp_path / "weights").mkdir()
    disk_offload(model, str(tmp_path / "weights"), CPU)
    keeper = model[0].adapters["0"]._hf_hook.weights_map.dataset
    for info in keeper.index.values():
        info["safetensors_file"] = "shard.safetensors"
    with pytest.raises(
        RuntimeError, match=r"load_state_dict: 0\.lokr_a is offloaded into shard\.safetensors"
    ):
        attachment.load_state_dict(state)


def test_a_part_of_a_tensor_is_not_taken_for_the_whole():
    """ZeRO's stage 3 and FSDP's first version leave a piece, or nothing, in a parameter's place."""
    model = nn.Sequential(nn.Linear(8, 8))
    attachment = attach(model, KronA((4, 2), targets=("0",)))
    state = attachment.state_dict()
    next(iter(attachment.parameters())).data = torch.empty(0)
    for use in (attachment.state_dict, lambda: attachment.load_state_dict(state)):
        with pytest.raises(
            RuntimeError, match=r"0\.lokr_a must be \(4, 2\) to be read or written; it is \(0,\)"
        ):
            use()


def test_a_model_on_meta_has_nothing_to_save_or_load(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    attachment = attach(model, KronA((4, 2), targets=("0",)))
    attachment.scale = 0.5
    with pytest.raises(RuntimeError, match=r"2 tensors are on meta and have no values, the first 0\.lokr_a"):
        formats.save(tmp_path / "adapter.safetensors", attachment)
    with pytest.raises(RuntimeError, match=r"0\.lokr_a is on meta and no hook of accelerate"):
        attachment.load_state_dict(
            {name: torch.zeros(each.shape) for name, each in attachment.state_dict().items()}
        )
    model.to_empty(device="cpu")
    assert model[0].adapters["0"].scale.item() == 0.5


@pytest.mark.parametrize("spec", [KRONA, Bottleneck("ff_in", "ff_in", width=4)], ids=["krona", "bottleneck"])
def test_an_offloaded_model_takes_no_new_adapters(spec):
    model, inputs = build("dit")
    with torch.no_grad():
        before = output(model, inputs)
        cpu_offload(model, CPU)
        with pytest.raises(ValueError, match=r"offloaded .*adapters first, then offload"):
            attach(model, spec)
        assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("spec", [KRONA, Bottleneck("ff_in", "ff_in", width=4)], ids=["krona", "bottleneck"])
def test_a_file_says_in_which_dtype_its_tensors_are(tmp_path, spec):
    """A cast of the whole model casts the trained tensors too; the file does not claim what the spec asked for."""
    model, _ = build("dit")
    attachment = attach(model, spec)
    model.to(torch.bfloat16)
    assert attachment.spec.dtype == torch.float32
    formats.save(tmp_path / "adapter.safetensors", attachment)
    file = formats.load(tmp_path / "adapter.safetensors")
    assert file.spec.dtype == torch.bfloat16
    assert {each.dtype for each in file.tensors.values()} == {torch.bfloat16}
    assert "bfloat16" in str(attachment.report)
