"""The decode kernels of the manifest on a machine without a GPU: compiled for every architecture, their resources and
instructions checked, their PTX executed by the interpreter and compared with fp64 attention.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from attention_reference import attention, relative_error
from bitdecoding.cute_kernels import compile as compiler
from bitdecoding.cute_kernels import tile_writer
from bitdecoding.cute_kernels.cubin import read_cubin
from bitdecoding.cute_kernels.layouts import NUM_SLICES, SLICE_TOKENS
from bitdecoding.cute_kernels.tile_plan import TilePlan
from bitdecoding.cute_kernels.work import MAX_WINDOW, Params
from dsl import ARCHS, FULL_ARCH, arch_in_turn, compile_configs, listing, sass
from ptx_interpreter import Memory, run
from test_cpu_decode import Problem, problem, random_q

import bitdecoding as bd

REGISTERS_PER_SM = 65536
SLOT_REGISTERS = 256  # registers are handed out to warps in multiples of this
SM_PARTITIONS = 4
LSE_TOLERANCE = 5e-3  # Q is rounded to fp16, and the keys have channel offsets that its error multiplies
BULK_ARCHS = ("sm90a", "sm120")


@lru_cache(maxsize=None)
def compiled(arch: str) -> dict[bd.KernelConfig, compiler.Compiled]:
    """The decode kernels of an architecture's manifest; but for FULL_ARCH those that the tests run (CASES), and one of
    two query tiles.
    """
    configs = [config for config in compiler.manifest(arch) if config.kind == "decode"]
    if arch != FULL_ARCH:
        tested = {choose(arch, compiler.manifest_specs(d)[i], d, group_of(i)) for a, d, i in CASES if a == arch}
        tested |= {choose(arch, bd.QuantSpec(), 128, group) for group in (1, 16)}
        assert tested <= set(configs)
        configs = [config for config in configs if config in tested]
    return compile_configs(configs)


def choose(arch: str, spec: bd.QuantSpec, head_dim: int, group: int, q_len: int = 1) -> bd.KernelConfig:
    return bd.KernelConfig.for_problem(
        head_dim=head_dim, quant=spec, num_q_heads=group, num_kv_heads=1, q_len=q_len, arch=arch
    )


def group_of(index: int) -> int:
    """Query heads of the test of a format: tiles of 4 and of 8 columns take turns."""
    return (3, 5)[index // 2 % 2]


def kernel(arch: str, spec: bd.QuantSpec, head_dim: int, group: int, q_len: int = 1):
    """(config, Compiled) of the manifest that serves a problem."""
    config = choose(arch, spec, head_dim, group, q_len)
    return config, compiled(arch)[config]


@pytest.mark.parametrize("arch", ARCHS)
def test_resources(arch: str) -> None:
    for config, made in compiled(arch).items():
        found = read_cubin(made.cubin)[made.entry]
        plan = compiler.plan_of(config)
        name = config.name()
        assert found.frame_bytes == 0, f"{name} spills"
        assert found.max_threads == plan.threads, name
        assert plan.smem_bytes == config.smem_bytes(), name
        # an SM's registers belong to its four partitions, to which warps are dealt in turn
        warps = config.ctas_per_sm * (plan.threads // 32)
        per_warp = -(-found.registers * 32 // SLOT_REGISTERS) * SLOT_REGISTERS
        assert -(-warps // SM_PARTITIONS) * per_warp * SM_PARTITIONS <= REGISTERS_PER_SM, (name, found.registers)


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_in_ptx(arch: str) -> None:
    for config, made in compiled(arch).items():
        bulk = arch in BULK_ARCHS
        assert ("cp.async.bulk.shared::cluster.global" in made.ptx) == bulk, config.name()
        assert "cp.async.cg.shared.global" in made.ptx  # 16-bit tokens, without bulk copies also blocks, wgmma: queries
        # blocks need no arrangement, 16-bit tokens do; wgmma's kernels load those from global memory, and from shared
        # memory queries that they scale
        scales = config.mma == "wgmma" and config.q_tile == 16 and config.quant.k_axis == "channel"
        for form, of_wgmma in (("", scales), (".trans", False)):
            loads = f"ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16" in made.ptx
            assert loads == (config.mma == "mma_sync" or of_wgmma), config.name()
        if isinstance(compiler.plan_of(config), TilePlan):
            assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16" in made.ptx
            assert "stmatrix.sync.aligned.m8n8.x4.shared.b16" in made.ptx
        else:
            assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in made.ptx
            assert "movmatrix.sync.aligned.m8n8.trans.b16" in made.ptx
        assert ".local" not in made.ptx


@pytest.mark.parametrize("arch", ARCHS)
def test_instructions_in_machine_code(arch: str) -> None:
    spec = bd.QuantSpec()
    _, made = kernel(arch, spec, 128, 4)
    found = sass(made.cubin)
    assert "HMMA.16816.F32" in found
    assert any(op.startswith("MOVM") for op in found)
    assert any(op.startswith("LDS") and op.endswith("128") for op in found)
    assert any(op.startswith("UBLKCP" if arch in BULK_ARCHS else "LDGSTS") for op in found)
    assert not any(op.startswith(("LDL", "STL")) for op in found), "registers in local memory"


def wide_configs() -> list[bd.KernelConfig]:
    return [config for config in compiler.manifest("sm90a") if config.mma == "wgmma"]


def test_manifest_has_wgmma_kernels_for_many_columns() -> None:
    tiles = {(config.head_dim, config.q_tile) for config in wide_configs()}
    assert {(d, n) for d in (64, 128) for n in (16, 32, 64, 128)} <= tiles
    assert not any(config.mma == "wgmma" for config in compiler.manifest("sm120"))


@pytest.mark.parametrize(("head_dim", "q_tile"), [(64, 32), (128, 16), (128, 32)])
def test_wgmma_takes_codes_from_registers(head_dim: int, q_tile: int) -> None:
    config = next(c for c in wide_configs() if (c.head_dim, c.q_tile) == (head_dim, q_tile))
    code = listing(compiled("sm90a")[config].cubin)
    products = re.findall(r"HGMMA\S* .*?;", code)
    assert products
    for product in products:  # D, A in a register, B as a descriptor
        assert re.fullmatch(rf"HGMMA\.64x{q_tile}x16\.F32 R\d+, R\d+, gdesc\[UR\d+\], (R\d+|RZ).*;", product), product
    waits = code.count("WARPGROUP.DEPBAR")  # the assembler adds one per product where it cannot let them overlap
    assert waits <= len(products) * 2 // 3
    assert "STSM" in code
    assert "USETMAXREG" in code
    assert not re.search(r"\b(LDL|STL)\b", code), "registers in local memory"


@pytest.mark.parametrize(("head_dim", "q_tile"), [(64, 64), (128, 64), (128, 128)])
def test_wgmma_over_tiles(head_dim: int, q_tile: int) -> None:
    """Scores with both operands in shared memory, then P from registers, with a wait for each."""
    config = next(c for c in wide_configs() if (c.head_dim, c.q_tile) == (head_dim, q_tile))
    code = listing(compiled("sm90a")[config].cubin)
    products = re.findall(r"HGMMA\S* .*?;", code)
    scores = [x for x in products if re.match(r"HGMMA\.64x128x16\.F32 R\d+, gdesc\[UR\d+\],", x)]
    values = [x for x in products if re.match(rf"HGMMA\.64x{head_dim}x16\.F32 R\d+, R\d+, gdesc\[UR\d+\],", x)]
    assert (len(scores), len(values)) == (head_dim // 16, 8)
    assert len(products) == len(scores) + len(values)
    assert code.count("WARPGROUP.DEPBAR") == 2
    assert "STSM.16.M88.4" in code
    assert not re.search(r"\b(LDL|STL)\b", code), "registers in local memory"


@pytest.mark.parametrize("k_group", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_of_keys_have_the_parameters_of_their_groups(head_dim: int, k_group: int, monkeypatch) -> None:
    """Where a warp looks for them, its tokens' group and its channels: formats that no build has among them."""
    config = choose("sm90a", bd.QuantSpec(k_group=k_group, v_group=64), head_dim, 64)
    writer = tile_writer.TileWriter(TilePlan(config))

    def load(base: int, offset: int, count: int) -> list[int]:
        return [base + offset + 4 * i for i in range(count)]

    monkeypatch.setattr(tile_writer.ptx, "load_shared", load)
    for warp in range(NUM_SLICES):
        pair, part = warp % writer.pair_warps, warp // writer.pair_warps
        params = writer.channel_params(0, pair, part, 0, 0)
        for i in range(writer.key_slices):
            multipliers, offsets = params(tile_writer.Tile(i, 0, 0, []))
            group = (part * writer.key_slices + i) * SLICE_TOKENS // k_group
            row = writer.plan.folded_k_at + group * 4 * head_dim  # multipliers, then offsets
            assert multipliers[0].made[0] == row + 2 * tile_writer.PAIR * pair
            assert offsets[0] == row + 2 * head_dim + 2 * tile_writer.PAIR * pair


# -- execution -----------------------------------------------------------------------------------------------------


def execute(config: bd.KernelConfig, made: compiler.Compiled, case: Problem, q: torch.Tensor, grid: int, **options):
    """Run a kernel on a Problem -> out, lse. Everything that the kernel only reads is read-only to it."""
    batch, q_len, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_bytes = case.pages.shape
    memory = Memory()

    def read_only(x: torch.Tensor | None) -> int:
        if x is None or x.numel() == 0:
            return 0
        array = x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
        return memory.add(array, writable=False)

    group = num_q_heads // num_kv_heads
    q_tiles = -(-group * q_len // config.q_tile)
    workspace = np.zeros(grid * 2 * compiler.plan_of(config).partial_bytes, np.uint8)
    out = torch.full((batch, q_len, num_q_heads, head_dim), torch.nan).to(q.dtype)
    lse = np.full((batch, q_len, num_q_heads), np.nan, np.float32)
    tail_k, tail_v = case.tail
    sink_k, sink_v = case.sink or (None, None)
    values = {
        "q": read_only(q),
        "pages": read_only(case.pages),
        "block_table": read_only(case.block_table),
        "seqlens": read_only(case.seqlens),
        "packed_lens": read_only(case.packed_lens),
        "tail_k": read_only(tail_k),
        "tail_v": read_only(tail_v),
        "sink_k": read_only(sink_k),
        "sink_v": read_only(sink_v),
        "sink_logits": read_only(options.get("sink_logits")),
        "out": memory.add(out.view(torch.int16).numpy(), initialised=False),
        "lse": memory.add(lse, initialised=False),
        "workspace": memory.add(workspace),
        "page_stride": num_kv_heads * block_bytes,
        "head_stride": block_bytes,
        "batch": batch,
        "q_len": q_len,
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "num_pages": case.pages.shape[0],
        "max_pages": case.block_table.shape[1],
        "tail_capacity": tail_k.shape[1],
        "num_sink": 0 if sink_k is None else sink_k.shape[1],
        "window": options.get("window") or MAX_WINDOW,
        "softmax_scale_log2": head_dim**-0.5 * math.log2(math.e),
        "softcap": options.get("softcap") or 0.0,
        "bfloat16": int(q.dtype == torch.bfloat16),
        "rotate_q": int(options.get("rotate", False)),
        "rotate_out": int(options.get("rotate", False)),
        "group": group,
        "q_tiles": q_tiles,
    }
    plan = compiler.plan_of(config)
    run(
        made.ptx, made.entry, (grid,), (plan.threads,), [values[name] for name in Params._fields], plan.smem_bytes,
        memory, async_copies=options.get("async_copies", "late"),
    )  # fmt: skip
    assert not workspace.any(), "a partial result is left for the next launch"
    return out, torch.from_numpy(lse)


def check(config, made, case: Problem, q: torch.Tensor, grid: int = 3, **options) -> None:
    out, lse = execute(config, made, case, q, grid, **options)
    options.pop("async_copies", None)
    tolerance = 4e-3 if q.dtype == torch.bfloat16 else 1e-3  # bf16: the rounding of out
    for b, (k, v) in enumerate(case.values):
        want, want_lse = attention(q[b], k, v, **options)
        assert relative_error(out[b], want) < tolerance, f"sequence {b} of {len(k)} tokens"
        torch.testing.assert_close(lse[b].double(), want_lse, atol=LSE_TOLERANCE, rtol=1e-4)


RAGGED = [(0, 0), (129, 3), (384, 20)]
CASES = [(d, i) for d in compiler.MANIFEST_HEAD_DIMS for i in range(len(compiler.manifest_specs(d)))]
# every format with every head_dim
CASES = [(arch_in_turn(n), d, i) for n, (d, i) in enumerate(CASES)]


@pytest.mark.parametrize(("arch", "head_dim", "index"), CASES)
def test_every_format(arch: str, head_dim: int, index: int) -> None:
    spec = compiler.manifest_specs(head_dim)[index]
    dtype = (torch.float16, torch.bfloat16)[index % 2]
    group = group_of(index)
    config, made = kernel(arch, spec, head_dim, group)
    case = problem(RAGGED, spec, heads=1, head_dim=head_dim, num_sink=3 * (index % 3), dtype=dtype)
    check(config, made, case, random_q(3, 1, group, head_dim, dtype), async_copies=("late", "early")[index % 2])


@pytest.mark.parametrize("arch", ARCHS)
def test_options(arch: str) -> None:
    spec = bd.QuantSpec()
    case = problem([(400, 30), (700, 0)], spec, heads=2, head_dim=128, num_sink=4)
    config, made = kernel(arch, spec, 128, 1)
    logits = torch.tensor([0.5, -1.0])
    check(config, made, case, random_q(2, 1, 2, 128), window=300, softcap=5.0, sink_logits=logits, grid=4)


@pytest.mark.parametrize(("group", "q_len"), [(5, 3), (16, 1), (7, 1)])
def test_query_tiles(group: int, q_len: int) -> None:
    spec = bd.preset("kv4")[0].for_kernel()
    config, made = kernel("sm90a", spec, 64, group, q_len)
    case = problem([(256, 40), (0, 2)], spec, heads=1, head_dim=64)
    check(config, made, case, random_q(2, q_len, group, 64), window=100 if q_len > 1 else None)


PRESETS = {name: bd.preset(name, 128)[0].for_kernel() for name in ("kv8", "kv4", "k4v2", "kv2", "kc4", "kc2")}


@pytest.mark.parametrize(
    ("preset", "head_dim", "group", "q_len", "options"),
    [
        ("kc4", 128, 16, 1, {}),
        ("kv4", 128, 8, 3, {"window": 100}),
        ("kv2", 128, 8, 8, {}),
        ("kc2", 128, 5, 5, {"softcap": 5.0, "sink_logits": torch.linspace(-1, 2, 5)}),
        ("kv8", 64, 9, 3, {}),
        ("k4v2", 64, 3, 4, {}),
        ("kv8", 128, 7, 9, {"window": 200}),
        ("kc4", 128, 16, 8, {}),
        ("k4v2", 64, 5, 9, {"softcap": 5.0}),
        ("kv4", 64, 8, 2, {"softcap": 5.0, "window": 300}),
    ],
)
def test_many_query_columns(preset: str, head_dim: int, group: int, q_len: int, options: dict) -> None:
    """wgmma: one or two warpgroups to a block, or tiles; several pieces and partial results, 16-bit tokens, empty
    sequences.
    """
    spec = bd.preset(preset, head_dim)[0].for_kernel()
    config, made = kernel("sm90a", spec, head_dim, group, q_len)
    assert config.mma == "wgmma"
    index = list(PRESETS).index(preset)
    dtype = (torch.float16, torch.bfloat16)[index % 2]
    case = problem(
        [(0, 0), (385, 20), (129, 0)], spec, heads=1, head_dim=head_dim, num_sink=2 * (index % 3), dtype=dtype
    )
    copies = ("late", "early")[index % 2]
    check(config, made, case, random_q(3, q_len, group, head_dim, dtype), grid=2, async_copies=copies, **options)


@pytest.mark.parametrize(("preset", "head_dim"), [("kc4", 128), ("kv4", 64)])
def test_sixteen_columns_have_scaled_queries(preset: str, head_dim: int) -> None:
    """So many blocks that the slots of scaled queries are filled again; with keys rounded to fp16 8.8e-4 or more."""
    config, made = kernel("sm90a", bd.preset(preset, head_dim)[0].for_kernel(), head_dim, 16)
    assert config.mma == "wgmma"
    case = problem([(1900, 0)], config.quant, heads=1, head_dim=head_dim)
    q = random_q(1, 1, 16, head_dim)
    out, _ = execute(config, made, case, q, grid=1)
    want, _ = attention(q[0], *case.values[0])
    assert relative_error(out[0], want) < 5e-4


@pytest.mark.parametrize("group", [3, 16])
def test_small_values(group: int) -> None:
    """Whose scales at 8 bits are below the normal numbers of fp16."""
    spec = PRESETS["kv8"]
    config, made = kernel("sm90a", spec, 64, group)
    case = problem([(128, 0)], spec, heads=1, head_dim=64, v_factor=2e-3)
    check(config, made, case, random_q(1, 1, group, 64), grid=1)


@pytest.mark.parametrize("group", [16, 40])
def test_keys_per_token_are_rounded_once(group: int) -> None:
    """Scale, zero and mean one after the other would be 1.2 to 1.4e-3 here: codes as A registers, and tiles."""
    config, made = kernel("sm90a", bd.preset("kv2", 64)[0].for_kernel(), 64, group)
    assert config.mma == "wgmma"
    case = problem([(384, 0)], config.quant, heads=1, head_dim=64)
    q = random_q(1, 1, group, 64)
    out, _ = execute(config, made, case, q, grid=1)
    want, _ = attention(q[0], *case.values[0])
    assert relative_error(out[0], want) < 9e-4


@pytest.mark.parametrize(("head_dim", "heads", "dtype"), [(64, 3, torch.float16), (128, 4, torch.bfloat16)])
@pytest.mark.parametrize("grid", [1, 5])
def test_rotation_of_queries_and_outputs(head_dim: int, heads: int, dtype: torch.dtype, grid: int) -> None:
    spec = bd.preset("kv4", head_dim)[0].for_kernel()
    config, made = kernel("sm90a", spec, head_dim, heads)
    case = problem([(300, 20), (0, 0)], spec, heads=1, head_dim=head_dim, dtype=dtype)
    q = random_q(2, 1, heads, head_dim, dtype)
    out, _ = execute(config, made, case, q, grid, rotate=True)
    for b, (k, v) in enumerate(case.values):
        want = bd.hadamard(attention(bd.hadamard(q[b]), k, v)[0].float())
        assert relative_error(out[b], want) < (1e-3 if dtype == torch.float16 else 4e-3)


def test_mean_of_keys_per_channel() -> None:
    """No build has this format. The warps of a block share its mean, whichever groups their tokens are in."""
    spec = bd.QuantSpec(k_group=32, k_mean="block", v_group=64)
    config = choose("sm86", spec, 64, 3)
    assert config.warps_per_block > 1
    case = problem(RAGGED, spec, heads=1, head_dim=64)
    check(config, compiler.compile_config(config), case, random_q(3, 1, 3, 64))


@pytest.mark.parametrize(("grid", "tokens"), [(1, 1300), (2, 1300), (7, 1300), (24, 700)])  # 24: some CTAs get nothing
def test_any_grid_gives_the_same_attention(grid: int, tokens: int) -> None:
    spec = bd.QuantSpec(k_group=32, v_group=32)
    config, made = kernel("sm90a", spec, 64, 4)
    case = problem([(tokens, 0), (0, 0), (5, 0), (128, 100)], spec, heads=2, head_dim=64)
    check(config, made, case, random_q(4, 1, 8, 64), grid=grid)


@pytest.mark.parametrize(
    ("tokens", "heads", "grid"),
    [
        ([900, 900], 1, 9),  # alike: each divided among some CTAs, one of which gets nothing
        ([500, 500], 2, 5),  # alike and short: whole
        ([5000, 1300], 1, 6),  # the last CTAs get less
        ([2600, 100], 1, 22),  # more partial results than a row of 64 has lanes
        ([4096], 2, 1),  # as many blocks as a warp has lanes, which hold entries of the table; then the next head's
    ],
)
def test_shares(tokens: list[int], heads: int, grid: int) -> None:
    spec = bd.QuantSpec(v_group=64)
    config, made = kernel("sm90a", spec, 64, 4)
    case = problem([(n, 0) for n in tokens], spec, heads=heads, head_dim=64)
    check(config, made, case, random_q(len(tokens), 1, 4 * heads, 64), grid=grid)


@pytest.mark.parametrize(("group", "q_len"), [(13, 1), (5, 5), (5, 7)])
def test_partial_results_of_many_rows_in_a_tree(group: int, q_len: int) -> None:
    spec = bd.preset("kc2", 64)[0].for_kernel()
    config, made = kernel("sm90a", spec, 64, group, q_len)
    assert config.mma == "wgmma"
    case = problem([(2240, 30), (300, 0)], spec, heads=1, head_dim=64)
    check(config, made, case, random_q(2, q_len, group, 64), grid=21)


def test_a_kernel_that_no_pack_holds_is_compiled_once(tmp_path, monkeypatch) -> None:
    """What decode does on a GPU for an unusual format: compile, keep, register. Loading needs no GPU."""
    from bitdecoding import cuda

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = bd.QuantSpec(k_bits=8, v_bits=2, k_axis="token", k_group=32, v_group=32, k_mean="block")
    config = bd.KernelConfig.for_problem(head_dim=96, quant=spec, num_q_heads=3, num_kv_heads=1, arch="sm90a")
    handle = cuda.kernel_handle(config)
    assert handle >= 0
    assert cuda.kernel_handle(config) == handle
    (pack,) = tmp_path.rglob("*.bdpack")
    assert config.name() in pack.name
