"""Decode attention over BitFusion blocks with mma.sync: one launch for any batch of ragged sequences.

producer warp   walks the CTA's share of the work list (schedule.py) and copies each block into a ring of
                shared-memory stages: one bulk copy per block, cp.async before Hopper; "full" and "empty"
                mbarriers hand the stages over
consumer warps  in groups of ``warps_per_block``; a group takes every n-th block, a warp its token slices
                (attention.py), alone with its own running maximum:
    Q' = Q * scale_k              once per token group (K per channel)
    S^T = codes_k Q' + bias       A = codes as fp16 denormals, one AND per register; the bias comes out of MMAs
                                  with the zeros as rows of A; the powers of two leave with the accumulator
    P = exp2(S - maximum)         rescaled only when the maximum grows by more than a factor of 2
    O^T += codes_v (P * scale_v)  P transposed by movmatrix; the zeros again by MMAs
16-bit tokens   sinks and tail: the same MMAs with K and V from global memory
merge warps     find out the next piece and prepare its queries (queries.py); merge the consumers' results of a piece
                while these are at the next one; the consumers themselves merge the CTA's last, and the partial
                results of CTAs that share a piece (merge.py)
"""

import cutlass
from cutlass import Int32, cute, range_constexpr

from . import ptx, step
from . import warpgroup as wg
from .attention import Attention
from .layouts import BLOCK_TOKENS, LANES
from .merge import Merge
from .plan import BARRIER_BYTES, CONSUMER_BARRIER, MERGE_WARPS, SLOTS, Plan
from .schedule import Params, Schedule, load_piece

COPY_BYTES = 16  # of one cp.async
MAX_WINDOW = 1 << 30  # more than any length; positions minus a window stay within 32 bits


class DecodeKernel:
    """The kernel of one KernelConfig, and the host function that the DSL compiles."""

    def __init__(self, config):
        self.plan = Plan(config)
        self.schedule = Schedule(self.plan)
        self.attention = Attention(self.plan)
        self.merge = Merge(self.plan, self.schedule)
        self.step = self.merge.step

    @cute.jit
    def __call__(self, p: Params | step.Params, grid: Int32):
        self.kernel(p).launch(
            grid=(grid, 1, 1),
            block=(self.plan.threads, 1, 1),
            smem=self.plan.smem_bytes,
            min_blocks_per_mp=self.plan.config.ctas_per_sm,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, p: Params | step.Params):
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // LANES)
        lane = thread % LANES
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        if thread == 0:
            self.init_barriers(smem)
            if cutlass.const_expr(self.plan.bulk):
                ptx.fence_mbarrier_init()
        cute.arch.sync_threads()  # the barriers are initialised
        p = p._replace(window=cutlass.min(p.window, MAX_WINDOW))
        if warp < self.plan.warps:
            if cutlass.const_expr(self.plan.moves_registers):
                wg.take_registers(self.plan.consumer_registers)
            self.consume(p, smem, warp, lane)
        else:
            self.assist(p, smem, warp, lane)

    def init_barriers(self, smem: Int32) -> None:
        """Initialise all barriers, by one thread."""
        plan = self.plan
        for stage in range(plan.stages):
            ptx.mbarrier_init(smem + (plan.full_at + BARRIER_BYTES * stage), 1 if plan.bulk else LANES)
            ptx.mbarrier_init(smem + (plan.empty_at + BARRIER_BYTES * stage), plan.warps_per_block)
        ptx.mbarrier_init(smem + plan.merge_full_at, plan.warps * LANES)
        ptx.mbarrier_init(smem + plan.merge_empty_at, MERGE_WARPS * LANES)
        for slot in range(SLOTS):
            ptx.mbarrier_init(smem + (plan.slot_full_at + BARRIER_BYTES * slot), plan.preparers * LANES)
            if plan.steps:
                ptx.mbarrier_init(smem + (plan.rows_full_at + BARRIER_BYTES * slot), LANES)

    @cute.jit
    def assist(self, p: Params, smem: Int32, warp: Int32, lane: Int32):
        """What the warps behind the consumers do."""
        if cutlass.const_expr(self.plan.moves_registers):
            wg.give_registers(self.plan.auxiliary_registers)
        if warp == self.plan.warps:
            self.produce(p, smem, lane)
        else:
            self.merge.help(p, smem, warp - (self.plan.warps + 1), lane)

    # -- producer ----------------------------------------------------------------------------------------------

    @cute.jit
    def produce(self, p: Params, smem: Int32, lane: Int32):
        """Copy the blocks of the CTA's share into the ring."""
        at, end, seq, _, page = self.schedule.begin(
            p,
            lane,
            announce=lambda *share: None,
            fetch=lambda at, end, seq: self.schedule.entries(p, at, end, seq, Int32(0), lane),
        )
        stage = Int32(0)
        parity = Int32(1)  # the first round finds every stage empty
        while at.x < end:
            count, blocks, pages, _ = self.schedule.blocks_of(p, at, end, seq)
            i = Int32(0)
            while i < blocks:
                source = pages + cutlass.Int64(ptx.shuffle(page, i % LANES)) * p.page_stride
                self.copy_block(smem, source, stage, parity, lane)
                stage += 1
                if stage == self.plan.stages:
                    stage = Int32(0)
                    parity = parity ^ 1
                i += 1
                if i % LANES == 0:
                    page = self.schedule.entries(p, at, end, seq, i, lane)
            at = self.schedule.next_piece(p, at, seq.units, count)
            if at.x < end:
                seq = self.schedule.sequence(p, at.b)
                page = self.schedule.entries(p, at, end, seq, Int32(0), lane)
        if cutlass.const_expr(self.plan.steps):
            self.step.count(p, lane)  # no more lengths are read

    @cute.jit
    def copy_block(self, smem: Int32, source: cutlass.Int64, stage: Int32, parity: Int32, lane: Int32):
        full = smem + self.plan.full_at + stage * BARRIER_BYTES
        empty = smem + self.plan.empty_at + stage * BARRIER_BYTES
        nbytes = self.plan.fmt.block_bytes
        target = smem + stage * nbytes
        if cutlass.const_expr(self.plan.bulk):
            # by all lanes: a warp that has parted is not suspended, but polls
            ptx.mbarrier_wait(empty, parity, self.plan.wait)
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_expect(full, nbytes)
                ptx.bulk_copy(target, source, nbytes, full)
        else:
            ptx.mbarrier_wait(empty, parity, self.plan.wait)
            target += lane * COPY_BYTES
            source += cutlass.Int64(lane) * COPY_BYTES
            row = LANES * COPY_BYTES
            for i in range_constexpr(nbytes // row):
                ptx.copy16(target, source, i * row)
            if cutlass.const_expr(nbytes % row != 0):
                if lane * COPY_BYTES < nbytes % row:
                    ptx.copy16(target, source, nbytes // row * row)
            ptx.mbarrier_arrive_after_copies(full)

    # -- consumers ---------------------------------------------------------------------------------------------

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32):
        """Attend over the CTA's share: blocks from the ring, 16-bit units from global memory. Merge the results of the
        last piece, and the partial results of the first one, if it ends here and began in another CTA.
        """
        plan = self.plan
        if cutlass.const_expr(plan.programmatic):
            if warp == plan.warps - 1:  # the last to get a block
                self.schedule.warm(p, lane)
            ptx.wait_for_previous_kernel()  # it may have written the tail
        group = warp // plan.warps_per_block
        member = warp % plan.warps_per_block
        block = group  # the group's next block, counted over the share; its stage and the parity of its round
        stage = group
        parity = Int32(0)
        ring = Int32(0)  # blocks of the share before this piece
        done = Int32(0)  # pieces
        is_last = Int32(0)
        while is_last == 0:
            slot = smem + plan.slots_at + done % SLOTS * plan.slot_bytes
            ptx.mbarrier_wait(smem + plan.slot_full_at + done % SLOTS * BARRIER_BYTES, done // SLOTS % 2, plan.wait)
            piece = load_piece(slot + plan.piece_offset)
            query = self.attention.read_queries(p, slot, lane)
            state = self.attention.first_state()

            first_position = piece.first_position - ring * BLOCK_TOKENS
            ring += piece.blocks
            while block < ring:
                position = first_position + block * BLOCK_TOKENS
                general = (
                    (position + BLOCK_TOKENS > piece.seen_by_all) | (position < piece.window_start) | (p.softcap > 0.0)
                )
                addresses = self.attention.addresses(smem + stage * plan.fmt.block_bytes, member, lane)
                position += member * (BLOCK_TOKENS // plan.warps_per_block)
                end = piece.packed_end
                ptx.mbarrier_wait(smem + plan.full_at + stage * BARRIER_BYTES, parity, plan.wait)
                if general:
                    state = self.attention.attend_block(p, addresses, position, end, lane, query, state, True)
                else:
                    state = self.attention.attend_block(p, addresses, position, end, lane, query, state, False)
                cute.arch.sync_warp()
                if lane == 0:
                    ptx.mbarrier_arrive(smem + plan.empty_at + stage * BARRIER_BYTES)
                block += plan.block_groups
                stage += plan.block_groups
                if stage >= plan.stages:
                    stage -= plan.stages
                    parity = parity ^ 1
            state = self.attention.finished(state)
            piece = load_piece(slot + plan.piece_offset)  # again, rather than in registers all the while
            warp, lane = self.place_again(warp, lane)
            if cutlass.const_expr(plan.steps):
                ptx.mbarrier_wait(smem + plan.rows_full_at + done % SLOTS * BARRIER_BYTES, done // SLOTS % 2, plan.wait)
            chunk = piece.first_chunk + warp // plan.warps_per_block
            while chunk < piece.end_chunk:
                member_again = warp % plan.warps_per_block
                state = self.attention.attend_chunk(p, piece, chunk, member_again, lane, query, state)
                chunk += plan.block_groups
            ptx.mbarrier_wait(smem + plan.merge_empty_at, (done + 1) % 2, plan.wait)  # the first finds it empty
            self.merge.store_state(smem, warp, lane, state)
            if piece.is_last == 1:
                ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)
            else:
                ptx.mbarrier_arrive(smem + plan.merge_full_at)
            is_last = piece.is_last
            done += 1
        team = Int32(plan.warps)
        self.merge.merge(p, smem, warp, team, lane, load_piece(self.merge.piece_at(smem, (done - 1) % SLOTS)))
        if cutlass.const_expr(plan.steps):
            if ptx.load_shared(smem, plan.due_at, 1)[0] != 0:
                self.step.pack(p, smem, warp, lane, self.merge.piece_at(smem, (done - 1) % SLOTS))
        first = load_piece(smem + plan.first_piece_at)
        if first.collects == 1:
            self.merge.collect(p, warp, team, lane, first)

    def place_again(self, warp: Int32, lane: Int32) -> tuple:
        """(warp, lane): found anew in kernels of few columns, which otherwise would hold registers in local memory."""
        if self.plan.copies == 1:
            return warp, lane
        thread = wg.thread_again()
        return thread // LANES, thread % LANES
