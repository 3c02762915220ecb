"""Merging of partial results: warps of a CTA through shared memory, CTAs of a piece by the one that arrives last.

A CTA has at most two unfinished pieces, its first and its last, so two workspace slots per CTA suffice. A piece's
partial results are merged in the order of the CTAs whoever does it: results are deterministic.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .attention import FIRST_MAX, LOG2E, State
from .layouts import LANES, TILE
from .plan import COLUMNS, Plan
from .schedule import Params, Place, Schedule, Shares

MERGE_BATCH = 8  # partial results that a thread has in flight while merging
QUAD = 4  # channels of one thread's item
CONSUMER_BARRIER = 1
WORKSPACE_ALIGN = 128


class Part(NamedTuple):
    """What this CTA has of a piece."""

    at: Place
    count: Int32  # units
    units: Int32  # of the whole piece
    head: Int32
    first_row: Int32


class Merge:
    """Merging in one kernel; called by all consumer warps."""

    def __init__(self, plan: Plan, schedule: Schedule):
        self.plan = plan
        self.schedule = schedule
        self.consumers = plan.warps * LANES
        self.quads = plan.head_dim // QUAD

    @cute.jit
    def merge(
        self, p: Params, smem: Int32, warp: Int32, lane: Int32, part: Part, x0: Int32, shares: Shares, state: State
    ):
        """Merge the warps' states; store the output of a whole piece, else a partial result; maybe merge those."""
        self.store_state(smem, warp, lane, state)
        ptx.barrier(CONSUMER_BARRIER, self.consumers)
        columns = cutlass.min(p.num_q_heads // p.num_kv_heads * p.q_len - part.first_row, self.plan.q_tile)
        whole = part.count == part.units
        slots = p.workspace.toint() + self.counter_bytes(p)
        # the first of a CTA's pieces has its first slot
        slot = 2 * cute.arch.block_idx()[0] + cutlass.select_(part.at.x == x0, Int32(0), Int32(1))
        mine = slots + Int64(slot) * self.plan.slot_bytes
        item = warp * LANES + lane
        while item < columns * self.quads:
            column = item // self.quads
            quad = item - column * self.quads
            row = smem + self.plan.scratch_at + column * self.plan.row_bytes
            step = self.plan.q_tile * self.plan.row_bytes
            warps = range(self.plan.warps)
            states = [ptx.load_shared_floats(row, w * step + 4 * self.plan.head_dim, 2) for w in warps]
            values = [ptx.load_shared_floats(row + quad * (4 * QUAD), w * step, QUAD) for w in warps]
            peak, weight, value = combine(states, values)
            if whole:
                self.store_output(p, part, column, quad, peak, weight, value)
            else:
                ptx.store_global(mine + self.value_at(column, quad), value)
                if quad == 0:
                    ptx.store_global(mine + self.state_at(column), [peak, weight])
            item += self.consumers
        ptx.barrier(CONSUMER_BARRIER, self.consumers)
        if part.count != part.units:
            first_unit = part.at.x - part.at.unit
            first, last = shares.holder(first_unit), shares.holder(first_unit + part.units - 1)
            if self.arrives_last(p, smem, warp, lane, part, last - first) == 1:
                # the piece is not the first one of its first CTA, unless that CTA starts with it
                first_slot = cutlass.select_(shares.start(first) == first_unit, Int32(0), Int32(1))
                item = warp * LANES + lane
                while item < columns * self.quads:
                    column = item // self.quads
                    quad = item - column * self.quads
                    peak, weight, value = self.combine_slots(slots, first, last, first_slot, column, quad)
                    self.store_output(p, part, column, quad, peak, weight, value)
                    item += self.consumers

    @cute.jit
    def store_state(self, smem: Int32, warp: Int32, lane: Int32, state: State):
        """Warp results to the scratch: rows [warp][column] of head_dim floats of O, maximum, sum."""
        mine = smem + self.plan.scratch_at + warp * (self.plan.q_tile * self.plan.row_bytes)
        for n in range_constexpr(self.plan.column_tiles):
            for j in range_constexpr(2):
                row = mine + (n * COLUMNS + (lane & 3) * 2 + j) * self.plan.row_bytes
                for c in range_constexpr(self.plan.tiles):
                    for r in range_constexpr(2):
                        ptx.store_shared_floats(
                            row + (lane >> 2) * 4, 4 * (TILE * c + 8 * r), [state.out[n][c][2 * r + j]]
                        )
                if lane < 4:
                    ptx.store_shared_floats(row, 4 * self.plan.head_dim, [state.top[n][j], state.total[n][j]])

    @cute.jit
    def arrives_last(self, p: Params, smem: Int32, warp: Int32, lane: Int32, part: Part, others: Int32):
        """1 in all consumers if the ``others`` CTAs of the piece have stored their results, else 0."""
        flag = smem + self.plan.flag_at
        if (warp == 0) & (lane == 0):
            index = (part.at.b * p.num_kv_heads + part.head) * self.schedule.q_tiles(
                p
            ) + part.first_row // self.plan.q_tile
            counter = p.workspace.toint() + Int64(index) * 4
            is_last = cutlass.select_(ptx.atomic_add(counter, Int32(1)) == others, Int32(1), Int32(0))
            if is_last == 1:
                ptx.store_global(counter, [Int32(0)])  # ready for the next launch
            ptx.store_shared_floats(flag, 0, [ptx.from_bits(is_last)])
        ptx.barrier(CONSUMER_BARRIER, self.consumers)
        return ptx.load_shared(flag, 0, 1)[0]

    @cute.jit
    def combine_slots(self, slots: Int64, first: Int32, last: Int32, first_slot: Int32, column: Int32, quad: Int32):
        """Merge the partial results of CTAs first..last, in this order, MERGE_BATCH at a time."""
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * QUAD
        cta = first
        while cta <= last:
            states, values = [[peak, weight]], [value]
            for i in range_constexpr(MERGE_BATCH):
                source = cutlass.min(cta + i, last)
                slot = (
                    slots
                    + Int64(2 * source + cutlass.select_(source == first, first_slot, Int32(0))) * self.plan.slot_bytes
                )
                top, part = ptx.load_global(slot + self.state_at(column), 2, cache="cg")
                vector = ptx.load_global(slot + self.value_at(column, quad), QUAD, cache="cg")
                top = cutlass.select_(cta + i <= last, ptx.from_bits(top), Float32(-float("inf")))
                states.append([top, ptx.from_bits(part)])
                values.append([ptx.from_bits(v) for v in vector])
            peak, weight, value = combine(states, values)
            cta += MERGE_BATCH
        return peak, weight, value

    @cute.jit
    def store_output(
        self, p: Params, part: Part, column: Int32, quad: Int32, peak: Float32, weight: Float32, value: list
    ):
        """Normalise and store 4 channels of one query row; no visible key gives zeros and an lse of -inf."""
        group = p.num_q_heads // p.num_kv_heads
        row = part.first_row + column
        token = row // group
        q_head = part.head * group + row - token * group
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
        value = [v * inverse for v in value]
        packed = [ptx.to_half2(value[0], value[1]), ptx.to_half2(value[2], value[3])]
        if p.bfloat16 == 1:
            packed = [ptx.to_bfloat2(value[0], value[1]), ptx.to_bfloat2(value[2], value[3])]
        at = Int64(part.at.b * p.q_len + token) * p.num_q_heads + q_head
        target = p.out.toint() + at * (2 * self.plan.head_dim) + Int64(quad) * (2 * QUAD)
        ptx.store_global(target, packed)
        if (p.lse.toint() != 0) & (quad == 0):
            ptx.store_global(p.lse.toint() + at * 4, [(peak + ptx.log2(weight)) * (1.0 / LOG2E)])

    # -- the workspace: counters, then slots of O [q_tile, head_dim] and (maximum, sum) [q_tile], fp32 ---------------

    def counter_bytes(self, p: Params) -> Int64:
        count = p.batch * p.num_kv_heads * self.schedule.q_tiles(p)
        return Int64((count * 4 + WORKSPACE_ALIGN - 1) // WORKSPACE_ALIGN * WORKSPACE_ALIGN)

    def value_at(self, column: Int32, quad: Int32) -> Int64:
        return Int64(column * self.plan.head_dim + quad * QUAD) * 4

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
