"""The PTX-level operations of warpgroups (sm_90a), beside those of ptx.py.

wgmma runs asynchronously: its accumulators and A registers are the tensor core's until ``wait``, and what generic
stores left in shared memory reaches it only past a proxy fence. ``pin`` keeps the compiler from moving reads and writes
of such registers across the fences. PTX ISA: "wgmma.mma_async", "stmatrix", "setmaxnreg", "barrier.cta.red".
"""

from cutlass import Boolean, Float32, Int32, cute
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op
from pycute import Layout, make_layout

CORE_ROWS = 8  # a core matrix: 8 rows of 16 bytes, contiguous
CORE_ROW_BYTES = 16
CORE_BYTES = CORE_ROWS * CORE_ROW_BYTES
CORE_DEPTH = CORE_ROW_BYTES // 2  # fp16 of a row
DESCRIPTOR_UNIT = 16  # bytes that one step of a descriptor's fields stands for

asm = cute.arch.inline_ptx


@dsl_user_op
def _assembly(text: str, outputs: list, inputs: list, constraints: list, *, loc=None, ip=None) -> list:
    """Inline PTX whose outputs may share registers with inputs (constraint "0" is that of output 0)."""
    at = dict(loc=loc, ip=ip)
    types = [kind.mlir_type for kind in outputs]
    result_type = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    values = [x.ir_value(**at) for x in inputs]
    got = llvm.inline_asm(result_type, values, text, ",".join(constraints), has_side_effects=True, **at)
    if len(types) == 1:
        return [outputs[0](got)]
    return [kind(llvm.extractvalue(t, got, [i], **at)) for i, (kind, t) in enumerate(zip(outputs, types, strict=True))]


def _letter(value) -> str:
    return "f" if isinstance(value, Float32) else "r"


def pin(values: list) -> list:
    """The same registers, which no read or write may cross."""
    outputs = [Float32 if isinstance(x, Float32) else Int32 for x in values]
    constraints = ["=" + _letter(x) for x in values] + [str(i) for i in range(len(values))]
    return _assembly("", outputs, values, constraints)


def again(x: Float32 | Int32):
    """The same value, from which the compiler finds out anew what follows, rather than keep it in a register."""
    return pin([x])[0]


def descriptor(address: Int32, column_tiles: int) -> Int32:
    """Lower half of an operand's descriptor; no swizzle: core matrices of 8 columns (of A: rows) x 8 k, those of one k
    adjacent.

    Two k steps of 8 lie column_tiles core matrices apart (leading dimension), two column tiles one (stride, the upper
    half).
    """
    return ((address & 0x3FFFF) >> 4) | (column_tiles * CORE_BYTES // DESCRIPTOR_UNIT) << 16


def operand_layout(columns: int, depth: int) -> Layout:
    """(column or, of A, row; k) -> byte of such an operand."""
    tiles = columns // CORE_ROWS
    column = Layout((CORE_ROWS, tiles), (CORE_ROW_BYTES, CORE_BYTES))
    k = Layout((CORE_DEPTH, depth // CORE_DEPTH), (CORE_ROW_BYTES // CORE_DEPTH, tiles * CORE_BYTES))
    return make_layout(column, k)


def mma(acc: list | None, a: list | Int32, b: Int32, columns: int) -> list:
    """A B + acc of ``wgmma.m64nNk16``, issued: a 4 half2 or a descriptor, b a descriptor, acc a lane's columns / 2
    floats (None: 0).
    """
    count = columns // 2
    d = ",".join(f"${i}" for i in range(count))
    stride = CORE_BYTES // DESCRIPTOR_UNIT
    inputs = [*a, b] if isinstance(a, list) else [a, b]
    last = count + len(inputs) - 1
    left, setup, transposed = f"{{{','.join(f'${i}' for i in range(count, last))}}}", "", "0"
    if not isinstance(a, list):
        left, setup, transposed = "a", f".reg .b64 a; mov.b64 a, {{${count}, {stride}}}; ", "0, 0"
    text = (
        f"{{ .reg .pred p; .reg .b64 b; {setup}mov.b64 b, {{${last}, {stride}}}; "
        f"setp.ne.b32 p, {int(acc is not None)}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{d}}}, {left}, b, p, 1, 1, {transposed}; }}"
    )
    constraints = ["=f"] * count + ["r"] * len(inputs)
    if acc is not None:
        constraints += [str(i) for i in range(count)]
        inputs += acc
    return _assembly(text, [Float32] * count, inputs, constraints)


def fence() -> None:
    """Registers written so far may be used by ``mma``."""
    asm("wgmma.fence.sync.aligned;")


def commit() -> None:
    """Close a group of ``mma``."""
    asm("wgmma.commit_group.sync.aligned;")


def wait(pending: int) -> None:
    """Until at most ``pending`` groups are under way."""
    asm(f"wgmma.wait_group.sync.aligned {pending};")


def fence_async() -> None:
    """What this thread stored, or saw, in shared memory may be read by ``mma`` and overwritten by bulk copies, once
    whoever issues these knows of this fence.
    """
    asm("fence.proxy.async.shared::cta;")


def store_matrices(address: Int32, offset: int, values: list, transposed: bool = True) -> None:
    """``stmatrix``: 2 or 4 8x8 fp16 matrices in fragment order; lane 8 i + r has the address of row r of matrix i, of
    its column r if ``transposed``.
    """
    regs = ",".join(f"{{$r{i + 1}}}" for i in range(len(values)))
    trans = ".trans" if transposed else ""
    asm(
        f"stmatrix.sync.aligned.m8n8.x{len(values)}{trans}.shared.b16 [{{$r0}}+{offset}], {{{regs}}};",
        read_only_args=[address, *values],
    )


def fma_half2(a: Int32, b: Int32, c: Int32) -> Int32:
    """a b + c; b and c may be constants, which the instruction takes from registers only."""
    return asm(
        "{ .reg .b32 b, c; mov.b32 b, {$r1}; mov.b32 c, {$r2}; fma.rn.f16x2 {$w0}, {$r0}, b, c; }",
        write_only_types=[Int32],
        read_only_args=[a, b, c],
    )


def add_half2(a: Int32, b: Int32) -> Int32:
    return asm("add.rn.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[a, b])


@dsl_user_op
def barrier_any(index: Int32, threads: int, condition: Boolean, *, loc=None, ip=None) -> Boolean:
    """Named CTA barrier: whether the condition holds in any of the threads."""
    at = dict(loc=loc, ip=ip)
    got = nvvm.barrier_cta_red(
        Boolean(condition).ir_value(**at),
        Int32(index).ir_value(**at),
        nvvm.BarrierReduction.OR,
        thread_count=Int32(threads).ir_value(**at),
        aligned=True,
        results=[T.i32()],
        **at,
    )
    return Int32(got) != 0


def barrier(index: Int32, threads: int) -> None:
    """Named CTA barrier whose number is known at run time."""
    cute.arch.barrier(barrier_id=index, number_of_threads=threads)


def mbarrier_arrive_once(address: Int32) -> None:
    """One arrival of a warp whose lanes have met."""
    asm(
        "{ .reg .pred p; .reg .b64 state; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.shared.b64 state, [{$r0}]; }",
        read_only_args=[address],
    )


def uniform(x: Int32) -> Int32:
    """A value that all lanes agree about, in a uniform register: descriptors are read from those."""
    return _assembly("redux.sync.or.b32 $0, $1, 0xffffffff;", [Int32], [x], ["=r", "r"])[0]


def thread_again() -> Int32:
    """The thread's index, read anew: what follows from it need not stay in registers all along."""
    return _assembly("mov.u32 $0, %tid.x;", [Int32], [], ["=r"])[0]


def give_registers(count: int) -> None:
    cute.arch.setmaxregister_decrease(count)


def take_registers(count: int) -> None:
    cute.arch.setmaxregister_increase(count)
