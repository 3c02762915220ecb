"""Decode attention over BitFusion blocks with mma.sync: one launch for any batch of ragged sequences.

producer warp   walks the CTA's share of the work list (schedule.py) and copies each block into a ring of
                shared-memory stages: one bulk copy per block, by some lanes at once, cp.async before Hopper; then
                the piece's 16-bit tokens (sinks and tail), a chunk to a stage; "full" and "empty" mbarriers hand
                the stages over
consumer warps  in groups of ``warps_per_block``; a group takes every n-th block, a warp its token slices
                (attention.py), alone with its own running maximum:
    Q' = Q * scale_k              once per token group (K per channel)
    S^T = codes_k Q' + bias       A = codes as fp16 denormals, one AND per register; the bias comes out of MMAs
                                  with the zeros as rows of A; the powers of two leave with the accumulator
    P = exp2(S - maximum)         rescaled only when the maximum grows by more than a factor of 2
    O^T += codes_v (P * scale_v)  P transposed by movmatrix; the zeros again by MMAs
                chunks: the same MMAs with K and V as they are
merge warps     find out the next piece and prepare its queries (queries.py); merge the consumers' results of a piece
                while these are at the next one; the consumers themselves merge the CTA's last, and the partial
                results of CTAs that share a piece (merge.py)
"""

import cutlass
from cutlass import Boolean, Int32, cute, range_constexpr

from . import ptx, step
from . import warpgroup as wg
from .append_plan import ROW_LANES, VECTOR, WARP_ROWS
from .attention import Attention
from .layouts import BLOCK_TOKENS, LANES, TILE
from .merge import Merge
from .plan import BARRIER_BYTES, CONSUMER_BARRIER, MERGE_WARPS, SLOTS, Plan
from .rows import stage_row
from .schedule import Schedule, nothing
from .work import MAX_WINDOW, Params, Sequence, load_field, load_piece, token_row, token_stride, tokens_of

COPY_BYTES = 16  # of one cp.async


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
        p = self.bounded(p)
        share = self.start(p, smem, warp, lane)
        if warp < self.plan.warps:
            if cutlass.const_expr(self.plan.moves_registers):
                wg.take_registers(self.plan.consumer_registers)
            self.consume(p, smem, warp, lane)
        else:
            self.assist(p, smem, warp, lane, share)

    def bounded(self, p: Params) -> Params:
        """The parameters with a window of at most MAX_WINDOW, whoever launches."""
        return p._replace(window=cutlass.min(p.window, MAX_WINDOW))

    def init_barriers(self, smem: Int32) -> None:
        """Initialise all barriers, and the word whether there are blocks to pack, by one thread."""
        plan = self.plan
        for stage in range(plan.stages):
            ptx.mbarrier_init(smem + (plan.full_at + BARRIER_BYTES * stage), LANES)
            ptx.mbarrier_init(smem + (plan.empty_at + BARRIER_BYTES * stage), plan.warps_per_block)
        ptx.mbarrier_init(smem + plan.merge_full_at, plan.warps * LANES)
        ptx.mbarrier_init(smem + plan.merge_empty_at, MERGE_WARPS * LANES)
        for slot in range(SLOTS):
            ptx.mbarrier_init(smem + (plan.slot_full_at + BARRIER_BYTES * slot), plan.preparers * LANES)
            if plan.steps:
                ptx.mbarrier_init(smem + (plan.rows_full_at + BARRIER_BYTES * slot), LANES)
        if plan.steps:
            ptx.store_shared(smem, plan.due_at, [Int32(0)])

    @cute.jit
    def start(self, p: Params, smem: Int32, warp: Int32, lane: Int32):
        """Find the CTA's share (Schedule.begin), for all warps that need it by the same instructions: when they are not
        in the caches, as after a kernel that is not ours, fetching them takes longer than all they do.
        """
        share = nothing(lane)
        warms = (warp == self.plan.warps - 1) & self.plan.programmatic  # the last consumer to get a block
        if warms | (warp >= self.plan.warps):
            share = self.schedule.begin(
                p,
                lane,
                announce=lambda *share: self.announce(p, smem, warp, lane, share),
                fetch=lambda *share: self.fetch(p, smem, warp, lane, share),
                fetches=warp >= self.plan.warps,
            )
        return share

    @cute.jit
    def announce(self, p: Params, smem: Int32, warp: Int32, lane: Int32, share: tuple):
        """What can be done with the share before the previous kernel ends."""
        if warp < self.plan.warps:
            self.schedule.warm_share(p, lane, *share[:3])
        if warp > self.plan.warps:
            self.merge.tell(p, smem, Int32(0), warp - (self.plan.warps + 1), lane, share, is_first=True)

    @cute.jit
    def fetch(self, p: Params, smem: Int32, warp: Int32, lane: Int32, share: tuple):
        """What needs that kernel's results: the producer's first entries of the table, or a merge warp's queries."""
        at, end, seq = share
        page = Int32(0)
        if warp == self.plan.warps:
            page = self.schedule.entries(p, at, end, seq, Int32(0), lane)
        elif warp > self.plan.warps:
            self.merge.prepare(p, smem, Int32(0), warp - (self.plan.warps + 1), lane, at, seq, is_first=True)
        return page

    @cute.jit
    def assist(self, p: Params, smem: Int32, warp: Int32, lane: Int32, share: tuple):
        """What the warps behind the consumers do."""
        if cutlass.const_expr(self.plan.moves_registers):
            wg.give_registers(self.plan.auxiliary_registers)
        if warp == self.plan.warps:
            self.produce(p, smem, lane, share)
        else:
            self.merge.help(p, smem, warp - (self.plan.warps + 1), lane, share)

    # -- producer ----------------------------------------------------------------------------------------------

    @cute.jit
    def produce(self, p: Params, smem: Int32, lane: Int32, share: tuple):
        """Copy the blocks of the CTA's share into the ring."""
        at_once = self.plan.blocks_at_once
        at, end, seq, _, page = share
        turn = Int32(0)
        done = Int32(0)  # pieces
        while at.x < end:
            count, blocks, pages, _ = self.schedule.blocks_of(p, at, end, seq)
            then = self.schedule.next_piece(p, at, seq.units, count)
            ahead, of_next = Int32(0), Int32(0)
            lengths = (Int32(0), Int32(0))
            i = Int32(0)
            while (i < blocks) | (i == 0):
                if i < blocks:
                    if cutlass.const_expr(self.plan.bulk):
                        copies = cutlass.min(blocks - i, at_once)
                        own = cutlass.select_(lane < copies, lane, Int32(0))
                        source = pages + cutlass.Int64(ptx.shuffle(page, i % LANES + own)) * p.page_stride
                        self.copy_blocks(smem, source, self.following(turn, own), lane < copies)
                        turn = self.following(turn, copies)
                    else:
                        source = pages + cutlass.Int64(ptx.shuffle(page, i % LANES)) * p.page_stride
                        self.copy_block(smem, source, turn, lane)
                        turn = self.following(turn, 1)
                if i % LANES == 0:
                    # behind a copy, but before they are needed: a load waits as long as the ring lasts
                    ahead = self.schedule.entries(p, at, end, seq, i + LANES, lane)
                    if then.x < end:
                        lengths = self.schedule.lengths(p, then.b)
                        if then.b == at.b:
                            of_next = self.schedule.entries(p, then, end, seq, Int32(0), lane)
                i += at_once
                if i % LANES == 0:
                    page = ahead
            coming, page = seq, of_next
            if (then.x < end) & (then.b != at.b):
                coming = self.schedule.units_of(p, then.b, lengths)
                page = self.schedule.entries(p, then, end, coming, Int32(0), lane)
            if cutlass.const_expr(self.plan.rings_chunks):
                chunk, end_chunk = self.schedule.chunks(p, at, count, seq)
                head, _ = self.schedule.tile(p, at)
                while chunk < end_chunk:
                    self.copy_chunk(p, smem, at.b, head, seq, chunk, done, turn, lane)
                    turn = self.following(turn, 1)
                    chunk += 1
                done += 1
            at, seq = then, coming
        if cutlass.const_expr(self.plan.steps):
            self.step.count(p, lane)  # no more lengths are read

    @cute.jit
    def copy_blocks(self, smem: Int32, source: cutlass.Int64, turn: Int32, has_own: Boolean):
        """Copy blocks to stages, each by a lane of its own, when all of these are empty. One block after another is
        slower than warps that attend to blocks of 2 bits.
        """
        target, full, parity = self.stage(smem, turn)
        # by all lanes: a warp that has parted is not suspended, but polls. The first round finds stages empty
        ptx.mbarrier_wait(self.empty(full), parity ^ 1, self.plan.wait)
        cute.arch.sync_warp()
        if has_own:
            if cutlass.const_expr(self.plan.rings_chunks):  # whose barriers expect all lanes
                ptx.mbarrier_arrive(full, LANES - 1)
            ptx.mbarrier_expect(full, self.plan.fmt.block_bytes)
            ptx.bulk_copy(target, source, self.plan.fmt.block_bytes, full)

    @cute.jit
    def copy_block(self, smem: Int32, source: cutlass.Int64, turn: Int32, lane: Int32):
        """Copy a block to a stage by cp.async, when it is empty."""
        target, full, parity = self.stage(smem, turn)
        nbytes = self.plan.fmt.block_bytes
        ptx.mbarrier_wait(self.empty(full), parity ^ 1, self.plan.wait)
        target += lane * COPY_BYTES
        source += cutlass.Int64(lane) * COPY_BYTES
        row = LANES * COPY_BYTES
        for i in range_constexpr(nbytes // row):
            ptx.copy16(target, source, i * row)
        if cutlass.const_expr(nbytes % row != 0):
            if lane * COPY_BYTES < nbytes % row:
                ptx.copy16(target, source, nbytes // row * row)
        ptx.mbarrier_arrive_after_copies(full)

    @cute.jit
    def copy_chunk(
        self, p: Params, smem: Int32, b: Int32, head: Int32, seq: Sequence, chunk: Int32, done: Int32, turn: Int32,
        lane: Int32,
    ):  # fmt: skip
        """Copy a chunk of 16-bit tokens to a stage; in the tile that has the last one, it is repeated. In a kernel that
        appends, first wait for the new ones in it. Every piece but a share's first and last has such a chunk in the
        share, so that no phase of their barrier is skipped.
        """
        target, full, parity = self.stage(smem, turn)
        empty, parity = self.empty(full), parity ^ 1
        rows = self.plan.chunk_rows
        vectors = 2 * self.plan.head_dim // (ROW_LANES * VECTOR)
        k, v, capacity, token, held, position = tokens_of(p, seq, chunk, self.plan.chunk)
        part = lane % ROW_LANES * VECTOR
        step = token_stride(p, self.plan.head_dim)
        first = token_row(p, b, head, capacity, Int32(0), self.plan.head_dim) + cutlass.Int64(part)
        k, v = k + first, v + first
        place = target + lane // ROW_LANES * (2 * rows(1, 0, 0)) + part
        if cutlass.const_expr(self.plan.steps):
            if position + token + self.plan.chunk > seq.length - p.q_len:
                kept = smem + self.plan.rows_full_at + done % SLOTS * BARRIER_BYTES
                ptx.mbarrier_wait(kept, done // SLOTS % 2, self.plan.wait)
        ptx.mbarrier_wait(empty, parity, self.plan.wait)
        for t in range_constexpr(self.plan.chunk_tiles):
            if token + TILE * t < held:
                for i in range_constexpr(TILE * t, TILE * (t + 1), WARP_ROWS):
                    last = cutlass.min(token + i + lane // ROW_LANES, held - 1)
                    at = cutlass.Int64(last) * cutlass.Int64(step)
                    for operand, base in enumerate((k, v)):
                        stage_row(place + 2 * rows(i, operand, 0), base + at, vectors)
        ptx.mbarrier_arrive_after_copies(full)

    # -- the ring: a turn is one of two rounds of the stages

    def stage(self, smem: Int32, turn: Int32) -> tuple:
        """(address of the turn's stage, of its barrier "full", parity of the round)."""
        stages = self.plan.stages
        second = turn >= stages
        stage = cutlass.select_(second, turn - stages, turn)
        full = smem + self.plan.full_at + stage * BARRIER_BYTES
        return smem + stage * self.plan.fmt.block_bytes, full, cutlass.select_(second, Int32(1), Int32(0))

    def empty(self, full: Int32) -> Int32:
        """Barrier "empty" of the stage with this barrier "full"."""
        return full + (self.plan.empty_at - self.plan.full_at)

    @cute.jit
    def leave(self, full: Int32, lane: Int32):
        """A consumer warp is done with the stage with this barrier "full"."""
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(self.empty(full))

    def following(self, turn: Int32, count: Int32 | int) -> Int32:
        """The turn ``count`` stages later."""
        turn += count
        return cutlass.select_(turn >= 2 * self.plan.stages, turn - 2 * self.plan.stages, turn)

    # -- consumers ---------------------------------------------------------------------------------------------

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32):
        """Attend over the CTA's share, from the ring. Merge the results of the last piece, and the partial results of
        the first one, if it ends here and began in another CTA.
        """
        plan = self.plan
        if cutlass.const_expr(plan.programmatic):
            ptx.wait_for_previous_kernel()  # it may still read what is written here
        group = warp // plan.warps_per_block
        member = warp % plan.warps_per_block
        turn = group  # the group's next one, and that as a block of the piece, then as a chunk
        i = group
        done = Int32(0)  # pieces
        is_last = Int32(0)
        while is_last == 0:
            slot = smem + plan.slots_at + done % SLOTS * plan.slot_bytes
            ptx.mbarrier_wait(smem + plan.slot_full_at + done % SLOTS * BARRIER_BYTES, done // SLOTS % 2, plan.wait)
            piece_at = slot + plan.piece_offset
            piece = load_piece(piece_at)
            query = self.attention.read_queries(slot, lane)
            state = self.attention.first_state()

            left = piece.blocks - i
            position = piece.first_position + i * BLOCK_TOKENS
            while left > 0:
                # fields are loaded again, rather than in registers all the while
                seen_by_all, window_start = load_field(piece_at, "seen_by_all"), load_field(piece_at, "window_start")
                general = (position + BLOCK_TOKENS > seen_by_all) | (position < window_start) | (p.softcap > 0.0)
                stage, full, parity = self.stage(smem, turn)
                addresses = self.attention.addresses(stage, member, lane)
                first = position + member * (BLOCK_TOKENS // plan.warps_per_block)
                ptx.mbarrier_wait(full, parity, plan.wait)
                if general:
                    end = load_field(piece_at, "packed_end")
                    state = self.attention.attend_block(p, addresses, first, lane, query, state, end)
                else:
                    state = self.attention.attend_block(p, addresses, first, lane, query, state)
                self.leave(full, lane)
                turn = self.following(turn, plan.block_groups)
                left -= plan.block_groups
                position += plan.block_groups * BLOCK_TOKENS
            i = -left
            state = self.attention.finished(state)
            piece = load_piece(piece_at)
            warp, lane = self.place_again()
            while piece.first_chunk + i < piece.end_chunk:
                stage, full, parity = self.stage(smem, turn)
                ptx.mbarrier_wait(full, parity, plan.wait)
                member_again = warp % plan.warps_per_block
                chunk = piece.first_chunk + i
                state = self.attention.attend_chunk(p, piece, chunk, stage, member_again, lane, query, state)
                if cutlass.const_expr(plan.bulk):
                    wg.fence_async()  # a bulk copy will write where cp.async did
                self.leave(full, lane)
                turn = self.following(turn, plan.block_groups)
                i += plan.block_groups
            i -= cutlass.max(piece.end_chunk - piece.first_chunk, 0)
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

    def place_again(self) -> tuple:
        """(warp, lane): found anew, rather than in registers all the while."""
        thread = wg.thread_again()
        return thread // LANES, thread % LANES
