"""Query tiles on their way into wgmma: fetched ahead of their piece, made its B operand when it begins.

The slot holds, per split of the columns, Q^T in core matrices (warpgroup.py), then the next piece's queries as they lie
in memory, then of each column the position behind the last key that it sees.
Queries that are not rotated are exact operands; softmax scale and log2 e meet the scores.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute

from . import ptx
from . import warpgroup as wg
from .layouts import LANES
from .queries import hadamard_lanes, hadamard_registers
from .schedule import quotient
from .values import floats, saturated
from .wide_plan import HIGH_BYTES, WidePlan
from .work import Params, Piece

ROTATED_ROOM = 16.0  # rotated channels are larger than any one of q
COPY_BYTES = 16  # of one cp.async


class WideQueries:
    """Prepares the query tiles of one kernel."""

    def __init__(self, plan: WidePlan):
        self.plan = plan
        self.words = plan.head_dim // LANES // 2  # half2 of a lane when a warp holds a row
        self.layout = wg.operand_layout(plan.columns, plan.head_dim)  # (column, channel) -> byte of a split's Q^T

    def scale(self, p: Params) -> Float32:
        """What q is multiplied with to be the operand."""
        rotated = Float32(self.plan.hadamard**-0.5 / ROTATED_ROOM)
        return wg.again(Float32(cutlass.select_(p.rotate_q == 1, rotated, Float32(1.0))))

    def factor(self, p: Params) -> Float32:
        """With which products with the operand become log2 scores."""
        return wg.again(p.softmax_scale_log2) * cutlass.select_(p.rotate_q == 1, Float32(ROTATED_ROOM), Float32(1.0))

    @cute.jit
    def fetch(self, p: Params, smem: Int32, folder: Int32, lane: Int32, b: Int32, tile: tuple):
        """Let the folders copy the queries of a tile (KV head, first row) into the slot, each its share of the rows;
        row = query token * group + head of the group.
        """
        plan = self.plan
        head, first_row = tile
        row_bytes = 2 * plan.head_dim
        columns = cutlass.min(p.group * p.q_len - first_row, plan.q_tile)
        at = (folder * LANES + lane) * COPY_BYTES
        while at < columns * row_bytes:
            row = first_row + at // row_bytes
            token = quotient(row, p.group)
            source = Int64(cutlass.max(b, 0) * p.q_len + token) * p.num_q_heads + head * p.group + row - token * p.group
            source = p.q.toint() + source * row_bytes + Int64(at % row_bytes)
            ptx.copy16(smem + (plan.slots_at + plan.fetched_offset) + at, source, 0)
            at += plan.folders * LANES * COPY_BYTES
        return Int32(0)

    @cute.jit
    def prepare(self, p: Params, slot: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Make the fetched queries the B operand; columns beyond the piece's are zero."""
        plan = self.plan
        scale = self.scale(p)
        column = warp
        while column < plan.q_tile:
            halves = [Int32(0)] * self.words
            if column < piece.columns:
                fetched = slot + column * (2 * plan.head_dim) + lane * (4 * self.words)
                halves = self.scaled(p, ptx.load_shared(fetched, plan.fetched_offset, self.words), scale, lane)
            ptx.store_shared(self.place(slot, column, lane), 0, halves)
            column += plan.warps
        self.store_highs(p, slot, warp, lane, piece)
        wg.fence_async()

    @cute.jit
    def store_highs(self, p: Params, slot: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Of each column the position behind the last key that it sees, a column to a thread."""
        column = warp * LANES + lane
        if column < self.plan.q_tile:
            first_seen = piece.window_start + wg.again(p.window) - p.q_len + 1
            high = first_seen + quotient(piece.first_row + column, p.group)
            ptx.store_shared(slot + column * HIGH_BYTES, self.plan.highs_offset, [high])

    @cute.jit
    def scaled(self, p: Params, registers: list, scale: Float32, lane: Int32):
        """A lane's channels of a query, rotated if queries are, times ``scale``, as fp16."""
        values = floats(p, registers)
        if p.rotate_q == 1:
            values = hadamard_registers(values, 2 * self.words)
            values = hadamard_lanes(values, ptx.LANE_BITS, lane)
        values = [saturated(x * scale) for x in values]
        return [ptx.to_half2(values[j], values[j + 1]) for j in range(0, len(values), 2)]

    def place(self, slot: Int32, column: Int32, lane: Int32) -> Int32:
        """Address of a lane's channels of a column."""
        plan = self.plan
        split, column = column // plan.columns, column % plan.columns
        at = slot + split * (plan.columns * plan.head_dim * 2)
        at += column // wg.CORE_ROWS * self.layout(wg.CORE_ROWS, 0) + column % wg.CORE_ROWS * self.layout(1, 0)
        channel_bytes = lane * (4 * self.words)
        at += channel_bytes // wg.CORE_ROW_BYTES * self.layout(0, wg.CORE_DEPTH)
        return at + channel_bytes % wg.CORE_ROW_BYTES
