"""`bitdecoding bench`: decode attention over a low-bit cache against rivals on a 16-bit one, in one process.

The rivals are torch SDPA (on a CPU in fp32 too) and, where it is installed, FlashInfer. How times are taken is in
:mod:`bitdecoding.timing`; a report (JSON) holds everything that the table and the plots show.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .arguments import check_output, check_presets, device_of, integers, positive
from .candidates import LowBitCache, Rivals, Shape, parse_shapes
from .cute_kernels.checks import parse_json
from .cute_kernels.errors import BitDecodingError, InvalidArgument
from .cute_kernels.layouts import HEAD_DIMS
from .timing import copy_bandwidth, measure, read_bandwidth
from .writes import writes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAIN_CUDA = "1,32,8,1024;1,32,8,8192;1,32,8,131072;8,32,8,32768;1,32,32,131072;64,32,8,8192;ragged"
MAIN_CPU = "1,32,8,4096;1,32,8,16384"
HEADS = ((32, 8), (32, 32))  # of the sweeps: GQA and MHA
LENGTHS = (1, 16, 128, 512, *(1024 << i for i in range(8)))  # to 128K
BATCHES = tuple(1 << i for i in range(7))  # to 64
BATCH_TOKENS = {True: (1024, 8192), False: (256,)}  # of each sequence in the batch sweep, on a GPU or not
MAX_CPU_TOKENS = 16384  # of a sweep on a CPU
SUITES = ("main", "length", "batch", "write")
MIN_POINTS = 3  # of a plot
MAX_ERROR = 1e-2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """A measured candidate; times in microseconds, see :class:`bitdecoding.timing.Times`."""

    shape: str
    batch: int
    num_q_heads: int
    num_kv_heads: int
    q_len: int
    tokens: int | None  # None: ragged
    candidate: str
    kernel: str | None  # of ours on a GPU
    us: float
    plain_us: float
    host_us: float | None
    cache_bytes: int
    gb_per_s: float
    percent_of_read: float
    cold: bool  # the copies in rotation exceed the L2 cache
    error: float | None  # relative, of our result against fp32 attention; None: a rival
    ratios: dict[str, float]  # rival -> its time over ours; empty for a rival

    @property
    def ours(self) -> bool:
        return self.error is not None


@dataclass
class WriteRow:
    """A measured way of writing a cache; times as in Row."""

    operation: str
    shape: str
    candidate: str
    us: float
    plain_us: float
    host_us: float | None
    nbytes: int | None  # read and written; None: a step, whose bytes are the decode's
    gb_per_s: float | None
    percent_of_copy: float | None


@dataclass
class LeftOut:
    """A rival that could not do a shape, and why."""

    candidate: str
    shape: str
    reason: str


@dataclass
class Report:
    """What a run of the command measured, and where."""

    command: str
    date: str
    device: str
    torch: str
    head_dim: int
    dtype: str
    ceiling_gb_per_s: float  # of reading
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    copy_gb_per_s: float | None = None  # read plus written; None: no writes were measured
    writes: list[WriteRow] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of to_json; raises InvalidArgument for anything else."""
        try:
            values = parse_json("report", text)
            rows, left_out = [Row(**row) for row in values["rows"]], [LeftOut(**one) for one in values["left_out"]]
            written = [WriteRow(**one) for one in values["writes"]]
            report = cls(**values | {"rows": rows, "left_out": left_out, "writes": written})
        except (InvalidArgument, TypeError, KeyError) as error:
            raise InvalidArgument(f"not a report of this version of bitdecoding bench: {error}") from None
        return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=["main"],
        help="main (default); length: 1 token to 128K, batch 1; batch: 1 to 64 sequences; both for GQA and MHA; "
        "write: quantize, append, and steps of append and decode",
    )  # fmt: skip
    parser.add_argument(
        "--shapes",
        help="instead of a suite: batch,num_q_heads,num_kv_heads,tokens;... ('ragged': 16 sequences, 1K to 128K)",
    )
    parser.add_argument(
        "--q-len", type=integers(1), nargs="+", default=[1], metavar="N",
        help="query tokens of a sequence that decode attends with, its last ones, causal (default: 1)",
    )  # fmt: skip
    parser.add_argument("--presets", nargs="+", default=["kc4", "kc2"], metavar="NAME", help="default: kc4 kc2")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of q, out and the 16-bit cache")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--rounds", type=integers(1), default=15, help="measurements of which the median counts (default: 15)"
    )
    parser.add_argument("--no-rivals", action="store_true", help="without SDPA and FlashInfer")
    parser.add_argument(
        "--ceiling", type=positive, metavar="GB/S", help="read bandwidth (default: measured by torch.sum)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON, after every shape")
    parser.add_argument("--load", type=Path, metavar="FILE", help="show such a report again instead of measuring")
    parser.add_argument("--plot", action="store_true", help="draw the sweeps over length and batch, PNGs next to FILE")


def run(args: argparse.Namespace) -> int:
    file = args.out or args.load
    if args.plot and file is None:
        raise InvalidArgument("--plot: needs --out FILE or --load FILE, next to which the plots are written")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument("--plot: needs matplotlib; pip install '.[bench]'")
    report = measure_all(args) if args.load is None else load(args.load)
    print(format_table(report))
    if args.plot:
        for path in plot(report, file):
            print(f"wrote {path}")
    return 0


def write(report: Report, path: Path | None) -> None:
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report.to_json())
        except OSError as error:
            raise InvalidArgument(f"--out {path}: {error.strerror}") from None


def load(path: Path) -> Report:
    try:
        return Report.from_json(path.read_text())
    except OSError as error:
        raise InvalidArgument(f"--load {path}: {error.strerror}") from None
    except (InvalidArgument, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--load {path}: {error}") from None


# ---------------------------------------------------------------------------------------------- measuring


def shapes_of(suite: str, cuda: bool) -> list[Shape]:
    """The problems of a suite on a GPU or a CPU."""
    if suite == "main":
        return parse_shapes(MAIN_CUDA if cuda else MAIN_CPU)
    if suite == "write":
        return []
    if suite == "length":
        lengths = [n for n in LENGTHS if cuda or n <= MAX_CPU_TOKENS]
        return [Shape((n,), *heads) for heads, n in itertools.product(HEADS, lengths)]
    return [Shape((n,) * b, *heads) for heads, n, b in itertools.product(HEADS, BATCH_TOKENS[cuda], BATCHES)]


def with_queries(shape: Shape, q_len: int) -> Shape:
    """A shape with so many query tokens; raises InvalidArgument if a sequence has fewer tokens."""
    if q_len > min(shape.lengths):
        raise InvalidArgument(f"--q-len {q_len}: there are shapes with fewer tokens: {shape}")
    return shape._replace(q_len=q_len)


def measure_all(args: argparse.Namespace) -> Report:
    device = device_of(args.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    check_presets("--presets", args.presets, args.head_dim)
    if args.out is not None:
        check_output("--out", args.out)
    if args.shapes is None:
        shapes = [shape for suite in args.suite for shape in shapes_of(suite, cuda)]
    else:
        shapes = parse_shapes(args.shapes)
    writes_too = args.shapes is None and "write" in args.suite
    if writes_too and args.q_len != [1]:
        raise InvalidArgument(f"--q-len {' '.join(map(str, args.q_len))}: with --suite write allowed is 1")
    shapes = [with_queries(shape, q_len) for shape in shapes for q_len in args.q_len]
    report = Report(
        command=" ".join(["bitdecoding", *sys.argv[1:]]),
        date=datetime.now().isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        torch=torch.__version__,
        head_dim=args.head_dim,
        dtype=args.dtype,
        ceiling_gb_per_s=args.ceiling or read_bandwidth(device),
    )
    with tqdm(dict.fromkeys(shapes), unit=" shapes", file=sys.stderr) as bar:
        for shape in bar:
            bar.set_description(str(shape))
            measure_shape(report, shape, args.presets, device, args.rounds, not args.no_rivals)
            write(report, args.out)
            if cuda:
                torch.cuda.empty_cache()  # the caches of the next shape have other sizes
    if writes_too:
        measure_writes(report, args.presets, device, args.rounds)
        write(report, args.out)
    return report


def measure_writes(report: Report, presets: list[str], device: torch.device, rounds: int) -> None:
    """Add the rows of all that writes a cache."""
    report.copy_gb_per_s = copy_bandwidth(device)
    for group in writes(presets, report.head_dim, DTYPES[report.dtype], device):
        for made, taken in zip(group, measure([one.candidate for one in group], rounds, device), strict=True):
            rate = share = None
            if made.nbytes is not None:
                rate = made.nbytes / taken.us / 1e3
                share = 100 * rate / report.copy_gb_per_s
            row = WriteRow(made.operation, made.shape, made.preset, *taken, made.nbytes, rate, share)
            report.writes.append(row)


def measure_shape(
    report: Report, shape: Shape, presets: Iterable[str], device: torch.device, rounds: int, with_rivals: bool
) -> None:
    """Add the rows of all candidates on one shape, taking turns."""
    dtype = DTYPES[report.dtype]
    caches = [LowBitCache(name, shape, report.head_dim, dtype, device) for name in presets]
    errors: list[float | None] = []  # None: of a rival
    for cache in caches:
        its_error = cache.error()
        if not its_error < MAX_ERROR:
            raise BitDecodingError(f"{cache.name} on {shape}: relative error {its_error:.1e} against fp32, not timed")
        errors.append(its_error)
    candidates = [cache.candidate() for cache in caches]
    kernels = {cache.name: cache.kernel for cache in caches}
    if with_rivals:
        rivals = Rivals(shape, report.head_dim, dtype, device)
        for name in rivals.names:
            try:
                candidates.append(rivals.candidate(name))
                errors.append(None)
            except Exception as reason:  # whatever keeps another library from it
                why = str(reason).partition("\n")[0] or type(reason).__name__
                report.left_out.append(LeftOut(name, str(shape), why))
    times = measure(candidates, rounds, device)
    rival_us = {c.name: t.us for c, t, error in zip(candidates, times, errors, strict=True) if error is None}
    for candidate, taken, error in zip(candidates, times, errors, strict=True):
        rate = candidate.cache_bytes / taken.us / 1e3
        report.rows.append(
            Row(
                shape=str(shape),
                batch=shape.batch,
                num_q_heads=shape.num_q_heads,
                num_kv_heads=shape.num_kv_heads,
                q_len=shape.q_len,
                tokens=shape.tokens,
                candidate=candidate.name,
                kernel=kernels.get(candidate.name),
                **taken._asdict(),
                cache_bytes=candidate.cache_bytes,
                gb_per_s=rate,
                percent_of_read=100 * rate / report.ceiling_gb_per_s,
                cold=candidate.cold,
                error=error,
                ratios={} if error is None else {name: us / taken.us for name, us in rival_us.items()},
            )
        )


# ---------------------------------------------------------------------------------------------- reporting


def rivals_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.ratios))


def format_table(report: Report) -> str:
    """The rows as text, then the slowest and fastest shape of each preset against each rival, and who was left out."""
    rivals = rivals_of(report.rows)
    head = ["batch, q/kv heads, tokens", "candidate", "us", "plain us", "host us", "GB/s", "% of read"]
    lines = [[*head, *(f"vs {name}" for name in rivals), "error"]]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    on_gpu = report.device != "cpu"
    if not report.rows:
        lines.clear()
    for r in report.rows:
        times = [cell(us, ".1f") for us in (r.us, r.plain_us, r.host_us)]
        times[0] += "*" if on_gpu and not r.cold else ""
        rates = [cell(r.gb_per_s, ".1f"), cell(r.percent_of_read, ".1f")]
        ratios = [cell(r.ratios.get(name), ".2f") for name in rivals]
        lines.append([r.shape, r.candidate, *times, *rates, *ratios, cell(r.error, ".1e")])
    text = aligned(lines)
    text.insert(0, f"{report.device}, read bandwidth {report.ceiling_gb_per_s:.1f} GB/s")
    if on_gpu and not all(row.cold for row in report.rows):
        text.append("* the cache is so small that its copies stay in L2")
    for name in dict.fromkeys(row.candidate for row in report.rows if row.ours):
        for rival in rivals:
            met = [row for row in report.rows if row.candidate == name and rival in row.ratios]
            if met:
                low, high = (pick(met, key=lambda row: row.ratios[rival]) for pick in (min, max))
                lost = sum(row.ratios[rival] < 1 for row in met)
                text.append(
                    f"{name} against {rival}: {low.ratios[rival]:.2f} ({low.shape}) to {high.ratios[rival]:.2f} "
                    f"({high.shape}) times as fast, slower on {lost} of {len(met)} shapes"
                )
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in report.left_out:
        reasons.setdefault((one.candidate, one.reason), []).append(one.shape)
    text += [f"left out: {name} on {'; '.join(shapes)}: {reason}" for (name, reason), shapes in reasons.items()]
    if report.copy_gb_per_s is not None:
        text.append(f"writing, copy bandwidth {report.copy_gb_per_s:.1f} GB/s (read plus written)")
        lines = [["operation", "shape", "candidate", "us", "plain us", "host us", "GB/s", "% of copy"]]
        for w in report.writes:
            times = [cell(us, ".1f") for us in (w.us, w.plain_us, w.host_us)]
            rates = [cell(w.gb_per_s, ".1f"), cell(w.percent_of_copy, ".1f")]
            lines.append([w.operation, w.shape, w.candidate, *times, *rates])
        text += aligned(lines)
    return "\n".join(text)


def aligned(lines: list[list[str]]) -> list[str]:
    """Cells of a table as text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(t.ljust(width) for t, width in zip(line, widths, strict=True)).rstrip() for line in lines]


RIVAL_COLORS = {
    "sdpa": "#8a8a8a",
    "sdpa fp32": "#3f3f3f",
    "sdpa flash": "#8a8a8a",
    "sdpa cudnn": "#3f3f3f",
    "flashinfer": "#c77f2a",
}
OUR_COLORS = ("#1f6fb4", "#2a9d6f", "#7a4fa3", "#b8336a", "#4aa3c7", "#6b8e23")
RIVAL_STYLES = {"sdpa cudnn": "--", "sdpa fp32": "--", "flashinfer": ":"}  # of the ratios


def sweeps(rows: Iterable[Row], over: str) -> dict[str, list[Row]]:
    """The rows of each panel of a plot over "tokens" or "batch": those that differ in nothing else, with its title."""
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.tokens is not None:
            held = row.batch if over == "tokens" else row.tokens
            panels.setdefault((row.num_q_heads, row.num_kv_heads, row.q_len, held), []).append(row)
    return {
        f"{q}/{kv} heads, "
        + ("" if q_len == 1 else f"q_len {q_len}, ")
        + (f"batch {held}" if over == "tokens" else f"{held:,} tokens"): panel
        for (q, kv, q_len, held), panel in panels.items()
        if len({getattr(row, over) for row in panel}) >= MIN_POINTS
    }


def plot(report: Report, file: Path) -> list[Path]:
    """Draw times and ratios over length and over batch where the report varies them -> the PNGs written."""
    written = []
    for over, label in (("tokens", "length"), ("batch", "batch")):
        if panels := sweeps(report.rows, over):
            figure = draw(panels, over)
            about = f"head_dim {report.head_dim}, {report.dtype}, {report.device}"
            figure.suptitle(f"Decode over {label}, {about}", fontsize=12)
            written.append(file.with_name(f"{file.stem}-{label}.png"))
            figure.savefig(written[-1], dpi=140)
    return written


def draw(panels: dict[str, list[Row]], over: str) -> Figure:
    """A column per panel: times above, ratios to the rivals below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def short(count: float, _: object) -> str:
        return f"{count / 1024:g}K" if count >= 1024 else f"{count:g}"

    names = list(dict.fromkeys(row.candidate for rows in panels.values() for row in rows if row.ours))
    colors = RIVAL_COLORS | dict(zip(names, itertools.cycle(OUR_COLORS), strict=False))
    figure = Figure(figsize=(0.6 + 4.6 * len(panels), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, len(panels), squeeze=False, sharex="col", sharey="row")
    for upper, lower, (title, rows) in zip(top, bottom, panels.items(), strict=True):
        rows = sorted(rows, key=lambda row: getattr(row, over))
        for name in dict.fromkeys(row.candidate for row in rows):
            own = [row for row in rows if row.candidate == name]
            marker = "o-" if own[0].ours else "s-"
            upper.plot([getattr(r, over) for r in own], [r.us for r in own], marker, color=colors[name], label=name)
            for rival in rivals_of(own):
                met = [(getattr(r, over), r.ratios[rival]) for r in own if rival in r.ratios]
                style = RIVAL_STYLES.get(rival, "-")
                lower.plot(*zip(*met, strict=True), style, color=colors[name], label=f"{name} against {rival}")
        lower.axhline(1, color="#c0392b", linewidth=1)
        upper.set_title(title, fontsize=11)
        lower.set_xlabel({"tokens": "tokens", "batch": "sequences"}[over])
        for axes in (upper, lower):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(short)
            axes.grid(color="#e4e4e4", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    top[0].set_yscale("log")
    bottom[0].set_ylim(bottom=0)  # of the whole row, once everything is drawn
    top[0].set_ylabel("microseconds per call")
    bottom[0].set_ylabel("times as fast as a rival")
    for row in (top, bottom):
        row[0].legend(frameon=False, fontsize=9)
    return figure
