"""Encoding of one operand (K or V) of a block whose 128 rows lie in shared memory: the steps of quantization.py, fp32,
rounded one by one, so that the bytes are the same.

A 16x16 tile of the rows comes as an MMA fragment (ldmatrix, transposed for V): a lane encodes what it will later read.
With g = lane / 4, q = lane % 4, register r of a tile holds row g + 8 (r & 1), columns 2q and 2q + 1, + 8 (r >> 1); rows
are tokens of K, channels of V. A *panel* is the parameters that the 32 lanes of a warp own, one each:
    columns (K per channel, V)   of two column tiles over one group of rows; lane's column: g = 4 tile + 2 r1 + e
    rows (K per token)           of a slice's 32 rows over one group of columns; lane's row: g + 8 q
Warps take panels in turn; then warp w encodes slice w, whose code vectors it stores straight into the block. Parameters
pass through shared memory: an image of their sections, and 1 / scale in the same order.
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .append_plan import VECTOR
from .fragments import fragments
from .layouts import BLOCK_TOKENS, HALF_BITS, LANES, NUM_SLICES, SLICE_TOKENS, TILE, WORD_BITS, symmetric_zero
from .queries import floats

MIN_SCALE = 2.0**-24  # these as in quantization.py
ZERO_LIMIT = 2.0**-10
MSE_FACTORS = 20
MSE_STEP = 1 / 32
NO_ERROR_YET = float("inf")
MANTISSA = 23  # bits of fp32
FP32_MAX = 3.0e38


class Lines(NamedTuple):
    """Coefficients of the lane's columns (8 of two column tiles) or rows (4 of a slice) within a group."""

    inverse: list  # 1 / scale
    zero: list
    scale: list  # empty unless asked for


class Run(NamedTuple):
    """Code vectors of a slice come in runs that differ only in the channel tiles that they hold."""

    count: int
    vectors: int  # of a lane in a run
    members: list  # (token tile of the slice, channel tile) of the first run
    tiles: int  # channel tiles from a run to the next


class Encoder:
    """Encodes one operand in one kernel; ``plan`` is an AppendPlan."""

    def __init__(self, plan, operand: str):
        quant, fmt = plan.quant, plan.fmt
        self.plan, self.operand = plan, operand
        self.is_k = operand == "k"
        self.bits, self.group, self.symmetric = (
            getattr(quant, f"{operand}_{x}") for x in ("bits", "group", "symmetric")
        )
        self.section = {name: getattr(fmt, f"{operand}_{name}") for name in ("codes", "scale", "zero")}
        self.mean = fmt.k_mean if self.is_k else None
        self.by_rows = self.is_k and quant.k_axis == "token"
        self.per_channel = self.is_k and not self.by_rows
        self.vector_words = fmt.k_vector_words if self.is_k else fmt.v_vector_words
        self.fragments = fragments(fmt.sections[f"{operand}_codes"], operand, plan.head_dim, self.vector_words)
        self.run = find_run(self.fragments, 2 if self.bits == 8 else 1)
        # panels: x = minor + minors * (group)
        self.minors = plan.head_dim // SLICE_TOKENS if self.per_channel else NUM_SLICES
        self.groups = (BLOCK_TOKENS if self.per_channel else plan.head_dim) // self.group
        # of the parameters' elements: from a group to the next, from a panel to the next in its group
        layout = self.section["scale"].layout
        across, along = (layout[0], layout[1]) if self.by_rows else (layout[1], layout[0])
        self.minor_stride, self.group_stride = across(SLICE_TOKENS), along.stride if self.groups > 1 else 0
        self.lane_line = across(1) if self.by_rows else across(2)  # from a lane's first line to that of the next g or q
        self.lines = 4 if self.by_rows else 8
        # bytes from a tile of a panel to the next along its group
        self.along_bytes = TILE * plan.row_bytes if self.per_channel else TILE * 2
        self.unit = 2.0**-self.bits  # of a code
        self.levels = float((1 << self.bits) - 1)
        self.magic = 1.5 * 2.0 ** (MANTISSA - self.bits)  # adding it rounds to multiples of ``unit``
        self.butterfly = (2, 1) if self.by_rows else (16, 8, 4)  # lanes that share a line, in the order of halving sums

    @cute.jit
    def find_parameters(
        self, p, smem: Int32, warp: Int32, lane: Int32, count: Int32, clip: Float32, limit: Float32
    ):  # fmt: skip
        """Find the parameters of the rows, and leave them in shared memory -> whether no value that the lane saw is NaN
        or beyond the limit. Rows from ``count`` on repeat a row of before.
        """
        rows = smem + self.fragment_lane(lane)
        self.clear_padding(smem, warp, lane)
        fits = Boolean(True)
        if cutlass.const_expr(self.mean is not None):
            fits = self.store_means(p, smem, rows, warp, lane, count, limit)
            cute.arch.sync_threads()
        for x in cutlass.range(warp, self.minors * self.groups, self.plan.warps, unroll=1):
            minor, group = x % self.minors, x // self.minors
            at = rows + self.panel_offset(minor, group)
            fits = fits & self.parameters(p, smem, at, minor, group, lane, count, clip, limit)
        return fits

    @cute.jit
    def encode(self, p, smem: Int32, warp: Int32, lane: Int32, block: Int64, count: Int32):
        """Encode the rows into the block at this address; tokens from ``count`` on do not exist."""
        self.store_codes(p, smem, smem + self.fragment_lane(lane), warp, lane, block, count)
        self.store_parameters(smem, warp * LANES + lane, block)

    # -- rows in shared memory ---------------------------------------------------------------------------------

    def fragment_lane(self, lane: Int32) -> Int32:
        """The lane's part of a tile's address, which names row lane % 8 of matrix lane / 8; matrix r is register r."""
        low, high = lane >> 3 & 1, lane >> 4
        tokens, channels = (low, high) if self.is_k else (high, low)
        return (lane % 8 + 8 * tokens) * self.plan.row_bytes + 16 * channels

    def tile(self, base: Int32, token_tile: int, channel_tile: int) -> list:
        """The four registers of a tile, from the fragment address of tile (0, 0)."""
        offset = token_tile * TILE * self.plan.row_bytes + channel_tile * TILE * 2
        return ptx.load_matrices(base + offset, not self.is_k)

    def panel_offset(self, minor: Int32, group: Int32) -> Int32:
        """Of a panel's tile (0, 0)."""
        token, channel = minor * SLICE_TOKENS, group * self.group
        if self.per_channel:
            token, channel = group * self.group, minor * SLICE_TOKENS
        return token * self.plan.row_bytes + channel * 2

    def panel_tiles(self, base: Int32) -> list:
        """The two tiles of a panel at one place along its group, [4 across + r]."""
        tiles = [self.tile(base, 0, i) if self.per_channel else self.tile(base, i, 0) for i in range(2)]
        return tiles[0] + tiles[1]

    def line(self, across: int, r: int, e: int) -> int:
        """The line, in the order of the lane's parameters, of half e of register r of a panel's tile."""
        return 2 * across + (r & 1) if self.by_rows else 4 * across + 2 * (r >> 1) + e

    @cute.jit
    def values(self, p, registers: list, means: list):
        """Registers of tiles as fp32; with means (of the same channels) less these."""
        return less(floats(p, registers), means)

    # -- means -------------------------------------------------------------------------------------------------

    @cute.jit
    def store_means(self, p, smem: Int32, rows: Int32, warp: Int32, lane: Int32, count: Int32, limit: Float32):
        """The mean key over the first ``count`` tokens, two channel tiles at a time -> whether those of the lane are
        within half the limit: so are then, if they are that far from their mean at most, the keys within the limit.
        """
        fits = Boolean(True)
        inverse = ptx.divide(Float32(1.0), Float32(count))
        for pair in cutlass.range(warp, self.plan.head_dim // SLICE_TOKENS, self.plan.warps, unroll=1):
            base = rows + pair * (2 * SLICE_TOKENS)
            own = Float32(0.0)
            for j in range_constexpr(2):
                tiles = BLOCK_TOKENS // TILE
                sums = self.token_sums(p, base + j * TILE * 2, lane >> 2, count, tiles)  # [2 r + e] over the rows g
                sums = [ptx.add(sums[r], sums[r + 2]) for r in (0, 1, 4, 5)]  # and g + 8
                for mask in (16, 8, 4):
                    sums = [ptx.add(x, ptx.shuffle_xor(x, mask)) for x in sums]
                own = cutlass.select_(lane >> 4 == j, pick(sums, lane >> 2 & 3), own)
            mean = ptx.add(half_value(ptx.multiply(own, inverse)), Float32(0.0))  # + 0: no negative zero
            fits = fits & (ptx.fabs(mean) <= limit * 0.5)  # NaN is not
            mean = ptx.to_half2(mean, Float32(0.0))
            ptx.store_shared_half(smem + 2 * (pair * SLICE_TOKENS + self.mean_lane(lane)), self.image(self.mean), mean)
        return fits

    @cute.jit
    def token_sums(self, p, base: Int32, token: Int32, count: Int32, tiles: int, step: int = 1):
        """Sums over every ``step``-th token tile from base on, whose first row is ``token``; [2 r + e].

        In the order of a halving sum: even tiles and odd ones apart.
        """
        sums = [Float32(0.0)] * 8
        if cutlass.const_expr(tiles == 1):
            values = self.values(p, self.tile(base, 0, 0), [])
            exists = [token + 8 * (r & 1) < count for r in range(4)]
            sums = [cutlass.select_(exists[i // 2], x, Float32(0.0)) for i, x in enumerate(values)]
        else:
            for i in cutlass.range(2, unroll=1):
                at, first = base + i * (step * TILE * self.plan.row_bytes), token + i * (step * TILE)
                part = self.token_sums(p, at, first, count, tiles // 2, 2 * step)
                sums = [ptx.add(x, y) for x, y in zip(sums, part, strict=True)]
        return sums

    def mean_lane(self, lane: Int32) -> Int32:
        """Element of the lane's channel among those of two channel tiles, in B order."""
        return (lane & 3) * 8 + (lane >> 2)

    def channel_means(self, base: Int32, lane: Int32, tile: Int32) -> list:
        """Means of the channels of a tile, for its eight values of the lane; base: smem, or from a pair of tiles on."""
        element = (tile >> 1) * SLICE_TOKENS + (lane & 3) * 8 + (tile & 1) * 4  # in B order
        got = ptx.load_shared(base + 2 * element, self.image(self.mean), 2)  # registers r1 of halves e
        means = [ptx.half2_floats(register) for register in got]
        return [means[r >> 1][e] for r in range(4) for e in range(2)]

    # -- parameters --------------------------------------------------------------------------------------------

    def image(self, section) -> int:
        """Where a section of parameters lies in shared memory."""
        return self.plan.image_at + section.offset - self.section["scale"].offset

    @cute.jit
    def parameters(
        self, p, smem: Int32, base: Int32, minor: Int32, group: Int32, lane: Int32, count: Int32, clip: Float32,
        limit: Float32,
    ):  # fmt: skip
        """Find and store the parameters of a panel; each lane those of its own line -> as find_parameters."""
        first = minor * self.minor_stride + group * self.group_stride
        quad, eighth = lane & 3, lane >> 2
        lines_at = first + (eighth if self.by_rows else quad) * self.lane_line
        element = lines_at + (quad if self.by_rows else eighth)
        if cutlass.const_expr(self.by_rows and self.mean is not None):
            low, high = self.row_ranges(p, smem, base, group, lane)
            fits = (ptx.fabs(low) <= limit * 0.5) & (ptx.fabs(high) <= limit * 0.5)  # see store_means
        else:
            low, high, fits = self.ranges(p, smem, base, minor, lane, limit)
        scale, zero = Float32(1.0), Float32(0.0)
        if clip > 0.0:
            if clip < 1.0:
                low, high = self.shrunk(low, high, clip)
            scale, zero = self.scale_and_zero(low, high)
        else:
            scale, zero = self.searched(p, smem, base, minor, group, lines_at, element, lane, count, low, high)
        exists = self.first_token(minor, group, quad, eighth) < count
        scale, zero = (cutlass.select_(exists, x, Float32(0.0)) for x in (scale, zero))
        self.store_line(smem, element, scale, zero)
        return fits

    def first_token(self, minor: Int32, group: Int32, quad: Int32, eighth: Int32) -> Int32:
        """Of the lane's own line."""
        if self.per_channel:
            return group * self.group
        in_slice = eighth + 8 * quad
        if not self.by_rows:
            in_slice = TILE * (eighth >> 2) + 8 * (eighth >> 1 & 1) + 2 * quad + (eighth & 1)
        return minor * SLICE_TOKENS + in_slice

    @cute.jit
    def ranges(self, p, smem: Int32, base: Int32, minor: Int32, lane: Int32, limit: Float32):
        """Smallest and largest value of the lane's own line: in 16 bit, which loses nothing. And whether these and
        those of another line are within the limit.
        """
        packed = [Int32(0), Int32(0)]
        if p.bfloat16 == 1:
            packed = self.packed_ranges(base, lane, True)
        else:
            packed = self.packed_ranges(base, lane, False)
        low, low_odd, high, high_odd = floats(p, packed)
        fits = Boolean(True)
        for x in (low, low_odd, high, high_odd):
            fits = fits & (ptx.fabs(x) <= limit)  # NaN is not
        if cutlass.const_expr(self.by_rows):
            low, high = ptx.fmin(low, low_odd), ptx.fmax(high, high_odd)
        else:
            odd = (lane >> 2 & 1) == 1
            low, high = cutlass.select_(odd, low_odd, low), cutlass.select_(odd, high_odd, high)
        if cutlass.const_expr(self.mean is not None):  # subtracting is monotonous
            at = smem + 2 * (minor * SLICE_TOKENS + self.mean_lane(lane))
            mean = ptx.load_shared_half(at, self.image(self.mean))
            low, high = ptx.subtract(low, mean), ptx.subtract(high, mean)
        return low, high, fits

    @cute.jit
    def packed_ranges(self, base: Int32, lane: Int32, bfloat: bool):
        """[minima, maxima], two lines in a register: the register that has the lane's own line."""
        low, high = self.widened(base, None, bfloat)
        for i in cutlass.range(2, self.group // TILE, 2, unroll=1):
            low, high = self.widened(base + i * self.along_bytes, (low, high), bfloat)
        for mask in self.butterfly:
            low = [ptx.min_max(x, ptx.shuffle_xor(x, mask), bfloat, "min") for x in low]
            high = [ptx.min_max(x, ptx.shuffle_xor(x, mask), bfloat, "max") for x in high]
        own = lane & 3 if self.by_rows else lane >> 3
        return [pick(low, own), pick(high, own)]

    def widened(self, base: Int32, so_far, bfloat: bool) -> tuple:
        """Packed minima and maxima by across, and r1 or (rows) r0; of two places along the group, which the assembler
        joins to an instruction of three operands.
        """
        low, high = ([*x] for x in so_far) if so_far else ([None] * 4, [None] * 4)
        for tiles in (self.panel_tiles(base), self.panel_tiles(base + self.along_bytes)):
            for n, x in enumerate(tiles):
                i = n // 4 * 2 + (n & 1 if self.by_rows else n >> 1 & 1)
                low[i] = x if low[i] is None else ptx.min_max(low[i], x, bfloat, "min")
                high[i] = x if high[i] is None else ptx.min_max(high[i], x, bfloat, "max")
        return low, high

    @cute.jit
    def row_ranges(self, p, smem: Int32, base: Int32, group: Int32, lane: Int32):
        """:meth:`ranges` of K per token less its mean, in fp32."""
        low, high = [Float32(FP32_MAX)] * 4, [Float32(-FP32_MAX)] * 4
        for i in cutlass.range(self.group // TILE, unroll=1):
            means = self.channel_means(smem + group * (2 * self.group), lane, i)
            for n, x in enumerate(self.values(p, self.panel_tiles(base + i * self.along_bytes), means * 2)):
                line = self.line(n // 8, n // 2 % 4, n % 2)
                low[line], high[line] = ptx.fmin(low[line], x), ptx.fmax(high[line], x)
        for mask in self.butterfly:
            low = [ptx.fmin(x, ptx.shuffle_xor(x, mask)) for x in low]
            high = [ptx.fmax(x, ptx.shuffle_xor(x, mask)) for x in high]
        return pick(low, lane & 3), pick(high, lane & 3)

    def shrunk(self, low: Float32, high: Float32, factor: Float32) -> tuple:
        """The range times a factor: about its middle, or about 0 if symmetric."""
        if self.symmetric:
            end = ptx.multiply(ptx.fmax(ptx.fabs(low), ptx.fabs(high)), factor)
            return -end, end
        middle = ptx.multiply(ptx.add(low, high), Float32(0.5))
        half = ptx.multiply(ptx.multiply(ptx.subtract(high, low), Float32(0.5)), factor)
        return ptx.subtract(middle, half), ptx.add(middle, half)

    def scale_and_zero(self, low: Float32, high: Float32) -> tuple:
        """Of a line that is to span low .. high; fp16 values."""
        largest = ptx.fmax(ptx.fabs(low), ptx.fabs(high))
        if self.symmetric:
            scale = half_value(ptx.fmax(ptx.divide(largest, Float32(self.levels / 2)), Float32(MIN_SCALE)))
            return scale, Float32(symmetric_zero(self.bits))
        scale = ptx.divide(ptx.subtract(high, low), Float32(self.levels))
        scale = ptx.fmax(scale, ptx.multiply(largest, Float32(ZERO_LIMIT)))
        scale = half_value(ptx.fmax(scale, Float32(MIN_SCALE)))
        return scale, ptx.add(half_value(ptx.divide(low, scale)), Float32(0.0))

    def store_line(self, smem: Int32, element: Int32, scale: Float32, zero: Float32) -> None:
        """The parameters of a line, and what encoding needs (anything, if the line does not exist)."""
        ptx.store_shared(smem + 4 * element, self.plan.inverse_at, [ptx.divide(Float32(1.0), scale)])
        for name, x in (("scale", scale), ("zero", zero)):
            if self.section[name] is not None:
                ptx.store_shared_half(smem + 2 * element, self.image(self.section[name]), ptx.to_half2(x, Float32(0.0)))

    def load_lines(self, smem: Int32, element: Int32, across: int | None = None) -> Lines:
        """The coefficients of the lane's lines, from ``element`` on: all, or with their scales those of one tile."""
        count = self.lines if across is None else self.lines // 2
        first = 0 if across is None else across * count
        at, width = smem + 4 * element, min(count, 4)
        places = [self.plan.inverse_at + 4 * i for i in range(first, first + count, width)]
        inverse = [x for place in places for x in ptx.load_shared_floats(at, place, width)]

        def halves(section) -> list:
            got = ptx.load_shared(smem + 2 * element, self.image(section) + 2 * first, count // 2)
            return [x for register in got for x in ptx.half2_floats(register)]

        zero = [Float32(symmetric_zero(self.bits))] * count if self.symmetric else halves(self.section["zero"])
        return Lines(inverse, zero, [] if across is None else halves(self.section["scale"]))

    def in_units(self, lines: Lines) -> Lines:
        """Lines in units in which 1 is 2^bits, so that saturation is the lower clamp: a code counts 2^-bits."""
        inverse, zero, scale = lines
        return Lines(
            [x * self.unit for x in inverse], [x * self.unit for x in zero], [x * (1 / self.unit) for x in scale]
        )

    # -- the search --------------------------------------------------------------------------------------------

    @cute.jit
    def searched(
        self, p, smem: Int32, base: Int32, minor: Int32, group: Int32, lines_at: Int32, element: Int32, lane: Int32,
        count: Int32, low: Float32, high: Float32,
    ):  # fmt: skip
        """scale and zero of the range factor with the least squared error, of the larger factor on ties."""
        least = Float32(NO_ERROR_YET)
        best_scale, best_zero = Float32(1.0), Float32(0.0)
        for i in cutlass.range(MSE_FACTORS, unroll=1):
            factor = ptx.subtract(Float32(1.0), ptx.multiply(Float32(i), Float32(MSE_STEP)))
            scale, zero = self.scale_and_zero(*self.shrunk(low, high, factor))
            if ptx.any_lane(self.error_of_ends(low, high, scale, zero) < least):
                error = Float32(0.0)
                if cutlass.const_expr(self.is_k):
                    self.store_line(smem, element, scale, zero)
                    cute.arch.sync_warp()
                    error = self.squared_error(p, smem, base, minor, group, lines_at, lane, count)
                    cute.arch.sync_warp()
                else:
                    token = self.first_token(minor, group, lane & 3, lane >> 2)
                    row = smem + token * self.plan.row_bytes + group * (2 * self.group)
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
        beyond = ptx.subtract(high, ptx.multiply(ptx.add(Float32(self.levels), zero), scale))
        before = ptx.subtract(ptx.multiply(zero, scale), low)
        beyond, before = (ptx.fmax(x, Float32(0.0)) for x in (beyond, before))
        return ptx.add(ptx.multiply(beyond, beyond), ptx.multiply(before, before))

    @cute.jit
    def squared_row_error(self, p, row: Int32, scale: Float32, zero: Float32):
        """Of the lane's own token of V, whose channels of the group are at ``row``: a halving sum."""
        lines = self.in_units(Lines([ptx.divide(Float32(1.0), scale)], [zero], [scale]))
        vectors = 2 * self.group // VECTOR
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
        rest = count - group * self.group - (lane >> 2)  # tokens from the lane's first one on that exist
        channel = minor * SLICE_TOKENS if self.per_channel else group * self.group
        errors = []  # of the lane's lines
        for across in range(2):
            at = base + across * (TILE * 2 if self.per_channel else TILE * self.plan.row_bytes)
            tile = Int32(0)
            # [2 r + e]
            sums = self.error_sums(p, smem + 2 * channel, at, tile, lane, rest, self.group // TILE, 1, across,
                                   self.in_units(self.load_lines(smem, lines_at, across)))  # fmt: skip
            # over r1 of rows, r0 of columns
            pairs = [(i, i + 4) for i in (0, 1, 2, 3)] if self.by_rows else [(i, i + 2) for i in (0, 1, 4, 5)]
            errors += [ptx.add(sums[i], sums[j]) for i, j in pairs]
        for mask in self.butterfly:
            errors = [ptx.add(x, ptx.shuffle_xor(x, mask)) for x in errors]
        if self.by_rows:
            errors = [ptx.add(*errors[i : i + 2]) for i in range(0, 8, 2)]
        return pick(errors, lane & 3 if self.by_rows else lane >> 2)

    @cute.jit
    def error_sums(
        self, p, mean_base: Int32, base: Int32, tile: Int32, lane: Int32, rest: Int32, tiles: int, step: int,
        across: int, lines: Lines,
    ):  # fmt: skip
        """Squared errors over every ``step``-th tile along a panel from base on, in the order of a halving sum."""
        sums = [Float32(0.0)] * 8
        if cutlass.const_expr(tiles == 1):
            means = []
            if cutlass.const_expr(self.mean is not None):
                means = self.channel_means(mean_base, lane, Int32(across) if self.per_channel else tile)
            values = self.values(p, self.tile(base, 0, 0), means)
            sums = [self.squared(x, lines, self.line(0, n // 2, n % 2)) for n, x in enumerate(values)]
            if cutlass.const_expr(self.per_channel):
                exists = [TILE * tile + 8 * (r & 1) < rest for r in range(4)]
                sums = [cutlass.select_(exists[n // 2], x, Float32(0.0)) for n, x in enumerate(sums)]
        else:
            for i in cutlass.range(2, unroll=1):
                at = base + i * (step * self.along_bytes)
                part = self.error_sums(
                    p, mean_base, at, tile + i * step, lane, rest, tiles // 2, 2 * step, across, lines
                )
                sums = [ptx.add(x, y) for x, y in zip(sums, part, strict=True)]
        return sums

    def squared(self, x: Float32, lines: Lines, line: int) -> Float32:
        """Squared error of a value; lines: in units."""
        y = ptx.subtract_saturated(ptx.multiply(x, lines.inverse[line]), lines.zero[line])
        y = ptx.add(ptx.fmin(y, Float32(self.levels * self.unit)), Float32(self.magic))
        code = ptx.add(ptx.subtract(y, Float32(self.magic)), lines.zero[line])
        if self.symmetric:  # a code plus a half, times 11 bits: the product is exact
            error = ptx.fused(code, -lines.scale[line], x)
        else:
            error = ptx.subtract(ptx.multiply(code, lines.scale[line]), x)
        return ptx.multiply(error, error)

    # -- codes -------------------------------------------------------------------------------------------------

    @cute.jit
    def store_codes(self, p, smem: Int32, rows: Int32, warp: Int32, lane: Int32, block: Int64, count: Int32):
        """Encode slice ``warp`` and store its code vectors, run by run."""
        section = self.section["codes"]
        base = rows + warp * (SLICE_TOKENS * self.plan.row_bytes)
        group = warp * SLICE_TOKENS // self.group if self.per_channel else Int32(0)
        element = group * self.group_stride if self.per_channel else warp * self.minor_stride
        element += (lane >> 2 if self.by_rows else lane & 3) * self.lane_line
        lane_bytes = 4 * self.vector_words
        target = block + Int64(section.offset + warp * (section.nbytes // NUM_SLICES) + lane * lane_bytes)
        rest = count - warp * SLICE_TOKENS - (lane >> 2 if self.is_k else 2 * (lane & 3))
        for run in cutlass.range(self.run.count, unroll=1):
            at = base + run * (self.run.tiles * TILE * 2)
            if p.bfloat16 == 1:  # around much code, or the assembler would execute both sides
                self.store_run(smem, at, element, lane, run, ptx.bfloat2_floats, target, count, rest)
            else:
                self.store_run(smem, at, element, lane, run, ptx.half2_floats, target, count, rest)
            target += self.run.vectors * LANES * lane_bytes

    @cute.jit
    def store_run(
        self, smem: Int32, base: Int32, element: Int32, lane: Int32, run: Int32, floats_of, target: Int64,
        count: Int32, rest: Int32,
    ):  # fmt: skip
        """Encode and store the lane's vectors of a run; floats_of: a register's values."""
        vectors = self.encoded(smem, base, element, lane, run, floats_of)
        if count < BLOCK_TOKENS:  # tokens that do not exist have code 0
            vectors = [self.existing(*vector, rest) for vector in zip(vectors, self.code_masks(), strict=True)]
        for v in range_constexpr(self.run.vectors):
            ptx.store_global(target, vectors[v], v * LANES * 4 * self.vector_words)

    def encoded(self, smem: Int32, base: Int32, element: Int32, lane: Int32, run: Int32, floats_of) -> list:
        """The lane's vectors of a run; floats_of: a register's values."""
        vectors: list = [[{} for _ in range(self.vector_words)] for _ in range(self.run.vectors)]  # of codes by bit
        known: dict = {}  # Lines that are in registers
        for i in range(0, len(self.run.members), 2):
            pair = self.run.members[i : i + 2]
            registers = [x for t, c in pair for x in self.tile(base, t, c)]
            means = []
            if self.mean is not None:
                means = [x for _, c in pair for x in self.channel_means(smem, lane, run * self.run.tiles + c)]
            values = [x for register in registers for x in floats_of(register)]
            for n, x in enumerate(less(values, means)):
                (t, c), r, e = pair[n // 8], n // 2 % 4, n % 2
                lines = self.code_lines(smem, element, run, c, known)
                line = self.line(c % 2 if self.per_channel else t, r, e)
                place = self.fragments[t, c][r]
                words = vectors[place.vector]
                words[place.word][place.bit + HALF_BITS * e] = self.code(x, lines, line)
                if len(words[place.word]) == WORD_BITS // self.bits:
                    words[place.word] = packed_codes(words[place.word], self.bits)
        return vectors

    def code(self, x: Float32, lines: Lines, line: int) -> Int32:
        """The code of a value before it is limited to what there is."""
        return ptx.to_integer(ptx.subtract(ptx.multiply(x, lines.inverse[line]), lines.zero[line]))

    def code_masks(self) -> list:
        """Of each word of a lane's vectors in a run {token, from the lane's first on: bits of its codes}."""
        masks: list = [[{} for _ in range(self.vector_words)] for _ in range(self.run.vectors)]
        for t, c in self.run.members:
            for r, place in enumerate(self.fragments[t, c]):
                bits = masks[place.vector][place.word]
                for e in range(2):
                    token = TILE * t + (8 * (r & 1) if self.is_k else 8 * (r >> 1) + e)
                    bits[token] = bits.get(token, 0) | (1 << self.bits) - 1 << place.bit + HALF_BITS * e
        return masks

    def existing(self, words: list, masks: list, rest: Int32) -> list:
        """The words of a vector without the codes of tokens that do not exist: masks by token, of which ``rest`` do."""
        kept = [Int32(0)] * len(words)
        for i, by_token in enumerate(masks):
            for token, mask in by_token.items():
                kept[i] = kept[i] | cutlass.select_(token < rest, Int32(signed(mask)), Int32(0))
        return [word & mask for word, mask in zip(words, kept, strict=True)]

    def code_lines(self, smem: Int32, element: Int32, run: Int32, c: int, known: dict) -> Lines:
        """The Lines for channel tile c of a run; element: of the slice's first lines of the lane."""
        if self.per_channel:
            key = c // 2
        else:  # tiles share lines if they are in the same group in every run
            key = tuple((c + i * self.run.tiles) * TILE // self.group for i in range(self.run.count))
        if key not in known:
            at = (c + run * self.run.tiles) * TILE // (SLICE_TOKENS if self.per_channel else self.group)
            at = at * (self.minor_stride if self.per_channel else self.group_stride)
            known[key] = self.load_lines(smem, element + at)
        return known[key]

    # -- parameters on their way out ---------------------------------------------------------------------------

    @cute.jit
    def clear_padding(self, smem: Int32, warp: Int32, lane: Int32):
        """Zero the bytes that pad the block."""
        image = self.plan.image_bytes[self.operand]
        used = sum(s.nbytes for s in (self.section["scale"], self.section["zero"], self.mean) if s is not None)
        at = (warp * LANES + lane) * VECTOR
        if cutlass.const_expr(used < image):
            if at < image - used:
                ptx.store_shared(smem + at, self.plan.image_at + used, [Int32(0)] * 4)

    @cute.jit
    def store_parameters(self, smem: Int32, thread: Int32, block: Int64):
        """Copy the image of the parameters into the block."""
        image = self.plan.image_bytes[self.operand]
        at = thread * VECTOR
        target = block + self.section["scale"].offset
        step = self.plan.threads * VECTOR
        for i in range_constexpr(-(-image // step)):
            if at + i * step < image:
                ptx.store_global(
                    target + Int64(at), ptx.load_shared(smem + at, self.plan.image_at + i * step, 4), i * step
                )


# ---------------------------------------------------------------------------------------------- trace-time helpers


def pick(values: list, index: Int32):
    """values[index], of a power of two of registers."""
    bit = 0
    while len(values) > 1:
        odd = (index >> bit & 1) == 1
        values = [cutlass.select_(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit += 1
    return values[0]


def less(values: list, means: list) -> list:
    """values - means, if there are any."""
    return [ptx.subtract(x, m) for x, m in zip(values, means, strict=True)] if means else values


def halving_sum(values: list) -> Float32:
    """The sum of a power of two of values, by adding the upper half to the lower half until one is left."""
    while len(values) > 1:
        half = len(values) // 2
        values = [ptx.add(*pair) for pair in zip(values[:half], values[half:], strict=True)]
    return values[0]


def find_run(places: dict, vectors: int) -> Run:
    """The Run of ``vectors`` vectors; places: Fragments of the tiles of a slice."""
    count = (max(registers[0].vector for registers in places.values()) + 1) // vectors
    members = [[at for at, registers in places.items() if registers[0].vector // vectors == i] for i in range(count)]
    step = members[1][0][1] - members[0][0][1] if count > 1 else 0
    for i in range(count):
        for t, c in members[0]:
            moved = [place._replace(vector=place.vector + i * vectors) for place in places[t, c]]
            assert places[t, c + i * step] == moved, "runs of code vectors differ"
    return Run(count, vectors, members[0], step)


def half_value(x: Float32) -> Float32:
    """Rounded to fp16."""
    return ptx.half2_floats(ptx.to_half2(x, Float32(0.0)))[0]


def packed_codes(codes: dict, bits: int) -> Int32:
    """The word of these codes, {bit: code}: two by two from its upper end, each two saturated."""
    word = Int32(0)
    for bit in range(WORD_BITS - 2 * bits, -1, -2 * bits):
        word = ptx.pack_integers(codes[bit], codes[bit + bits], word, bits)
    return word


def signed(x: int) -> int:
    """The lowest 32 bits as an Int32 has them."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
