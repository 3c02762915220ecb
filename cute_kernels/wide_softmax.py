"""The softmax of a team of warpgroups: from accumulators of scores to P as wgmma's B operand, and the sums of P.

Names and lists as in wide_attention.py. A team agrees about what is subtracted from a column's scores, ``top``, which
lies in shared memory. P is written with the old one; only where that was too low does the team meet to raise it.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .fragments import fragments, power
from .layouts import LANES, TILE
from .merge import masked
from .plan import COLUMNS
from .values import HALF2_ONES, soft_capped
from .wide_places import Place, Team, WidePlaces
from .wide_plan import HIGH_BYTES, WidePlan
from .work import Params

# log2: room that a raised ``top`` leaves below the limit of P; with many columns one would grow at every block
HEADROOM = 4.0


class State(NamedTuple):
    """A warp's running result of a piece; what is subtracted from the scores, ``top``, lies in shared memory."""

    total: list  # rows g (and g + 8) of an accumulator of the sums of P; row n: for columns 2q, 2q + 1 of tile n
    out: list  # [m] accumulators of O^T * UNIT, until ``finished``
    parity: Int32  # of the ``free`` barrier


class WideSoftmax:
    """The softmax of one kernel."""

    def __init__(self, plan: WidePlan, places: WidePlaces):
        self.plan = plan
        self.places = places
        self.score_tiles = plan.score_tiles_per_group
        self.value_tiles = plan.value_tiles_per_group
        self.column_tiles = plan.column_tiles
        codes = fragments(plan.fmt.k_codes, "k", plan.head_dim, plan.fmt.k_vector_words)
        self.powers = [[1.0 / power(codes[s, 0][r]) for r in range(2)] for s in range(self.score_tiles)]

    def power(self, s: int, r: int, bias: Int32 | None) -> float:
        """What scores of rows g + 8 r are multiplied with, besides the factor of all: where a bias is added, they are
        products of codes as they are read.
        """
        return 1.0 if bias is None else self.powers[s][r]

    def biases(self, bias: Int32 | None, n: int) -> list:
        """What is added to the log2 scores of a lane's columns of tile n."""
        return [Float32(0.0)] * 2 if bias is None else ptx.load_shared_floats(bias, 4 * COLUMNS * n, 2)

    def capped(self, scores: list, cap: Float32, factor: Float32, bias: Int32 | None) -> list:
        """Scores after the soft cap, in their own units."""
        if bias is None:
            return soft_capped(scores, cap, factor)
        added = [x for n in range(self.column_tiles) for x in self.biases(bias, n)]
        log2_scores = [
            [x * (factor * self.power(s, i // 2 % 2, bias)) + added[i // 4 * 2 + i % 2] for i, x in enumerate(tile)]
            for s, tile in enumerate(scores)
        ]
        inverse = ptx.reciprocal(factor)
        return [
            [
                (x - added[i // 4 * 2 + i % 2]) * (inverse * (1.0 / self.power(s, i // 2 % 2, bias)))
                for i, x in enumerate(tile)
            ]
            for s, tile in enumerate(soft_capped(log2_scores, cap))
        ]

    @cute.jit
    def restricted(
        self, p: Params, smem: Int32, place: Place, scores: list, factor: Float32, bias: Int32 | None,
        position: Int32, end: Int32
    ):  # fmt: skip
        """Scores after the soft cap, and -inf where a key is invisible.

        factor, bias: log2 scores are scores * factor * ``power`` + bias; position: of the tokens' first; end: behind
        their last one.
        """
        position += place.row
        highs = self.places.highs(smem, place)
        if p.softcap > 0.0:
            scores = self.capped(scores, wg.again(p.softcap), factor, bias)
        for n in range_constexpr(self.column_tiles):
            bounds = ptx.load_shared(highs, HIGH_BYTES * COLUMNS * n, 2)
            for j in range_constexpr(2):
                low = bounds[j] - p.window
                last = cutlass.min(bounds[j], end) - 1 - position
                first = low - position
                for s in range_constexpr(len(scores)):
                    for r in range_constexpr(2):
                        at = TILE * s + 8 * r
                        hidden = ptx.sign_mask((at - first) | (last - at))
                        i = 4 * n + 2 * r + j
                        scores[s][i] = masked(ptx.bits(scores[s][i]), hidden)
        return scores

    @cute.jit
    def weigh(
        self, smem: Int32, team: Team, scores: list, factor: Float32, bias: Int32 | None, scales: list, state: State
    ):
        """P = exp2(log2 scores - top), times the scales of V, to shared memory; the State with new sums.

        P is written with the old ``top``; where that was too low, which a barrier finds out, it is raised and P
        written again.
        """
        total, out, parity = state
        threads = LANES * self.plan.team_warps
        ptx.mbarrier_wait(self.places.free(smem, team), parity, self.plan.wait)
        parts, largest = self.write(smem, team, scores, factor, bias, scales)
        wg.fence_async()
        if wg.barrier_any(team.barrier, threads, largest > 2.0**self.plan.p_limit):
            place = self.places.place(smem)
            tops = []
            for n in range_constexpr(self.column_tiles):
                tops.append([Float32(0.0)] * 2)
                added = self.biases(bias, n)
                for j in range_constexpr(2):
                    peak = Float32(-float("inf"))
                    for s in range_constexpr(self.score_tiles):
                        for r in range_constexpr(2):
                            peak = ptx.fmax(peak, scores[s][4 * n + 2 * r + j] * self.power(s, r, bias))
                    tops[n][j] = ptx.over_lanes(ptx.fmax, peak, ptx.LANE_BITS[2:]) * factor + added[j]
            if place.lane < 4:
                mine = place.exchange + place.member * (4 * self.plan.columns) + place.lane * 8
                for n in range_constexpr(self.column_tiles):
                    ptx.store_shared(mine, 4 * COLUMNS * n, tops[n])
            wg.barrier(team.barrier, threads)
            shrinks = []
            for n in range_constexpr(self.column_tiles):
                at = place.exchange + (place.lane & 3) * 8
                found = [
                    ptx.load_shared_floats(at, 4 * (w * self.plan.columns + COLUMNS * n), 2)
                    for w in range(self.plan.team_warps)
                ]
                top = ptx.load_shared_floats(self.places.top(smem, team), 4 * COLUMNS * n, 2)
                shrinks.append([Float32(0.0)] * 2)
                for j in range_constexpr(2):
                    peak = found[0][j]
                    for w in range_constexpr(1, self.plan.team_warps):
                        peak = ptx.fmax(peak, found[w][j])
                    raised = ptx.fmax(top[j], peak + (HEADROOM - self.plan.p_limit))
                    shrinks[n][j] = ptx.exp2(top[j] - raised)
                    tops[n][j] = raised
                    for m in range_constexpr(self.value_tiles):
                        for i in range_constexpr(j, 4, 2):
                            out[m][4 * n + i] = out[m][4 * n + i] * shrinks[n][j]
            wg.barrier(team.barrier, threads)  # all have read the old ones
            self.store_top(place, tops)
            self.store_top(place, shrinks, 1)
            wg.barrier(team.barrier, threads)
            tile = cutlass.min(place.lane >> 2, self.column_tiles - 1)
            at = self.plan.top_offset + 4 * self.plan.columns
            for r in range_constexpr(self.total_rows()):
                row = place.exchange + tile * (4 * COLUMNS) + (place.lane & 3) * 8
                shrink = ptx.load_shared_floats(row, at + r * (8 * 4 * COLUMNS), 2)
                total[2 * r] = total[2 * r] * shrink[0]
                total[2 * r + 1] = total[2 * r + 1] * shrink[1]
            # or the compiler would keep all scores times factor from before
            parts, largest = self.write(smem, team, scores, wg.again(factor), bias, scales)
            wg.fence_async()
            wg.barrier(team.barrier, threads)
        return State(self.summed(total, parts), out, parity)

    def total_rows(self) -> int:
        """Registers pairs of ``total`` in use: rows g, and g + 8 with more than 8 column tiles."""
        return -(-self.column_tiles // 8)

    def summed(self, total: list, parts: list) -> list:
        """``total`` with the lane's sums of P added, which an MMA adds up over the rows g: its A has a row of ones per
        column tile.
        """
        row = (wg.thread_again() % LANES) >> 2
        for n in range(0, self.column_tiles, 2):
            b = [ptx.transpose8x8(part) for part in parts[n : n + 2]]
            ones = [cutlass.select_(row == (n + i) % 8, Int32(HALF2_ONES), Int32(0)) for i in range(len(b))]
            a = [Int32(0)] * 4
            for i in range(len(b)):
                a[2 * i + n // 8] = ones[i]
            unused = [Float32(0.0)] * (4 - len(total))
            total = ptx.mma([*total, *unused], a, [*b, Int32(0)][:2])[: len(total)]
        return total

    def write(self, smem: Int32, team: Team, scores: list, factor: Float32, bias: Int32 | None, scales: list) -> tuple:
        """Write P^T as B operands, one per V group -> [n] half2 sums of P over the lane's rows, the largest of them."""
        parts = []
        largest = Float32(0.0)
        tops = self.places.top(smem, team)
        factors = [[factor * self.power(s, r, bias) for r in range(2)] for s in range(self.score_tiles)]
        pairs = [list(range(n, min(n + 2, self.column_tiles))) for n in range(0, self.column_tiles, 2)]
        for pair in pairs:
            p = {}
            for n in pair:
                top = ptx.load_shared_floats(tops, 4 * COLUMNS * n, 2)
                if bias is not None:
                    top = [ptx.subtract(x, y) for x, y in zip(top, self.biases(bias, n), strict=True)]
                for s in range(self.score_tiles):
                    p[n, s] = [ptx.exp2(scores[s][4 * n + i] * factors[s][i // 2] - top[i % 2]) for i in range(4)]
                part = [p[n, 0][j] + p[n, 0][j + 2] for j in range(2)]
                for s in range(1, self.score_tiles):
                    part = [part[j] + (p[n, s][j] + p[n, s][j + 2]) for j in range(2)]
                parts.append(ptx.to_half2(*part))
                largest = ptx.fmax(largest, ptx.fmax(*part))
            for j, scale in enumerate(scales):
                for s in range(self.score_tiles):
                    halves = []
                    for n in pair:
                        for r in range(2):
                            x = p[n, s][2 * r : 2 * r + 2]
                            if scale is not None:
                                x = [v * scale[s][r] for v in x]
                            halves.append(ptx.to_half2(*x))
                    offset = j * self.plan.p_group_stride + self.places.p_layout(COLUMNS * pair[0], TILE * s)
                    wg.store_matrices(team.p_store, offset, halves)
        return parts, largest

    @cute.jit
    def store_top(self, place: Place, top: list, row: int = 0):
        """Write ``top`` (row 0) or its change (row 1) [n][2], which all warps know, once."""
        if (place.member == 0) & (place.lane < 4):
            for n in range_constexpr(self.column_tiles):
                at = self.plan.top_offset + 4 * (row * self.plan.columns + COLUMNS * n)
                ptx.store_shared(place.exchange + place.lane * 8, at, top[n])
