"""The kernel that merges parts, without a GPU: its PTX, run by the interpreter, equals bd.merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from bitdecoding.cute_kernels import compile as compiler
from bitdecoding.cute_kernels.cubin import read_cubin
from bitdecoding.cute_kernels.merge_parts import Params
from bitdecoding.cute_kernels.merge_plan import MergePartsPlan
from ptx_interpreter import Memory, run

import bitdecoding as bd

ARCHS = ("sm80", "sm86", "sm90a")


def execute(arch: str, outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts, rows, head_dim = outs.shape
    config = bd.KernelConfig(kind="merge", arch=arch, head_dim=head_dim)
    made = compiler.compile_config(config)
    assert read_cubin(made.cubin)[made.entry].frame_bytes == 0
    memory = Memory()
    out, lse = torch.full((rows, head_dim), torch.nan).to(outs.dtype), np.full(rows, np.nan, np.float32)
    values = {
        "outs": memory.add(outs.view(torch.int16).numpy(), writable=False),
        "lses": memory.add(lses.numpy(), writable=False),
        "out": memory.add(out.view(torch.int16).numpy(), initialised=False),
        "lse": memory.add(lse, initialised=False),
        "rows": rows,
        "num_parts": parts,
        "bfloat16": int(outs.dtype == torch.bfloat16),
    }
    plan = MergePartsPlan(config)
    grid = -(-rows * plan.vectors // plan.threads)
    run(made.ptx, made.entry, (grid,), (plan.threads,), [values[name] for name in Params._fields], 0, memory)
    return out, torch.from_numpy(lse)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (256, torch.float16)])
@pytest.mark.parametrize("parts", [1, 3])
def test_merge_equals_the_reference(arch: str, head_dim: int, dtype: torch.dtype, parts: int) -> None:
    torch.manual_seed(parts)
    rows = 21
    outs, lses = torch.randn(parts, rows, head_dim).to(dtype), 5 * torch.randn(parts, rows)
    lses[0, 3:7] = lses[:, 5] = -torch.inf
    outs[0, 3:7] = torch.nan  # does not matter there
    want, want_lse = bd.merge(outs, lses)
    out, lse = execute(arch, outs, lses)
    torch.testing.assert_close(out, want, atol=2e-3 if dtype == torch.float16 else 2e-2, rtol=1e-3)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    assert not out[5].any()
