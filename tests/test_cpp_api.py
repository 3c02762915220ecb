"""The C++ API: a program built against the installed headers and library, with nothing else installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bitdecoding.cute_kernels import native

from bitdecoding import KernelConfig, QuantSpec

SOURCES = Path(__file__).parent / "cpp"
SOURCE = SOURCES / "consumer.cpp"
LIB_DIR = native.LIBRARY_PATH.parent


def build(source, folder):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = folder / source.stem
    include = LIB_DIR.parent / "include"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{include}", source]
    subprocess.run([*command, f"-L{LIB_DIR}", "-lbitdecoding", f"-Wl,-rpath,{LIB_DIR}", "-o", program], check=True)
    return program


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
