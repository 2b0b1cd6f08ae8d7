"""The typer application: one file a command."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import env
from ..version import VERSION
from .anova import anova
from .bench import app as bench
from .demo import demo
from .doctor import doctor
from .exits import reported
from .sample import sample
from .sweep import sweep
from .train import train

app = typer.Typer(
    name="kronafuse",
    help="Kronecker and bottleneck adapters for diffusion models: training, sampling, studies, benchmarks, and a demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (demo, train, sample, doctor, sweep, anova):
    app.command(name=_command.__name__)(reported(_command))
app.add_typer(bench, name="bench")


def _print_versions(wanted: bool) -> None:
    if wanted:
        print(f"kronafuse {VERSION}")
        for name in ("torch", "triton"):
            print(f"{name} {env.package_version(name) or 'is not installed'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of kronafuse, torch and triton.",
        ),
    ] = False,
) -> None:
    """The options of `kronafuse` itself; `--version` ends the command."""
