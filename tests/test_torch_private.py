"""The package without each private name of torch: it imports, and its results stay right."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import kronafuse
from kronafuse import torch_private

PACKAGE = Path(kronafuse.__file__).parent

SCRIPT = """
import io, operator, os, sys, torch
import torch._dynamo, torch._functorch.eager_transforms, torch.testing  # the children share them

torch.set_num_threads(1)
getter = operator.attrgetter


def without(name):
    def attrgetter(path):
        return getter(path + ".gone") if path == name else getter(path)
    return attrgetter


def results():
    import kronafuse
    from kronafuse import torch_private

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    attachment = kronafuse.attach(model, kronafuse.KronA((4, 2), targets=("0",)))
    for each in attachment.parameters():
        torch.nn.init.normal_(each)
    x = torch.randn(2, 3, 16, requires_grad=True)
    y = model(x)
    y += 1
    y.square().mean().backward()
    found = [y.detach(), x.grad, *(each.grad.clone() for each in attachment.parameters())]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found.append(model(x))
    from torch.utils.checkpoint import checkpoint

    found.append(torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().mean(), x)[0])
    found.append(torch.func.grad(lambda x: model(x).square().mean())(x.detach()))
    found.append(torch.func.functional_call(model, dict(model.named_parameters()), (x.detach(),)).detach())
    missing = [name for name, there in torch_private.NAMES.items() if not there]
    return found, missing


def in_child(name):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        operator.attrgetter = without(name)
        import kronafuse.torch_private
        operator.attrgetter = getter
        found = results()
        with os.fdopen(writer, "wb") as file:
            torch.save(found, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    status = os.waitpid(child, 0)[1]
    if status:
        print(name, "failed")
        sys.exit(1)
    return torch.load(io.BytesIO(data), weights_only=True)


expected, absent = in_child(None)
for name in sys.argv[1:]:
    found, missing = in_child(name)
    assert set(missing) == {*absent, name}, (name, missing)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, msg=lambda text: f"{name}: {text}")
print("ok")
"""


def test_results_are_the_same_without_each_private_name():
    names = [name for name, there in torch_private.NAMES.items() if there]
    assert len(names) > 10
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *names], capture_output=True, text=True, timeout=240
    )
    assert run.stdout.endswith("ok\n"), run.stdout + run.stderr


def test_this_torch_has_every_private_name():
    """One that no supported version has would never be used: its fallback is what runs."""
    assert [name for name, there in torch_private.NAMES.items() if not there] == []


def test_no_other_file_reads_a_private_name_of_torch():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "torch_private.py" or path.parent.name == "testing":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        aliases = {
            each.asname or each.name: f"{node.module}.{each.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 0
            for each in node.names
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                whole = ast.unparse(node)
                first, _, rest = whole.partition(".")
                names = [f"{aliases[first]}.{rest}" if first in aliases else whole]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            found += [f"{path.name}: {name}" for name in names if re.match(r"torch\.(.*\.)?_[a-z]", name)]
    assert not found
