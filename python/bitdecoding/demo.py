"""`bitdecoding demo`: a real model on a real text with 16-bit and low-bit KV caches, side by side.

The text is fed token by token as far as the cache is concerned, see :mod:`bitdecoding.evaluate`, which measures more.
The second half of the text is scored.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .arguments import MAX_SEED, check_presets, device_of, integers, make_folder, not_negative, read_text
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS
from .evaluate import Scores, chunk_bounds, score
from .integrations.transformers import NAME, BitDecodingCache, enable
from .models import MODEL, TEXT, load_model, load_text
from .quantization import PRESETS

TIMED_STEPS = 8
REFERENCE_CHUNK = 512
PLAIN = ("kc4", "kc2")
BLUE, GREY = "#1f6fb4", "#8a8a8a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=integers(2 * BLOCK_TOKENS), default=3072, help="length of the text (default: %(default)s)"
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="NAME", help="default: all of them")
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"a UTF-8 text file (default: {TEXT})")
    parser.add_argument(
        "--out", type=Path, default=Path("bitdecoding-demo"), metavar="DIR", help="for the table and plot"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=integers(0, MAX_SEED), default=0, help="of sampling (with --temperature)")
    parser.add_argument("--prompt", help="answer this instead of measuring")
    parser.add_argument("--preset", default="kv4", help="of the answer's cache (default: %(default)s)")
    parser.add_argument("--new-tokens", type=integers(1), default=200, help="of the answer (default: %(default)s)")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="0: the likeliest token (default)")


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    device = device_of(args.device)
    check_presets("--preset", [args.preset])
    check_presets("--presets", args.presets)
    text = None if args.text is None else read_text("--text", args.text)
    if args.prompt is None:
        make_folder("--out", args.out)
    transformers.utils.logging.disable_progress_bar()  # bars within ours
    model, tokenizer = load_model(device)
    if args.prompt is not None:
        answer(model, tokenizer, args.prompt, args.preset, args.new_tokens, args.temperature)
        return 0

    ids = tokenizer(load_text() if text is None else text, return_tensors="pt").input_ids[:, : args.tokens].to(device)
    report = measure(model, ids, args.presets)
    report |= {"model": MODEL, "text": TEXT if args.text is None else args.text.name}
    print(format_table(report))
    (args.out / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report, args.out / "demo.png")
    print(f"\nwrote {args.out / 'demo.json'} and {args.out / 'demo.png'}")
    return 0


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """What one cache did."""

    cache: str
    bits_per_value: float
    bytes_total: int
    bytes_per_token: float
    compression: float  # against 16 bits per value
    perplexity: float
    perplexity_change: float  # relative to the 16-bit cache: 0.01 is 1% more
    kl_divergence: float  # mean over tokens of KL(16-bit || this), nats
    top1_agreement: float  # share of tokens whose likeliest successor is the 16-bit cache's
    step_ms: float  # median time of a decode step behind the whole text


@torch.inference_mode()
def measure(model: PreTrainedModel, ids: Tensor, presets: list[str]) -> dict:
    """Run a text through a model with a 16-bit cache and with each preset.

    ids: [1, tokens]. -> a dictionary for JSON: the settings and `rows`, one :class:`Row` per cache.
    """
    tokens = ids.shape[1]
    longest = model.config.max_position_embeddings - TIMED_STEPS
    if not 2 * BLOCK_TOKENS <= tokens <= longest:
        raise InvalidArgument(f"--tokens: the text has {tokens} tokens: allowed are {2 * BLOCK_TOKENS} to {longest}")
    config = model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    plain_attention = config._attn_implementation
    scored_from = tokens // 2  # the first prediction that counts is that of the token behind
    reference: Scores | None = None
    rows = []
    with tqdm(total=tokens * (1 + len(presets)), unit=" tokens") as bar:
        for name in ["16-bit", *presets]:
            bar.set_description(f"{name:>6}")
            if name == "16-bit":
                cache: Cache = DynamicCache(config=config)
                bounds = [*range(0, tokens, REFERENCE_CHUNK), tokens]
            else:
                model.set_attn_implementation(NAME)
                cache = BitDecodingCache(config, name, max_tokens=tokens + TIMED_STEPS)
                bounds = chunk_bounds(cache, tokens)
            scores = score(model, ids, cache, bounds, scored_from, reference, bar)
            reference = reference or scores
            nbytes = _cache_bytes(cache)
            perplexity, plain = (math.exp(x.loss.mean().item()) for x in (scores, reference))
            rows.append(
                Row(
                    cache=name,
                    bits_per_value=nbytes * 8 / values,
                    bytes_total=nbytes,
                    bytes_per_token=nbytes / tokens,
                    compression=values * 2 / nbytes,
                    perplexity=perplexity,
                    perplexity_change=perplexity / plain - 1,
                    kl_divergence=scores.kl.mean().item(),
                    top1_agreement=scores.same.mean().item(),
                    step_ms=_time_steps(model, cache, ids[:, -1:]),
                )
            )
    model.set_attn_implementation(plain_attention)
    return {
        "tokens": tokens,
        "scored_tokens": tokens - tokens // 2 - 1,
        "device": torch.cuda.get_device_name() if ids.device.type == "cuda" else "cpu",
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "rows": [asdict(row) for row in rows],
    }


def _cache_bytes(cache: Cache) -> int:
    """Bytes that the cached tokens take; the plain cache counted in 16 bit, whatever the model computes in."""
    if isinstance(cache, BitDecodingCache):
        return cache.used_nbytes
    return sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)


def _time_steps(model: PreTrainedModel, cache: Cache, token: Tensor) -> float:
    """Median milliseconds of a decode step."""
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        token.item()  # wait for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


# ------------------------------------------------------------------------------------------------------- reporting


def format_table(report: dict) -> str:
    """The rows of a report as text."""
    lines = [
        f"{report['model']}, {report['tokens']} tokens of {report['text']}, the last {report['scored_tokens']} scored; "
        f"{report['model_dtype']} on {report['device']}",
        "",
        f"{'cache':>7}  {'bits/value':>10}  {'bytes/token':>11}  {'MiB':>7}  {'smaller':>7}  "
        f"{'perplexity':>10}  {'change':>8}  {'KL':>8}  {'same top-1':>10}  {'ms/step':>8}",
    ]
    for row in report["rows"]:
        lines.append(
            f"{row['cache']:>7}  {row['bits_per_value']:>10.2f}  {row['bytes_per_token']:>11,.0f}  "
            f"{row['bytes_total'] / 2**20:>7.2f}  {row['compression']:>6.2f}x  {row['perplexity']:>10.3f}  "
            f"{row['perplexity_change']:>+8.2%}  {row['kl_divergence']:>8.5f}  {row['top1_agreement']:>10.1%}  "
            f"{row['step_ms']:>8.1f}"
        )
    if report["device"] == "cpu":
        lines += [
            "",
            "On the CPU the cache runs in its reference backend: its times say nothing about the GPU kernels.",
        ]
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Quality against size, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = sorted((row for row in report["rows"] if row["cache"] != "16-bit"), key=lambda row: row["bits_per_value"])
    groups = (  # the original's plain scheme beside the presets
        ("presets", "o-", BLUE, (7, 5), [row for row in rows if row["cache"] not in PLAIN]),
        ("plain KC-4, KC-2", "s", GREY, (7, -13), [row for row in rows if row["cache"] in PLAIN]),
    )
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, field in ((left, "kl_divergence"), (right, "top1_agreement")):
        for label, style, color, offset, group in groups:
            x, y = [row["bits_per_value"] for row in group], [row[field] for row in group]
            axes.plot(x, y, style, color=color, label=label, markersize=7, linewidth=1.2, zorder=3)
            for row in group:
                at = (row["bits_per_value"], row[field])
                axes.annotate(row["cache"], at, offset, textcoords="offset points", color=color, fontsize=10)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("cache size in bits per value, everything counted")
        axes.margins(0.1)
    left.set_yscale("log")
    left.set_title("KL divergence from the 16-bit cache, nats (lower is better)", fontsize=11)
    left.legend(frameon=False)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_title("same likeliest token as the 16-bit cache (higher is better)", fontsize=11)
    figure.suptitle(f"{report['model']}, {report['tokens']:,} tokens of {report['text']}", fontsize=12)
    figure.savefig(path, dpi=160)


# ------------------------------------------------------------------------------------------------------- answering


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    quant: str,
    new_tokens: int,
    temperature: float,
) -> None:
    """Print a model's answer as it is generated from a low-bit cache."""
    enable(model, quant)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    start = time.perf_counter()
    generated = model.generate(
        **chat,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
    )
    seconds = time.perf_counter() - start
    count = generated.sequences.shape[1] - chat["input_ids"].shape[1]
    nbytes = _cache_bytes(generated.past_key_values)
    length = int(generated.past_key_values.get_seq_length())
    print(f"\n{quant}: {count} tokens in {seconds:.1f} s; cache of {length} tokens: {nbytes / 1024:,.0f} KiB")
