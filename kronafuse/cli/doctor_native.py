"""What `kronafuse doctor` says of the compiled libraries: built or not and why, kernels, configurations."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from .. import native


def tables(*, kernels: bool = False) -> list[Table]:
    """The libraries; with `kernels` also what the CUDA kernels use, if the introspection module knows of any."""
    module, reason = introspection()
    shown = [libraries(module, reason)]
    if kernels and module is not None and module.usages():
        shown += [registers(module), configurations(module)]
    return shown


def no_kernels() -> str:
    """Why there are no tables of kernels; empty if there are."""
    module, reason = introspection()
    if module is None:
        return f"No tables of kernels: kronafuse._C: {reason}."
    return "" if module.usages() else "No tables of kernels: the CUDA library was not built with any."


def introspection() -> tuple[Any | None, str]:
    """kronafuse._C, or why it is not here: it is built for one Python version, and this command alone needs it."""
    try:
        return importlib.import_module("kronafuse._C"), ""
    except ModuleNotFoundError:
        return None, "not built for this Python"
    except ImportError as error:
        return None, f"does not load: {error}"


def libraries(module: Any | None, reason: str = "") -> Table:
    """Each library: what it was built for, or why it was not."""
    table = Table("library", "here", "built", title="Native libraries")
    reasons = {
        "cpu": native.cpu_reasons(),
        "cuda": native.cuda_reasons(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    for key, name in (("cpu", native.CPU), ("cuda", native.CUDA)):
        entry = native.build_record().get(key, {})
        table.add_row(
            name, escape("; ".join(reasons[key])) or "runs", made_with(entry) if entry.get("built") else "no"
        )
    table.add_row("kronafuse._C", "runs" if module else escape(reason), made_with(facts(module)))
    return table


def facts(module: Any | None) -> dict[str, Any]:
    """What the introspection module was compiled from; nothing where there is none."""
    return {} if module is None else {name: value for name, value in module.versions().items() if value}


def made_with(entry: dict[str, Any]) -> str:
    """A record's entry in one line."""
    shown = ("nvcc", "archs", "ptx", "instances", "levels", "compiler", "torch")
    parts = []
    for name in shown:
        value = entry.get(name)
        if value:
            parts.append(f"{name} {value if isinstance(value, str) else ' '.join(value)}")
    return ", ".join(parts)


def registers(module: Any) -> Table:
    """Kernel -> registers a thread on each architecture, and the bytes that it takes at most on any of them."""
    usages = module.usages()
    archs = sorted({each.arch for each in usages}, key=lambda arch: (int(arch.rstrip("a")), arch))
    table = Table(title="CUDA kernels: registers by architecture; stack, spills, static shared bytes")
    table.add_column("kernel", overflow="fold")
    for arch in archs:
        table.add_column(arch, no_wrap=True)
    table.add_column("bytes", no_wrap=True)
    for kernel in sorted({_template(each) for each in usages}):
        instances = [each for each in usages if _template(each) == kernel]
        most = [
            str(max((each.registers for each in instances if each.arch == arch), default=""))
            for arch in archs
        ]
        taken = (
            max(each.stack_bytes for each in instances),
            max(each.spill_store_bytes + each.spill_load_bytes for each in instances),
            max(each.shared_bytes for each in instances),
        )
        table.add_row(kernel, *most, ", ".join(map(str, taken)))
    return table


def _template(usage: Any) -> str:
    """A kernel's name without the arguments of its template."""
    return re.sub(r"[<(].*", "", usage.kernel)


def configurations(module: Any) -> Table:
    """The configurations that launchers choose from."""
    table = Table(
        "kernel", "configuration", "tile", "stages", "threads", "shared", title="CUDA configurations"
    )
    for kernel, rows in sorted(module.configurations().items()):
        for row in rows:
            tile = "x".join(str(size) for size in (row.tile_m, row.tile_n, row.tile_k) if size)
            table.add_row(kernel, row.name, tile, str(row.stages), str(row.threads), str(row.shared_bytes))
    return table
