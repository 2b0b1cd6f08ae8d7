"""A ninja file: rules, edges, and the run of ninja that brings them up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import toolchain


class BuildError(Exception):
    """A compiler or the linker failed; the message is what it said."""

    @property
    def brief(self) -> str:
        """The first lines that name an error, else the first that are neither ninja's nor a command."""
        lines = [line.strip() for line in str(self).splitlines()]
        lines = [
            line for line in lines if not re.match(r"\[\d+/|ninja: |FAILED|$", line) and " -o " not in line
        ]
        errors = [line for line in lines if re.search(r"\berror\b|undefined reference|not found", line)]
        return "; ".join((errors or lines)[:3])


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(words: Sequence[str | Path]) -> str:
    """Words quoted for the shell and for ninja, whose own variables stay as they are."""
    return " ".join(
        str(word) if "$in" in str(word) or "$out" in str(word) else shlex.quote(str(word)).replace("$", "$$")
        for word in words
    )


@dataclass
class NinjaFile:
    """Edges of one folder, written to `build.ninja` in it."""

    folder: Path
    lines: list[str] = field(default_factory=list)

    def compile(
        self, obj: Path, source: Path, command: Sequence[str | Path], log: Path | None = None
    ) -> None:
        """One object from one source, with the headers it read; `log` keeps what the compiler printed."""
        name = f"compile_{len(self.lines)}"
        shell = _command(command)
        if log is not None:
            shell = f"{shell} > {shlex.quote(str(log))} 2>&1 || (cat {shlex.quote(str(log))}; false)"
        self.lines.append(
            f"rule {name}\n  command = {shell}\n  depfile = $out.d\n  deps = gcc\n  description = {source.name}\n"
            f"build {_path(obj)}: {name} {_path(source)}\n"
        )

    def link(self, library: Path, objects: Sequence[Path], command: Sequence[str | Path]) -> None:
        """One library from objects, linked beside its place and renamed: there is never half of one."""
        name = f"link_{len(self.lines)}"
        shell = f"{_command(command).replace('$out', '$out.part')} && mv -f $out.part $out"
        self.lines.append(
            f"rule {name}\n  command = {shell}\n  description = {library.name}\n"
            f"build {_path(library)}: {name} {' '.join(_path(each) for each in objects)}\n"
        )

    def run(self, jobs: int, verbose: bool = False) -> None:
        """Writes the file and brings everything up to date; raises BuildError with all that failed."""
        with locked(self.folder) as lock:
            target = self.folder / "build.ninja"
            text = "ninja_required_version = 1.5\n" + "".join(self.lines)
            if not target.exists() or target.read_text() != text:
                target.write_text(text)
            command = [toolchain.ninja(), "-C", str(self.folder), "-j", str(jobs), "-k", "0"]
            if verbose:
                command.append("-v")
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                pass_fds=(lock,),  # compilers that outlive a killed build keep the next one waiting
            )
            if done.returncode:
                raise BuildError(done.stdout)
            if verbose or re.search(r"^(?!ninja).*warning:", done.stdout, re.M):
                print(done.stdout)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """One build at a time in a folder, across processes; yields the lock's file descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        if sys.platform != "win32":  # where nothing is compiled, and fcntl is not there
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
