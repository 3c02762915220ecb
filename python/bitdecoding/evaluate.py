"""`bitdecoding eval`: what quantising the cache does to a real model, against its 16-bit cache.

Perplexity, KL divergence and agreement of the likeliest token on long texts; retrieval of a number hidden in a long
text; long texts that the model writes itself. Every token sees the mix of 16-bit and packed tokens that it would see in
decoding step by step: chunks end where a step would pack a block, and the token that fills a block comes alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import MAX_SEED, device_of, integers, make_folder, parsed, read_text
from .calibrate import FORMATS, measure_prices, sizes_within
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS
from .integrations.transformers import NAME, BitDecodingCache, kv_shape
from .models import MODELS, REFERENCE_TEXT, TEXT, load_model, load_reference_text, load_text
from .policy import UNQUANTISED, QuantPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORED = torch.float16  # the reference's log-probabilities, which are kept for all tokens
NEEDLE = " The secret number of Windsor is {}."
QUESTION = "\n\nNow, what was the secret number of Windsor? The secret number of Windsor is"
NEEDLE_DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.9)
NEEDLE_NUMBERS = ("48213", "70952")
ANSWER_TOKENS = 8
MIN_TOKENS = 3 * BLOCK_TOKENS  # of a text
PROMPT_TOKENS = 512  # that a generated text goes on from
NGRAM = 4  # of the repetition measure
BLUE, ORANGE = "#1f6fb4", "#d1701f"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, or a folder (default: %(default)s)")
    parser.add_argument("--policies", nargs="*", default=["kv8", "kv4", "k4v2", "kv2"], metavar="POLICY", help=(
        "presets, with changes such as kv2:recent=32:sinks=4, or JSON files that QuantPolicy.save wrote"
    ))  # fmt: skip
    parser.add_argument("--calibrate", nargs="*", default=[], metavar="BITS[:CHANGES]", help=(
        "also find policies with formats per layer, of so many bits per value, on the text behind the scored tokens"
    ))  # fmt: skip
    parser.add_argument(
        "--tokens", type=integers(MIN_TOKENS), default=8192, help="of every text (default: %(default)s)"
    )
    parser.add_argument(
        "--segments", type=integers(1), default=1, help="so many stretches of every text (default: %(default)s)"
    )
    parser.add_argument("--skip", type=integers(0), default=1024, metavar="TOKENS", help=(
        "of every text that are not scored: the first ones hardly see a packed token (default: %(default)s)"
    ))  # fmt: skip
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help=f"default: {TEXT}; {REFERENCE_TEXT}")
    parser.add_argument("--needle", type=integers(1), nargs="*", default=[1024, 4096], metavar="TOKENS", help=(
        "lengths of the texts that a number is hidden in (default: 1024 4096)"
    ))  # fmt: skip
    parser.add_argument("--generate", type=integers(0), default=1000, metavar="TOKENS", help="to be written; 0: none")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=integers(0, MAX_SEED), default=0, help="of the texts that the model writes")
    parser.add_argument("--out", type=Path, default=Path("bitdecoding-eval"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    device = device_of(args.device)
    policies = {name: parsed("--policies", name, QuantPolicy.parse) for name in args.policies}
    budgets = [(text, *parsed("--calibrate", text, _parse_budget)) for text in args.calibrate]
    check_sizes(args)
    files = None if args.text is None else read_files(args.text)
    make_folder("--out", args.out)
    transformers.utils.logging.disable_progress_bar()  # bars within ours
    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_model(device, torch.float32, MODELS.get(args.model, args.model))
    longest = model.config.max_position_embeddings
    if args.tokens > longest:
        raise InvalidArgument(f"--tokens {args.tokens}: allowed are {MIN_TOKENS} to {longest}, the model's most")
    for n in args.needle:
        needle_room(tokenizer, n, args.tokens)
    _, head_dim = kv_shape(model.config.get_text_config(decoder=True))
    for _, bits, kept in budgets:
        sizes_within(bits, FORMATS, kept, head_dim, args.tokens)
    texts = read_texts(files, tokenizer)
    stretches = {name: cut(ids, name, args.tokens, args.segments).to(device) for name, ids in texts.items()}
    for _, same in itertools.groupby(sorted(budgets, key=lambda budget: str(budget[2])), lambda budget: budget[2]):
        behind = [ids[args.tokens * args.segments :][:CALIBRATION_TOKENS] for ids in texts.values()]
        least = min(map(len, behind))
        if least < CALIBRATION_TOKENS:
            raise InvalidArgument(
                f"--calibrate: a text has {least} tokens behind the scored ones: {CALIBRATION_TOKENS} are needed"
            )
        wanted = list(same)
        prices = measure_prices(model, torch.stack(behind).to(device), **wanted[0][2])
        for text, bits, _ in wanted:
            found = prices.policy(bits, args.tokens)
            found.save(args.out / f"calibrated-{text.replace(':', '-')}.json")
            policies[f"calibrated {text}"] = found
    about = {"model": MODELS.get(args.model, args.model)}
    for report in measure(model, tokenizer, stretches, policies, args.skip, args.needle, args.generate, args.seed):
        report |= about  # what is measured is not lost if a later policy fails
        (args.out / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
    print(format_table(report))
    plot(report).savefig(args.out / "eval.png", dpi=160)
    print(f"\nwrote {args.out / 'eval.json'} and {args.out / 'eval.png'}")
    return 0


CALIBRATION_TOKENS = 2048  # of every text


def _parse_budget(text: str) -> tuple[float, dict[str, Any]]:
    """`2.8:recent=64` -> bits, and the changes as arguments of calibrate."""
    head, _, rest = text.partition(":")
    changed = QuantPolicy.parse(f"kv4:{rest}" if rest else "kv4")
    try:
        bits = float(head)
    except ValueError:
        bits = math.nan
    if not 0 < bits < math.inf:
        raise InvalidArgument("allowed are bits per value, such as 3.5 or 2.8:recent=64")
    kept = {name: getattr(changed, name) for name in ("sink_tokens", "recent", "hadamard")}
    return bits, {name: value for name, value in kept.items() if value is not None}


def check_sizes(args: argparse.Namespace) -> None:
    """What numbers of tokens ask of each other and of the model's name."""
    if args.model not in MODELS and not (Path(args.model) / "config.json").is_file():
        raise InvalidArgument(f"--model {args.model}: allowed are {', '.join(MODELS)}, and folders with a config.json")
    if args.skip > (most := args.tokens - BLOCK_TOKENS - 1):
        raise InvalidArgument(f"--skip {args.skip}: allowed are 0 to {most}")
    if 0 < args.generate < NGRAM:
        raise InvalidArgument(f"--generate {args.generate}: allowed are 0 and integers from {NGRAM}")


def read_files(files: list[Path]) -> dict[str, str]:
    """name -> text."""
    for file in files:
        if sum(file.name == other.name for other in files) > 1:
            raise InvalidArgument(f"--text {file}: allowed are files of different names")
    return {file.name: read_text("--text", file) for file in files}


def read_texts(files: dict[str, str] | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """name -> tokens [length]."""
    named = {TEXT: load_text(), REFERENCE_TEXT: load_reference_text()} if files is None else files
    return {name: tokenizer(text, return_tensors="pt").input_ids[0] for name, text in named.items()}


def cut(ids: Tensor, name: str, tokens: int, segments: int) -> Tensor:
    """The first stretches of a text, [segments, tokens]."""
    if len(ids) < tokens * segments:
        raise InvalidArgument(f"--tokens {tokens}: {name} has {len(ids)} tokens: {segments} x {tokens} are needed")
    return ids[: tokens * segments].view(segments, tokens)


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """What one policy did on one text, or on all of them (the mean of theirs)."""

    policy: str
    text: str
    bits_per_value: float
    perplexity: float
    change: float  # of perplexity, relative to the 16-bit cache: 0.01 is 1% more
    change_error: float  # standard error
    kl: float  # mean over tokens of KL(16-bit || this), nats
    kl_error: float
    top1: float  # share of tokens whose likeliest successor is the 16-bit cache's


ALL = "mean"


@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: dict[str, Tensor],
    policies: dict[str, QuantPolicy], skip: int, needle_lengths: list[int], generated_tokens: int, seed: int,
) -> Iterator[dict]:  # fmt: skip
    """texts: name -> [segments, tokens], all of one shape.

    -> a dictionary for JSON, again and again: with the results so far, the last time with all of them.
    """
    names = list(texts)
    ids = torch.cat([texts[name] for name in names])
    tokens, segments = ids.shape[1], ids.shape[0] // len(names)
    longest = model.config.max_position_embeddings
    plain_attention = model.config.get_text_config(decoder=True)._attn_implementation
    rows: list[Row] = []
    needles: dict[str, dict[int, float]] = {}
    generations: dict[str, dict[str, float]] = {}

    def report() -> dict:
        return {
            "tokens": tokens,
            "scored_tokens": tokens - 1 - skip,
            "segments": segments,
            "device": torch.cuda.get_device_name() if ids.device.type == "cuda" else "cpu",
            "rows": [asdict(row) for row in rows],
            "needle": needles,
            "generation": generations,
            "policies": {name: json.loads(policy.to_json()) for name, policy in policies.items()},
        }

    with tqdm(total=tokens * (1 + len(policies)), unit=" tokens") as bar:
        bar.set_description("16-bit")
        reference = score(model, ids, DynamicCache(config=model.config), [0, *range(512, tokens, 512), tokens],
                          skip, None, bar)  # fmt: skip
        rows += _rows("16-bit", 16.0, reference, reference, names, segments)
        model.set_attn_implementation(NAME)
        for name, policy in policies.items():
            bar.set_description(name)
            cache = BitDecodingCache(model.config, policy, max_tokens=tokens)
            scores = score(model, ids, cache, chunk_bounds(cache, tokens), skip, reference, bar)
            bits = bits_per_value(cache, tokens)
            del cache
            rows += _rows(name, bits, scores, reference, names, segments)
            yield report()
    del reference
    for name, policy in {"16-bit": QuantPolicy(UNQUANTISED), **policies}.items():
        if needle_lengths:
            lengths = [n for n in needle_lengths if n <= longest]
            needles[name] = {n: find_needle(model, tokenizer, ids[0], n, policy) for n in lengths}
        if generated_tokens:
            generations[name] = write(model, ids[:, :PROMPT_TOKENS], policy, generated_tokens, seed, name)
        yield report()
    model.set_attn_implementation(plain_attention)


@dataclass(frozen=True)
class Scores:
    """Per text and scored token: [texts, scored tokens]."""

    loss: Tensor  # nats
    kl: Tensor
    same: Tensor  # 1 where the likeliest token is the reference's
    log_probs: Tensor | None  # [texts, scored tokens, vocabulary], only of the reference


def chunk_bounds(cache: BitDecodingCache, tokens: int) -> list[int]:
    """Where chunks begin and end so that every token sees what it would see in single steps.

    A step packs a block once ``recent + 128`` tokens are behind the sinks and the packed ones, before it attends. So
    the token that makes them so many is a chunk of its own, and no other chunk goes beyond one.
    """
    bounds = {0, tokens}
    for layer in cache.layers:
        if layer.quant is not None:
            filling = layer.policy.sink_tokens + max(1, layer.policy.recent) + BLOCK_TOKENS - 1
            for at in range(filling, tokens, BLOCK_TOKENS):
                bounds |= {at, min(at + 1, tokens)}
    return sorted(bounds)


def score(
    model: PreTrainedModel, ids: Tensor, cache: Cache, bounds: list[int], scored_from: int, reference: Scores | None,
    bar: tqdm,
) -> Scores:  # fmt: skip
    """Feed texts [texts, tokens] in chunks; scored are the predictions at ``scored_from`` .. tokens - 2."""
    texts, tokens = ids.shape
    scored = tokens - 1 - scored_from
    loss, kl, same = (torch.zeros(texts, scored, device=ids.device) for _ in range(3))
    known = None if reference is None else reference.log_probs
    log_probs = None
    for start, end in itertools.pairwise(bounds):
        keep = end - max(start, scored_from)
        logits = model(
            ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=max(1, keep)
        ).logits  # [texts, keep, vocabulary]
        bar.update(end - start)
        if keep <= 0:
            continue
        at = end - keep - scored_from
        here = logits.float().log_softmax(-1)[:, : scored - at]
        part = slice(at, at + here.shape[1])
        targets = ids[:, at + scored_from + 1 :][:, : here.shape[1]]
        loss[:, part] = -here.gather(2, targets[..., None])[..., 0]
        if known is None:
            if log_probs is None:
                log_probs = torch.empty(texts, scored, here.shape[2], dtype=STORED, device=ids.device)
            log_probs[:, part] = here
            same[:, part] = 1
        else:
            there = known[:, part].float()
            kl[:, part] = (there.exp() * (there - here)).sum(-1)
            same[:, part] = (there.argmax(-1) == here.argmax(-1)).float()
    return Scores(loss, kl, same, log_probs)


def _rows(
    policy: str, bits: float, scores: Scores, reference: Scores, names: list[str], segments: int
) -> Iterator[Row]:
    rows = []
    for i, name in enumerate(names):
        mine, its = (
            {key: getattr(x, key)[i * segments : (i + 1) * segments] for key in ("loss", "kl", "same")}
            for x in (scores, reference)
        )
        more, more_error = _mean(mine["loss"] - its["loss"])
        kl, kl_error = _mean(mine["kl"])
        change = math.expm1(more)
        rows.append(
            Row(policy, name, bits, math.exp(mine["loss"].mean().item()), change, more_error * (1 + change), kl,
                kl_error, mine["same"].mean().item())
        )  # fmt: skip
        yield rows[-1]
    count = len(rows)
    means = {key: sum(getattr(row, key) for row in rows) / count for key in ("perplexity", "change", "kl", "top1")}
    errors = {
        key: math.sqrt(sum(getattr(row, key) ** 2 for row in rows)) / count for key in ("change_error", "kl_error")
    }
    yield Row(policy, ALL, bits, **means, **errors)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean of values [segments, tokens] and its standard error; neighbours hang together, so blocks are the sample."""
    blocks = (
        values[:, : values.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS].unflatten(1, (-1, BLOCK_TOKENS)).mean(-1).flatten()
    )
    error = (blocks.var() / len(blocks)).sqrt().item() if len(blocks) > 1 else math.nan
    return values.mean().item(), error


def bits_per_value(cache: BitDecodingCache, tokens: int) -> float:
    """Of the cached tokens, everything counted."""
    kv = cache.layers[0].kv
    values = 2 * len(cache.layers) * kv.batch_size * kv.num_kv_heads * kv.head_dim * tokens
    return cache.used_nbytes * 8 / values


# ---------------------------------------------------------------------------------------------- finding and writing


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokens [length]."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def needle_room(
    tokenizer: PreTrainedTokenizerBase, tokens: int, filler_tokens: int, number: str = NEEDLE_NUMBERS[0]
) -> int:
    """Tokens of the filler in a text of so many tokens that a number is hidden in."""
    others = ANSWER_TOKENS + sum(len(encode(tokenizer, text)) for text in (NEEDLE.format(number), QUESTION))
    if not others < tokens <= others + filler_tokens:
        raise InvalidArgument(f"--needle {tokens}: allowed are {others + 1} to {others + filler_tokens}")
    return tokens - others


def find_needle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, filler: Tensor, tokens: int, policy: QuantPolicy
) -> float:
    """Share of numbers that the model finds in texts of so many tokens.

    The text is quantised before the question comes, and the answer is written step by step.
    """

    question, rows, wanted = encode(tokenizer, QUESTION).to(filler.device), [], []
    for depth, number in itertools.product(NEEDLE_DEPTHS, NEEDLE_NUMBERS):
        needle = encode(tokenizer, NEEDLE.format(number)).to(filler.device)
        room = needle_room(tokenizer, tokens, len(filler), number)
        at = int(room * depth)
        rows.append(torch.cat((filler[:at], needle, filler[at:room])))
        wanted.append(number)
    context = torch.stack(rows)
    cache = BitDecodingCache(model.config, policy, max_tokens=tokens)
    model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = model(question.expand(len(rows), -1), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    answer = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(ANSWER_TOKENS - 1):
        answer.append(model(answer[-1], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True))
    answers = tokenizer.batch_decode(torch.cat(answer, dim=1))
    return sum(number in "".join(text.split()) for number, text in zip(wanted, answers, strict=True)) / len(wanted)


def write(
    model: PreTrainedModel, prompts: Tensor, policy: QuantPolicy, new_tokens: int, seed: int, name: str = ""
) -> dict:
    """Let the model go on from prompts [texts, tokens], sampling, and judge what it wrote.

    -> `perplexity` of the texts under the model without quantisation (what it samples itself is the measure for that of
    others), and `repeated`, the share of 4-grams that were there before.
    """
    texts, start = prompts.shape
    cache = BitDecodingCache(model.config, policy, max_tokens=start + new_tokens)
    logits = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    generator = torch.Generator(prompts.device).manual_seed(seed)
    step, written = _Step(model, cache, texts, start), []
    for _ in tqdm(range(new_tokens), desc=f"{name} writes", unit=" tokens", leave=False):
        token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        written.append(token)
        logits = step(token)
    cache.sync()
    whole = torch.cat((prompts, *written), dim=1)
    losses = []
    for row in whole:  # one at a time: the logits of all would not fit
        log_probs = (
            model(row[None], use_cache=False, logits_to_keep=new_tokens + 1).logits[0, :-1].float().log_softmax(-1)
        )
        losses.append(-log_probs.gather(1, row[-new_tokens:, None]).mean())
    rows = [row[-new_tokens:].tolist() for row in whole]
    grams = [list(zip(*(row[i:] for i in range(NGRAM)), strict=False)) for row in rows]
    repeated = sum(1 - len(set(row)) / len(row) for row in grams) / len(grams)
    return {"perplexity": torch.stack(losses).mean().exp().item(), "repeated": repeated}


class _Step:
    """A model's step from tokens [texts, 1] to logits [texts, vocabulary]; on a GPU the replay of a CUDA graph."""

    def __init__(self, model: PreTrainedModel, cache: BitDecodingCache, texts: int, position: int) -> None:
        self.model, self.cache = model, cache
        self.token = torch.zeros(texts, 1, dtype=torch.int64, device=model.device)
        self.position = torch.full((1, 1), position, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.steps += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.steps == 2 and self.model.device.type == "cuda":  # the first one, plain, warms everything up
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._forward()
            self.graph.replay()
        else:
            self._forward()
        return self.logits

    def _forward(self) -> None:
        self.logits = self.model(
            self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        self.position.add_(1)


# ------------------------------------------------------------------------------------------------------- reporting


def format_table(report: dict) -> str:
    """The rows of a report as text."""
    texts = list(dict.fromkeys(row["text"] for row in report["rows"] if row["text"] != ALL))
    lines = [
        f"{report['model']}, fp32, {report['segments']} x {report['tokens']} tokens of each text, "
        f"{report['scored_tokens']} of them scored, on {report['device']}",
        f"texts: {'; '.join(texts)}",
        "",
        f"{'policy':>24}  {'bits':>5}  {'perplexity: mean change':>23}  {'KL':>17}  {'top-1':>6}   changes by text",
    ]
    for row in report["rows"]:
        if row["text"] != ALL:
            continue
        single = [r for r in report["rows"] if r["policy"] == row["policy"] and r["text"] != ALL]
        lines.append(
            f"{row['policy']:>24}  {row['bits_per_value']:>5.2f}  {row['perplexity']:>8.3f} {row['change']:>+7.2%} "
            f"+-{row['change_error']:>5.2%}  {row['kl']:>8.5f} +-{row['kl_error']:>6.5f}  {row['top1']:>6.1%}   "
            + ", ".join(f"{r['change']:+.2%} +-{r['change_error']:.2%}" for r in single)
        )
    if report["needle"]:
        lengths = list(next(iter(report["needle"].values())))
        lines += ["", f"{'numbers found':>24}  " + "  ".join(f"{n:>6}" for n in lengths)]
        for name, found in report["needle"].items():
            lines.append(f"{name:>24}  " + "  ".join(f"{found[n]:>6.0%}" for n in lengths))
    if report["generation"]:
        lines += ["", f"{'texts it writes':>24}  perplexity  repeated 4-grams"]
        for name, judged in report["generation"].items():
            lines.append(f"{name:>24}  {judged['perplexity']:>10.3f}  {judged['repeated']:>16.1%}")
    return "\n".join(lines)


def plot(report: dict) -> Figure:
    """Quality against size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in report["rows"] if row["text"] == ALL and row["policy"] != "16-bit"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, key, title in (
        (left, "change", "perplexity, change against the 16-bit cache (lower is better)"),
        (right, "kl", "KL divergence from the 16-bit cache, nats (lower is better)"),
    ):
        for row in rows:
            color = ORANGE if row["policy"].startswith("calibrated") else BLUE
            axes.errorbar(
                row["bits_per_value"], row[key], yerr=row[f"{key}_error"], fmt="o", color=color, capsize=3, markersize=6
            )
            axes.annotate(row["policy"], (row["bits_per_value"], row[key]), (6, 5), textcoords="offset points",
                          fontsize=8, color=color)  # fmt: skip
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("bits per value, everything counted")
        axes.set_title(title, fontsize=10)
        axes.margins(0.12)
    left.set_yscale("symlog", linthresh=0.001)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_yscale("log")
    figure.suptitle(f"{report['model']}, {report['tokens']:,} tokens of each text", fontsize=11)
    return figure
