"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kronafuse
import pytest
import torch
import typer
from accelerate.state import AcceleratorState, GradientState
from kronafuse import cli, formats, native
from kronafuse.bench.records import Results
from kronafuse.cli import doctor_native
from kronafuse.cli.app import app
from kronafuse.cli.exits import reported
from kronafuse.train.checkpoint import checkpoints
from kronafuse.train.streams import replace_unprintable
from PIL import Image
from typer.testing import CliRunner, Result

PUBLISHED = Path(__file__).parents[1] / "study" / "published.csv"
RECORDED = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "native.json"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision for a process; every test starts without it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a smoke run of the demo wrote."""
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--smoke", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    (folder / "printed.txt").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one problem."""
    results = Results.read(RECORDED)
    first = [row for row in results.rows if row.problem == results.rows[0].problem]
    path = tmp_path_factory.mktemp("results") / "bench.json"
    replace(results, rows=tuple(first), steps=()).write(path)
    return path


@pytest.fixture
def base(demo_folder: Path) -> Path:
    """The demo's base model."""
    (folder,) = demo_folder.glob("base-*")
    return folder


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """Four grey images of two classes that the demo's base model has names for."""
    for label in ("8", "9"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), 100 * number).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_commands_that_exist() -> None:
    assert sorted(command.name or "" for command in app.registered_commands) == [
        "anova",
        "demo",
        "doctor",
        "sample",
        "sweep",
        "train",
    ]
    assert invoke("--help").exit_code == 0
    assert invoke("bench").exit_code == 2


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kronafuse", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


def test_without_typer_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else find(name))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        'kronafuse: the command line needs typer; install with: pip install ".[train]" or pip install ".[bench]" in a'
        " clone of kronafuse's repository\n"
    )


@pytest.mark.parametrize(
    "arguments", [["demo"], ["train"], ["sample", "cat", "--base", "x"]], ids=lambda each: each[0]
)
def test_without_diffusers_names_the_extra(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr == (
        'kronafuse: kronafuse.train: needs diffusers; install with: pip install ".[train]" in a clone of'
        " kronafuse's repository\n"
    )


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for name in ("torch", "triton", "diffusers", "peft", "cpu", *kronafuse.available_impls()):
        assert name in result.stdout
    assert torch.__version__.split("+")[0] in result.stdout
    for name in (native.CPU, native.CUDA, "kronafuse._C"):
        assert name in result.stdout
    assert result.stdout.split()[0] == "Implementations"


def test_doctor_shows_the_kernels_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(
        arch="90", kernel="gemm<64>(x)", registers=101, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0,
        shared_bytes=4096,
    )  # fmt: skip
    module = SimpleNamespace(usages=lambda: [usage], configurations=dict, versions=dict)
    monkeypatch.setattr(doctor_native, "introspection", lambda: (module, ""))
    tables = ("CUDA kernels: registers", "CUDA configurations")
    shown = {options: invoke("doctor", *options).stdout for options in ((), ("--kernels",))}
    assert [title in shown[()] for title in tables] == [False, False]
    assert [title in shown["--kernels",] for title in tables] == [True, True]
    monkeypatch.setattr(doctor_native, "introspection", lambda: (None, "not built for this Python"))
    shown_without = invoke("doctor", "--kernels").stdout
    assert "No tables of kernels: kronafuse._C: not built for this Python." in shown_without
    assert "CUDA configurations" not in shown_without


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"kronafuse {kronafuse.__version__}",
        f"torch {importlib.metadata.version('torch')}",
        f"triton {importlib.metadata.version('triton')}",
    ]


def test_no_message_installs_another_package_of_our_name() -> None:
    """The index does not have it, or has somebody else's: whatever tells people to install it is wrong."""
    package = Path(kronafuse.__file__).parent
    told = [path for path in package.rglob("*.py") if "pip install kronafuse" in path.read_text("utf-8")]
    assert told == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["train", "--help"],
        ["anova", PUBLISHED, "--response", "clip_similarity", "--out"],
        [
            "sweep",
            "--source",
            "ff_in,block_out",
            "--sink",
            "attn1_in,block_out",
            "--retries",
            "-1",
            "--output",
        ],
        ["bench", "markdown", "RECORDED"],
        ["bench", "report", "RECORDED", "--out"],
    ],
    ids=lambda each: " ".join(map(str, each[:2])),
)
def test_terminals_that_lack_characters(
    arguments: list[Any], encoding: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [recorded if each == "RECORDED" else each for each in arguments]
    if arguments[-1] in ("--out", "--output"):
        arguments = [*arguments, tmp_path / "Möbius→"]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["kronafuse", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed, told = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    if arguments[0] == "sweep":
        assert caught.value.code == 2
        assert "sweep: retries must be at least 0; got -1" in told
        assert "M?bius?" in printed if encoding == "ascii" else "Möbius?" in printed
    else:
        assert not caught.value.code, told
        assert len(printed.splitlines()) > 1 or arguments[1] == "report"


def test_a_choice_of_what_to_do_with_such_characters_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {}
    for errors in ("strict", "xmlcharrefreplace"):
        stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors)
        monkeypatch.setattr(sys, "stdout", stream)
        replace_unprintable()
        chosen[errors] = stream.errors
    assert chosen == {"strict": "replace", "xmlcharrefreplace": "xmlcharrefreplace"}


def test_ctrl_c_while_libraries_are_imported_is_one_line() -> None:
    pressed = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a job in the background
        "class Press:\n"
        "    def find_spec(self, name, *others):\n"
        "        if name == 'torch':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "            print('went on')\n"
        "sys.meta_path.insert(0, Press())\n"
        "sys.argv = ['kronafuse', 'doctor']\n"
        "from kronafuse.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", pressed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kronafuse: interrupted\n")


def test_doctor_without_native_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is missing and why, and shows no tables of kernels that it does not know."""
    record = {
        "cpu": {"built": False, "reason": "no C++ compiler"},
        "cuda": {"built": False, "reason": "no nvcc"},
    }
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(sys.modules, "kronafuse._C", None)
    monkeypatch.setattr(native, "build_record", lambda: record)
    monkeypatch.setattr(native, "cpu_reasons", lambda: ["libkronafuse_cpu.so is not built: no C++ compiler"])
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "no C++ compiler" in result.stdout
    assert "not built for this Python" in result.stdout
    assert "CUDA configurations" not in result.stdout


def test_doctor_says_why_the_introspection_module_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol: f")

    monkeypatch.setattr(doctor_native.importlib, "import_module", broken)
    assert doctor_native.introspection() == (None, "does not load: kronafuse._C: undefined symbol: f")


def test_demo_smoke_writes_everything(demo_folder: Path, base: Path) -> None:
    printed = (demo_folder / "printed.txt").read_text()
    assert "Smoke run" in printed
    for name in ("samples.png", "loss.png"):
        with Image.open(demo_folder / name) as image:
            assert image.format == "PNG"
    figures = json.loads((demo_folder / "figures.json").read_text())
    counts = figures["trainable_parameters"]
    assert counts["krona"] < counts["lora_rank_16"] < counts["full"]
    file = formats.load(demo_folder / "adapter.safetensors")
    assert counts["krona"] == sum(tensor.numel() for tensor in file.tensors.values())
    assert f"{counts['krona']:,}" in printed
    adapter = figures["adapter"]
    assert adapter["layers"] == adapter["fused_layers"] == 4 * adapter["shared_reads"] > 0
    accuracy = figures["classifier_accuracy"]
    assert accuracy["real_held_out"] > 0.97
    assert all(0 <= share <= 1 for share in (accuracy["new_before"], accuracy["new_after"]))
    distance = figures["frechet_pca20_new"]
    assert 0 < distance["real_other_half"] < distance["before"]
    timing = figures["step_time"]
    assert timing["missing"] is None
    assert timing["parameters"]["PEFT LoKr"] == timing["parameters"]["kronafuse LoKr"]
    assert timing["ratio_to_peft_lokr"]["PEFT LoKr"] == 1.0
    assert {each.name for each in base.iterdir()} >= {"unet", "scheduler", "class_tokens.safetensors"}


def test_demo_again_takes_the_cached_base_and_says_that_peft_is_missing(
    demo_folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kronafuse.train.digits import timing

    find = importlib.util.find_spec
    monkeypatch.setattr(
        timing.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    weights = next((base / "unet").glob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    result = invoke("demo", "--smoke", "--output", demo_folder)
    assert result.exit_code == 0, result.output
    assert "Not timed: PEFT LoKr. PEFT is not installed: pip install peft" in result.stdout
    assert weights.stat().st_mtime_ns == before
    assert json.loads((demo_folder / "figures.json").read_text())["base_was_cached"] is True


def test_demo_with_a_damaged_cache_names_the_folder(demo_folder: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / base.name)
    (tmp_path / base.name / "losses.json").unlink()
    result = invoke("demo", "--smoke", "--output", tmp_path)
    assert result.exit_code == 2
    assert f"the cached base model {tmp_path / base.name} cannot be used: " in result.stderr
    assert "delete that folder, and the demo trains it again" in result.stderr


def test_demo_prints_its_duration_beside_the_limit(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kronafuse.train.digits import demo

    figures = json.loads((demo_folder / "figures.json").read_text()) | {"base_was_cached": False}
    monkeypatch.setattr(demo, "run_demo", lambda *_: figures)
    for seconds, slow in ((480, False), (481, True)):
        figures["seconds"] = float(seconds)
        result = invoke("demo", "--output", demo_folder)
        assert result.exit_code == 0
        row = next(line for line in result.stdout.splitlines() if "trained" in line)
        assert [each.strip() for each in row.strip("│").split("│")][:2] == [str(seconds), "480"]
        assert ("Slower than its limit: 481 s, and 480 s on 2 cores are allowed" in result.stdout) is slow


def test_demo_that_misses_its_targets_fails(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kronafuse.train.digits import demo

    figures = json.loads((demo_folder / "figures.json").read_text())
    figures["gated"] = True
    figures["classifier_accuracy"] |= {"new_before": 0.2, "new_after": 0.8}
    monkeypatch.setattr(demo, "run_demo", lambda *_: figures)
    result = invoke("demo", "--output", demo_folder)
    assert result.exit_code == 1
    assert "must be below 10%; got 20.0%" in result.stderr
    assert "must be at least 85%; got 80.0%" in result.stderr
    figures["classifier_accuracy"] |= {"new_before": 0.02, "new_after": 0.9}
    assert invoke("demo", "--output", demo_folder).exit_code == 0


def test_train_and_sample(base: Path, digits_folder: Path, tmp_path: Path) -> None:
    """The demo's base model serves the other commands; flags count instead of the file's keys."""
    config = tmp_path / "train.toml"
    config.write_text(
        f'base = "{base}"\ndata = "{digits_folder}"\nfactors = [8, 4]\nsteps = 50\nbatch_size = 2\n',
        encoding="utf-8",
    )
    output = tmp_path / "out"
    result = invoke("train", config, "--steps", 2, "--output", output, "--learning-rate", 0.01)
    assert result.exit_code == 0, result.output
    assert list(checkpoints(output)) == [2]
    result = invoke(
        "sample", "8", "9", "--base", base, "--adapter", output / "adapter.safetensors", "--steps", 2,
        "--count", 2, "--batch-size", 3, "--output", tmp_path / "drawn",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(each.name for each in (tmp_path / "drawn").iterdir()) == [
        "0-0.png",
        "0-1.png",
        "1-0.png",
        "1-1.png",
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_a_checkpoint_and_are_the_exit_code(
    base: Path,
    digits_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    from kronafuse.train import loop

    loss = loop.noise_prediction_loss

    def pressed(*arguments: Any) -> torch.Tensor:
        signal.raise_signal(number)
        return loss(*arguments)

    monkeypatch.setattr(loop, "noise_prediction_loss", pressed)
    output = tmp_path / "out"
    result = invoke("train", "--base", base, "--data", digits_folder, "--factors", "8x4", "--output", output)
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == "kronafuse: stopped after step 1; go on with --resume latest"
    assert list(checkpoints(output)) == [1]


def test_sigterm_ends_any_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    """It raises where the command is, so that what is open is closed; a second one does not break that."""
    before, closed = signal.getsignal(signal.SIGTERM), []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            closed.append(True)

    with pytest.raises(typer.Exit) as caught:
        reported(command)()
    assert caught.value.exit_code == 143
    assert closed == [True]
    assert capsys.readouterr().err == "kronafuse: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "kronafuse: missing keys base, data: each must be in the TOML file or given as a flag\n"),
        (["train", "absent.toml"], "kronafuse: configuration file absent.toml does not exist\n"),
        (
            ["train", "--base", "absent", "--data", "."],
            "kronafuse: base model absent does not exist or is not a folder (hub names are not taken)\n",
        ),
        (
            ["sample", "x", "--base", "absent"],
            "kronafuse: base model absent does not exist or is not a folder (hub names are not taken)\n",
        ),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr == message


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRONAFUSE_TRACEBACK", "1")
    result = invoke("train", "absent.toml")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_unknown_key_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text("base = 'a'\ndata = 'b'\nbatchsize = 4\n")
    result = invoke("train", config)
    assert result.exit_code == 2
    assert "unknown key batchsize (closest: batch_size); the keys that exist are: " in result.stderr


def test_every_key_is_a_flag() -> None:
    from kronafuse.train.config import TrainConfig

    printed = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in printed


def test_adapter_of_another_model(demo_folder: Path, base: Path, tmp_path: Path) -> None:
    file = formats.load(demo_folder / "adapter.safetensors")
    other = formats.AdapterFile(
        file.spec,
        {f"other.{name}": size for name, size in file.modules.items()},
        file.scale,
        {f"other.{name}": tensor for name, tensor in file.tensors.items()},
    )
    formats.save(tmp_path / "other.safetensors", other)
    result = invoke(
        "sample", "8", "--base", base, "--adapter", tmp_path / "other.safetensors", "--output", tmp_path / "o"
    )
    assert result.exit_code == 2
    assert "other." in result.stderr
    assert not list((tmp_path / "o").iterdir())
