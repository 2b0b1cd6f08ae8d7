"""The wrappers of csrc/cuda/common do what PTX says: on the host's emulation, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("wrapper_kernels.cu")
DTYPES = {torch.bfloat16: 2, torch.float16: 3}  # the numbers of kronafuse::DType
SIZES = (64, 96, 128, 160, 192, 256)


class Wrappers(NamedTuple):
    """The compiled kernels, and where their tensors lie."""

    library: ctypes.CDLL
    device: torch.device

    def call(self, name: str, *arguments: torch.Tensor | int) -> None:
        """Runs one kernel; raises RuntimeError with its message where it fails."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*[_packed(argument) for argument in arguments])
        if message is not None:
            raise RuntimeError(message.decode())
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _packed(argument: torch.Tensor | int) -> ctypes.c_void_p | ctypes.c_int:
    return (
        ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else ctypes.c_int(argument)
    )


def _compile(folder: Path, command: list[str]) -> ctypes.CDLL:
    library = folder / "libwrappers.so"
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def _emulated_library(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    emulation = [str(path) for path in sorted((ROOT / "csrc/cuda/emulation").glob("*.cpp"))]
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-Icsrc",
        "-DKRONAFUSE_EMULATED",
        "-Wno-unknown-pragmas",
    ]
    return _compile(folder, [compiler, *flags, *emulation, "-x", "c++", str(SOURCE)])


def _gpu_library(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("nvcc")
    if compiler is None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs nvcc and a GPU of compute capability 9.0")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-shared", "-Icsrc"]
    shared = [f"csrc/cuda/common/{name}.cu" for name in ("launch", "tensor_map")]
    return _compile(folder, [compiler, *flags, "-gencode=arch=compute_90a,code=sm_90a", *shared, str(SOURCE)])


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Wrappers:
    return Wrappers(_emulated_library(tmp_path_factory.mktemp("emulated")), torch.device("cpu"))


@pytest.fixture(scope="module", params=["emulated", "gpu"] if torch.cuda.is_available() else ["emulated"])
def wrappers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wrappers:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return Wrappers(_gpu_library(tmp_path_factory.mktemp("gpu")), torch.device("cuda"))


@pytest.fixture(params=[0, 1, 2])
def seed(request: pytest.FixtureRequest, wrappers: Wrappers) -> int:
    """The order in which emulated warps run and loads land."""
    if wrappers.device.type == "cuda":
        return 0
    wrappers.library.use_seed(ctypes.c_uint64(request.param))
    return request.param


def _random(wrappers: Wrappers, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(wrappers.device)


def _nan(wrappers: Wrappers, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=wrappers.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_mma_give_a_product(wrappers: Wrappers, dtype: torch.dtype, transposed: bool) -> None:
    a, b = _random(wrappers, 16, 16, dtype=dtype), _random(wrappers, 16, 8, dtype=dtype)
    given = b if transposed else b.t().contiguous()
    d = _nan(wrappers, 16, 8)
    wrappers.call("run_warp_product", a, given, d, transposed, DTYPES[dtype])
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_registers", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_wgmma_gives_a_product(
    wrappers: Wrappers, n: int, transposed: bool, a_registers: bool, dtype: torch.dtype
) -> None:
    k = 192
    a, b = _random(wrappers, 64, k, dtype=dtype), _random(wrappers, n, k, dtype=dtype)
    given = b.t().contiguous() if transposed else b
    d = _nan(wrappers, 64, n)
    wrappers.call("run_group_product", a, given, d, n, k, transposed, a_registers, DTYPES[dtype])
    torch.testing.assert_close(d, a.float() @ b.float().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(320, 64), (301, 41), (1, 8)])
def test_tma_pipeline_copies_and_clips(
    wrappers: Wrappers, seed: int, rows: int, columns: int, cluster: int
) -> None:
    pitch = 64
    x = _random(wrappers, rows, pitch, dtype=torch.bfloat16)
    y = torch.full_like(x, 7.0)
    wrappers.call("run_cluster_copy", x, y, rows, columns, 2 * pitch, cluster, DTYPES[x.dtype])
    assert torch.equal(y[:, :columns], x[:, :columns])
    assert (y[:, columns:] == 7.0).all(), "wrote outside the tensor"


@pytest.mark.parametrize("dtype", DTYPES)
def test_staged_copies_arrive_in_time(wrappers: Wrappers, seed: int, dtype: torch.dtype) -> None:
    x, sums = _random(wrappers, 256, 88, dtype=dtype), _nan(wrappers, 256)
    wrappers.call("run_staged_sums", x, sums, 88, False, DTYPES[dtype])
    torch.testing.assert_close(sums, x.float().sum(1), rtol=1e-5, atol=1e-4)


def test_warps_exchange(wrappers: Wrappers) -> None:
    values = _random(wrappers, 96, dtype=torch.float32)
    total, seventh = _nan(wrappers, 3), _nan(wrappers, 3)
    wrappers.call("run_warp_exchange", values, total, seventh, 3)
    torch.testing.assert_close(total, values.view(3, 32).sum(1))
    assert torch.equal(seventh, values.view(3, 32)[:, 7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_as_torch_does(wrappers: Wrappers, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    step = torch.full_like(every, torch.inf)
    halfway = torch.stack([every, torch.nextafter(every, step), torch.nextafter(every, -step)])
    halves = (every[:-1] + every[1:]) / 2
    wide = torch.randn(20000, generator=torch.Generator().manual_seed(2)) * torch.logspace(-9, 6, 20000)
    values = torch.cat([halfway.flatten(), halves, wide]).to(wrappers.device)
    rounded, widened = _nan(wrappers, values.numel(), dtype=dtype), _nan(wrappers, values.numel())
    wrappers.call("run_round_trip", values, rounded, widened, values.numel(), DTYPES[dtype])
    expected = values.to(dtype)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(widened[numbers], expected.float()[numbers])


def test_a_refused_launch_names_the_kernel(wrappers: Wrappers) -> None:
    with pytest.raises(RuntimeError, match=r"warp_exchange.*2048"):
        wrappers.call("run_refused_launch")


def test_a_forgotten_wait_shows(emulated: Wrappers) -> None:
    x, sums = _random(emulated, 256, 88, dtype=torch.float16), _nan(emulated, 256)
    emulated.call("run_staged_sums", x, sums, 88, True, DTYPES[x.dtype])
    assert sums.isnan().all()


def test_a_deadlock_says_who_waits_for_what(emulated: Wrappers) -> None:
    with pytest.raises(RuntimeError) as caught:
        emulated.call("run_wait_for_nobody")
    message = str(caught.value)
    assert "wait_for_nobody: deadlock" in message
    assert "threads 0 to 31: mbarrier_wait for parity 0 at shared byte 0" in message
    assert "missing 1 of 2 arrivals" in message
    assert "threads 32 to 63: named_barrier 3 (32 of 64 threads came)" in message
    assert "threads 64 to 95: nothing, ended" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "run_parted_lanes",
            r"parted_lanes: a warp's lanes part: this one is at elect_one, others are at sync_warp",
        ),
        ("run_beyond_shared", r"beyond_shared: block \(0, 0, 0\) wrote beyond its 64 bytes"),
    ],
)
def test_misuse_is_an_error(emulated: Wrappers, name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated.call(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run_unwaited_store", "ends before its TMA stores"),
        ("run_unfenced_store", r"no thread of the block has called fence_async_shared\(\)"),
    ],
)
def test_a_store_must_be_fenced_and_waited_for(emulated: Wrappers, name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated.call(name, torch.zeros(16, 64, dtype=torch.bfloat16))
