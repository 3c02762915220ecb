"""The C and C++ APIs: programs built against the installed headers and library, with nothing else installed."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import CompiledKernel, write_pack

from bitdecoding import KernelConfig, QuantSpec

SOURCES = Path(__file__).parent / "cpp"
LIB_DIR = native.LIBRARY_PATH.parent
RUNTIME = Path(__file__).parents[1] / "cute_kernels" / "runtime"
NO_GPU = 77  # exit status of decode_loop
PROGRAMS = ("consumer", "decode_cpu", "decode_loop", "c_api")


def compiler_of(source):
    compiler = shutil.which("gcc" if source.suffix == ".c" else "g++")
    if compiler is None:
        pytest.skip("there is no compiler")
    return [compiler, "-std=c11" if source.suffix == ".c" else "-std=c++17", f"-I{LIB_DIR.parent / 'include'}"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder with the programs of tests/cpp, built by find_package; without CMake by the compiler alone."""
    folder = tmp_path_factory.mktemp("programs")
    if cmake := shutil.which("cmake"):
        command = [Path(sys.executable).parent / "bitdecoding", "cmake-dir"]
        directory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        configure = [cmake, "-S", SOURCES, "-B", folder, f"-Dbitdecoding_DIR={directory}"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([cmake, "--build", folder, "-j2"], check=True, stdout=subprocess.DEVNULL)
        return folder
    for source in (each for each in SOURCES.iterdir() if each.stem in PROGRAMS):
        libraries = [f"-L{LIB_DIR}", "-lbitdecoding", f"-Wl,-rpath,{LIB_DIR}", "-lm", "-ldl"]
        subprocess.run([*compiler_of(source), "-O1", source, *libraries, "-o", folder / source.stem], check=True)
    return folder


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A pack with one kernel, which no driver would load, and a file that is none."""
    folder = tmp_path_factory.mktemp("packs")
    config = KernelConfig(arch="sm80", copy="cp_async")
    kernel = CompiledKernel(
        name=config.name(), entry="entry", cubin=b"\x7fELF", threads=160, smem=4096, regs=128, ctas_per_sm=1
    )
    write_pack(folder / "sm80.bdpack", [kernel], {"arch": "sm80"})
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
    """The library's sources, instrumented, under the programs of the tests above."""
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    x86 = platform.machine() == "x86_64"
    loops = {"Baseline": []} | ({"Avx2": ["-mavx2", "-mfma", "-mf16c"]} if x86 else {})  # as in CMakeLists.txt
    units = [(path, []) for path in RUNTIME.glob("*.cpp") if path.stem not in ("binding", "check", "cpu_attend")]
    units += [(RUNTIME / "cpu_attend.cpp", [f"-DBITDECODING_CPU_LOOPS=kLoops{x}", *f]) for x, f in loops.items()]
    programs = {"decode_cpu.cpp": ["64"], "c_api.c": packs}
    common = [*sanitize, "-Wno-psabi", *(["-DBITDECODING_CPU_AVX2"] if x86 else [])]

    def compile_one(source, flags, output):
        subprocess.run([*compiler_of(source), *common, *flags, "-c", source, "-o", output], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        library = [pool.submit(compile_one, *unit, tmp_path / f"{i}.o") for i, unit in enumerate(units)]
        objects = {name: pool.submit(compile_one, SOURCES / name, [], tmp_path / f"{name}.o") for name in programs}
    for name, arguments in programs.items():
        linked = [each.result() for each in (*library, objects[name])]
        subprocess.run(["g++", *sanitize, *linked, "-ldl", "-lpthread", "-o", tmp_path / "program"], check=True)
        result = subprocess.run([tmp_path / "program", *arguments], capture_output=True, text=True, env={})
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_decode_loop_without_a_gpu_says_so(programs):
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([programs / "decode_loop"], capture_output=True, text=True, env=environment)
    assert result.returncode == NO_GPU
    assert "libcuda.so.1: not found" in result.stdout or "CUDA_ERROR" in result.stdout


@pytest.mark.gpu
def test_a_decode_loop_on_a_gpu_equals_the_cpu(programs, tmp_path):
    config = KernelConfig.for_problem(head_dim=128, quant=QuantSpec(), num_q_heads=32, num_kv_heads=8)
    pack = native.PACKS_DIR / f"bitdecoding-{config.arch}.bdpack"
    if not pack.is_file():
        pack = tmp_path / "one.bdpack"
        write_pack(pack, [pytest.importorskip("bitdecoding.cute_kernels.compile").compile_kernel(config)], {})
    result = subprocess.run([programs / "decode_loop", pack], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
