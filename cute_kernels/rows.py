"""Rows of 16-bit tokens on their way to tails and blocks: limits of their values, and rotation.

A row on its way is four lanes', which hold every fourth 16 bytes: strides of the Hadamard butterflies are within a
vector, across the four lanes, then between a lane's vectors. In shared memory they take quarters of it (``transform``).
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .append_plan import ROW_LANES, VECTOR, WARP_ROWS, AppendPlan
from .layouts import BLOCK_TOKENS, HALF_BITS, transform_parts
from .queries import hadamard_lanes, hadamard_registers

# the limit of values, as in quantization.py; rows are rotated without care, and if one of the values is larger than
# SMALL then, a value before may have been beyond the limit (up to 256 channels: a 16th of it is left), else none was
LIMIT, SMALL = 32768.0, 1024.0
# 16-bit patterns: the limit, infinity, and 1024, so small that rotating up to 256 channels reaches no limit
HALF_LIMIT, HALF_INFINITY, HALF_SMALL = 0x7800, 0x7C00, 0x6400
BFLOAT_LIMIT, BFLOAT_INFINITY, BFLOAT_SMALL = 0x4700, 0x7F80, 0x4480
HALF2_ABS = 0x7FFF7FFF
HALF2_SIGNS = -0x7FFF8000  # 0x80008000


class Rows:
    """Conditions and rotates the rows of one kernel; ``p``: its Params."""

    def __init__(self, plan: AppendPlan):
        self.plan = plan

    @cute.jit
    def rotated(self, p, row: list, lane: Int32, masks: list):
        """A lane's vectors of a row, conditioned, through the Hadamard transform as in quantization.rotate, but for
        limiting the result: rounding beyond the limit, even to infinity, and limiting commute. masks: the two bits of
        the lane that tell the four lanes of a row from each other.
        """
        registers = [register for vector in row for register in vector]
        x = [Float32(0.0)] * (2 * len(registers))
        if p.bfloat16 == 1:
            x = [value for register in registers for value in ptx.bfloat2_floats(register)]
        else:
            x = [value for register in registers for value in ptx.half2_floats(register)]
        x = hadamard_registers(x, 8)  # strides within a vector
        x = hadamard_lanes(x, masks, lane)  # strides 8 and, of four lanes, 16
        x = hadamard_registers(x, self.plan.hadamard >> len(masks), first=8)
        x = [ptx.multiply(value, Float32(self.plan.hadamard**-0.5)) for value in x]
        rotated = row
        if p.bfloat16 == 1:
            rotated = vectors_of(x, ptx.to_bfloat2)
        else:
            rotated = vectors_of(x, ptx.to_half2)
        return rotated

    def limited(self, p, place: Int32, row: list) -> list:
        """The lane's vectors of a row conditioned, by way of their place."""
        step = ROW_LANES * VECTOR
        for j, vector in enumerate(row):
            ptx.store_shared(place, step * j, vector)
        self.limit(p, place)
        return [ptx.load_shared(place, step * j, 4) for j in range(self.plan.vectors)]

    @cute.jit
    def limit(self, p, place: Int32):
        """Condition the lane's vectors of a row at this place: NaN to 0, and within the limit. It is seldom done, so in
        few instructions.
        """
        for j in cutlass.range(self.plan.vectors, unroll=1):
            at = place + j * (ROW_LANES * VECTOR)
            ptx.store_shared(at, 0, self.conditioned(p, ptx.load_shared(at, 0, 4)))

    def conditioned(self, p, vector: list) -> list:
        """As ``limit``, of a vector in registers."""
        limit = cutlass.select_(p.bfloat16 == 1, Int32(BFLOAT_LIMIT), Int32(HALF_LIMIT))
        infinity = cutlass.select_(p.bfloat16 == 1, Int32(BFLOAT_INFINITY), Int32(HALF_INFINITY))
        return [conditioned_pair(x, limit, infinity) for x in vector]

    @cute.jit
    def rotated_spread(self, p, vector: list, lane: Int32):
        """A row of which each lane has one vector, conditioned and rotated: a quarter of a row's instructions, which a
        warp that comes by seldom has to fetch.
        """
        masks = ptx.LANE_BITS[: (2 * self.plan.hadamard // VECTOR).bit_length() - 1]
        return self.limited_and_rotated(p, [vector], lane, masks, lambda row: [self.conditioned(p, x) for x in row])[0]

    @cute.jit
    def limited_and_rotated(self, p, row: list, lane: Int32, masks: list, limited):
        """A row through ``rotated``, and before and after through ``limited``, if a limit is reached."""
        careful = ptx.any_lane(self.any_beyond_small(p, row))  # else none is
        if careful:
            row = limited(row)
        row = self.rotated(p, row, lane, masks)
        if careful:
            row = limited(row)
        return row

    def any_beyond_small(self, p, row: list) -> Boolean:
        """Whether one of the values is NaN or larger than SMALL."""
        # what carries larger ones of two at once into the sign bits
        halves, bfloats = ((0x7FFF - pattern) * 0x10001 for pattern in (HALF_SMALL, BFLOAT_SMALL))
        excess = cutlass.select_(p.bfloat16 == 1, Int32(bfloats), Int32(halves))
        beyond = Int32(0)
        for vector in row:
            for x in vector:
                beyond = beyond | ((x & HALF2_ABS) + excess)
        return (beyond & HALF2_SIGNS) != 0

    @cute.jit
    def limit_block(self, p, place: Int32):
        """Condition the rows that the lane has copied vectors of."""
        for i in cutlass.range(0, BLOCK_TOKENS, self.plan.rows_at_once, unroll=1):
            self.limit(p, place + i * self.plan.row_bytes)

    @cute.jit
    def rotate_block(self, p, smem: Int32, warp: Int32, lane: Int32, old: Int32, total: Int32):
        """Rotate those of the warp's rows that are new: not the first ``old``, which the tail holds rotated; rows from
        ``total`` on repeat the one before. Eight lanes have vectors of as many rows, so that they use all banks.
        """
        own = warp * WARP_ROWS + lane % WARP_ROWS
        rows = smem + own * self.plan.row_bytes
        for i in cutlass.range(0, BLOCK_TOKENS, self.plan.rows_at_once, unroll=1):
            is_new = cutlass.min(own + i, total - 1) >= old
            for first in range_constexpr(0, self.plan.head_dim, self.plan.hadamard):
                at = rows + i * self.plan.row_bytes + 2 * first
                if p.bfloat16 == 1:  # around much code, or registers would be held for both
                    self.transform(at, lane, is_new, ptx.bfloat2_floats, ptx.to_bfloat2)
                else:
                    self.transform(at, lane, is_new, ptx.half2_floats, ptx.to_half2)

    @cute.jit
    def transform(self, at: Int32, lane: Int32, is_new: Boolean, floats_of, pair_of):
        """The transform of the channels at this address by four lanes, which begin with a quarter each.

        For a stride across lanes, both partners keep the values that they have as first, x, and pass on the others, y,
        so that each does all of half of the butterflies, by half of the shuffles. Where the lane's bit is set, x are
        therefore the second ones, of the quarter and later of sum and difference; signs of differences come last.
        """
        count = self.plan.hadamard // 8  # of x, of y
        parts = transform_parts(self.plan.hadamard)
        half, quarter = parts(1, 0, 0), parts(0, 1, 0)
        odd, high = lane // WARP_ROWS & 1, lane // (2 * WARP_ROWS)
        odd_sign, high_sign = (cutlass.select_(bit == 0, Float32(1.0), Float32(-1.0)) for bit in (odd, high))
        own = at + (odd + 2 * high) * quarter
        x, y = (hadamard_registers(load_values(own + i * half, count, floats_of), count) for i in (odd, 1 - odd))
        x, y = added(y, x, odd_sign), added(x, y, -odd_sign)
        y = [ptx.shuffle_xor(value, WARP_ROWS) for value in y]
        x, y = added(x, y, high_sign), added(x, y, -high_sign)
        y = [ptx.shuffle_xor(value, 2 * WARP_ROWS) for value in y]
        norm = Float32(self.plan.hadamard**-0.5) * cutlass.select_(high == 0, Float32(1.0), odd_sign)
        sums, differences = added(x, y, Float32(1.0)), added(x, y, Float32(-1.0))
        cute.arch.sync_warp()  # values are stored where other lanes have loaded theirs
        if is_new:
            place = at + high * quarter + odd * half
            store_values(place, [ptx.multiply(value, norm) for value in sums], pair_of)
            place += parts(0, 0, 1)
            store_values(place, [ptx.multiply(value, norm * high_sign) for value in differences], pair_of)


def added(x: list, y: list, sign: Float32) -> list:
    """x + y or x - y."""
    return [ptx.fused(b, sign, a) for a, b in zip(x, y, strict=True)]


def load_values(at: Int32, count: int, floats_of) -> list:
    """So many 16-bit values in shared memory as fp32."""
    words = min(count // 2, 4)
    registers = [x for i in range(0, 2 * count, 4 * words) for x in ptx.load_shared(at, i, words)]
    return [value for register in registers for value in floats_of(register)]


def store_values(at: Int32, x: list, pair_of) -> None:
    """Store fp32 values as 16 bit to shared memory."""
    for i, vector in enumerate(vectors_of(x, pair_of)):
        ptx.store_shared(at, VECTOR * i, vector)


def stage_row(place: Int32, source: Int64, vectors: int) -> None:
    """Begin to copy a lane's vectors of a row to shared memory; addresses: of the first ones."""
    for j in range(vectors):
        ptx.copy16(place, source, ROW_LANES * VECTOR * j)


def vectors_of(x: list, pair_of) -> list:
    """fp32 values as vectors of 16 bit; a short one, if there are so few."""
    registers = [pair_of(*x[i : i + 2]) for i in range(0, len(x), 2)]
    return [registers[i : i + 4] for i in range(0, len(registers), 4)]


def conditioned_pair(x: Int32, limit: Int32, infinity: Int32) -> Int32:
    """Two 16-bit values with NaN as 0, and within the limit; in integers, so alike for fp16 and bf16."""
    halves = []
    for shift in (0, HALF_BITS):
        size, sign = x >> shift & 0x7FFF, x >> shift & 0x8000
        kept = cutlass.min(size, limit) | sign
        halves.append(cutlass.select_(size > infinity, Int32(0), kept) << shift)
    return halves[0] | halves[1]
