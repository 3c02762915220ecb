"""KernelConfig -> cubin and what its launch needs; kernel packs for the build.

``python -m cute_kernels.compile --arch sm90a --out bitdecoding-sm90a.bdpack`` compiles the manifest of an
architecture; ``--name`` compiles named kernels instead. Needs the CuTe DSL, but neither a GPU nor a CUDA toolkit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from .append_plan import AppendPlan
from .config import FEW_COLUMNS, MMA_COLUMNS, KernelConfig, QuantSpec
from .cubin import read_cubin
from .errors import UnsupportedConfig
from .layouts import HEAD_DIMS
from .merge_plan import MergePartsPlan
from .pack import DSL, CompiledKernel, describe_pack, source_digest, write_pack
from .plan import Plan
from .tile_plan import TilePlan, decode_plan
from .wide_plan import WidePlan

# "a": instructions of this architecture only; "f": runs on its family (sm_100 and 103, sm_120 and 121)
GPU_ARCHS = {
    "sm80": "sm_80",
    "sm86": "sm_86",
    "sm89": "sm_89",
    "sm90a": "sm_90a",
    "sm100": "sm_100f",
    "sm120": "sm_120f",
}
MANIFEST_HEAD_DIMS = (64, 128)
MANIFEST_GROUPS = (32, 64, 128)
STEP_HEAD_DIMS = (128,)  # a kernel takes twice as long as one of decode; elsewhere two kernels do a step
MANIFEST_COLUMNS = (FEW_COLUMNS, MMA_COLUMNS, 16, 32, 64, 128)  # query columns
MAX_WORKERS = 8


@dataclass(frozen=True)
class Compiled:
    """What the DSL makes of a config: PTX text, cubin, and the symbol of the kernel."""

    ptx: str
    cubin: bytes
    entry: str


def compile_config(config: KernelConfig) -> Compiled:
    """Compile one kernel in this process; raises UnsupportedConfig or InvalidArgument before the DSL starts.

    $BITDECODING_COMPILED, a folder, keeps what was compiled for whoever compiles the same kernel from the same sources:
    builds of several wheels, and tests of what a wheel holds.
    """
    config.validate()
    kept = os.environ.get("BITDECODING_COMPILED")
    if not kept:
        return _compile(config)
    digest = source_digest(f"{metadata.version(DSL)} {toolkit()}")
    cubin, ptx = (Path(kept, f"{config.name()}-{digest}.{kind}") for kind in ("cubin", "ptx"))
    if not ptx.is_file():
        made = _compile(config)
        Path(kept).mkdir(parents=True, exist_ok=True)
        for path, data in ((cubin, made.cubin), (ptx, made.ptx.encode())):  # ptx last: with it both are whole
            with tempfile.NamedTemporaryFile(dir=kept, delete=False) as file:
                file.write(data)
            os.replace(file.name, path)
    return _compiled(ptx.read_text(), cubin.read_bytes())


def _compile(config: KernelConfig) -> Compiled:
    arch = GPU_ARCHS[config.arch]
    os.environ["CUTE_DSL_ARCH"] = arch  # without it the DSL asks a driver
    os.environ["CUTE_DSL_DISABLE_FILE_CACHING"] = "1"  # packs are the cache
    from cutlass import Int32, Uint8, cute
    from cutlass.cute.runtime import make_ptr

    from . import append, append_work, decode, merge_parts, step, tiles, wide, work

    of_plan = {Plan: decode.DecodeKernel, WidePlan: wide.WideKernel, TilePlan: tiles.TileKernel}
    kernel, params = {
        "append": (append.AppendKernel, append_work.Params),
        "decode": (of_plan.get(type(plan_of(config))), work.Params),
        "step": (decode.DecodeKernel, step.Params),
        "merge": (merge_parts.MergePartsKernel, merge_parts.Params),
    }[config.kind]
    pointer = make_ptr(Uint8, 0, cute.AddressSpace.gmem, assumed_align=16)  # kernels take addresses only
    example = params(*[pointer if kind is cute.Pointer else kind(1) for kind in params.__annotations__.values()])
    options = f"--gpu-arch {arch} --keep-ptx --keep-cubin"
    with _scratch_directory(), _uncollected():
        made = cute.compile(kernel(config), example, Int32(1), options=options)
        ptx, cubin = made.__ptx__, made.__cubin__
    if not ptx or not cubin:
        raise UnsupportedConfig(f"{config.name()}: the CuTe DSL produced no code for {arch}")
    return _compiled(ptx, cubin)


def _compiled(ptx: str, cubin: bytes) -> Compiled:
    entry = re.search(r"\.visible \.entry (\w+)\(", ptx)
    return Compiled(ptx, cubin, entry.group(1))


def compile_kernel(config: KernelConfig) -> CompiledKernel:
    """Compile one kernel for a pack."""
    made = compile_config(config)
    resources = read_cubin(made.cubin)[made.entry]
    plan = plan_of(config)
    return CompiledKernel(
        name=config.name(),
        entry=made.entry,
        cubin=made.cubin,
        threads=plan.threads,
        smem=plan.smem_bytes,
        regs=resources.registers,
        ctas_per_sm=config.ctas_per_sm,
    )


def plan_of(config: KernelConfig) -> Plan | AppendPlan | MergePartsPlan:
    """What a launch of the kernel must know: ``threads`` and ``smem_bytes``."""
    return {"append": AppendPlan, "decode": decode_plan, "step": Plan, "merge": MergePartsPlan}[config.kind](config)


@contextlib.contextmanager
def _scratch_directory() -> Iterator[None]:
    """Where the DSL writes, and reads back, the code of a kernel.

    It names the files alike for every configuration and decides on import to put them into the current directory,
    so two processes there would read each other's kernels.
    """
    from cutlass.cutlass_dsl import CuTeDSL

    settings = CuTeDSL._get_dsl().envar
    before = settings.dump_dir
    with tempfile.TemporaryDirectory() as scratch:
        settings.dump_dir = scratch
        try:
            yield
        finally:
            settings.dump_dir = before


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which would search a module under construction again and again: 5% of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def preset_specs(head_dim: int) -> list[QuantSpec]:
    """The formats of the presets, as far as kernels see them: kv8, kv4, k4v2, kv2, kc4, kc2."""
    widest = max(g for g in MANIFEST_GROUPS if head_dim % g == 0)
    return [
        QuantSpec(k_bits=8, v_bits=8, v_group=64),
        QuantSpec(v_group=64, v_symmetric=True),
        QuantSpec(v_bits=2, v_group=64),
        QuantSpec(k_bits=2, v_bits=2, k_axis="token", k_group=64, v_group=64, k_symmetric=True, k_mean="block"),
        QuantSpec(v_group=widest),
        QuantSpec(k_bits=2, v_bits=2, v_group=widest),
    ]


def manifest_specs(head_dim: int) -> list[QuantSpec]:
    """The formats whose kernels a build compiles: the presets', and 4 bit with K per channel in all groups."""
    specs = preset_specs(head_dim)
    groups = [QuantSpec(k_group=k, v_group=v) for k in MANIFEST_GROUPS for v in MANIFEST_GROUPS if head_dim % v == 0]
    return specs + [spec for spec in groups if spec not in specs]


def manifest(arch: str) -> list[KernelConfig]:
    """The kernels that a build for ``arch`` compiles: of decode all formats for up to 8 query columns, the presets' for
    more; of append all formats; of step the presets', which take long; of merge all head_dims.
    """
    configs = []  # those that take longest first: none is left alone with one at the end
    for head_dim, columns in itertools.product(STEP_HEAD_DIMS, (FEW_COLUMNS, MMA_COLUMNS)):
        configs += [
            KernelConfig.for_problem(
                head_dim=head_dim, quant=spec, num_q_heads=columns, num_kv_heads=1, arch=arch, kind="step"
            )
            for spec in preset_specs(head_dim)
        ]
    for head_dim in MANIFEST_HEAD_DIMS:
        for columns in MANIFEST_COLUMNS:
            specs = manifest_specs(head_dim) if columns <= MMA_COLUMNS else preset_specs(head_dim)
            configs += [
                KernelConfig.for_problem(head_dim=head_dim, quant=spec, num_q_heads=columns, num_kv_heads=1, arch=arch)
                for spec in specs
            ]
        configs += [
            KernelConfig(kind="append", arch=arch, head_dim=head_dim, quant=spec) for spec in manifest_specs(head_dim)
        ]
    configs += [KernelConfig(kind="merge", arch=arch, head_dim=head_dim) for head_dim in HEAD_DIMS]
    return list(dict.fromkeys(configs))  # many columns may come down to a tile of fewer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile kernels into a kernel pack")
    parser.add_argument("--arch", required=True, choices=sorted(GPU_ARCHS))
    parser.add_argument("--out", required=True, type=Path, help="the pack to write")
    parser.add_argument("--name", action="append", help="a kernel's name, instead of the manifest (may be repeated)")
    parser.add_argument("--manifest", type=Path, help="JSON to write: what the pack holds and what it was made of")
    parser.add_argument("--dsl-version", help="fail if another version of the DSL is installed")
    parser.add_argument("--toolkit", help="fail if the DSL compiles with another CUDA toolkit: cu12 or cu13")
    args = parser.parse_args(arguments)
    version, used = metadata.version(DSL), toolkit()
    if args.dsl_version not in (None, version):
        parser.error(f"--dsl-version {args.dsl_version}: {DSL} {version} is installed")
    if args.toolkit not in (None, used):
        parser.error(f"--toolkit {args.toolkit}: {DSL} compiles with {used} here")
    configs = [KernelConfig.from_name(name) for name in args.name] if args.name else manifest(args.arch)
    kernels = compile_all(configs)
    spilling = [kernel.name for kernel in kernels if read_cubin(kernel.cubin)[kernel.entry].frame_bytes]
    if spilling and not args.name:
        parser.error(f"registers in local memory: {', '.join(spilling)}")
    write_pack(args.out, kernels, {"arch": args.arch, "dsl": version, "toolkit": used})
    if args.manifest:
        args.manifest.write_text(json.dumps(describe_pack(args.out), indent=1) + "\n")
    return 0


def toolkit() -> str:
    """The CUDA toolkit that the DSL compiles with here, such as cu12: drivers of that major version run its cubins."""
    os.environ["CUTE_DSL_DISABLE_FILE_CACHING"] = "1"
    import cutlass  # noqa: F401

    (name,) = re.findall(r"\.(cu\d+)\.", Path(sys.modules["cutlass._mlir._mlir_libs._cutlass_ir"].__file__).name)
    return name


Made = TypeVar("Made")


def compile_all(
    configs: list[KernelConfig], compile_one: Callable[[KernelConfig], Made] = compile_kernel
) -> list[Made]:
    """``compile_one`` of several configs, in parallel where that pays; progress goes to standard error."""
    workers = min(os.cpu_count() or 1, MAX_WORKERS, len(configs))
    if workers == 1:
        return [compile_one(config) for config in configs]
    all_made = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for config, made in zip(configs, pool.map(compile_one, configs), strict=True):
            all_made.append(made)
            print(f"[{len(all_made)}/{len(configs)}] {config.name()}", file=sys.stderr, flush=True)
    return all_made


if __name__ == "__main__":
    sys.exit(main())
