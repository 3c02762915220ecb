"""Append to caches, or quantise whole sequences: one kernel. New tokens go to sinks and tails, blocks that get full to
pages; all is decided on the device from the lengths.

An *item* is K or V of one KV head of a sequence, and a share of its blocks: item 0 of several copies the 16-bit tokens
and packs the blocks that begin in the old tail, the others pack one block of new tokens each. Quantising, an item is a
block. A CTA takes up to four items:
    warp w      finds out what there is to do for item w (Job), from the lengths and the table
    then        items count as arrived: the last of a sequence to do so advances its lengths, as all have read them
    all warps   pack the blocks of the items, one after another: rows of 128 tokens to shared memory (cp.async, 16
                bytes), rotate, encode (encode.py); then copy the 16-bit tokens that stay to sinks and tail
A row is four lanes', which hold every fourth 16 bytes: strides of the Hadamard butterflies are within a vector, across
the four lanes, then between a lane's vectors. Which thread copies a row depends on its index modulo 32 only, and tokens
move by multiples of 128, so a thread has read a row before it overwrites it.
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr
from cutlass.cute.runtime import make_ptr

from . import ptx
from .append_plan import JOB_BYTES, ROW_LANES, SMEM_ALIGN, VECTOR, AppendPlan
from .encode import Encoder, bfloat2_values, half2_values
from .layouts import BLOCK_TOKENS, HALF_BITS, LANES
from .queries import hadamard_lanes, hadamard_registers

WARP_ROWS = LANES // ROW_LANES
# 16-bit patterns: the limit of values (32768, as in quantization.py), infinity, and what carries larger ones into the
# sign bits of two at once: 0x8000 - limit - 1
HALF2_ABS = 0x7FFF7FFF
HALF2_SIGNS = -0x7FFF8000  # 0x80008000
HALF_LIMIT, HALF_INFINITY, HALF2_EXCESS = 0x7800, 0x7C00, 0x07FF07FF
BFLOAT_LIMIT, BFLOAT_INFINITY, BFLOAT2_EXCESS = 0x4700, 0x7F80, 0x38FF38FF
OPERANDS = 2  # K and V


class Params(NamedTuple):
    """The flat kernel parameters; shapes in elements. The order is the launch ABI of the C++ core."""

    k_new: cute.Pointer  # 16 bit [batch, new_tokens, num_kv_heads, head_dim], strides below
    v_new: cute.Pointer
    lengths: cute.Pointer  # i32 [batch] or null
    cu_seqlens: cute.Pointer  # i32 [batch + 1] or null
    pages: cute.Pointer  # u8 [num_pages, num_kv_heads, block_bytes], strides below
    block_table: cute.Pointer  # i32 [batch, max_pages]
    seqlens: cute.Pointer  # i32 [batch]
    packed_lens: cute.Pointer  # i32 [batch]
    tail_k: cute.Pointer  # 16 bit [batch, tail_capacity, num_kv_heads, head_dim]
    tail_v: cute.Pointer
    sink_k: cute.Pointer  # 16 bit [batch, num_sink, num_kv_heads, head_dim]
    sink_v: cute.Pointer
    status: cute.Pointer  # i32 [1] or null
    workspace: cute.Pointer  # counters i32 [batch]
    new_batch_stride: Int64  # bytes, as the others
    new_token_stride: Int64
    new_head_stride: Int64
    page_stride: Int64
    head_stride: Int64
    batch: Int32
    new_tokens: Int32
    num_kv_heads: Int32
    num_pages: Int32
    max_pages: Int32
    tail_capacity: Int32
    num_sink: Int32
    recent: Int32
    items: Int32  # of an operand of a sequence's head
    k_clip: Float32  # 1: min/max, 0: searched
    v_clip: Float32
    rotate_k: Int32
    rotate_v: Int32
    bfloat16: Int32  # 1: all 16-bit tensors are bf16; 0: fp16
    pack_all: Int32  # 1: quantise


class Job(NamedTuple):
    """What there is to do for an item. The old tail, then the new tokens that do not go to sinks, are the *stream*."""

    b: Int32
    head: Int32
    operand: Int32  # 0: K, 1: V
    start: Int32  # row of the sequence's first new token, with cu_seqlens
    sinks: Int32  # tokens in the sinks before
    to_sink: Int32  # new tokens that go there
    old: Int32  # tokens in the tail before
    total: Int32  # of the stream
    blocks: Int32  # of the stream that get packed, by all items
    column: Int32  # of the block table, for the first of them
    first: Int32  # blocks of this item: first .. end - 1
    end: Int32
    copies: Int32  # 16-bit tokens that this item copies
    length: Int32  # of the sequence, afterwards
    failed: Int32  # 1: there is no page for one of the blocks, so nothing is done
    unused: Int32


class AppendKernel:
    """The kernel of one KernelConfig, and the host function that the DSL compiles."""

    def __init__(self, config):
        self.plan = AppendPlan(config)
        self.encoders = {name: Encoder(self.plan, name) for name in ("k", "v")}

    @cute.jit
    def __call__(self, p: Params, grid: Int32):
        self.kernel(p).launch(
            grid=(grid, 1, 1),
            block=(self.plan.threads, 1, 1),
            smem=self.plan.smem_bytes,
            min_blocks_per_mp=self.plan.ctas_per_sm,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, p: Params):
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // LANES)
        lane = thread % LANES
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=SMEM_ALIGN).toint()
        if cutlass.const_expr(self.plan.programmatic):
            ptx.start_next_kernel()
            ptx.wait_for_previous_kernel()
        items = p.batch * p.num_kv_heads * p.items * OPERANDS
        grid = cute.arch.grid_dim()[0]
        x = cute.arch.block_idx()[0] + warp * grid
        jobs = smem + self.plan.jobs_at
        if x < items:
            self.begin(p, jobs + warp * JOB_BYTES, x, lane)
        cute.arch.sync_threads()
        w = Int32(0)
        x = cute.arch.block_idx()[0]
        while (w < self.plan.warps) & (x < items):
            at = jobs + w * JOB_BYTES
            job = load_job(at)
            if (p.pack_all == 0) & (warp == self.plan.warps - 1 - w):  # a warp that has less to do than warp w
                self.arrive(p, job, lane)
            block, end = job.first, job.end
            while block < end:
                self.pack(p, smem, warp, lane, load_job(at), block)
                block += 1
            job = load_job(at)  # again, rather than in registers all the while
            # the tokens of an item without blocks are one warp's: they may be few, and other warps have their items
            share, shares = warp, Int32(self.plan.warps)
            if job.blocks == 0:
                share, shares = cutlass.select_(warp == w, Int32(0), job.copies), Int32(1)
            self.copy(p, share, shares, lane, job)
            w += 1
            x += grid

    # -- what there is to do -----------------------------------------------------------------------------------

    @cute.jit
    def begin(self, p: Params, address: Int32, x: Int32, lane: Int32):
        """Find out the Job of item x and leave it in shared memory."""
        head = x % p.num_kv_heads
        operand = x // p.num_kv_heads % OPERANDS
        item = x // (p.num_kv_heads * OPERANDS) % p.items
        b = x // (p.num_kv_heads * OPERANDS * p.items)

        start = Int32(0)
        new = p.new_tokens
        if p.cu_seqlens.toint() != 0:
            at = p.cu_seqlens.toint() + Int64(b) * 4
            start = ptx.load_global(at)[0]
            new = ptx.load_global(at, offset=4)[0] - start
        if p.lengths.toint() != 0:
            new = ptx.load_global(p.lengths.toint() + Int64(b) * 4)[0]
        new = cutlass.max(cutlass.min(new, p.new_tokens), 0)
        if p.pack_all == 1:
            blocks = (new + BLOCK_TOKENS - 1) // BLOCK_TOKENS
            end = cutlass.min(item + 1, blocks)
            if item < blocks:
                if self.page(p, b, item) < 0:
                    end = item
            zero = Int32(0)
            job = Job(b, head, operand, start, zero, zero, zero, new, blocks, zero, item, end, zero, zero, zero, zero)
            if lane == 0:
                store_job(address, job)
        else:
            self.begin_append(p, address, b, head, operand, item, start, new, lane)

    @cute.jit
    def begin_append(
        self, p: Params, address: Int32, b: Int32, head: Int32, operand: Int32, item: Int32, start: Int32, new: Int32,
        lane: Int32,
    ):  # fmt: skip
        """:meth:`begin` of an append of ``new`` tokens."""
        length, packed = (ptx.load_global(x.toint() + Int64(b) * 4, cache="cg")[0] for x in (p.seqlens, p.packed_lens))
        sinks = cutlass.min(length, p.num_sink)
        old = length - sinks - packed
        to_sink = cutlass.min(new, p.num_sink - sinks)
        total = old + new - to_sink
        blocks = cutlass.max(total - p.recent, 0) // BLOCK_TOKENS
        column = packed // BLOCK_TOKENS
        failed = Boolean(False)
        i = lane
        while i - lane < blocks:
            missing = Int32(0)
            if i < blocks:
                missing = cutlass.select_(self.page(p, b, column + i) < 0, Int32(1), Int32(0))
            failed = failed | ptx.any_lane(missing == 1)
            i += LANES
        if failed:
            new, blocks, to_sink, total = Int32(0), Int32(0), Int32(0), old

        in_tail = (old + BLOCK_TOKENS - 1) // BLOCK_TOKENS  # blocks that begin in the tail
        first, end = Int32(0), cutlass.min(in_tail, blocks)
        copies = to_sink + total - cutlass.select_(blocks > 0, blocks * BLOCK_TOKENS, old)
        if item > 0:
            first = in_tail + item - 1
            end = cutlass.min(first + 1, blocks)
            copies = Int32(0)
        job = Job(
            b, head, operand, start, sinks, to_sink, old, total, blocks, column, first, end, copies, length + new,
            cutlass.select_(failed, Int32(1), Int32(0)), Int32(0),
        )  # fmt: skip
        if lane == 0:
            store_job(address, job)

    @cute.jit
    def arrive(self, p: Params, job: Job, lane: Int32):
        """Count an item whose warp has read the lengths; the last of a sequence advances them."""
        if lane == 0:
            counter = p.workspace.toint() + Int64(job.b) * 4
            if ptx.atomic_add(counter, Int32(1)) == p.num_kv_heads * p.items * OPERANDS - 1:
                ptx.store_global(counter, [Int32(0)])  # ready for the next launch
                if job.failed == 1:
                    if p.status.toint() != 0:
                        ptx.atomic_max(p.status.toint(), job.b + 1)
                else:
                    ptx.store_global(p.seqlens.toint() + Int64(job.b) * 4, [job.length])
                    ptx.store_global(
                        p.packed_lens.toint() + Int64(job.b) * 4, [(job.column + job.blocks) * BLOCK_TOKENS]
                    )

    @cute.jit
    def page(self, p: Params, b: Int32, column: Int32):
        """The page that an entry of the table names, -1 if none."""
        page = Int32(-1)
        if column < p.max_pages:
            page = ptx.load_global(p.block_table.toint() + (Int64(b) * p.max_pages + column) * 4)[0]
            if page >= p.num_pages:
                page = Int32(-1)
        return page

    # -- rows --------------------------------------------------------------------------------------------------

    def of_operand(self, job: Job, k, v):
        return cutlass.select_(job.operand == 0, k, v)

    def rotates(self, p: Params, job: Job):
        return self.of_operand(job, p.rotate_k, p.rotate_v) == 1

    def new_row(self, p: Params, job: Job, token: Int32) -> Int64:
        """Address of a new token's row."""
        base = self.of_operand(job, p.k_new.toint(), p.v_new.toint()) + Int64(job.head) * p.new_head_stride
        batch_stride = cutlass.select_(p.cu_seqlens.toint() != 0, Int64(0), p.new_batch_stride)
        return base + Int64(job.b) * batch_stride + Int64(job.start + token) * p.new_token_stride

    def kept_row(self, p: Params, job: Job, k: cute.Pointer, v: cute.Pointer, capacity: Int32, token: Int32) -> Int64:
        """Address of a row of tail or sinks."""
        row = (Int64(job.b) * capacity + token) * p.num_kv_heads + job.head
        return self.of_operand(job, k.toint(), v.toint()) + row * (2 * self.plan.head_dim)

    def tail_row(self, p: Params, job: Job, token: Int32) -> Int64:
        return self.kept_row(p, job, p.tail_k, p.tail_v, p.tail_capacity, token)

    def stream_row(self, p: Params, job: Job, token: Int32) -> Int64:
        """Address of a token of the stream."""
        new = self.new_row(p, job, job.to_sink + token - job.old)
        return cutlass.select_(token < job.old, self.tail_row(p, job, token), new)

    @cute.jit
    def copy(self, p: Params, share: Int32, shares: Int32, lane: Int32, job: Job):
        """Copy the item's 16-bit tokens: to the sinks, then those of the stream that stay to where they belong."""
        stay = cutlass.select_(job.blocks > 0, job.blocks * BLOCK_TOKENS, job.old)  # the first that stays
        rotates = self.rotates(p, job)
        part = Int64((lane % ROW_LANES) * VECTOR)
        first = share * WARP_ROWS
        while first < job.copies:
            i = first + lane // ROW_LANES
            inside = i < job.copies
            i = cutlass.min(i, job.copies - 1)
            token = stay + i - job.to_sink
            is_new = token >= job.old
            source, target = self.stream_row(p, job, token), self.tail_row(p, job, token - job.blocks * BLOCK_TOKENS)
            if i < job.to_sink:
                is_new = Boolean(True)
                source = self.new_row(p, job, i)
                target = self.kept_row(p, job, p.sink_k, p.sink_v, p.num_sink, job.sinks + i)
            step = ROW_LANES * VECTOR
            row = [ptx.load_global(source + part, 4, step * j, cache="cg") for j in range(self.plan.vectors)]
            if inside:
                for j in range_constexpr(self.plan.vectors):
                    ptx.store_global(target + part, row[j], step * j)
            if rotates:  # new rows are written again, by the same threads
                row = self.rotated(p, self.conditioned(p, row), lane)
                if inside & is_new:
                    for j in range_constexpr(self.plan.vectors):
                        ptx.store_global(target + part, row[j], step * j)
            first += shares * WARP_ROWS

    @cute.jit
    def rotated(self, p: Params, row: list, lane: Int32):
        """A lane's vectors of a row, of finite values, through the Hadamard transform as in quantization.rotate."""
        rotated = row
        if p.bfloat16 == 1:
            rotated = self.transformed(row, lane, bfloat2_values, ptx.to_bfloat2)
        else:
            rotated = self.transformed(row, lane, half2_values, ptx.to_half2)
        return self.conditioned(p, rotated)  # rounding beyond the limit, even to infinity, and limiting commute

    def transformed(self, row: list, lane: Int32, values_of, pair_of) -> list:
        x = values_of([register for vector in row for register in vector])
        x = hadamard_registers(x, 8)  # strides within a vector
        x = hadamard_lanes(x, [1, 2], lane)  # strides 8 and 16
        x = hadamard_registers(x, self.plan.hadamard // ROW_LANES, first=8)
        x = [ptx.multiply(value, Float32(self.plan.hadamard**-0.5)) for value in x]
        registers = [pair_of(*x[i : i + 2]) for i in range(0, len(x), 2)]
        return [registers[i : i + 4] for i in range(0, len(registers), 4)]

    @cute.jit
    def conditioned(self, p: Params, row: list):
        """A lane's vectors with NaN as 0, and within the limit.

        A loop, of one round at most: the assembler would execute both sides of a branch.
        """
        while self.needs_conditioning(p, row):
            row = self.limited(p, row)
        return row

    def needs_conditioning(self, p: Params, row: list) -> Boolean:
        """Whether one of the values is NaN or beyond the limit: nearly never."""
        excess = cutlass.select_(p.bfloat16 == 1, Int32(BFLOAT2_EXCESS), Int32(HALF2_EXCESS))
        beyond = Int32(0)
        for vector in row:
            for x in vector:
                beyond = beyond | ((x & HALF2_ABS) + excess)
        return (beyond & HALF2_SIGNS) != 0

    def limited(self, p: Params, row: list) -> list:
        """All of a lane's vectors conditioned."""
        limit = cutlass.select_(p.bfloat16 == 1, Int32(BFLOAT_LIMIT), Int32(HALF_LIMIT))
        infinity = cutlass.select_(p.bfloat16 == 1, Int32(BFLOAT_INFINITY), Int32(HALF_INFINITY))
        return [[conditioned_pair(x, limit, infinity) for x in vector] for vector in row]

    # -- packing -----------------------------------------------------------------------------------------------

    @cute.jit
    def pack(self, p: Params, smem: Int32, warp: Int32, lane: Int32, job: Job, block: Int32):
        """Pack a block of the stream."""
        page = self.page(p, job.b, job.column + block)
        target = p.pages.toint() + Int64(page) * p.page_stride + Int64(job.head) * p.head_stride
        first = block * BLOCK_TOKENS
        self.stage(p, smem, warp, lane, job, first)
        cute.arch.sync_threads()
        count = cutlass.min(job.total - first, BLOCK_TOKENS)
        if job.operand == 0:
            self.encoders["k"].encode(p, smem, warp, lane, target, count, p.k_clip)
        else:
            self.encoders["v"].encode(p, smem, warp, lane, target, count, p.v_clip)
        cute.arch.sync_threads()

    @cute.jit
    def stage(self, p: Params, smem: Int32, warp: Int32, lane: Int32, job: Job, first: Int32):
        """128 rows of the stream to shared memory, conditioned, new ones rotated; the last one again beyond the end."""
        step = ROW_LANES * VECTOR
        own = warp * WARP_ROWS + lane // ROW_LANES  # row of the thread, and every 32nd from it on
        rows = smem + own * self.plan.row_bytes + lane % ROW_LANES * VECTOR
        part = Int64((lane % ROW_LANES) * VECTOR)
        rows_at_once = self.plan.warps * WARP_ROWS
        for i in range_constexpr(BLOCK_TOKENS // rows_at_once):
            token = cutlass.min(first + own + i * rows_at_once, job.total - 1)
            source = self.stream_row(p, job, token) + part
            for j in range_constexpr(self.plan.vectors):
                ptx.copy16(rows + i * rows_at_once * self.plan.row_bytes, source, step * j)
        ptx.wait_for_copies()
        rotates = self.rotates(p, job)
        for i in cutlass.range(BLOCK_TOKENS // rows_at_once, unroll=1):
            at = rows + i * (rows_at_once * self.plan.row_bytes)
            row = [ptx.load_shared(at, step * j, 4) for j in range(self.plan.vectors)]
            if rotates:  # the old tail's rows are rotated already, and so within the limit
                rotated = self.rotated(p, self.conditioned(p, row), lane)
                if cutlass.min(first + own + i * rows_at_once, job.total - 1) >= job.old:
                    for j in range_constexpr(self.plan.vectors):
                        ptx.store_shared(at, step * j, rotated[j])
            else:
                while self.needs_conditioning(p, row):  # as in conditioned
                    row = self.limited(p, row)
                    for j in range_constexpr(self.plan.vectors):
                        ptx.store_shared(at, step * j, row[j])


def conditioned_pair(x: Int32, limit: Int32, infinity: Int32) -> Int32:
    """Two 16-bit values with NaN as 0, and within the limit; in integers, so alike for fp16 and bf16."""
    halves = []
    for shift in (0, HALF_BITS):
        size, sign = x >> shift & 0x7FFF, x >> shift & 0x8000
        kept = cutlass.min(size, limit) | sign
        halves.append(cutlass.select_(size > infinity, Int32(0), kept) << shift)
    return halves[0] | halves[1]


def store_job(address: Int32, job: Job) -> None:
    """Write a Job to shared memory."""
    for i in range(0, len(job), 4):
        ptx.store_shared(address, 4 * i, list(job[i : i + 4]))


def load_job(address: Int32) -> Job:
    return Job(*[word for i in range(0, JOB_BYTES, VECTOR) for word in ptx.load_shared(address, i, 4)])


def example_params() -> Params:
    """Arguments of the right types, for compiling."""

    def pointer(dtype: type) -> cute.Pointer:
        return make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=16)

    integers = ("lengths", "cu_seqlens", "block_table", "seqlens", "packed_lens", "status", "workspace")
    values = []
    for name, kind in Params.__annotations__.items():
        values.append(pointer(Int32 if name in integers else cutlass.Uint8) if kind is cute.Pointer else kind(1))
    return Params(*values)
