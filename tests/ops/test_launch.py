"""On which device and in which context Triton kernels are launched, seen by a stand-in for torch's CUDA calls."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from kronafuse.ops import launch as launching


class Cuda:
    """Two CUDA devices: each thread has a current one, and no context before it sets a device."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.thread = threading.local()

    def current_device(self) -> int:
        return getattr(self.thread, "device", 0)

    def set_device(self, device: int) -> None:
        self.calls.append(("bind", device))
        self.thread.device = device

    @contextmanager
    def device(self, device: torch.device):
        before = self.current_device()
        self.thread.device = device.index
        yield
        self.thread.device = before


class Kernel:
    """Records the device that is current where it is launched."""

    arg_names = ()

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **options: self.cuda.calls.append(("launch", self.cuda.current_device()))


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()
    for name in ("current_device", "set_device", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    return found


def launched(cuda: Cuda, *devices: str) -> list[tuple[str, int]]:
    """What a thread of its own does that launches one kernel on each of these devices, one after the other."""
    kernel = Kernel(cuda)

    def launch_all() -> None:
        for each in devices:
            launching.launch(kernel, 1, torch.device(each), {}, {}, 4, 1)

    thread = threading.Thread(target=launch_all)
    thread.start()
    thread.join()
    calls, cuda.calls = cuda.calls, []
    return calls


def test_each_thread_binds_the_context_of_each_device_once_and_before_its_first_launch_there(cuda):
    first = [("bind", 0), ("launch", 0)]
    assert launched(cuda, "cuda:0", "cuda:0", "cuda") == [*first, ("launch", 0), ("launch", 0)]
    assert launched(cuda, "cuda") == first
    other = [("bind", 1), ("launch", 1)]
    expected = [*other, ("launch", 1), *first, ("launch", 1), ("launch", 0)]
    assert launched(cuda, "cuda:1", "cuda:1", "cuda:0", "cuda:1", "cuda") == expected


def test_nothing_of_cuda_is_called_for_a_launch_that_is_recorded_or_interpreted(cuda):
    kernel = Kernel(cuda)
    with launching.recording(launching.Architecture(90, 132)):
        launching.launch(kernel, 1, torch.device("cuda:1"), {}, {}, 4, 1)
    launching.launch(kernel, 1, torch.device("cpu"), {}, {}, 4, 1)
    assert cuda.calls == [("launch", 0)]
