"""The PTX-level operations of the kernels, in one place; everything else of a kernel is DSL arithmetic.

Warp collectives go through NVVM intrinsics, because LLVM must know that they are convergent; loads, barriers
and copies are inline PTX. A register of two fp16 ("half2") is an Int32. Shared-memory addresses are Int32,
global ones Int64. PTX ISA: "mma.m16n8k16", "movmatrix", "mbarrier", "cp.async", "cp.async.bulk".
"""

from cutlass import Boolean, Float32, Int32, Int64, cute
from cutlass import select_ as cutlass_select
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op

asm = cute.arch.inline_ptx
SHARED_SPACE = 3  # address space of LLVM
LANE_BITS = (1, 2, 4, 8, 16)  # of a lane's index in its warp


@dsl_user_op
def mma(c: list, a: list, b: list, *, loc=None, ip=None) -> list:
    """A B + C of ``mma.m16n8k16``: a 4 half2, b 2 half2, c 4 floats -> 4 floats."""
    half2 = ir.VectorType.get([2], T.f16())
    at = dict(loc=loc, ip=ip)
    d = nvvm.mma_sync(
        llvm.StructType.get_literal([T.f32()] * 4),
        ir.Attribute.parse("#nvvm.shape<m = 16, n = 8, k = 16>"),
        nvvm.MMALayout.row,
        nvvm.MMALayout.col,
        [llvm.bitcast(half2, Int32(x).ir_value(**at), **at) for x in a],
        [llvm.bitcast(half2, Int32(x).ir_value(**at), **at) for x in b],
        [Float32(x).ir_value(**at) for x in c],
        multiplicand_a_ptx_type=nvvm.MMATypes.f16,  # without explicit types the DSL aborts
        multiplicand_b_ptx_type=nvvm.MMATypes.f16,
        **at,
    )
    return [Float32(llvm.extractvalue(T.f32(), d, [i], **at)) for i in range(4)]


@dsl_user_op
def transpose8x8(x: Int32, *, loc=None, ip=None) -> Int32:
    """``movmatrix.trans`` of an 8x8 fp16 matrix held in MMA fragment order."""
    shape = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m = 8, n = 8>")
    kind = nvvm.LdStMatrixEltType.B16
    at = dict(loc=loc, ip=ip)
    return Int32(nvvm.movmatrix(Int32(x).ir_value(**at), shape, kind, layout=nvvm.MMALayout.col, **at))


@dsl_user_op
def load_matrices(address: Int32, transposed: bool, *, loc=None, ip=None) -> list:
    """``ldmatrix.x4``: four 8x8 matrices of 16 bit in fragment order, one register each; lane i gives the address
    of row i % 8 of matrix i / 8 in shared memory. transposed: a lane gets two rows of a column.
    """
    at = dict(loc=loc, ip=ip)
    pointer = llvm.inttoptr(llvm.PointerType.get(SHARED_SPACE), Int32(address).ir_value(**at), **at)
    layout = nvvm.MMALayout.col if transposed else nvvm.MMALayout.row
    got = nvvm.ldmatrix(pointer, 4, layout, results=[llvm.StructType.get_literal([T.i32()] * 4)], **at)
    return [Int32(llvm.extractvalue(T.i32(), got, [i], **at)) for i in range(4)]


# -- arithmetic ------------------------------------------------------------------------------------------------


def exp2(x: Float32) -> Float32:
    return asm("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def log2(x: Float32) -> Float32:
    return asm("lg2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def reciprocal(x: Float32) -> Float32:
    return asm("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def fmax(a: Float32, b: Float32) -> Float32:
    return asm("max.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def fmin(a: Float32, b: Float32) -> Float32:
    return asm("min.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def fabs(x: Float32) -> Float32:
    return asm("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def add(a: Float32, b: Float32) -> Float32:
    """a + b, rounded; as the next three, never fused with what comes before or after."""
    return asm("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def subtract(a: Float32, b: Float32) -> Float32:
    return asm("sub.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def multiply(a: Float32, b: Float32) -> Float32:
    return asm("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def fused(a: Float32, b: Float32, c: Float32) -> Float32:
    """a b + c, rounded once."""
    return asm("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def divide(a: Float32, b: Float32) -> Float32:
    return asm("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def subtract_saturated(a: Float32, b: Float32) -> Float32:
    """a - b, rounded, then clamped to 0 .. 1."""
    return asm("sub.rn.sat.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def bits(x: Float32) -> Int32:
    return asm("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


def from_bits(x: Int32) -> Float32:
    return asm("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def floating(x: Int32) -> Float32:
    return asm("cvt.rn.f32.s32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def truncated(x: Float32) -> Int32:
    return asm("cvt.rzi.s32.f32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


def unsigned_min(a: Int32, b: Int32) -> Int32:
    return asm("min.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[a, b])


def sign_mask(x: Int32) -> Int32:
    """-1 where x is negative, else 0; not to be taken for a select."""
    return asm("shr.s32 {$w0}, {$r0}, 31;", write_only_types=[Int32], read_only_args=[x])


def mul_half2(a: Int32, b: Int32) -> Int32:
    """a b; b may be a constant, which the instruction takes from a register only."""
    return asm(
        "{ .reg .b32 b; mov.b32 b, {$r1}; mul.rn.f16x2 {$w0}, {$r0}, b; }",
        write_only_types=[Int32],
        read_only_args=[a, b],
    )


def product_error_half2(a: Int32, b: Int32, product: Int32) -> Int32:
    """a b - product: what mul_half2 rounded away, exact unless it is below fp16's range."""
    return asm(
        "{ .reg .b32 n; neg.f16x2 n, {$r2}; fma.rn.f16x2 {$w0}, {$r0}, {$r1}, n; }",
        write_only_types=[Int32],
        read_only_args=[a, b, product],
    )


def min_max(a: Int32, b: Int32, bfloat: bool, function: str) -> Int32:
    """``function`` ("min" or "max") of two registers of two fp16 or bf16; NaN if one is."""
    kind = "bf16x2" if bfloat else "f16x2"
    return asm(f"{function}.NaN.{kind} {{$w0}}, {{$r0}}, {{$r1}};", write_only_types=[Int32], read_only_args=[a, b])


def to_half2(low: Float32, high: Float32) -> Int32:
    return asm("cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[low, high])


def to_bfloat2(low: Float32, high: Float32) -> Int32:
    return asm("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[low, high])


def to_integer(x: Float32) -> Int32:
    """Rounded to nearest even; the nearest integer that there is beyond the range, 0 for NaN."""
    return asm("cvt.rni.s32.f32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


def pack_integers(low: Int32, high: Int32, above: Int32, bits: int) -> Int32:
    """Two integers saturated to unsigned ones of 2, 4 or 8 bits: low, high, then the lower bits of ``above``."""
    return asm(
        f"cvt.pack.sat.u{bits}.s32.b32 {{$w0}}, {{$r1}}, {{$r0}}, {{$r2}};",
        write_only_types=[Int32],
        read_only_args=[low, high, above],
    )


def half2_floats(x: Int32) -> tuple:
    """The two fp16 of a register as fp32: (lower, upper)."""
    return asm(
        "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, {$r0}; cvt.f32.f16 {$w0}, lo; cvt.f32.f16 {$w1}, hi; }",
        write_only_types=[Float32, Float32],
        read_only_args=[x],
    )


def bfloat2_floats(x: Int32) -> tuple:
    """The two bf16 of a register as fp32: (lower, upper)."""
    return from_bits(x << 16), from_bits(x & -0x10000)


# -- warp ------------------------------------------------------------------------------------------------------


def shuffle(value, lane: Int32):
    return cute.arch.shuffle_sync(value, lane)


def shuffle_xor(value, mask: int):
    return cute.arch.shuffle_sync_bfly(value, mask)


def over_lanes(function, x, masks):
    """A function of two values over x of all lanes that differ in the bits ``masks`` only; each of them gets it."""
    for mask in masks:
        x = function(x, shuffle_xor(x, mask))
    return x


def largest_bits(x: Float32) -> Int32:
    """The bits of the warp's largest x, none of which is negative: their order is that of their bits."""
    return asm("redux.sync.max.u32 {$w0}, {$r0}, -1;", write_only_types=[Int32], read_only_args=[bits(x)])


def shuffle_up(value, delta: int):
    """Value of lane - delta; lanes below delta keep their own."""
    return cute.arch.shuffle_sync_up(value, delta, mask_and_clamp=0)


def any_lane(condition: Boolean) -> Boolean:
    return cute.arch.vote_any_sync(condition)


def first_lane(condition: Boolean) -> Int32:
    """The lowest lane whose condition holds; -1 where none does."""
    ballot = cute.arch.vote_ballot_sync(condition)
    return asm(
        "{ .reg .b32 t; brev.b32 t, {$r0}; bfind.shiftamt.u32 {$w0}, t; }",
        write_only_types=[Int32],
        read_only_args=[ballot],
    )


# -- memory ----------------------------------------------------------------------------------------------------


def load_shared(address: Int32, offset: int, words: int) -> list:
    """4, 8 or 16 bytes (``words`` registers) at address + offset."""
    regs = ",".join(f"{{$w{i}}}" for i in range(words))
    vector, operand = (f".v{words}", "{" + regs + "}") if words > 1 else ("", regs)
    got = asm(
        f"ld.shared{vector}.b32 {operand}, [{{$r0}}+{offset}];",
        write_only_types=[Int32] * words,
        read_only_args=[address],
    )
    return list(got) if words > 1 else [got]


def load_shared_floats(address: Int32, offset: int, count: int) -> list:
    return [from_bits(x) for x in load_shared(address, offset, count)]


def store_shared(address: Int32, offset: int, values: list) -> None:
    """4, 8 or 16 bytes of Int32 or Float32 registers."""
    kind = "f32" if isinstance(values[0], Float32) else "b32"
    regs = ",".join(f"{{$r{i + 1}}}" for i in range(len(values)))
    vector, operand = (f".v{len(values)}", "{" + regs + "}") if len(values) > 1 else ("", regs)
    asm(f"st.shared{vector}.{kind} [{{$r0}}+{offset}], {operand};", read_only_args=[address, *values])


def store_record(address: Int32, record: tuple) -> None:
    """The registers of a NamedTuple, a multiple of four, to shared memory."""
    for i in range(0, len(record), 4):
        store_shared(address, 4 * i, list(record[i : i + 4]))


def load_record(address: Int32, kind: type):
    """A NamedTuple that :func:`store_record` left there."""
    return kind(*[word for i in range(0, len(kind._fields), 4) for word in load_shared(address, 4 * i, 4)])


def store_shared_half(address: Int32, offset: int, value: Int32) -> None:
    """The lower 16 bits of a register."""
    asm(
        f"{{ .reg .b16 low, high; mov.b32 {{low, high}}, {{$r1}}; st.shared.b16 [{{$r0}}+{offset}], low; }}",
        read_only_args=[address, value],
    )


def load_shared_half(address: Int32, offset: int) -> Float32:
    """An fp16 as fp32."""
    return asm(
        f"{{ .reg .b16 half; ld.shared.b16 half, [{{$r0}}+{offset}]; cvt.f32.f16 {{$w0}}, half; }}",
        write_only_types=[Float32],
        read_only_args=[address],
    )


def load_global(address: Int64, words: int = 1, offset: int = 0, cache: str = "") -> list:
    """4, 8 or 16 bytes; cache "cg" past L1, for what others have written during the launch.

    Not "nc": with programmatic launch the previous kernel may still write while this one runs.
    """
    regs = ",".join(f"{{$w{i}}}" for i in range(words))
    vector, operand = (f".v{words}", "{" + regs + "}") if words > 1 else ("", regs)
    got = asm(
        f"ld.global{cache and '.' + cache}{vector}.b32 {operand}, [{{$r0}}+{offset}];",
        write_only_types=[Int32] * words,
        read_only_args=[address],
    )
    return list(got) if words > 1 else [got]


def load_relaxed(address: Int64, offset: int, condition: Int32, otherwise: list) -> list:
    """Words that other SMs store with store_relaxed, 8 or 16 bytes; the constants ``otherwise`` where ``condition`` is
    negative. A word is there or not, in no order among words.
    """
    count = len(otherwise)
    regs = [f"t{i}" for i in range(count)]
    before = " ".join(f"mov.b32 {reg}, {value};" for reg, value in zip(regs, otherwise, strict=True))
    after = " ".join(f"mov.b32 {{$w{i}}}, {reg};" for i, reg in enumerate(regs))
    load = f"ld.relaxed.gpu.global.v{count}.b32 {{{','.join(regs)}}}, [{{$r0}}+{offset}];"
    declared = f".reg .pred p; .reg .b32 {','.join(regs)};"
    return list(
        asm(
            f"{{ {declared} setp.ge.s32 p, {{$r1}}, 0; {before} @p {load} {after} }}",
            write_only_types=[Int32] * count,
            read_only_args=[address, condition],
        )
    )


def store_global(address: Int64, values: list, offset: int = 0) -> None:
    """4, 8 or 16 bytes of Int32 or Float32 registers."""
    _store_global("st.global", address, values, offset)


def store_relaxed(address: Int64, values: list, offset: int = 0) -> None:
    """The same, for load_relaxed on other SMs."""
    _store_global("st.relaxed.gpu.global", address, values, offset)


def _store_global(instruction: str, address: Int64, values: list, offset: int) -> None:
    kind = "f32" if isinstance(values[0], Float32) else "b32"
    regs = ",".join(f"{{$r{i + 1}}}" for i in range(len(values)))
    vector, operand = (f".v{len(values)}", "{" + regs + "}") if len(values) > 1 else ("", regs)
    asm(f"{instruction}{vector}.{kind} [{{$r0}}+{offset}], {operand};", read_only_args=[address, *values])


def load_word_relaxed(address: Int64) -> Int32:
    """4 bytes that other SMs may be writing with store_relaxed."""
    return asm("ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def atomic_add(address: Int64, value: Int32, order: str = "acq_rel") -> Int32:
    """Device-wide; returns the old value. order: "acq_rel", or "relaxed", which orders no other access."""
    return asm(
        f"atom.{order}.gpu.global.add.u32 {{$w0}}, [{{$r0}}], {{$r1}};",
        write_only_types=[Int32],
        read_only_args=[address, value],
    )


def atomic_max(address: Int64, value: Int32) -> None:
    """Device-wide, of signed numbers."""
    asm("red.relaxed.gpu.global.max.s32 [{$r0}], {$r1};", read_only_args=[address, value])


def prefetch(address: Int64, nbytes: int) -> None:
    """``cp.async.bulk.prefetch``: bring nbytes (a multiple of 16) into L2."""
    asm("cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};", read_only_args=[address, Int32(nbytes)])


# -- kernels of a stream ---------------------------------------------------------------------------------------


def start_next_kernel() -> None:
    """With programmatic launch: once all CTAs have said so, the next one may be scheduled; it waits for this one."""
    asm("griddepcontrol.launch_dependents;")


def wait_for_previous_kernel() -> None:
    """With programmatic launch: until the previous kernel's writes are visible; then the next one may be scheduled."""
    asm("griddepcontrol.wait;")
    asm("griddepcontrol.launch_dependents;")


# -- barriers and asynchronous copies --------------------------------------------------------------------------


def sync_team(first: int | None, threads: int) -> None:
    """A barrier of the CTA (``first`` None), or of each ``threads`` threads of it: the next ones' from ``first`` on."""
    if first is None:
        cute.arch.sync_threads()
    else:
        barrier(first + cute.arch.thread_idx()[0] // threads, threads)


@dsl_user_op
def any_thread(condition: Boolean, *, loc=None, ip=None) -> Boolean:
    """A barrier of the CTA that tells whether the condition holds for a thread."""
    at = dict(loc=loc, ip=ip)
    vote = cutlass_select(condition, Int32(1), Int32(0))
    got = nvvm.barrier(
        results=[T.i32()], reduction_op=nvvm.BarrierReduction.OR, reduction_predicate=vote.ir_value(**at), **at
    )
    return Int32(got) != 0


def barrier(index: int, threads: int) -> None:
    """Named CTA barrier."""
    cute.arch.barrier(barrier_id=index, number_of_threads=threads)


def mbarrier_init(address: Int32, arrivals: int) -> None:
    asm("mbarrier.init.shared.b64 [{$r0}], {$r1};", read_only_args=[address, Int32(arrivals)])


def fence_mbarrier_init() -> None:
    """Make initialised barriers visible to the bulk-copy engine."""
    asm("fence.mbarrier_init.release.cluster;")


def mbarrier_arrive(address: Int32, count: int = 1) -> None:
    """Arrive as often as ``count`` threads."""
    times = "" if count == 1 else f", {count}"
    asm(f"{{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [{{$r0}}]{times}; }}", read_only_args=[address])


def mbarrier_expect(address: Int32, nbytes: int) -> None:
    """Arrive and announce ``nbytes`` of bulk copies."""
    asm(
        "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [{$r0}], {$r1}; }",
        read_only_args=[address, Int32(nbytes)],
    )


def _phase_done(address: Int32, parity: Int32, test: str) -> Int32:
    return asm(
        f"{{ .reg .pred p; mbarrier.{test}.parity.shared.b64 p, [{{$r0}}], {{$r1}}; selp.b32 {{$w0}}, 1, 0, p; }}",
        write_only_types=[Int32],
        read_only_args=[address, parity],
    )


@cute.jit
def mbarrier_wait(address: Int32, parity: Int32, test: str):
    """Wait until the phase of this parity is over; ``test``: "try_wait" (sm_90+, suspends) or "test_wait"."""
    done = _phase_done(address, parity, test)
    while done == 0:
        done = _phase_done(address, parity, test)


def bulk_copy(shared: Int32, source: Int64, nbytes: int, mbarrier: Int32) -> None:
    """``cp.async.bulk``: one thread copies nbytes (a multiple of 16) and the barrier counts them.

    The data are read once, so they are the first to leave L2: queries, lengths and results stay.
    """
    asm(
        "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[{$r0}], [{$r1}], {$r2}, [{$r3}], policy; }",
        read_only_args=[shared, source, Int32(nbytes), mbarrier],
    )


def copy16(shared: Int32, source: Int64, offset: int) -> None:
    """``cp.async`` of 16 bytes past L1, at the same offset from both addresses."""
    asm(f"cp.async.cg.shared.global [{{$r0}}+{offset}], [{{$r1}}+{offset}], 16;", read_only_args=[shared, source])


def wait_for_copies() -> None:
    """Until all of this thread's ``cp.async`` have landed."""
    asm("cp.async.wait_all;")


def mbarrier_arrive_after_copies(address: Int32) -> None:
    """Arrive once this thread's earlier ``cp.async`` have landed."""
    asm("cp.async.mbarrier.arrive.noinc.shared.b64 [{$r0}];", read_only_args=[address])
