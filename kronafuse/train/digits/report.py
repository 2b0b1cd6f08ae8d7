"""The demo's figures as a table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .judge import COMPONENTS
from .recipe import LIMIT_SECONDS, LORA_RANK
from .timing import PEFT


def print_report(figures: dict[str, Any], console: Console) -> None:
    """Accuracy, distance, parameters, step time and duration, each beside what it is measured against."""
    accuracy, distance = figures["classifier_accuracy"], figures[f"frechet_pca{COMPONENTS}_new"]
    table = Table("", "before", "after", "real digits", title="Generated digits")
    table.add_row(
        "accuracy on new classes",
        f"{accuracy['new_before']:.1%}",
        f"{accuracy['new_after']:.1%}",
        f"{accuracy['real_held_out']:.1%}",
    )
    table.add_row(
        "accuracy on old classes", f"{accuracy['old_before']:.1%}", f"{accuracy['old_after']:.1%}", ""
    )
    table.add_row(
        f"Fréchet distance, PCA({COMPONENTS}), new classes",
        f"{distance['before']:.2f}",
        f"{distance['after']:.2f}",
        f"{distance['real_other_half']:.2f}",
    )
    console.print(table)
    parameters = figures["trainable_parameters"]
    table = Table("KronA", f"LoRA, rank {LORA_RANK}", "whole U-Net", title="Trainable parameters")
    table.add_row(*(f"{count:,}" for count in parameters.values()))
    console.print(table)
    adapter = figures["adapter"]
    console.print(
        f"KronA on {adapter['layers']} layers, {adapter['fused_layers']} of them fused with their base;"
        f" {adapter['shared_reads']} attention blocks read x once for several projections."
    )
    timing = figures["step_time"]
    table = Table(
        "",
        "parameters",
        "ms",
        f"ratio to {PEFT}",
        title=f"Training step, median of {timing['turns']} in turn",
    )
    for name, seconds in timing["median_step_s"].items():
        ratio = timing["ratio_to_peft_lokr"]
        table.add_row(
            name,
            f"{timing['parameters'][name]:,}",
            f"{seconds * 1e3:.1f}",
            f"{ratio[name]:.2f}" if ratio else "",
        )
    console.print(table)
    if timing["missing"]:
        console.print(f"Not timed: {PEFT}. {timing['missing']}", style="bold", markup=False)
    table = Table("seconds", "limit on 2 cores", "threads", "base model", title="The whole demo")
    table.add_row(
        f"{figures['seconds']:.0f}",
        str(LIMIT_SECONDS),
        str(figures["threads"]),
        "from the cache" if figures["base_was_cached"] else "trained",
    )
    console.print(table)
    if figures["seconds"] > LIMIT_SECONDS:
        console.print(
            f"Slower than its limit: {figures['seconds']:.0f} s, and {LIMIT_SECONDS} s on 2 cores are allowed.",
            style="bold",
            markup=False,
        )
    data = figures["data"]
    console.print(
        f"The models learnt from {data['learnt_from']} of {data['scans']} scans; the judges were fitted on"
        f" the other {data['judging']}. Under real digits: the classifier on the models' half, and the distance"
        " between the halves.",
        markup=False,
    )
