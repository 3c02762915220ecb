"""Merging in a wgmma kernel: as in merge.py, by the consumers. Rows are many there, so a row's partial results take one
round trip; and predicates are rare, so beyond the last CTA its results are loaded again and count nothing.
"""

import operator

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .merge import Merge, least, masked
from .values import FIRST_MAX
from .work import Params, Piece


class WideMerge(Merge):
    """Merging in one kernel."""

    @cute.jit
    def combine_slots(self, p: Params, piece: Piece, lane: Int32, column: Int32, item: Int32, inside: Boolean):
        """As in merge.py."""
        plan = self.plan
        sources = min(plan.merge_floats // plan.width, plan.items)
        zeros = [Int32(0)] * plan.width
        value_at, state_at = self.value_at(column, item), self.state_at(column)
        mine = lane % plan.items  # the lane's CTA of the next ones
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * plan.width
        done = Int32(0)  # CTAs
        while done < piece.ctas:
            state = self.source(p, piece, done + cutlass.min(mine, sources - 1)) + state_at
            slots = [self.source(p, piece, done) + value_at]
            slots += [self.later_source(p, piece, done + i) + value_at for i in range(1, sources)]
            found = [Int32(0)] * 2
            words = [zeros for _ in range(sources)]
            waits = Int32(1)
            while waits == 1:
                found = ptx.load_relaxed(state, 0, Int32(0), [0, 0])
                words = [self.load_partial(slot, 0, Int32(0)) for slot in slots]
                waits = Int32(0)
                if ptx.any_lane(least([least(each) for each in [found, *words]]) == 0):
                    waits = Int32(1)
            if inside:  # zeros for the next launch
                ptx.store_relaxed(state, zeros[:2])
                for i in range_constexpr(sources):
                    self.store_partial(slots[i], 0, zeros)
            absent = ptx.sign_mask(cutlass.min(piece.ctas - 1 - done, sources - 1) - mine)
            top = masked(found[0], absent)
            before = peak
            peak = ptx.over_lanes(ptx.fmax, ptx.fmax(peak, top), self.item_bits)
            factor = ptx.exp2(top - peak)
            part = ptx.from_bits(found[1]) * factor
            part = ptx.over_lanes(operator.add, part, self.item_bits)
            before = ptx.exp2(before - peak)
            weight = weight * before + part
            value = [x * before for x in value]
            for i in range_constexpr(sources):
                share = ptx.shuffle(factor, lane - mine + i)
                value = [x + share * ptx.from_bits(word) for x, word in zip(value, words[i], strict=True)]
            done += sources
        return peak, weight, value

    def source(self, p: Params, piece: Piece, index: Int32) -> Int64:
        """The slot of a piece's CTA; of the last one beyond."""
        return cutlass.select_(index > 0, self.later_source(p, piece, index), self.partial(p, piece.first_slot))

    def later_source(self, p: Params, piece: Piece, index: Int32) -> Int64:
        """The same, of a CTA that is not the first."""
        return self.partial(p, 2 * (piece.first_cta + cutlass.min(index, piece.ctas - 1)))
