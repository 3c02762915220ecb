"""The arithmetic of a consumer warpgroup over dequantised tiles: scores, softmax and values, by wgmma.

Rows are query columns: a warp has 16 of its warpgroup's 64, a lane the rows g and g + 8 of these (g = lane / 4,
q = lane % 4). Of an accumulator [64 rows, n] it has, per 8 columns, the values 0, 1 of row g and 2, 3 of row g + 8,
columns 8n + 2q and the next. Four such pairs are the A registers of the next product: P never leaves the registers.

V's tile is in units of 2^e, which differ from block to block (fold.py). P takes the factor: with t the running maximum
of score + e, P = exp2(score + e - t), and the sum of P is divided by 2^e: O needs no rescaling when e changes.
"""

import operator
from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .fold import UNIT
from .layouts import BLOCK_TOKENS, LANES, TILE
from .merge import masked
from .plan import QUAD
from .tile_plan import M_TILE, STATE_BYTES, TilePlan
from .values import FIRST_MAX, soft_capped
from .work import Params

RAISE = 8.0  # log2 by which a score may exceed the running maximum before O is rescaled: P fits fp16 all the same
CORE = 8  # columns of an accumulator that lie together
EXPONENT_16_BIT = -9.0  # of V's unit for 16-bit tokens, whose tile has the values themselves: that of UNIT


class State(NamedTuple):
    """A lane's running result of a piece."""

    top: list  # [2] of rows g, g + 8: what is subtracted from score + e
    total: list  # [2] the lane's sums of exp2(score - top)
    out: list  # accumulator of O * UNIT


class TileAttention:
    """The arithmetic of one kernel."""

    def __init__(self, plan: TilePlan):
        self.plan = plan

    def first_state(self) -> State:
        count = self.plan.head_dim // 2
        return State([Float32(FIRST_MAX)] * 2, [Float32(0.0)] * 2, [Float32(0.0)] * count)

    def scores(self, query: Int32, tile: Int32) -> list:
        """Accumulator of Q K^T [64, 128 tokens], issued; query: descriptor of Q, tile: address of K."""
        query, operand = wg.uniform(query), wg.uniform(wg.descriptor(tile, self.plan.key_columns))
        query_step = self.step(self.plan.column_tiles)
        step = self.step(self.plan.key_columns)
        wg.fence()
        acc = None
        for c in range(self.plan.tiles):
            acc = wg.mma(acc, query + c * query_step, operand + c * step, BLOCK_TOKENS)
        wg.commit()
        return acc

    def step(self, columns: int) -> int:
        """Of a descriptor, from a k step of 16 to the next."""
        return wg.operand_layout(CORE * columns, BLOCK_TOKENS)(0, TILE) // wg.DESCRIPTOR_UNIT

    def values(self, weights: list, tile: Int32, out: list) -> list:
        """O += P V, issued; weights: half2 of P in accumulator order, tile: address of V^T."""
        operand = wg.uniform(wg.descriptor(tile, self.plan.value_columns))
        step = self.step(self.plan.value_columns)
        pinned = wg.pin([*weights, *out])
        weights, out = pinned[: len(weights)], pinned[len(weights) :]
        wg.fence()
        for t in range(BLOCK_TOKENS // TILE):
            out = wg.mma(out, weights[4 * t : 4 * t + 4], operand + t * step, self.plan.head_dim)
        wg.commit()
        return out

    @cute.jit
    def softmax(self, scores: list, params: tuple, state: State):
        """(P as half2 in accumulator order, State with new sums and perhaps new maxima).

        params: the tile's factor, with which scores become log2 scores, and e. No product is under way.
        """
        factor, exponent = params
        top, total, out = list(state.top), list(state.total), list(state.out)
        high = [folded(ptx.fmax, scores[2 * r :: 4] + scores[2 * r + 1 :: 4]) * factor + exponent for r in range(2)]
        if ptx.any_lane((high[0] > top[0] + RAISE) | (high[1] > top[1] + RAISE)):
            shrink = []
            for r in range_constexpr(2):
                peak = ptx.over_lanes(ptx.fmax, high[r], ptx.LANE_BITS[:2])  # four lanes have a row
                raised = ptx.fmax(top[r], peak)
                shrink.append(ptx.exp2(top[r] - raised))
                top[r] = raised
                total[r] = total[r] * shrink[r]
            for i in range_constexpr(len(out)):
                out[i] = out[i] * shrink[i // 2 % 2]
        inverse = ptx.exp2(-exponent)
        weights = []
        sums = [[], []]
        for i in range_constexpr(0, len(scores), 2):
            r = i // 2 % 2
            base = exponent - top[r]
            pair = [ptx.exp2(ptx.fused(scores[i + j], factor, base)) for j in range(2)]
            sums[r].append(pair[0] + pair[1])
            weights.append(ptx.to_half2(*pair))
        for r in range_constexpr(2):
            total[r] = total[r] + folded(ptx.add, sums[r]) * inverse
        return weights, State(top, total, out)

    @cute.jit
    def restricted(self, p: Params, scores: list, factor: Float32, position: Int32, end: Int32, highs: list):
        """Scores after the soft cap, and -inf where a key is invisible.

        factor: as in :meth:`softmax`; position: of the tile's first token; end: behind its last one; highs: of rows
        g and g + 8 the position behind the last key that the query sees.
        """
        if p.softcap > 0.0:
            scores = soft_capped(scores, p.softcap, factor)
        first_column = (wg.thread_again() & 3) * 2
        for r in range_constexpr(2):
            last = cutlass.min(highs[r], end) - 1 - position - first_column
            first = highs[r] - p.window - position - first_column
            for n in range_constexpr(BLOCK_TOKENS // CORE):
                for j in range_constexpr(2):
                    at = CORE * n + j
                    hidden = ptx.sign_mask((at - first) | (last - at))
                    i = 4 * n + 2 * r + j
                    scores[i] = masked(ptx.bits(scores[i]), hidden)
        return scores

    @cute.jit
    def store_sums(self, sums: Int32, state: State):
        """The warp's maxima and sums to shared memory; ``sums``: address of the warpgroup's first row."""
        row, quad = self.place()
        for r in range_constexpr(2):
            total = ptx.over_lanes(operator.add, state.total[r], ptx.LANE_BITS[:2])
            if quad == 0:
                ptx.store_shared(sums + row * STATE_BYTES, r * CORE * STATE_BYTES, [state.top[r], total])

    def store_out(self, results: Int32, state: State) -> None:
        """O to shared memory, to rows as :func:`result_at` says; ``results``: address of the warpgroup's first row."""
        row, quad = self.place()
        for r in range(2):
            for n in range(self.plan.value_columns):
                at = result_at(self.plan, row + CORE * r, Int32(n)) + quad * 8
                x = state.out[4 * n + 2 * r : 4 * n + 2 * r + 2]
                ptx.store_shared(results + at, 0, [v * (1.0 / UNIT) for v in x])

    def place(self) -> tuple:
        """The lane's row g of its warpgroup's, and q."""
        thread = wg.thread_again()
        return thread // LANES % (M_TILE // TILE) * TILE + (thread % LANES >> 2), thread & 3


def result_at(plan: TilePlan, row: Int32, chunk: Int32) -> Int32:
    """Place of channels 8 chunk .. 8 chunk + 7 of a row of O: rows that a warp stores at once use all banks."""
    return row * plan.result_row_bytes + ((chunk ^ (row & (QUAD - 1))) * (4 * CORE))


def folded(function, values: list):
    """A function of two values over a list, as a tree."""
    while len(values) > 1:
        values = [function(*values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]
