"""What a base install must do, as a script to run where nothing can be imported but what the base install brings."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LACKED = (
    "accelerate", "diffusers", "einops", "lycoris", "matplotlib", "numpy", "pandas", "peft", "PIL",
    "pyarrow", "ray", "rich", "scipy", "sklearn", "statsmodels", "tqdm", "transformers", "typer",
)  # fmt: skip
"""Modules that the extras bring, directly or with others."""

FOR_DIFFUSERS = {"kronafuse.models.processors"}
"""Loaded once a model of diffusers is there."""


def lend(folder: Path, requirements: list[str]) -> None:
    """Put into `folder` what these requirements bring, as links to the files of the environment that runs this."""
    from packaging.requirements import Requirement

    todo, done = [Requirement(text) for text in requirements], set()
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in done or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # torch names what other platforms and other builds need
        todo += [Requirement(text) for text in found.requires or []]
        for top in {path.parts[0] for path in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))


def check_imports() -> None:
    """Every public name, and every module of the package outside of what the extras are for."""
    import kronafuse

    for name in kronafuse.__all__:
        assert getattr(kronafuse, name) is not None
    extras = ("bench", "cli", "study", "testing", "train", "trainers", "__main__")
    for module in pkgutil.walk_packages(kronafuse.__path__, "kronafuse."):
        if (
            module.name.split(".")[1] in extras
            or module.name in FOR_DIFFUSERS
            or module.name == "kronafuse._C"
        ):
            continue
        try:
            importlib.import_module(module.name)
        except RuntimeError as error:  # of a library that was not built
            if "kernels cannot run here" not in str(error):
                raise


def check_adapters() -> None:
    """Attach, train, save, load, merge, unmerge and remove on a module of Linears."""
    import torch
    from kronafuse import KronA, LoKr, LoRA, attach, formats
    from torch import nn

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    x = torch.randn(64, 16)
    for number, spec in enumerate(
        [
            KronA((4, 4), targets=("0", "2")),
            LoKr(4, 2, 1.0, targets=("0", "2"), shuffled=True),
            LoRA(4, targets=("0",), dtype=torch.float64),
            LoRA(4, targets=("2",), dtype=torch.bfloat16, scale=2.0),
        ]
    ):
        model, before = made(), made()(x)
        attachment = attach(model, spec)
        optimizer = torch.optim.AdamW(attachment.parameters(), lr=0.02)
        losses = []
        for _ in range(10):
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], losses
        assert str(attachment.report)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{number}.safetensors"
            formats.save(path, attachment)
            file = formats.load(path)
        adapted = model(x)
        other = made()
        with attach(other, file) as loaded:
            assert torch.equal(other(x), adapted)
            assert all(
                torch.equal(each, loaded.state_dict()[name]) for name, each in attachment.state_dict().items()
            )
        attachment.merge()
        assert (model(x) - adapted).abs().max() < 1e-4
        attachment.unmerge()
        assert torch.equal(model(x), adapted)
        attachment.remove()
        assert torch.equal(model(x), before)


def check_released_layout() -> None:
    """The folder of bottleneck adapters, from a record made by hand."""
    import torch
    from kronafuse import Bottleneck, formats

    spec, name = Bottleneck(width=4), "mid_block.attentions.0.transformer_blocks.0"
    tensors = {f"{name}.{key}": torch.randn(size) for key, size in spec.layout(32, 32).sizes.items()}
    record = formats.AdapterFile(spec, {name: (32, 32)}, 1.0, tensors)
    with tempfile.TemporaryDirectory() as folder:
        formats.save(Path(folder) / "adapters", record, format="unet_finetune")
        found = formats.load(Path(folder) / "adapters").tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(each, found[key]) for key, each in tensors.items())


def main() -> None:
    """Everything; prints where the package came from."""
    there = [name for name in LACKED if importlib.util.find_spec(name) is not None]
    assert not there, f"no base install: {there}"
    import kronafuse

    check_imports()
    check_adapters()
    check_released_layout()
    lacked = [name for name in LACKED if name in sys.modules]
    assert not lacked, lacked
    print(kronafuse.__file__)


if __name__ == "__main__":
    main()
