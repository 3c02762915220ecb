"""A step in one launch: the decode kernel that appends its query tokens' keys and values, and attends to them.

Attention is that of a decode after these tokens have been appended, but before full blocks are packed.
    merge warps     put the new rows of a piece to sinks and tail, rotated if need be, for the producer to copy
    consumers       when their results are on their way, pack the full blocks of the pieces that end in their CTA: a
                    team of four warps an operand, by append.py, in the memory of the ring; then the tail moves up
    any warp        that is the last to have read the lengths advances them; so far they are those of before
The CTA that packs attends to all 16-bit tokens of the piece, so no other reads its tail, and gets less other work
(schedule.py).
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute

from . import append_work, ptx, work
from .append import AppendKernel
from .append_plan import VECTOR
from .append_work import OPERANDS, Item, Job, load_job, store_job
from .layouts import BLOCK_SHIFT, BLOCK_TOKENS, LANES
from .plan import CONSUMER_BARRIER, FETCHES, Plan
from .schedule import Schedule
from .work import Piece, blocks_due, load_piece

COUNTED = 2  # by a CTA: its producer, and its other warps
# The parameters of decode, those of append that it lacks, and where is counted: i32, zero between launches. The order
# is the launch ABI of the C++ core.
_FIELDS = work.Params.__annotations__ | append_work.Params.__annotations__ | {"counter": cute.Pointer}
Params = NamedTuple("Params", list(_FIELDS.items()))


class Step:
    """Appending in one kernel of kind "step"."""

    def __init__(self, plan: Plan, schedule: Schedule):
        self.plan, self.schedule = plan, schedule
        self.append = AppendKernel(plan.config, plan.append)

    # -- new rows ----------------------------------------------------------------------------------------------

    # Of K and V in turn: row x is token x // 2 of operand x % 2. They are spread over the lanes (append.py).

    def lane_row(self, p: Params, lane: Int32, first: Int32) -> tuple:
        """(token, operand) of the lane's row from row ``first`` on, of the last one beyond it; whether it exists."""
        x, last = first + self.append.spread(lane)[0], p.q_len * OPERANDS - 1
        exists, x = x <= last, cutlass.min(x, last)
        return x // OPERANDS, x % OPERANDS, exists

    @cute.jit
    def fetch_rows(self, p: Params, smem: Int32, lane: Int32, b: Int32, head: Int32, first: Int32):
        """Begin to copy a piece's new rows from row ``first`` on to shared memory, as many as fit."""
        _, part, _ = self.append.spread(lane)
        ptx.wait_for_copies()  # they may be other rows, for the same place
        end = cutlass.min(first + FETCHES * self.append.plan.spread_rows, p.q_len * OPERANDS)
        place = smem + self.plan.fetched_at + lane * VECTOR
        for at in cutlass.range(first, end, self.append.plan.spread_rows, unroll=1):
            token, operand, _ = self.lane_row(p, lane, at)
            item = Item(b=b, head=head, operand=operand, share=Int32(0))
            ptx.copy16(place, self.append.new_row(p, item, token) + Int64(part), 0)
            place += LANES * VECTOR

    @cute.jit
    def keep_rows(self, p: Params, smem: Int32, lane: Int32, piece: Piece):
        """Put the new rows of a piece, of which the first were fetched, to sinks and tail, by one warp, if this CTA
        attends to one of them.
        """
        sinks = cutlass.min(piece.packed_end + piece.tail - p.q_len, p.num_sink)  # tokens in the sinks before
        to_sink = piece.sinks - sinks
        old = piece.tail + to_sink - p.q_len  # tokens in the tail before
        attended = (piece.end_chunk - piece.sink_chunks) * self.plan.chunk  # of the tail
        attends = (piece.end_chunk > piece.first_chunk) & ((attended > old) | (to_sink > 0))
        if (piece.columns > 0) & attends & (old >= 0):  # it is, unless lengths are inconsistent
            rows, step = p.q_len * OPERANDS, self.append.plan.spread_rows
            place = smem + self.plan.fetched_at + lane * VECTOR
            at = place
            for first in cutlass.range(0, rows, step, unroll=1):
                if (at == place) & (first > 0):
                    self.fetch_rows(p, smem, lane, piece.b, piece.head, first)
                ptx.wait_for_copies()
                token, operand, exists = self.lane_row(p, lane, first)
                job = self.job(piece.b, piece.head, operand, sinks, to_sink, old)
                self.append.keep_spread(p, job, token, exists, ptx.load_shared(at, 0, 4), lane)
                at += LANES * VECTOR
                if at == place + FETCHES * LANES * VECTOR:
                    at = place

    def job(
        self, b: Int32, head: Int32, operand: Int32, sinks: Int32, to_sink: Int32, old: Int32, column=0, blocks=0
    ) -> Job:
        """What append.py needs to know; with blocks to pack, all of the tail is old."""
        zero = Int32(0)
        return Job(
            b=b, head=head, operand=operand, start=zero, sinks=sinks, to_sink=to_sink, old=old, total=old,
            blocks=Int32(blocks), column=Int32(column), first=zero, end=zero, copies=old - blocks * BLOCK_TOKENS,
            length=zero, todo=zero, any=zero,
        )  # fmt: skip

    # -- full blocks -------------------------------------------------------------------------------------------

    @cute.jit
    def has_pages(self, p: Params, b: Int32, column: Int32, blocks: Int32):
        """1: the entries of the table for so many blocks name pages."""
        found = Int32(1)
        for i in cutlass.range(blocks, unroll=1):
            if self.append.page(p, b, column + i) < 0:
                found = Int32(0)
        return found

    @cute.jit
    def pack(self, p: Params, smem: Int32, warp: Int32, lane: Int32, last_at: Int32):
        """Pack the full blocks of the pieces that end in this CTA, by all consumers; then count."""
        plan = self.append.plan
        ptx.barrier(CONSUMER_BARRIER, self.plan.warps * LANES)  # they are through with the ring
        first, last = load_piece(smem + self.plan.first_piece_at), load_piece(last_at)
        ends = cutlass.select_((last.ctas == 1) | (last.collects == 1), Int32(1), Int32(0))
        team, member = warp // plan.warps, warp % plan.warps
        at = smem + team * plan.smem_bytes
        place = self.append.place(at, member, lane)
        kept = p._replace(rotate_k=Int32(0), rotate_v=Int32(0))  # as the tail is, already
        skipped = cutlass.select_(first.columns > 0, Int32(0), Int32(1))  # another CTA has its end
        x = (first.b * p.num_kv_heads + first.head + skipped) * OPERANDS + team
        end = (last.b * p.num_kv_heads + last.head + ends) * OPERANDS
        if team >= self.plan.teams:
            end = x
        while x < end:
            piece = x // OPERANDS
            b = piece // p.num_kv_heads
            seq = self.schedule.sequence(p, b)
            blocks, column = blocks_due(p, seq.tail), seq.packed >> BLOCK_SHIFT
            if (blocks > 0) & (self.has_pages(p, b, column, blocks) == 1):
                ptx.sync_team(plan.barrier, plan.threads)  # the job before is done
                if (member == 0) & (lane == 0):
                    head = piece - b * p.num_kv_heads
                    operand = x - piece * OPERANDS
                    zero = Int32(0)
                    store_job(at + plan.jobs_at, self.job(b, head, operand, zero, zero, seq.tail, column, blocks))
                ptx.sync_team(plan.barrier, plan.threads)
                block = Int32(0)
                while block < load_job(at + plan.jobs_at).blocks:
                    self.append.pack(kept, at, place, member, lane, at + plan.jobs_at, block)
                    block += 1
                self.append.copy(kept, place, member, lane, load_job(at + plan.jobs_at))
            x += self.plan.teams
        ptx.barrier(CONSUMER_BARRIER, self.plan.warps * LANES)  # nobody reads lengths any more
        if warp == 0:
            self.count(p, lane)

    # -- lengths -----------------------------------------------------------------------------------------------

    @cute.jit
    def count(self, p: Params, lane: Int32):
        """Count a CTA's producer, or its other warps, as needing no lengths any more; the last one advances them."""
        before = Int32(0)
        if lane == 0:
            before = ptx.atomic_add(p.counter.toint(), Int32(1))
        if ptx.shuffle(before, 0) == COUNTED * cute.arch.grid_dim()[0] - 1:
            if lane == 0:
                ptx.store_relaxed(p.counter.toint(), [Int32(0)])  # ready for the next launch
            b = lane
            while b < p.batch:
                self.advance(p, b)
                b += LANES

    @cute.jit
    def advance(self, p: Params, b: Int32):
        """Advance the lengths of a sequence, unless it had no page for a block: then it stays as it was."""
        seq = self.schedule.sequence(p, b)
        blocks, column = blocks_due(p, seq.tail), seq.packed >> BLOCK_SHIFT
        if self.has_pages(p, b, column, blocks) == 1:
            at = Int64(b) * 4
            ptx.store_relaxed(p.seqlens.toint() + at, [seq.length])
            ptx.store_relaxed(p.packed_lens.toint() + at, [(column + blocks) * BLOCK_TOKENS])
        elif p.status.toint() != 0:
            ptx.atomic_max(p.status.toint(), b + 1)
