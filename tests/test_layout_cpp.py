"""include/bitdecoding says the same as cute_kernels/layouts.py, offset by offset.

The headers are compiled with g++ alone. CuTe's host code includes a few CUDA headers; they come from pip packages of
the test extra.
"""

import io
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from bitdecoding.cute_kernels.layouts import BITS, GROUPS, HEAD_DIMS, block_format

from bitdecoding import QuantSpec

ROOT = Path(__file__).parents[1]
# package -> a header that it holds, and how many folders above it the include path begins
HEADERS = {
    "nvidia-cutlass": ("cute/layout.hpp", 2),
    "nvidia-cuda-runtime": ("include/cuda_runtime_api.h", 1),
    "nvidia-cuda-crt": ("crt/host_defines.h", 2),
    "nvidia-cuda-cccl": ("cccl/cuda/std/type_traits", 3),
}
SECTIONS = ("k_codes", "k_scale", "k_zero", "k_mean", "v_codes", "v_scale", "v_zero")


def include_dir(package: str) -> Path:
    header, depth = HEADERS[package]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (the test extra has it)")
    (found,) = [Path(str(file.locate())) for file in files if str(file).endswith(header)]
    return found.parents[depth - 1]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """(tables by (name, head_dim, parameter), block sections by spec fields), as the C++ headers give them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("layouts") / "print_layouts"
    includes = [f"-isystem{include_dir(package)}" for package in HEADERS]
    command = [compiler, "-std=c++17", "-O1", f"-I{ROOT / 'include'}", *includes]
    subprocess.run([*command, ROOT / "tests/cpp/print_layouts.cpp", "-o", program], check=True)
    stream = io.BytesIO(subprocess.run([program], check=True, capture_output=True).stdout)

    tables, sections = {}, {}
    while line := stream.readline():
        name, *numbers = line.split()
        values = tuple(map(int, numbers))
        if name == b"sections":
            sections[values[:9]] = values[9:]
        else:
            head_dim, parameter, rows, columns = values
            table = np.frombuffer(stream.read(4 * rows * columns), np.int32)
            tables[name.decode(), head_dim, parameter] = table.reshape(rows, columns)
    return tables, sections


def expected_tables(head_dim):
    def table(section, **fields):
        v_group = {96: 32, 64: 64}.get(head_dim, 128)
        quant = QuantSpec(**({"k_group": 32, "v_group": v_group} | fields))
        return getattr(block_format(head_dim, quant), section).table()

    for bits in BITS:
        yield ("k_codes", head_dim, bits), table("k_codes", k_bits=bits)
        yield ("v_codes", head_dim, bits), table("v_codes", v_bits=bits)
    for group in GROUPS:
        yield ("k_params_channel", head_dim, group), table("k_scale", k_group=group)
        if head_dim % group == 0:
            yield ("k_params_token", head_dim, group), table("k_scale", k_group=group, k_axis="token")
            yield ("v_params", head_dim, group), table("v_scale", v_group=group)
    yield ("k_mean", head_dim, 0), table("k_mean", k_mean="block")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cpp_layouts_equal_the_python_layouts(printed, head_dim):
    tables, _ = printed
    expected = dict(expected_tables(head_dim))
    expected |= {(f"plain_{name}", *numbers): table for (name, *numbers), table in expected.items()}
    assert {key for key in tables if key[1] == head_dim} == set(expected)
    for key, table in expected.items():
        np.testing.assert_array_equal(tables[key], table, err_msg=str(key))


def test_block_sections_equal_the_python_format(printed):
    _, sections = printed
    for spec, (*pairs, block_bytes) in sections.items():
        head_dim, k_bits, v_bits, per_token, k_group, v_group, k_symmetric, v_symmetric, k_mean = spec
        quant = QuantSpec(
            k_bits=k_bits,
            v_bits=v_bits,
            k_axis="token" if per_token else "channel",
            k_group=k_group,
            v_group=v_group,
            k_symmetric=bool(k_symmetric),
            v_symmetric=bool(v_symmetric),
            k_mean="block" if k_mean else "none",
        )
        fmt = block_format(head_dim, quant)
        found = {name: (pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(SECTIONS) if pairs[2 * i + 1]}
        assert found == {name: (section.offset, section.nbytes) for name, section in fmt.sections.items()}, spec
        assert block_bytes == fmt.block_bytes == quant.block_bytes(head_dim), spec
    assert len(sections) > 2000
