"""`bitdecoding bench-model`: a whole model's decode step with a 16-bit cache and with low-bit ones.

The model has the shape of Llama-3.1-8B and random weights; the caches are filled with random keys and values, as full
as a prompt would have left them. A step is transformers' own code, compiled by torch.compile, from a token to the
likeliest next one, recorded once in a CUDA graph and replayed: nothing of Python is in the times.

Candidates: ``transformers`` is its StaticCache with SDPA as it comes (because of its mask it repeats K and V for every
query head); ``sdpa`` the same cache without the mask, so that SDPA reads K and V once: the fastest that a 16-bit cache
gets; and every policy named. The floor of a step is the bytes that it must read, weights and cached tokens, over the
measured read bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_inductor_cache  # since torch 2.8 another name of fresh_cache
from torch.nn import functional
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from .arguments import MAX_BATCH, device_of, integers, make_folder, parsed
from .cache import TAIL_ROOM
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS
from .integrations.transformers import NAME, BitDecodingCache
from .ops import quantize
from .policy import QuantPolicy
from .timing import memory_bytes, read_bandwidth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072 + 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "tiny": {  # for a CPU
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 256,
        "max_position_embeddings": 131072 + 1024,
        "tie_word_embeddings": False,
    },
}
RIVALS = ("transformers", "sdpa")
UNMASKED = "bitdecoding_bench_sdpa"  # the name of `sdpa`'s attention function
ROOM = 512  # tokens that steps may append
WARM_UP = 3
ROUNDS = 5  # of replays, each of `steps` steps
SPARE = 0.06  # of the GPU's memory: activations, logits, the allocator
RANDOM_TOKENS = 1024  # quantised, then copied all over the pages
COLORS = {"transformers": "#8a8a8a", "sdpa": "#4d4d4d"}


@dataclass
class Row:
    """One candidate at one length and batch."""

    candidate: str
    tokens: int
    batch: int
    largest: bool  # whether a larger batch would not fit
    ms: float  # per step
    searches_ms: list[float]  # the same of each search; ms is the least
    tokens_per_s: float
    floor_ms: float
    over_floor: float  # ms / floor_ms
    cache_bytes: int  # memory of the cache
    read_bytes: int  # of weights and cached tokens, that a step must read
    bits_per_value: float
    peak_bytes: int  # of memory, of the GPU; 0 on a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="default: %(default)s")
    parser.add_argument("--layers", type=integers(1), help="fewer layers than the model has")
    parser.add_argument("--lengths", type=integers(1), nargs="+", default=[8192, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--policies", nargs="+", default=["kv4", "kv2"], metavar="NAME", help="presets, or JSON files")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS, help="default: both")
    parser.add_argument("--batches", nargs="+", default=["1", "largest"], help="numbers, or `largest`: all that fits")
    parser.add_argument("--compile", choices=("layer", "model", "no"), default="layer", help=(
        "what torch.compile sees at once: a layer (seconds), the whole model (a minute each), or nothing"
    ))  # fmt: skip
    parser.add_argument("--inductor", nargs="*", default=[], metavar="OPTION", help=(
        "options of torch._inductor.config to switch on (or NAME=NUMBER) for all candidates: coordinate_descent_tuning "
        "searches for the fastest products, combo_kernels does several in one kernel, triton.enable_pdl starts early"
    ))  # fmt: skip
    parser.add_argument("--searches", type=integers(1), default=1, help=(
        "how often to compile each candidate, of which the fastest counts: inductor's searches end at various tiles"
    ))  # fmt: skip
    parser.add_argument("--steps", type=integers(1), default=16, help="of a round (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("bitdecoding-bench-model"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    device = device_of(args.device)
    policies = [(name, parsed("--policies", name, QuantPolicy.parse)) for name in args.policies]
    for batch in args.batches:
        if batch != "largest" and not (batch.isdecimal() and 1 <= int(batch) <= MAX_BATCH):
            raise InvalidArgument(f"--batches {batch}: allowed are numbers from 1 to {MAX_BATCH} and `largest`")
    shape = SHAPES[args.shape]
    for option, values, most in (
        ("--layers", [args.layers or 1], shape["num_hidden_layers"]),
        ("--lengths", args.lengths, shape["max_position_embeddings"] - ROOM),
    ):
        if max(values) > most:
            raise InvalidArgument(f"{option} {max(values)}: allowed are integers from 1 to {most}")
    inductor = dict(map(inductor_option, args.inductor))
    if device.type != "cuda" and "largest" in args.batches:
        raise InvalidArgument("--batches largest: needs a GPU")
    if args.searches > (most := ROOM // (ROUNDS + 1 + WARM_UP)):
        raise InvalidArgument(f"--searches {args.searches}: allowed are 1 to {most}")
    if args.steps > (most := (ROOM // args.searches - WARM_UP) // (ROUNDS + 1)):
        raise InvalidArgument(f"--steps {args.steps}: with --searches {args.searches} allowed are 1 to {most}")
    make_folder("--out", args.out)
    with torch.no_grad(), torch._inductor.config.patch(inductor):
        report = measure(args, policies, device)
    print(format_table(report))
    plot(report).savefig(args.out / "bench-model.png", dpi=160)
    print(f"\nwrote {args.out / 'bench-model.json'} and {args.out / 'bench-model.png'}")
    return 0


def inductor_option(word: str) -> tuple[str, bool | int]:
    """NAME or NAME=NUMBER -> an option of torch._inductor.config and its value."""
    name, _, number = word.partition("=")
    config: Any = torch._inductor.config
    options = config.get_config_copy()
    if isinstance(options.get(name), bool) and "=" not in word:
        return name, True
    if name in options and number.isdecimal():
        kind = config.get_type(name)
        if kind is int or int in get_args(kind):  # int | None
            return name, int(number)
    raise InvalidArgument(
        f"--inductor {word}: allowed are names of torch._inductor.config that are on or off, and NAME=NUMBER of others"
    )


# ------------------------------------------------------------------------------------------------------- measuring


def measure(args: argparse.Namespace, policies: list[tuple[str, QuantPolicy]], device: torch.device) -> dict:
    """-> a dictionary for JSON: the settings and `rows`, one :class:`Row` per candidate, length and batch."""
    torch.manual_seed(0)
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = LlamaConfig(**shape)
    bandwidth = read_bandwidth(device)
    model = random_model(config, device)
    # the rows of the embedding table that a step reads are nothing
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    candidates: list[tuple[str, QuantPolicy | None]] = [(name, None) for name in args.rivals]
    candidates += policies
    cases = list(itertools.product(args.batches, args.lengths, candidates))
    rows, left_out = [], []
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for wanted, tokens, (name, policy) in (bar := tqdm(cases, unit=" cases")):
        bar.set_description(f"{name}, {tokens} tokens, batch {wanted}")
        per_sequence = sequence_bytes(config, policy, tokens + ROOM)
        batch = largest_batch(weights, per_sequence, device) if wanted == "largest" else int(wanted)
        try:
            rows.append(
                _measure_case(args, model, name, policy, tokens, batch, wanted == "largest", weights, bandwidth)
            )
        except torch.OutOfMemoryError:
            left_out.append({"candidate": name, "tokens": tokens, "batch": batch, "reason": "out of memory"})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report = {
            "shape": args.shape,
            "layers": config.num_hidden_layers,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "read_gb_per_s": bandwidth,
            "weight_bytes": weights,
            "compile": args.compile,
            "inductor": args.inductor,
            "searches": args.searches,
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
            "left_out": left_out,
        }
        save(report, args.out)  # what is measured is not lost if a later case fails
    return report


def save(report: dict, folder: Path) -> None:
    (folder / "bench-model.json").write_text(json.dumps(report, indent=2) + "\n")


def random_model(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """A model with random weights, made where it is to live."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def sequence_bytes(config: LlamaConfig, policy: QuantPolicy | None, max_tokens: int) -> int:
    """Bytes of cache memory per sequence."""
    values = config.num_key_value_heads * config.head_dim
    if policy is None:
        return config.num_hidden_layers * max_tokens * 2 * values * 2
    total = 0
    for spec, kept in policy.resolve(config.num_hidden_layers, config.head_dim):
        tail = max(1, kept.recent) + BLOCK_TOKENS - 1 + TAIL_ROOM
        in_16_bit = max_tokens if spec is None else kept.sink_tokens + tail
        total += in_16_bit * 2 * values * 2
        if spec is not None:
            pages = kept.packed_len(max_tokens, 0) // BLOCK_TOKENS
            total += pages * config.num_key_value_heads * spec.block_bytes(config.head_dim)
    return total


def largest_batch(weights: int, per_sequence: int, device: torch.device) -> int:
    """Sequences whose cache fits beside the weights, with some memory to spare: the same for every candidate."""
    return max(1, int(memory_bytes(device) * (1 - SPARE) - weights * 1.07) // per_sequence)


def _measure_case(
    args: argparse.Namespace, model: PreTrainedModel, name: str, policy: QuantPolicy | None, tokens: int, batch: int,
    largest: bool, weights: int, bandwidth: float,
) -> Row:  # fmt: skip
    device, config = model.device, model.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if policy is None:
        cache: StaticCache | BitDecodingCache = filled_static_cache(model, batch, tokens)
        cache_bytes = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        used = cache_bytes * tokens // (tokens + ROOM)
        model.set_attn_implementation("sdpa" if name == "transformers" else UNMASKED)
    else:
        model.set_attn_implementation(NAME)
        cache = filled_cache(model, policy, batch, tokens)
        cache_bytes, used = cache.nbytes, cache.used_nbytes
    searches = [time_search(args, model, cache, batch, tokens) for _ in range(args.searches)]
    ms = min(searches)
    read = weights + used
    floor = read / bandwidth / 1e6
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * batch
    return Row(
        candidate=name, tokens=tokens, batch=batch, largest=largest, ms=ms, searches_ms=searches,
        tokens_per_s=batch / ms * 1e3, floor_ms=floor, over_floor=ms / floor, cache_bytes=cache_bytes, read_bytes=read,
        bits_per_value=used * 8 / values, peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    )  # fmt: skip


def time_search(args: argparse.Namespace, model: PreTrainedModel, cache: Any, batch: int, tokens: int) -> float:
    """Milliseconds per step, compiled as if for the first time if there are several searches."""
    with contextlib.ExitStack() as stack:
        if args.searches > 1:
            torch._dynamo.reset()
            stack.enter_context(fresh_inductor_cache())
        return time_steps(Step(model, cache, batch, tokens, args.compile), args.steps, model.device)


def filled_static_cache(model: PreTrainedModel, batch: int, tokens: int) -> StaticCache:
    """transformers' 16-bit cache, full but for the room."""
    config = model.config
    cache = StaticCache(config, max_cache_len=tokens + ROOM)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
    return cache


def filled_cache(model: PreTrainedModel, policy: QuantPolicy, batch: int, tokens: int) -> BitDecodingCache:
    """Our cache with so many tokens in every sequence: some random blocks, copied all over the pages."""
    config = model.config
    cache = BitDecodingCache(config, policy, max_tokens=tokens + ROOM)
    cache.initialize(model, batch)
    generator = torch.Generator().manual_seed(0)
    size = (2, RANDOM_TOKENS, config.num_key_value_heads, config.head_dim)
    k, v = torch.randn(size, generator=generator).to(model.dtype if model.dtype.itemsize == 2 else torch.float16)
    blocks: dict[int, Tensor] = {}  # by the spec's id
    for layer in cache.layers:
        kv = layer.kv
        if id(kv.quant) not in blocks:
            blocks[id(kv.quant)] = quantize(k, v, kv.quant).to(kv.device)
        source = blocks[id(kv.quant)]
        if kv.num_pages:
            repeats = -(-kv.num_pages // len(source))
            for i in range(repeats):
                part = kv.pages[i * len(source) : (i + 1) * len(source)]
                part.copy_(source[: len(part)])
        for x in (kv.tail_k, kv.tail_v, kv.sink_k, kv.sink_v):
            if x is not None:
                x.normal_()
        packed = kv.policy.packed_len(tokens, 0)
        kv._write_lengths([tokens] * batch, [packed] * batch)
        layer.empty, layer.begun = False, True
    cache._shared.count(tokens, model.device)
    return cache


class Step:
    """A decode step on fixed buffers: from the tokens in ``ids`` to the next ones, which replace them."""

    def __init__(self, model: PreTrainedModel, cache: Any, batch: int, tokens: int, how: str) -> None:
        self.model, self.cache, self.how = model, cache, how
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.position = torch.full((1, 1), tokens, dtype=torch.int64, device=model.device)
        masked = model.config._attn_implementation == "sdpa"
        self.key_at = torch.arange(tokens + ROOM, device=model.device) if masked else None
        body = {"layer": self._by_layers, "model": torch.compile(self._whole, fullgraph=True), "no": self._whole}[how]
        self.body: Callable[[Tensor, Tensor, Tensor | None], Tensor] = body
        if how == "layer":
            for layer in model.model.layers:
                layer.self_attn.layer_idx = 0  # the same for all, so that one compiled layer serves them all
            self.layers = [_OneLayer(layer) for layer in cache.layers]
        else:
            for i, layer in enumerate(model.model.layers):
                layer.self_attn.layer_idx = i

    def __call__(self) -> None:
        mask = None if self.key_at is None else (self.key_at <= self.position)[:, None, None]
        self.ids.copy_(self.body(self.ids, self.position, mask))
        self.position.add_(1)

    def _whole(self, ids: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.model(
            ids, position_ids=position, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _by_layers(self, ids: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        inner = self.model.model
        hidden, rotation = _first(inner, ids, position)
        for layer, cached in zip(inner.layers, self.layers, strict=True):
            hidden = _layer(layer, hidden, rotation, mask, position, cached)
        return _last(self.model, hidden)


class _OneLayer:
    """The cache that a layer sees which takes itself for the only one."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        layer.counts = False  # our first layer counts tokens for all; then it would be compiled by itself

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(k, v, *args, **kwargs)


@torch.compile(fullgraph=True)
def _first(inner: Any, ids: Tensor, position: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    hidden = inner.embed_tokens(ids)
    return hidden, inner.rotary_emb(hidden, position_ids=position)


@torch.compile(fullgraph=True)
def _layer(
    layer: nn.Module, hidden: Tensor, rotation: Any, mask: Tensor | None, position: Tensor, cached: Any
) -> Tensor:
    out = layer(
        hidden, attention_mask=mask, position_embeddings=rotation, position_ids=position, past_key_values=cached,
        use_cache=True,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


@torch.compile(fullgraph=True)
def _last(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(hidden))[:, -1].argmax(-1, keepdim=True)


def unmasked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA over a whole static cache, the room behind the tokens included: what is there does not change the time."""
    out = functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(UNMASKED, unmasked_attention)


def time_steps(step: Step, steps: int, device: torch.device) -> float:
    """Milliseconds per step: the median round."""
    times = []
    for replay in _replays(step, steps, device):
        start = time.perf_counter()
        for _ in range(steps):
            replay()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps * 1e3)
    return statistics.median(times)


def _replays(step: Step, steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """What does a step, once per round; warmed up, and on a GPU recorded and done before the clock starts."""
    for _ in range(WARM_UP):
        step()
    if device.type != "cuda":
        yield from [step] * ROUNDS
        return
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(steps):
        graph.replay()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        yield graph.replay
    if isinstance(step.cache, BitDecodingCache):
        step.cache.sync()  # raises if a step found no page
    del graph


# ------------------------------------------------------------------------------------------------------- reporting


def format_table(report: dict) -> str:
    """The rows of a report as text."""
    lines = [
        f"{report['shape']}, {report['layers']} layers, random weights, on {report['device']}: "
        f"{report['weight_bytes'] / 1e9:.2f} GB of weights per step, {report['read_gb_per_s']:.0f} GB/s read bandwidth",
        "",
        f"{'tokens':>7}  {'batch':>5}  {'cache':>14}  {'ms/token':>9}  {'tokens/s':>9}  {'floor ms':>8}  "
        f"{'x floor':>7}  {'bits':>5}  {'cache GB':>8}  {'peak GB':>7}",
    ]
    for row in sorted(report["rows"], key=lambda row: (row["tokens"], row["largest"])):
        lines.append(
            f"{row['tokens']:>7}  {row['batch']:>5}  {row['candidate']:>14}  {row['ms']:>9.3f}  "
            f"{row['tokens_per_s']:>9.1f}  {row['floor_ms']:>8.3f}  {row['over_floor']:>7.2f}  "
            f"{row['bits_per_value']:>5.2f}  {row['cache_bytes'] / 1e9:>8.2f}  {row['peak_bytes'] / 1e9:>7.1f}"
        )
    lines += [f"left out: {case['candidate']} at {case['tokens']} tokens, batch {case['batch']}: {case['reason']}"
              for case in report["left_out"]]  # fmt: skip
    return "\n".join(lines)


def plot(report: dict) -> Figure:
    """Milliseconds per token at batch 1 over the floor, and tokens per second of the largest batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["rows"]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    lengths = sorted({row["tokens"] for row in rows})
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    width = 0.8 / len(names)
    for axes, largest, key, title in (
        (
            figure.add_subplot(1, 2, 1),
            False,
            "ms",
            "ms per token, smallest batch; the mark is the floor (lower is better)",
        ),
        (figure.add_subplot(1, 2, 2), True, "tokens_per_s", "tokens/s, largest batch that fits (higher is better)"),
    ):
        for i, name in enumerate(names):
            for j, tokens in enumerate(lengths):
                found = [r for r in rows if (r["candidate"], r["tokens"], r["largest"]) == (name, tokens, largest)]
                if not found:
                    continue
                row, x = min(found, key=lambda r: r["batch"]), j + (i - (len(names) - 1) / 2) * width
                color = COLORS.get(name, f"C{i}")
                axes.bar(x, row[key], width * 0.9, color=color, label=name if j == 0 else None)
                if not largest:
                    axes.plot([x - width * 0.45, x + width * 0.45], [row["floor_ms"]] * 2, color="black", linewidth=1.5)
                label = f"{row[key]:.1f}" if not largest else f"{row[key]:,.0f}\nx{row['batch']}"
                axes.annotate(label, (x, row[key]), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
        axes.set_xlabel("tokens in the cache")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{report['shape']}, random weights, {report['device']}", fontsize=11)
    return figure
