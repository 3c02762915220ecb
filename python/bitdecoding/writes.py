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

# (tokens of the prompt and KV heads; batch and KV heads of an append; decodes) on a GPU or a CPU
PROBLEMS = {
    True: ((131072, 8), (64, 8), (Shape((32768,) * 8, 32, 8), Shape((8192,), 32, 8), Shape((4096,) * 32, 32, 8))),
    False: ((1024, 2), (4, 2), (Shape((1024,) * 2, 8, 2),)),
}
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
    """decode alone, append with decode, and both in one kernel; no block gets full. fills: the mean over 128 of them,
    in which each sequence fills a block, one after another.
    """
    spec, policy = preset(name, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, tokens = shape.batch, shape.num_kv_heads, max(shape.lengths)
    cache = KVCache(
        batch_size=batch, max_tokens=tokens + ROOM, num_kv_heads=heads, head_dim=head_dim, quant=spec,
        recent=policy.recent, sink_tokens=policy.sink_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    cache.reserve(tokens + ROOM)
    cache.pages.copy_(random_pages(spec, head_dim, cache.num_pages, heads, generator))
    for x in (cache.tail_k, cache.tail_v, cache.sink_k, cache.sink_v):
        if x is not None:
            x.normal_(generator=generator)
    k, v = torch.randn(2, batch, 1, heads, head_dim, device=device, generator=generator).to(dtype)
    q = torch.randn(batch, 1, shape.num_q_heads, head_dim, device=device, generator=generator).to(dtype)
    out = torch.empty_like(q)

    turns = [b * BLOCK_TOKENS // batch if fills else 0 for b in range(batch)]
    lens = torch.tensor([tokens + turn for turn in turns], dtype=torch.int32, device=device)
    packed = torch.tensor([cache.policy.packed_len(tokens + turn, 0) for turn in turns], dtype=torch.int32).to(device)

    def reset() -> None:
        cache.seqlens.copy_(lens)
        cache.packed_lens.copy_(packed)

    def decode(_: int) -> object:
        return cache.decode(q, out=out)

    def two(_: int) -> object:
        cache.append(k, v, reserved=True)
        return cache.decode(q, out=out)

    def step(_: int) -> object:
        return cache.step(q, k, v, reserved=True, out=out)

    reset()
    blocks = batch * cache.policy.packed_len(tokens, 0) // BLOCK_TOKENS
    nbytes = blocks * heads * ops.block_bytes(head_dim, spec)
    calls, suffix = (BLOCK_TOKENS, ", mean of 128") if fills else (1, "")
    return [
        Write(operation + suffix, str(shape), name, Candidate(name, call, calls, nbytes, reset), None)
        for operation, call in (("decode", decode), ("append + decode", two), ("step", step))
    ]
