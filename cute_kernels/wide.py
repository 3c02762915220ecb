"""Decode attention for many query columns with wgmma (sm_90a); schedule, merging and launch are those of decode.py.

producer       as in decode.py: one bulk copy per block into a ring of shared-memory stages
folders        make a block's parameters ready once it has landed (fold.py); "ready" mbarriers
consumers      warpgroups in teams (wide_attention.py); a team takes every n-th block for its query columns:
    S^T = K Q^T            A = K from registers: per register one AND, one HFMA2 with the folded scale and offset;
                           B = Q^T in shared memory; m64nNk16. With 16 columns and K per channel A = the codes, B = the
                           block's own Q^T, times the scales, which the folders make
    P = exp2(S - top)      P^T times V's scale to shared memory by stmatrix.trans; the barrier that the team needs
                           anyway tells whether ``top`` was too low (wide_softmax.py)
    O^T += V^T P^T         A = V from registers, (code + zero); B = P^T; the tokens of a block are k
16-bit tokens  sinks and tail, 128 at a time: the same, with K and V from global memory
pieces         the folders announce them: they find out the next piece and fetch its queries while the consumers
               are at the last blocks of the one before; the consumers make these their B operand (wide_queries.py) and
               merge results (wide_merge.py)
"""

import cutlass
from cutlass import Boolean, Int32, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .decode import DecodeKernel
from .fold import Fold
from .layouts import BLOCK_TOKENS, LANES
from .plan import BARRIER_BYTES, CONSUMER_BARRIER, MOVING_WARPS
from .schedule import Schedule, Shares
from .wide_attention import WideAttention
from .wide_merge import WideMerge
from .wide_plan import PIECE_BYTES, WidePlan
from .wide_queries import WideQueries
from .work import Params, load_field, load_piece, store_piece, whole_blocks


class WideKernel(DecodeKernel):
    """The kernel of one KernelConfig with mma="wgmma"."""

    def __init__(self, config):
        self.plan = WidePlan(config)
        self.schedule = Schedule(self.plan)
        self.attention = WideAttention(self.plan)
        self.queries = WideQueries(self.plan)
        self.fold = Fold(self.plan)
        self.merge = WideMerge(self.plan, self.schedule)

    def bounded(self, p: Params) -> Params:
        """As in decode.py; twelve warps have no register for it, and rely on the launcher, which does the same."""
        return p if self.plan.warps == MOVING_WARPS else super().bounded(p)

    def init_barriers(self, smem: Int32) -> None:
        plan = self.plan
        self.init_ring(smem, plan.warps_per_block, plan.warps)
        for team in range(plan.teams):
            ptx.mbarrier_init(smem + (plan.free_at + BARRIER_BYTES * team), plan.team_warps)
        for slot in range(plan.scaled_slots):
            ptx.mbarrier_init(smem + (plan.scaled_free_at + BARRIER_BYTES * slot), plan.team_warps)

    def init_ring(self, smem: Int32, block_readers: int, piece_readers: int) -> None:
        """Initialise the barriers of the ring and of the slot; the readers are warps."""
        plan = self.plan
        for stage in range(plan.stages):
            ptx.mbarrier_init(smem + (plan.full_at + BARRIER_BYTES * stage), 1)
            ptx.mbarrier_init(smem + (plan.ready_at + BARRIER_BYTES * stage), LANES)
            ptx.mbarrier_init(smem + (plan.empty_at + BARRIER_BYTES * stage), block_readers)
        ptx.mbarrier_init(smem + plan.slot_full_at, 2 * LANES * plan.folders)
        ptx.mbarrier_init(smem + plan.slot_empty_at, piece_readers)

    def start(self, p: Params, smem: Int32, warp: Int32, lane: Int32) -> None:
        """Nothing: more than its role is too much for a warp's registers."""

    @cute.jit
    def assist(self, p: Params, smem: Int32, warp: Int32, lane: Int32, share: None = None):
        """What the warps of the last warpgroup do."""
        plan = self.plan
        wg.give_registers(plan.auxiliary_registers)
        if warp == plan.auxiliaries:
            own = self.schedule.begin(
                p,
                lane,
                announce=lambda *share: None,
                fetch=lambda *share: self.schedule.entries(p, *share, Int32(0), lane),
                fetches=Boolean(True),
            )
            self.produce(p, smem, lane, own)
        elif warp <= plan.auxiliaries + plan.folders:
            self.fold_blocks(p, smem, warp - (plan.auxiliaries + 1), lane)

    @cute.jit
    def fold_blocks(self, p: Params, smem: Int32, folder: Int32, lane: Int32):
        """Fold the parameters of every n-th block of the CTA's share, as they land; announce its pieces."""
        plan = self.plan
        at, end, seq, shares, _ = self.schedule.begin(
            p,
            lane,
            announce=lambda *share: self.tell(p, smem, folder, lane, Int32(0), share),
            fetch=lambda at, end, seq: self.queries.fetch(p, smem, folder, lane, at.b, self.schedule.tile(p, at)),
            fetches=Boolean(True),
        )
        self.announced(smem, lane)
        if (folder == 0) & (lane == 0):  # rather than in registers
            for i in range_constexpr(len(shares)):
                ptx.store_shared(smem + plan.shares_at, 4 * i, [shares[i]])
        cute.arch.sync_warp()
        number = Int32(0)  # of the piece in the share
        factor = self.queries.factor(p)
        stage = folder
        parity = Int32(0)
        block = folder  # the warp's next block, counted over the share
        scaled = folder  # the slot of scaled queries
        scaled_parity = Int32(1)  # the first finds it free
        ring = Int32(0)  # blocks of the share before this piece
        while at.x < end:
            count = self.schedule.count(p, at, end, seq)
            valid = seq.packed - (seq.first_block + at.unit - ring) * BLOCK_TOKENS  # tokens from the share's first on
            ring += cutlass.max(self.schedule.blocks(at, count, seq), 0)
            if cutlass.const_expr(plan.scales_queries):  # once the consumers have made them their operand
                ptx.mbarrier_wait(smem + plan.slot_empty_at, number & 1, plan.wait)
            while block < ring:
                ptx.mbarrier_wait(smem + plan.full_at + stage * BARRIER_BYTES, parity, plan.wait)
                cute.arch.sync_warp()  # lanes that leave the wait one by one would do all of it twice
                folded = smem + plan.folded_at + stage * plan.folded_bytes
                in_block = valid - block * BLOCK_TOKENS
                at_block = smem + stage * plan.fmt.block_bytes
                if cutlass.const_expr(plan.scales_queries):
                    ptx.mbarrier_wait(smem + plan.scaled_free_at + scaled * BARRIER_BYTES, scaled_parity, plan.wait)
                    cute.arch.sync_warp()
                queries = smem + plan.slots_at, smem + plan.scaled_at + scaled * plan.scaled_bytes
                self.fold.block(at_block, folded, in_block, queries, factor, lane)
                scaled += plan.folders
                if scaled >= plan.scaled_slots:
                    scaled -= plan.scaled_slots
                    scaled_parity = scaled_parity ^ 1
                ptx.mbarrier_arrive(smem + plan.ready_at + stage * BARRIER_BYTES)
                block += plan.folders
                stage += plan.folders
                if stage >= plan.stages:
                    stage -= plan.stages
                    parity = parity ^ 1
            at = self.schedule.next_piece(p, at, seq.units, count)
            seq = self.schedule.sequence(p, at.b)
            number += 1
            if at.x < end:
                # the consumers have taken the queries before, so they are done with the Piece before those, too
                ptx.mbarrier_wait(smem + plan.slot_empty_at, number - 1 & 1, plan.wait)
                if folder == 0:
                    words = [ptx.load_shared(smem + plan.shares_at, 4 * i, 1)[0] for i in range(len(Shares._fields))]
                    self.tell(p, smem, folder, lane, number, (at, end, seq, Shares(*words)))
                self.queries.fetch(p, smem, folder, lane, at.b, self.schedule.tile(p, at))
                self.announced(smem, lane)

    @cute.jit
    def tell(self, p: Params, smem: Int32, folder: Int32, lane: Int32, number: Int32, share: tuple):
        """The first folder writes down the share's next Piece, at (Place, end, Sequence, Shares)."""
        if (folder == 0) & (lane == 0):
            store_piece(self.piece_at(smem, number), self.schedule.piece(p, *share))

    def announced(self, smem: Int32, lane: Int32) -> None:
        """The consumers may go on, once the queries of all folders have landed."""
        ptx.mbarrier_arrive_after_copies(smem + self.plan.slot_full_at)
        ptx.mbarrier_arrive(smem + self.plan.slot_full_at)

    def piece_at(self, smem: Int32, number: Int32) -> Int32:
        """Where the share's n-th Piece lies."""
        later = self.plan.slots_at + self.plan.piece_offset + (number & 1) * PIECE_BYTES
        return smem + cutlass.select_(number > 0, later, Int32(self.plan.first_piece_at))

    # -- consumers ---------------------------------------------------------------------------------------------------

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32):
        """Attend over the CTA's share: blocks from the ring, 16-bit units from global memory."""
        plan = self.plan
        group = warp // plan.warps_per_block
        slot = smem + plan.slots_at
        block = group  # the group's next block of the piece; its stage and the parity of its round
        stage = group
        parity = Int32(0)
        scaled = group  # the slot of scaled queries, one of two
        free_parity = Int32(1)  # the first finds P free
        number = Int32(0)  # of the piece in the share
        if warp == plan.warps - 1:
            self.schedule.warm(p, lane)
        ptx.wait_for_previous_kernel()
        is_last = Int32(0)
        while is_last == 0:
            lane = wg.thread_again() % LANES
            team = self.attention.places.team(smem, warp, lane)
            piece_at = self.piece_at(smem, number)
            ptx.mbarrier_wait(smem + plan.slot_full_at, number & 1, plan.wait)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # also for the compiler: no warp has parted
            piece = load_piece(piece_at)
            self.queries.prepare(p, slot, warp, lane, piece)
            cute.arch.sync_warp()
            wg.mbarrier_arrive_once(smem + plan.slot_empty_at)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)
            state = self.attention.first_state(smem, free_parity)

            plain_from, plain_to = whole_blocks(piece)
            if p.softcap > 0.0:
                plain_to = Int32(0)
            blocks = piece.blocks
            while block < blocks:
                at = smem + stage * plan.fmt.block_bytes
                folded = smem + plan.folded_at + stage * plan.folded_bytes
                empty = smem + plan.empty_at + stage * BARRIER_BYTES
                ptx.mbarrier_wait(smem + plan.ready_at + stage * BARRIER_BYTES, parity, plan.wait)
                state = self.attention.attend_block(
                    p, smem, team, at, folded, scaled, empty, piece_at, block, (plain_from, plain_to), state
                )
                scaled = 2 * group + plan.block_groups - scaled
                block += plan.block_groups
                stage += plan.block_groups
                if stage >= plan.stages:
                    stage -= plan.stages
                    parity = parity ^ 1
            state = self.attention.finished(state)
            block -= blocks
            piece_at = self.piece_at(smem, number)  # again, as the Piece, rather than in registers all the while
            piece = load_piece(piece_at)
            chunk = piece.first_chunk + group
            end_chunk = piece.end_chunk
            while chunk < end_chunk:
                factor = self.queries.factor(p)
                state = self.attention.attend_chunk(p, smem, team, piece_at, chunk, factor, state)
                chunk += plan.block_groups
            free_parity = state.parity
            self.attention.store_state(smem, team, state)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # all results are in the scratch
            lane = wg.thread_again() % LANES
            is_last = load_field(piece_at, "is_last")
            self.merge_piece(p, smem, warp, lane, piece_at, number)
            number += 1

    @cute.jit
    def merge_piece(self, p: Params, smem: Int32, warp: Int32, lane: Int32, piece_at: Int32, number: Int32):
        """Merge the results of the share's ``number``-th piece; behind the last one also those of the first, if that
        ended here before the share did.

        To be called in the loop over pieces: behind it the compiler would expect warps to leave it one by one.
        """
        first_at = smem + self.plan.first_piece_at
        is_last, collects = load_field(piece_at, "is_last"), load_field(first_at, "collects")
        times = 1 + (is_last & collects & cutlass.min(number, 1))
        again = Int32(0)
        while again < times:
            piece = load_piece(cutlass.select_(again == 1, first_at, piece_at))
            self.merge.merge(p, smem, warp, Int32(self.plan.warps), lane, piece, again)
            again += 1
