"""What an installation holds: nothing of NVIDIA's, nothing that tells of the machine that built it."""

import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

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
