"""The kernels of append and quantize without a GPU: their PTX, run by the interpreter, writes the bytes of the CPU
backend. The manifest is compiled for every architecture, its resources are checked.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from bitdecoding.cute_kernels import compile as compiler
from bitdecoding.cute_kernels.append import Params
from bitdecoding.cute_kernels.append_plan import AppendPlan
from ptx_interpreter import Memory, run
from test_quantization import random_kv
from torch import Tensor

import bitdecoding as bd

HEADS = 2
POISON = 0xA5  # of bytes that must stay as they are


@lru_cache(maxsize=None)
def compiled(arch: str, head_dim: int, spec: bd.QuantSpec) -> tuple[bd.KernelConfig, compiler.Compiled]:
    config = bd.KernelConfig(kind="append", arch=arch, head_dim=head_dim, quant=spec)
    return config, compiler.compile_config(config)


def execute(arch: str, spec: bd.QuantSpec, tensors: dict, written: dict, grid: int | None = None, **values) -> None:
    """Run a kernel; ``tensors`` are read-only to it, ``written`` are tensors that it changes in place."""
    k = tensors["k_new"]
    num_kv_heads, head_dim = k.shape[-2:]
    config, made = compiled(arch, head_dim, spec.for_kernel())
    memory = Memory()

    def add(x: Tensor | None, writable: bool) -> int:
        if x is None or x.numel() == 0:
            return 0
        return memory.add((x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy(), writable=writable)

    arguments = dict.fromkeys(Params._fields, 0)
    arguments |= {name: add(x, False) for name, x in tensors.items()}
    arguments |= {name: add(x, True) for name, x in written.items()}
    pages, table = written["pages"], tensors["block_table"]
    clips = {"minmax": 1.0, "mse": 0.0}
    arguments |= {
        "page_stride": pages.stride(0), "head_stride": pages.stride(1),
        "new_token_stride": 2 * k.stride(-3), "new_head_stride": 2 * k.stride(-2),
        "num_kv_heads": num_kv_heads, "num_pages": len(pages), "max_pages": table.shape[1], "batch": len(table),
        "k_clip": clips.get(spec.k_clip, spec.k_clip), "v_clip": clips.get(spec.v_clip, spec.v_clip),
        "rotate_k": spec.rotate_k, "rotate_v": spec.rotate_v, "bfloat16": k.dtype == torch.bfloat16,
    } | values  # fmt: skip
    items = len(table) * num_kv_heads * arguments["items"] * 2
    plan = AppendPlan(config)
    run(
        made.ptx, made.entry, (grid or items,), (plan.threads,), list(arguments.values()), plan.smem_bytes, memory,
        async_copies="late", cta_order="interleaved" if items < 40 else "sequential",
    )  # fmt: skip


def check_quantize(arch: str, head_dim: int, spec: bd.QuantSpec, k: Tensor, v: Tensor, bounds: list[int]) -> None:
    """Ragged, into pages in another order than the sequences, one of them missing."""
    heads = k.shape[1]
    bounds_tensor = torch.tensor(bounds, dtype=torch.int32)
    lens = bounds_tensor.diff()
    max_pages = int(lens.max() + 127) // 128
    blocks = sum(-(-int(n) // 128) for n in lens)
    order = torch.randperm(blocks + 2, generator=torch.Generator().manual_seed(1)).int()
    table = torch.full((len(lens), max_pages), -7, dtype=torch.int32)
    at = 0
    for b, n in enumerate(lens.tolist()):
        for column in range(-(-n // 128)):
            table[b, column] = order[at]
            at += 1
    shape = (blocks + 2, heads, bd.block_bytes(head_dim, spec))
    want, got = (torch.full(shape, POISON, dtype=torch.uint8) for _ in range(2))
    bd.quantize(k, v, spec, pages=want, block_table=table, cu_seqlens=bounds_tensor)
    tensors = {"k_new": k, "v_new": v, "cu_seqlens": bounds_tensor, "block_table": table}
    longest = int(lens.max())
    execute(arch, spec, tensors, {"pages": got}, new_tokens=longest, items=-(-longest // 128), pack_all=1)
    assert torch.equal(got, want), np.argwhere((got != want).numpy())[:10]


# -- append --------------------------------------------------------------------------------------------------------

BATCH = 3


def empty_cache(head_dim: int, spec: bd.QuantSpec, capacity: int, num_sink: int, dtype: torch.dtype) -> dict:
    """All that an append changes, full of what must not be read; rows of the table are one page long, two and three."""
    tail = torch.full((2, BATCH, capacity, HEADS, head_dim), torch.nan, dtype=dtype)
    sink = torch.full((2, BATCH, num_sink, HEADS, head_dim), torch.nan, dtype=dtype)
    table = torch.tensor([[5, -1, 99], [3, 0, -1], [1, 6, 4]], dtype=torch.int32)
    return {
        "pages": torch.full((7, HEADS, bd.block_bytes(head_dim, spec)), POISON, dtype=torch.uint8),
        "block_table": table, "seqlens": torch.zeros(BATCH, dtype=torch.int32),
        "packed_lens": torch.zeros(BATCH, dtype=torch.int32), "tail_k": tail[0], "tail_v": tail[1],
        "sink_k": sink[0], "sink_v": sink[1], "status": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip


def check_appends(
    arch: str, head_dim: int, spec: bd.QuantSpec, steps: list, recent: int, num_sink: int, dtype: torch.dtype,
    per_cta: int = 1,
) -> dict:  # fmt: skip
    """Steps of (new tokens, those that count per sequence or None), on the CPU and by the kernel -> the cache."""
    cache = empty_cache(head_dim, spec, recent + 127 + 5, num_sink, dtype)
    workspace = torch.zeros(BATCH, dtype=torch.int32)
    for seed, (n, lengths) in enumerate(steps):
        k, v = (x.unflatten(1, (BATCH, HEADS)).transpose(0, 1) for x in random_kv(n, BATCH * HEADS, head_dim, seed, dtype))
        k, v = k.contiguous(), v.contiguous()
        counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        if counts is not None:
            for b in range(BATCH):  # what does not count must not be used
                k[b, counts[b] :], v[b, counts[b] :] = torch.nan, torch.nan
        before = {name: x.clone() for name, x in cache.items()}
        sinks = {} if num_sink else {"sink_k": None, "sink_v": None}
        bd.append(k, v, **(cache | sinks), spec=spec, lengths=counts, recent=recent)
        written = {name: x for name, x in before.items() if name != "block_table"} | {"workspace": workspace}
        tensors = {"k_new": k, "v_new": v, "block_table": before["block_table"], "lengths": counts}
        items = 1 + n // 128
        execute(
            arch, spec, tensors, written, -(-BATCH * HEADS * items * 2 // per_cta), new_tokens=n, items=items,
            new_batch_stride=2 * k.stride(0), tail_capacity=recent + 127 + 5, num_sink=num_sink, recent=recent,
        )  # fmt: skip
        assert not workspace.any(), "a counter is left for the next launch"
        for name, want in cache.items():
            assert torch.equal(before[name].view(torch.uint8), want.view(torch.uint8)), (name, seed)
    return cache


STEPS = [(1, None), (127, (127, 126, 0)), (1, None), (3, (0, 2, 3)), (128, None), (129, (129, 1, 129)), (300, None)]


@pytest.mark.parametrize(
    ("arch", "head_dim", "spec", "recent", "num_sink", "dtype", "per_cta"),
    [
        ("sm90a", 128, bd.QuantSpec(rotate_k=True), 0, 3, torch.float16, 4),
        ("sm80", 64, bd.QuantSpec(k_bits=2, v_group=64, rotate_v=True), 40, 0, torch.bfloat16, 2),
    ],
)
def test_append(arch, head_dim, spec, recent, num_sink, dtype, per_cta) -> None:
    cache = check_appends(arch, head_dim, spec, STEPS, recent, num_sink, dtype, per_cta)
    print(cache["seqlens"], cache["packed_lens"], cache["status"])
