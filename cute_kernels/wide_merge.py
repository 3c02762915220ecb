"""Merging in a wgmma kernel, by the consumers: rows of the query tile are dealt to their warps.

A warp stores all its rows' partial results, then arrives once for all of them: one round trip to memory, not one per
row. Rows, counters and partial results are those of merge.py.
"""

from cutlass import Int32, Int64, cute, range_constexpr

from . import ptx
from .layouts import LANES
from .merge import Merge, combine
from .plan import QUAD
from .schedule import Params, Piece


class WideMerge(Merge):
    """Merging in one kernel."""

    @cute.jit
    def merge(self, p: Params, smem: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Merge the results of the CTA's teams; store the output of a whole piece, else a partial result, and the output
        where those of the other CTAs are there already.
        """
        plan = self.plan
        slots = p.workspace.toint() + self.counter_bytes(p)
        items = piece.columns * plan.items
        complete = Int32(1)
        if (piece.ctas > 1) & (warp * LANES < items):
            part = warp
            while part * LANES < items:
                column, item, inside = self.item(part * LANES + lane, piece.columns)
                peak, weight, value = self.combine_teams(smem, column, item)
                if inside:
                    mine = slots + Int64(piece.slot) * plan.partial_bytes
                    for i in range_constexpr(0, plan.width, QUAD):
                        ptx.store_global(mine + self.value_at(column, item), value[i : i + QUAD], 4 * i)
                    if item == 0:
                        ptx.store_global(mine + self.state_at(column), [peak, weight])
                part += plan.warps
            complete = self.arrives_last(p, lane, piece, warp)
        part = warp
        while (part * LANES < items) & (complete == 1):
            column, item, inside = self.item(part * LANES + lane, piece.columns)
            peak, weight, value = self.combine_teams(smem, column, item)
            if piece.ctas > 1:
                peak, weight, value = self.combine_slots(slots, piece, column, item)
            self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            part += plan.warps

    def combine_teams(self, smem: Int32, column: Int32, item: Int32) -> tuple:
        """An item of the CTA's result: maximum, sum, values."""
        plan = self.plan
        row = smem + plan.scratch_at + column * plan.row_bytes
        offsets = [w * plan.q_tile * plan.row_bytes for w in range(plan.states)]
        states = [ptx.load_shared_floats(row, offset + 4 * plan.head_dim, 2) for offset in offsets]
        return combine(states, [self.load_values(row + item * (4 * plan.width), offset) for offset in offsets])
