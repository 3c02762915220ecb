"""Query tiles as wgmma's B operand, prepared by the consumers when a piece begins.

The slot holds, per split of the columns, Q^T in core matrices (warpgroup.py), then of each column the position behind
the last key that it sees. Q * softmax scale * log2 e is divided by one power of two, so that fp16 loses no range of q.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .attention import saturated
from .layouts import LANES
from .queries import EXPONENT, floats, hadamard_lanes, hadamard_registers
from .schedule import Params, Piece
from .wide_plan import WidePlan

MAX_AT_ONCE = 4  # rows of a warp whose loads are in flight together
ROTATED_ROOM = 16.0  # rotated channels are larger than any one of q


class WideQueries:
    """Prepares the query tiles of one kernel."""

    def __init__(self, plan: WidePlan):
        self.plan = plan
        self.words = plan.head_dim // LANES // 2  # half2 of a lane when a warp holds a row
        self.at_once = max(1, min(MAX_AT_ONCE, plan.q_tile // plan.warps))

    def scale(self, p: Params) -> Float32:
        """What q is multiplied with, all in all."""
        rotated = Float32(self.plan.hadamard**-0.5)
        return p.softmax_scale_log2 * cutlass.select_(p.rotate_q == 1, rotated, Float32(1.0))

    def power(self, p: Params) -> Float32:
        """The power of two that the operand leaves out: what remains of the scale is at most 1 (1/16 if rotated)."""
        exponent = ptx.from_bits(ptx.bits(self.scale(p)) & EXPONENT)
        return exponent * cutlass.select_(p.rotate_q == 1, Float32(2.0 * ROTATED_ROOM), Float32(2.0))

    @cute.jit
    def prepare(self, p: Params, slot: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Write a piece's queries into the slot; row = query token * group + head of the group."""
        plan = self.plan
        length = piece.window_start + p.window
        scale = self.scale(p) / self.power(p)
        first = warp
        while first < plan.q_tile:
            loaded, inside, tokens = [], [], []
            for i in range_constexpr(self.at_once):
                row = piece.first_row + first + i * plan.warps
                token = row // p.group
                held = token < p.q_len
                at = Int64(piece.b * p.q_len + token) * p.num_q_heads + piece.head * p.group + row - token * p.group
                at = cutlass.select_(held, at, Int64(0))  # any row; it counts as zero
                at = p.q.toint() + at * (2 * plan.head_dim) + Int64(lane) * (4 * self.words)
                loaded.append(ptx.load_global(at, self.words))
                inside.append(held)
                tokens.append(token)
            for i in range_constexpr(self.at_once):
                column = first + i * plan.warps
                values = floats(p, loaded[i])
                if p.rotate_q == 1:
                    values = hadamard_registers(values, 2 * self.words)
                    values = hadamard_lanes(values, [1 << b for b in range(5)], lane)
                factor = cutlass.select_(inside[i], scale, Float32(0.0))
                values = [saturated(x * factor) for x in values]
                halves = [ptx.to_half2(values[j], values[j + 1]) for j in range(0, len(values), 2)]
                if column < plan.q_tile:
                    ptx.store_shared(self.place(slot, column, lane), 0, halves)
                if (column < plan.q_tile) & (lane == 0):
                    ptx.store_shared(slot + column * 4, plan.highs_offset, [length - p.q_len + tokens[i] + 1])
            first += self.at_once * plan.warps
        wg.fence_async()

    def place(self, slot: Int32, column: Int32, lane: Int32) -> Int32:
        """Address of a lane's channels of a column."""
        plan = self.plan
        split, column = column // plan.columns, column % plan.columns
        at = slot + split * (plan.columns * plan.head_dim * 2)
        at += column // wg.CORE_ROWS * wg.CORE_BYTES + column % wg.CORE_ROWS * wg.CORE_ROW_BYTES
        channel_bytes = lane * (4 * self.words)
        at += channel_bytes // wg.CORE_ROW_BYTES * (plan.column_tiles * wg.CORE_BYTES)
        return at + channel_bytes % wg.CORE_ROW_BYTES

    def operand(self, slot: Int32, split: Int32) -> Int32:
        """B descriptor of a split's first k step."""
        at = slot + split * (self.plan.columns * self.plan.head_dim * 2)
        return wg.descriptor(cute.arch.make_warp_uniform(at), self.plan.column_tiles)
