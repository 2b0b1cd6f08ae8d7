"""`kronafuse bench`: one file a command."""

from __future__ import annotations

import typer

from ..exits import reported
from .all import all_parts
from .compare import compare
from .e2e import e2e
from .markdown import markdown
from .report import report
from .suites import SUITE_COMMANDS
from .tune import tune

app = typer.Typer(
    name="bench",
    help="Every implementation a user could pick, against the hardware's floor: speed, accuracy and memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, _command in {
    **SUITE_COMMANDS,
    "e2e": e2e,
    "compare": compare,
    "report": report,
    "markdown": markdown,
    "tune": tune,
    "all": all_parts,
}.items():
    app.command(name=_name)(reported(_command))
