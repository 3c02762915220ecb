"""The arithmetic of a team of warpgroups: scores and values of a block, by wgmma; between them wide_softmax.py.

Lists at trace time stand for registers: s is a tile of 64 tokens, m one of 64 channels, n a column tile (8 query
columns), c a channel tile of K, t a token tile of V. A lane is g = lane / 4, q = lane % 4; of an accumulator tile it
has rows g (values 0, 1) and g + 8 (2, 3) of its warp's 16, columns 8n + 2q and the next, as with mma.m16n8k16.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from . import warpgroup as wg
from .fold import UNIT, centred, unit, zero_units
from .fragments import extract, fragments
from .layouts import BLOCK_TOKENS, HALF_BITS, LANES, NUM_SLICES, SLICE_TOKENS, TILE, WORD_BITS
from .plan import BARRIER_BYTES, COLUMNS
from .values import FIRST_MAX, halves
from .wide_places import TEAM_BARRIER, Place, Team, WidePlaces
from .wide_plan import GROUP_WARPS, M_TILE, WidePlan
from .wide_softmax import State, WideSoftmax
from .work import Params, Piece, load_piece, token_row, tokens_of


class WideAttention:
    """The team arithmetic of one kernel."""

    def __init__(self, plan: WidePlan):
        self.plan = plan
        self.places = WidePlaces(plan)
        self.softmax = WideSoftmax(plan, self.places)
        self.fmt = plan.fmt
        self.k_bits, self.v_bits = plan.quant.k_bits, plan.quant.v_bits
        self.k_per_channel = plan.quant.k_axis == "channel"
        self.score_tiles = plan.score_tiles_per_group
        self.value_tiles = plan.value_tiles_per_group
        self.column_tiles = plan.column_tiles
        self.step = self.places.p_layout(0, TILE) // wg.DESCRIPTOR_UNIT  # of a B operand's descriptor: one k step of 16
        self.k_fragments = fragments(self.fmt.k_codes, "k", plan.head_dim, self.fmt.k_vector_words)
        self.v_fragments = fragments(self.fmt.v_codes, "v", plan.head_dim, self.fmt.v_vector_words)

    # -- a block -----------------------------------------------------------------------------------------------------

    @cute.jit
    def attend_block(
        self, p: Params, smem: Int32, team: Team, stage: Int32, folded: Int32, scaled: Int32, empty: Int32,
        piece_at: Int32, block: Int32, plain: tuple, state: State
    ):  # fmt: skip
        """Attend to the block in ``stage``, the piece's ``block``-th of this CTA.

        scaled: slot of the block's queries, if they are scaled; piece_at: address of the Piece; empty: the stage's
        barrier.
        plain: the piece's blocks from, to which there is no soft cap, nor tokens that are invisible to a query.
        """
        queries, bias = smem + self.plan.slots_at, None
        if cutlass.const_expr(self.plan.scales_queries):
            queries = smem + self.plan.scaled_at + scaled * self.plan.scaled_bytes
            bias = self.places.bias(folded)
        scores = self.scores(team, stage, folded, self.places.queries(team, queries))
        if cutlass.const_expr(self.plan.scales_queries):
            cute.arch.sync_warp()
            wg.mbarrier_arrive_once(smem + self.plan.scaled_free_at + scaled * BARRIER_BYTES)
        factor = ptx.load_shared_floats(folded, 0, 1)[0]
        values = Values(self, team, stage, folded)
        if (block < plain[0]) | (block >= plain[1]):
            place = self.places.place(smem)
            piece = load_piece(piece_at)
            position = piece.first_position + block * BLOCK_TOKENS
            scores = self.softmax.restricted(p, smem, place, scores, factor, bias, position, piece.packed_end)
        scales = []
        for j in range_constexpr(self.plan.p_groups):
            at = folded + self.places.row_again() * 4
            offset = self.plan.folded_v_scale_at + j * BLOCK_TOKENS * 4
            scales.append(
                [
                    [ptx.load_shared_floats(at, offset + 4 * (TILE * s + 8 * r), 1)[0] for r in range(2)]
                    for s in range(self.score_tiles)
                ]
            )
        if cutlass.const_expr(self.plan.ahead):
            values.load(0)
        state = self.softmax.weigh(smem, team, scores, factor, bias, scales, state)
        if cutlass.const_expr(not self.plan.ahead):
            values.load(0)
        return self.accumulate(smem, team, values, empty, state)

    def load_words(self, base: Int32, section, slice_: int, wanted: list, shift: Int32 | None) -> dict:
        """(vector, word) -> register of the ``wanted`` Fragments of a slice; base: stage and the lane's part."""
        vector_words = self.fmt.k_vector_words if section is self.fmt.k_codes else self.fmt.v_vector_words
        slice_bytes = section.nbytes // NUM_SLICES
        step = LANES * vector_words * 4
        words = {}
        for vector in sorted({f.vector for f in wanted}):
            used = sorted({f.word for f in wanted if f.vector == vector})
            first, count = used[0], used[-1] - used[0] + 1
            offset = section.offset + slice_ * slice_bytes + vector * step + 4 * first
            got = ptx.load_shared(base, offset, count)
            for i, word in enumerate(got):
                words[vector, first + i] = word if shift is None else word >> shift
        return words

    def codes(self, words: dict, fragment, bits: int) -> Int32:
        """The two codes of a register, as fp16 denormals times the power of two of their place."""
        return extract({fragment.vector: {fragment.word: words[fragment[:2]]}}, fragment, bits)

    def k_registers(self, words: dict, s: int, c: int, params: tuple) -> list:
        """A registers of K for channel tile c: scale * (code + zero) (+ mean), in units of the block; or the codes."""
        if self.plan.scales_queries:
            return [self.codes(words, fragment, self.k_bits) for fragment in self.k_fragments[s, c]]
        multipliers, offsets = params
        mask = (1 << self.k_bits) - 1
        a = []
        for r, fragment in enumerate(self.k_fragments[s, c]):
            code = words[fragment.vector, fragment.word] >> fragment.bit & (mask | mask << HALF_BITS)
            if self.plan.centres_keys:
                code = centred(code, 0, self.k_bits)
            a.append(wg.fma_half2(code, multipliers[r], offsets[r]))
        return a

    def k_params(self, team: Team, folded: Int32, pair: int) -> list:
        """K per channel, for channel tiles 2 pair and 2 pair + 1: (multiplier, offset), each by A register."""
        # B order: a vector has columns 2q.., 2q + 8.. of one tile, then those of the next
        at = self.plan.folded_k_at + 4 * TILE * pair
        found = [ptx.load_shared(folded + team.k_folded, at + kind * 2 * self.plan.head_dim, 4) for kind in range(2)]
        return [tuple([x[2 * i], x[2 * i], x[2 * i + 1], x[2 * i + 1]] for x in found) for i in range(2)]

    def scores(self, team: Team, stage: Int32, folded: Int32, query: Int32) -> list:
        """[s] accumulators of K Q^T, to be multiplied by the block's factor."""
        plan = self.plan
        shift = team.k_shift if plan.team_groups == 2 and self.fmt.k_codes.layout(TILE, 0) < WORD_BITS else None
        tiles = range(self.score_tiles)
        rows = self.row_params(team, folded) if not self.k_per_channel else None
        batch = plan.batch

        def load(first: int) -> tuple:
            wanted = [f for s in tiles for c in range(first, first + batch) for f in self.k_fragments[s, c]]
            words = self.load_words(stage + team.k_codes, self.fmt.k_codes, 0, wanted, shift)
            params = {}
            for pair in range(first // 2, (first + batch) // 2):
                if plan.scales_queries:
                    params[2 * pair] = params[2 * pair + 1] = None
                elif self.k_per_channel:
                    params[2 * pair], params[2 * pair + 1] = self.k_params(team, folded, pair)
                else:
                    params |= {c: self.token_mean(folded, c) for c in (2 * pair, 2 * pair + 1)}
            return words, params

        acc = [None for _ in tiles]
        ahead = load(0)
        for first in range(0, plan.tiles, batch):
            words, params = ahead
            if first + batch < plan.tiles and plan.ahead:  # loads that the next registers need, under these
                ahead = load(first + batch)
            a = {}
            for c in range(first, first + batch):
                for s in tiles:
                    by_register = params[c] if self.k_per_channel else self.token_params(rows, params[c], s, c)
                    a[s, c] = self.k_registers(words, s, c, by_register)
            acc = self.issue(acc, a, range(first, first + batch), query, first > 0)
            if first + batch < plan.tiles and first > 0:
                wg.wait(1)
            if first + batch < plan.tiles and not plan.ahead:
                ahead = load(first + batch)
        wg.wait(0)
        return [wg.pin(x) for x in acc]

    def issue(self, acc: list, a: dict, steps: range, operands, started: bool) -> list:
        """wgmma of A registers a[tile, step] into acc[tile], in one group; operands: B descriptor, or one per tile."""
        flat = wg.pin([x for key in sorted(a) for x in a[key]])
        a = {key: flat[4 * i : 4 * i + 4] for i, key in enumerate(sorted(a))}
        if not started:
            acc = [None if x is None else wg.pin(x) for x in acc]
        wg.fence()
        for k in steps:
            for i in range(len(acc)):
                operand = operands[i] if isinstance(operands, list) else operands
                acc[i] = wg.mma(acc[i], a[i, k], operand + k * self.step, self.plan.columns)
        wg.commit()
        return acc

    def row_params(self, team: Team, folded: Int32) -> list:
        """K per token: [s][channel group] of (scale, offset) of rows g and g + 8; of the scale alone if codes are
        centred.
        """
        base = folded + team.k_folded
        words = 1 if self.plan.centres_keys else 2
        return [
            [
                [
                    ptx.load_shared(base, self.plan.folded_k_at + (j * BLOCK_TOKENS + TILE * s + 8 * r) * 8, words)
                    for r in range(2)
                ]
                for j in range(self.plan.k_groups)
            ]
            for s in range(self.score_tiles)
        ]

    def token_mean(self, folded: Int32, c: int) -> list | None:
        """The block's mean for channel tile c, B order: columns 2q.. and 2q + 8.."""
        if self.fmt.k_mean is None:
            return None
        at = self.plan.folded_mean_at + 4 * TILE * (c // 2) + 8 * (c % 2)
        return ptx.load_shared(folded + (cute.arch.thread_idx()[0] & 3) * 16, at, 2)

    def token_params(self, rows: list, mean: list | None, s: int, c: int) -> tuple:
        """K per token: (multiplier, offset) by A register of channel tile c; 0 and 2 are row g, 1 and 3 row g + 8."""
        found = rows[s][c // (self.plan.quant.k_group // TILE)]
        scales = [found[r % 2][0] for r in range(4)]
        if self.plan.centres_keys:
            return scales, [mean[r // 2] for r in range(4)]
        offsets = [found[r % 2][1] for r in range(4)]
        if mean is not None:
            offsets = [wg.add_half2(x, mean[r // 2]) for r, x in enumerate(offsets)]
        return scales, offsets

    # -- values ------------------------------------------------------------------------------------------------------

    def p_operands(self, team: Team) -> list:
        """B descriptors of P^T by M tile."""
        operand = wg.uniform(team.p_operand)
        if self.plan.p_groups == 1:
            return [operand] * self.value_tiles
        stride = self.plan.p_group_stride // wg.DESCRIPTOR_UNIT
        return [operand + m * M_TILE // self.plan.quant.v_group * stride for m in range(self.value_tiles)]

    @cute.jit
    def accumulate(self, smem: Int32, team: Team, values, empty: Int32, state: State):
        """O^T += V^T P^T of a block; frees the stage and P."""
        total, out, parity = state
        steps = BLOCK_TOKENS // TILE
        operands = self.p_operands(team)
        batch = self.plan.batch
        for first in range_constexpr(0, steps, batch):
            if cutlass.const_expr(first + batch < steps and self.plan.ahead):
                values.load(first + batch)
            a = values.registers(first)
            if cutlass.const_expr(first + batch == steps):
                cute.arch.sync_warp()
                wg.mbarrier_arrive_once(empty)
            out = self.issue(out, a, range(first, first + batch), operands, first > 0)
            if cutlass.const_expr(first > 0 and first + batch < steps):
                wg.wait(1)
            if cutlass.const_expr(first + batch < steps and not self.plan.ahead):
                values.load(first + batch)
        wg.wait(0)
        out = [wg.pin(x) for x in out]
        wg.mbarrier_arrive_once(self.places.free(smem, team))
        return State(total, out, parity ^ 1)

    def v_shares_words(self) -> bool:
        """Whether the warpgroups' or warps' channel tiles share words."""
        bits = (self.plan.tiles - 1).bit_length()
        runtime = [b for b in range(bits) if b < 2 or (1 << b) >= GROUP_WARPS * self.value_tiles]
        return any(self.fmt.v_codes.layout(0, TILE << b) < WORD_BITS for b in runtime)

    def v_offsets(self, team: Team, folded: Int32, slice_: int) -> list:
        """[m][token tile of the slice][2] half2: (zero * UNIT) of the pairs of tokens of a lane's A registers."""
        if self.fmt.v_zero is None:
            return [[[zero_units(self.v_bits)] * 2] * 2] * self.value_tiles
        layout = self.fmt.v_scale.layout
        found = {}
        for m in range(self.value_tiles):
            group = m * M_TILE // self.plan.quant.v_group
            if group not in found:
                at = self.plan.folded_v_offset_at + 2 * layout(group, SLICE_TOKENS * slice_)
                got = ptx.load_shared(folded + team.v_folded, at, 4)
                found[group] = [got[:2], got[2:]]
        return [found[m * M_TILE // self.plan.quant.v_group] for m in range(self.value_tiles)]

    def v_registers(self, words: dict, i: int, m: int, offsets: list) -> list:
        """A registers of V for token tile i of a slice: (code + zero) * UNIT."""
        a = []
        for r, fragment in enumerate(self.v_fragments[i, GROUP_WARPS * m]):
            code = self.codes(words, fragment, self.v_bits)
            a.append(wg.fma_half2(code, unit(fragment.bit), offsets[m][i][r >> 1]))
        return a

    def finished(self, state: State) -> State:
        """``out`` as O^T itself, after the last block."""
        return state._replace(out=[[x * (1.0 / UNIT) for x in tile] for tile in state.out])

    # -- 16-bit tokens -----------------------------------------------------------------------------------------------

    def address(self, p: Params, base: Int64, piece: Piece, capacity: Int32, token: Int32, held: Int32) -> Int64:
        """Of a 16-bit token's row, of the last one for those beyond it; with the lane's quad."""
        token = cutlass.min(token, held - 1)
        return base + token_row(p, piece.b, piece.head, capacity, token, self.plan.head_dim)

    @cute.jit
    def attend_chunk(
        self, p: Params, smem: Int32, team: Team, piece_at: Int32, chunk: Int32, factor: Float32,
        state: State
    ):  # fmt: skip
        """The team's 128 tokens of a 16-bit unit, read from global memory."""
        piece = load_piece(piece_at)
        k, v, capacity, token, held, position = tokens_of(p, piece, chunk, self.plan.chunk)
        if token < held:
            state = self.attend_tokens(p, smem, team, piece, k, v, capacity, token, held, position, factor, state)
        return state

    @cute.jit
    def attend_tokens(
        self, p: Params, smem: Int32, team: Team, piece: Piece, k: Int64, v: Int64, capacity: Int32, token: Int32,
        held: Int32, position: Int32, factor: Float32, state: State
    ):  # fmt: skip
        """Attend to tokens ``token`` .. ``held`` - 1 of a buffer, 128 at most; its first one is at ``position``."""
        place = self.places.place(smem)
        query = self.places.queries(team, smem + self.plan.slots_at)
        quad = Int64(place.lane & 3) * 4
        tiles = self.plan.tiles
        acc = [None for _ in range(self.score_tiles)]
        rows = [
            [self.address(p, k, piece, capacity, token + place.row + TILE * s + 8 * r, held) + quad for r in range(2)]
            for s in range(self.score_tiles)
        ]
        batch = self.plan.batch
        for first in range_constexpr(0, tiles, batch):
            a = {}
            for s in range_constexpr(self.score_tiles):
                keys = [
                    channel_pair(rows[s][i & 1], c, i >> 1 & 1) for c in range(first, first + batch) for i in range(4)
                ]
                keys = halves(p, keys)
                for c in range_constexpr(batch):
                    a[s, first + c] = keys[4 * c : 4 * c + 4]
            acc = self.issue(acc, a, range(first, first + batch), query, first > 0)
            wg.wait(0)
        acc = [wg.pin(tile) for tile in acc]
        acc = self.softmax.restricted(p, smem, place, acc, factor, None, position + token, position + held)
        state = self.softmax.weigh(smem, team, acc, factor, None, [None], state)
        total, out, parity = state
        # 8x8 matrices (tokens, channels) transposed: A register r has channels 8 (r & 1), tokens 8 (r >> 1)
        channels = quad + Int64(place.channel - (place.lane >> 2)) * 2
        operand = wg.uniform(self.first_operand(team, place))
        for t in range_constexpr(BLOCK_TOKENS // TILE):
            rows = [
                self.address(p, v, piece, capacity, token + TILE * t + 8 * r + (place.lane >> 2), held) + channels
                for r in range(2)
            ]
            a = {}
            for m in range_constexpr(self.value_tiles):
                values = [channel_pair(rows[i >> 1 & 1], GROUP_WARPS * m, i & 1) for i in range(4)]
                values = halves(p, values)
                a[m, t] = [ptx.transpose8x8(x) for x in values]
            out = self.issue(out, a, range(t, t + 1), [operand] * self.value_tiles, False)
            wg.wait(0)
            out = [wg.pin(x) for x in out]
        wg.mbarrier_arrive_once(self.places.free(smem, team))
        return State(total, out, parity ^ 1)

    def first_operand(self, team: Team, place: Place) -> Int32:
        """B descriptor of P^T of the first V group, which is where unscaled P goes."""
        if self.plan.p_groups == 1:
            return team.p_operand
        v_group = self.places.first_v_group(place.group)
        return team.p_operand - v_group * (self.plan.p_group_stride // wg.DESCRIPTOR_UNIT)

    # -- a piece: its beginning, its end -------------------------------------------------------------------------------

    def first_state(self, smem: Int32, parity: Int32) -> State:
        """Of a piece; the team meets at the end."""
        place = self.places.place(smem)
        self.softmax.store_top(place, [[Float32(FIRST_MAX)] * 2] * self.column_tiles)
        wg.barrier(TEAM_BARRIER + place.index, LANES * self.plan.team_warps)
        count = self.column_tiles * 4
        total = [Float32(0.0)] * (2 * self.softmax.total_rows())
        return State(total, [[Float32(0.0)] * count for _ in range(self.value_tiles)], parity)

    @cute.jit
    def store_state(self, smem: Int32, team: Team, state: State):
        """The team's results to the scratch: rows [column] of head_dim floats of O, maximum, sum."""
        plan = self.plan
        threads = LANES * plan.team_warps
        total, out, _ = state
        place = self.places.place(smem)
        lane, mine = place.lane, place.results
        sums = place.exchange + place.member * (4 * plan.columns) + (lane & 3) * 8
        for r in range_constexpr(self.softmax.total_rows()):
            tile = (lane >> 2) + 8 * r
            if tile < self.column_tiles:
                ptx.store_shared(sums + tile * (4 * COLUMNS), 0, total[2 * r : 2 * r + 2])
        wg.barrier(team.barrier, threads)  # sums are there, and nobody reads P any more
        for n in range_constexpr(self.column_tiles):
            for j in range_constexpr(2):
                row = mine + (n * COLUMNS + (lane & 3) * 2 + j) * plan.row_bytes
                for m in range_constexpr(self.value_tiles):
                    for r in range_constexpr(2):
                        at = row + place.channel * 4
                        ptx.store_shared(at, 4 * (M_TILE * m + 8 * r), [out[m][4 * n + 2 * r + j]])
        if place.member == 0:
            if lane < 4:
                for n in range_constexpr(self.column_tiles):
                    parts = [
                        ptx.load_shared_floats(place.exchange + lane * 8, 4 * (w * plan.columns + COLUMNS * n), 2)
                        for w in range(plan.team_warps)
                    ]
                    top = ptx.load_shared_floats(self.places.top(smem, team), 4 * COLUMNS * n, 2)
                    for j in range_constexpr(2):
                        weight = parts[0][j]
                        for w in range_constexpr(1, plan.team_warps):
                            weight = weight + parts[w][j]
                        row = mine + (n * COLUMNS + lane * 2 + j) * plan.row_bytes
                        ptx.store_shared(row, 4 * plan.head_dim, [top[j], weight])


class Values:
    """V of a block on its way into A registers, a batch of k steps at a time (trace time)."""

    def __init__(self, attention: WideAttention, team: Team, stage: Int32, folded: Int32):
        self.attention, self.team, self.stage, self.folded = attention, team, stage, folded
        self.shift = team.v_shift if attention.v_shares_words() else None
        self.slices = {}

    def load(self, first: int) -> None:
        """Load the codes and offsets of k steps first .. first + batch - 1."""
        attention = self.attention
        for slice_ in range(first // 2, (first + attention.plan.batch) // 2):
            wanted = [
                f
                for m in range(attention.value_tiles)
                for i in range(2)
                for f in attention.v_fragments[i, GROUP_WARPS * m]
            ]
            words = attention.load_words(
                self.stage + self.team.v_codes, attention.fmt.v_codes, slice_, wanted, self.shift
            )
            self.slices[slice_] = words, attention.v_offsets(self.team, self.folded, slice_)

    def registers(self, first: int) -> dict:
        """[m, t] of those k steps."""
        a = {}
        for t in range(first, first + self.attention.plan.batch):
            words, offsets = self.slices[t // 2]
            for m in range(self.attention.value_tiles):
                a[m, t] = self.attention.v_registers(words, t % 2, m, offsets)
        return a


def channel_pair(row: Int64, c: int, half: int) -> Int32:
    """Channels 2q, 2q + 1 of half ``half`` of channel tile c of a 16-bit row; row includes the lane's 4 q bytes."""
    return ptx.load_global(row, offset=2 * (TILE * c + 8 * half))[0]
