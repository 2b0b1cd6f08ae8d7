"""What setup.py gives to setuptools: the libraries as a step of every build, and the module kronafuse._C."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import Command, Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, SetupError

from . import building, toolchain
from .ninja_file import BuildError
from .paths import CSRC, LIBRARIES, ROOT
from .switches import SwitchError, Switches


class build_native(Command):
    """Builds the libraries into the package; a step of `build`, also of editable installations."""

    description = "build libkronafuse_cpu.so and libkronafuse_cuda.so"
    user_options = [("inplace", "i", "put them into the source tree")]  # noqa: RUF012 - setuptools' way
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.inplace = False
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        """Where the libraries go."""
        if self.inplace or self.editable_mode:
            return LIBRARIES
        return Path(str(self.build_lib)) / LIBRARIES.relative_to(ROOT)

    def run(self) -> None:
        for extension in self.distribution.ext_modules or ():
            extension.include_dirs.insert(0, str(building.record_folder(self.folder)))
        package = self.folder.parent
        if package.resolve() != LIBRARIES.parent:  # an earlier build's copy, of which a wheel would get all
            shutil.rmtree(package, ignore_errors=True)
        elif not self.distribution.ext_modules:
            for module in package.glob("_C.*.so"):  # what an earlier build knew is not so any more
                module.unlink()
        try:
            building.build(self.folder, Switches.read())
        except (BuildError, SwitchError) as error:
            raise SetupError(str(error)) from error

    def get_outputs(self) -> list[str]:
        """The files in a wheel; an editable installation finds them in the source tree."""
        if self.editable_mode or not self.folder.is_dir():
            return []
        return [str(path) for path in sorted(self.folder.iterdir()) if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        """For the source distribution: everything in csrc."""
        return [
            str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.suffix in SOURCE_SUFFIXES
        ]


SOURCE_SUFFIXES = (".h", ".cuh", ".cpp", ".cu", ".py", ".md", ".map")


class build_with_native(build):
    """setuptools' build with build_native as its first step."""

    sub_commands = [("build_native", None), *build.sub_commands]  # noqa: RUF012


class platform_wheel(bdist_wheel):
    """A wheel for one platform and every Python: the libraries hold no Python symbol.

    kronafuse._C inside serves the Python that built it; the others do without.
    """

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def arguments() -> dict[str, Any]:
    """Keyword arguments for setuptools.setup."""
    try:
        switches = Switches.read()
    except SwitchError as error:
        raise SystemExit(f"error: {error}") from error
    commands: dict[str, Any] = {
        "build": build_with_native, "build_native": build_native, "bdist_wheel": platform_wheel,
    }  # fmt: skip
    if all(building.refusal(key, switches) for key in building.NAMES):
        return {"cmdclass": commands}
    commands["build_ext"] = extension_command()
    return {"cmdclass": commands, "ext_modules": [introspection()]}


def introspection() -> Extension:
    """kronafuse._C: what was built and what each kernel takes, for the Python at hand; the rest works without."""
    return Extension(
        "kronafuse._C",
        [str((CSRC / "python" / "module.cpp").relative_to(ROOT))],
        include_dirs=[
            str(building.record_folder(LIBRARIES)),
            str(CSRC),
            str(toolchain.torch().include),
        ],
        extra_compile_args=["-std=c++17", "-O1", "-g0", "-fvisibility=hidden"],
        optional=True,
    )


def extension_command() -> Any:
    """torch's BuildExtension, whose failures setuptools then takes as those of an optional extension."""
    # torch looks for ninja on PATH alone, where that of an environment which is not activated is missing.
    os.environ["PATH"] = os.pathsep.join([str(Path(toolchain.ninja()).parent), os.environ.get("PATH", "")])
    from torch.utils.cpp_extension import BuildExtension

    class build_ext(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except RuntimeError as error:
                raise CompileError(f"kronafuse: {ext.name} is not built: {error}") from error

    return build_ext
