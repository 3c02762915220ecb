"""The kernels of whole steps without a GPU: their PTX, run by the interpreter, does to a cache what the CPU backend
does, and attends to the same tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from bitdecoding.cute_kernels import compile as compiler
from bitdecoding.cute_kernels.cubin import read_cubin
from bitdecoding.cute_kernels.step import Params
from bitdecoding.cute_kernels.work import MAX_WINDOW
from dsl import compile_configs
from ptx_interpreter import Memory, run
from step_cases import check_steps
from torch import Tensor

import bitdecoding as bd

CLIPS = {"minmax": 1.0, "mse": 0.0}
# preset, head_dim, arch, query columns of a KV head: kernels of the manifest, one with cp.async, and one that fetches
# the rows of five new tokens in two turns
CASES = [
    ("kc4", 128, "sm90a", 4),
    ("kv4", 128, "sm90a", 8),
    ("kc2", 64, "sm80", 4),
    ("kv2", 128, "sm90a", 4),
    ("kv4", 256, "sm90a", 8),
]


def config_of(preset: str, head_dim: int, arch: str, columns: int) -> bd.KernelConfig:
    spec, _ = bd.preset(preset, head_dim)
    return bd.KernelConfig.for_problem(
        kind="step", head_dim=head_dim, quant=spec, num_q_heads=columns, num_kv_heads=1, arch=arch
    )


@lru_cache(maxsize=None)
def compiled() -> dict[bd.KernelConfig, compiler.Compiled]:
    return compile_configs([config_of(*case) for case in CASES])


def test_resources() -> None:
    for config, made in compiled().items():
        found = read_cubin(made.cubin)[made.entry]
        plan = compiler.plan_of(config)
        assert found.frame_bytes == 0, f"{config.name()} spills"
        assert found.max_threads == plan.threads, config.name()
        assert plan.smem_bytes == config.smem_bytes(), config.name()


def execute(
    config: bd.KernelConfig, spec: bd.QuantSpec, grid: int, cache: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor,
    options: dict,
) -> Tensor:  # fmt: skip
    made, memory, plan = compiled()[config], Memory(), compiler.plan_of(config)
    batch, q_len, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]

    def add(x: Tensor | None, writable: bool = False) -> int:
        if x is None or x.numel() == 0:
            return 0
        return memory.add((x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy(), writable=writable)

    # K and V are slices of one tensor
    storage = torch.tensor([], dtype=torch.uint8).set_(k.untyped_storage())
    new = memory.add(storage.numpy(), writable=False)
    out = torch.full_like(q, torch.nan)
    workspace = np.zeros(grid * 2 * plan.partial_bytes, np.uint8)
    counter = np.zeros(1, np.int32)
    pages, group = cache["pages"], num_q_heads // num_kv_heads
    values = dict.fromkeys(Params._fields, 0)
    values |= {name: add(x, writable=name != "block_table") for name, x in cache.items()}
    values |= {
        "q": add(q), "out": add(out, True),
        "k_new": new + 2 * k.storage_offset(), "v_new": new + 2 * v.storage_offset(),
        "workspace": memory.add(workspace), "counter": memory.add(counter),
        "new_batch_stride": 2 * k.stride(0), "new_token_stride": 2 * k.stride(1), "new_head_stride": 2 * k.stride(2),
        "page_stride": pages.stride(0), "head_stride": pages.stride(1), "batch": batch, "q_len": q_len,
        "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "num_pages": len(pages),
        "max_pages": cache["block_table"].shape[1], "tail_capacity": cache["tail_k"].shape[1],
        "num_sink": cache["sink_k"].shape[1], "recent": options["recent"],
        "window": options.get("window") or MAX_WINDOW, "softcap": options.get("softcap") or 0.0,
        "softmax_scale_log2": head_dim**-0.5 * math.log2(math.e), "bfloat16": q.dtype == torch.bfloat16,
        "rotate_q": spec.rotate_k, "rotate_out": spec.rotate_v, "rotate_k": spec.rotate_k, "rotate_v": spec.rotate_v,
        "k_clip": CLIPS.get(spec.k_clip, spec.k_clip), "v_clip": CLIPS.get(spec.v_clip, spec.v_clip), "group": group,
        "q_tiles": 1,
    }  # fmt: skip
    run(
        made.ptx, made.entry, (grid,), (plan.threads,), list(values.values()), plan.smem_bytes, memory,
        cta_order="interleaved",
    )  # fmt: skip
    assert not workspace.any(), "a partial result is left for the next launch"
    assert not counter.any(), "the counter is left for the next launch"
    return out


@pytest.mark.parametrize(
    ("n", "grid", "steps", "options"),
    [
        (0, 3, [1, 1, 1], {"softcap": 5.0}),
        (1, 5, [3], {"recent": 40, "num_sink": 4, "dtype": torch.bfloat16}),
        (2, 2, [2, 1], {"num_sink": 3}),
        (3, 13, [1, 1], {"recent": 1, "window": 200}),
        # the second CTA begins behind the packing of one head's block, which is the first's, and has the other's
        (0, 3, [1], {"heads": 2}),
        # the same, and rows of the second piece after that are kept before the ring has taken all of the first one
        (0, 3, [1], {"lengths": [255, 1300, 1300, 1300], "pages": [2, 11, 11, 11]}),
        # new rows with values beyond the limit and NaN
        (1, 4, [3], {"recent": 40, "num_sink": 4, "hostile": True}),
        (4, 3, [5], {"recent": 1, "lengths": [125, 3], "pages": [2, 1], "hostile": True}),
        (4, 2, [6], {"lengths": [126], "pages": [2], "dtype": torch.bfloat16}),
    ],
)
def test_steps(n: int, grid: int, steps: list[int], options: dict) -> None:
    preset, head_dim, _, columns = CASES[n]
    spec, _ = bd.preset(preset, head_dim)
    config = config_of(*CASES[n])

    def kernel(cache: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, arguments: dict) -> Tensor:
        return execute(config, spec, grid, cache, q, k, v, arguments)

    group = columns // max(steps)
    check_steps(head_dim, spec, kernel, group=group, steps=steps, **{"heads": 1} | options)
