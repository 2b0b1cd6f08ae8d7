"""Printing on terminals and into files whose encoding lacks some characters: those are replaced."""

from __future__ import annotations

import sys


def replace_unprintable() -> None:
    """Let stdout and stderr write "?" in place of a character that their encoding lacks, instead of raising.

    A choice that was made in PYTHONIOENCODING, as "ascii:xmlcharrefreplace", stays.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is None:
            continue  # no stream, or one that a program has put there
        complete = stream.encoding.lower().replace("-", "").startswith("utf")
        if stream.errors == "strict" or (stream.errors == "surrogateescape" and not complete):
            reconfigure(errors="replace")
