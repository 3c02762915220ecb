"""Queries on their way into the MMAs, and the Hadamard transform.

A merge warp prepares the query tile of a piece while the consumers are still at the piece before: loads its rows,
rotates them, divides each by a power of two so that fp16 loses no range, and leaves them in one of two slots of shared
memory as B operands: [column tile][vector][lane] of 16 bytes, then of each column the factor with which its products
become log2 scores, and the position behind the last key that it sees. Queries that are not rotated are so exact.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .layouts import LANES
from .plan import COLUMNS, MERGE_WARPS, QUERY_VECTOR, Plan
from .values import floats
from .work import Params

EXPONENT = 0x7F800000  # of fp32


class Queries:
    """Prepares the query tiles of one kernel."""

    def __init__(self, plan: Plan):
        self.plan = plan
        # where an MMA has each column twice, each of the two lanes takes half of a row, for both
        self.parts = plan.copies if plan.hadamard == plan.head_dim else 1
        self.vectors = plan.query_vectors // self.parts  # of a lane

    @cute.jit
    def prepare(
        self, p: Params, slot: Int32, warp: Int32, lane: Int32, b: Int32, head: Int32, first_row: Int32, length: Int32
    ):
        """Write the queries of a tile into a slot; row = query token * group + head of the group.

        Merge warp ``warp`` takes every third column tile. ``length``: tokens of sequence ``b``; ``head``: KV head.
        """
        column, quad = lane >> 2, lane & 3
        part = column % self.parts
        between = ptx.LANE_BITS[2 : 1 + self.parts]  # tell the lanes of the parts apart
        for n in range_constexpr(self.plan.column_tiles):
            if warp == n % MERGE_WARPS:
                row = first_row + (n * COLUMNS + column) // self.plan.copies
                token = row // p.group
                inside = token < p.q_len
                at = Int64(b * p.q_len + token) * p.num_q_heads + head * p.group + row - token * p.group
                at = cutlass.select_(inside, at, Int64(0))  # any row; it counts as zero
                at = p.q.toint() + at * (2 * self.plan.head_dim)
                at += Int64(part * (2 * self.plan.head_dim // self.parts) + quad * 4)
                # a lane's pair i holds channels 8 i + 2 quad and the next
                values = floats(p, [ptx.load_global(at, offset=16 * i)[0] for i in range(4 * self.vectors)])
                scale = p.softmax_scale_log2
                if p.rotate_q == 1:
                    values = hadamard_registers(values, 2)
                    values = hadamard_lanes(values, [1, 2], lane)  # strides 2 and 4
                    values = hadamard_registers(values, self.plan.hadamard // (4 * self.parts), first=2)
                    values = hadamard_lanes(values, between, lane)
                    scale = scale * self.plan.hadamard**-0.5
                largest = Float32(0.0)
                for i in range_constexpr(len(values)):
                    largest = ptx.fmax(largest, ptx.fabs(values[i]))
                largest = ptx.over_lanes(ptx.fmax, largest, [*ptx.LANE_BITS[:2], *between])
                exponent = ptx.bits(largest) & EXPONENT
                inverse = ptx.from_bits(cutlass.select_(inside, 0x7F000000 - exponent, Int32(0)))  # 1 / 2^e
                halves = [ptx.to_half2(values[i] * inverse, values[i + 1] * inverse) for i in range(0, len(values), 2)]
                first = slot + part * query_offset(self.plan, 0, self.vectors)
                for v in range_constexpr(self.vectors):
                    for mask in [0, *between]:
                        place = first + (lane ^ mask) * QUERY_VECTOR
                        ptx.store_shared(place, query_offset(self.plan, n, v), halves[4 * v : 4 * v + 4])
                if (quad == 0) & (column % self.plan.copies == 0):
                    column_at = slot + column // self.plan.copies * 4
                    factor = ptx.from_bits(exponent) * scale
                    ptx.store_shared(column_at, self.plan.factors_offset + 4 * COLUMNS * n, [factor])
                    ptx.store_shared(
                        column_at, self.plan.highs_offset + 4 * COLUMNS * n, [length - p.q_len + token + 1]
                    )


def read_tiles(plan: Plan, slot: Int32, lane: Int32) -> list:
    """B operands [n][c][2] half2."""
    tiles = []
    for n in range(plan.column_tiles):
        vectors = [
            ptx.load_shared(slot + lane * QUERY_VECTOR, query_offset(plan, n, v), 4) for v in range(plan.query_vectors)
        ]
        halves = [x for vector in vectors for x in vector]
        tiles.append([halves[i : i + 2] for i in range(0, len(halves), 2)])
    return tiles


def read_factors(plan: Plan, slot: Int32, lane: Int32) -> list:
    """[n][j] factors of a lane's columns."""
    return [[ptx.from_bits(x) for x in words] for words in lane_words(plan, slot, plan.factors_offset, lane)]


def read_highs(plan: Plan, slot: Int32, lane: Int32) -> list:
    """[n][j] last positions + 1 of a lane's columns."""
    return lane_words(plan, slot, plan.highs_offset, lane)


def lane_words(plan: Plan, slot: Int32, offset: int, lane: Int32) -> list:
    """[n][j] of what a slot has of each column, one word, from ``offset`` on."""
    quad = slot + (lane & 3) * (4 * plan.lane_columns)
    return [ptx.load_shared(quad, offset + 4 * COLUMNS * n, plan.lane_columns) for n in range(plan.column_tiles)]


def query_offset(plan: Plan, n: int, v: int) -> int:
    """Of lane 0's vector v of column tile n."""
    return (n * plan.query_vectors + v) * LANES * QUERY_VECTOR


def hadamard_registers(x: list, size: int, first: int = 1) -> list:
    """Butterflies of strides first, 2 first, .. below ``size`` over a list."""
    stride = first
    while stride < size:
        x = [x[i] + x[i + stride] if i // stride % 2 == 0 else x[i - stride] - x[i] for i in range(len(x))]
        stride *= 2
    return x


def hadamard_lanes(x: list, masks: list, lane: Int32) -> list:
    """Butterflies across lanes: partners differ in the bits of ``masks``, one after another."""
    for mask in masks:
        sign = cutlass.select_((lane & mask) == 0, Float32(1.0), Float32(-1.0))
        x = [v * sign + ptx.shuffle_xor(v, mask) for v in x]
    return x
