"""``bitdecoding info``: what is installed, which kernels it has, and what this machine's GPU needs."""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from typing import Any

from . import tuned
from .cuda import install_command
from .cute_kernels import native
from .cute_kernels.errors import CudaError
from .cute_kernels.layouts import FORMAT_VERSION
from .cute_kernels.pack import DSL, cache_dir, dsl_version, read_pack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    packs = []
    for path in sorted(native.PACKS_DIR.glob("*.bdpack")):
        header, kernels = read_pack(path)
        packs.append({"path": str(path), **header, "kernels": [kernel.name for kernel in kernels]})
    facts: dict[str, Any] = {
        "version": metadata.version("bitdecoding"),
        "format_version": FORMAT_VERSION,
        "library": str(native.LIBRARY_PATH),
        "packs": packs,
        "compiler": dsl_version(),
        "compiler_cache": str(cache_dir()),
        "tuned": tuned.facts(),
        "gpus": [],
        "no_gpu_because": None,
        "install": {},
    }
    try:
        for index in range(native.function("device_count")()):
            gpu = dict(native.function("device_info")(index))
            facts["gpus"].append(gpu)
            if gpu["arch"]:
                facts["install"][gpu["arch"]] = install_command(gpu["arch"])
    except CudaError as error:
        facts["no_gpu_because"] = str(error)
    return facts


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"bitdecoding {facts['version']}, block format {facts['format_version']}",
        f"library    {facts['library']}",
    ]
    if not facts["packs"]:
        lines.append("kernels    none built")
    for pack in facts["packs"]:
        made = f"{pack.get('toolkit', '?')}, {DSL} {pack.get('dsl', '?')}"
        lines.append(f"kernels    {len(pack['kernels'])} for {pack.get('arch', '?')} ({made}) in {pack['path']}")
        lines += [f"           {name}" for name in pack["kernels"]]
    if facts["compiler"]:
        lines.append(f"compiler   {DSL} {facts['compiler']}: missing kernels are compiled at first use")
    else:
        lines.append("compiler   none; `pip install '.[jit]'` compiles missing kernels at first use")
    lines.append(f"tuned      {facts['tuned']['problems']} problem(s) in {facts['tuned']['path'] or 'no table'}")
    if facts["no_gpu_because"]:
        lines.append(f"GPU        none: {facts['no_gpu_because']}")
        lines.append("           the CPU backend is used; for a GPU: BITDECODING_ARCH=<arch> pip install .")
    for gpu in facts["gpus"]:
        driver = f"driver for CUDA {gpu['driver_version'] // 1000}.{gpu['driver_version'] % 1000 // 10}"
        about = f"{gpu['name']}, {gpu['num_sms']} SMs, {gpu['memory_bytes'] / 2**30:.0f} GiB, {driver}"
        lines.append(f"GPU {gpu['index']}      {about}, {gpu['arch'] or 'not supported'}")
    lines += [f"install    {command}" for command in facts["install"].values()]
    return lines
