"""Append to caches, or quantise whole sequences: one kernel. New tokens go to sinks and tails, blocks that get full to
pages; all is decided on the device from the lengths.

An *item* is K or V of one KV head of a sequence, and a share of its blocks: item 0 of several copies the 16-bit tokens
and packs the blocks that begin in the old tail, the others pack one block of new tokens each. Quantising, an item is a
block. A CTA takes up to four items:
    warp w      finds out what there is to do for item w (Job), from the lengths and the table, and counts as arrived:
                the last of a sequence to do so advances its lengths, as all have read them
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
from .encode import Encoder
from .layouts import BLOCK_TOKENS, LANES
from .queries import floats, hadamard_lanes, hadamard_registers

WARP_ROWS = LANES // ROW_LANES
VALUE_LIMIT = 32768.0  # as in quantization.py
HALF2_ABS = 0x7FFF7FFF
HALF2_SIGNS = -0x7FFF8000  # 0x80008000
# What carries |x| > VALUE_LIMIT (and NaN) of 16-bit patterns into the sign bits: 0x8000 - bits(VALUE_LIMIT) - 1, twice
HALF2_EXCESS = 0x07FF07FF
BFLOAT2_EXCESS = 0x38FF38FF
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
    unused: tuple = (0, 0, 0)


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
            job = load_job(jobs + w * JOB_BYTES)
            if job.first < job.end:
                self.pack(p, smem, warp, lane, job)
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
        """Find out the Job of item x and leave it in shared memory; arrive."""
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
            job = Job(b, head, operand, start, zero, zero, zero, new, blocks, zero, item, end, zero)
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
        length_at, packed_at = (x.toint() + Int64(b) * 4 for x in (p.seqlens, p.packed_lens))
        length = ptx.load_global(length_at, cache="cg")[0]
        packed = ptx.load_global(packed_at, cache="cg")[0]
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

        # the sequence's items have read its lengths once all have been here
        arrived = Int32(0)
        if lane == 0:
            arrived = ptx.atomic_add(p.workspace.toint() + Int64(b) * 4, Int32(1))

        in_tail = (old + BLOCK_TOKENS - 1) // BLOCK_TOKENS  # blocks that begin in the tail
        first, end = Int32(0), cutlass.min(in_tail, blocks)
        copies = to_sink + total - cutlass.select_(blocks > 0, blocks * BLOCK_TOKENS, old)
        if item > 0:
            first = in_tail + item - 1
            end = cutlass.min(first + 1, blocks)
            copies = Int32(0)
        job = Job(b, head, operand, start, sinks, to_sink, old, total, blocks, column, first, end, copies)
        if lane == 0:
            store_job(address, job)
        if (lane == 0) & (arrived == p.num_kv_heads * p.items * OPERANDS - 1):
            ptx.store_global(p.workspace.toint() + Int64(b) * 4, [Int32(0)])  # ready for the next launch
            if failed:
                if p.status.toint() != 0:
                    ptx.atomic_max(p.status.toint(), b + 1)
            else:
                ptx.store_global(length_at, [length + new])
                ptx.store_global(packed_at, [packed + blocks * BLOCK_TOKENS])

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
            if rotates:
                values = [limited(number(x)) for vector in row for x in floats(p, vector)]
                row = chosen(is_new, self.rotated(p, values, lane), row)
            if inside:
                for j in range_constexpr(self.plan.vectors):
                    ptx.store_global(target + part, row[j], step * j)
            first += shares * WARP_ROWS

    @cute.jit
    def rotated(self, p: Params, x: list, lane: Int32):
        """A lane's values of a row through the Hadamard transform as in quantization.rotate -> vectors."""
        x = hadamard_registers(x, 8)  # strides within a vector
        x = hadamard_lanes(x, [1, 2], lane)  # strides 8 and 16
        x = hadamard_registers(x, self.plan.hadamard // ROW_LANES, first=8)
        x = [limited(ptx.multiply(value, Float32(self.plan.hadamard**-0.5))) for value in x]
        return [self.halves(p, x[i : i + 8]) for i in range(0, len(x), 8)]

    @cute.jit
    def halves(self, p: Params, values: list):
        """fp32 values as registers of two of the model's dtype."""
        pairs = list(zip(values[::2], values[1::2], strict=True))
        packed = [ptx.to_half2(*pair) for pair in pairs]
        if p.bfloat16 == 1:
            packed = [ptx.to_bfloat2(*pair) for pair in pairs]
        return packed

    # -- packing -----------------------------------------------------------------------------------------------

    @cute.jit
    def pack(self, p: Params, smem: Int32, warp: Int32, lane: Int32, job: Job):
        """Pack the item's blocks."""
        block = job.first
        while block < job.end:
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
            block += 1

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
        excess = cutlass.select_(p.bfloat16 == 1, Int32(BFLOAT2_EXCESS), Int32(HALF2_EXCESS))
        for i in cutlass.range(BLOCK_TOKENS // rows_at_once, unroll=1):
            at = rows + i * (rows_at_once * self.plan.row_bytes)
            row = [ptx.load_shared(at, step * j, 4) for j in range(self.plan.vectors)]
            beyond = Int32(0)
            for vector in row:
                for x in vector:
                    beyond = beyond | ((x & HALF2_ABS) + excess)
            if (beyond & HALF2_SIGNS) != 0:  # seldom: infinite, NaN, or too large
                for j in cutlass.range(self.plan.vectors, unroll=1):
                    values = floats(p, ptx.load_shared(at + step * j, 0, 4))
                    ptx.store_shared(at + step * j, 0, self.halves(p, [limited(number(x)) for x in values]))
            if rotates:
                row = [ptx.load_shared(at, step * j, 4) for j in range(self.plan.vectors)]
                values = [x for vector in row for x in floats(p, vector)]
                is_new = cutlass.min(first + own + i * rows_at_once, job.total - 1) >= job.old
                row = chosen(is_new, self.rotated(p, values, lane), row)
                for j in range_constexpr(self.plan.vectors):
                    ptx.store_shared(at, step * j, row[j])


def chosen(condition: Boolean, a: list, b: list) -> list:
    """The vectors a or b."""
    return [
        [cutlass.select_(condition, *xy) for xy in zip(*vectors, strict=True)] for vectors in zip(a, b, strict=True)
    ]


def number(x: Float32) -> Float32:
    """NaN as 0."""
    return cutlass.select_(x == x, x, Float32(0.0))


def limited(x: Float32) -> Float32:
    return ptx.fmin(ptx.fmax(x, Float32(-VALUE_LIMIT)), Float32(VALUE_LIMIT))


def store_job(address: Int32, job: Job) -> None:
    """Write a Job to shared memory."""
    words = [*job[:-1], *[Int32(x) for x in job.unused]]
    for i in range(0, len(words), 4):
        ptx.store_shared(address, 4 * i, words[i : i + 4])


def load_job(address: Int32) -> Job:
    words = [word for i in range(0, JOB_BYTES, VECTOR) for word in ptx.load_shared(address, i, 4)]
    return Job(*words[: len(Job._fields) - 1])


def example_params() -> Params:
    """Arguments of the right types, for compiling."""

    def pointer(dtype: type) -> cute.Pointer:
        return make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=16)

    integers = ("lengths", "cu_seqlens", "block_table", "seqlens", "packed_lens", "status", "workspace")
    values = []
    for name, kind in Params.__annotations__.items():
        values.append(pointer(Int32 if name in integers else cutlass.Uint8) if kind is cute.Pointer else kind(1))
    return Params(*values)
