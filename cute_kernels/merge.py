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
from .plan import BARRIER_BYTES, COLUMNS, MERGE_WARPS, Plan
from .queries import LOG2E, Queries, hadamard_lanes, hadamard_registers
from .schedule import Params, Piece, Place, Schedule, Sequence, Shares, load_piece, store_piece

QUAD = 4  # channels of a 16-byte vector
CONSUMER_BARRIER, MERGE_BARRIER = 1, 2
WORKSPACE_ALIGN = 128


class Merge:
    """Merging in one kernel."""

    def __init__(self, plan: Plan, schedule: Schedule):
        self.plan = plan
        self.schedule = schedule
        self.queries = Queries(plan)
        # an item, one thread's part of a row: 4 channels, or 8 so that a warp has the whole row
        self.width = max(QUAD, plan.head_dim // LANES)
        self.items = plan.head_dim // self.width

    @cute.jit
    def merge_pieces(self, p: Params, smem: Int32, warp: Int32, lane: Int32, at: Place, end: Int32, shares: Shares):
        """The merge warps' work on units [at.x, end): all pieces are prepared, all but the last merged here."""
        parity = Int32(0)
        slot = Int32(0)
        seq = self.schedule.sequence(p, at.b)
        count = self.prepare(p, smem, slot, warp, lane, at, end, seq, shares)
        while at.x + count < end:
            at = self.schedule.next_piece(p, at, seq.units, count)
            seq = self.schedule.sequence(p, at.b)
            ptx.barrier(MERGE_BARRIER, MERGE_WARPS * LANES)  # all of them have read the slot's piece
            count = self.prepare(p, smem, slot ^ 1, warp, lane, at, end, seq, shares)
            ptx.mbarrier_wait(smem + self.plan.merge_full_at, parity, self.plan.wait)
            before = load_piece(self.slot(smem, slot) + self.plan.piece_offset)
            self.merge(p, smem, warp, lane, before, False)
            parity = parity ^ 1
            slot = slot ^ 1

    @cute.jit
    def prepare(
        self,
        p: Params,
        smem: Int32,
        slot: Int32,
        warp: Int32,
        lane: Int32,
        at: Place,
        end: Int32,
        seq: Sequence,
        shares: Shares,
    ):
        """Fill a slot -> units of the piece. The consumers have handed over the piece that it held."""
        piece = self.schedule.piece(p, at, end, seq, shares)
        address = self.slot(smem, slot)
        if (warp == 0) & (lane == 0):
            store_piece(address + self.plan.piece_offset, piece)
        self.queries.prepare(p, address, warp, lane, piece, seq.length)
        cute.arch.sync_warp()
        if lane == 0:
            ptx.mbarrier_arrive(smem + self.plan.slot_full_at + slot * BARRIER_BYTES)
        return piece.count

    def slot(self, smem: Int32, slot: Int32) -> Int32:
        return smem + self.plan.slots_at + slot * self.plan.slot_bytes

    @cute.jit
    def merge_last(self, p: Params, smem: Int32, warp: Int32, lane: Int32, piece: Piece):
        """Merge a CTA's last piece, by its consumer warps: they are more, and have nothing else to do."""
        ptx.barrier(CONSUMER_BARRIER, self.plan.warps * LANES)
        self.merge(p, smem, warp, lane, piece, True)

    @cute.jit
    def merge(self, p: Params, smem: Int32, warp: Int32, lane: Int32, piece: Piece, last: bool):
        """Merge the warps' states; store the output of a whole piece, else a partial result; maybe merge those.

        Called by the merge warps, or for the CTA's last piece by the consumers.
        """
        warps = self.plan.warps if last else MERGE_WARPS
        shares = Shares(piece.base, piece.extra)
        columns = cutlass.min(p.group * p.q_len - piece.first_row, self.plan.q_tile)
        whole = piece.count == piece.units
        slots = p.workspace.toint() + self.counter_bytes(p)
        # the first of a CTA's pieces has its first slot
        cta = cute.arch.block_idx()[0]
        slot = 2 * cta + cutlass.select_(piece.x == shares.start(cta), Int32(0), Int32(1))
        mine = slots + Int64(slot) * self.plan.partial_bytes
        first_item = warp * LANES
        while first_item < columns * self.items:
            column, item, inside = self.item(first_item + lane, columns)
            row = smem + self.plan.scratch_at + column * self.plan.row_bytes
            step = self.plan.q_tile * self.plan.row_bytes
            offsets = [w * step for w in range(self.plan.states)]
            states = [ptx.load_shared_floats(row, offset + 4 * self.plan.head_dim, 2) for offset in offsets]
            values = [self.load_values(row + item * (4 * self.width), offset) for offset in offsets]
            peak, weight, value = combine(states, values)
            if whole:
                self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
            elif inside:
                for i in range_constexpr(0, self.width, QUAD):
                    ptx.store_global(mine + self.value_at(column, item), value[i : i + QUAD], 4 * i)
                if item == 0:
                    ptx.store_global(mine + self.state_at(column), [peak, weight])
            first_item += warps * LANES
        if cutlass.const_expr(not last):
            cute.arch.sync_warp()
            if lane == 0:
                ptx.mbarrier_arrive(smem + self.plan.merge_empty_at)
        if piece.count != piece.units:
            first_unit = piece.x - piece.unit
            first, last_cta = shares.holder(first_unit), shares.holder(first_unit + piece.units - 1)
            if self.arrives_last(p, smem, warp, lane, piece, last_cta - first, last) == 1:
                # the piece is not the first one of its first CTA, unless that CTA starts with it
                first_slot = cutlass.select_(shares.start(first) == first_unit, Int32(0), Int32(1))
                first_item = warp * LANES
                while first_item < columns * self.items:
                    column, item, inside = self.item(first_item + lane, columns)
                    peak, weight, value = self.combine_slots(slots, first, last_cta, first_slot, column, item)
                    self.store_output(p, piece, lane, column, item, inside, peak, weight, value)
                    first_item += warps * LANES

    def item(self, index: Int32, columns: Int32) -> tuple:
        """(column, item of its row, whether it exists); beyond the last column all lanes stay, for the shuffles."""
        column = index // self.items
        return cutlass.min(column, columns - 1), index - column * self.items, column < columns

    def load_values(self, address: Int32, offset: int) -> list:
        """An item's values of a row in shared memory."""
        vectors = [ptx.load_shared_floats(address, offset + 4 * i, QUAD) for i in range(0, self.width, QUAD)]
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
    def arrives_last(self, p: Params, smem: Int32, warp: Int32, lane: Int32, piece: Piece, others: Int32, last: bool):
        """1 in all calling warps if the ``others`` CTAs of the piece have stored their results, else 0."""
        flag = smem + self.plan.flag_at + (4 if last else 0)
        barrier, warps = (CONSUMER_BARRIER, self.plan.warps) if last else (MERGE_BARRIER, MERGE_WARPS)
        ptx.barrier(barrier, warps * LANES)
        if (warp == 0) & (lane == 0):
            index = (piece.b * p.num_kv_heads + piece.head) * p.q_tiles + piece.first_row // self.plan.q_tile
            counter = p.workspace.toint() + Int64(index) * 4
            is_last = cutlass.select_(ptx.atomic_add(counter, Int32(1)) == others, Int32(1), Int32(0))
            if is_last == 1:
                ptx.store_global(counter, [Int32(0)])  # ready for the next launch
            ptx.store_shared(flag, 0, [ptx.from_bits(is_last)])
        ptx.barrier(barrier, warps * LANES)
        return ptx.load_shared(flag, 0, 1)[0]

    @cute.jit
    def combine_slots(self, slots: Int64, first: Int32, last: Int32, first_slot: Int32, column: Int32, item: Int32):
        """Merge the partial results of CTAs first..last, in this order, some of them at a time."""
        batch = self.plan.merge_floats // self.width
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * self.width
        cta = first
        while cta <= last:
            states, values = [[peak, weight]], [value]
            for i in range_constexpr(batch):
                source = cutlass.min(cta + i, last)
                slot = (
                    slots
                    + Int64(2 * source + cutlass.select_(source == first, first_slot, Int32(0)))
                    * self.plan.partial_bytes
                )
                top, share = ptx.load_global(slot + self.state_at(column), 2, cache="cg")
                vectors = [
                    ptx.load_global(slot + self.value_at(column, item), QUAD, 4 * j, cache="cg")
                    for j in range(0, self.width, QUAD)
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
            masks = [1 << i for i in range((size // self.width).bit_length() - 1)]
            value = hadamard_lanes(hadamard_registers(value, self.width), masks, lane)
            inverse = inverse * size**-0.5
        value = [v * inverse for v in value]
        pairs = list(zip(value[::2], value[1::2], strict=True))
        packed = [ptx.to_half2(*pair) for pair in pairs]
        if p.bfloat16 == 1:
            packed = [ptx.to_bfloat2(*pair) for pair in pairs]
        at = Int64(piece.b * p.q_len + token) * p.num_q_heads + q_head
        target = p.out.toint() + at * (2 * self.plan.head_dim) + Int64(item) * (2 * self.width)
        if inside:
            ptx.store_global(target, packed)
            if (p.lse.toint() != 0) & (item == 0):
                ptx.store_global(p.lse.toint() + at * 4, [(peak + ptx.log2(weight)) * (1.0 / LOG2E)])

    # -- the workspace: counters, then slots of O [q_tile, head_dim] and (maximum, sum) [q_tile], fp32 ---------------

    def counter_bytes(self, p: Params) -> Int64:
        count = p.batch * p.num_kv_heads * p.q_tiles
        return Int64((count * 4 + WORKSPACE_ALIGN - 1) // WORKSPACE_ALIGN * WORKSPACE_ALIGN)

    def value_at(self, column: Int32, item: Int32) -> Int64:
        return Int64(column * self.plan.head_dim + item * self.width) * 4

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
