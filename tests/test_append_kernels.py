"""The kernels of append and quantize on a machine without a GPU: their PTX, executed by the interpreter, writes the same
bytes as the CPU backend.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from bitdecoding.cute_kernels import compile as compiler
from bitdecoding.cute_kernels.append import AppendPlan, Params
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


def test_try():
    for spec in (bd.QuantSpec(),):
        k, v = random_kv(129, 1, 128)
        check_quantize("sm90a", 128, spec, k, v, [0, 129])
