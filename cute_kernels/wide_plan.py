"""The constants of a wgmma kernel: teams of warpgroups, shared-memory plan.

A *team* is the one or two warpgroups that attend to a block for the same query columns. Score rows are dealt to it in
tiles of 64 tokens (token tile 2w + tile is that of warp w), O^T rows in tiles of 64 channels (channel tile 4 tile + w).
Teams differ in their blocks, or, where ``warps_per_block`` is more than a team, in their columns.
"""

from functools import cached_property

from .layouts import BLOCK_TOKENS, LANES
from .plan import BARRIER_BYTES, PIECE_WORDS, SLOTS, SMEM_ALIGN, Plan

GROUP_WARPS = 4  # of a warpgroup
M_TILE = 64  # rows of one wgmma
MAX_TEAM = 2  # warpgroups
MERGE_ROWS = 3  # that a warp merges at once, at most; 12 warps then take one turn for 32 rows
SCALED_COLUMNS = 16  # of queries, rows of an MMA; scaling more takes the folders longer than it saves the consumers
SCALED_SLOTS = 2  # of a team: one is filled while the other is read; a stage's would be held while V is worked on, too
AUXILIARY_WARPS = 4  # a producer and up to three folders; a warpgroup, for setmaxnreg
REGISTER_STEP = 8
SM_REGISTERS = 65536
# what they need at least, the second where they scale queries; the third with accumulators that leave no choice
AUXILIARY_REGISTERS, SCALING_REGISTERS, TIGHT_REGISTERS = 56, 104, 32
ALIGN = 16
PIECE_BYTES = 4 * PIECE_WORDS
HIGH_BYTES = 4  # of a query column's position behind the last key that it sees
SHARES_BYTES = 32  # the Shares (schedule.py), which the folders leave here
PIECES = 2  # that follow each other are kept, besides the first one


class WidePlan(Plan):
    """Read-only; sizes in bytes where the name says so."""

    moves_registers = True

    def __init__(self, config):
        super().__init__(config)
        groups = config.warps_per_block // GROUP_WARPS  # warpgroups at a block
        self.value_tiles = config.head_dim // M_TILE
        self.team_groups = min(MAX_TEAM, groups, self.value_tiles)
        self.team_warps = self.team_groups * GROUP_WARPS
        self.splits = groups // self.team_groups  # of the query columns
        self.teams = config.num_warps // self.team_warps
        self.columns = config.q_tile // self.splits  # of a team
        self.column_tiles = self.columns // 8
        self.score_tiles_per_group = BLOCK_TOKENS // M_TILE // self.team_groups
        self.value_tiles_per_group = self.value_tiles // self.team_groups
        self.chunk = BLOCK_TOKENS  # tokens of a 16-bit unit
        self.rings_chunks = False
        self.states = self.block_groups
        # warps that fold parameters, in turn (one would be the slowest of all); a stage is always the same one's, or
        # one could be a phase of its barrier ahead
        self.folders = next(n for n in (3, 2, 1) if self.block_groups % n == 0)
        self.auxiliaries = self.warps  # the first warp of the last warpgroup
        self.threads = LANES * (self.auxiliaries + AUXILIARY_WARPS)
        self.batch = 2  # k steps whose A registers are made before their wgmma are issued
        # codes of the next k steps are loaded before the registers of these are made, where registers allow
        self.ahead = self.columns * (3 - self.team_groups) <= (64 if self.warps <= 8 else 16)
        # where the tokens of a block share K's scales, the scales meet the queries: a block has its own operand
        per_channel = self.quant.k_axis == "channel" and self.quant.k_group == BLOCK_TOKENS
        per_channel = per_channel and self.quant.k_mean == "none"
        self.scales_queries = per_channel and self.columns == config.q_tile == SCALED_COLUMNS
        self.scaled_slots = SCALED_SLOTS * self.teams if self.scales_queries else 0
        # P is scaled per group of V; a group of less than an M tile's rows would need an operand per warp
        self.p_groups = self.v_groups

    @cached_property
    def merge_rows(self) -> int:
        """Items of as many rows that a thread merges at once."""
        parts = self.q_tile * self.items // LANES  # a warp's items
        return min(MERGE_ROWS, -(-parts // self.warps))

    # registers of a thread: what the CTA gets when it starts, and what setmaxnreg makes of it

    @cached_property
    def start_registers(self) -> int:
        return min(SM_REGISTERS // self.threads // REGISTER_STEP * REGISTER_STEP, 232)

    @cached_property
    def consumer_registers(self) -> int:
        groups = self.warps // GROUP_WARPS
        others = SCALING_REGISTERS if self.scales_queries else AUXILIARY_REGISTERS
        if groups > 3:
            others = TIGHT_REGISTERS
        return min((self.start_registers * (groups + 1) - others) // groups // REGISTER_STEP * REGISTER_STEP, 240)

    @cached_property
    def auxiliary_registers(self) -> int:
        groups = self.warps // GROUP_WARPS
        return self.start_registers * (groups + 1) - groups * self.consumer_registers

    # shared memory: as in Plan, with the folded parameters of the stages behind the ring, one slot (wide_queries.py,
    # then the Pieces) with barriers for ``full`` and ``empty`` and, behind the barriers, those that say ``ready`` (per
    # stage) and ``free`` (per team), and those of the slots of scaled queries; ``exchange``: of each team a float per
    # warp and column, then per column ``top`` and its last change; Shares; slots of scaled queries. The merge scratch
    # also holds P while a piece is worked on: a row per query column
    # has room for its P.

    @cached_property
    def folded_at(self) -> int:
        return self.stages * self.fmt.block_bytes

    @cached_property
    def scratch_at(self) -> int:
        return self.folded_at + self.stages * self.folded_bytes

    @cached_property
    def slots_at(self) -> int:
        return self.scratch_at + self.states * self.q_tile * self.row_bytes

    @cached_property
    def fetched_offset(self) -> int:
        """In the slot, behind the B operands."""
        return self.q_tile * self.head_dim * 2

    @cached_property
    def highs_offset(self) -> int:
        return self.fetched_offset + self.q_tile * self.head_dim * 2

    @cached_property
    def slot_bytes(self) -> int:
        return self.piece_offset + PIECES * PIECE_BYTES

    @cached_property
    def first_piece_at(self) -> int:
        return self.slots_at + self.slot_bytes

    @cached_property
    def slot_empty_at(self) -> int:
        return self.slot_full_at + BARRIER_BYTES

    @cached_property
    def ready_at(self) -> int:
        return self.slot_full_at + SLOTS * BARRIER_BYTES

    @cached_property
    def free_at(self) -> int:
        return self.ready_at + self.stages * BARRIER_BYTES

    @cached_property
    def scaled_free_at(self) -> int:
        return self.free_at + self.teams * BARRIER_BYTES

    @cached_property
    def exchange_at(self) -> int:
        return -(-(self.scaled_free_at + self.scaled_slots * BARRIER_BYTES) // ALIGN) * ALIGN

    @cached_property
    def shares_at(self) -> int:
        return self.exchange_at + self.teams * self.exchange_bytes

    @cached_property
    def top_offset(self) -> int:
        """In ``exchange``."""
        return self.team_warps * self.columns * 4

    @cached_property
    def exchange_bytes(self) -> int:
        return self.top_offset + 2 * self.columns * 4

    @cached_property
    def scaled_at(self) -> int:
        """Slots of scaled queries, operands of wgmma."""
        return self.shares_at + SHARES_BYTES

    @cached_property
    def scaled_bytes(self) -> int:
        return self.q_tile * self.head_dim * 2

    @cached_property
    def smem_bytes(self) -> int:
        end = self.scaled_at + self.scaled_slots * self.scaled_bytes
        return -(-end // SMEM_ALIGN) * SMEM_ALIGN

    # a stage's folded parameters, fp16 where not said otherwise:
    # factor f32 | K per channel: [token group][scale, offset][head_dim] in B order; where queries are scaled, of each
    #              column the bias of its scores, f32
    #            | K per token: [channel group][token] of (scale, scale, offset, offset), without the offset if codes
    #              are centred; mean [head_dim] in B order
    # | V: offset [channel group][token] in B order, scale f32 [channel group][token]

    @cached_property
    def folded_k_at(self) -> int:
        return ALIGN

    @cached_property
    def k_rows(self) -> int:
        """Groups of K along tokens."""
        return BLOCK_TOKENS // self.quant.k_group if self.quant.k_axis == "channel" else 1

    @cached_property
    def folded_mean_at(self) -> int:
        size = self.k_rows * 2 * self.head_dim * 2
        if self.quant.k_axis == "token":
            size = self.k_groups * BLOCK_TOKENS * 8
        elif self.scales_queries:
            size = self.q_tile * 4
        return self.folded_k_at + size

    @cached_property
    def keeps_mean(self) -> bool:
        """Whether K's mean is apart from its offsets."""
        return self.quant.k_axis == "token" and self.quant.k_mean == "block"

    @cached_property
    def centres_keys(self) -> bool:
        """Whether codes of K get their symmetric zero before scale and mean: as many instructions as adding zero and
        mean first, but the one rounding that fp16 needs instead of three.
        """
        return self.keeps_mean and self.quant.k_symmetric

    @cached_property
    def folded_v_offset_at(self) -> int:
        return self.folded_mean_at + (self.head_dim * 2 if self.keeps_mean else 0)

    @cached_property
    def folded_v_scale_at(self) -> int:
        return self.folded_v_offset_at + (0 if self.quant.v_symmetric else self.v_groups * BLOCK_TOKENS * 2)

    @cached_property
    def folded_bytes(self) -> int:
        return self.folded_v_scale_at + self.v_groups * BLOCK_TOKENS * 4

    @cached_property
    def p_group_stride(self) -> int:
        """Between P of one V group and the next, of a team's columns."""
        return self.columns * BLOCK_TOKENS * 2
