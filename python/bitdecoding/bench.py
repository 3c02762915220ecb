"""`bitdecoding bench`: decode attention over a low-bit cache against torch SDPA on a 16-bit one, in one process.

On a GPU a time is the median of CUDA-graph replays, taken in turn over all candidates; a graph holds one call per copy
of the cache, and the copies together exceed the L2 cache. On a CPU it is the median of plain calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from .cute_kernels.config import QuantSpec
from .cute_kernels.errors import BitDecodingError, InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS, block_format, symmetric_zero
from .ops import block_bytes, decode, dequantize
from .quantization import preset

SHAPES_CUDA = "1,32,8,1024;1,32,8,8192;1,32,8,131072;8,32,8,32768;1,32,32,131072;64,32,8,8192;ragged"
SHAPES_CPU = "1,32,8,4096;1,32,8,16384"
RAGGED = tuple(1024 * n for n in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128))
COLD_BYTES = 300 << 20  # of cache copies in rotation: six times the L2 cache of an H100
MIN_CALLS = 8  # per graph
MAX_COPIES = 64
READ_BYTES = 2 << 30  # of the buffer whose sum stands for the read bandwidth
CHECKED_TOKENS = 4096  # of a sequence that is compared with fp32 attention
MAX_ERROR = 1e-2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Shape(NamedTuple):
    """A problem: the tokens of each sequence, and the heads."""

    lengths: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int

    def __str__(self) -> str:
        tokens = str(self.lengths[0]) if len(set(self.lengths)) == 1 else f"{min(self.lengths)}-{max(self.lengths)}"
        return f"{len(self.lengths)}, {self.num_q_heads}/{self.num_kv_heads}, {tokens}"


@dataclass
class Candidate:
    """One way to do a shape: ``call(i)`` works on the i-th copy of the cache."""

    name: str
    call: Callable[[int], object]
    copies: int
    cache_bytes: int


@dataclass
class Row:
    """A measured candidate. us: time per call; host_us: of the caller, without waiting for the device (GPU only)."""

    shape: str
    candidate: str
    us: float
    host_us: float | None
    gb_per_s: float
    percent_of_read: float | None
    speedup: float | None  # over the fastest SDPA
    error: float | None  # relative, of our result against fp32 attention


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", help="batch,num_q_heads,num_kv_heads,tokens;... ('ragged': 16 sequences, 1K to 128K)"
    )
    parser.add_argument("--presets", nargs="+", default=["kc4", "kc2"], metavar="NAME", help="default: kc4 kc2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of q, out and the 16-bit cache")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of which the median counts (default: 15)")
    parser.add_argument("--no-rivals", action="store_true", help="without SDPA")
    parser.add_argument("--ceiling", type=float, metavar="GB/S", help="read bandwidth (default: measured by torch.sum)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")


def run(args: argparse.Namespace) -> int:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    shapes = parse_shapes(args.shapes or (SHAPES_CUDA if cuda else SHAPES_CPU))
    specs = {name: preset(name, args.head_dim)[0] for name in args.presets}
    if args.rounds < 1:
        raise InvalidArgument(f"rounds={args.rounds}: allowed are integers from 1")
    ceiling = args.ceiling or (read_bandwidth(device) if cuda else None)
    rows: list[Row] = []
    for shape in tqdm(shapes, desc="shapes", file=sys.stderr):
        rows += measure(
            shape, specs, args.head_dim, DTYPES[args.dtype], device, args.rounds, ceiling, not args.no_rivals
        )
    print(format_table(rows, ceiling))
    if args.out is not None:
        report = {
            "command": " ".join(sys.argv),
            "date": datetime.now().isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if cuda else "cpu",
            "torch": torch.__version__,
            "ceiling_gb_per_s": ceiling,
            "rows": [asdict(row) for row in rows],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_shapes(text: str) -> list[Shape]:
    """ "batch,num_q_heads,num_kv_heads,tokens;..." or "ragged" -> Shapes; raises InvalidArgument."""
    shapes = []
    for part in filter(None, text.split(";")):
        if part == "ragged":
            shapes.append(Shape(RAGGED, 32, 8))
            continue
        try:
            batch, num_q_heads, num_kv_heads, tokens = map(int, part.split(","))
        except ValueError:
            batch = 0
        if batch < 1 or min(num_q_heads, num_kv_heads, tokens) < 1 or num_q_heads % num_kv_heads:
            raise InvalidArgument(
                f"shapes: {part!r}: allowed are 'ragged' and batch,num_q_heads,num_kv_heads,tokens, all positive, "
                "num_q_heads a multiple of num_kv_heads"
            )
        shapes.append(Shape((tokens,) * batch, num_q_heads, num_kv_heads))
    return shapes


# ---------------------------------------------------------------------------------------------- candidates


def random_pages(
    spec: QuantSpec, head_dim: int, num_pages: int, num_kv_heads: int, generator: torch.Generator
) -> Tensor:
    """Pages of random codes with parameters that make values of about unit size."""
    fmt = block_format(head_dim, spec)
    device = generator.device
    shape = (num_pages, num_kv_heads, fmt.block_bytes)
    pages = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    for operand, bits in (("k", spec.k_bits), ("v", spec.v_bits)):
        centre, step = symmetric_zero(bits), 3.5 / ((1 << bits) - 1)
        for part, low, high in (
            ("scale", step / 2, 1.5 * step),
            ("zero", 1.2 * centre, 0.8 * centre),
            ("mean", -0.5, 0.5),
        ):
            section = fmt.sections.get(f"{operand}_{part}")
            if section is None:
                continue
            values = torch.rand((*shape[:2], section.nbytes // 2), device=device, generator=generator)
            target = pages[..., section.offset : section.offset + section.nbytes]
            target.copy_((low + (high - low) * values).half().view(torch.uint8))
    return pages


def ours(
    name: str, spec: QuantSpec, shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Candidate, float]:
    """Our decode with the whole cache in pages, and its relative error on a sequence that was checked."""
    generator = torch.Generator(device).manual_seed(0)
    blocks = [-(-n // BLOCK_TOKENS) for n in shape.lengths]
    cache_bytes = sum(blocks) * shape.num_kv_heads * block_bytes(head_dim, spec)
    copies = copies_of(cache_bytes, device)
    pages = [random_pages(spec, head_dim, sum(blocks), shape.num_kv_heads, generator)]
    pages += [pages[0].clone() for _ in range(copies - 1)]
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
    used = torch.randperm(sum(blocks), device=device, generator=generator).int().split(blocks)
    for row, entries in zip(table, used, strict=True):
        row[: len(entries)] = entries
    seqlens = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
    q_shape = (len(blocks), 1, shape.num_q_heads, head_dim)
    q = torch.randn(q_shape, device=device, generator=generator).to(dtype)
    out = torch.empty_like(q)

    short = seqlens.clamp(max=CHECKED_TOKENS)
    decode(q, pages[0], table, short, spec, out=out)
    got = out[0, 0].float().view(shape.num_kv_heads, -1, head_dim)
    held = pages[0][table[0, : -(-int(short[0]) // BLOCK_TOKENS)].long()].cpu()
    k, v = (x[: int(short[0])].transpose(0, 1).to(device) for x in dequantize(held, head_dim, spec, torch.float32))
    scores = q[0, 0].float().view_as(got) @ k.transpose(1, 2) * head_dim**-0.5
    want = scores.softmax(-1) @ v
    error = ((got - want).norm() / want.norm()).item()
    if not error < MAX_ERROR:
        raise BitDecodingError(f"{name} on {shape}: relative error {error:.1e} against fp32 attention, not timed")

    def call(i: int) -> object:
        return decode(q, pages[i % copies], table, seqlens, spec, out=out)

    return Candidate(name, call, copies, cache_bytes), error


def sdpa(name: str, backend: SDPBackend | None, shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device):
    """torch SDPA on a 16-bit cache, with its own choice of backend for None."""
    batch, tokens = len(shape.lengths), shape.lengths[0]
    cache_bytes = 2 * batch * shape.num_kv_heads * tokens * head_dim * dtype.itemsize
    copies = copies_of(cache_bytes, device)
    size = (2, batch, shape.num_kv_heads, tokens, head_dim)
    caches = [torch.randn(size, dtype=dtype, device=device) for _ in range(copies)]
    q = torch.randn(batch, shape.num_q_heads, 1, head_dim, dtype=dtype, device=device)
    grouped = shape.num_q_heads != shape.num_kv_heads

    def call(i: int) -> Tensor:
        k, v = caches[i % copies]
        if backend is None:
            return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    call(0)  # raises where the backend cannot
    return Candidate(name, call, copies, cache_bytes)


def copies_of(cache_bytes: int, device: torch.device) -> int:
    return min(MAX_COPIES, COLD_BYTES // cache_bytes + 1) if device.type == "cuda" else 1


# ---------------------------------------------------------------------------------------------- timing


def measure(
    shape: Shape, specs: dict[str, QuantSpec], head_dim: int, dtype: torch.dtype, device: torch.device, rounds: int,
    ceiling: float | None, rivals: bool,
) -> list[Row]:  # fmt: skip
    """All candidates on one shape, taking turns."""
    cuda = device.type == "cuda"
    made = [ours(name, spec, shape, head_dim, dtype, device) for name, spec in specs.items()]
    candidates = [candidate for candidate, _ in made]
    errors: list[float | None] = [error for _, error in made]
    if rivals and len(set(shape.lengths)) == 1:
        flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
        for name, backend in (("sdpa flash", flash), ("sdpa cudnn", cudnn)) if cuda else (("sdpa", None),):
            try:
                candidates.append(sdpa(name, backend, shape, head_dim, dtype, device))
                errors.append(None)
            except RuntimeError as reason:  # this backend cannot, or memory is short
                print(f"{shape}: {name} left out: {str(reason).splitlines()[0]}", file=sys.stderr)
    times = (graph_times if cuda else plain_times)(candidates, rounds)
    host = [host_time(c) if cuda else None for c in candidates]
    best = min((us for us, c in zip(times, candidates, strict=True) if c.name.startswith("sdpa")), default=None)
    rows = []
    for candidate, us, host_us, error in zip(candidates, times, host, errors, strict=True):
        rate = candidate.cache_bytes / us / 1e3
        speedup = best / us if best and not candidate.name.startswith("sdpa") else None
        percent = 100 * rate / ceiling if ceiling else None
        rows.append(Row(str(shape), candidate.name, us, host_us, rate, percent, speedup, error))
    return rows


def graph_times(candidates: list[Candidate], rounds: int) -> list[float]:
    """Microseconds per call."""
    stream = torch.cuda.Stream()
    graphs = []
    with torch.cuda.stream(stream):
        for candidate in candidates:
            calls = max(candidate.copies, MIN_CALLS)
            candidate.call(0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(calls):
                    candidate.call(i)
            graph.replay()
            graphs.append((graph, calls))
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(rounds):
            for taken, (graph, calls) in zip(times, graphs, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                taken.append(start.elapsed_time(end) / calls * 1e3)
    return [statistics.median(taken) for taken in times]


def host_time(candidate: Candidate, calls: int = 200) -> float:
    """Microseconds of the caller per plain call, few enough of them that the launch queue does not fill."""
    for i in range(calls):
        candidate.call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        candidate.call(i)
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / calls * 1e6


def plain_times(candidates: list[Candidate], rounds: int) -> list[float]:
    """Microseconds per call on the CPU."""
    times: list[list[float]] = [[] for _ in candidates]
    for candidate in candidates:
        candidate.call(0)
    for _ in range(rounds):
        for taken, candidate in zip(times, candidates, strict=True):
            start = time.perf_counter()
            candidate.call(0)
            taken.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(taken) for taken in times]


def read_bandwidth(device: torch.device) -> float:
    """GB/s of torch.sum over a large buffer, the best of several; a plain read kernel may be a little faster."""
    buffer = torch.ones(READ_BYTES // 4, device=device)
    candidate = Candidate("read", lambda _: buffer.sum(), 1, READ_BYTES)
    return READ_BYTES / min(graph_times([candidate], 5)) / 1e3


def format_table(rows: list[Row], ceiling: float | None) -> str:
    head = ["batch, q/kv heads, tokens", "candidate", "us", "host us", "GB/s", "% of read", "speedup", "error"]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [head]
    for r in rows:
        numbers = (r.us, ".1f"), (r.host_us, ".1f"), (r.gb_per_s, ".1f"), (r.percent_of_read, ".0f"), (r.speedup, ".2f")
        lines.append([r.shape, r.candidate, *(cell(*number) for number in numbers), cell(r.error, ".1e")])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return table if ceiling is None else f"read bandwidth {ceiling:.0f} GB/s\n{table}"
