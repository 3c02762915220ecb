"""The search for the range of a line: of several factors of the range of its values the one with the least squared
error. In the terms of encode.py.
"""

import cutlass
from cutlass import Float32, Int32, cute

from . import ptx
from .append_plan import VECTOR
from .encode_operand import Lines, Operand, pick
from .layouts import SLICE_TOKENS, TILE

MSE_FACTORS = 20  # these as in quantization.py
MSE_STEP = 1 / 32
NO_ERROR_YET = float("inf")
MANTISSA = 23  # bits of fp32


class Search:
    """Searches the ranges of one operand in one kernel."""

    def __init__(self, operand: Operand):
        self.operand, self.plan = operand, operand.plan
        self.unit = 2.0**-operand.bits  # of a code
        self.magic = 1.5 * 2.0 ** (MANTISSA - operand.bits)  # adding it rounds to multiples of ``unit``

    @cute.jit
    def best(
        self, p, smem: Int32, base: Int32, minor: Int32, group: Int32, lines_at: Int32, element: Int32, lane: Int32,
        count: Int32, low: Float32, high: Float32,
    ):  # fmt: skip
        """scale and zero of the range factor with the least squared error, of the larger factor on ties."""
        least = Float32(NO_ERROR_YET)
        best_scale, best_zero = Float32(1.0), Float32(0.0)
        i = Int32(0)
        while i < MSE_FACTORS:
            factor = ptx.subtract(Float32(1.0), ptx.multiply(Float32(i), Float32(MSE_STEP)))
            scale, zero = self.operand.scale_and_zero(*self.operand.shrunk(low, high, factor))
            may_be_better = ptx.any_lane(self.error_of_ends(low, high, scale, zero) < least)
            i += 1
            if cutlass.const_expr(self.operand.symmetric):  # scales fall, zeros stay: ends get no better from here on
                i = cutlass.select_(may_be_better, i, Int32(MSE_FACTORS))
            if may_be_better:
                error = Float32(0.0)
                if cutlass.const_expr(self.operand.is_k):
                    self.operand.store_line(smem, element, scale, zero)
                    cute.arch.sync_warp()
                    error = self.squared_error(p, smem, base, minor, group, lines_at, lane, count)
                    cute.arch.sync_warp()
                else:
                    token = self.operand.first_token(minor, group, lane & 3, lane >> 2)
                    row = smem + token * self.plan.row_bytes + group * (2 * self.operand.group)
                    error = self.squared_row_error(p, row, scale, zero)
                better = error < least
                least = cutlass.select_(better, error, least)
                best_scale = cutlass.select_(better, scale, best_scale)
                best_zero = cutlass.select_(better, zero, best_zero)
        return best_scale, best_zero

    def error_of_ends(self, low: Float32, high: Float32, scale: Float32, zero: Float32) -> Float32:
        """Squared error of a line's smallest and largest value, as far as they are beyond what codes reach.

        The line's squared error is not less, as rounding is monotonous. So a factor whose ends alone are not better
        than the best so far is none.
        """
        beyond = ptx.subtract(high, ptx.multiply(ptx.add(Float32(self.operand.levels), zero), scale))
        before = ptx.subtract(ptx.multiply(zero, scale), low)
        beyond, before = (ptx.fmax(x, Float32(0.0)) for x in (beyond, before))
        return ptx.add(ptx.multiply(beyond, beyond), ptx.multiply(before, before))

    @cute.jit
    def squared_row_error(self, p, row: Int32, scale: Float32, zero: Float32):
        """Of the lane's own token of V, whose channels of the group are at ``row``: a halving sum."""
        lines = self.in_units(Lines([ptx.divide(Float32(1.0), scale)], [zero], [scale]))
        vectors = 2 * self.operand.group // VECTOR
        sums = [Float32(0.0)] * 8
        if p.bfloat16 == 1:
            sums = self.row_sums(row, vectors, VECTOR, lines, ptx.bfloat2_floats)
        else:
            sums = self.row_sums(row, vectors, VECTOR, lines, ptx.half2_floats)
        return halving_sum(sums)

    @cute.jit
    def row_sums(self, row: Int32, vectors: int, step: int, lines: Lines, floats_of):
        """Squared errors of the eight values of a vector, over vectors ``step`` bytes apart, as in a halving sum."""
        sums = [Float32(0.0)] * 8
        if cutlass.const_expr(vectors == 1):
            values = [x for register in ptx.load_shared(row, 0, 4) for x in floats_of(register)]
            sums = [self.squared(x, lines, 0) for x in values]
        elif cutlass.const_expr(vectors <= 4):  # unrolled
            parts = [self.row_sums(row + i * step, vectors // 2, 2 * step, lines, floats_of) for i in range(2)]
            sums = [ptx.add(*pair) for pair in zip(*parts, strict=True)]
        else:
            for i in cutlass.range(2, unroll=1):
                part = self.row_sums(row + i * step, vectors // 2, 2 * step, lines, floats_of)
                sums = [ptx.add(*pair) for pair in zip(sums, part, strict=True)]
        return sums

    def squared_error(
        self, p, smem: Int32, base: Int32, minor: Int32, group: Int32, lines_at: Int32, lane: Int32, count: Int32
    ) -> Float32:
        """Of the lane's own line, a halving sum."""
        rest = count - group * self.operand.group - (lane >> 2)  # tokens from the lane's first one on that exist
        channel = minor * SLICE_TOKENS if self.operand.per_channel else group * self.operand.group
        errors = []  # of the lane's lines
        for across in range(2):
            at = base + across * (TILE * 2 if self.operand.per_channel else TILE * self.plan.row_bytes)
            tile = Int32(0)
            # [2 r + e]
            sums = self.error_sums(p, smem + 2 * channel, at, tile, lane, rest, self.operand.group // TILE, 1, across,
                                   self.in_units(self.operand.load_lines(smem, lines_at, across)))  # fmt: skip
            # over r1 of rows, r0 of columns
            pairs = [(i, i + 4) for i in (0, 1, 2, 3)] if self.operand.by_rows else [(i, i + 2) for i in (0, 1, 4, 5)]
            errors += [ptx.add(sums[i], sums[j]) for i, j in pairs]
        for mask in self.operand.butterfly:
            errors = [ptx.add(x, ptx.shuffle_xor(x, mask)) for x in errors]
        if self.operand.by_rows:
            errors = [ptx.add(*errors[i : i + 2]) for i in range(0, 8, 2)]
        return pick(errors, lane & 3 if self.operand.by_rows else lane >> 2)

    @cute.jit
    def error_sums(
        self, p, mean_base: Int32, base: Int32, tile: Int32, lane: Int32, rest: Int32, tiles: int, step: int,
        across: int, lines: Lines,
    ):  # fmt: skip
        """Squared errors over every ``step``-th tile along a panel from base on, in the order of a halving sum."""
        sums = [Float32(0.0)] * 8
        if cutlass.const_expr(tiles == 1):
            means = []
            if cutlass.const_expr(self.operand.mean is not None):
                means = self.operand.channel_means(mean_base, lane, Int32(across) if self.operand.per_channel else tile)
            values = self.operand.values(p, self.operand.tile(base, 0, 0), means)
            sums = [self.squared(x, lines, self.operand.line(0, n // 2, n % 2)) for n, x in enumerate(values)]
            if cutlass.const_expr(self.operand.per_channel):
                exists = [TILE * tile + 8 * (r & 1) < rest for r in range(4)]
                sums = [cutlass.select_(exists[n // 2], x, Float32(0.0)) for n, x in enumerate(sums)]
        else:
            for i in cutlass.range(2, unroll=1):
                at = base + i * (step * self.operand.along_bytes)
                part = self.error_sums(
                    p, mean_base, at, tile + i * step, lane, rest, tiles // 2, 2 * step, across, lines
                )
                sums = [ptx.add(x, y) for x, y in zip(sums, part, strict=True)]
        return sums

    def squared(self, x: Float32, lines: Lines, line: int) -> Float32:
        """Squared error of a value; lines: in units."""
        y = ptx.subtract_saturated(ptx.multiply(x, lines.inverse[line]), lines.zero[line])
        y = ptx.add(ptx.fmin(y, Float32(self.operand.levels * self.unit)), Float32(self.magic))
        code = ptx.add(ptx.subtract(y, Float32(self.magic)), lines.zero[line])
        if self.operand.symmetric:  # a code plus a half, times 11 bits: the product is exact
            error = ptx.fused(code, -lines.scale[line], x)
        else:
            error = ptx.subtract(ptx.multiply(code, lines.scale[line]), x)
        return ptx.multiply(error, error)

    def in_units(self, lines: Lines) -> Lines:
        """Lines in units in which 1 is 2^bits, so that saturation is the lower clamp: a code counts 2^-bits."""
        inverse, zero, scale = lines
        return Lines(
            [x * self.unit for x in inverse], [x * self.unit for x in zero], [x * (1 / self.unit) for x in scale]
        )


def halving_sum(values: list) -> Float32:
    """The sum of a power of two of values, by adding the upper half to the lower half until one is left."""
    while len(values) > 1:
        half = len(values) // 2
        values = [ptx.add(*pair) for pair in zip(values[:half], values[half:], strict=True)]
    return values[0]
