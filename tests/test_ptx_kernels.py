"""PTX that the CuTe DSL emits for the operations of cute_kernels/ptx.py, run by the interpreter; and the same PTX with
a line taken out, which the interpreter must notice.
"""

import re

import numpy as np
import pytest

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from bitdecoding.cute_kernels import ptx
from bitdecoding.cute_kernels import warpgroup as wg
from cutlass import Float32, Int32, Int64, Uint8, cute, range_constexpr
from dsl import compile_kernel
from ptx_interpreter import BarrierMisuse, CopyInFlight, Deadlock, Memory, PtxError, Race, Uninitialised, run

STAGES = 2
STAGE_BYTES = 512  # 16 per lane
FULL, EMPTY = STAGES * STAGE_BYTES, STAGES * STAGE_BYTES + 8 * STAGES
RING_SMEM = EMPTY + 8 * STAGES


def launch(
    kernel, words: np.ndarray, n: int, threads: int, grid: int = 1, smem: int = 0, arch: str = "sm_90a", **options
):
    """Compile and interpret; the results are in ``words``."""
    interpret(compile_kernel(kernel, threads, arch=arch, smem=smem).ptx, words, n, threads, grid, smem, **options)


def interpret(text: str, words: np.ndarray, n: int, threads: int, grid: int = 1, smem: int = 0, **options):
    memory = Memory()
    return run(text, None, (grid,), (threads,), [memory.add(words), n], smem, memory, **options)


def without(text: str, pattern: str, which: int = 0) -> str:
    """The PTX without one match of a pattern."""
    match = list(re.finditer(pattern, text))[which]
    return text[: match.start()] + text[match.end() :]


# -- arithmetic, loops, lanes --------------------------------------------------------------------------------------


@cute.kernel
def scaled_add(data: cute.Pointer, n: Int32):
    """x[i] = 2 x[i] + i for i < n."""
    i = cute.arch.block_idx()[0] * cute.arch.block_dim()[0] + cute.arch.thread_idx()[0]
    if i < n:
        at = data.toint() + Int64(i) * 4
        x = ptx.from_bits(ptx.load_global(at, cache="cg")[0])
        ptx.store_global(at, [x * 2.0 + Float32(i)])


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100f", "sm_120f"])
def test_elementwise_with_a_ragged_end(arch):
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    expected = 2 * x + np.arange(100, dtype=np.float32)
    expected[90:] = x[90:]
    launch(scaled_add, x, 90, threads=64, grid=2, arch=arch)
    assert np.allclose(x, expected, rtol=1e-6)


@cute.kernel
def loops(data: cute.Pointer, n: Int32):
    """Per lane: Collatz steps of its number, and the odd ones of them * 1000 + 0 + 1 + ... + n - 1."""
    i = cute.arch.thread_idx()[0]
    value = i + 1
    steps = Int32(0)
    odd = Int32(0)
    while value != 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
            odd += 1
        steps += 1
    total = Int32(0)
    for j in range(n):
        total += j
    ptx.store_global(data.toint() + Int64(i) * 8, [steps, odd * 1000 + total])


def test_dynamic_loops_and_branches():
    words = np.zeros((64, 2), np.uint32)
    launch(loops, words, 10, threads=64)

    def collatz(n):
        steps = odd = 0
        while n != 1:
            odd += n % 2
            n = 3 * n + 1 if n % 2 else n // 2
            steps += 1
        return [steps, odd * 1000 + 45]

    assert words.tolist() == [collatz(i + 1) for i in range(64)]


@cute.kernel
def lanes(data: cute.Pointer, n: Int32):
    lane = cute.arch.thread_idx()[0]
    total = lane + n
    for i in range_constexpr(5):
        total += ptx.shuffle_xor(total, 1 << i)
    picked = ptx.shuffle(lane * 3, Int32(7))
    first = ptx.first_lane(lane > 10)
    none = ptx.first_lane(lane > 100)
    upper = Int32(0)
    if ptx.any_lane(lane == n):
        upper = ptx.shuffle_up(lane, 2)
    ptx.store_global(data.toint() + Int64(lane) * 16, [total, picked, first, upper + none])


def test_lane_operations():
    words = np.zeros((32, 4), np.int32)
    launch(lanes, words, 5, threads=32)
    up = [i - 2 if i >= 2 else i for i in range(32)]
    assert words.tolist() == [[496 + 160, 21, 11, up[i] - 1] for i in range(32)]


@cute.kernel
def functions(data: cute.Pointer, n: Int32):
    """Per lane 8 floats of one: exp2, log2, reciprocal, min(1); fp16 squares; bf16 of it and of -3 times it."""
    at = data.toint() + Int64(cute.arch.thread_idx()[0]) * 32
    x = ptx.from_bits(ptx.load_global(at, cache="cg")[0])
    low, high = ptx.half2_floats(ptx.mul_half2(ptx.to_half2(x, -x), ptx.to_half2(x, x)))
    down, up = ptx.bfloat2_floats(ptx.to_bfloat2(x, x * -3.0))
    ptx.store_global(at, [ptx.exp2(x), ptx.log2(ptx.fabs(x)), ptx.reciprocal(x), ptx.fmin(x, Float32(1.0))])
    ptx.store_global(at, [low, high, down, up], 16)


def test_functions():
    x = np.zeros((32, 8), np.float32)
    x[:, 0] = np.linspace(-4, 4, 32)
    values = x[:, 0].copy()
    launch(functions, x, 0, threads=32)
    square = np.float16(values) * np.float16(values)
    expected = [np.exp2(values), np.log2(abs(values)), 1 / values, np.minimum(values, 1), square, -square]
    assert np.allclose(x[:, :6], np.stack(expected, 1), rtol=1e-6)
    assert np.allclose(x[:, 6:], np.stack([values, -3 * values], 1), rtol=2.0**-8)
    assert (x[:, 6:].view(np.uint32) & 0xFFFF == 0).all()


@cute.kernel
def transposed_product(data: cute.Pointer, n: Int32):
    """A B by one warp, stored transposed; per lane 4 registers of A, whose low nibbles count, and 2 of B."""
    at = data.toint() + Int64(cute.arch.thread_idx()[0]) * 32
    a = ptx.load_global(at, 4, cache="cg")
    b = ptx.load_global(at, 2, 16, cache="cg")
    c = ptx.mma([Float32(0.0)] * 4, [x & 0x000F000F for x in a], b)
    c = [x * 2.0**24 for x in c]
    halves = [ptx.transpose8x8(ptx.to_half2(c[2 * r], c[2 * r + 1])) for r in range(2)]
    ptx.store_global(at, halves)


def test_codes_as_denormals_through_mma_and_movmatrix():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, (32, 8), dtype=np.uint32)
    b = rng.integers(-8, 9, (16, 8))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    a = np.zeros((16, 16))
    for r in range(4):
        for e in range(2):
            a[g + 8 * (r & 1), 2 * t + e + 8 * (r >> 1)] = words[:, r] >> np.uint32(16 * e) & 15
    for r in range(2):
        pair = np.stack([b[2 * t + e + 8 * r, g] for e in range(2)], 1).astype(np.float16)
        words[:, 4 + r] = pair.view(np.uint32).reshape(32)
    launch(transposed_product, words, 0, threads=32)
    got = words[:, :2].copy().view(np.float16).reshape(32, 2, 2)
    c = a @ b  # below 2048: exact in fp16
    for r in range(2):
        for e in range(2):
            assert np.array_equal(got[:, r, e], c[8 * r + 2 * t + e, g])


# -- a CTA: barriers and rings -------------------------------------------------------------------------------------


@cute.kernel
def tree_sum(data: cute.Pointer, n: Int32):
    """x[0] = sum of the 128 words, by a tree in shared memory."""
    thread = cute.arch.thread_idx()[0]
    smem = cute.arch.get_dyn_smem(Uint8, alignment=128).toint()
    value = ptx.load_global(data.toint() + Int64(thread) * 4, cache="cg")[0]
    ptx.store_shared(smem + thread * 4, 0, [ptx.from_bits(value)])
    width = Int32(64)
    while width > 0:
        cute.arch.sync_threads()
        if thread < width:
            total = ptx.load_shared(smem + thread * 4, 0, 1)[0] + ptx.load_shared(smem + (thread + width) * 4, 0, 1)[0]
            ptx.store_shared(smem + thread * 4, 0, [ptx.from_bits(total)])
        width = width // 2
    if thread == 0:
        ptx.store_global(data.toint(), [ptx.load_shared(smem, 0, 1)[0]])


def test_tree_reduction():
    made = compile_kernel(tree_sum, 128, smem=512)
    for seed in (None, 0, 1, 2):
        words = np.arange(128, dtype=np.uint32)
        interpret(made.ptx, words, 0, 128, smem=512, seed=seed)
        assert words[0] == 128 * 127 // 2
    with pytest.raises((Race, Uninitialised)):
        interpret(without(made.ptx, r"bar\.sync[^;]*;"), np.arange(128, dtype=np.uint32), 0, 128, smem=512)


@cute.jit
def ring_consumer(data: cute.Pointer, smem: Int32, lane: Int32, n: Int32):
    """Add up the lane's first word of all n stages and store it behind the n stages."""
    total = Int32(0)
    for i in range(n):
        stage = i % STAGES
        ptx.mbarrier_wait(smem + FULL + 8 * stage, i // STAGES % 2, "try_wait")
        total += ptx.load_shared(smem + stage * STAGE_BYTES + lane * 16, 0, 4)[0]
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(smem + EMPTY + 8 * stage)
    ptx.store_global(data.toint() + Int64(n) * STAGE_BYTES + Int64(lane) * 4, [total])


@cute.jit
def ring_barriers(smem: Int32, thread: Int32, producers: int):
    if thread == 0:
        for stage in range_constexpr(STAGES):
            ptx.mbarrier_init(smem + (FULL + 8 * stage), producers)
            ptx.mbarrier_init(smem + (EMPTY + 8 * stage), 1)
        ptx.fence_mbarrier_init()
    cute.arch.sync_threads()


@cute.kernel
def bulk_ring(data: cute.Pointer, n: Int32):
    """Warp 1 fills a ring by bulk copies, warp 0 reads it."""
    thread = cute.arch.thread_idx()[0]
    smem = cute.arch.get_dyn_smem(Uint8, alignment=128).toint()
    ring_barriers(smem, thread, 1)
    if thread == 32:
        for i in range(n):
            stage = i % STAGES
            ptx.mbarrier_wait(smem + EMPTY + 8 * stage, (i // STAGES + 1) % 2, "try_wait")
            ptx.mbarrier_expect(smem + FULL + 8 * stage, STAGE_BYTES)
            source = data.toint() + Int64(i) * STAGE_BYTES
            ptx.bulk_copy(smem + stage * STAGE_BYTES, source, STAGE_BYTES, smem + FULL + 8 * stage)
    if thread < 32:
        ring_consumer(data, smem, thread, n)


@cute.kernel
def cp_async_ring(data: cute.Pointer, n: Int32):
    """Warp 1 fills a ring by ``cp.async``, warp 0 reads it."""
    thread = cute.arch.thread_idx()[0]
    smem = cute.arch.get_dyn_smem(Uint8, alignment=128).toint()
    ring_barriers(smem, thread, 32)
    if thread >= 32:
        lane = thread - 32
        for i in range(n):
            stage = i % STAGES
            ptx.mbarrier_wait(smem + EMPTY + 8 * stage, (i // STAGES + 1) % 2, "try_wait")
            source = data.toint() + Int64(i) * STAGE_BYTES + Int64(lane) * 16
            ptx.copy16(smem + stage * STAGE_BYTES + lane * 16, source, 0)
            ptx.mbarrier_arrive_after_copies(smem + FULL + 8 * stage)
    else:
        ring_consumer(data, smem, thread, n)


def ring_words(n: int) -> np.ndarray:
    return np.concatenate([np.arange(n * STAGE_BYTES // 4), np.zeros(32)]).astype(np.uint32)


@pytest.fixture(scope="module", params=["bulk", "cp.async"])
def ring(request):
    return request.param, compile_kernel(
        {"bulk": bulk_ring, "cp.async": cp_async_ring}[request.param], 64, smem=RING_SMEM
    ).ptx


def run_ring(text: str, n: int = 5, **options) -> None:
    words = ring_words(n)
    statistics = interpret(text, words, n, 64, smem=RING_SMEM, count_conflicts=True, **options)
    assert words[-32:].tolist() == [sum(128 * i + 4 * lane for i in range(n)) for lane in range(32)]
    assert not any(statistics.shared_wavefronts.values())


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("async_copies", ["late", "early"])
def test_ring(ring, async_copies, seed):
    for n in (0, 1, 2, 5):
        run_ring(ring[1], n, async_copies=async_copies, seed=seed)


@pytest.mark.parametrize("async_copies", ["late", "early"])
def test_a_ring_with_a_line_missing(ring, async_copies):
    kind, text = ring
    run_ring(text, async_copies=async_copies)
    ignored = re.sub(r"selp\.b32 (%r\d+), 1, 0, p;", r"mov.b32 \1, 1;", text)  # the answers of all waits
    assert ignored != text
    with pytest.raises((Race, CopyInFlight, Uninitialised, BarrierMisuse)):
        run_ring(ignored, async_copies=async_copies)
    arrive = {"bulk": r"mbarrier\.arrive\.expect_tx[^;]*;", "cp.async": r"cp\.async\.mbarrier\.arrive[^;]*;"}[kind]
    with pytest.raises((Deadlock, PtxError)):
        run_ring(without(text, arrive), async_copies=async_copies)
    with pytest.raises(Deadlock, match="mbarrier at offset"):
        run_ring(without(text, r"mbarrier\.arrive\.shared[^;]*;"), async_copies=async_copies)
    with pytest.raises(Race, match="write of shared bytes that warp 0 read"):
        run_ring(without(text, r"bar\.warp\.sync[^;]*;"), async_copies=async_copies)
    with pytest.raises((Race, BarrierMisuse)):
        run_ring(without(text, r"bar\.sync[^;]*;"), async_copies=async_copies)


# -- warpgroups ------------------------------------------------------------------------------------------------------

WIDE_COLUMNS, WIDE_STEPS = 24, 3
WIDE_SMEM = WIDE_STEPS * 16 * WIDE_COLUMNS * 2


@cute.kernel
def warpgroup_product(data: cute.Pointer, n: Int32):
    """A B by wgmma, with B stored by stmatrix; doubled if there is a thread n.

    Per thread 12 registers of A (three k steps) and 6 of B in accumulator order; results: 12 floats of A B.
    """
    thread = cute.arch.thread_idx()[0]
    smem = cute.arch.get_dyn_smem(Uint8, alignment=128).toint()
    at = data.toint() + Int64(thread) * (4 * 48)
    a = [x for i in range(WIDE_STEPS) for x in ptx.load_global(at, 4, 16 * i, cache="cg")]
    lane, warp = thread % 32, thread // 32
    k_step = WIDE_COLUMNS // 8 * wg.CORE_BYTES
    if warp < WIDE_STEPS:  # warp w has tokens 16 w .. 16 w + 15 of B^T [token, column] as an accumulator
        b = [x for i in range(WIDE_COLUMNS // 8) for x in ptx.load_global(at, 2, 48 + 8 * i, cache="cg")]
        row = smem + warp * (2 * k_step) + (lane >> 3 & 1) * k_step + (lane & 7) * wg.CORE_ROW_BYTES
        wg.store_matrices(row + (lane >> 4) * wg.CORE_BYTES, 0, b[:4])
        wg.store_matrices(row, 2 * wg.CORE_BYTES, b[4:])
    wg.fence_async()
    over = wg.barrier_any(Int32(1), 128, thread == n)
    acc = None
    operand = wg.descriptor(wg.uniform(smem), WIDE_COLUMNS // 8)
    a = wg.pin(a)
    wg.fence()
    for i in range_constexpr(WIDE_STEPS):
        acc = wg.mma(acc, a[4 * i : 4 * i + 4], operand + i * (2 * k_step // wg.DESCRIPTOR_UNIT), WIDE_COLUMNS)
    wg.commit()
    wg.wait(0)
    acc = wg.pin(acc)
    if over:
        acc = [x * 2.0 for x in acc]
    for i in range_constexpr(0, WIDE_COLUMNS // 2, 4):
        ptx.store_global(at, acc[i : i + 4], 4 * i)


def test_warpgroup_product():
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (64, 16 * WIDE_STEPS)).astype(np.float16)
    b = rng.integers(-4, 5, (16 * WIDE_STEPS, WIDE_COLUMNS)).astype(np.float16)
    words = np.zeros((4, 32, 48), np.uint32)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    for w in range(4):
        for k in range(WIDE_STEPS):
            for r in range(4):
                pair = [a[16 * w + g + 8 * (r & 1), 16 * k + 2 * t + e + 8 * (r >> 1)] for e in range(2)]
                words[w, :, 4 * k + r] = np.stack(pair, 1).view(np.uint32).reshape(32)
    for w in range(WIDE_STEPS):
        for n in range(WIDE_COLUMNS // 8):
            for r in range(2):
                pair = [b[16 * w + g + 8 * r, 8 * n + 2 * t + e] for e in range(2)]
                words[w, :, 12 + 2 * n + r] = np.stack(pair, 1).view(np.uint32).reshape(32)
    want = a.astype(np.float64) @ b
    made = compile_kernel(warpgroup_product, 128, smem=WIDE_SMEM)

    def product(text: str, n: int = 200, **options) -> np.ndarray:
        data = words.copy()
        interpret(text, data, n, 128, smem=WIDE_SMEM, **options)
        got = data[:, :, : WIDE_COLUMNS // 2].copy().view(np.float32)
        out = np.zeros((64, WIDE_COLUMNS))
        for w in range(4):
            for i in range(WIDE_COLUMNS // 2):
                out[16 * w + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2] = got[w, :, i]
        return out

    for copies in ("late", "early"):
        assert np.array_equal(product(made.ptx, async_copies=copies), want)
    assert np.array_equal(product(made.ptx, n=77), 2 * want)  # one thread's vote
    with pytest.raises(Race, match="no proxy fence"):
        product(without(made.ptx, r"fence\.proxy\.async[^;]*;"))
    with pytest.raises(BarrierMisuse, match="no wgmma.fence"):
        product(without(made.ptx, r"wgmma\.fence[^;]*;"))
    with pytest.raises((Race, Uninitialised)):
        product(re.sub(r"bar(rier)?\S*red\S* *\t*(%p\d+),[^;]*;", r"setp.ne.b32 \2, 0, 0;", made.ptx))
    assert np.isnan(product(without(made.ptx, r"wgmma\.wait_group[^;]*;"))).all()


# -- CTAs and kernels that depend on each other --------------------------------------------------------------------


@cute.kernel
def last_arriver(data: cute.Pointer, n: Int32):
    """Words: counter, sum, n partial results. The CTA that arrives last adds up the partial results."""
    cute.arch.griddepcontrol_wait()
    cta = cute.arch.block_idx()[0]
    if cute.arch.thread_idx()[0] == 0:
        partial = data.toint() + 8
        ptx.store_global(partial + Int64(cta) * 4, [cta * cta + 1])
        if ptx.atomic_add(data.toint(), Int32(1)) == n - 1:
            total = Int32(0)
            for i in range(n):
                total += ptx.load_global(partial + Int64(i) * 4, cache="cg")[0]
            ptx.store_global(data.toint() + 4, [total])
            ptx.store_global(data.toint(), [Int32(0)])
    cute.arch.griddepcontrol_launch_dependents()


def test_last_arriver():
    made = compile_kernel(last_arriver, 32, pdl=True)
    assert "griddepcontrol.wait" in made.ptx
    for order in ("interleaved", "sequential", "reversed"):
        words = np.zeros(8, np.uint32)
        for _ in range(2):  # the counter is left as it was
            interpret(made.ptx, words, 6, 32, grid=6, cta_order=order)
            assert words[:2].tolist() == [0, sum(i * i + 1 for i in range(6))]
    with pytest.raises(Race, match="read of bytes of 'buffer 0' that another warp wrote"):
        interpret(made.ptx.replace("atom.acq_rel.gpu", "atom.relaxed.gpu"), np.zeros(8, np.uint32), 6, 32, grid=6)
