"""The index of a release, and what the build backend makes of the environment; without building anything."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.compile import GPU_ARCHS

import bitdecoding as bd

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "_build"
sys.path.append(str(BUILD))
release, wheel_version = (importlib.import_module(name) for name in ("release", "wheel_version"))


def make_wheel(folder: Path, version: str) -> Path:
    """A wheel as pip installs it, with nothing but a manifest of kernels."""
    folder.mkdir(parents=True)
    wheel = folder / f"bitdecoding-{version}-py3-none-any.whl"
    info = f"bitdecoding-{version}.dist-info"
    pack = {"arch": "sm90a", "dsl": "4.8.1", "toolkit": "cu12", "source_digest": "0", "kernels": [{}, {}]}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Name: bitdecoding\nVersion: {version}\nRequires-Python: >=3.10\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        if "+" in version:
            archive.writestr("bitdecoding/lib/packs/bitdecoding-sm90a.bdpack.json", json.dumps(pack))
    return wheel


def test_pip_finds_the_wheels_of_an_index(tmp_path):
    out = tmp_path / "whl"
    wheels = {
        "cpu": make_wheel(out / "cpu" / "bitdecoding", "0.1.0"),
        "cu12/sm90a": make_wheel(out / "cu12" / "sm90a" / "bitdecoding", "0.1.0+cu12.sm90a"),
    }
    release.write_index(out)
    for index, wheel in wheels.items():
        target = tmp_path / index.replace("/", "-")
        address = (out / index).as_uri() + "/"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--index-url", address, "-d", target]
        subprocess.run([*command, "bitdecoding"], check=True, env={"PIP_CONFIG_FILE": "/dev/null"})
        assert [path.name for path in target.iterdir()] == [wheel.name]
    facts = json.loads((out / "index.json").read_text())
    assert [fact["path"] for fact in facts] == [wheel.relative_to(out).as_posix() for wheel in wheels.values()]
    assert [fact["bytes"] for fact in facts] == [wheel.stat().st_size for wheel in wheels.values()]
    assert [pack["kernels"] for pack in facts[1]["packs"]] == [2]


def test_a_wheel_that_was_changed_is_not_installed(tmp_path):
    wheel = make_wheel(tmp_path / "cpu" / "bitdecoding", "0.1.0")
    release.write_index(tmp_path)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path / "to", "bitdecoding"]
    command += ["--index-url", (tmp_path / "cpu").as_uri() + "/"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PIP_CONFIG_FILE": "/dev/null"})
    assert done.returncode != 0
    assert "HASH" in done.stderr.upper()


@pytest.mark.parametrize(
    ("environment", "version"),
    [
        ({"BITDECODING_ARCH": "cpu"}, "0.1.0"),
        ({"BITDECODING_ARCH": "sm90a"}, "0.1.0+cu12.sm90a"),
        ({"BITDECODING_ARCH": "sm90a;sm80", "BITDECODING_CUDA": "cu13"}, "0.1.0+cu13.sm80.sm90a"),
        (
            {"BITDECODING_ARCH": "sm70"},
            "BITDECODING_ARCH: 'sm70': allowed are sm80, sm86, sm89, sm90a, sm100, sm120 and cpu",
        ),
        ({"BITDECODING_ARCH": "sm80", "BITDECODING_CUDA": "11"}, "BITDECODING_CUDA: '11': allowed are cu12, cu13"),
    ],
)
def test_the_environment_decides_the_version(environment, version):
    pytest.importorskip("scikit_build_core")
    program = "import backend, wheel_version; print(wheel_version.Version().dynamic_metadata({}, {})['version'])"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BUILD, env={"PYTHONPATH": "."} | environment)
    assert (done.stdout or done.stderr).strip() == version


def test_every_part_knows_the_same_architectures():
    archs = tuple(GPU_ARCHS)
    assert wheel_version.ARCHS == archs
    with pytest.raises(bd.InvalidArgument, match=f"arch=sm70: allowed are {', '.join(archs)}$"):
        bd.KernelConfig(arch="sm70").validate()
    (row,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| GPU |"))
    assert tuple(dict.fromkeys(re.findall(r"sm\d+a?", row))) == archs


def test_the_build_knows_devices_as_the_library_does():
    pytest.importorskip("scikit_build_core")
    capabilities = [(major, minor) for major in range(7, 14) for minor in range(10)]
    program = "import backend, sys; print(*map(backend.arch_of, sys.argv[1:]), sep=',')"
    command = [sys.executable, "-c", program, *(f"{major}.{minor}" for major, minor in capabilities)]
    environment = {"PYTHONPATH": ".", "BITDECODING_ARCH": "cpu"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=BUILD, env=environment)
    assert done.stdout.strip().split(",") == [native.function("arch_of")(*each) for each in capabilities]


@pytest.mark.parametrize(("arch", "compilers"), [("cpu", []), ("sm80", ["nvidia-cutlass-dsl==4.8.1"])])
def test_kernels_need_their_compiler_to_be_built(arch, compilers):
    """What pip asks for before it builds."""
    pytest.importorskip("scikit_build_core")
    program = "import sys; sys.path.append('_build'); import backend; print(*backend.get_requires_for_build_wheel())"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"BITDECODING_ARCH": arch}
    )
    assert [each for each in done.stdout.split() if "cutlass-dsl" in each] == compilers
