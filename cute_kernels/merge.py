"""Merging of partial results: warps of a CTA through shared memory, CTAs of a piece by the one that arrives last.

Merge warps do it, so that the consumers go on with the next piece as soon as their results are in the scratch; the
consumers do it for the last piece of their CTA.
A CTA has at most two unfinished pieces, its first and its last, so two workspace slots per CTA suffice. A piece's
partial results are merged in the order of the CTAs whoever does it: results are deterministic.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .attention import FIRST_MAX, State
from .layouts import LANES, TILE
from .plan import BARRIER_BYTES, COLUMNS, MERGE_WARPS, QUAD, SLOTS, Plan
from .queries import LOG2E, Queries, hadamard_lanes, hadamard_registers
from .schedule import Params, Piece, Place, Schedule, Sequence, Shares, load_piece, store_piece

CONSUMER_BARRIER, MERGE_BARRIER = 1, 2
WORKSPACE_ALIGN = 128


class Merge:
    """Merging in one kernel."""

    def __init__(self, plan: Plan, schedule: Schedule):
        self.plan = plan
        self.schedule = schedule
        self.queries = Queries(plan)

    @cute.jit
    def work(self, p: Params, smem: Int32, warp: Int32, lane: Int32, slot: Int32):
        """The merge warps prepare all pieces of the CTA's share, and merge all but the last.

        The last is merged by the consumers, which find it in ``slot``: they are more, and have nothing else to do.
        """
        helper = warp - (self.plan.warps + 1)  # of the merge warps; negative: a consumer
        # no select: ptxas 12 has computed one of these anew in the loop, from a predicate that had changed meanwhile
        of_consumers = ptx.sign_mask(helper)
        team = MERGE_WARPS + (of_consumers & (self.plan.warps - MERGE_WARPS))
        member = (warp & of_consumers) | (helper & ~of_consumers)
        at, end, seq, shares = Place(*[slot] * 5), slot, Sequence(*[slot] * 8), Shares(slot, slot)
        filled = Int32(1)  # a piece's results are there, or will be: in this round there is one to merge
        if helper >= 0:
            at, end, seq, shares = self.schedule.begin(
                p, lane, lambda *share: self.store_piece(p, self.slot(smem, Int32(0)), helper, lane, share)
            )
            slot = Int32(SLOTS - 1)
            filled = Int32(0)
        parity = Int32(0)
        more = Int32(1)
        while more == 1:
            more = Int32(0)
            if helper >= 0:
                other = slot ^ 1
                if filled == 1:
                    ptx.barrier(MERGE_BARRIER, MERGE_WARPS * LANES)  # all of them have read what the other slot held
                    self.store_piece(p, self.slot(smem, other), helper, lane, (at, end, seq, shares))
                head, first_row = self.schedule.tile(p, at)
                self.queries.prepare(p, self.slot(smem, other), helper, lane, at.b, head, first_row, seq.length)
                ptx.mbarrier_arrive(smem + self.plan.slot_full_at + other * BARRIER_BYTES)
                if filled == 1:
                    ptx.mbarrier_wait(smem + self.plan.merge_full_at, parity, self.plan.wait)
                    parity = parity ^ 1
                count = self.schedule.count(at, end, seq)
                if at.x + count < end:
                    more = Int32(1)
                    at = self.schedule.next_piece(p, at, seq.units, count)
            if filled == 1:
                piece = load_piece(self.slot(smem, slot) + self.plan.piece_offset)
                self.merge(p, smem, member, team, lane, piece)
                if helper >= 0:
                    ptx.mbarrier_arrive(smem + self.plan.merge_empty_at)
            filled = Int32(1)
            slot = slot ^ 1
            if more == 1:
                seq = self.schedule.sequence(p, at.b)  # not earlier: merging needs the registers

    @cute.jit
    def store_piece(self, p: Params, slot: Int32, helper: Int32, lane: Int32, share: tuple):
        """Tell the consumers of the piece at (Place, end, Sequence, Shares)."""
        if (helper == MERGE_WARPS - 1) & (lane == 0):  # the merge warp with the fewest queries
            store_piece(slot + self.plan.piece_offset, self.schedule.piece(p, *share))

    def slot(self, smem: Int32, slot: Int32) -> Int32:
        return smem + self.plan.slots_at + slot * self.plan.slot_bytes

    @cute.jit
    def merge(self, p: Params, smem: Int32, member: Int32, team: Int32, lane: Int32, piece: Piece):
        """Merge the results of the CTA's warps; store the output of a whole piece, else a partial result, and the
        output where those of the other CTAs are there already. Warps of the team take turns at the parts of the tile.
        """
        slots = p.workspace.toint() + self.counter_bytes(p)
        part = member
        while part * LANES < piece.columns * self.plan.items:
            column, item, inside = self.item(part * LANES + lane, piece.columns)
            row = smem + self.plan.scratch_at + column * self.plan.row_bytes
            step = self.plan.q_tile * self.plan.row_bytes
            offsets = [w * step for w in range(self.plan.states)]
            states = [ptx.load_shared_floats(row, offset + 4 * self.plan.head_dim, 2) for offset in offsets]
            values = [self.load_values(row + item * (4 * self.plan.width), offset) for offset in offsets]
            peak, weight, value = combine(states, values)
            complete = Int32(1)
            if piece.ctas > 1:
                if inside:
                    mine = slots + Int64(piece.slot) * self.plan.partial_bytes
                    for i in range_constexpr(0, self.plan.width, QUAD):
                        ptx.store_global(mine + self.value_at(column, item), value[i : i + QUAD], 4 * i)
                    if item == 0:
                        ptx.store_global(mine + self.state_at(column), [peak, weight])
                complete = Int32(0)
                if self.arrives_last(p, lane, piece, part) == 1:
                    complete = Int32(1)
                    peak, weight, value = self.combine_slots(slots, piece, column, item)
            if complete == 1:
                self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            part += team

    def item(self, index: Int32, columns: Int32) -> tuple:
        """(column, item of its row, whether it exists); beyond the last column all lanes stay, for the shuffles."""
        column = index // self.plan.items
        return cutlass.min(column, columns - 1), index - column * self.plan.items, column < columns

    def load_values(self, address: Int32, offset: int) -> list:
        """An item's values of a row in shared memory."""
        vectors = [ptx.load_shared_floats(address, offset + 4 * i, QUAD) for i in range(0, self.plan.width, QUAD)]
        return [x for vector in vectors for x in vector]

    @cute.jit
    def store_state(self, smem: Int32, warp: Int32, lane: Int32, state: State):
        """Warp results to the scratch: rows [warp][column] of head_dim floats of O, maximum, sum."""
        mine = smem + self.plan.scratch_at + warp * (self.plan.q_tile * self.plan.row_bytes)
        for n in range_constexpr(self.plan.column_tiles):
            for j in range_constexpr(2):
                row = mine + (n * COLUMNS + (lane & 3) * 2 + j) * self.plan.row_bytes
                for c in range_constexpr(self.plan.tiles):
                    for r in range_constexpr(2):
                        ptx.store_shared(row + (lane >> 2) * 4, 4 * (TILE * c + 8 * r), [state.out[n][c][2 * r + j]])
                if lane < 4:
                    ptx.store_shared(row, 4 * self.plan.head_dim, [state.top[n][j], state.total[n][j]])

    @cute.jit
    def arrives_last(self, p: Params, lane: Int32, piece: Piece, part: Int32):
        """1 in all lanes if the other CTAs of the piece have stored their results of this part, else 0."""
        cute.arch.sync_warp()
        is_last = Int32(0)
        if lane == 0:
            counter = p.workspace.toint() + Int64(piece.index * self.plan.merge_parts + part) * 4
            if ptx.atomic_add(counter, Int32(1)) == piece.ctas - 1:
                is_last = Int32(1)
                ptx.store_global(counter, [Int32(0)])  # ready for the next launch
        cute.arch.sync_warp()
        return ptx.shuffle(is_last, 0)

    @cute.jit
    def combine_slots(self, slots: Int64, piece: Piece, column: Int32, item: Int32):
        """Merge the partial results of a piece's CTAs, in their order, some of them at a time."""
        batch = self.plan.merge_floats // self.plan.width
        last = piece.first_cta + piece.ctas - 1
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * self.plan.width
        cta = piece.first_cta
        while cta <= last:
            states, values = [[peak, weight]], [value]
            for i in range_constexpr(batch):
                source = cutlass.min(cta + i, last)
                # a CTA that is not the first one has the piece in its first slot
                slot = cutlass.select_(source == piece.first_cta, piece.first_slot, 2 * source)
                slot = slots + Int64(slot) * self.plan.partial_bytes
                top, share = ptx.load_global(slot + self.state_at(column), 2, cache="cg")
                vectors = [
                    ptx.load_global(slot + self.value_at(column, item), QUAD, 4 * j, cache="cg")
                    for j in range(0, self.plan.width, QUAD)
                ]
                top = cutlass.select_(cta + i <= last, ptx.from_bits(top), Float32(-float("inf")))
                states.append([top, ptx.from_bits(share)])
                values.append([ptx.from_bits(v) for vector in vectors for v in vector])
            peak, weight, value = combine(states, values)
            cta += batch
        return peak, weight, value

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
            masks = [1 << i for i in range((size // self.plan.width).bit_length() - 1)]
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

    # -- the workspace: counters, then slots of O [q_tile, head_dim] and (maximum, sum) [q_tile], fp32 ---------------

    def counter_bytes(self, p: Params) -> Int64:
        count = p.batch * p.num_kv_heads * p.q_tiles * self.plan.merge_parts
        return Int64((count * 4 + WORKSPACE_ALIGN - 1) // WORKSPACE_ALIGN * WORKSPACE_ALIGN)

    def value_at(self, column: Int32, item: Int32) -> Int64:
        return Int64(column * self.plan.head_dim + item * self.plan.width) * 4

    def state_at(self, column: Int32) -> Int64:
        return Int64(self.plan.q_tile * self.plan.head_dim + column * 2) * 4


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
