"""Merging in a wgmma kernel with dequantised tiles: the results of a piece lie where its last tiles lay.

A tile has many rows, and the last of the CTAs that share a piece would take long to read the partial results of all. So
they are merged in a tree: of every four CTAs the last one merges what the others have, then of every four of these the
last, and so on. As in merge.py a CTA waits only for CTAs before it.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .layouts import LANES
from .merge import combine, least, marked, masked
from .plan import QUAD
from .tile_attention import CORE, result_at
from .tile_plan import STATE_BYTES
from .values import FIRST_MAX
from .wide_merge import WideMerge
from .work import Params, Piece

RADIX_SHIFT = 2  # four CTAs to a node of the tree
CHILDREN = (1 << RADIX_SHIFT) - 1  # whose partial results the fourth merges with its own
ROWS = 2  # items that a thread merges at once, for as many rows


class TileMerge(WideMerge):
    """Merging in one kernel."""

    @cute.jit
    def merge(self, p: Params, smem: Int32, member: Int32, team: Int32, lane: Int32, piece: Piece):
        """Merge the results of the CTA's warpgroups, and those of CTAs before it if the piece goes on in the next one;
        store the output of a whole piece, else a partial result.
        """
        index = cute.arch.block_idx()[0] - piece.first_cta
        ends = (piece.collects == 1) & (piece.is_last == 1)  # the piece, and the CTA's share
        part = member * ROWS
        while part * LANES < piece.columns * self.plan.items:
            rows = [self.item((part + i) * LANES + lane, piece.columns) for i in range(ROWS)]
            states = [self.combine_warps(smem, column, item) for column, item, _ in rows]
            if (piece.ctas > 1) & ((piece.collects == 0) | ends):
                states = self.absorb_tree(p, piece, rows, states, index)
            for i in range_constexpr(ROWS):
                column, item, inside = rows[i]
                peak, weight, value = states[i]
                if (piece.ctas == 1) | ends:
                    self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
                elif inside:
                    slot = self.partial(p, piece.slot)
                    self.store_partial(slot + self.value_at(column, item), 0, [marked(x) for x in value])
                    if item == 0:
                        ptx.store_relaxed(slot + self.state_at(column), [marked(peak), marked(weight)])
            part += team * ROWS

    @cute.jit
    def collect(self, p: Params, member: Int32, team: Int32, lane: Int32, piece: Piece):
        """As in merge.py, for a piece that ends here, before the CTA's share does."""
        index = cute.arch.block_idx()[0] - piece.first_cta
        part = member * ROWS
        while part * LANES < piece.columns * self.plan.items:
            rows = [self.item((part + i) * LANES + lane, piece.columns) for i in range(ROWS)]
            nothing = (Float32(FIRST_MAX), Float32(0.0), [Float32(0.0)] * self.plan.width)
            states = self.absorb(p, piece, rows, [nothing] * ROWS, index, Int32(0), Int32(1))
            states = self.absorb_tree(p, piece, rows, states, index)
            for i in range_constexpr(ROWS):
                column, item, inside = rows[i]
                peak, weight, value = states[i]
                self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            part += team * ROWS

    @cute.jit
    def absorb_tree(self, p: Params, piece: Piece, rows: list, states: list, index: Int32):
        """Merge the partial results of the CTAs whose parent the piece's CTA ``index`` is, on all levels."""
        shift = Int32(0)  # log2 of the CTAs of a child
        last = piece.ctas - 1
        while ((1 << shift) <= last) & ((index == last) | (index + 1 & (1 << shift + RADIX_SHIFT) - 1 == 0)):
            first = index >> shift + RADIX_SHIFT << shift + RADIX_SHIFT  # CTA of the node
            count = index - first >> shift
            if count > 0:
                states = self.absorb(p, piece, rows, states, first + (1 << shift) - 1, 1 << shift, count)
            shift += RADIX_SHIFT
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
            for i in range_constexpr(ROWS):
                column, item, _ = rows[i]
                found[i] = [ptx.load_relaxed(slot + self.state_at(column), 0, Int32(0), [0, 0]) for slot in slots]
                words[i] = [self.load_partial(slot + self.value_at(column, item), 0, Int32(0)) for slot in slots]
            waits = Int32(0)
            if ptx.any_lane(least([least(x) for of_row in [*found, *words] for x in of_row]) == 0):
                waits = Int32(1)
        merged = []
        for i in range_constexpr(ROWS):
            column, item, inside = rows[i]
            if inside:
                zeros = [Int32(0)] * self.plan.width
                for slot in slots:
                    self.store_partial(slot + self.value_at(column, item), 0, zeros)
                    if item == 0:
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

    def combine_warps(self, smem: Int32, column: Int32, item: Int32) -> tuple:
        """As in merge.py: the results of the warpgroups that took turns."""
        plan = self.plan
        vectors = CORE // QUAD
        first = item * (plan.width // QUAD)
        states, values = [], []
        for s in range(plan.states):
            sums = smem + plan.sums_at + column * STATE_BYTES
            states.append(ptx.load_shared_floats(sums, s * plan.q_tile * STATE_BYTES, 2))
            results = ptx.load_shared(smem, plan.places_at + 4 * s, 1)[0]
            value = []
            for i in range(plan.width // QUAD):
                at = result_at(plan, column, (first + i) // vectors) + (first + i) % vectors * (4 * QUAD)
                value += ptx.load_shared_floats(results + at, 0, QUAD)
            values.append(value)
        return combine(states, values)
