"""Merging in a wgmma kernel: as in merge.py, by the consumers. They have no predicates to spare, so what is conditional
there is arithmetic or a loop here.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .attention import FIRST_MAX
from .merge import MINUS_INFINITY, Merge, combine, least
from .schedule import Params, Piece


class WideMerge(Merge):
    """Merging in one kernel."""

    @cute.jit
    def combine_slots(self, p: Params, piece: Piece, lane: Int32, column: Int32, item: Int32, inside: Boolean):
        """As in merge.py; beyond the last CTA its results are loaded again and count nothing."""
        plan = self.plan
        sources = plan.merge_floats // plan.width
        value_at, state_at = self.value_at(column, item), self.state_at(column)
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * plan.width
        done = Int32(0)  # CTAs
        while done < piece.ctas:
            slots = [self.source(p, piece, done + i) for i in range(sources)]
            words = [[Int32(0)] * (2 + plan.width) for _ in range(sources)]
            waits = Int32(1)
            while waits == 1:
                words = [
                    ptx.load_relaxed(slot + state_at, 0, Int32(0), [0, 0])
                    + self.load_partial(slot + value_at, 0, Int32(0))
                    for slot in slots
                ]
                waits = Int32(0)
                if ptx.any_lane(least([least(each) for each in words]) == 0):
                    waits = Int32(1)
            states = [[peak, weight]]
            for i in range_constexpr(sources):
                absent = ptx.sign_mask(piece.ctas - 1 - (done + i))
                words[i][0] = (words[i][0] & ~absent) | (absent & MINUS_INFINITY)
                states.append([ptx.from_bits(x) for x in words[i][:2]])
            values = [[ptx.from_bits(x) for x in each[2:]] for each in words]
            peak, weight, value = combine(states, [value, *values])
            done += sources
        done = Int32(0)
        while done < piece.ctas:  # zeros for the next launch
            slot = self.source(p, piece, done)
            if inside:
                self.store_partial(slot + value_at, 0, [Int32(0)] * plan.width)
                if item == 0:
                    ptx.store_relaxed(slot + state_at, [Int32(0)] * 2)
            done += 1
        return peak, weight, value

    def source(self, p: Params, piece: Piece, index: Int32) -> Int64:
        """The slot of a piece's CTA; of the last one beyond."""
        later = 2 * (piece.first_cta + cutlass.min(index, piece.ctas - 1))
        return self.partial(p, cutlass.select_(index > 0, later, piece.first_slot))
