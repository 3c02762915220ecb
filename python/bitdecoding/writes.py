"""What `bitdecoding bench --suite write` times: quantizing prompts, appending tokens, and whole steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from . import ops
from .cache import KVCache
from .candidates import Shape, random_pages
from .cute_kernels.layouts import BLOCK_TOKENS
from .quantization import preset
from .timing import Candidate, copies_of

STEPS = ((8, 32768), (1, 8192), (32, 4096), (64, 1024), (64, 8192))  # batch and tokens
# (tokens of the prompt and KV heads; batch and KV heads of an append; decodes) on a GPU or a CPU
PROBLEMS = {
    True: ((131072, 8), (64, 8), [Shape((tokens,) * batch, 32, 8) for batch, tokens in STEPS]),
    False: ((1024, 2), (4, 2), [Shape((1024,) * 2, 8, 2)]),
}
CACHES = 4  # that steps work on in turn: what a step writes the next one does not wait for
ROOM = 512  # tokens that may be appended to a cache between two resets before a block gets full


@dataclass
class Write:
    """A candidate, what it does to which problem, and the bytes that it must read and write (None: a whole step)."""

    operation: str
    shape: str
    preset: str
    candidate: Candidate
    nbytes: int | None


def writes(presets: Iterable[str], head_dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[list[Write]]:
    """The candidates that take turns, one group after another."""
    (tokens, heads), (batch, append_heads), shapes = PROBLEMS[device.type == "cuda"]
    yield [quantizing(name, tokens, heads, head_dim, dtype, device) for name in presets]
    for fills in (False, True):
        yield [appending(name, batch, append_heads, head_dim, dtype, device, fills) for name in presets]
    for shape, name, fills in itertools.product(shapes, presets, (False, True)):
        yield steps(name, shape, head_dim, dtype, device, fills)


def quantizing(name: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Write:
    """quantize of one sequence into given pages."""
    spec, _ = preset(name, head_dim)
    k, v = (torch.randn(tokens, heads, head_dim, device=device).to(dtype) for _ in range(2))
    blocks = -(-tokens // BLOCK_TOKENS)
    pages = torch.empty(blocks, heads, ops.block_bytes(head_dim, spec), dtype=torch.uint8, device=device)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]

    def call(_: int) -> object:
        return ops.quantize(k, v, spec, pages=pages, block_table=table)

    nbytes = 2 * k.nbytes + pages.nbytes
    return Write("quantize", f"{tokens} x {heads}", name, Candidate(name, call, 1, nbytes), nbytes)


def appending(
    name: str, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, fills: bool
) -> Write:
    """append of one token per sequence to a tail where it fills no block, or one in every sequence."""
    spec, _ = preset(name, head_dim)
    block = batch * heads * ops.block_bytes(head_dim, spec)
    row = 2 * batch * heads * head_dim * dtype.itemsize  # of K and V of a token
    nbytes = BLOCK_TOKENS * row + block if fills else 2 * row
    copies = copies_of(BLOCK_TOKENS * row, device) if fills else 1
    caches = [
        KVCache(
            batch_size=batch, max_tokens=2 * BLOCK_TOKENS + ROOM, num_kv_heads=heads, head_dim=head_dim, quant=spec,
            recent=0 if fills else ROOM, dtype=dtype, device=device,
        )
        for _ in range(copies)
    ]  # fmt: skip
    before = BLOCK_TOKENS - 1 if fills else 1
    tokens = torch.randn(2, batch, before, heads, head_dim, device=device).to(dtype)
    for cache in caches:
        cache.append(*tokens)
        cache.reserve(BLOCK_TOKENS)
    k, v = tokens[:, :, :1].clone()

    def call(i: int) -> None:
        caches[i % copies].append(k, v, reserved=True)

    def reset() -> None:
        for cache in caches:
            cache.seqlens.fill_(before)
            cache.packed_lens.zero_()

    operation = "append, every block full" if fills else "append, no block full"
    return Write(operation, f"{batch} x {heads}", name, Candidate(name, call, copies, nbytes, reset), nbytes)


def steps(name: str, shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device, fills: bool) -> list[Write]:
    """decode alone, append with decode, and both in one kernel, on some caches in turn, as a model's layers have them.
    No block gets full. fills: the mean over 128 of them, in which each sequence of a layer's cache would fill a block.
    """
    spec, policy = preset(name, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, tokens = shape.batch, shape.num_kv_heads, max(shape.lengths)
    caches = []
    for _ in range(CACHES):
        cache = KVCache(
            batch_size=batch, max_tokens=tokens + ROOM, num_kv_heads=heads, head_dim=head_dim, quant=spec,
            recent=policy.recent, sink_tokens=policy.sink_tokens, dtype=dtype, device=device,
        )  # fmt: skip
        cache.reserve(tokens + ROOM)
        cache.pages.copy_(random_pages(spec, head_dim, cache.num_pages, heads, generator))
        for x in (cache.tail_k, cache.tail_v, cache.sink_k, cache.sink_v):
            if x is not None:
                x.normal_(generator=generator)
        caches.append(cache)
    k, v = torch.randn(2, batch, 1, heads, head_dim, device=device, generator=generator).to(dtype)
    q = torch.randn(batch, 1, shape.num_q_heads, head_dim, device=device, generator=generator).to(dtype)
    out = torch.empty_like(q)

    # tokens beyond those of a tail that was just packed: every sequence's in every cache some others
    turns = (torch.arange(batch) * CACHES + torch.arange(CACHES)[:, None]) * BLOCK_TOKENS // (batch * CACHES)
    if not fills:
        turns.zero_()
    packed = caches[0].policy.packed_len(tokens, 0)
    lens = (policy.sink_tokens + packed + policy.recent + turns).to(device, torch.int32)

    def reset() -> None:
        for i, cache in enumerate(caches):
            cache.seqlens.copy_(lens[i])
            cache.packed_lens.fill_(packed)

    def decode(i: int) -> object:
        return caches[i % CACHES].decode(q, out=out)

    def two(i: int) -> object:
        caches[i % CACHES].append(k, v, reserved=True)
        return caches[i % CACHES].decode(q, out=out)

    def step(i: int) -> object:
        return caches[i % CACHES].step(q, k, v, reserved=True, out=out)

    reset()
    nbytes = batch * packed // BLOCK_TOKENS * heads * ops.block_bytes(head_dim, spec)
    calls, suffix = (BLOCK_TOKENS, ", mean of 128") if fills else (CACHES, "")
    return [
        Write(operation + suffix, str(shape), name, Candidate(name, call, calls, nbytes, reset), None)
        for operation, call in (("decode", decode), ("append + decode", two), ("step", step))
    ]
