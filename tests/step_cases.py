"""Cases of whole steps, which the CPU backend defines, for the kernels on a GPU and in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from append_cases import POISON, hostile_kv
from attention_reference import relative_error
from test_quantization import random_kv
from torch import Tensor

import bitdecoding as bd

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # out and, where they rotate, new tokens are rounded
# tokens of the sequences before: nothing, sinks not full, a full tail, blocks; the last one is out of pages soon
LENGTHS = [0, 2, 127, 130, 300, 259]
PAGES = [2, 2, 2, 2, 3, 1]

Run = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor, dict], Tensor]


def begun_cache(
    head_dim: int, spec: bd.QuantSpec, heads: int, recent: int, num_sink: int, dtype: torch.dtype, slack: int,
    lengths: list[int] = LENGTHS, pages: list[int] = PAGES,
) -> dict[str, Tensor]:  # fmt: skip
    """A cache of sequences of ``lengths`` tokens, with so many pages, full of poison wherever that may lie."""
    batch = len(lengths)
    tail = torch.full((2, batch, recent + 127 + slack, heads, head_dim), torch.nan, dtype=dtype)
    sink = torch.full((2, batch, num_sink, heads, head_dim), torch.nan, dtype=dtype)
    table = torch.full((batch, max(pages) + 1), 2**30, dtype=torch.int32)
    free = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).int()
    for b, count in enumerate(pages):
        table[b, :count], free = free[:count], free[count:]
    cache = {
        "pages": torch.full((sum(pages), heads, bd.block_bytes(head_dim, spec)), POISON, dtype=torch.uint8),
        "block_table": table,
        "seqlens": torch.zeros(batch, dtype=torch.int32), "packed_lens": torch.zeros(batch, dtype=torch.int32),
        "tail_k": tail[0], "tail_v": tail[1], "sink_k": sink[0], "sink_v": sink[1],
        "status": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    longest = max(lengths)
    k, v = (
        x.unflatten(1, (batch, heads)).transpose(0, 1) for x in random_kv(longest, batch * heads, head_dim, 1, dtype)
    )
    counts = torch.tensor(lengths, dtype=torch.int32)
    bd.append(k, v, **(cache | no_sinks(num_sink)), spec=spec, lengths=counts, recent=recent)
    cache["status"].zero_()
    return cache


def no_sinks(num_sink: int) -> dict[str, None]:
    return {} if num_sink else {"sink_k": None, "sink_v": None}


def check_steps(
    head_dim: int, spec: bd.QuantSpec, run: Run, *, heads: int, group: int, steps: list[int], recent: int = 0,
    num_sink: int = 0, dtype: torch.dtype = torch.float16, lengths: list[int] = LENGTHS, pages: list[int] = PAGES,
    hostile: bool = False, **options,
) -> dict[str, Tensor]:  # fmt: skip
    """run(cache, q, k_new, v_new, arguments) does a step in place -> out. steps: q_len of each. After every step all
    that the cache holds is the CPU's, bit for bit, and out is close, unless the new tokens are hostile -> the cache.
    """
    cache = begun_cache(head_dim, spec, heads, recent, num_sink, dtype, max(steps), lengths, pages)
    batch = len(lengths)
    for seed, q_len in enumerate(steps):
        both = [
            x.unflatten(1, (batch, heads)).transpose(0, 1)
            for x in (hostile_kv if hostile else random_kv)(q_len, batch * heads, head_dim, 10 + seed, dtype)
        ]
        k, v = torch.cat(both, dim=2).split(heads, dim=2)  # slices of one projection
        q = torch.randn(batch, q_len, heads * group, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
        arguments = {"recent": recent, **options}
        got = {name: x.clone() for name, x in cache.items()}
        want_out = bd.step(q, k, v, **(cache | no_sinks(num_sink)), spec=spec, **arguments)
        out = run(got, q, k, v, arguments)
        for name in ("pages", "seqlens", "packed_lens", "status"):
            assert torch.equal(got[name], cache[name]), f"{name} after step {seed}: {got[name]}, {cache[name]}"
        for b in range(batch):
            length, packed = int(cache["seqlens"][b]), int(cache["packed_lens"][b])
            sinks = min(length, num_sink)
            for kind, held in (("sink", sinks), ("tail", length - sinks - packed)):
                for name in (f"{kind}_k", f"{kind}_v"):
                    rows = [x[name][b, :held].view(torch.uint8) for x in (got, cache)]
                    assert torch.equal(*rows), f"{name} of sequence {b} after step {seed}"
            error = relative_error(out[b], want_out[b])
            assert hostile or error < TOLERANCE[dtype], f"sequence {b} after step {seed}: {error}"
    return cache
