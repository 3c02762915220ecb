"""Parameters of a block made ready for the wgmma path, once per block by a warp of its own.

The consumers turn a code q, read as the fp16 denormal q * 2^-24, into an A register by one HFMA2:

    K:  scale * (q + zero) (+ mean) / (2^9 2^e)    2^e: largest scale of the block, so that nothing overflows and an
                                                   error is below 2^-16 of the block's largest step
    V:  (q + zero) / 2^9                           the scale of its token meets P, in fp32

so K needs scale * 2^(15 - e) and the offset; V the offset and the scale; scores the factor 2^(9 + e). Parameters of
tokens that the block does not hold become 0: what lies there may be NaN. K per token with a symmetric zero and a mean
takes two HFMA2, (q + zero) / 2^9 first, and needs scale / 2^e and the mean.

Where all tokens of a block share K's scales (WidePlan.scales_queries) the codes are A registers as they are, and the
queries are scaled instead: Q' = Q * scale / 2^(e + 1) is the block's B operand, and the zeros add a bias to each
column's scores.
"""

import cutlass
from cutlass import Float32, Int32, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .fragments import half2_constant
from .layouts import BLOCK_TOKENS, LANES, SLICE_TOKENS, TILE, symmetric_zero
from .plan import COLUMNS
from .queries import EXPONENT
from .wide_plan import WidePlan

UNIT = 2.0**-9  # of the codes as A registers: 2^-24 times the largest power of two of fp16
LARGEST_POWER = 2.0**15
SMALLEST_STEP = 2.0**-15  # of a block, for the exponent
CHAINS = 4  # of MMAs that do not wait for each other
MEAN_ROOM = 2.0**-12  # how much larger than the largest scale a mean may be without limiting the exponent


class Fold:
    """Folding in one kernel."""

    def __init__(self, plan: WidePlan):
        self.plan = plan
        self.fmt = plan.fmt
        self.quant = plan.quant
        self.words = plan.head_dim // LANES // 2  # half2 of a lane when a warp holds a value per channel

    def block(self, stage: Int32, folded: Int32, valid: Int32, queries: tuple, factor: Float32, lane: Int32) -> None:
        """Fold the block in ``stage``, whose first ``valid`` tokens count; factor: that of the queries.

        queries: addresses of their operand, and of what is made of it for the block.
        """
        if self.plan.scales_queries:
            self.scale_queries(stage, folded, *queries, factor, lane)
        elif self.quant.k_axis == "channel":
            self.keys_per_channel(stage, folded, valid, factor, lane)
        else:
            self.keys_per_token(stage, folded, valid, factor, lane)
        self.values(stage, folded, valid, lane)
        if self.plan.scales_queries:
            wg.fence_async()

    # -- K -----------------------------------------------------------------------------------------------------------

    def channels(self, stage: Int32, section, row: int, lane: Int32) -> list:
        """A lane's share of a row of fp16 per channel, as floats, in stored order."""
        base = stage + lane * (4 * self.words)
        words = ptx.load_shared(base, section.offset + 2 * section.layout(row, 0), self.words)
        return [x for word in words for x in ptx.half2_floats(word)]

    def store_channels(self, folded: Int32, offset: int, values: list, lane: Int32) -> None:
        packed = [ptx.to_half2(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        ptx.store_shared(folded + lane * (4 * self.words), offset, packed)

    def exponent(self, largest: Float32) -> tuple:
        """(2^e, 2^-e) of the warp's largest value."""
        step = ptx.largest_bits(ptx.fmax(largest, Float32(SMALLEST_STEP))) & EXPONENT
        return ptx.from_bits(step), ptx.from_bits(0x7F000000 - step)

    def store_factor(self, folded: Int32, step: Float32, factor: Float32, lane: Int32) -> None:
        ptx.store_shared(folded, 0, [step * factor * (1.0 / UNIT)])  # the same from all lanes

    @cute.jit
    def keys_per_channel(self, stage: Int32, folded: Int32, valid: Int32, factor: Float32, lane: Int32):
        largest = Float32(0.0)
        mean = [Float32(0.0)] * (2 * self.words)
        if cutlass.const_expr(self.fmt.k_mean is not None):
            mean = self.channels(stage, self.fmt.k_mean, 0, lane)
            for i in range_constexpr(len(mean)):
                largest = ptx.fmax(largest, ptx.fabs(mean[i]) * MEAN_ROOM)
        for row in range_constexpr(self.plan.k_rows):
            scale = self.channels(stage, self.fmt.k_scale, row, lane)
            if row * self.quant.k_group < valid:
                for i in range_constexpr(len(scale)):
                    largest = ptx.fmax(largest, scale[i])
        step, inverse = self.exponent(largest)
        self.store_factor(folded, step, factor, lane)
        for row in range_constexpr(self.plan.k_rows):
            scale = self.channels(stage, self.fmt.k_scale, row, lane)
            zero = [Float32(symmetric_zero(self.quant.k_bits))] * len(scale)
            if cutlass.const_expr(self.fmt.k_zero is not None):
                zero = self.channels(stage, self.fmt.k_zero, row, lane)
            held = row * self.quant.k_group < valid
            multiplier, offset = [], []
            for i in range_constexpr(len(scale)):
                relative = scale[i] * inverse
                whole = (relative * zero[i] + mean[i] * inverse) * UNIT
                multiplier.append(cutlass.select_(held, relative * LARGEST_POWER, Float32(0.0)))
                offset.append(cutlass.select_(held, whole, Float32(0.0)))
            at = self.plan.folded_k_at + row * 4 * self.plan.head_dim
            self.store_channels(folded, at, multiplier, lane)
            self.store_channels(folded, at + 2 * self.plan.head_dim, offset, lane)

    def scale_queries(
        self, stage: Int32, folded: Int32, queries: Int32, scaled: Int32, factor: Float32, lane: Int32
    ) -> None:
        """K per channel, one group of tokens: Q' and what it leaves out, sum Q scale (zero + m) - sum Q' m.

        m is the middle code: so Q' and what it was rounded by meet codes - m only. Two column tiles are the rows of an
        MMA; its even columns have the higher half of scale (zero + m), the odd ones the lower.
        """
        plan, fmt = self.plan, self.fmt
        scale = self.channels(stage, fmt.k_scale, 0, lane)
        zero = self.channels(stage, fmt.k_zero, 0, lane) if fmt.k_zero is not None else None
        largest = Float32(0.0)
        for x in scale:
            largest = ptx.fmax(largest, x)
        step, inverse = self.exponent(largest)
        inverse = inverse * 0.5
        unit_step = step * (2.0 * factor)
        ptx.store_shared(folded, 0, [unit_step])  # the same from all lanes
        middle = -symmetric_zero(self.quant.k_bits)
        odd = (lane & 4) != 0
        quad = (lane & 3) * 16
        halves = folded + quad + cutlass.select_(odd, Int32(2 * plan.head_dim), Int32(0))
        if zero is not None:
            products = [x * inverse * (z + middle) for x, z in zip(scale, zero, strict=True)]
            higher = [ptx.to_half2(*products[i : i + 2]) for i in range(0, len(products), 2)]
            rounded = [x for half2 in higher for x in ptx.half2_floats(half2)]
            self.store_channels(folded, plan.folded_v_scale_at, rounded, lane)
            lower = [x - y for x, y in zip(products, rounded, strict=True)]
            self.store_channels(folded, plan.folded_v_scale_at + 2 * plan.head_dim, lower, lane)
            cute.arch.sync_warp()
        inverse = ptx.to_half2(inverse, inverse)
        minus_middle = [cutlass.select_(odd, Int32(0), half2_constant(-middle))] * 2
        layout = wg.operand_layout(plan.columns, plan.head_dim)  # (column, channel) -> byte
        # the lane's row of a matrix: matrices are (column tile, half of a channel tile)
        place = (lane & 7) * layout(1, 0) + (lane >> 3 & 1) * layout(COLUMNS, 0) + (lane >> 4) * layout(0, COLUMNS)

        def load(pair: int) -> tuple:
            """Of two channel tiles: scales, halves, queries."""
            channels = 4 * TILE * pair  # bytes, in B order
            exact = ptx.load_shared(halves, plan.folded_v_scale_at + channels, 4) if zero is not None else None
            tiles = [ptx.load_matrices(queries + place + layout(0, TILE * (2 * pair + c)), False) for c in range(2)]
            return ptx.load_shared(stage + quad, fmt.k_scale.offset + channels, 4), exact, tiles

        chains = [[Float32(0.0)] * 4 for _ in range(CHAINS)]
        ahead = load(0)
        for pair in range(plan.tiles // 2):
            of_pair, exact, tiles = ahead
            if pair + 1 < plan.tiles // 2:  # before the stores, which loads wait for
                ahead = load(pair + 1)
            of_pair = [ptx.mul_half2(x, inverse) for x in of_pair]
            for c, query in enumerate(tiles):
                operand = [ptx.mul_half2(x, of_pair[2 * c + i // 2]) for i, x in enumerate(query)]
                wg.store_matrices(scaled + place, layout(0, TILE * (2 * pair + c)), operand, transposed=False)
                chains[c] = ptx.mma(chains[c], operand, minus_middle)
                if zero is not None:
                    chains[2 + c] = ptx.mma(chains[2 + c], query, exact[2 * c : 2 * c + 2])
        for i in range(2):  # rows g and g + 8; the same from a column's lanes
            total = Float32(0.0)
            for chain in chains:
                total = total + (chain[2 * i] + chain[2 * i + 1])
            ptx.store_shared(folded + (lane >> 2) * 4, plan.folded_k_at + 4 * COLUMNS * i, [total * unit_step])
        cute.arch.sync_warp()  # V's scales come where the halves were

    @cute.jit
    def keys_per_token(self, stage: Int32, folded: Int32, valid: Int32, factor: Float32, lane: Int32):
        """A lane has the rows g, g + 8, g + 16, g + 24 of a slice, for all channel groups."""
        slice_, g = lane >> 3, lane & 7
        layout = self.fmt.k_scale.layout  # (token, channel group) -> fp16 element
        rows = stage + slice_ * (2 * layout(SLICE_TOKENS, 0)) + g * (2 * layout(1, 0))
        token = slice_ * SLICE_TOKENS + g
        largest = Float32(0.0)
        mean = [Float32(0.0)] * (2 * self.words)
        if cutlass.const_expr(self.fmt.k_mean is not None):
            mean = self.channels(stage, self.fmt.k_mean, 0, lane)
            for i in range_constexpr(len(mean)):
                largest = ptx.fmax(largest, ptx.fabs(mean[i]) * MEAN_ROOM)
        for j in range_constexpr(self.plan.k_groups):
            scale = self.row_params(rows, self.fmt.k_scale, j)
            for i in range_constexpr(4):
                largest = ptx.fmax(largest, cutlass.select_(token + 8 * i < valid, scale[i], Float32(0.0)))
        step, inverse = self.exponent(largest)
        self.store_factor(folded, step, factor, lane)
        for j in range_constexpr(self.plan.k_groups):
            scale = self.row_params(rows, self.fmt.k_scale, j)
            zero = [Float32(symmetric_zero(self.quant.k_bits))] * 4
            if cutlass.const_expr(self.fmt.k_zero is not None):
                zero = self.row_params(rows, self.fmt.k_zero, j)
            for i in range_constexpr(4):
                held = token + 8 * i < valid
                relative = scale[i] * inverse
                params = [relative]
                if cutlass.const_expr(not self.plan.centres_keys):
                    params = [relative * LARGEST_POWER, relative * zero[i] * UNIT]
                params = [cutlass.select_(held, x, Float32(0.0)) for x in params]
                packed = [ptx.to_half2(x, x) for x in params]
                ptx.store_shared(folded + token * 8, self.plan.folded_k_at + (j * BLOCK_TOKENS + 8 * i) * 8, packed)
        if cutlass.const_expr(self.fmt.k_mean is not None):
            self.store_channels(folded, self.plan.folded_mean_at, [x * inverse * UNIT for x in mean], lane)

    def row_params(self, rows: Int32, section, group: int) -> list:
        first, second = ptx.load_shared(rows, section.offset + 2 * section.layout(0, group), 2)
        return [*ptx.half2_floats(first), *ptx.half2_floats(second)]

    # -- V -----------------------------------------------------------------------------------------------------------

    @cute.jit
    def values(self, stage: Int32, folded: Int32, valid: Int32, lane: Int32):
        """A lane has the pairs of tokens 2 lane and 2 lane + 64."""
        layout = self.fmt.v_scale.layout  # (channel group, token) -> fp16 element
        pairs = self.pairs(lane)
        for i in range_constexpr(BLOCK_TOKENS // 2 // LANES):
            token = 2 * (lane + LANES * i)
            for j in range_constexpr(self.plan.v_groups):
                at = 2 * layout(j, 2 * LANES * i)
                scale = self.pair(stage + pairs, self.fmt.v_scale, at)
                held = [cutlass.select_(token + e < valid, scale[e], Float32(0.0)) for e in range(2)]
                ptx.store_shared(
                    folded + lane * 8, self.plan.folded_v_scale_at + (j * BLOCK_TOKENS + 2 * LANES * i) * 4, held
                )
                if cutlass.const_expr(self.fmt.v_zero is not None):
                    zero = self.pair(stage + pairs, self.fmt.v_zero, at)
                    zero = [cutlass.select_(token + e < valid, zero[e] * UNIT, Float32(0.0)) for e in range(2)]
                    target = self.plan.folded_v_offset_at + at
                    ptx.store_shared(folded + pairs, target, [ptx.to_half2(zero[0], zero[1])])

    def pairs(self, lane: Int32) -> Int32:
        """Offset of the tokens 2 lane in V's parameters."""
        return at_runtime(lambda pair: 2 * self.fmt.v_scale.layout(0, 2 * pair), lane, LANES)

    def pair(self, base: Int32, section, at: int) -> tuple:
        """Two parameters that lie together, as fp32."""
        return ptx.half2_floats(ptx.load_shared(base, section.offset + at, 1)[0])


class TileFold(Fold):
    """The same for kernels with dequantised tiles, where V is written as K is: scale * (q + zero) / (2^9 2^e), with 2^e
    the largest scale of V in the block; e goes to the softmax (tile_attention.py).
    """

    @cute.jit
    def values(self, stage: Int32, folded: Int32, valid: Int32, lane: Int32):
        layout = self.fmt.v_scale.layout
        pairs = self.pairs(lane)
        largest = Float32(0.0)
        for i in range_constexpr(BLOCK_TOKENS // 2 // LANES):
            for j in range_constexpr(self.plan.v_groups):
                scale = self.pair(stage + pairs, self.fmt.v_scale, 2 * layout(j, 2 * LANES * i))
                for e in range_constexpr(2):
                    held = 2 * (lane + LANES * i) + e < valid
                    largest = ptx.fmax(largest, cutlass.select_(held, scale[e], Float32(0.0)))
        step, inverse = self.exponent(largest)
        ptx.store_shared(folded, 4, [ptx.floating((ptx.bits(step) >> 23) - 127)])  # e
        for i in range_constexpr(BLOCK_TOKENS // 2 // LANES):
            for j in range_constexpr(self.plan.v_groups):
                at = 2 * layout(j, 2 * LANES * i)
                scale = self.pair(stage + pairs, self.fmt.v_scale, at)
                zero = [Float32(symmetric_zero(self.quant.v_bits))] * 2
                if cutlass.const_expr(self.fmt.v_zero is not None):
                    zero = self.pair(stage + pairs, self.fmt.v_zero, at)
                multiplier, offset = [], []
                for e in range_constexpr(2):
                    held = 2 * (lane + LANES * i) + e < valid
                    relative = scale[e] * inverse
                    multiplier.append(cutlass.select_(held, relative * LARGEST_POWER, Float32(0.0)))
                    offset.append(cutlass.select_(held, relative * zero[e] * UNIT, Float32(0.0)))
                ptx.store_shared(folded + pairs, self.plan.folded_v_multiplier_at + at, [ptx.to_half2(*multiplier)])
                ptx.store_shared(folded + pairs, self.plan.folded_v_offset_at + at, [ptx.to_half2(*offset)])


def unit(bit: int) -> Int32:
    """The half2 that makes codes read from a bit of a byte multiples of UNIT."""
    return half2_constant(UNIT * 2.0 ** (24 - bit % 8))


def zero_units(bits: int) -> Int32:
    """The half2 of the symmetric zero of codes, in UNIT."""
    return half2_constant(symmetric_zero(bits) * UNIT)


def centred(codes: Int32, bit: int, bits: int) -> Int32:
    """(code + symmetric zero) * UNIT, exactly, of codes read from a bit of a byte."""
    return wg.fma_half2(codes, unit(bit), zero_units(bits))


def at_runtime(place, index: Int32, count: int) -> Int32:
    """``place(index)`` for a layout's function that is linear in the bits of an index below ``count``."""
    bits = (count - 1).bit_length()
    if all(place(1 << b) == place(1) << b for b in range(bits)):
        return index * place(1)
    total = Int32(0)
    for b in range(bits):
        total += (index >> b & 1) * place(1 << b)
    return total
