"""Query tiles on their way into wgmma as A operands in shared memory: as in wide_queries.py, by 64 rows."""

import cutlass
from cutlass import Int32, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .layouts import LANES
from .plan import CONSUMER_BARRIER
from .tile_plan import M_TILE
from .wide_plan import HIGH_BYTES
from .wide_queries import WideQueries
from .work import Params, Piece


class TileQueries(WideQueries):
    """Prepares the query tiles of one kernel."""

    @cute.jit
    def prepare(self, p: Params, slot: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Make the fetched queries the A operands, which may take their place; rows beyond the piece's are zero. All
        consumers must call it.
        """
        plan = self.plan
        scale = self.scale(p)
        rows = range(plan.q_tile // plan.warps)
        fetched = None
        if cutlass.const_expr(not plan.prefetches):
            fetched = [self.fetched(slot, warp, lane, piece, i) for i in rows]
            ptx.barrier(CONSUMER_BARRIER, plan.warps * LANES)  # all have them
        for i in range_constexpr(len(rows)):
            registers = self.fetched(slot, warp, lane, piece, i) if fetched is None else fetched[i]
            halves = self.scaled(p, registers, scale, lane)
            row = warp + i * plan.warps
            halves = [cutlass.select_(row < piece.columns, x, Int32(0)) for x in halves]
            ptx.store_shared(self.place(slot, row, lane), 0, halves)
        self.store_highs(p, slot, warp, lane, piece)
        wg.fence_async()

    def fetched(self, slot: Int32, warp: Int32, lane: Int32, piece: Piece, i: int) -> list:
        """The lane's part of the warp's i-th row; of the last one beyond the piece's."""
        row = cutlass.min(warp + i * self.plan.warps, cutlass.max(piece.columns - 1, 0))
        at = slot + row * (2 * self.plan.head_dim) + lane * (4 * self.words)
        return ptx.load_shared(at, self.plan.fetched_offset, self.words)

    def highs(self, slot: Int32, row: Int32) -> list:
        """Of rows ``row`` and row + 8 the position behind the last key that the query sees."""
        base, step = slot + row * HIGH_BYTES, wg.CORE_ROWS * HIGH_BYTES
        return [ptx.load_shared(base, self.plan.highs_offset + r * step, 1)[0] for r in range(2)]

    def of_group(self, slot: Int32, group: Int32) -> Int32:
        """A descriptor of a warpgroup's first k step."""
        at = slot
        if self.plan.q_tile > M_TILE:
            at += group * (M_TILE * self.plan.head_dim * 2)
        return wg.descriptor(cute.arch.make_warp_uniform(at), self.plan.column_tiles)
