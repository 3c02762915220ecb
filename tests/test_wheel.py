"""What an installation holds: nothing of NVIDIA's, nothing that tells of the machine that built it, a true manifest."""

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import describe_pack, write_pack

import bitdecoding as bd
from bitdecoding import cuda

ROOT = Path(__file__).parents[1]
NVIDIA = re.compile(r"lib(cu|nv)[a-z]*|cutlass|nvidia|ptxas|nvdisasm", re.IGNORECASE)


def installed_files():
    """Files of the package by their path below site-packages; an editable install has the compiled ones alone."""
    for file in metadata.files("bitdecoding"):
        if file.parts[0] == "bitdecoding" and "__pycache__" not in file.parts:
            yield file.as_posix(), Path(file.locate())


FILES = dict(installed_files())


def test_the_files_are_seen():
    assert {"bitdecoding/lib/libbitdecoding.so", "bitdecoding/lib/libbitdecoding_ffi.so"} <= set(FILES)


def test_no_file_is_nvidias():
    assert [name for name in FILES if NVIDIA.search(Path(name).name)] == []


@pytest.mark.parametrize("name", ["libbitdecoding.so", "libbitdecoding_ffi.so"])
def test_no_library_asks_for_nvidias(name):
    output = subprocess.run(
        ["ldd", FILES[f"bitdecoding/lib/{name}"]], check=True, capture_output=True, text=True
    ).stdout
    assert [line for line in output.splitlines() if NVIDIA.search(line.split()[0])] == []


def test_no_file_names_the_machine_that_built_it():
    places = [str(ROOT), sys.prefix, sys.base_prefix, str(Path.home()), tempfile.gettempdir() + "/", "pip-build-env"]
    wanted = re.compile("|".join(re.escape(place) for place in places if len(place) > 1).encode())
    found = {name: wanted.search(path.read_bytes()) for name, path in FILES.items()}
    # sources may well speak of temporary files
    assert {n: m.group() for n, m in found.items() if m and not n.endswith((".py", ".hpp", ".h"))} == {}


PACKS = [path for name, path in FILES.items() if name.endswith(".bdpack")]


def test_the_version_names_toolkit_and_architectures():
    manifests = [json.loads(Path(f"{path}.json").read_text()) for path in PACKS]
    base, _, local = metadata.version("bitdecoding").partition("+")
    assert re.fullmatch(r"\d+\.\d+\.\d+", base)
    toolkits = sorted({each["toolkit"] for each in manifests})
    assert sorted(local.split(".")) == sorted(toolkits + [each["arch"] for each in manifests] or [""])


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.stem)
def test_the_manifest_tells_what_a_pack_holds(path):
    described = describe_pack(path)
    assert json.loads(Path(f"{path}.json").read_text()) == described
    assert len(described["kernels"]) > 0
    assert all(each["name"].split("_")[1] == described["arch"] for each in described["kernels"])


def test_the_wheel_is_for_every_python_and_an_honest_libc():
    """The tag of what is installed, unless that is editable: the libraries need no newer glibc than it says."""
    tag = re.search(r"^Tag: (.+)$", metadata.distribution("bitdecoding").read_text("WHEEL"), re.MULTILINE).group(1)
    assert tag.startswith("py3-none-")
    if not (found := re.search(r"manylinux_2_(\d+)_", tag)):
        pytest.skip(f"built without auditwheel: {tag}")
    for name in ("libbitdecoding.so", "libbitdecoding_ffi.so"):
        symbols = subprocess.run(["objdump", "-T", FILES[f"bitdecoding/lib/{name}"]], capture_output=True, text=True)
        assert max(map(int, re.findall(r"\(?GLIBC_2\.(\d+)", symbols.stdout))) <= int(found.group(1))


def test_a_wheel_for_another_gpu_says_so_at_the_first_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "dsl_version", lambda: None)
    monkeypatch.setattr(native, "PACKS_DIR", tmp_path)
    monkeypatch.setattr(cuda, "load_built_pack", lambda arch: None)
    config = bd.KernelConfig.for_problem(
        head_dim=256, quant=bd.QuantSpec(k_group=32), num_q_heads=8, num_kv_heads=1, arch="sm89"
    )
    with pytest.raises(bd.KernelNotFound, match="GPU needs kernels for sm89, this installation has none, and nvidia"):
        cuda.kernel_handle(config)
    write_pack(tmp_path / "bitdecoding-sm90a.bdpack", [], {"arch": "sm90a"})
    with pytest.raises(bd.KernelNotFound, match="has those for sm90a, .*BITDECODING_ARCH=sm89 pip"):
        cuda.kernel_handle(config)
    write_pack(tmp_path / "bitdecoding-sm89.bdpack", [], {"arch": "sm89"})
    with pytest.raises(bd.KernelNotFound, match="the kernels for sm89 of this installation lack one"):
        cuda.kernel_handle(config)
