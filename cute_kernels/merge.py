"""Merging of partial results: warps of a CTA through shared memory, CTAs of a piece through the workspace.

Merge warps merge what the consumers left in the scratch, so that these go on with the next piece; the consumers do it
for the last piece of their CTA. A CTA has at most two unfinished pieces, its first and its last, so two workspace slots
per CTA suffice. The CTA that has the end of a piece merges the piece's partial results, as the last thing it does. It
waits for them: they are stored as words that are not zero, and it leaves zeros. It waits for CTAs that started before
it, and no CTA waits before it has stored its own. Results are merged in the order of the CTAs: they are deterministic.
"""

import operator

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .attention import State
from .layouts import LANES, TILE
from .plan import BARRIER_BYTES, COLUMNS, MERGE_BARRIER, MERGE_WARPS, QUAD, ROWS_WARP, SLOTS, Plan
from .queries import Queries, hadamard_lanes, hadamard_registers
from .schedule import Place, Schedule
from .step import Step
from .values import FIRST_MAX, LOG2E
from .work import Params, Piece, Sequence, blocks_due, load_piece, store_piece

STATES_AT_ONCE = 8  # results of warps that a thread holds while merging
MINUS_ZERO, MINUS_INFINITY = -0x80000000, -0x800000  # as fp32


class Merge:
    """Merging in one kernel."""

    def __init__(self, plan: Plan, schedule: Schedule):
        self.plan = plan
        self.schedule = schedule
        self.queries = Queries(plan)
        self.step = Step(plan, schedule) if plan.steps else None
        self.item_bits = ptx.LANE_BITS[: plan.items.bit_length() - 1]  # those that tell the lanes of a row apart

    @cute.jit
    def help(self, p: Params, smem: Int32, helper: Int32, lane: Int32, share: tuple):
        """The merge warps prepare the pieces of the CTA's share behind the first, and merge all but the last."""
        slot = Int32(0)  # of the piece that is prepared
        at, end, seq, shares, _ = share
        self.prepared(smem, slot, helper)
        self.keep_rows(p, smem, Int32(0), helper, lane)
        done = Int32(1)  # pieces
        parity = Int32(0)
        units = seq.units
        count = self.schedule.count(p, at, end, seq)
        self.fetch_ahead(p, smem, helper, lane, at, units, count, end)
        while at.x + count < end:
            at = self.schedule.next_piece(p, at, units, count)
            seq = self.schedule.sequence(p, at.b)
            units = seq.units
            count = self.schedule.count(p, at, end, seq)
            slot = slot ^ 1
            self.tell(p, smem, slot, helper, lane, (at, end, seq, shares), is_first=False)
            self.prepare(p, smem, slot, helper, lane, at, seq, is_first=False)
            self.prepared(smem, slot, helper)
            self.keep_rows(p, smem, done, helper, lane)
            self.fetch_ahead(p, smem, helper, lane, at, units, count, end)
            done += 1
            ptx.mbarrier_wait(smem + self.plan.merge_full_at, parity, self.plan.wait)
            parity = parity ^ 1
            self.merge(p, smem, helper, Int32(MERGE_WARPS), lane, load_piece(self.piece_at(smem, slot ^ 1)))
            ptx.mbarrier_arrive(smem + self.plan.merge_empty_at)
            ptx.barrier(MERGE_BARRIER, MERGE_WARPS * LANES)  # all of them have read what the next piece's slot held
        if cutlass.const_expr(self.plan.steps):
            if helper == ROWS_WARP:
                if ptx.load_shared(smem, self.plan.due_at, 1)[0] == 0:  # else the consumers do it
                    self.step.count(p, lane)

    @cute.jit
    def tell(self, p: Params, smem: Int32, slot: Int32, helper: Int32, lane: Int32, share: tuple, is_first: bool):
        """Tell the consumers of the piece at (Place, end, Sequence, Shares)."""
        if (helper == MERGE_WARPS - 1) & (lane == 0):  # the merge warp with the fewest queries
            piece = self.schedule.piece(p, *share)
            store_piece(self.piece_at(smem, slot), piece)
            if cutlass.const_expr(is_first):
                store_piece(smem + self.plan.first_piece_at, piece)

    @cute.jit
    def prepare(
        self, p: Params, smem: Int32, slot: Int32, helper: Int32, lane: Int32, at: Place, seq: Sequence, is_first: bool
    ):
        """Prepare a piece's queries; fetch the first one's new rows, in a kernel that appends."""
        head, first_row = self.schedule.tile(p, at)
        b = cutlass.max(at.b, 0)
        self.queries.prepare(p, self.slot(smem, slot), helper, lane, b, head, first_row, seq.length)
        if cutlass.const_expr(self.plan.steps and is_first):
            if helper == ROWS_WARP:
                self.step.fetch_rows(p, smem, lane, b, head, Int32(0))

    @cute.jit
    def fetch_ahead(
        self, p: Params, smem: Int32, helper: Int32, lane: Int32, at: Place, units: Int32, count: Int32, end: Int32
    ):
        """In a kernel that appends, fetch the new rows of the next piece, for which the producer will wait."""
        if cutlass.const_expr(self.plan.steps):
            if (helper == ROWS_WARP) & (at.x + count < end):
                then = self.schedule.next_piece(p, at, units, count)
                head, _ = self.schedule.tile(p, then)
                self.step.fetch_rows(p, smem, lane, then.b, head, Int32(0))

    @cute.jit
    def prepared(self, smem: Int32, slot: Int32, helper: Int32):
        """Let the consumers begin with a piece."""
        prepares = Boolean(True)
        if cutlass.const_expr(self.plan.steps):
            prepares = helper != ROWS_WARP
        if prepares:
            ptx.mbarrier_arrive(smem + self.plan.slot_full_at + slot * BARRIER_BYTES)

    @cute.jit
    def keep_rows(self, p: Params, smem: Int32, done: Int32, helper: Int32, lane: Int32):
        """In a kernel that appends, append the new rows of the piece after ``done`` ones, by one warp; leave word if
        the CTA is to pack a block of it, for the consumers, who attend to the rows before they read it.
        """
        if cutlass.const_expr(self.plan.steps):
            if helper == ROWS_WARP:
                slot = done % SLOTS
                at = smem + slot * BARRIER_BYTES
                # it is told, and the merge warps have read the lengths for it
                ptx.mbarrier_wait(at + self.plan.slot_full_at, done // SLOTS % 2, self.plan.wait)
                piece = load_piece(self.piece_at(smem, slot))
                self.step.keep_rows(p, smem, lane, piece)
                if (lane == 0) & (piece.first_chunk < piece.end_chunk) & (blocks_due(p, piece.tail) > 0):
                    ptx.store_shared(smem, self.plan.due_at, [Int32(1)])
                cute.arch.sync_warp()
                ptx.mbarrier_arrive(at + self.plan.rows_full_at)

    def slot(self, smem: Int32, slot: Int32) -> Int32:
        return smem + self.plan.slots_at + slot * self.plan.slot_bytes

    def piece_at(self, smem: Int32, slot: Int32) -> Int32:
        return self.slot(smem, slot) + self.plan.piece_offset

    @cute.jit
    def merge(self, p: Params, smem: Int32, member: Int32, team: Int32, lane: Int32, piece: Piece):
        """Merge the results of the CTA's warps; store the output of a whole piece, else a partial result.

        Warps of the team take turns at the parts of the tile.
        """
        part = member
        while part * LANES < piece.columns * self.plan.items:
            column, item, inside = self.item(part * LANES + lane, piece.columns)
            peak, weight, value = self.combine_warps(smem, column, item)
            if piece.ctas == 1:
                self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            else:
                slot = self.partial(p, piece.slot)
                if inside:
                    self.store_partial(slot + self.value_at(column, item), 0, [marked(x) for x in value])
                    if item == 0:
                        ptx.store_relaxed(slot + self.state_at(column), [marked(peak), marked(weight)])
            part += team

    @cute.jit
    def collect(self, p: Params, member: Int32, team: Int32, lane: Int32, piece: Piece):
        """Merge the partial results of a piece's CTAs, and store the output."""
        part = member
        while part * LANES < piece.columns * self.plan.items:
            column, item, inside = self.item(part * LANES + lane, piece.columns)
            peak, weight, value = self.combine_slots(p, piece, lane, column, item, inside)
            self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            part += team

    def item(self, index: Int32, columns: Int32) -> tuple:
        """(column, item of its row, whether it exists); the others stay, for the shuffles, at the last that does."""
        column = index // self.plan.items
        item = index - column * self.plan.items
        last = self.plan.head_dim // self.plan.width - 1
        return cutlass.min(column, columns - 1), cutlass.min(item, last), (column < columns) & (item <= last)

    def load_values(self, address: Int32, offset: int) -> list:
        """An item's values of a row in shared memory."""
        vectors = [ptx.load_shared_floats(address, offset + 4 * i, QUAD) for i in range(0, self.plan.width, QUAD)]
        return [x for vector in vectors for x in vector]

    @cute.jit
    def store_state(self, smem: Int32, warp: Int32, lane: Int32, state: State):
        """Warp results to the scratch: rows [warp][column] of head_dim floats of O, maximum, sum."""
        mine = smem + self.plan.scratch_at + warp * (self.plan.q_tile * self.plan.row_bytes)
        for n in range_constexpr(self.plan.column_tiles):
            for j in range_constexpr(self.plan.lane_columns):
                row = mine + (n * COLUMNS + (lane & 3) * self.plan.lane_columns + j) * self.plan.row_bytes
                for c in range_constexpr(self.plan.tiles):
                    for r in range_constexpr(2):
                        ptx.store_shared(row + (lane >> 2) * 4, 4 * (TILE * c + 8 * r), [state.out[n][c][2 * r + j]])
                if lane < 4:
                    ptx.store_shared(row, 4 * self.plan.head_dim, [state.top[n][j], state.total[n][j]])

    def combine_warps(self, smem: Int32, column: Int32, item: Int32) -> tuple:
        """Merge the results of the CTA's warps for an item of a column."""
        row = smem + self.plan.scratch_at + column * self.plan.row_bytes  # of the first warp
        step = self.plan.q_tile * self.plan.row_bytes
        states, values = [], []
        for w in range(self.plan.states):
            states.append(ptx.load_shared_floats(row, w * step + 4 * self.plan.head_dim, 2))
            values.append(self.load_values(row + item * (4 * self.plan.width), w * step))
            if len(states) == STATES_AT_ONCE and w + 1 < self.plan.states:
                *state, value = combine(states, values)
                states, values = [state], [value]
        return combine(states, values)

    @cute.jit
    def combine_slots(self, p: Params, piece: Piece, lane: Int32, column: Int32, item: Int32, inside: Boolean):
        """Merge the partial results of a piece's CTAs, in their order, some of them at a time, as soon as they are
        there; leave zeros for the next launch. All lanes of a warp must call it.

        Each of a row's lanes has its item's values from every CTA, and maximum and sum from one of them.
        """
        sources = min(self.plan.merge_floats // self.plan.width, self.plan.items)
        stride = 2 * self.plan.partial_bytes  # between first slots
        mine = lane % self.plan.items  # the lane's CTA of the next ones
        row = lane - mine
        left = piece.ctas - 1  # CTAs after the first of the next ones
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * self.plan.width
        slot = self.partial(p, piece.first_slot)  # of the first of the next CTAs
        others = self.partial(p, 2 * piece.first_cta)  # its first slot, which is where the later ones have the piece
        while left >= 0:
            state_at = self.state_at(column) + cutlass.select_(mine == 0, slot, others + Int64(mine) * stride)
            there = cutlass.select_(mine < sources, left - mine, Int32(-1))  # not negative: so is the lane's CTA
            state = [Int32(0)] * 2
            words = [[Int32(0)] * self.plan.width for _ in range(sources)]
            waits = Int32(1)
            while waits == 1:
                state = ptx.load_relaxed(state_at, 0, there, [MINUS_INFINITY, MINUS_ZERO])
                words = [
                    self.load_partial((slot if i == 0 else others) + self.value_at(column, item), i * stride, left - i)
                    for i in range(sources)
                ]
                waits = Int32(0)
                if ptx.any_lane(least([least(each) for each in [state, *words]]) == 0):
                    waits = Int32(1)
            if inside:
                zeros = [Int32(0)] * self.plan.width
                for i in range_constexpr(sources):
                    if left >= i:
                        base = slot if cutlass.const_expr(i == 0) else others
                        self.store_partial(base + self.value_at(column, item), i * stride, zeros)
                if there >= 0:
                    ptx.store_relaxed(state_at, [Int32(0)] * 2)
            top, part = (ptx.from_bits(x) for x in state)
            highest = ptx.fmax(ptx.over_lanes(ptx.fmax, top, self.item_bits), peak)
            before = ptx.exp2(peak - highest)
            peak = highest
            factor = ptx.exp2(top - peak)
            part = ptx.over_lanes(operator.add, part * factor, self.item_bits)
            weight = weight * before + part
            value = [x * before for x in value]
            for i in range_constexpr(sources):
                of_source = ptx.shuffle(factor, row + i)
                value = [x + of_source * ptx.from_bits(word) for x, word in zip(value, words[i], strict=True)]
            left -= sources
            others += sources * stride
            slot = others
        return peak, weight, value

    def load_partial(self, address: Int64, offset: int, condition: Int32) -> list:
        """An item's values at an offset from an address; words that are not there yet are zero. Neutral ones if the
        condition is negative.
        """
        neutral = [MINUS_ZERO] * QUAD
        vectors = [
            ptx.load_relaxed(address, offset + 4 * i, condition, neutral) for i in range(0, self.plan.width, QUAD)
        ]
        return [word for vector in vectors for word in vector]

    def store_partial(self, address: Int64, offset: int, words: list) -> None:
        """What :meth:`load_partial` loads."""
        for i in range(0, self.plan.width, QUAD):
            ptx.store_relaxed(address, words[i : i + QUAD], offset + 4 * i)

    @cute.jit
    def store_output(
        self,
        p: Params,
        piece: Piece,
        lane: Int32,
        column: Int32,
        item: Int32,
        inside: Boolean,
        peak: Float32,
        weight: Float32,
        value: list,
    ):
        """Normalise, rotate and store an item of a query row; no visible key gives zeros and an lse of -inf.

        All lanes of a warp must call it; those with ``inside`` store.
        """
        group = p.group
        row = piece.first_row + column
        token = row // group
        q_head = piece.head * group + row - token * group
        scale = Float32(1.0)
        if p.sink_logits.toint() != 0:
            sink = ptx.from_bits(ptx.load_global(p.sink_logits.toint() + Int64(q_head) * 4)[0]) * LOG2E
            with_sink = ptx.fmax(peak, sink)
            scale = ptx.exp2(peak - with_sink)
            weight = weight * scale + ptx.exp2(sink - with_sink)
            peak = with_sink
        inverse = Float32(0.0)
        if weight > 0.0:
            inverse = scale * ptx.reciprocal(weight)
        if p.rotate_out == 1:
            size = self.plan.hadamard
            masks = ptx.LANE_BITS[: (size // self.plan.width).bit_length() - 1]
            value = hadamard_lanes(hadamard_registers(value, self.plan.width), masks, lane)
            inverse = inverse * size**-0.5
        value = [v * inverse for v in value]
        pairs = list(zip(value[::2], value[1::2], strict=True))
        packed = [ptx.to_half2(*pair) for pair in pairs]
        if p.bfloat16 == 1:
            packed = [ptx.to_bfloat2(*pair) for pair in pairs]
        at = Int64(piece.b * p.q_len + token) * p.num_q_heads + q_head
        target = p.out.toint() + at * (2 * self.plan.head_dim) + Int64(item) * (2 * self.plan.width)
        if inside:
            ptx.store_global(target, packed)
            if (p.lse.toint() != 0) & (item == 0):
                ptx.store_global(p.lse.toint() + at * 4, [(peak + ptx.log2(weight)) * (1.0 / LOG2E)])

    # -- the workspace: slots of O [q_tile, head_dim] and (maximum, sum) [q_tile], fp32; zero where nothing is ------

    def partial(self, p: Params, slot: Int32) -> Int64:
        return p.workspace.toint() + Int64(slot) * self.plan.partial_bytes

    def value_at(self, column: Int32, item: Int32) -> Int64:
        return Int64(column * self.plan.head_dim + item * self.plan.width) * 4

    def state_at(self, column: Int32) -> Int64:
        return Int64(self.plan.q_tile * self.plan.head_dim + column * 2) * 4


def masked(word: Int32, mask: Int32) -> Float32:
    """The number with the bits ``word``, -inf if the mask is -1 instead of 0: without the predicate of a select, of
    which the compiler runs out in wgmma kernels.
    """
    return ptx.from_bits((word & ~mask) | (mask & MINUS_INFINITY))


def marked(x: Float32) -> Int32:
    """The bits of a number, of -0 if it is 0: never a zero word."""
    word = ptx.bits(x)
    return cutlass.select_(word == 0, Int32(MINUS_ZERO), word)


def least(words: list) -> Int32:
    """The least of some words, unsigned."""
    while len(words) > 1:
        words = [
            ptx.unsigned_min(*words[i : i + 2]) if i + 1 < len(words) else words[i] for i in range(0, len(words), 2)
        ]
    return words[0]


def combine(states: list, values: list) -> tuple:
    """Merge (maximum, sum) pairs and their vectors -> maximum, sum, vector, both unnormalised."""
    peak = states[0][0]
    for top, _ in states[1:]:
        peak = ptx.fmax(peak, top)
    weight = Float32(0.0)
    value = [Float32(0.0)] * len(values[0])
    for (top, part), vector in zip(states, values, strict=True):
        factor = ptx.exp2(top - peak)
        weight = weight + factor * part
        value = [a + factor * v for a, v in zip(value, vector, strict=True)]
    return peak, weight, value
