"""Decode attention for many query columns with wgmma (sm_90a): schedule, blocks, merging and launch are those of decode.py.

producer       as in decode.py: one bulk copy per block into a ring of shared-memory stages
folders        make a block's parameters ready once it has landed (fold.py); "ready" mbarriers
consumers      warpgroups in teams (wide_plan.py); a team takes every n-th block for its query columns:
    S^T = K Q^T            A = K from registers: per register one AND, one HFMA2 with the folded scale and offset;
                           B = Q^T in shared memory; m64nNk16
    P = exp2(S - top)      P^T times V's scale to shared memory by stmatrix.trans; the barrier that the team needs anyway
                           tells whether ``top`` was too low
    O^T += V^T P^T         A = V from registers, (code + zero); B = P^T; the tokens of a block are k
16-bit tokens  sinks and tail, 128 at a time: the same, with K and V from global memory
pieces         the consumers themselves find out a piece, prepare its queries as B operand (wide_queries.py) and merge
               results (merge.py): pieces are long here, and registers for merge warps dear
"""

import cutlass
from cutlass import Int32, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .decode import MAX_WINDOW, DecodeKernel
from .fold import Fold
from .layouts import BLOCK_TOKENS, LANES
from .merge import CONSUMER_BARRIER, Merge
from .plan import BARRIER_BYTES
from .schedule import BLOCK_SHIFT, Params, Place, Schedule, Shares, load_piece, store_piece
from .wide_attention import WideAttention
from .wide_plan import WidePlan
from .wide_queries import WideQueries


class WideKernel(DecodeKernel):
    """The kernel of one KernelConfig with mma="wgmma"."""

    def __init__(self, config):
        self.plan = WidePlan(config)
        self.schedule = Schedule(self.plan)
        self.attention = WideAttention(self.plan)
        self.queries = WideQueries(self.plan)
        self.fold = Fold(self.plan)
        self.merge = Merge(self.plan, self.schedule)

    @cute.kernel
    def kernel(self, p: Params):
        plan = self.plan
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // LANES)
        lane = thread % LANES
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        if thread == 0:
            for stage in range_constexpr(plan.stages):
                ptx.mbarrier_init(smem + (plan.full_at + BARRIER_BYTES * stage), 1)
                ptx.mbarrier_init(smem + (plan.ready_at + BARRIER_BYTES * stage), 1)
                ptx.mbarrier_init(smem + (plan.empty_at + BARRIER_BYTES * stage), plan.warps_per_block)
            for team in range_constexpr(plan.teams):
                ptx.mbarrier_init(smem + (plan.free_at + BARRIER_BYTES * team), plan.team_warps)
            ptx.fence_mbarrier_init()
        ptx.wait_for_previous_kernel()

        self.schedule.prefetch_table(p)
        p = p._replace(window=cutlass.min(p.window, MAX_WINDOW))
        units = self.schedule.total_units(p, lane) * (p.num_kv_heads * p.q_tiles)
        ctas = cute.arch.grid_dim()[0]
        base = units // ctas
        shares = Shares(base, units - base * ctas)
        cta = cute.arch.block_idx()[0]
        x, end = shares.start(cta), shares.start(cta + 1)
        cute.arch.sync_threads()  # the barriers are initialised
        if warp < plan.warps:
            wg.take_registers(plan.consumer_registers)
            if x < end:
                self.consume(p, smem, warp, lane, x, end, shares)
        else:
            wg.give_registers(plan.auxiliary_registers)
            if x < end:
                at = self.schedule.locate(p, x, lane)
                if warp == plan.warps:
                    self.produce(p, smem, lane, at, end)
                elif warp <= plan.warps + plan.folders:
                    self.fold_blocks(p, smem, warp - (plan.warps + 1), lane, at, end)

    @cute.jit
    def fold_blocks(self, p: Params, smem: Int32, folder: Int32, lane: Int32, at: Place, end: Int32):
        """Fold the parameters of every n-th block of units [at.x, end), as they land."""
        plan = self.plan
        power = self.queries.power(p)
        stage = folder
        parity = Int32(0)
        block = folder  # the warp's next block, counted over the share
        ring = Int32(0)  # blocks of the share before this piece
        while at.x < end:
            seq = self.schedule.sequence(p, at.b)
            count = cutlass.min(end - at.x, seq.units - at.unit)
            blocks = cutlass.max(cutlass.min(at.unit + count, seq.blocks) - at.unit, 0)
            valid = seq.packed - (seq.first_block + at.unit - ring) * BLOCK_TOKENS  # tokens from the share's first on
            ring += blocks
            while block < ring:
                ptx.mbarrier_wait(smem + plan.full_at + stage * BARRIER_BYTES, parity, plan.wait)
                folded = smem + plan.folded_at + stage * plan.folded_bytes
                in_block = valid - block * BLOCK_TOKENS
                self.fold.block(smem + stage * plan.fmt.block_bytes, folded, in_block, power, lane)
                cute.arch.sync_warp()
                wg.mbarrier_arrive_once(smem + plan.ready_at + stage * BARRIER_BYTES)
                block += plan.folders
                stage += plan.folders
                if stage >= plan.stages:
                    stage -= plan.stages
                    parity = parity ^ 1
            at = self.schedule.next_piece(p, at, seq.units, count)

    @cute.jit
    def first_piece(self, p: Params, address: Int32, lane: Int32, x: Int32, end: Int32, shares: Shares):
        """Write the Piece of unit x."""
        at = self.schedule.locate(p, x, lane)
        self.write_piece(p, address, lane, at, end, shares)

    @cute.jit
    def write_piece(self, p: Params, address: Int32, lane: Int32, at: Place, end: Int32, shares: Shares):
        piece = self.schedule.piece(p, at, end, self.schedule.sequence(p, at.b), shares)
        if lane == 0:
            store_piece(address, piece)
        cute.arch.sync_warp()

    @cute.jit
    def next_piece(self, p: Params, address: Int32, lane: Int32):
        """Overwrite a Piece by the one that follows it."""
        piece = load_piece(address)
        shares = Shares(piece.base, piece.extra)
        index = piece.head * p.q_tiles + piece.first_row // self.plan.q_tile
        at = Place(piece.x, piece.b, piece.x - piece.unit - index * piece.units, index, piece.unit)
        at = self.schedule.next_piece(p, at, piece.units, piece.count)
        cute.arch.sync_warp()  # all lanes have read it
        self.write_piece(p, address, lane, at, shares.start(cute.arch.block_idx()[0] + 1), shares)

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32, x: Int32, end: Int32, shares: Shares):
        """Attend over the CTA's share: blocks from the ring, 16-bit units from global memory."""
        plan = self.plan
        group = warp // plan.warps_per_block
        team = self.attention.team(smem, warp, lane)
        slot = smem + plan.slots_at
        query = self.queries.operand(slot, warp // plan.team_warps % plan.splits)
        block = group  # the group's next block, counted over the share; its stage and the parity of its round
        stage = group
        parity = Int32(0)
        free_parity = Int32(1)  # the first finds P free
        ring = Int32(0)  # blocks of the share before this piece
        if warp == 0:
            self.first_piece(p, slot + plan.piece_offset, lane, x, end, shares)
        is_last = Int32(0)
        while is_last == 0:
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # the piece is written, the one before merged
            piece = load_piece(slot + plan.piece_offset)
            self.queries.prepare(p, slot, warp, lane, piece)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)
            state = self.attention.first_state(smem, free_parity)

            # blocks plain_from .. plain_to - 1 are visible to every query, as a whole
            plain_from = ring + (piece.window_start - piece.first_position + BLOCK_TOKENS - 1 >> BLOCK_SHIFT)
            plain_to = ring + (piece.seen_by_all - piece.first_position >> BLOCK_SHIFT)
            if p.softcap > 0.0:
                plain_to = Int32(0)
            first_block = ring
            ring += piece.blocks
            while block < ring:
                at = smem + stage * plan.fmt.block_bytes
                folded = smem + plan.folded_at + stage * plan.folded_bytes
                empty = smem + plan.empty_at + stage * BARRIER_BYTES
                ptx.mbarrier_wait(smem + plan.ready_at + stage * BARRIER_BYTES, parity, plan.wait)
                if (block >= plain_from) & (block < plain_to):
                    state = self.attention.attend_block(
                        p, smem, team, at, folded, empty, query, slot, block - first_block, state, False
                    )
                else:
                    state = self.attention.attend_block(
                        p, smem, team, at, folded, empty, query, slot, block - first_block, state, True
                    )
                block += plan.block_groups
                stage += plan.block_groups
                if stage >= plan.stages:
                    stage -= plan.stages
                    parity = parity ^ 1
            state = self.attention.finished(state)
            piece = load_piece(slot + plan.piece_offset)  # again, rather than in registers all the while
            chunk = piece.first_chunk + group
            power = self.queries.power(p)
            while chunk < piece.end_chunk:
                state = self.attention.attend_chunk(p, smem, team, piece, chunk, query, power, slot, state)
                chunk += plan.block_groups
            free_parity = state.parity
            self.attention.store_state(smem, team, state)
            self.merge.merge_last(p, smem, warp, lane, piece)
            is_last = piece.is_last
            if is_last == 0:
                ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)
                if warp == 0:
                    self.next_piece(p, slot + plan.piece_offset, lane)
