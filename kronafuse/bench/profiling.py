"""What the profiler sees of one call."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINETO = "KINETO_LOG_LEVEL"
"""Environment variable of torch's profiler; below 6 it reports its every start on stderr."""


def profiled(step: Callable[[], object], device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    """Operators, and on a GPU kernels, of one call: name -> how often, those that took longest first."""
    os.environ.setdefault(KINETO, "6")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, acc_events=True) as profiler:  # without, torch 2.11 warns
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    averages = profiler.key_averages()
    operators = [each for each in averages if each.device_type.name == "CPU" and "::" in each.key]
    # Ranges that a library marks (`record_function`) are listed beside the kernels inside them.
    kernels = [
        each
        for each in averages
        if each.device_type.name != "CPU" and not getattr(each, "is_user_annotation", False)
    ]
    operators.sort(key=lambda each: -each.self_cpu_time_total)
    kernels.sort(key=lambda each: -each.self_device_time_total)
    found: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for counts, events in zip(found, (operators, kernels), strict=True):
        for each in events:
            counts[each.key] = counts.get(each.key, 0) + each.count
    return found
