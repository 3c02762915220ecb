"""The build backend: scikit-build-core, after BITDECODING_ARCH has been settled.

The architectures decide three things at once: the kernels that CMake compiles, whether the kernel compiler is a build
requirement, and the local part of the version. All three read the environment variable, so it is settled here first.
"""

import os
import re
import subprocess

ARCHS = ("sm80", "sm89", "sm90a", "sm100", "sm120")


def local_archs() -> list[str]:
    """The architectures of this machine's GPUs, as nvidia-smi sees them; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    by_capability = {"8.9": "sm89", "8": "sm80", "9": "sm90a", "10": "sm100", "12": "sm120"}
    capabilities = [line.strip() for line in output.splitlines()]
    archs = [by_capability.get(c) or by_capability.get(c.split(".")[0]) for c in capabilities]
    return [arch for arch in ARCHS if arch in archs]


def settled_archs(requested: str | None) -> list[str]:
    """What BITDECODING_ARCH asks for: a list such as "sm80,sm90a", "cpu" for none, unset for the local GPUs."""
    if requested is None:
        return local_archs()
    archs = [arch for arch in re.split(r"[;,\s]+", requested) if arch and arch != "cpu"]
    for arch in archs:
        if arch not in ARCHS:
            raise SystemExit(f"BITDECODING_ARCH: {arch!r}: allowed are {', '.join(ARCHS)} and cpu")
    return [arch for arch in ARCHS if arch in archs]


os.environ["BITDECODING_ARCH"] = ",".join(settled_archs(os.environ.get("BITDECODING_ARCH"))) or "cpu"

from scikit_build_core.build import *  # noqa: E402, F403
