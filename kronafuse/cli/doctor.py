"""`kronafuse doctor`: what is installed and what can run here."""

from __future__ import annotations

import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import env
from ..version import VERSION
from . import doctor_native

LIBRARIES = (
    "torch", "triton", "safetensors", "diffusers", "transformers", "accelerate", "peft", "lycoris-lora",
    "scikit-learn", "ray", "statsmodels",
)  # fmt: skip
"""Distributions that kronafuse works with."""


def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="The CUDA kernels' registers and configurations too.")
    ] = False,
) -> None:
    """Show which implementations can run here and why the others cannot, then libraries, versions and devices."""
    console = Console()
    for table in (implementations(), *doctor_native.tables(kernels=kernels), versions(), devices()):
        console.print(table)
    if kernels and (absent := doctor_native.no_kernels()):
        console.print(absent, markup=False)


def implementations() -> Table:
    """Every implementation, and what rules it out."""
    from .. import available_impls

    table = Table("implementation", "here", title="Implementations")
    for name, reasons in available_impls().items():
        table.add_row(name, escape("; ".join(reasons)) if reasons else "runs")
    return table


def versions() -> Table:
    """Python, kronafuse and the libraries around it."""
    table = Table("library", "version", title="Versions")
    table.add_row("kronafuse", VERSION)
    table.add_row("Python", platform.python_version())
    for name in LIBRARIES:
        table.add_row(name, env.package_version(name) or "not installed")
    table.add_row("CUDA of torch", torch.version.cuda or "none: torch was built without CUDA")
    return table


def devices() -> Table:
    """The CPU and every GPU that torch sees."""
    table = Table("device", "what it is", title="Devices")
    table.add_row(
        "cpu",
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    for index in range(torch.cuda.device_count()):
        major, minor = env.cuda_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        table.add_row(
            f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory:.0f} GiB"
        )
    if not torch.cuda.is_available():
        table.add_row("cuda", "none")
    return table
