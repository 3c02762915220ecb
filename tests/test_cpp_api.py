"""The C and C++ APIs: programs built against the installed headers and library, with nothing else installed."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import CompiledKernel, write_pack

from bitdecoding import KernelConfig, QuantSpec

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests" / "cpp"
LIB_DIR = native.LIBRARY_PATH.parent
NO_GPU = 77  # exit status of decode_loop
ENGINE_STEPS = "4000 tokens per sequence, 1 kernel(s) per step"
PROBLEM = {"head_dim": 128, "quant": QuantSpec(), "num_q_heads": 32, "num_kv_heads": 8}  # of the programs


def cmake(*arguments):
    program = shutil.which("cmake") or pytest.skip("there is no CMake")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_programs(folder, directory, *options, targets=("all",)):
    """tests/cpp, built against the library that find_package finds in a directory."""
    try:
        headers = [
            Path(f.locate()) for f in metadata.files("nvidia-cuda-runtime") or [] if f.name == "cuda_runtime_api.h"
        ]
    except metadata.PackageNotFoundError:
        headers = []
    options = [*options, *(f"-DCUDA_HOME={header.parents[1]}" for header in headers)]
    cmake("-S", SOURCES, "-B", folder, f"-Dbitdecoding_DIR={directory}", *options)
    cmake("--build", folder, "-j2", "--target", *targets)
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The programs of tests/cpp, with the library of this Python."""
    command = [sys.executable, "-m", "bitdecoding", "cmake-dir"]
    directory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return build_programs(tmp_path_factory.mktemp("programs"), directory)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A pack with four kernels, which no driver would load, and a file that is none."""
    folder = tmp_path_factory.mktemp("packs")
    configs = [
        KernelConfig(arch="sm80", copy="cp_async"),
        *(KernelConfig(arch="sm80", kind=x) for x in ("append", "merge")),
        KernelConfig.for_problem(kind="step", arch="sm80", **PROBLEM),
    ]
    launch = {"entry": "entry", "threads": 160, "smem": 4096, "regs": 128, "ctas_per_sm": 1}
    kernels = [CompiledKernel(name=each.name(), cubin=each.kind.encode(), **launch) for each in configs]
    write_pack(folder / "sm80.bdpack", kernels, {"arch": "sm80"})
    (folder / "none.bdpack").write_bytes(b"BDPACK 1\nwhatever")
    return [folder / "sm80.bdpack", folder / "none.bdpack"]


def test_a_program_that_knows_no_python(programs):
    output = subprocess.run([programs / "consumer"], check=True, capture_output=True, text=True, env={}).stdout
    config = KernelConfig(quant=QuantSpec(k_bits=2), stages=3)
    assert output.splitlines() == [
        config.name(),
        str(config.smem_bytes()),
        "1 k_bits=3: allowed are 8, 4, 2",
        "1 1 1",
        "1 batch=0: must be positive",
    ]


def test_the_core_needs_neither_python_nor_cuda():
    output = subprocess.run(["ldd", LIB_DIR / "libbitdecoding.so"], check=True, capture_output=True, text=True).stdout
    libraries = {line.split()[0].partition(".so")[0] for line in output.splitlines()}
    assert libraries <= {"linux-vdso", "libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread"} | {
        name for name in libraries if os.path.basename(name).startswith("ld-linux")
    }


def test_decode_on_the_cpu_equals_attention_over_the_bytes_on_every_instruction_set(programs):
    for environment, allowed in (({}, {"avx2", "baseline"}), ({"BITDECODING_CPU": "baseline"}, {"baseline"})):
        result = subprocess.run([programs / "decode_cpu"], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout
        instruction_set, error = result.stdout.split()
        assert instruction_set in allowed
        assert 0 < float(error) < 2e-5


def test_a_c_program_gets_a_status_for_every_mistake(programs, packs):
    result = subprocess.run([programs / "c_api", *packs], capture_output=True, text=True, env={})
    assert (result.returncode, result.stdout) == (0, "")


def test_nothing_that_sanitizers_find_happens_on_the_cpu(tmp_path, packs):
    """A CMake install of the library alone, without Python, and the programs of the tests above; all instrumented."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    options = [f"-DCMAKE_CXX_FLAGS={flags}", f"-DCMAKE_C_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=Debug"]
    unity = ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"]  # of sources that include the same headers
    cmake("-S", ROOT, "-B", tmp_path / "library", "-DBITDECODING_PYTHON=OFF", *unity, *options)
    cmake("--build", tmp_path / "library", "-j2")
    cmake("--install", tmp_path / "library", "--prefix", tmp_path / "prefix")
    directory = tmp_path / "prefix" / "lib" / "cmake" / "bitdecoding"
    commands = {"decode_cpu": ["64"], "c_api": packs, "consumer": []}
    programs = build_programs(tmp_path / "programs", directory, *options, targets=commands)
    for name, words in commands.items():
        result = subprocess.run([programs / name, *words], capture_output=True, text=True, env={})
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_decode_loop_without_a_gpu_says_so(programs):
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([programs / "decode_loop"], capture_output=True, text=True, env=environment)
    assert result.returncode == NO_GPU
    assert "libcuda.so.1: not found" in result.stdout or "CUDA_ERROR" in result.stdout


def test_the_example_without_a_gpu_says_so(programs):
    if not (programs / "engine").exists():
        pytest.skip("there is no CUDA runtime to build it with")
    result = subprocess.run([programs / "engine"], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 1
    assert "libcuda.so.1: not found" in result.stderr or "CUDA_ERROR" in result.stderr


def test_the_example_is_short():
    assert len((ROOT / "docs" / "engine.cpp").read_text().splitlines()) <= 150


@pytest.fixture(scope="module")
def gpu_packs(tmp_path_factory):
    """Packs with the kernels of the default format for this machine's GPU: the one that is installed, or compiled."""
    config = KernelConfig.for_problem(**PROBLEM)
    pack = native.PACKS_DIR / f"bitdecoding-{config.arch}.bdpack"
    if not pack.is_file():
        compiler = pytest.importorskip("bitdecoding.cute_kernels.compile")
        configs = [
            config,
            KernelConfig.for_problem(kind="step", **PROBLEM),
            KernelConfig(kind="append", arch=config.arch),
        ]
        pack = tmp_path_factory.mktemp("gpu") / "three.bdpack"
        write_pack(pack, [compiler.compile_kernel(each) for each in configs], {})
    return [pack]


@pytest.mark.gpu
def test_a_decode_loop_on_a_gpu_equals_the_cpu(programs, gpu_packs):
    result = subprocess.run([programs / "decode_loop", *gpu_packs], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.gpu
def test_the_example_runs(programs, gpu_packs):
    result = subprocess.run([programs / "engine", *gpu_packs], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ENGINE_STEPS in result.stdout
