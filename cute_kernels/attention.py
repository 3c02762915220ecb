"""The arithmetic of one warp: queries as B operand, scores, softmax and values of its part of a block.

Lists at trace time stand for registers: n is a column tile (8 columns of the MMA), c a channel tile, t a token tile.
A lane is g = lane / 4, q = lane % 4; an accumulator's four values are rows g (0, 1) and g + 8 (2, 3), columns
2q and 2q + 1. A kernel of at most 4 query columns has each of them twice, so that a lane works on one of them; j counts
the different ones. The *second* column of such a pair has other factors than the first where that saves MMAs: what the
first was rounded by, or P for its sum. Shared-memory offsets all come from the block's layouts.
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Uint32, cute, range_constexpr

from . import ptx
from .fragments import extract, fragments, half2_constant, matrix_row, power
from .layouts import NUM_SLICES, SLICE_TOKENS, TILE, Section, b_order, symmetric_zero
from .plan import Plan
from .queries import read_factors, read_highs, read_tiles
from .values import FIRST_MAX, HALF2_ONES, halves, soft_capped
from .work import Params, Piece, tokens_of

RESCALE_ABOVE = 1.0  # log2: room that a raised maximum leaves below the limit of P
TILES_AT_ONCE = 8  # of 16-bit tokens that are in registers


class Query(NamedTuple):
    """A query tile, for all of a piece."""

    tiles: list  # [n][c][2] half2: Q over a power of two, as B operand
    sums: list  # [n][channel group][j]: sums of ``tiles`` over the groups of K per token
    slot: Int32  # which has what is read when it is needed, and so takes no registers in between


class State(NamedTuple):
    """A warp's running result of a piece."""

    top: list  # [n][j] what is subtracted from the scores, log2: their maximum but for a constant
    total: list  # [n][j] sum of P
    out: list  # [n][c][4] O^T, in units of the codes' powers of two until ``finished``


class Addresses(NamedTuple):
    """A lane's bases within a stage; the layouts give the offsets that follow."""

    k_lane: Int32  # code vectors of K
    v_lane: Int32
    k_quad: Int32  # parameters in B order (K: channels, of the first token group; V: tokens)
    v_quad: Int32
    mean: Int32  # of the block's keys, in B order too
    rows: Int32  # parameters in row order


class Attention:
    """The warp arithmetic of one kernel."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.fmt = plan.fmt
        self.tiles = plan.tiles
        self.columns = plan.column_tiles
        self.lane_columns = plan.lane_columns
        self.k_bits, self.v_bits = plan.quant.k_bits, plan.quant.v_bits
        self.k_group, self.v_group = plan.quant.k_group, plan.quant.v_group
        self.k_per_channel = plan.quant.k_axis == "channel"
        self.k_fragments = fragments(self.fmt.k_codes, "k", plan.head_dim, self.fmt.k_vector_words)
        self.v_fragments = fragments(self.fmt.v_codes, "v", plan.head_dim, self.fmt.v_vector_words)

    # -- queries -----------------------------------------------------------------------------------------------

    def read_queries(self, slot: Int32, lane: Int32) -> Query:
        """The Query that a merge warp prepared in ``slot`` (queries.py)."""
        tiles = read_tiles(self.plan, slot, lane)
        sums = [[] if self.k_per_channel else self.group_sums(t) for t in tiles]
        return Query(tiles, sums, slot)

    def group_sums(self, tiles: list) -> list:
        per_group = self.k_group // TILE
        return [self.sums(tiles[j * per_group : (j + 1) * per_group]) for j in range(self.plan.k_groups)]

    def sums(self, operand: list) -> list:
        """[j] sums of B operands over their k tiles, exactly as the MMAs see them."""
        total = [Float32(0.0)] * 4
        for tile in operand:
            total = ptx.mma(total, [Int32(HALF2_ONES)] * 4, tile)
        return total[: self.lane_columns]

    def first_state(self) -> State:
        columns = range(self.columns)
        return State(
            [[Float32(FIRST_MAX)] * self.lane_columns for _ in columns],
            [[Float32(0.0)] * self.lane_columns for _ in columns],
            [[[Float32(0.0)] * 4 for _ in range(self.tiles)] for _ in columns],
        )

    # -- a block -----------------------------------------------------------------------------------------------

    def addresses(self, stage: Int32, member: Int32, lane: Int32) -> Addresses:
        """For warp ``member`` of those that share the block in ``stage``."""
        k_codes, v_codes = self.fmt.k_codes.layout, self.fmt.v_codes.layout  # (token, channel) -> bit
        k_scale, v_scale = self.fmt.k_scale.layout, self.fmt.v_scale.layout  # -> fp16 element, as are the zeros
        first = member * self.plan.slices
        group, quad = lane >> 2, lane & 3
        # a lane holds two adjacent columns of A, or rows of B, so index 2 is the next lane's
        k_lane = stage + first * (k_codes(SLICE_TOKENS, 0) // 8) + lane * (k_codes(0, 2) // 8)
        v_lane = stage + first * (v_codes(SLICE_TOKENS, 0) // 8) + lane * (v_codes(2, 0) // 8)
        v_quad = stage + quad * (2 * v_scale(0, 2)) + first * (2 * v_scale(0, SLICE_TOKENS))
        mean = stage + quad * (2 * b_order(self.plan.head_dim)(2))
        k_quad, rows = stage, stage  # one of them is used
        if self.k_per_channel:
            token_group = first * SLICE_TOKENS // self.k_group
            k_quad = stage + quad * (2 * k_scale(0, 2)) + token_group * (2 * k_scale[0].stride)
        else:
            rows = stage + group * (2 * k_scale(1, 0)) + first * (2 * k_scale(SLICE_TOKENS, 0))
        return Addresses(k_lane, v_lane, k_quad, v_quad, mean, rows)

    @cute.jit
    def attend_block(
        self,
        p: Params,
        at: Addresses,
        position: Int32,
        lane: Int32,
        query: Query,
        state: State,
        end: Int32 | None = None,
    ):
        """Attend to the warp's slices; ``position`` of their first token.

        end: of the packed tokens, given where tokens may be invisible to a query or beyond it, or where there is a soft
        cap; apart from the common case, which so has no branch between the scores and their maximum.
        """
        second = (lane & 4) != 0  # of B operands the lane holds column lane / 4
        mean = self.mean_scores(at.mean, query)
        scaled, bias = [], []
        scores = [[] for _ in range(self.columns)]
        for i in range_constexpr(self.plan.slices):
            if cutlass.const_expr(self.k_per_channel and i * SLICE_TOKENS % self.k_group == 0):
                scaled, bias = self.scaled_queries(at.k_quad, i * SLICE_TOKENS // self.k_group, second, query)
            vectors = self.code_vectors(at.k_lane, self.fmt.k_codes, i, self.fmt.k_vector_words)
            if cutlass.const_expr(self.k_per_channel):
                tiles = self.channel_scores(vectors, scaled, bias, mean, lane, query)
            else:
                tiles = self.token_scores(vectors, at.rows, i, mean, lane, query)
            for n in range_constexpr(self.columns):
                scores[n] += tiles[n]
        if cutlass.const_expr(end is not None):
            if p.softcap > 0.0:
                scores = soft_capped(scores, p.softcap)
            scores = self.visible(p, scores, position, end, lane, query)
        probabilities, state = self.softmax(scores, state)
        return self.accumulate(at, probabilities, state, second, position + (lane & 3) * 2, end)

    def code_vectors(self, lane_base: Int32, section: Section, slice_: int, vector_words: int) -> list:
        """All code vectors of a slice; lane_base = stage + the lane's place in a vector."""
        slice_bytes = section.nbytes // NUM_SLICES
        step = cute.arch.WARP_SIZE * vector_words * 4
        first = section.offset + slice_ * slice_bytes
        return [ptx.load_shared(lane_base, first + v * step, vector_words) for v in range(slice_bytes // step)]

    def b_params(self, quad_base: Int32, section: Section, row: int, tile_pair: int) -> list:
        """Parameters in B order, [tile][2] half2 of two tiles; quad_base = stage + 16 q."""
        got = ptx.load_shared(quad_base, section.offset + 2 * section.layout(row, 2 * TILE * tile_pair), 4)
        return [got[:2], got[2:]]

    def row_params(self, row_base: Int32, section: Section, slice_: int, group: int) -> list:
        """Four parameters, of rows g, g+8, g+16, g+24, as fp32; row_base = stage + the place of g."""
        first, second = ptx.load_shared(row_base, section.offset + 2 * section.layout(slice_ * SLICE_TOKENS, group), 2)
        return [*ptx.half2_floats(first), *ptx.half2_floats(second)]

    def scaled_queries(self, quad_base: Int32, row: int, second: Boolean, query: Query) -> tuple:
        """K per channel: Q' = Q * scale, [n][c][2] half2, and the bias sum_c Q * scale * zero, [n][j].

        What Q' was rounded by is not lost. A second column has it instead of Q', and adds it to all products. Where
        there is none it counts in the bias, since zeros may be large, as if all codes were the middle one.
        """
        scaled = [[] for _ in query.tiles]
        bias = [[Float32(0.0)] * 4 for _ in query.tiles]
        zero = [[half2_constant(symmetric_zero(self.k_bits))] * 2] * 2
        middle = half2_constant(-symmetric_zero(self.k_bits))
        for pair in range(self.tiles // 2):
            scale = self.b_params(quad_base, self.fmt.k_scale, row, pair)
            if self.fmt.k_zero is not None:
                zero = self.b_params(quad_base, self.fmt.k_zero, row, pair)
            for n, tiles in enumerate(query.tiles):
                for i in range(2):
                    factors = [(tiles[2 * pair + i][r], scale[i][r]) for r in range(2)]
                    operand = [ptx.mul_half2(*x) for x in factors]
                    if self.plan.copies == 2:
                        of_first = [cutlass.select_(second, x, Int32(0)) for x in operand]
                        operand = [ptx.product_error_half2(*x, of_first[r]) for r, x in enumerate(factors)]
                        bias[n] = ptx.mma(bias[n], rows_of(zero[i]), operand)
                    else:
                        bias[n] = ptx.mma(bias[n], rows_of(zero[i], Int32(0)), operand)
                        lost = [ptx.product_error_half2(*x, operand[r]) for r, x in enumerate(factors)]
                        bias[n] = ptx.mma(bias[n], rows_of(zero[i], middle), lost)
                    scaled[n].append(operand)
        if self.plan.copies == 2:
            return scaled, [self.both_columns(x)[0] for x in bias]
        return scaled, [[x + y for x, y in zip(of_tile[:2], of_tile[2:], strict=True)] for of_tile in bias]

    def mean_scores(self, quad_base: Int32, query: Query) -> list:
        """[n][j]: Q times the block's channel mean, 0 without one."""
        if self.fmt.k_mean is None:
            return [[Float32(0.0)] * self.lane_columns for _ in query.tiles]
        total = [[Float32(0.0)] * 4 for _ in query.tiles]
        for pair in range(self.tiles // 2):
            mean = self.b_params(quad_base, self.fmt.k_mean, 0, pair)
            for n, tiles in enumerate(query.tiles):
                for i in range(2):
                    total[n] = ptx.mma(total[n], rows_of(mean[i]), tiles[2 * pair + i])
        return [t[: self.lane_columns] for t in total]

    def code_products(self, vectors: list, operand: list, channel_tiles: range) -> list:
        """codes_k Q over some channel tiles, [n][t] accumulators; rows are still scaled by the codes' powers of two."""
        acc = [[[Float32(0.0)] * 4 for _ in range(2)] for _ in operand]
        for c in channel_tiles:
            for t in range(2):
                a = [extract(vectors, f, self.k_bits) for f in self.k_fragments[t, c]]
                for n, tiles in enumerate(operand):
                    acc[n][t] = ptx.mma(acc[n][t], a, tiles[c])
        return acc

    def rows(self, accumulator: list) -> list:
        """[r][j] of rows g + 8 r, without the columns that are there twice."""
        return [accumulator[2 * r : 2 * r + self.lane_columns] for r in range(2)]

    def both_columns(self, accumulator: list) -> list:
        """As ``rows``, of products whose second columns have what the first were rounded by."""
        if self.plan.copies == 1:
            return self.rows(accumulator)
        return [[accumulator[2 * r] + accumulator[2 * r + 1]] for r in range(2)]

    def row_factor(self, t: int, r: int) -> float:
        """Takes row g + 8 r of token tile t back from the codes' power of two."""
        return 1.0 / power(self.k_fragments[t, 0][r])

    def channel_scores(self, vectors: list, scaled: list, bias: list, mean: list, lane: Int32, query: Query) -> list:
        """log2 scores of a slice, [n][t][r][j], K per channel."""
        products = self.code_products(vectors, scaled, range(self.tiles))
        acc = [[self.both_columns(tile) for tile in tiles] for tiles in products]
        for n, factors in enumerate(read_factors(self.plan, query.slot, lane)):
            offset = [(b + m) * f for b, m, f in zip(bias[n], mean[n], factors, strict=True)]
            for t in range(2):
                for r in range(2):
                    factor = [f * self.row_factor(t, r) for f in factors]
                    acc[n][t][r] = [x * f + o for x, f, o in zip(acc[n][t][r], factor, offset, strict=True)]
        return acc

    def token_scores(self, vectors: list, row_base: Int32, slice_: int, mean: list, lane: Int32, query: Query) -> list:
        """As channel_scores, K per token: sum over channel groups of scale (codes Q + zero sum Q)."""
        total = [[[mean[n]] * 2 for _ in range(2)] for n in range(self.columns)]
        per_group = self.k_group // TILE
        zero = [Float32(symmetric_zero(self.k_bits))] * 4
        for j in range(self.plan.k_groups):
            products = self.code_products(vectors, query.tiles, range(j * per_group, (j + 1) * per_group))
            acc = [[self.rows(tile) for tile in tiles] for tiles in products]
            scale = self.row_params(row_base, self.fmt.k_scale, slice_, j)
            if self.fmt.k_zero is not None:
                zero = self.row_params(row_base, self.fmt.k_zero, slice_, j)
            for n in range(self.columns):
                for t in range(2):
                    for r in range(2):
                        row = 2 * t + r
                        values = [
                            x * self.row_factor(t, r) + zero[row] * of_group
                            for x, of_group in zip(acc[n][t][r], query.sums[n][j], strict=True)
                        ]
                        total[n][t][r] = [x * scale[row] + y for x, y in zip(values, total[n][t][r], strict=True)]
        return self.log2_scores(total, lane, query)

    def log2_scores(self, products: list, lane: Int32, query: Query) -> list:
        """[n][t][r][j] times the columns' factors."""
        factors = read_factors(self.plan, query.slot, lane)
        return [
            [[[x * f for x, f in zip(row, of_tile, strict=True)] for row in tile] for tile in tiles]
            for tiles, of_tile in zip(products, factors, strict=True)
        ]

    @cute.jit
    def visible(self, p: Params, scores: list, position: Int32, end: Int32, lane: Int32, query: Query):
        """Scores of keys from ``position`` on, with -inf where a column does not see one, or it is beyond ``end``."""
        highs = read_highs(self.plan, query.slot, lane)
        lows = [[high - p.window for high in column] for column in highs]
        # how many a column sees from there on: with one unsigned comparison, as predicates are few
        seen = [[Uint32(cutlass.max(cutlass.min(x, end) - x + p.window, 0)) for x in column] for column in highs]
        position += lane >> 2  # of the lane's first row
        for n in range_constexpr(self.columns):
            for t in range_constexpr(len(scores[n])):
                for r in range_constexpr(2):
                    at = position + TILE * t + 8 * r
                    for j in range_constexpr(self.lane_columns):
                        if Uint32(at - lows[n][j]) >= seen[n][j]:
                            scores[n][t][r][j] = Float32(-float("inf"))
        return scores

    @cute.jit
    def softmax(self, scores: list, state: State):
        """P = exp2(S - top), [n][t][r][j], and the State, rescaled if ``top`` must grow."""
        top, total, out = state
        highest = []
        grown = Boolean(False)
        for n in range_constexpr(self.columns):
            peaks = []
            for j in range_constexpr(self.lane_columns):
                peak = ptx.fmax(scores[n][0][0][j], scores[n][0][1][j])
                for t in range_constexpr(1, len(scores[n])):
                    peak = ptx.fmax(peak, ptx.fmax(scores[n][t][0][j], scores[n][t][1][j]))
                grown = grown | (peak > top[n][j] + self.plan.p_limit)
                peaks.append(peak)
            highest.append(peaks)
        if ptx.any_lane(grown):
            for n in range_constexpr(self.columns):
                for j in range_constexpr(self.lane_columns):
                    peak = ptx.over_lanes(ptx.fmax, highest[n][j], ptx.LANE_BITS[2:])
                    peak = ptx.fmax(peak - (self.plan.p_limit - RESCALE_ABOVE), top[n][j])
                    factor = ptx.exp2(top[n][j] - peak)
                    top[n][j] = peak
                    total[n][j] = total[n][j] * factor
                    for i in range_constexpr(j, 4, 2):
                        for c in range_constexpr(self.tiles):
                            out[n][c][i] = out[n][c][i] * factor
        for n in range_constexpr(self.columns):
            for t in range_constexpr(len(scores[n])):
                for r in range_constexpr(2):
                    for j in range_constexpr(self.lane_columns):
                        scores[n][t][r][j] = ptx.exp2(scores[n][t][r][j] - top[n][j])
        return scores, State(top, total, out)

    def transposed(self, tile: list) -> list:
        """P of a token tile, [r][j], from accumulator order to B operand: 2 half2."""
        return [ptx.transpose8x8(ptx.to_half2(row[0], row[-1])) for row in tile]

    def accumulate(
        self, at: Addresses, p: list, state: State, second: Boolean, token: Int32, end: Int32 | None
    ) -> State:
        """O^T += V^T P^T of the warp's slices; ``token``: position of the lane's first token in B order.

        The zeros' sums are added to the codes' sums here, block by block, since they cancel for the most part and
        the MMA truncates sums that grow far. Second columns have P itself instead of P * scale of the first V group;
        with ones in the other rows of the zeros' MMA, they give the sum of P.
        """
        top, total, out = state
        operand = [[self.transposed(tile) for tile in tiles] for tiles in p]
        if self.plan.copies == 1:
            for n in range(self.columns):
                total[n] = [x + y for x, y in zip(total[n], self.sums(operand[n]), strict=True)]
        zeros = [[[Float32(0.0)] * 4 for _ in range(self.plan.v_groups)] for _ in range(self.columns)]
        zero = [[half2_constant(symmetric_zero(self.v_bits))] * 2] * 2
        per_group = self.v_group // TILE
        for i in range(self.plan.slices):
            vectors = self.code_vectors(at.v_lane, self.fmt.v_codes, i, self.fmt.v_vector_words)
            for g in range(self.plan.v_groups):
                scale = self.value_params(at, self.fmt.v_scale, g, i, token, end)
                if self.fmt.v_zero is not None:
                    zero = self.value_params(at, self.fmt.v_zero, g, i, token, end)
                rows_8 = None
                if self.plan.copies == 2 and g == 0:
                    scale = [[cutlass.select_(second, Int32(HALF2_ONES), x) for x in of_tile] for of_tile in scale]
                    rows_8 = Int32(HALF2_ONES)
                for n in range(self.columns):
                    for t in range(2):
                        scaled = [ptx.mul_half2(operand[n][2 * i + t][r], scale[t][r]) for r in range(2)]
                        zeros[n][g] = ptx.mma(zeros[n][g], rows_of(zero[t], rows_8), scaled)
                        for c in range(g * per_group, (g + 1) * per_group):
                            a = [extract(vectors, f, self.v_bits) for f in self.v_fragments[t, c]]
                            out[n][c] = ptx.mma(out[n][c], a, scaled)
        for n in range(self.columns):
            if self.plan.copies == 2:
                total[n][0] = total[n][0] + zeros[n][0][3]
            for c in range(self.tiles):
                offset = zeros[n][c // per_group]
                for r in range(2):
                    for j in range(self.lane_columns):
                        out[n][c][2 * r + j] = out[n][c][2 * r + j] + offset[j] * self.v_power(c, r)
        return State(top, total, out)

    def value_params(
        self, at: Addresses, section: Section, group: int, slice_: int, token: Int32, end: Int32 | None
    ) -> list:
        """V parameters of a slice, [t][2] half2; those from token ``end`` on, if it is given, are 0, never NaN."""
        params = self.b_params(at.v_quad, section, group, slice_)
        if end is not None:
            token = token + slice_ * SLICE_TOKENS
            params = [[self.before(params[t][r], token + TILE * t + 8 * r, end) for r in range(2)] for t in range(2)]
        return params

    def before(self, register: Int32, token: Int32, end: Int32) -> Int32:
        """A half2 of parameters of tokens (token, token + 1), zero from ``end`` on."""
        kept = cutlass.select_(token + 1 < end, register, register & 0xFFFF)
        return cutlass.select_(token < end, kept, Int32(0))

    def v_power(self, c: int, r: int) -> float:
        """The codes' power of two in row g + 8 r of channel tile c."""
        return power(self.v_fragments[0, c][r])

    def finished(self, state: State) -> State:
        """``out`` as O^T itself, after the last block."""
        out = [
            [[x * (1.0 / self.v_power(c, i // 2)) for i, x in enumerate(tile)] for c, tile in enumerate(o)]
            for o in state.out
        ]
        return state._replace(out=out)

    # -- 16-bit tokens -----------------------------------------------------------------------------------------

    @cute.jit
    def attend_chunk(
        self,
        p: Params,
        piece: Piece,
        chunk: Int32,
        stage: Int32,
        member: Int32,
        lane: Int32,
        query: Query,
        state: State,
    ):
        """A warp's 16 tokens of a 16-bit unit, which is in ``stage``."""
        _, _, _, token, held, position = tokens_of(p, piece, chunk, self.plan.chunk)
        token += member * TILE
        has_work = token < held
        if cutlass.const_expr(self.plan.chunk_tiles < self.plan.warps_per_block):
            has_work = has_work & (member < self.plan.chunk_tiles)
        if has_work:
            scores = [[[Float32(0.0)] * 4] for _ in range(self.columns)]
            for first in range_constexpr(0, self.tiles, TILES_AT_ONCE):
                keys = self.chunk_tiles(p, stage, member, lane, 0, first)
                for c in range_constexpr(len(keys)):
                    for n in range_constexpr(self.columns):
                        scores[n][0] = ptx.mma(scores[n][0], keys[c], query.tiles[n][first + c])
            products = [[self.rows(tile) for tile in tiles] for tiles in scores]
            scores = self.log2_scores(products, lane, query)
            if p.softcap > 0.0:
                scores = soft_capped(scores, p.softcap)
            scores = self.visible(p, scores, position + token, position + held, lane, query)
            probabilities, state = self.softmax(scores, state)
            top, total, out = state
            operand = [self.transposed(tiles[0]) for tiles in probabilities]
            for n in range_constexpr(self.columns):
                total[n] = [x + y for x, y in zip(total[n], self.sums([operand[n]]), strict=True)]
            for first in range_constexpr(0, self.tiles, TILES_AT_ONCE):
                values = self.chunk_tiles(p, stage, member, lane, 1, first)
                for c in range_constexpr(len(values)):
                    for n in range_constexpr(self.columns):
                        out[n][first + c] = ptx.mma(out[n][first + c], values[c], operand[n])
            state = State(top, total, out)
        return state

    def chunk_tiles(self, p: Params, stage: Int32, member: Int32, lane: Int32, operand: int, first: int) -> list:
        """A tiles of a warp's 16 keys or values (operand 0, 1) of a chunk, some channel tiles from ``first`` on."""
        rows = self.plan.chunk_rows
        token, channel = matrix_row(lane, operand == 0)
        base = stage + member * (2 * rows(TILE, 0, 0)) + token * (2 * rows(1, 0, 0)) + channel * 2
        registers = []
        for c in range(first, min(first + TILES_AT_ONCE, self.tiles)):
            registers += ptx.load_matrices(base + 2 * rows(0, operand, TILE * c), operand == 1)
        registers = halves(p, registers)
        return [registers[i : i + 4] for i in range(0, len(registers), 4)]


def rows_of(pair: list, rows_8: Int32 | None = None) -> list:
    """The A tile whose 16 rows are all the same 16 values, given as B-order half2 (columns 2q.., 2q + 8..).

    rows_8: the half2 in all columns of the rows g + 8 instead.
    """
    if rows_8 is None:
        return [pair[0], pair[0], pair[1], pair[1]]
    return [pair[0], rows_8, pair[1], rows_8]
