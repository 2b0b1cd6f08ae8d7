"""What holds of the repository as a whole: import direction, documents, cases, public signatures."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import kronafuse
import pytest
from kronafuse import backends
from kronafuse.checks import ACTIVATIONS
from kronafuse.cli.app import app
from kronafuse.nn.specs import DEFAULT
from kronafuse.ops.bottleneck.raw import IMPLEMENTATIONS as BOTTLENECK_IMPLEMENTATIONS
from kronafuse.ops.kron_linear.raw import IMPLEMENTATIONS
from kronafuse.planner import choose
from kronafuse.testing.bottleneck_cases import CASES as BOTTLENECK_CASES
from kronafuse.testing.bottleneck_cases import ODD_CASES as BOTTLENECK_ODD_CASES
from kronafuse.testing.cases import ADAPTERS, CASES, LAYERS, ODD_CASES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kronafuse"
LAYERED = (
    ("version", "shapes", "torch_private", "env"),
    ("checks", "planner", "backends", "native"),
    ("ops",),
    ("nn",),
    ("formats",),
    ("models",),
    ("dropin",),
    ("testing",),
    ("train", "study", "trainers", "bench"),
    ("cli",),
    ("__main__",),
)
"""Imports point to the same line or one above; `kronafuse/__init__.py` only names what is loaded at first use."""
INSIDE_AN_OP = {
    "terms": 0,
    "activations": 0,
    "call": 0,
    "sums": 0,
    "maps": 1,
    "ref": 1,
    "tuning": 1,
    "one_pass_tuning": 2,
    "reduction_tuning": 2,
    "composed": 2,
    "reference": 2,
    "gradients": 2,
    "algorithm": 2,
    "eager": 3,
    "op": 9,
}
"""Files of an op's folder in the order they may import each other; kernels come between `algorithm` and `op`."""
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_of(top: str) -> int:
    found = [index for index, names in enumerate(LAYERED) if top in names]
    assert found, f"{top} is in no layer: add it to LAYERED"
    return found[0]


def imported_modules(path: Path) -> list[tuple[str, ...]]:
    """The kronafuse modules that a file imports, wherever in it, except for type checkers alone."""
    package = path.relative_to(ROOT).parent.parts
    found: list[tuple[str, ...]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            base = tuple(part for part in base if part)
            found.extend([base] if len(base) > 1 else [(*base, alias.name) for alias in node.names])
            if node.module is None:
                found.extend((*base, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kronafuse":
            found.append(tuple(node.module.split(".")) if node.module else ())
        elif isinstance(node, ast.Import):
            found.extend(tuple(a.name.split(".")) for a in node.names if a.name.split(".")[0] == "kronafuse")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    public = {name: tuple(at.strip(".").split(".")) for name, at in kronafuse._PUBLIC.items()}
    return [(module[0], *public.get(module[1], module[1:])) for module in found if len(module) > 1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for module in imported_modules(path):
        if module[1] in ("nn", "formats") and len(module) == 2 and own[0] == module[1]:
            continue
        assert layer_of(module[1]) <= layer_of(own[0]), f"{'.'.join(own)} imports {'.'.join(module)}"
        same_op = own[:1] == ("ops",) and len(own) == 3 and module[1:3] == own[:2] and len(module) > 3
        if same_op:
            mine, theirs = INSIDE_AN_OP.get(own[2], 5), INSIDE_AN_OP.get(module[3], 5)
            assert theirs <= mine, f"{'.'.join(own)} imports {'.'.join(module)}"


def test_the_import_test_sees_imports():
    """A helper that finds nothing would pass every file."""
    modules = {module[1] for module in imported_modules(PACKAGE / "ops/kron_linear/raw.py")}
    assert {"backends", "checks", "planner", "shapes", "ops"} <= modules


def test_import_needs_torch_alone_and_little_time():
    """`import kronafuse` loads neither Triton nor diffusers, nor does it take 0.3 s beyond torch."""
    code = (
        "import sys, time, torch\n"
        "start = time.perf_counter()\n"
        "sys.modules['triton'] = None\n"  # as where Triton does not exist
        "before = set(sys.modules)\n"
        "import kronafuse\n"
        "spent = time.perf_counter() - start\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "kronafuse.kron_linear, kronafuse.KronTerm, kronafuse.plan\n"
        "print(sorted(loaded), spent)\n"
        "assert spent < 0.3, spent\n"
        "assert loaded == {'kronafuse'}, loaded\n"
        "third = {'diffusers', 'transformers', 'peft', 'accelerate', 'safetensors', 'typer', 'rich', 'matplotlib',\n"
        "         'ray', 'pandas', 'statsmodels', 'pyarrow', 'scipy'}\n"
        "assert not third & {name.split('.')[0] for name in sys.modules}\n"
        "x = torch.randn(2, 8)\n"
        "kronafuse.kron_delta(x, torch.randn(2, 2), torch.randn(3, 4))\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"  # which loads Triton, and takes a second
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


SIGNATURES = {
    "KronTerm": "(a, b, b_down=None, scale=1.0, shuffled=False, row_scale=None)",
    "FrozenLinear": "(weight, terms=(), bias=None, base=None)",
    "kron_linear": "(x, weight, a, b, *, b_down=None, bias=None, scale=1.0, shuffled=False, impl='auto')",
    "kron_delta": "(x, a, b, *, b_down=None, base=None, scale=1.0, shuffled=False, impl='auto')",
    "kron_linear_group": "(x, layers, *, impl='auto')",
    "kron_merge": "(weight, a, b, *, b_down=None, scale=1.0, shuffled=False)",
    "plan": "(M, n1, k1, n2, k2, *, rank=None, dtype=torch.bfloat16, device=None)",
    "available_impls": "()",
    "attach": "(model, spec, *, allow_partial=False)",
    "Attachment.parameters": "(self)",
    "Attachment.state_dict": "(self)",
    "Attachment.load_state_dict": "(self, state_dict)",
    "Attachment.merge": "(self, keep=True)",
    "Attachment.unmerge": "(self)",
    "Attachment.remove": "(self)",
    "formats.load": "(path)",
    "formats.save": "(path, adapter, format='kronafuse')",
    "bottleneck": "(x, residual, down, up, *, down_bias=None, up_bias=None, activation='relu', scale=1.0, "
    "impl='auto')",
    "Bottleneck": "(source='attn2_out', sink='ff_in', width=60, *, activation='relu', scale=1.0, init='zero_up', "
    "budget=None, form='dense', terms=4, rank=None, factors=None, dtype=torch.float32)",
    "nn.BottleneckAdapter": "(layout, *, device=None)",
    "nn.KronLinear": "(base, spec=None)",
    "KronA": "(factors=(64, 4), *, targets=DEFAULT, per_target=None, scale=1.0, shuffled=False, "
    "init='diffusekrona', dtype=torch.float32)",
    "LoKr": "(factor=8, rank=None, alpha=None, *, targets=DEFAULT, per_target=None, scale=1.0, shuffled=False, "
    "init='lycoris', dtype=torch.float32, decompose_both=False)",
    "LoRA": "(rank=16, alpha=None, *, targets=DEFAULT, per_target=None, scale=1.0, shuffled=False, "
    "init='lora', dtype=torch.float32)",
}
NOT_YET = ("accelerate",)
"""Public names of later work: absent, not stubbed."""


def parameters(text: str) -> tuple[list[str], set[str]]:
    """Positional parameters in order, and keyword-only ones, whose order nobody sees."""
    call = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(call, ast.FunctionDef)
    defaults = [None] * (len(call.args.args) - len(call.args.defaults)) + call.args.defaults

    def shown(name: str, default: ast.expr | None) -> str:
        return name if default is None else f"{name}={ast.unparse(default)}"

    ordered = [shown(each.arg, default) for each, default in zip(call.args.args, defaults, strict=True)]
    keywords = zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True)
    return ordered, {shown(each.arg, default) for each, default in keywords}


def signature_text(value: object) -> str:
    """Names, kinds and defaults, without annotations."""
    kept = [
        each.replace(annotation=each.empty)
        for each in inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    ]
    return str(inspect.Signature(kept)).replace(repr(DEFAULT), "DEFAULT")


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_signatures(name):
    value = kronafuse
    for part in name.split("."):
        value = getattr(value, part)
    assert parameters(signature_text(value)) == parameters(SIGNATURES[name])


def test_the_signature_test_sees_order_and_kind():
    assert parameters("(a, b, *, c=1, d=2)") == parameters("(a, b, *, d=2, c=1)")
    assert parameters("(a, b)") != parameters("(b, a)")
    assert parameters("(a, b)") != parameters("(a, *, b)")
    assert parameters("(a, *, b=1)") != parameters("(a, *, b=2)")


def test_every_public_name_is_checked_or_a_record():
    missing = set(kronafuse._PUBLIC) - set(SIGNATURES) - {"Attachment"}
    assert not missing, f"no signature is held for {missing}"
    for name in kronafuse._PUBLIC:
        assert getattr(kronafuse, name) is not None
    for name in NOT_YET:
        with pytest.raises(AttributeError, match=name):
            getattr(kronafuse, name)
    for name in ("scale", "report"):
        assert isinstance(inspect.getattr_static(kronafuse.Attachment, name), property)


def test_cases_cover_the_planners_branches():
    """Every order, thin and fat, plain and shuffled, with and without a left factor, is somebody's case."""
    cases = [*CASES.values(), *ODD_CASES.values()]
    seen = {(choose(case.shape).order, choose(case.shape).thin, case.shuffled) for case in cases}
    for order, shuffled in product(("a_first", "b_first", "low_rank"), (False, True)):
        assert (order, True, shuffled) in seen
    for order in ("a_first", "b_first", "low_rank"):
        assert (order, False, False) in seen
    assert {case.has_a for case in cases} == {True, False}
    assert len(CASES) == len(LAYERS) * len(ADAPTERS)


def collected(name: str, *options: str) -> str:
    """The tests of an operator that pytest finds."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"tests/ops/{name}.py"]
    return subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_every_bottleneck_case_and_backend_is_reached():
    """`make test` runs the odd ones on every implementation, the case list on eager and cpu; `make test-full` all."""
    fast, everything = (collected("test_bottleneck", *options) for options in (("-m", "not slow"), ()))
    implementations = [each.name for each in BOTTLENECK_IMPLEMENTATIONS]
    assert set(implementations) <= set(backends.NAMES)
    for impl, case in product(implementations, BOTTLENECK_ODD_CASES):
        assert re.search(rf"test_odd_cases\[{case}-float(16|32|64)-{impl}\]", fast), f"{case} on {impl}"
    for case in BOTTLENECK_CASES:
        assert f"test_named_cases[{case}-float32-eager]" in fast, case
        assert f"test_named_cases[{case}-bfloat16-cpu]" in fast, case
        assert f"test_named_cases[{case}-float32-triton]" in everything, case
        assert f"test_named_cases[{case}-bfloat16-cuda]" in everything, case
    odd = BOTTLENECK_ODD_CASES.values()
    assert {each.activation for each in odd} == set(ACTIVATIONS)
    assert {each.residual for each in odd} == {"x", "other", "none"}
    assert {each.biases for each in odd} == {True, False}


def test_every_case_and_backend_is_reached():
    """What pytest collects for `make test` and `make test-full` runs every case on every implementation."""

    fast, everything = (collected("test_kron_linear", *options) for options in (("-m", "not slow"), ()))
    implementations = [each.name for each in IMPLEMENTATIONS]
    assert set(implementations) <= set(backends.NAMES)
    for impl, case in product(implementations, ODD_CASES):
        assert re.search(rf"test_odd_cases\[{case}-float(16|32|64)-{impl}\]", fast), f"{case} on {impl}"
    for impl, case in product(("eager", "triton"), CASES):
        assert f"test_named_cases[{case}-float32-{impl}]" in everything, f"{case} on {impl}"
    for case in CASES:
        assert f"test_named_cases[{case}-bfloat16-cuda]" in everything, case
    for case in CASES:
        layer, adapter = case.split("-")
        wide = layer in ("flux2_3072", "ff_in", "ff_out") and adapter not in (
            "krona_64x4",
            "lokr_f8",
            "lora_r16",
        )
        assert wide or f"test_named_cases[{case}-float32-eager]" in fast, case
    for adapter in ADAPTERS:
        assert f"test_named_cases[sd15_320-{adapter}-float32-triton]" in fast, adapter


DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", ".cache", "build", "dist", "runs"} & set(path.parts)
)


def code_spans(text: str) -> list[str]:
    """What stands in backticks, fenced or not, and in indented blocks."""
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.S)
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    return [
        *re.findall(r"`([^`\n]+)`", outside),
        *"\n".join(fenced).splitlines(),
        *re.findall(r"^    (.+)$", outside, re.M),
    ]


ELSEWHERE = ("runs/", "path/", "images/", "my-", "stabilityai/", "stable-diffusion-v1-5/", "dist/")
"""How names of files begin that are not the repository's."""
BUILT = ("kronafuse/lib/", ".cache/", "torch/csrc/")
"""How names of files begin that a build makes, or torch brings."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_documents_exist(document):
    known = {path.name for path in ROOT.rglob("*") if not {".venv", ".git", ".cache"} & set(path.parts)}
    for span in code_spans(document.read_text()):
        for word in re.findall(r"(?<![\w./<-])(?:[\w.-]+/)+[\w.-]*(?![\w<*])", span):
            made = word.startswith((*ELSEWHERE, *BUILT))
            places = (ROOT, document.parent, PACKAGE)
            assert made or any((place / word).exists() for place in places), f"{word} does not exist"
        if re.fullmatch(r"[\w-]+\.(py|md|toml|txt)", span):
            assert span in known, f"{span} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = {each.name for each in (*app.registered_commands, *app.registered_groups)}
    for span in code_spans(document.read_text()):
        for target in re.findall(r"^\s*make ([a-z-]+)", span.split("#")[0]):
            assert target in targets, f"make {target} does not exist"
        for command in re.findall(r"^\s*kronafuse ([a-z]+)", span):
            assert command in commands, f"kronafuse {command} does not exist"


def test_documents_are_seen():
    spans = [span for document in DOCUMENTS for span in code_spans(document.read_text())]
    assert "make demo" in spans
    assert len(DOCUMENTS) >= 5
