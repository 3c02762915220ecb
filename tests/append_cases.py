"""Cases of quantize and append whose bytes the CPU backend defines, for the kernels on a GPU and in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from test_quantization import random_kv
from torch import Tensor

import bitdecoding as bd

POISON = 0xA5  # of bytes that must stay as they are
BATCH, HEADS = 3, 2
SLACK = 5  # tail slots more than needed
# new tokens, and how many of them count for each sequence; borders of blocks, with one sequence out of pages in the end
STEPS = [
    (1, None), (127, (127, 126, 0)), (1, None), (3, (0, 2, 3)), (8, (8, 5, 7)), (128, None), (129, (129, 1, 129)),
    (300, (0, 300, 7)),
]  # fmt: skip


def hostile_kv(tokens: int, heads: int, head_dim: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values with what quantisers trip over: constant, huge and tiny values, infinity, NaN, both zeros."""
    k, v = random_kv(tokens, heads, head_dim, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    for x in (k, v):
        for value in (torch.nan, torch.inf, -torch.inf, 60000.0, -40000.0, 1e-7, -0.0):
            at = [int(torch.randint(n, (1,), generator=generator)) for n in x.shape] if tokens else []
            if at:
                x[tuple(at)] = value
        x[:, :, 5] = 0.5
        x[tokens // 2 : tokens // 2 + 1] = -0.0
        x[:, 0, 9] *= 1e-6
        if heads > 1:  # values within the limit, all in vectors of one lane, that rotation takes beyond it in all
            x[-1:, 0, torch.arange(head_dim) % 32 < 8] = 30000.0
    return k, v


def check_quantize(
    head_dim: int, spec: bd.QuantSpec, lens: list[int], dtype: torch.dtype,
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None], heads: int = HEADS, seed: int = 0,
) -> None:  # fmt: skip
    """run(k, v, pages, block_table, cu_seqlens) writes ragged sequences to pages in disorder, one of them missing."""
    bounds = torch.tensor([3, *lens]).cumsum(0).int()  # the rows before the first sequence are nobody's
    k, v = hostile_kv(int(bounds[-1]) + 2, heads, head_dim, seed, dtype)
    blocks = [-(-n // 128) for n in lens]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(lens), max(blocks) + 1), -7, dtype=torch.int32)
    at = 0
    for b, n in enumerate(blocks):
        table[b, :n] = order[at : at + n]
        at += n
    shape = (len(order), heads, bd.block_bytes(head_dim, spec))
    want, got = (torch.full(shape, POISON, dtype=torch.uint8) for _ in range(2))
    bd.quantize(k, v, spec, pages=want, block_table=table, cu_seqlens=bounds)
    if sum(blocks) > 1:
        last = blocks.index(max(blocks))
        want[table[last, blocks[last] - 1]] = POISON
        table[last, blocks[last] - 1] = (-1, len(order))[seed % 2]  # no page
    run(k, v, got, table, bounds)
    assert torch.equal(got, want), f"{len((got != want).nonzero())} bytes differ, first {(got != want).nonzero()[:5]}"


def empty_cache(head_dim: int, spec: bd.QuantSpec, recent: int, num_sink: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """All that an append changes, full of what must not be read; rows of the table have one page, two and three."""
    tail = torch.full((2, BATCH, recent + 127 + SLACK, HEADS, head_dim), torch.nan, dtype=dtype)
    sink = torch.full((2, BATCH, num_sink, HEADS, head_dim), torch.nan, dtype=dtype)
    return {
        "pages": torch.full((7, HEADS, bd.block_bytes(head_dim, spec)), POISON, dtype=torch.uint8),
        "block_table": torch.tensor([[5, -1, 99], [3, 0, -1], [1, 6, 4]], dtype=torch.int32),
        "seqlens": torch.zeros(BATCH, dtype=torch.int32), "packed_lens": torch.zeros(BATCH, dtype=torch.int32),
        "tail_k": tail[0], "tail_v": tail[1], "sink_k": sink[0], "sink_v": sink[1],
        "status": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip


def check_appends(
    head_dim: int, spec: bd.QuantSpec, steps: list, recent: int, num_sink: int, dtype: torch.dtype,
    run: Callable[[dict[str, Tensor], Tensor, Tensor, Tensor | None], None],
) -> dict[str, Tensor]:  # fmt: skip
    """run(cache, k, v, lengths) appends in place; every byte after every step is the CPU's -> the cache."""
    cache = empty_cache(head_dim, spec, recent, num_sink, dtype)
    sinks = {} if num_sink else {"sink_k": None, "sink_v": None}
    for seed, (n, lengths) in enumerate(steps):
        # slices of a projection of K and V, as models make them
        both = [
            x.unflatten(1, (BATCH, HEADS)).transpose(0, 1) for x in hostile_kv(n, BATCH * HEADS, head_dim, seed, dtype)
        ]
        k, v = torch.cat(both, dim=2).split(HEADS, dim=2)
        counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        for b in range(BATCH):  # what does not count must not be used
            k[b, n if counts is None else counts[b] :] = torch.nan
            v[b, n if counts is None else counts[b] :] = torch.nan
        got = {name: x.clone() for name, x in cache.items()}
        bd.append(k, v, **(cache | sinks), spec=spec, lengths=counts, recent=recent)
        run(got, k, v, counts)
        for name, want in cache.items():
            assert torch.equal(got[name].view(torch.uint8), want.view(torch.uint8)), f"{name} after step {seed}"
    return cache
