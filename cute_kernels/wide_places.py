"""Places of teams of warpgroups (wide_plan.py): what of a block, of folded parameters and of shared memory is whose.

Addresses and offsets that the loop over blocks needs are a Team, found once; the rest is found anew where it is needed,
rather than held in registers.
"""

from typing import NamedTuple

from cutlass import Int32, cute

from . import warpgroup as wg
from .layouts import BLOCK_TOKENS, LANES, SLICE_TOKENS, TILE, WORD_BITS
from .plan import BARRIER_BYTES
from .wide_plan import GROUP_WARPS, HIGH_BYTES, M_TILE, WidePlan

TEAM_BARRIER = 3  # named barriers from here on, one per team


class Team(NamedTuple):
    """What the loop over blocks needs of a warp's place; shared-memory addresses include the lane's part."""

    barrier: Int32  # the team's named barrier
    k_codes: Int32  # byte offsets within a stage
    k_shift: Int32  # bits
    v_codes: Int32
    v_shift: Int32
    k_folded: Int32  # byte offsets within a stage's folded parameters
    v_folded: Int32
    p_store: Int32  # address
    p_operand: Int32  # descriptor


class Place(NamedTuple):
    """The rest of it, found out anew where it is needed."""

    lane: Int32
    index: Int32  # of the team
    member: Int32  # warp of the team
    group: Int32  # warpgroup of the team
    row: Int32  # token of the lane's row g in its first score tile
    channel: Int32  # channel of the lane's row g in its first value tile
    results: Int32  # address of the team's rows in the merge scratch
    exchange: Int32  # address of the team's floats [warp][column], then ``top`` and its last change [column]


class WidePlaces:
    """The places of one kernel."""

    def __init__(self, plan: WidePlan):
        self.plan = plan
        self.fmt = plan.fmt
        self.p_layout = wg.operand_layout(plan.columns, BLOCK_TOKENS)  # (column, token) -> byte of P^T
        self.k_per_channel = plan.quant.k_axis == "channel"

    def team(self, smem: Int32, warp: Int32, lane: Int32) -> Team:
        plan, fmt = self.plan, self.fmt
        index = warp // plan.team_warps
        group, warp = self.group(warp), warp % GROUP_WARPS
        k, v = fmt.k_codes.layout, fmt.v_codes.layout
        # K: slice ``warp``, token tile ``group`` of it if there are two warpgroups
        k_codes = warp * (k(SLICE_TOKENS, 0) // 8) + lane * (k(0, 2) // 8)
        k_shift = Int32(0)
        if plan.team_groups == 2 and k(TILE, 0) >= WORD_BITS:
            k_codes += group * (k(TILE, 0) // 8)
        elif plan.team_groups == 2:
            k_shift = group * k(TILE, 0)
        # V: channel tile ``warp`` of the group's first M tile
        tile = group * (GROUP_WARPS * plan.value_tiles_per_group) + warp
        v_codes = lane * (v(2, 0) // 8)
        v_shift = Int32(0)
        for b in range((plan.tiles - 1).bit_length()):
            if v(0, TILE << b) >= WORD_BITS:
                v_codes += (tile >> b & 1) * (v(0, TILE << b) // 8)
            else:
                v_shift += (tile >> b & 1) * v(0, TILE << b)
        # folded parameters
        quad = (lane & 3) * 16
        k_folded = v_folded = quad
        row = self.row(warp, group, lane)
        if not self.k_per_channel:
            k_folded = row * 8
        elif plan.k_rows > 1:
            k_folded += (warp * SLICE_TOKENS) // plan.quant.k_group * (4 * plan.head_dim)
        if plan.v_groups > 1:
            v_folded += self.first_v_group(group) * (2 * fmt.v_scale.layout(1, 0))
        # P^T
        p = self.results(smem, index)
        matrix, row = lane >> 3, lane & 7
        k_step, column_step = self.p_layout(0, wg.CORE_DEPTH), self.p_layout(wg.CORE_ROWS, 0)
        p_store = p + (matrix & 1) * k_step + (matrix >> 1) * column_step + row * self.p_layout(1, 0)
        p_store += (warp * SLICE_TOKENS + group * TILE) // wg.CORE_DEPTH * k_step
        if plan.p_groups > 1:
            p += self.first_v_group(group) * plan.p_group_stride
        return Team(
            barrier=TEAM_BARRIER + index,
            k_codes=k_codes,
            k_shift=k_shift,
            v_codes=v_codes,
            v_shift=v_shift,
            k_folded=k_folded,
            v_folded=v_folded,
            p_store=p_store,
            p_operand=wg.descriptor(cute.arch.make_warp_uniform(p), plan.column_tiles),
        )

    def queries(self, team: Team, at: Int32) -> Int32:
        """B descriptor of the team's columns of the operand at ``at``."""
        plan = self.plan
        if plan.splits > 1:
            at += (team.barrier - TEAM_BARRIER) % plan.splits * (plan.columns * plan.head_dim * 2)
        return wg.uniform(wg.descriptor(at, plan.column_tiles))

    def bias(self, folded: Int32) -> Int32:
        """Address of what is added to the scores of a lane's columns of a block."""
        return folded + self.plan.folded_k_at + (wg.thread_again() & 3) * 8

    def place(self, smem: Int32) -> Place:
        plan = self.plan
        thread = wg.thread_again()
        lane, warp = thread % LANES, thread // LANES
        index, member, group = warp // plan.team_warps, warp % plan.team_warps, self.group(warp)
        channel = (group * (GROUP_WARPS * plan.value_tiles_per_group) + warp % GROUP_WARPS) * TILE + (lane >> 2)
        return Place(
            lane=lane,
            index=index,
            member=member,
            group=group,
            row=self.row(warp % GROUP_WARPS, group, lane),
            channel=channel,
            results=self.results(smem, index),
            exchange=smem + plan.exchange_at + index * plan.exchange_bytes,
        )

    def highs(self, smem: Int32, place: Place) -> Int32:
        """Address of the positions behind the last keys that columns 2q and 2q + 1 of the team see."""
        first = place.index % self.plan.splits * self.plan.columns
        column = first + (place.lane & 3) * 2
        return smem + (self.plan.slots_at + self.plan.highs_offset) + column * HIGH_BYTES

    def top(self, smem: Int32, team: Team) -> Int32:
        """Address of the lane's part of ``top``; found anew, as the next ones, to hold no register for it."""
        team_at = self.plan.exchange_at + self.plan.top_offset - TEAM_BARRIER * self.plan.exchange_bytes
        return smem + team_at + wg.pin([team.barrier])[0] * self.plan.exchange_bytes + (wg.thread_again() & 3) * 8

    def row_again(self) -> Int32:
        """Token of the lane's row g in its first score tile."""
        thread = wg.thread_again()
        return self.row(thread // LANES % GROUP_WARPS, self.group(thread // LANES), thread % LANES)

    def free(self, smem: Int32, team: Team) -> Int32:
        """The mbarrier that says that the team's P may be overwritten; as such."""
        return smem + self.plan.free_at + (wg.pin([team.barrier])[0] - TEAM_BARRIER) * BARRIER_BYTES

    def group(self, warp: Int32) -> Int32:
        """Warpgroup of the team."""
        return warp % self.plan.team_warps // GROUP_WARPS if self.plan.team_groups > 1 else Int32(0)

    def row(self, warp: Int32, group: Int32, lane: Int32) -> Int32:
        return warp * SLICE_TOKENS + group * TILE + (lane >> 2)

    def first_v_group(self, group: Int32) -> Int32:
        """V group of a warpgroup's first M tile."""
        return group * (self.plan.value_tiles_per_group * M_TILE) // self.plan.quant.v_group

    def results(self, smem: Int32, index: Int32) -> Int32:
        """A team's rows in the merge scratch, where P lies until the piece is finished."""
        plan = self.plan
        block_group, split = index // plan.splits, index % plan.splits
        return smem + plan.scratch_at + (block_group * plan.q_tile + split * plan.columns) * plan.row_bytes
