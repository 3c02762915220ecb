"""The kernels of append and quantize without a GPU: their PTX, run by the interpreter, writes the bytes of the CPU
backend.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from append_cases import BATCH, SLACK, STEPS, check_appends, check_quantize
from bitdecoding.cute_kernels import compile as compiler
from bitdecoding.cute_kernels.append import Params
from bitdecoding.cute_kernels.append_plan import COUNTER_BYTES, JOB_BYTES, AppendPlan
from bitdecoding.cute_kernels.append_work import Job
from bitdecoding.cute_kernels.cubin import read_cubin
from bitdecoding.cute_kernels.plan import PIECE_WORDS
from bitdecoding.cute_kernels.work import Piece
from dsl import arch_in_turn, compile_configs, sass
from ptx_interpreter import Memory, run
from torch import Tensor

import bitdecoding as bd

FP16, BF16 = torch.float16, torch.bfloat16
REGISTERS_PER_SM = 65536


# the formats of the manifest, architectures taking turns, and formats that no build has
FORMATS = [(d, spec) for d in compiler.MANIFEST_HEAD_DIMS for spec in compiler.manifest_specs(d)] + [
    (96, bd.QuantSpec(k_bits=8, v_bits=2, v_group=32, k_mean="block", v_symmetric=True)),
    (256, bd.QuantSpec(k_bits=2, k_axis="token", k_group=128, v_bits=8, v_group=32)),
    (64, bd.QuantSpec(k_bits=8, k_axis="token", k_group=32, k_mean="block", v_group=32)),
    (96, bd.QuantSpec(k_bits=2, k_group=32, k_symmetric=True, v_bits=8, v_group=32)),
]
CONFIGS = [
    bd.KernelConfig(kind="append", arch=arch_in_turn(n), head_dim=head_dim, quant=spec)
    for n, (head_dim, spec) in enumerate(FORMATS)
]
# of a QuantSpec, known to the kernel at run time only
OPTIONS = [
    {}, {"rotate_k": True, "v_clip": 0.8}, {"k_clip": 0.75, "rotate_v": True}, {"v_clip": "mse"}, {"rotate_k": True},
    {"k_clip": "mse"}, {"rotate_v": True},
]  # fmt: skip


@lru_cache(maxsize=None)
def compiled() -> dict[bd.KernelConfig, compiler.Compiled]:
    return compile_configs(CONFIGS)


def test_room_for_records() -> None:
    """Plans know how long they are, and Jobs and Pieces are stored in whole vectors."""
    assert 4 * len(Job._fields) == JOB_BYTES
    assert len(Piece._fields) == PIECE_WORDS
    assert JOB_BYTES % 16 == 4 * PIECE_WORDS % 16 == 0


def test_resources() -> None:
    for config, made in compiled().items():
        found = read_cubin(made.cubin)[made.entry]
        plan = AppendPlan(config)
        name = config.name()
        assert found.frame_bytes == 0, f"{name} spills"
        assert ".local" not in made.ptx, name
        assert found.max_threads == plan.threads, name
        assert plan.smem_bytes == config.smem_bytes(), name
        assert found.registers * plan.threads * plan.ctas_per_sm <= REGISTERS_PER_SM, (name, found.registers)


def test_instructions_in_machine_code() -> None:
    """16-byte loads and stores, fragments by ldmatrix, asynchronous copies."""
    found = sass(compiled()[CONFIGS[0]].cubin)
    assert any(op.startswith("LDGSTS") and op.endswith("128") for op in found)
    assert any(op.startswith("LDSM") and op.endswith("4") for op in found)
    assert any(op.startswith("STG") and op.endswith("128") for op in found)
    assert not any(op.startswith(("LDL", "STL")) for op in found), "registers in local memory"


# -- execution -----------------------------------------------------------------------------------------------------


def execute(n: int, spec: bd.QuantSpec, read: dict, written: dict, grid: int, **values) -> None:
    """Run kernel n on tensors by parameter name: those that it reads, and those that it changes in place."""
    k = read["k_new"]
    config = CONFIGS[n]
    made = compiled()[config]
    memory = Memory()

    def add(x: Tensor | None, writable: bool) -> int:
        if x is None or x.numel() == 0:
            return 0
        x = x.untyped_storage() if x.storage_offset() or not x.is_contiguous() else x
        return memory.add((x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy(), writable=writable)

    # K and V may be slices of one tensor
    storage = torch.tensor([], dtype=torch.uint8).set_(k.untyped_storage())
    new = {"k_new": memory.add(storage.numpy(), writable=False)}
    if read["v_new"].untyped_storage().data_ptr() == storage.data_ptr():
        new["v_new"] = new["k_new"] + 2 * read["v_new"].storage_offset()
    else:
        new["v_new"] = add(read["v_new"], False)
    new["k_new"] += 2 * k.storage_offset()
    pages, table = written["pages"], read["block_table"]
    clips = {"minmax": 1.0, "mse": 0.0}
    arguments = dict.fromkeys(Params._fields, 0)
    arguments |= new | {name: add(x, False) for name, x in read.items() if name not in new}
    arguments |= {name: add(x, True) for name, x in written.items()}
    arguments |= {
        "page_stride": pages.stride(0), "head_stride": pages.stride(1),
        "new_token_stride": 2 * k.stride(-3), "new_head_stride": 2 * k.stride(-2),
        "num_kv_heads": k.shape[-2], "num_pages": len(pages), "max_pages": table.shape[1], "batch": len(table),
        "k_clip": clips.get(spec.k_clip, spec.k_clip), "v_clip": clips.get(spec.v_clip, spec.v_clip),
        "rotate_k": spec.rotate_k, "rotate_v": spec.rotate_v, "bfloat16": k.dtype == BF16,
    } | values  # fmt: skip
    plan = AppendPlan(config)
    run(
        made.ptx, made.entry, (grid,), (plan.threads,), list(arguments.values()), plan.smem_bytes, memory,
        cta_order="interleaved" if grid < 30 else "sequential",
    )  # fmt: skip


def spec_of(n: int, **options) -> bd.QuantSpec:
    return bd.QuantSpec(**FORMATS[n][1].to_dict() | options)


@pytest.mark.parametrize("n", range(len(FORMATS)))
def test_quantize(n: int) -> None:
    """Every format; the options and dtypes take turns, so do the lengths where a block is cheap to interpret."""
    head_dim, spec = FORMATS[n][0], spec_of(n, **OPTIONS[n % len(OPTIONS)])
    lens = [(140, 1, 130, 128)[n % 4]] if head_dim == 64 else [(128, 77)[n % 2]]
    quantizes(n, spec, lens, (FP16, BF16)[n // 2 % 2], heads=1, items=1)


def test_quantize_ragged() -> None:
    quantizes(0, spec_of(0, rotate_k=True), [0, 1, 127, 128, 129], BF16, heads=2, items=2)


def test_quantize_every_second_block() -> None:
    n = next(n for n, config in enumerate(CONFIGS) if config.head_dim == 64)
    quantizes(n, spec_of(n, rotate_v=True), [500, 200], FP16, heads=1, items=2)


def quantizes(n: int, spec: bd.QuantSpec, lens: list[int], dtype: torch.dtype, heads: int, items: int) -> None:
    def kernel(k: Tensor, v: Tensor, pages: Tensor, table: Tensor, bounds: Tensor) -> None:
        longest = max(lens)
        read = {"k_new": k, "v_new": v, "cu_seqlens": bounds, "block_table": table}
        grid = 2 * items * len(lens) * heads
        execute(n, spec, read, {"pages": pages}, grid, new_tokens=longest, items=items, pack_all=1)

    check_quantize(FORMATS[n][0], spec, lens, dtype, kernel, heads=heads, seed=n)


@pytest.mark.parametrize(
    ("n", "options", "recent", "num_sink", "dtype", "per_cta", "packed"),
    [
        (4, {"rotate_k": True}, 0, 3, FP16, 4, [128, 256, 256]),
        (5, {"rotate_v": True}, 40, 0, BF16, 1, [128, 128, 128]),
    ],
)
def test_append(n, options, recent, num_sink, dtype, per_cta, packed) -> None:
    cache = appends(n, spec_of(n, **options), STEPS, recent, num_sink, dtype, per_cta)
    assert cache["packed_lens"].tolist() == packed
    assert cache["status"].item() > 0, "no sequence was out of pages"


@pytest.mark.parametrize("n", [len(FORMATS) - 4, len(FORMATS) - 3])
def test_rows_of_other_head_dims(n) -> None:
    """A warp has two rows of 12 vectors at once, or one of 32."""
    cache = appends(n, spec_of(n, rotate_k=True, rotate_v=True), STEPS[:5], 0, 3, BF16, per_cta=3)
    assert cache["seqlens"].tolist() == [137, 135, 12]


def appends(
    n: int, spec: bd.QuantSpec, steps: list, recent: int, num_sink: int, dtype: torch.dtype, per_cta: int
) -> dict:
    workspace = torch.zeros(BATCH, COUNTER_BYTES // 4, dtype=torch.int32)

    def kernel(cache: dict[str, Tensor], k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        new_tokens = k.shape[1]
        read = {"k_new": k, "v_new": v, "block_table": cache["block_table"], "lengths": lengths}
        written = {name: x for name, x in cache.items() if name != "block_table"} | {"workspace": workspace}
        items = 1 + new_tokens // 128
        grid = -(-2 * items * BATCH * k.shape[2] // per_cta)
        execute(
            n, spec, read, written, grid, new_tokens=new_tokens, items=items, new_batch_stride=2 * k.stride(0),
            tail_capacity=recent + 127 + SLACK, num_sink=num_sink, recent=recent,
        )  # fmt: skip
        assert not workspace.any(), "a counter is left for the next launch"

    return check_appends(FORMATS[n][0], spec, steps, recent, num_sink, dtype, kernel)
