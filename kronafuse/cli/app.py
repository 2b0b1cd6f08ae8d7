"""The typer application: one file a command."""

from __future__ import annotations

import typer

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
