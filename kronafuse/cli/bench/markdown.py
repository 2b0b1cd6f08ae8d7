"""`kronafuse bench markdown`: tables in documents, from results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def markdown(
    results: Annotated[Path | None, typer.Argument(help="Results; not needed with --into.")] = None,
    table: Annotated[str, typer.Option(help="Which table is printed.")] = "kron_linear",
    into: Annotated[
        Path | None,
        typer.Option(help="Document whose marked tables are generated anew, instead of printing."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 where the document is not current.")
    ] = False,
) -> None:
    """Print a table as Markdown, or write the tables that a document marks.

    A mark is a line `<!-- table: NAME from PATH -->`, the table ends at `<!-- end -->`; PATH is relative to the
    document, and words such as mode=forward before `from` choose rows.
    """
    from ...bench.markdown import filled, table_of
    from ...bench.records import Results
    from ...formats.atomic import written_beside
    from ..exits import Missed

    if (results is None) == (into is None):
        raise ValueError("bench markdown: give either results to print a table of, or --into a document")
    if into is None:
        assert results is not None
        if check:
            raise ValueError("bench markdown: --check is about a document; give it with --into")
        print("\n".join(table_of(table, {}, Results.read(results))))
        return
    before = into.read_text(encoding="utf-8")
    after = filled(before, into.parent)
    if check:
        if before != after:
            raise Missed(
                f"bench markdown: the tables of {into} are not those of the results; run without --check"
            )
        return
    with written_beside(into) as partial:
        partial.write_text(after, encoding="utf-8")
