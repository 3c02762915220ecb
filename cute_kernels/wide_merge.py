"""Merging in a wgmma kernel: as in merge.py, by the consumers, and in a tree.

A tile has many rows, and one CTA would take long to read the partial results that all the CTAs of a piece have of them.
So of every four CTAs the last one merges what the others have, then of every four of these the last, and so on. As in
merge.py a CTA waits only for CTAs before it.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .layouts import LANES
from .merge import Merge, combine, least, marked, masked
from .schedule import Schedule
from .values import FIRST_MAX
from .wide_plan import WidePlan
from .work import Params, Piece

RADIX_SHIFT = 2  # four CTAs to a node of the tree
CHILDREN = (1 << RADIX_SHIFT) - 1  # whose partial results the fourth merges with its own


class WideMerge(Merge):
    """Merging in one kernel."""

    def __init__(self, plan: WidePlan, schedule: Schedule):
        super().__init__(plan, schedule)
        self.rows = plan.merge_rows

    @cute.jit
    def merge(self, p: Params, smem: Int32, member: Int32, team: Int32, lane: Int32, piece: Piece, again: Int32):
        """Merge the results of the CTA's warpgroups and those of the CTAs whose parent it is; store the output of a
        piece that ends here, else a partial result.

        A CTA waits for others only when it is done with its own share: if a piece ends here before that, only its
        partial result is stored, and this is called once more, ``again`` = 1.
        """
        early = piece.collects & (piece.is_last ^ 1) & (again ^ 1)
        is_output = cutlass.select_(piece.ctas == 1, Int32(1), piece.collects & (early ^ 1))
        index = cute.arch.block_idx()[0] - piece.first_cta
        last = cutlass.select_(early == 1, Int32(0), piece.ctas - 1)
        part = member * self.rows
        while part * LANES < piece.columns * self.plan.items:
            rows = self.items_of(part, lane, piece.columns)
            states = [(Float32(FIRST_MAX), Float32(0.0), [Float32(0.0)] * self.plan.width) for _ in rows]
            if again == 0:
                states = [self.combine_warps(smem, column, item) for column, item, _ in rows]
            states = self.absorb_tree(p, piece, rows, states, index, last, again)
            rows = self.items_of(wg.pin([part])[0], lane, piece.columns)
            for i in range_constexpr(self.rows):
                column, item, inside = rows[i]
                peak, weight, value = states[i]
                if is_output == 1:
                    self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
                elif inside:
                    slot = self.partial(p, piece.slot)
                    self.store_partial(slot + self.value_at(column, item), 0, [marked(x) for x in value])
                    if item == 0:
                        ptx.store_relaxed(slot + self.state_at(column), [marked(peak), marked(weight)])
            part += team * self.rows

    def items_of(self, part: Int32, lane: Int32, columns: Int32) -> list:
        """What a thread merges at once, from a part of a warp's size on."""
        return [self.item((part + i) * LANES + lane, columns) for i in range(self.rows)]

    @cute.jit
    def absorb_tree(self, p: Params, piece: Piece, rows: list, states: list, index: Int32, last: Int32, own: Int32):
        """Merge the partial results of the CTAs whose parent the piece's CTA ``index`` of 0 to ``last`` is, on all
        levels; its own, too, if ``own`` is 1.
        """
        shift = Int32(0)  # log2 of the CTAs of a child
        while (own == 1) | (
            ((1 << shift) <= last) & ((index == last) | (index + 1 & (1 << shift + RADIX_SHIFT) - 1 == 0))
        ):
            first = index >> shift + RADIX_SHIFT << shift + RADIX_SHIFT  # CTA of the node
            count = index - first >> shift
            first += (1 << shift) - 1  # of its first child
            if own == 1:
                first, count = index, Int32(1)
            if count > 0:
                states = self.absorb(p, piece, rows, states, first, 1 << shift, count)
            shift += cutlass.select_(own == 1, Int32(0), Int32(RADIX_SHIFT))
            own = Int32(0)
        return states

    @cute.jit
    def absorb(self, p: Params, piece: Piece, rows: list, states: list, first: Int32, step: Int32, count: Int32):
        """Merge the partial results of the piece's CTAs first, first + step, .., 1 <= ``count`` <= CHILDREN of them, as
        soon as they are there, and leave zeros for the next launch. All lanes of a warp must call it.

        rows: (column, item, whether it exists); states: (maximum, sum, values) of each.
        """
        slots = [self.source(p, piece, first + step * cutlass.min(Int32(i), count - 1)) for i in range(CHILDREN)]
        found = [[[Int32(0)] * 2 for _ in slots] for _ in rows]
        words = [[[Int32(0)] * self.plan.width for _ in slots] for _ in rows]
        waits = Int32(1)
        while waits == 1:
            for i in range_constexpr(self.rows):
                column, item, _ = rows[i]
                found[i] = [ptx.load_relaxed(slot + self.state_at(column), 0, Int32(0), [0, 0]) for slot in slots]
                words[i] = [self.load_partial(slot + self.value_at(column, item), 0, Int32(0)) for slot in slots]
            waits = Int32(0)
            if ptx.any_lane(least([least(x) for of_row in [*found, *words] for x in of_row]) == 0):
                waits = Int32(1)
        merged = []
        for i in range_constexpr(self.rows):
            column, item, _ = rows[i]
            zeros = [Int32(0)] * self.plan.width  # by all lanes: a row that does not exist is one of the warp's others
            for slot in slots:
                self.store_partial(slot + self.value_at(column, item), 0, zeros)
                ptx.store_relaxed(slot + self.state_at(column), zeros[:2])
            peak, weight, value = states[i]
            parts, values = [(peak, weight)], [value]
            for j in range_constexpr(CHILDREN):
                absent = ptx.sign_mask(count - 1 - j)
                top, part = found[i][j]
                parts.append((masked(top, absent), ptx.from_bits(part)))
                values.append([ptx.from_bits(word) for word in words[i][j]])
            merged.append(combine(parts, values))
        return merged

    def source(self, p: Params, piece: Piece, index: Int32) -> Int64:
        """The slot of a piece's CTA."""
        return cutlass.select_(
            index > 0, self.partial(p, 2 * (piece.first_cta + index)), self.partial(p, piece.first_slot)
        )
