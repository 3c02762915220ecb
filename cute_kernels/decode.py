"""Decode attention over BitFusion blocks with mma.sync: one launch for any batch of ragged sequences.

producer warp   walks the CTA's share of the work list (schedule.py) and copies each block into a ring of
                shared-memory stages: one bulk copy per block, cp.async before Hopper; "full" and "empty"
                mbarriers hand the stages over
consumer warps  in groups of ``warps_per_block``; a group takes every n-th block, a warp its token slices
                (attention.py), alone with its own running maximum:
    Q' = Q * scale_k              once per token group (K per channel)
    S^T = codes_k Q' + bias       A = codes as fp16 denormals, one AND per register; the bias comes out of MMAs
                                  with the zeros as rows of A; the powers of two leave with the accumulator
    P = exp2(S - maximum)         rescaled only when the maximum grows by more than a factor of 2
    O^T += codes_v (P * scale_v)  P transposed by movmatrix; the zeros again by MMAs
16-bit tokens   sinks and tail: the same MMAs with K and V from global memory
end of a piece  warps merge through shared memory, CTAs through the workspace, by the last arriver (merge.py)
"""

import cutlass
from cutlass import Int32, cute, range_constexpr
from cutlass.cute.runtime import make_ptr

from . import ptx
from .attention import Attention
from .layouts import BLOCK_TOKENS, LANES
from .merge import Merge, Part
from .plan import BARRIER_BYTES, Plan
from .schedule import Params, Place, Schedule, Shares

COPY_BYTES = 16  # of one cp.async
MAX_WINDOW = 1 << 30  # more than any length; positions minus a window stay within 32 bits


class DecodeKernel:
    """The kernel of one KernelConfig, and the host function that the DSL compiles."""

    def __init__(self, config):
        self.plan = Plan(config)
        self.schedule = Schedule(self.plan)
        self.attention = Attention(self.plan)
        self.merge = Merge(self.plan, self.schedule)

    @cute.jit
    def __call__(self, p: Params, grid: Int32):
        self.kernel(p).launch(
            grid=(grid, 1, 1),
            block=(self.plan.threads, 1, 1),
            smem=self.plan.smem_bytes,
            min_blocks_per_mp=self.plan.config.ctas_per_sm,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, p: Params):
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // LANES)
        lane = thread % LANES
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        if thread == 0:
            for stage in range_constexpr(self.plan.stages):
                ptx.mbarrier_init(smem + (self.plan.full_at + BARRIER_BYTES * stage), 1 if self.plan.bulk else LANES)
                ptx.mbarrier_init(smem + (self.plan.empty_at + BARRIER_BYTES * stage), self.plan.warps_per_block)
            if cutlass.const_expr(self.plan.bulk):
                ptx.fence_mbarrier_init()
        cute.arch.sync_threads()

        p = p._replace(window=cutlass.min(p.window, MAX_WINDOW))
        units = self.schedule.total_units(p, lane) * (p.num_kv_heads * self.schedule.q_tiles(p))
        ctas = cute.arch.grid_dim()[0]
        shares = Shares(units // ctas, units % ctas)
        cta = cute.arch.block_idx()[0]
        x, end = shares.start(cta), shares.start(cta + 1)
        if x < end:
            at = self.schedule.locate(p, x, lane)
            if warp == self.plan.warps:
                self.produce(p, smem, lane, at, end)
            else:
                self.consume(p, smem, warp, lane, at, end, shares)

    # -- producer ----------------------------------------------------------------------------------------------

    @cute.jit
    def produce(self, p: Params, smem: Int32, lane: Int32, at: Place, end: Int32):
        """Copy the blocks of units [at.x, end) into the ring."""
        stage = Int32(0)
        parity = Int32(1)  # the first round finds every stage empty
        while at.x < end:
            seq = self.schedule.sequence(p, at.b)
            count = cutlass.min(end - at.x, seq.units - at.unit)
            blocks = cutlass.min(at.unit + count, seq.blocks) - at.unit
            head = p.pages.toint() + cutlass.Int64(at.piece // self.schedule.q_tiles(p)) * p.head_stride
            table = p.block_table.toint() + (cutlass.Int64(at.b) * p.max_pages + seq.first_block + at.unit) * 4
            page = Int32(0)
            i = Int32(0)
            while i < blocks:
                if i % LANES == 0:  # the next table entries, one per lane
                    page = ptx.load_global(table + cutlass.Int64(cutlass.min(i + lane, blocks - 1)) * 4)[0]
                source = head + cutlass.Int64(ptx.shuffle(page, i % LANES)) * p.page_stride
                self.copy_block(smem, source, stage, parity, lane)
                stage += 1
                if stage == self.plan.stages:
                    stage = Int32(0)
                    parity = parity ^ 1
                i += 1
            at = self.schedule.next_piece(p, at, seq.units, count)

    @cute.jit
    def copy_block(self, smem: Int32, source: cutlass.Int64, stage: Int32, parity: Int32, lane: Int32):
        full = smem + self.plan.full_at + stage * BARRIER_BYTES
        empty = smem + self.plan.empty_at + stage * BARRIER_BYTES
        nbytes = self.plan.fmt.block_bytes
        target = smem + stage * nbytes
        if cutlass.const_expr(self.plan.bulk):
            if lane == 0:
                ptx.mbarrier_wait(empty, parity, self.plan.wait)
                ptx.mbarrier_expect(full, nbytes)
                ptx.bulk_copy(target, source, nbytes, full)
        else:
            ptx.mbarrier_wait(empty, parity, self.plan.wait)
            target += lane * COPY_BYTES
            source += cutlass.Int64(lane) * COPY_BYTES
            row = LANES * COPY_BYTES
            for i in range_constexpr(nbytes // row):
                ptx.copy16(target, source, i * row)
            if cutlass.const_expr(nbytes % row != 0):
                if lane * COPY_BYTES < nbytes % row:
                    ptx.copy16(target, source, nbytes // row * row)
            ptx.mbarrier_arrive_after_copies(full)

    # -- consumers ---------------------------------------------------------------------------------------------

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32, at: Place, end: Int32, shares: Shares):
        """Attend over units [at.x, end): blocks from the ring, 16-bit units from global memory; merge each piece."""
        plan = self.plan
        x0 = at.x
        group = warp // plan.warps_per_block
        member = warp % plan.warps_per_block
        block = group  # the group's next block, counted over the share; its stage and the parity of its round
        stage = group
        parity = Int32(0)
        ring = Int32(0)  # blocks of the share before this piece
        while at.x < end:
            seq = self.schedule.sequence(p, at.b)
            count = cutlass.min(end - at.x, seq.units - at.unit)
            q_tiles = self.schedule.q_tiles(p)
            head = at.piece // q_tiles
            first_row = (at.piece - head * q_tiles) * plan.q_tile
            query = self.attention.load_queries(p, lane, at.b, head, first_row, seq)
            state = self.attention.first_state()

            ring_end = ring + cutlass.max(cutlass.min(at.unit + count, seq.blocks) - at.unit, 0)
            packed_end = seq.sinks + seq.packed
            seen_by_all = cutlass.min(packed_end, seq.length - p.q_len + 1)  # the positions below it
            first_position = seq.sinks + (seq.first_block + at.unit - ring) * BLOCK_TOKENS
            while block < ring_end:
                position = first_position + block * BLOCK_TOKENS
                general = (
                    (position + BLOCK_TOKENS > seen_by_all) | (position < seq.length - p.window) | (p.softcap > 0.0)
                )
                addresses = self.attention.addresses(smem + stage * plan.fmt.block_bytes, member, lane)
                position += member * (BLOCK_TOKENS // plan.warps_per_block)
                ptx.mbarrier_wait(smem + plan.full_at + stage * BARRIER_BYTES, parity, plan.wait)
                if general:
                    state = self.attention.attend_block(p, addresses, position, packed_end, lane, query, state, True)
                else:
                    state = self.attention.attend_block(p, addresses, position, packed_end, lane, query, state, False)
                cute.arch.sync_warp()
                if lane == 0:
                    ptx.mbarrier_arrive(smem + plan.empty_at + stage * BARRIER_BYTES)
                block += plan.block_groups
                stage += plan.block_groups
                if stage >= plan.stages:
                    stage -= plan.stages
                    parity = parity ^ 1
            state = self.attention.finished(state)
            chunk = cutlass.max(at.unit - seq.blocks, 0) + group
            while chunk < at.unit + count - seq.blocks:
                state = self.attention.attend_chunk(p, seq, chunk, member, lane, at.b, head, query, state)
                chunk += plan.block_groups
            part = Part(at, count, seq.units, head, first_row)
            self.merge.merge(p, smem, warp, lane, part, x0, shares, state)
            ring = ring_end
            at = self.schedule.next_piece(p, at, seq.units, count)


def example_params() -> Params:
    """Arguments of the right types, for compiling."""

    def pointer(dtype: type) -> cute.Pointer:
        return make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=16)

    types = {"block_table": Int32, "seqlens": Int32, "packed_lens": Int32, "sink_logits": cutlass.Float32}
    types["lse"] = cutlass.Float32
    values = []
    for name, kind in Params.__annotations__.items():
        values.append(pointer(types.get(name, cutlass.Uint8)) if kind is cute.Pointer else kind(1))
    return Params(*values)
