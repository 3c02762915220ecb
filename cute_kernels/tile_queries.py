"""Query tiles on their way into wgmma as A registers: fetched ahead of their piece (wide_queries.py)."""

import cutlass
from cutlass import Int32, cute, range_constexpr

from . import ptx
from .attention import saturated
from .queries import floats, hadamard_lanes, hadamard_registers
from .schedule import Params, Piece, quotient
from .tile_plan import TilePlan
from .wide_queries import WideQueries


class TileQueries(WideQueries):
    """Prepares the query tiles of one kernel. The slot holds the next piece's queries as they lie in memory, padded."""

    def __init__(self, plan: TilePlan):
        self.plan = plan

    def fetched_at(self, at: Int32) -> Int32:
        row_bytes = 2 * self.plan.head_dim
        return at + at // row_bytes * (self.plan.fetched_row_bytes - row_bytes)

    @cute.jit
    def registers(self, p: Params, slot: Int32, first_row: Int32, lane: Int32, piece: Piece):
        """The A registers [k step][4] of a warp's 16 rows of the tile; rows beyond the piece's are zero."""
        scale = self.scale(p) / self.power(p)
        rows = []
        for r in range_constexpr(2):
            row = first_row + (lane >> 2) + 8 * r
            held = cutlass.max(cutlass.min(row, piece.columns - 1), 0)
            at = slot + held * self.plan.fetched_row_bytes + (lane & 3) * 4
            # a lane's pair i holds channels 8 i + 2 quad and the next
            values = floats(p, [ptx.load_shared(at, 16 * i, 1)[0] for i in range(2 * self.plan.tiles)])
            if p.rotate_q == 1:
                values = hadamard_registers(values, 2)
                values = hadamard_lanes(values, [1, 2], lane)  # strides 2 and 4
                values = hadamard_registers(values, self.plan.hadamard // 4, first=2)
            values = [saturated(x * scale) for x in values]
            halves = [ptx.to_half2(values[i], values[i + 1]) for i in range(0, len(values), 2)]
            rows.append([cutlass.select_(row < piece.columns, x, Int32(0)) for x in halves])
        return [[rows[0][2 * c], rows[1][2 * c], rows[0][2 * c + 1], rows[1][2 * c + 1]] for c in range(self.plan.tiles)]

    def highs(self, p: Params, first_row: Int32, lane: Int32, piece: Piece) -> list:
        """Of a lane's two rows the position behind the last key that the query sees."""
        first_seen = piece.window_start + p.window - p.q_len + 1
        first = piece.first_row + first_row + (lane >> 2)
        return [first_seen + quotient(first + 8 * r, p.group) for r in range(2)]
