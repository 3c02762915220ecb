"""Append to caches, or quantise whole sequences: one kernel. New tokens go to sinks and tails, blocks that get full to
pages; all is decided on the device from the lengths.

An *item* is K or V of one KV head of a sequence, and a share of its blocks: item 0 of several copies the 16-bit tokens
and packs the blocks that begin in the old tail, the others pack one block of new tokens each. Quantising, item x of n
packs every n-th block from block x on. A CTA takes up to four items:
    warp w      loads the first new rows of item w, spread over its lanes
    warp 0      meanwhile finds out what is to be done for the items (Job), a lane each, from the lengths and the table;
                items count as arrived: the last of a sequence to do so advances its lengths, as all have read them
    warp w      stores the rows, if item w has no block to pack and no more than these
    all warps   pack the blocks of the other items, one after another: rows of 128 tokens to shared memory (cp.async, 16
                bytes), rotate (rows.py), encode (encode.py); then copy the 16-bit tokens that stay to sinks and tail
Which thread copies a row depends on its index modulo 32 only, and tokens move by multiples of 128, so a thread has read
a row before it overwrites it.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .append_plan import COUNTER_BYTES, JOB_BYTES, ROW_LANES, SMEM_ALIGN, VECTOR, WARP_ROWS, AppendPlan
from .append_work import ANY_AT, OPERANDS, TODO_AT, Item, Job, Params, load_job, store_job
from .encode import Encoder
from .layouts import BLOCK_SHIFT, BLOCK_TOKENS, LANES
from .rows import LIMIT, SMALL, Rows, stage_row
from .work import token_row


class AppendKernel:
    """The kernel of one KernelConfig, and the host function that the DSL compiles."""

    def __init__(self, config, plan: AppendPlan | None = None):
        self.plan = plan or AppendPlan(config)
        self.rows = Rows(self.plan)
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
        jobs = smem + self.plan.jobs_at
        if cutlass.const_expr(self.plan.programmatic):
            ptx.start_next_kernel()
        # lane w knows item w of the CTA, and its warp w the same
        items = p.batch * p.num_kv_heads * p.items * OPERANDS
        x = cute.arch.block_idx()[0] + lane % self.plan.warps * cute.arch.grid_dim()[0]
        exists = (lane < self.plan.warps) & (x < items)
        item = self.item(p, cutlass.min(x, items - 1))
        own = Item(*[ptx.shuffle(value, warp) for value in item])
        lengths_at = self.lengths_at(p, item.b)
        # where the lane has its vectors of a row, those of a staged block and others
        place = self.place(smem, warp, lane)

        # What a step of decoding does nearly always is rehearsed while the previous kernel ends, so that its code is in
        # the caches then. Lengths may be anything at that time, and nothing is stored.
        before = Int32(-1)
        rehearsals = Int32(0)
        if cutlass.const_expr(self.plan.programmatic):
            step = (p.pack_all == 0) & (p.items == 1) & (p.cu_seqlens.toint() == 0)
            rehearsals = cutlass.select_(step, Int32(1), Int32(0))
        while rehearsals >= 0:
            real = rehearsals == 0
            if cutlass.const_expr(self.plan.programmatic):
                if real:
                    ptx.wait_for_previous_kernel()
            vectors = self.first_rows(p, own, lane)
            if warp == 0:
                before = self.begin(p, jobs, item, exists, lengths_at, real, lane)
            cute.arch.sync_threads()
            job = load_job(jobs + warp * JOB_BYTES)
            if (job.todo == 0) & (job.copies > 0):
                self.keep_first(p, job, vectors, real, lane)
            if rehearsals == 1:
                cute.arch.sync_threads()  # as the jobs will be written again
            rehearsals -= 1
        if (warp == 0) & (before >= 0):
            self.advance(p, jobs, before, lane)

        its_todo = ptx.load_shared(jobs + lane % self.plan.warps * JOB_BYTES, TODO_AT, 1)[0]
        todo = (lane < self.plan.warps) & (its_todo == 1)
        w = ptx.first_lane(todo)
        while w >= 0:
            at = jobs + w * JOB_BYTES
            job = load_job(at)
            block, end = job.first, job.end
            apart = cutlass.select_(p.pack_all == 1, p.items, Int32(1))
            while block < end:
                self.pack(p, smem, place, warp, lane, at, block)
                block += apart
            self.copy(p, place, warp, lane, load_job(at))  # again, rather than in registers all the while
            cute.arch.sync_warp()
            w = ptx.first_lane(todo & (lane > w))

    # -- what there is to do -----------------------------------------------------------------------------------

    def item(self, p: Params, x: Int32) -> Item:
        """Item x. Those of a CTA that appends are half K and half V, and of different sequences."""
        heads = p.num_kv_heads * p.items
        turn = cutlass.select_(p.pack_all == 1, p.num_kv_heads, p.batch * heads)  # items of K, then as many of V
        round = x // turn
        operand = round % OPERANDS
        y = round // OPERANDS * turn + x - round * turn
        share = y // p.num_kv_heads
        b = share // p.items
        head, share = y - share * p.num_kv_heads, share - b * p.items
        b += operand
        return Item(cutlass.select_(b < p.batch, b, Int32(0)), head, operand, share)

    @cute.jit
    def new_tokens(self, p: Params, b: Int32):
        """Row of the first new token of a sequence, with cu_seqlens, and how many there are."""
        start, count = Int32(0), p.new_tokens
        if p.cu_seqlens.toint() != 0:
            at = p.cu_seqlens.toint() + Int64(b) * 4
            start = ptx.load_global(at)[0]
            count = cutlass.min(ptx.load_global(at, offset=4)[0] - start, count)
        return start, count

    def lengths_at(self, p: Params, b: Int32) -> list:
        """Addresses of seqlens, packed_lens and lengths (if there are none, of seqlens) of a sequence."""
        counts = cutlass.select_(p.lengths.toint() != 0, p.lengths.toint(), p.seqlens.toint())
        return [x + Int64(b) * 4 for x in (p.seqlens.toint(), p.packed_lens.toint(), counts)]

    @cute.jit
    def first_rows(self, p: Params, item: Item, lane: Int32):
        """The lane's vectors of the first rows of new tokens, which nearly always are what there is to copy: loaded
        before the lengths are known.
        """
        row, part, _ = self.spread(lane)
        vectors = [[Int32(0)] * 4 for _ in range(0, WARP_ROWS, self.plan.spread_rows)]
        if (p.pack_all == 0) & (item.share == 0):
            start, count = self.new_tokens(p, item.b)
            for j in range_constexpr(len(vectors)):
                i = row + j * self.plan.spread_rows
                if i < count:
                    vectors[j] = ptx.load_global(self.new_row(p, item, start + i) + Int64(part), 4, cache="cg")
        return vectors

    @cute.jit
    def keep_first(self, p: Params, job: Job, vectors: list, real: Boolean, lane: Int32):
        """Store the rows that were loaded first, if it is for real."""
        row, _, _ = self.spread(lane)
        first = Int32(0)
        while first < job.copies:
            i = first + row
            self.keep_spread(p, job, i, (i < job.copies) & real, vectors[0], lane)
            vectors = [*vectors[1:], vectors[0]]
            first += self.plan.spread_rows

    def place(self, rows: Int32, warp: Int32, lane: Int32) -> Int32:
        """Where a lane has its vectors of the first row that it copies of those in shared memory."""
        return rows + (warp * WARP_ROWS + lane // ROW_LANES) * self.plan.row_bytes + lane % ROW_LANES * VECTOR

    def load_row(self, address: Int64) -> list:
        """A lane's vectors of a row; address: of its first."""
        return [ptx.load_global(address, 4, ROW_LANES * VECTOR * j, cache="cg") for j in range(self.plan.vectors)]

    @cute.jit
    def begin(
        self, p: Params, jobs: Int32, item: Item, exists: Boolean, lengths_at: list, real: Boolean, lane: Int32
    ):  # fmt: skip
        """Find out the Jobs of the CTA's items, lane w that of item w, and leave them in shared memory. Appending, and
        for real, count the items as arrived -> the count before; -1: no item.
        """
        b, head, operand, share = item
        zero = Int32(0)
        before = Int32(-1)
        if p.pack_all == 1:
            start, new = self.new_tokens(p, b)
            blocks = (new + BLOCK_TOKENS - 1) >> BLOCK_SHIFT
            todo = cutlass.select_(exists & (share < blocks), Int32(1), zero)
            job = Job(
                b, head, operand, start, zero, zero, zero, new, blocks, zero, share, blocks, zero, zero, todo, zero
            )  # fmt: skip
            if lane < self.plan.warps:
                store_job(jobs + lane * JOB_BYTES, job)
        else:
            before = self.begin_append(p, jobs, item, exists, lengths_at, real, lane)
        return before

    @cute.jit
    def begin_append(
        self, p: Params, jobs: Int32, item: Item, exists: Boolean, lengths_at: list, real: Boolean, lane: Int32
    ):  # fmt: skip
        """:meth:`begin` of an append."""
        b, head, operand, share = item
        length, packed, count = (ptx.load_word_relaxed(x) for x in lengths_at)
        start, new = self.new_tokens(p, b)
        new = cutlass.select_(p.lengths.toint() != 0, cutlass.min(count, new), new)
        new = cutlass.max(new, 0)
        sinks = cutlass.min(length, p.num_sink)
        old = length - sinks - packed
        to_sink = cutlass.min(new, p.num_sink - sinks)
        total = old + new - to_sink
        blocks = cutlass.max(total - p.recent, 0) >> BLOCK_SHIFT
        column = packed >> BLOCK_SHIFT
        failed = Int32(0)
        if real:
            failed = self.failed(p, b, column, blocks, lane)
        if failed == 1:
            new, blocks, to_sink, total = Int32(0), Int32(0), Int32(0), old

        # The value added depends on what was read, so an item does not count before it has read.
        before = Int32(-1)
        if exists & real:
            before = ptx.atomic_add(self.counter(p, b), failed + 1, "relaxed")

        in_tail = (old + BLOCK_TOKENS - 1) >> BLOCK_SHIFT  # blocks that begin in the tail
        first, end = Int32(0), cutlass.min(in_tail, blocks)
        copies = to_sink + total - cutlass.select_(blocks > 0, blocks * BLOCK_TOKENS, old)
        if share > 0:
            first = in_tail + share - 1
            end = cutlass.min(first + 1, blocks)
            copies = Int32(0)
        copies = cutlass.select_(exists, copies, Int32(0))
        todo = exists & ((first < end) | ((blocks > 0) & (copies > 0)) | (copies > WARP_ROWS))
        job = Job(
            b, head, operand, start, sinks, to_sink, old, total, blocks, column, first, end, copies,
            cutlass.select_(failed == 1, Int32(-1), length + new), cutlass.select_(todo, Int32(1), Int32(0)), Int32(0),
        )  # fmt: skip
        if lane < self.plan.warps:
            store_job(jobs + lane * JOB_BYTES, job)
        return before

    @cute.jit
    def failed(self, p: Params, b: Int32, column: Int32, blocks: Int32, lane: Int32):
        """1: one of the blocks of the lane's item has no page."""
        failed = Int32(0)
        if ptx.any_lane(blocks > 0):  # all lanes look at one item's after another
            for w in cutlass.range(self.plan.warps, unroll=1):
                its_b, its_column, its_blocks = (ptx.shuffle(x, w) for x in (b, column, blocks))
                i = lane
                while i - lane < its_blocks:
                    missing = Int32(0)
                    if i < its_blocks:
                        missing = cutlass.select_(self.page(p, its_b, its_column + i) < 0, Int32(1), Int32(0))
                    if ptx.any_lane(missing == 1):
                        failed = cutlass.select_(lane == w, Int32(1), failed)
                    i += LANES
        return failed

    def counter(self, p: Params, b: Int32) -> Int64:
        """Where the items of a sequence are counted."""
        return p.workspace.toint() + Int64(b) * COUNTER_BYTES

    @cute.jit
    def advance(self, p: Params, jobs: Int32, before: Int32, lane: Int32):
        """The last item of a sequence to count advances its lengths: all have read them."""
        job = load_job(jobs + lane * JOB_BYTES)
        others = p.num_kv_heads * p.items * OPERANDS - 1
        if job.length < 0:
            others = 2 * others
        if before == others:
            ptx.store_relaxed(self.counter(p, job.b), [Int32(0)])  # ready for the next launch
            if job.length < 0:
                if p.status.toint() != 0:
                    ptx.atomic_max(p.status.toint(), job.b + 1)
            else:
                at = Int64(job.b) * 4
                ptx.store_relaxed(p.seqlens.toint() + at, [job.length])
                ptx.store_relaxed(p.packed_lens.toint() + at, [(job.column + job.blocks) * BLOCK_TOKENS])

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

    def of_operand(self, operand: Int32, k, v):
        return cutlass.select_(operand == 0, k, v)

    def rotates(self, p: Params, operand: Int32):
        return self.of_operand(operand, p.rotate_k, p.rotate_v) == 1

    def new_row(self, p: Params, item, token: Int32) -> Int64:
        """Address of a new token's row of an Item or Job; token: from cu_seqlens' row on."""
        base = self.of_operand(item.operand, p.k_new.toint(), p.v_new.toint()) + Int64(item.head) * p.new_head_stride
        batch_stride = cutlass.select_(p.cu_seqlens.toint() != 0, Int64(0), p.new_batch_stride)
        return base + Int64(item.b) * batch_stride + Int64(token) * p.new_token_stride

    def kept_row(self, p: Params, job: Job, k: cute.Pointer, v: cute.Pointer, capacity: Int32, token: Int32) -> Int64:
        """Address of a row of tail or sinks."""
        row = token_row(p, job.b, job.head, capacity, token, self.plan.head_dim)
        return self.of_operand(job.operand, k.toint(), v.toint()) + row

    def tail_row(self, p: Params, job: Job, token: Int32) -> Int64:
        return self.kept_row(p, job, p.tail_k, p.tail_v, p.tail_capacity, token)

    @cute.jit
    def target_row(self, p: Params, job: Job, i: Int32, token: Int32):
        """Where copy i belongs; token: of the tail, if it is not to the sinks."""
        target = self.tail_row(p, job, token)
        if i < job.to_sink:
            target = self.kept_row(p, job, p.sink_k, p.sink_v, p.num_sink, job.sinks + i)
        return target

    def stream_row(self, p: Params, job: Job, token: Int32) -> Int64:
        """Address of a token of the stream."""
        new = self.new_row(p, job, job.start + job.to_sink + token - job.old)
        return cutlass.select_(token < job.old, self.tail_row(p, job, token), new)

    @cute.jit
    def copy(self, p: Params, place: Int32, warp: Int32, lane: Int32, job: Job):
        """Copy the item's 16-bit tokens: to the sinks, then those of the stream that stay to where they belong."""
        part = Int64((lane % ROW_LANES) * VECTOR)
        first = warp * WARP_ROWS
        while first < job.copies:
            i = first + lane // ROW_LANES
            inside = i < job.copies
            i = cutlass.min(i, job.copies - 1)
            source = self.stream_row(p, job, self.kept_token(job, i))
            if i < job.to_sink:
                source = self.new_row(p, job, job.start + i)
            source += part
            self.keep(p, place, job, i, inside, self.load_row(source), lane)
            first += self.plan.rows_at_once

    def kept_token(self, job: Job, i: Int32) -> Int32:
        """Of the stream, that copy i is of; negative: to the sinks."""
        return cutlass.select_(job.blocks > 0, job.blocks * BLOCK_TOKENS, job.old) + i - job.to_sink

    @cute.jit
    def keep(self, p: Params, place: Int32, job: Job, i: Int32, inside: Boolean, row: list, lane: Int32):
        """Store the lane's vectors of copy i, if it is one: a new row after rotation."""
        token = self.kept_token(job, i)
        is_new = (token >= job.old) | (i < job.to_sink)
        target = self.target_row(p, job, i, token - job.blocks * BLOCK_TOKENS) + Int64(lane % ROW_LANES * VECTOR)
        if self.rotates(p, job.operand):  # all lanes: they exchange values
            limited = lambda x: self.rows.limited(p, place, x)  # noqa: E731
            rotated = self.rows.limited_and_rotated(p, row, lane, [1, 2], limited)
            row = [
                [cutlass.select_(is_new, new, old) for new, old in zip(*both, strict=True)]
                for both in zip(rotated, row, strict=True)
            ]
        if inside:
            for j in range_constexpr(self.plan.vectors):
                ptx.store_global(target, row[j], ROW_LANES * VECTOR * j)

    def spread(self, lane: Int32) -> tuple:
        """(row, byte of the lane's vector, whether it has one of its own) of rows that are spread over the lanes."""
        row, vector = lane // self.plan.spread_lanes, lane % self.plan.spread_lanes
        last = self.plan.row_vectors - 1
        return row, cutlass.min(vector, last) * VECTOR, vector <= last

    @cute.jit
    def keep_spread(self, p: Params, job: Job, i: Int32, inside: Boolean, vector: list, lane: Int32):
        """Store new row i, of which the lane has a vector, behind the sinks or the tail, rotated if need be."""
        _, part, has_own = self.spread(lane)
        target = self.target_row(p, job, i, job.old + i - job.to_sink)
        if (p.rotate_k == 1) | (p.rotate_v == 1):  # all lanes: they exchange values
            rotates = self.rotates(p, job.operand)
            rotated = self.rows.rotated_spread(p, vector, lane)
            vector = [cutlass.select_(rotates, new, old) for new, old in zip(rotated, vector, strict=True)]
        if inside & has_own:
            ptx.store_global(target + Int64(part), vector)

    # -- packing -----------------------------------------------------------------------------------------------

    @cute.jit
    def pack(self, p: Params, smem: Int32, place: Int32, warp: Int32, lane: Int32, job_at: Int32, block: Int32):
        """Pack a block of the stream of the job at this address, which is read more than once to hold few registers.
        Without a page nothing is stored.

        Values beyond the limit are so rare that they are looked for among the ranges only: then all is done again, with
        care.
        """
        job = load_job(job_at)
        page = self.page(p, job.b, job.column + block)
        count = cutlass.min(job.total - block * BLOCK_TOKENS, BLOCK_TOKENS)
        operand = job.operand
        careful = Int32(0)
        again = Int32(1)
        while again == 1:
            self.prepare_rows(p, smem, place, warp, lane, load_job(job_at), block, careful)
            ptx.sync_team(self.plan.barrier, self.plan.threads)
            fits = Boolean(True)
            limit = cutlass.select_(self.rotates(p, operand), Float32(SMALL), Float32(LIMIT))
            if operand == 0:
                fits = self.encoders["k"].find_parameters(p, smem, warp, lane, count, p.k_clip, limit)
            else:
                fits = self.encoders["v"].find_parameters(p, smem, warp, lane, count, p.v_clip, limit)
            again = Int32(0)
            unfit = (careful == 0) & (fits == False)  # noqa: E712
            if self.any_thread(unfit, job_at, lane, careful):
                again = Int32(1)
            careful = Int32(1)
        target = p.pages.toint() + Int64(page) * p.page_stride + Int64(load_job(job_at).head) * p.head_stride
        if page >= 0:
            if operand == 0:
                self.encoders["k"].encode(p, smem, warp, lane, target, count)
            else:
                self.encoders["v"].encode(p, smem, warp, lane, target, count)
        ptx.sync_team(self.plan.barrier, self.plan.threads)

    @cute.jit
    def any_thread(self, condition: Boolean, job_at: Int32, lane: Int32, careful: Int32):
        """A barrier of the warps that pack the block; tells whether the condition, which never does with care, holds
        for one of their threads, or did for a block before of the same job.
        """
        found = Boolean(False)
        if cutlass.const_expr(self.plan.barrier is None):
            found = ptx.any_thread(condition)
        else:  # named barriers do not vote
            if ptx.any_lane(condition) & (lane == 0):
                ptx.store_shared(job_at, ANY_AT, [Int32(1)])
            ptx.sync_team(self.plan.barrier, self.plan.threads)
            found = (ptx.load_shared(job_at, ANY_AT, 1)[0] == 1) & (careful == 0)
        return found

    @cute.jit
    def prepare_rows(
        self, p: Params, smem: Int32, place: Int32, warp: Int32, lane: Int32, job: Job, block: Int32, careful: Int32
    ):  # fmt: skip
        """Copy the warp's rows of the block to shared memory, rotate new ones, with care condition all."""
        first = block * BLOCK_TOKENS
        self.stage(p, place, warp, lane, job, first)
        if careful == 1:
            self.rows.limit_block(p, place)
        cute.arch.sync_warp()
        if self.rotates(p, job.operand):
            self.rows.rotate_block(p, smem, warp, lane, job.old - first, job.total - first)
            cute.arch.sync_warp()
            if careful == 1:
                self.rows.limit_block(p, place)

    @cute.jit
    def stage(self, p: Params, place: Int32, warp: Int32, lane: Int32, job: Job, first: Int32):
        """Copy 128 rows of the stream to shared memory, every 32nd by the same lanes; beyond the end the last one."""
        part = Int64((lane % ROW_LANES) * VECTOR)
        for i in range_constexpr(0, BLOCK_TOKENS, self.plan.rows_at_once):
            token = cutlass.min(first + warp * WARP_ROWS + lane // ROW_LANES + i, job.total - 1)
            source = self.stream_row(p, job, token) + part
            stage_row(place + i * self.plan.row_bytes, source, self.plan.vectors)
        ptx.wait_for_copies()
