"""Merging in a wgmma kernel, by the consumers, to whose warps the rows of the query tile are dealt.

At the end of a piece the results of the CTA's teams become output or, where other CTAs have a part of it, a partial
result; nobody waits for memory. Only at the end of its share a CTA says that its partial results are there (of its
first and its last piece; those between are whole), a warp once for all its rows, and merges pieces for which it is the
last to say so. Rows, counters and partial results are those of merge.py.
"""

import cutlass
from cutlass import Int32, Int64, cute, range_constexpr

from . import ptx
from .layouts import LANES
from .merge import Merge, combine
from .plan import QUAD
from .schedule import Params, Piece, load_piece

UNFINISHED = 2  # pieces of a share that other CTAs have a part of, at most


class WideMerge(Merge):
    """Merging in one kernel."""

    @cute.jit
    def store(self, p: Params, smem: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Merge the results of the CTA's teams; store the output of a whole piece, else a partial result."""
        plan = self.plan
        part = warp
        while part * LANES < piece.columns * plan.items:
            column, item, inside = self.item(part * LANES + lane, piece.columns)
            row = smem + plan.scratch_at + column * plan.row_bytes
            offsets = [w * plan.q_tile * plan.row_bytes for w in range(plan.states)]
            states = [ptx.load_shared_floats(row, offset + 4 * plan.head_dim, 2) for offset in offsets]
            values = [self.load_values(row + item * (4 * plan.width), offset) for offset in offsets]
            peak, weight, value = combine(states, values)
            if piece.ctas == 1:
                self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            elif inside:
                mine = self.partials(p) + Int64(piece.slot) * plan.partial_bytes
                for i in range_constexpr(0, plan.width, QUAD):
                    ptx.store_global(mine + self.value_at(column, item), value[i : i + QUAD], 4 * i)
                if item == 0:
                    ptx.store_global(mine + self.state_at(column), [peak, weight])
            part += plan.warps

    @cute.jit
    def finish(self, p: Params, warp: Int32, lane: Int32, first: Int32, last: Int32):
        """Merge the unfinished pieces of the share whose other parts are there; addresses of its first and last Piece,
        which may be the same.
        """
        plan = self.plan
        address = cutlass.select_(lane == 0, first, last)
        mine = load_piece(address)  # lane 0: the first, 1: the last
        columns = cutlass.select_((lane == 0) | ((lane == 1) & (first != last)), mine.columns, Int32(0))
        is_last = Int32(0)
        cute.arch.sync_warp()  # all of the warp's partial results are stored
        if (mine.ctas > 1) & (warp * LANES < columns * plan.items):
            counter = p.workspace.toint() + Int64(mine.index * plan.merge_parts + warp) * 4
            if ptx.atomic_add(counter, Int32(1)) == mine.ctas - 1:
                is_last = Int32(1)
                ptx.store_global(counter, [Int32(0)])  # ready for the next launch
        cute.arch.sync_warp()
        i = Int32(0)
        while i < UNFINISHED:
            if ptx.shuffle(is_last, i) == 1:
                piece = load_piece(ptx.shuffle(address, i))
                part = warp
                while part * LANES < piece.columns * plan.items:
                    column, item, inside = self.item(part * LANES + lane, piece.columns)
                    peak, weight, value = self.combine_slots(self.partials(p), piece, column, item)
                    self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
                    part += plan.warps
            i += 1

    def partials(self, p: Params) -> Int64:
        """Where the partial results lie."""
        return p.workspace.toint() + self.counter_bytes(p)
