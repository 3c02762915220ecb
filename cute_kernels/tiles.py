"""Decode attention for 64 and more query columns with wgmma over dequantised tiles (sm_90a); schedule, folding, merging
and launch are those of wide.py.

producer       as in decode.py: one bulk copy per block into a ring of shared-memory stages
folders        make a block's parameters ready once it has landed (fold.py), announce pieces, fetch their queries
writers        two warpgroups, one for K, one for V: they turn blocks, then 16-bit tokens, into fp16 tiles
               (tile_writer.py), in two stages with "full" and "empty" mbarriers
consumers      two warpgroups, over units of 128 tokens (tile_attention.py):
    S = Q K^T          A = Q, B = K's tile; m64n128k16
    P = exp2(S - top)  in registers, which are the A operand of
    O += P V           B = V's tile
               64 query columns: they take turns at the units, so that one's softmax lies under the other's products;
               128: each takes every unit for its own 64
pieces         as in wide.py; at the end of one its results lie where its last tiles lay, whose stages are handed on
               after merging

Why not A = codes from registers, as for fewer columns (wide.py)? There a warp's dequantisation and its wgmma follow
each other, and with 64 columns registers leave nothing to put under a wgmma's latency. Q is not kept in registers:
ptxas gives loop-invariant A registers of a wgmma to others.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from . import ptx
from . import warpgroup as wg
from .fold import TileFold
from .layouts import BLOCK_TOKENS, LANES, TILE
from .plan import BARRIER_BYTES, CONSUMER_BARRIER
from .schedule import Schedule
from .tile_attention import EXPONENT_16_BIT, State, TileAttention
from .tile_merge import TileMerge
from .tile_plan import (
    GROUP_WARPS,
    M_TILE,
    PARAMS_WORDS,
    PROGRESS_BYTES,
    STATE_BYTES,
    TILE_STAGES,
    WRITER_WARPS,
    TilePlan,
)
from .tile_queries import TileQueries
from .tile_writer import TileWriter
from .wide import WideKernel
from .work import Params, Piece, load_field, load_piece, whole_blocks

K_FULL, K_EMPTY, V_FULL, V_EMPTY = range(4)  # barriers of a tile stage


class TileKernel(WideKernel):
    """The kernel of one KernelConfig with mma="wgmma" and 64 or more query columns."""

    def __init__(self, config):
        self.plan = TilePlan(config)
        self.schedule = Schedule(self.plan)
        self.attention = TileAttention(self.plan)
        self.queries = TileQueries(self.plan)
        self.fold = TileFold(self.plan)
        self.writer = TileWriter(self.plan)
        self.merge = TileMerge(self.plan, self.schedule)

    def init_barriers(self, smem: Int32) -> None:
        self.init_ring(smem, 2 * WRITER_WARPS, self.plan.warps + 2 * WRITER_WARPS)
        for tile in range(TILE_STAGES):
            for kind in range(4):
                ptx.mbarrier_init(self.tile_barrier(smem, kind, Int32(tile)), self.arrivals(kind))

    @cute.jit
    def assist(self, p: Params, smem: Int32, warp: Int32, lane: Int32, share: None = None):
        """What the warps behind the consumers do: a warpgroup writes K, one V; the last is that of wide.py."""
        plan = self.plan
        if warp < plan.warps + WRITER_WARPS:
            wg.give_registers(plan.k_registers)
            self.write(p, smem, False, warp - plan.warps, lane)
        elif warp < plan.auxiliaries:
            wg.give_registers(plan.v_registers)
            self.write(p, smem, True, warp - (plan.warps + WRITER_WARPS), lane)
        else:
            super().assist(p, smem, warp, lane)

    def arrivals(self, kind: int) -> int:
        """At a tile's barrier: of the writers' lanes, of the warps that read it."""
        return WRITER_WARPS * LANES if kind in (K_FULL, V_FULL) else self.plan.warps_per_block

    # -- places ------------------------------------------------------------------------------------------------------

    def tile_barrier(self, smem: Int32, kind: int, tile: Int32) -> Int32:
        return smem + (self.plan.tile_barriers_at + kind * TILE_STAGES * BARRIER_BYTES) + tile * BARRIER_BYTES

    def keys_at(self, smem: Int32, tile: Int32) -> Int32:
        """K's tile; V^T's lies behind it."""
        return smem + self.plan.tiles_at + tile * (2 * self.plan.tile_bytes)

    def params_at(self, smem: Int32, tile: Int32) -> Int32:
        """The tile's factor and exponent."""
        return smem + self.plan.tile_params_at + tile * (4 * PARAMS_WORDS)

    def units(self, piece: Piece) -> Int32:
        """Blocks, then 16-bit units."""
        return piece.blocks + cutlass.max(piece.end_chunk - piece.first_chunk, 0)

    # -- writers -----------------------------------------------------------------------------------------------------

    @cute.jit
    def write(self, p: Params, smem: Int32, of_values: bool, warp: Int32, lane: Int32):
        """Write the tiles of V, or of K, of the CTA's share, unit by unit."""
        plan = self.plan
        full, empty = (V_FULL, V_EMPTY) if of_values else (K_FULL, K_EMPTY)
        stage, parity = Int32(0), Int32(0)
        tile, tile_parity = Int32(0), Int32(1)  # the first round finds the tiles empty
        number = Int32(0)  # of the piece in the share
        is_last = Int32(0)
        ptx.wait_for_previous_kernel()  # it may have written the tail
        while is_last == 0:
            piece_at = self.piece_at(smem, number)
            ptx.mbarrier_wait(smem + plan.slot_full_at, number & 1, plan.wait)
            cute.arch.sync_warp()
            wg.mbarrier_arrive_once(smem + plan.slot_empty_at)  # done with the Piece before
            piece = load_piece(piece_at)
            is_last = piece.is_last
            blocks = piece.blocks
            left = self.units(piece)  # units
            while left > 0:
                target = self.keys_at(smem, tile) + int(of_values) * plan.tile_bytes
                if blocks > 0:
                    folded = smem + plan.folded_at + stage * plan.folded_bytes
                    ptx.mbarrier_wait(smem + plan.ready_at + stage * BARRIER_BYTES, parity, plan.wait)
                    ptx.mbarrier_wait(self.tile_barrier(smem, empty, tile), tile_parity, plan.wait)
                    cute.arch.sync_warp()
                    if cutlass.const_expr(of_values):
                        self.writer.values(smem + stage * plan.fmt.block_bytes, folded, target, warp, lane)
                    else:
                        if (warp == 0) & (lane == 0):
                            ptx.store_shared(self.params_at(smem, tile), 0, ptx.load_shared(folded, 0, 2))
                        self.writer.keys(smem + stage * plan.fmt.block_bytes, folded, target, warp, lane)
                    cute.arch.sync_warp()
                    wg.mbarrier_arrive_once(smem + plan.empty_at + stage * BARRIER_BYTES)
                    blocks -= 1
                    stage += 1
                    if stage == plan.stages:
                        stage = Int32(0)
                        parity = parity ^ 1
                else:
                    piece = load_piece(piece_at)
                    ptx.mbarrier_wait(self.tile_barrier(smem, empty, tile), tile_parity, plan.wait)
                    if cutlass.const_expr(not of_values):
                        if (warp == 0) & (lane == 0):
                            params = [self.queries.factor(p), Float32(EXPONENT_16_BIT)]
                            ptx.store_shared(self.params_at(smem, tile), 0, params)
                    self.writer.copy(p, target, of_values, warp, lane, piece, piece.end_chunk - left)
                wg.fence_async()
                ptx.mbarrier_arrive(self.tile_barrier(smem, full, tile))
                tile_parity = tile_parity ^ tile
                tile = tile ^ 1
                left -= 1
            number += 1

    # -- consumers ---------------------------------------------------------------------------------------------------

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32):
        """Attend over the CTA's share of units."""
        plan = self.plan
        slot = smem + plan.slots_at
        group = warp // GROUP_WARPS
        query = self.queries.of_group(slot, group)
        turn = group % plan.block_groups
        done = Int32(0)  # units of the warpgroup
        # the piece's number in the share, and the warpgroup's next unit of it: kept here, rather than in registers
        progress = smem + plan.progress_at + warp * PROGRESS_BYTES
        ptx.store_shared(progress, 0, [Int32(0), turn])
        if warp == plan.warps - 1:
            self.schedule.warm(p, lane)
        ptx.wait_for_previous_kernel()
        is_last = Int32(0)
        while is_last == 0:
            thread = wg.thread_again()  # what follows from it need not stay in registers all along
            cute.arch.sync_warp()  # every lane has stored it
            number, unit = ptx.load_shared(progress, 0, 2)
            piece_at = self.piece_at(smem, number)
            ptx.mbarrier_wait(smem + plan.slot_full_at, number & 1, plan.wait)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # for the compiler: no warp has parted
            piece = load_piece(piece_at)
            self.queries.prepare(p, slot, cute.arch.make_warp_uniform(thread // LANES), thread % LANES, piece)
            cute.arch.sync_warp()
            if cutlass.const_expr(plan.prefetches):
                wg.mbarrier_arrive_once(smem + plan.slot_empty_at)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # the operands are there
            state = self.attention.first_state()

            plain_from, plain_to = whole_blocks(piece)
            plain_to = cutlass.min(plain_to, piece.blocks)
            if p.softcap > 0.0:
                plain_to = Int32(0)
            left = self.units(piece) - unit  # counted down, so that the loop holds less
            plain_from, plain_to = left + unit - plain_from, left + unit - plain_to
            while left > 0:
                tile, parity = self.tile_of(turn, done)
                ptx.mbarrier_wait(self.tile_barrier(smem, K_FULL, tile), parity, plan.wait)
                params = ptx.load_shared_floats(self.params_at(smem, tile), 0, 2)
                keys = self.keys_at(smem, tile)
                scores = self.attention.scores(query, keys)
                wg.wait(0)
                scores = wg.pin(scores)
                is_inner = left > plan.block_groups  # the last ones keep their stages for the results
                if cutlass.const_expr(plan.states > 1):
                    self.release(smem, K_EMPTY, tile)
                elif is_inner:
                    self.release(smem, K_EMPTY, tile)
                if (left > plain_from) | (left <= plain_to):
                    scores = self.restricted(p, smem, progress, left, params[0], scores)
                weights, state = self.attention.softmax(scores, params, state)
                ptx.mbarrier_wait(self.tile_barrier(smem, V_FULL, tile), parity, plan.wait)
                out = self.attention.values(weights, keys + plan.tile_bytes, state.out)
                wg.wait(0)
                state = state._replace(out=wg.pin(out))
                if is_inner:
                    self.release(smem, V_EMPTY, tile)
                left -= plan.block_groups
                done += 1
            number = ptx.load_shared(progress, 0, 1)[0]
            unit = -left
            had_units = unit + self.units(load_piece(self.piece_at(smem, number))) >= plan.block_groups
            # the tile of the warpgroup's last unit; if it had none, the other's
            last_tile = cutlass.select_(had_units, self.tile_of(turn, done - 1)[0], turn ^ 1)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # nobody reads the last tiles any more, nor the queries
            if cutlass.const_expr(not plan.prefetches):
                cute.arch.sync_warp()
                wg.mbarrier_arrive_once(smem + plan.slot_empty_at)
            self.store_state(smem, last_tile, had_units, state)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # all results are there
            lane = wg.thread_again() % LANES
            piece_at = self.piece_at(smem, number)
            is_last = load_field(piece_at, "is_last")
            self.merge_piece(p, smem, warp, lane, piece_at, number)
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # nobody needs them any more
            if had_units:
                if cutlass.const_expr(plan.states == 1):
                    self.release(smem, K_EMPTY, last_tile)
                self.release(smem, V_EMPTY, last_tile)
            ptx.store_shared(progress, 0, [number + 1, unit])

    def tile_of(self, turn: Int32, done: Int32) -> tuple:
        """Stage and parity of a warpgroup's next tile, after ``done`` of them."""
        if self.plan.block_groups == TILE_STAGES:
            return turn, done & 1
        return done & 1, done >> 1 & 1

    def release(self, smem: Int32, kind: int, tile: Int32) -> None:
        cute.arch.sync_warp()
        wg.mbarrier_arrive_once(self.tile_barrier(smem, kind, tile))

    @cute.jit
    def restricted(self, p: Params, smem: Int32, progress: Int32, left: Int32, factor: Float32, scores: list):
        """The scores of a unit with keys that not every query sees, or under a soft cap; ``left``: units from it on."""
        piece = load_piece(self.piece_at(smem, ptx.load_shared(progress, 0, 1)[0]))
        unit = self.units(piece) - left
        thread = wg.thread_again()
        row = thread // LANES % self.plan.warps_per_block * TILE + (thread % LANES >> 2)
        highs = self.queries.highs(smem + self.plan.slots_at, row)
        position, end = piece.first_position + unit * BLOCK_TOKENS, piece.packed_end
        if unit >= piece.blocks:  # 16-bit tokens: sinks come first, then the tail
            chunk = piece.first_chunk + unit - piece.blocks
            position, end = chunk * self.plan.chunk, piece.sinks
            if chunk >= piece.sink_chunks:
                position = piece.packed_end + (chunk - piece.sink_chunks) * self.plan.chunk
                end = piece.packed_end + piece.tail
        return self.attention.restricted(p, scores, factor, position, end, highs)

    @cute.jit
    def store_state(self, smem: Int32, last_tile: Int32, had_units: Boolean, state: State):
        """The warpgroup's results where its last tiles lay: V's, or both if each warpgroup has rows of its own."""
        plan = self.plan
        thread = wg.thread_again()
        group = thread // (LANES * GROUP_WARPS)
        results = self.keys_at(smem, last_tile)
        if cutlass.const_expr(plan.states > 1):
            results += plan.tile_bytes
        if thread % (LANES * plan.warps_per_block) == 0:
            ptx.store_shared(smem + plan.places_at + thread // (LANES * plan.warps_per_block) * 4, 0, [results])
        if cutlass.const_expr(plan.states == 1):
            results += group * plan.tile_bytes
        sums = smem + plan.sums_at + group * (M_TILE * STATE_BYTES)
        self.attention.store_sums(sums, state)
        if had_units:
            self.attention.store_out(results, state)
