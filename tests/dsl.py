"""Compiles kernels with the CuTe DSL, those of the tests and the library's, for architectures that need not be here;
reads SASS.
"""

import os
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from bitdecoding.cute_kernels import compile as compiler
from cutlass import Int32, Uint8, cute
from cutlass.cute.runtime import make_ptr

import bitdecoding as bd

DISASSEMBLER = "nvidia-cuda-nvdisasm"
ARCHS = ("sm80", "sm86", "sm89", "sm90a", "sm120")
FULL_ARCH = "sm90a"  # the wheel has its kernels, so they need not be compiled for a test


def arch_in_turn(n: int) -> str:
    """The architecture of the nth of many kernels: FULL_ARCH every other time, between them the others in turn."""
    others = [arch for arch in ARCHS if arch != FULL_ARCH]
    return FULL_ARCH if n % 2 else others[n // 2 % len(others)]


class Compiled(NamedTuple):
    ptx: str
    cubin: bytes


def compile_kernel(kernel, threads: int, *, arch: str = "sm_90a", smem: int = 0, pdl: bool = False) -> Compiled:
    """Compile a ``@cute.kernel`` with parameters (data: cute.Pointer, n: Int32)."""

    @cute.jit
    def host(data: cute.Pointer, n: Int32):
        kernel(data, n).launch(grid=(1, 1, 1), block=(threads, 1, 1), smem=smem, use_pdl=pdl)

    os.environ["CUTE_DSL_ARCH"] = arch
    data = make_ptr(Uint8, 16, cute.AddressSpace.gmem, assumed_align=16)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:  # the DSL leaves the files that it keeps in the current directory
        os.chdir(scratch)
        try:
            made = cute.compile(host, data, Int32(1), options=f"--gpu-arch {arch} --keep-ptx --keep-cubin")
        finally:
            os.chdir(before)
    return Compiled(made.__ptx__, made.__cubin__)


def compile_configs(configs: list[bd.KernelConfig]) -> dict[bd.KernelConfig, compiler.Compiled]:
    """Several kernels of the library; in this process alone where pytest-xdist has one for every core."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return {config: compiler.compile_config(config) for config in configs}
    return dict(zip(configs, compiler.compile_all(configs, compiler.compile_config), strict=True))


def sass(cubin: bytes) -> list[str]:
    """Opcodes of a cubin's machine code in order, such as "HMMA.16816.F32"; skips the test without a disassembler."""
    return opcodes(listing(cubin))


def listing(cubin: bytes) -> str:
    """A cubin's machine code as nvdisasm prints it; skips the test without it."""
    try:
        files = metadata.files(DISASSEMBLER) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{DISASSEMBLER} is not installed")
    program = next(Path(f.locate()) for f in files if f.name == "nvdisasm")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([program, "-c", path], check=True, capture_output=True, text=True)
    return done.stdout


def opcodes(listing: str) -> list[str]:
    """The opcodes of an nvdisasm listing: lines such as ``/*0010*/  @!P0 LDS.128 R4, [R2] ;``."""
    found = []
    for line in listing.splitlines():
        _, _, rest = line.partition("*/")
        words = rest.split()
        if words and words[0].startswith(("@", "{")):
            words = words[1:]
        if words and words[0][0].isupper() and line.lstrip().startswith("/*"):
            found.append(words[0].rstrip(";"))
    return found
