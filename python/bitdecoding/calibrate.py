"""Formats per layer from a short text: where a model's cache needs its bits.

What counts is the error at the logits: that of the attention outputs misses the layers that matter. Every layer is
quantised on its own, in every format, and the KL divergence of the logits from those of the 16-bit cache is its price.
Small errors of several layers add up, so the best formats within a budget are found by taking, again and again, the
change that lowers the divergence most per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .cute_kernels.checks import check_type
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS
from .integrations.transformers import NAME, BitDecodingCache, BitDecodingLayer, kv_shape
from .policy import UNQUANTISED, Format, QuantPolicy

FORMATS = ("kv2", "k4v2", "kv4", "kv8")


@dataclass(frozen=True)
class Prices:
    """What every format costs in every layer: the KL divergence at the logits if that layer alone has it.

    by_layer: per layer, format -> nats. kept: sink_tokens, recent and hadamard of the policies.
    """

    by_layer: list[dict[Format, float]]
    kept: dict[str, Any]
    head_dim: int

    def policy(self, bits_per_value: float, tokens: int) -> QuantPolicy:
        """The formats with the least sum of prices within a budget, see :func:`calibrate`."""
        sizes = sizes_within(bits_per_value, list(self.by_layer[0]), self.kept, self.head_dim, tokens)
        chosen = choose(self.by_layer, sizes, bits_per_value * len(self.by_layer))
        most = max(set(chosen), key=chosen.count)
        return QuantPolicy(most, {i: wanted for i, wanted in enumerate(chosen) if wanted != most}, **self.kept)


def sizes_within(
    bits_per_value: float, formats: Sequence[Format], kept: dict[str, Any], head_dim: int, tokens: int
) -> dict[Format, float]:
    """format -> its bits per value; raises InvalidArgument if none fits into a budget."""
    sizes = {f: QuantPolicy(f, **kept).bits_per_value(1, head_dim, tokens) for f in formats}
    smallest = min(sizes.values())
    if not smallest <= bits_per_value < math.inf:
        raise InvalidArgument(
            f"bits_per_value={bits_per_value}: the smallest of the formats takes {smallest:.3f} "
            f"in sequences of {tokens} tokens"
        )
    return sizes


def calibrate(
    model: PreTrainedModel, ids: Tensor, bits_per_value: float, *, tokens: int | None = None, **options: Any
) -> QuantPolicy:
    """The policy with a format for every layer that disturbs the logits least within a budget.

    ids, options: see :func:`measure_prices`, which it calls.
    bits_per_value: the budget: cache bytes of a sequence of ``tokens`` tokens (default: as many as ids has), everything
        counted, per value: ``budget_bytes * 8 / (2 * num_layers * num_kv_heads * head_dim * tokens)``.
    Raises InvalidArgument if the smallest format exceeds the budget. The model stays as it was.
    """
    return measure_prices(model, ids, **options).policy(bits_per_value, ids.shape[1] if tokens is None else tokens)


@torch.inference_mode()
def measure_prices(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    formats: Sequence[Format] = FORMATS,
    sink_tokens: int | None = None,
    recent: int | None = None,
    hadamard: bool | None = None,
    progress: bool = True,
) -> Prices:
    """Try every format in every layer.

    ids: int64 [texts, tokens] on the model's device, at least 1,024 tokens: a text like those to come. The first half
        is quantised, the predictions for the second are compared.
    formats: to choose from.
    sink_tokens, recent, hadamard: of the policy, see :class:`bitdecoding.QuantPolicy`.
    progress: show a bar.
    """
    check_type("model", model, PreTrainedModel)
    check_type("ids", ids, Tensor)
    if ids.dim() != 2 or ids.shape[1] < 8 * BLOCK_TOKENS:
        raise InvalidArgument(
            f"ids is {list(ids.shape)}: allowed is [texts, tokens] with {8 * BLOCK_TOKENS} tokens or more"
        )
    config = model.config.get_text_config(decoder=True)
    _, head_dim = kv_shape(config)
    kept: dict[str, Any] = {"sink_tokens": sink_tokens, "recent": recent, "hadamard": hadamard}
    if not formats:
        raise InvalidArgument("formats is empty: allowed are one or more")
    policies = [QuantPolicy(wanted, **kept) for wanted in formats]
    previous = config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        divergences = _divergences(model, ids, policies, progress)
    finally:
        model.set_attn_implementation(previous)
    return Prices([dict(zip(formats, row, strict=True)) for row in divergences.tolist()], kept, head_dim)


def choose(prices: list[dict[Format, float]], sizes: dict[Format, float], budget: float) -> list[Format]:
    """A format for every layer with a small sum of prices, the sum of sizes within a budget: greedily.

    prices: per layer, format -> error; sizes: format -> size.
    """
    chosen = [min(sizes, key=sizes.__getitem__) for _ in prices]
    left = budget - sum(sizes[wanted] for wanted in chosen)
    while True:
        best, gain = None, 0.0
        for layer, row in enumerate(prices):
            now = chosen[layer]
            for wanted, size in sizes.items():
                more = size - sizes[now]
                if 0 < more <= left + 1e-9 and (row[now] - row[wanted]) / more > gain:
                    best, gain = (layer, wanted), (row[now] - row[wanted]) / more
        if best is None:
            return chosen
        layer, wanted = best
        left -= sizes[wanted] - sizes[chosen[layer]]
        chosen[layer] = wanted


def _divergences(model: PreTrainedModel, ids: Tensor, policies: list[QuantPolicy], progress: bool) -> Tensor:
    """Mean KL divergence of the logits when one layer alone has a policy's format: [layers, policies]."""
    half, total = ids.shape[1] // 2, ids.shape[1]
    cache = BitDecodingCache(model.config, QuantPolicy(UNQUANTISED, sink_tokens=0), max_tokens=total)
    model(ids[:, :half], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def log_probs() -> Tensor:
        logits = model(ids[:, half:], past_key_values=cache, use_cache=True).logits
        return logits.float().log_softmax(-1)

    def rewind() -> None:
        for layer in cache.layers:
            if int(layer.kv.seqlens[0]) > half:
                layer.crop(half - total)
        cache._shared.count(half, ids.device)

    reference = log_probs()
    rewind()
    out = torch.zeros(len(cache.layers), len(policies))
    with tqdm(total=out.numel(), desc="calibrating", disable=not progress, unit=" formats") as bar:
        for i, plain in enumerate(list(cache.layers)):
            k, v = plain.kv.tail_k[:, :half], plain.kv.tail_v[:, :half]
            for j, policy in enumerate(policies):
                wanted = policy.resolve(len(cache.layers), plain.kv.head_dim)[i]
                layer: Any = BitDecodingLayer(*wanted, total, i, cache._shared)
                layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
                layer.kv.append(k, v)
                layer.empty, layer.begun = False, True
                cache.layers[i] = layer
                here = log_probs()
                out[i, j] = (reference.exp() * (reference - here)).sum(-1).mean()
                cache.layers[i] = plain
                rewind()
                bar.update()
    return out
