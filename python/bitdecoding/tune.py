"""`bitdecoding tune`: times every kernel that could decode a problem on this GPU, and keeps the fastest.

A kernel that is in no pack is compiled where the compiler is installed (`jit` extra), into a pack beside the table of
:mod:`bitdecoding.tuned`. The fastest has the least geometric mean over the shapes of a problem.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import cuda, tuned
from .arguments import check_output, check_presets, integers
from .bench import DTYPES, MAIN_CUDA, MAX_ERROR
from .candidates import LowBitCache, Shape, parse_shapes
from .cute_kernels import native
from .cute_kernels.config import (
    FEW_COLUMNS,
    MAX_Q_TILE,
    MMA_COLUMNS,
    TILING_OF_TWO_BITS,
    TILINGS,
    KernelConfig,
    device_arch,
)
from .cute_kernels.errors import BitDecodingError, InvalidArgument, KernelNotFound, UnsupportedConfig
from .cute_kernels.layouts import HEAD_DIMS
from .cute_kernels.pack import dsl_version, read_pack, write_pack
from .quantization import PRESETS, preset
from .timing import call_times

CTAS_PER_SM = (1, 2)

_find_kernel = native.function("find_kernel")
_load_pack = native.function("load_pack")


class Problem(NamedTuple):
    """A preset's format with a number of query columns, the kernels that could do it, and the shapes to time."""

    key: str
    preset: str
    default: KernelConfig
    configs: list[KernelConfig]
    shapes: list[Shape]


Measured = dict[str, dict[str, float]]  # kernel -> shape -> microseconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="NAME", help="default: all of them")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--shapes", default=MAIN_CUDA, help="as of bench; default: its main suite")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--device", type=integers(0), default=0, metavar="INDEX", help="of the GPU (default: 0)")
    parser.add_argument(
        "--rounds", type=integers(1), default=15, help="measurements of which the median counts (default: 15)"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help=f"where to keep the result (default: ${tuned.VARIABLE}, or the cache)",
    )
    parser.add_argument("--arch", help="with --dry-run or --compile-only: instead of the GPU's")
    parser.add_argument("--dry-run", action="store_true", help="list the kernels that would be timed")
    parser.add_argument("--compile-only", action="store_true", help="compile what is missing, for a later run")


def run(args: argparse.Namespace) -> int:
    table = args.table or tuned.table_path()
    if table is None:
        raise InvalidArgument(f"{tuned.VARIABLE}: is empty; name a file there or with --table")
    if args.arch is not None and not (args.dry_run or args.compile_only):
        raise InvalidArgument(f"--arch {args.arch}: the GPU decides, unless with --dry-run or --compile-only")
    check_presets("--presets", args.presets, args.head_dim)
    if not args.dry_run:
        check_output("--table" if args.table else tuned.VARIABLE, table)
    problems = find_problems(
        args.presets,
        args.head_dim,
        parse_shapes(args.shapes),
        device_arch(args.device) if args.arch is None else args.arch,
    )
    pack = tuned.pack_of(table)
    load_kernels(problems, pack)
    if args.dry_run:
        print("\n".join(_listing(problems)))
        return 0
    compile_missing(problems, pack)
    if args.compile_only:
        return 0

    device, name = _gpu(args.device)
    with tqdm(total=sum(len(problem.shapes) for problem in problems), unit=" shapes", file=sys.stderr) as bar:
        for problem in problems:
            measured = measure(problem, args.head_dim, DTYPES[args.dtype], device, args.rounds, bar)
            tuned.store(table, name, {problem.key: best(problem, measured)})
            bar.write(format_result(problem, measured), file=sys.stdout)
    print(f"wrote {table}")
    return 0


def _gpu(index: int) -> tuple[torch.device, str]:
    """The device, made current, and its name."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device, native.function("device_info")(index)["name"]


# ---------------------------------------------------------------------------------------------- candidates


def find_problems(presets: list[str], head_dim: int, shapes: list[Shape], arch: str) -> list[Problem]:
    """The problems of these presets and shapes, each once."""
    problems: dict[str, Problem] = {}
    for name in presets:
        spec = preset(name, head_dim)[0]
        for shape in shapes:
            heads = shape.num_q_heads, shape.num_kv_heads
            columns = tuned.query_columns(*heads)
            key = tuned.problem(head_dim, spec, columns)
            if key not in problems:
                default = KernelConfig.for_problem(
                    head_dim=head_dim, quant=spec, num_q_heads=heads[0], num_kv_heads=heads[1], arch=arch
                )
                problems[key] = Problem(key, name, default, list(kernels_for(default, columns)), [])
            if problems[key].preset == name and shape not in problems[key].shapes:
                problems[key].shapes.append(shape)
    return list(problems.values())


def kernels_for(default: KernelConfig, columns: int) -> Iterator[KernelConfig]:
    """Every kernel that can exist for the problem of ``default``, which comes first."""
    yield default
    few = (FEW_COLUMNS,) if columns <= FEW_COLUMNS else ()
    for q_tile in (*few, *range(MMA_COLUMNS, min(max(columns, MMA_COLUMNS), MAX_Q_TILE) + 1, MMA_COLUMNS)):
        for ctas_per_sm in CTAS_PER_SM:
            for num_warps, warps_per_block, stages in (TILING_OF_TWO_BITS[default.copy], *TILINGS):
                config = KernelConfig(
                    arch=default.arch,
                    head_dim=default.head_dim,
                    quant=default.quant,
                    q_tile=q_tile,
                    copy=default.copy,
                    num_warps=num_warps,
                    warps_per_block=warps_per_block,
                    stages=stages,
                    ctas_per_sm=ctas_per_sm,
                )
                try:
                    config.validate()
                except UnsupportedConfig:  # more shared memory than there is
                    continue
                if config != default:
                    yield config


def load_kernels(problems: list[Problem], pack: Path) -> None:
    """Register the kernels of the built packs and those that an earlier run compiled."""
    for problem in problems:
        cuda.load_built_pack(problem.default.arch)
    if pack.is_file():
        _load_pack(str(pack))


def compile_missing(problems: list[Problem], pack: Path) -> None:
    """Compile the kernels that no pack has and add them to ``pack``; without a compiler they stay missing."""
    missing = [config for problem in problems for config in problem.configs if _find_kernel(config.name()) < 0]
    version = dsl_version()
    if missing and version is None:
        print(f"{len(missing)} kernels are missing and left out; pip install '.[jit]' compiles them", file=sys.stderr)
    if not missing or version is None:
        return
    from .cute_kernels.compile import compile_all

    held = read_pack(pack)[1] if pack.is_file() else []
    write_pack(pack, [*held, *compile_all(missing)], {"dsl": version})
    _load_pack(str(pack))


def _listing(problems: list[Problem]) -> Iterator[str]:
    for problem in problems:
        yield f"{problem.key} ({problem.preset}), shapes {'; '.join(map(str, problem.shapes))}"
        for config in problem.configs:
            state = "ready" if _find_kernel(config.name()) >= 0 else "to be compiled" if dsl_version() else "missing"
            yield f"  {config.name()}  {state}{', the default' if config == problem.default else ''}"


# ---------------------------------------------------------------------------------------------- measuring


def measure(
    problem: Problem, head_dim: int, dtype: torch.dtype, device: torch.device, rounds: int, bar: tqdm
) -> Measured:
    """Time the kernels of a problem that are there and right on every shape, taking turns.

    Raises KernelNotFound if the default kernel is not among them.
    """
    configs = [config for config in problem.configs if device.type != "cuda" or _find_kernel(config.name()) >= 0]
    measured: Measured = {}
    for shape in problem.shapes:
        bar.set_description(f"{problem.key} on {shape}")
        configs, times = _measure_shape(problem, shape, configs, head_dim, dtype, device, rounds, bar)
        for config, us in zip(configs, times, strict=True):
            measured.setdefault(config.name(), {})[str(shape)] = us
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the cache of the next shape has another size
        bar.update()
    return {config.name(): measured[config.name()] for config in configs}


def _measure_shape(
    problem: Problem, shape: Shape, configs: list[KernelConfig], head_dim: int, dtype: torch.dtype,
    device: torch.device, rounds: int, bar: tqdm,
) -> tuple[list[KernelConfig], list[float]]:  # fmt: skip
    """-> the kernels that are right, and microseconds of each."""
    cache = LowBitCache(problem.preset, shape, head_dim, dtype, device)
    configs = [config for config in configs if _is_right(cache, config, bar)]
    if problem.default not in configs:
        raise KernelNotFound(f"{problem.default.name()}: the default kernel is missing, or left out as said above")
    return configs, call_times([cache.candidate(config) for config in configs], rounds, device)


def _is_right(cache: LowBitCache, config: KernelConfig, bar: tqdm) -> bool:
    try:
        error = cache.error(config)
    except BitDecodingError as reason:
        bar.write(f"{config.name()} left out: {reason}", file=sys.stderr)
        return False
    if not error < MAX_ERROR:
        bar.write(f"{config.name()} left out: relative error {error:.1e} on {cache.shape}", file=sys.stderr)
    return error < MAX_ERROR


def mean_us(times: dict[str, float]) -> float:
    """Geometric, over the shapes."""
    return statistics.geometric_mean(times.values())


def best(problem: Problem, measured: Measured) -> tuned.Entry:
    """The fastest kernel; the default where it is as fast."""
    default = problem.default.name()
    kernel = min(measured, key=lambda name: (mean_us(measured[name]), name != default))
    return tuned.Entry(kernel, measured[kernel], default, measured[default])


def format_result(problem: Problem, measured: Measured) -> str:
    """The kernels of a problem, the fastest first, with their times against the default's."""
    default = mean_us(measured[problem.default.name()])
    lines = [
        f"{problem.key} ({problem.preset}): time against the default's, us on {'; '.join(map(str, problem.shapes))}"
    ]
    for name, times in sorted(measured.items(), key=lambda item: mean_us(item[1])):
        each = "  ".join(f"{us:8.1f}" for us in times.values())
        lines.append(f"  {mean_us(times) / default:.3f}  {each}  {name}")
    return "\n".join(lines)
