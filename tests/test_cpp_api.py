"""The C and C++ APIs: programs built against the installed headers and library, with nothing else installed."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import CompiledKernel, write_pack

from bitdecoding import KernelConfig, QuantSpec

SOURCES = Path(__file__).parent / "cpp"
SOURCE = SOURCES / "consumer.cpp"
LIB_DIR = native.LIBRARY_PATH.parent


RUNTIME = Path(__file__).parents[1] / "cute_kernels" / "runtime"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compiler_of(source):
    compiler = shutil.which("gcc" if source.suffix == ".c" else "g++")
    if compiler is None:
        pytest.skip("there is no compiler")
    return [compiler, "-std=c11" if source.suffix == ".c" else "-std=c++17", f"-I{LIB_DIR.parent / 'include'}"]


def build(source, folder):
    program = folder / source.stem
    libraries = [f"-L{LIB_DIR}", "-lbitdecoding", f"-Wl,-rpath,{LIB_DIR}", "-lm"]
    subprocess.run([*compiler_of(source), "-O1", *WARNINGS, source, *libraries, "-o", program], check=True)
    return program


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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(SOURCE, tmp_path_factory.mktemp("consumer"))


def test_a_program_that_knows_no_python(program):
    output = subprocess.run([program], check=True, capture_output=True, text=True, env={}).stdout
    config = KernelConfig(quant=QuantSpec(k_bits=2), stages=3)
    assert output.splitlines() == [
        config.name(),
        str(config.smem_bytes()),
        "1 k_bits=3: allowed are 8, 4, 2",
        "1 1 1",
        "1 batch=0: must be positive",
    ]


def test_the_core_needs_neither_python_nor_cuda(program):
    output = subprocess.run(["ldd", LIB_DIR / "libbitdecoding.so"], check=True, capture_output=True, text=True).stdout
    libraries = {line.split()[0].partition(".so")[0] for line in output.splitlines()}
    assert libraries <= {"linux-vdso", "libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread"} | {
        name for name in libraries if os.path.basename(name).startswith("ld-linux")
    }


def test_decode_on_the_cpu_equals_attention_over_the_bytes_on_every_instruction_set(tmp_path):
    program = build(SOURCES / "decode_cpu.cpp", tmp_path)
    for environment, allowed in (({}, {"avx2", "baseline"}), ({"BITDECODING_CPU": "baseline"}, {"baseline"})):
        result = subprocess.run([program], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout
        instruction_set, error = result.stdout.split()
        assert instruction_set in allowed
        assert 0 < float(error) < 2e-5


def test_a_c_program_gets_a_status_for_every_mistake(tmp_path, packs):
    result = subprocess.run([build(SOURCES / "c_api.c", tmp_path), *packs], capture_output=True, text=True, env={})
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


def test_find_package(program, tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\n"
        "project(consumer LANGUAGES CXX)\n"
        "find_package(bitdecoding CONFIG REQUIRED)\n"
        f"add_executable(consumer {SOURCE})\n"
        "target_link_libraries(consumer PRIVATE bitdecoding::bitdecoding)\n"
    )
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={LIB_DIR.parent}"
    subprocess.run([cmake, "-S", tmp_path, "-B", build, prefix], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", build], check=True, stdout=subprocess.DEVNULL)
    from_cmake = subprocess.run([build / "consumer"], check=True, capture_output=True).stdout
    assert from_cmake == subprocess.run([program], check=True, capture_output=True).stdout
