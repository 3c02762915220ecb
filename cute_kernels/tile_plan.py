"""The constants of a wgmma kernel with dequantised tiles (tiles.py): warps, registers, shared-memory plan."""

from functools import cached_property

from .config import MIN_TILE_COLUMNS
from .layouts import BLOCK_TOKENS, LANES, NUM_SLICES
from .plan import BARRIER_BYTES, SMEM_ALIGN, Plan
from .wide_plan import AUXILIARY_WARPS, GROUP_WARPS, M_TILE, WidePlan

WRITER_WARPS = NUM_SLICES  # of K, and as many of V, of which each writes a slice
TILE_STAGES = 2  # of K and V in fp16
PARAMS_WORDS = 4  # of a tile: factor, exponent of V's unit, padding
PREFETCHING_BYTES = 96  # of a token's codes; with more, another stage of the ring is worth more
STATE_BYTES = 8  # maximum and sum of a row
PROGRESS_BYTES = 8
MERGE_ROWS = 2  # that a warp merges at once; four are no faster
# registers of a thread, 640 threads in all; consumers: scores and O; the last warpgroup has the rest
ALL_REGISTERS = 480
CONSUMER_REGISTERS = 168
WRITER_REGISTERS, MORE_WRITER_REGISTERS = 40, 48  # more: for parameters of several groups, or of 2-bit codes


class TilePlan(WidePlan):
    """Read-only; sizes in bytes where the name says so."""

    def __init__(self, config):
        super().__init__(config)
        self.groups = self.warps // GROUP_WARPS  # consumer warpgroups
        self.states = self.block_groups  # results of a piece that the CTA merges
        self.folders = next(n for n in (3, 2, 1) if self.stages % n == 0)
        self.auxiliaries = self.warps + 2 * WRITER_WARPS
        self.threads = LANES * (self.auxiliaries + AUXILIARY_WARPS)
        self.key_columns = BLOCK_TOKENS // 8  # core matrices of K along its n: tokens
        self.value_columns = self.head_dim // 8  # of V^T: channels
        self.columns = M_TILE  # of queries that are an operand
        self.column_tiles = M_TILE // 8
        self.scales_queries, self.scaled_slots = False, 0
        # whether there is room for the next piece's queries besides the operand
        token_bytes = self.head_dim * (self.quant.k_bits + self.quant.v_bits) // 8
        self.prefetches = self.q_tile == M_TILE and token_bytes <= PREFETCHING_BYTES

    @cached_property
    def merge_rows(self) -> int:
        return MERGE_ROWS

    @cached_property
    def consumer_registers(self) -> int:
        return CONSUMER_REGISTERS

    @cached_property
    def k_registers(self) -> int:
        more = self.quant.k_bits == 2 or self.quant.k_axis == "token" or self.k_rows > 1
        return MORE_WRITER_REGISTERS if more else WRITER_REGISTERS

    @cached_property
    def v_registers(self) -> int:
        return MORE_WRITER_REGISTERS if self.quant.v_bits == 2 else WRITER_REGISTERS

    @cached_property
    def auxiliary_registers(self) -> int:
        return ALL_REGISTERS - self.groups * self.consumer_registers - self.k_registers - self.v_registers

    # shared memory: ring | folded parameters | tiles [stage][K, V^T] | slot as in WidePlan | first Piece | barriers
    # as in WidePlan, then of the tiles: K and V, full and empty | tile parameters | places and states of results
    # | progress | Shares

    @cached_property
    def tiles_at(self) -> int:
        return -(-(self.folded_at + self.stages * self.folded_bytes) // SMEM_ALIGN) * SMEM_ALIGN

    @cached_property
    def tile_bytes(self) -> int:
        """Of K, or V^T; also of the results of 64 rows, which take its place."""
        return BLOCK_TOKENS * self.head_dim * 2

    @cached_property
    def result_row_bytes(self) -> int:
        return self.tile_bytes // M_TILE

    @cached_property
    def slots_at(self) -> int:
        return self.tiles_at + TILE_STAGES * 2 * self.tile_bytes

    @cached_property
    def operand_bytes(self) -> int:
        """Of all queries as A operands."""
        return self.q_tile * self.head_dim * 2

    @cached_property
    def fetched_offset(self) -> int:
        return self.operand_bytes if self.prefetches else 0

    @cached_property
    def highs_offset(self) -> int:
        return self.fetched_offset + self.operand_bytes

    @cached_property
    def tile_barriers_at(self) -> int:
        """[K full, K empty, V full, V empty][tile stage]."""
        return self.ready_at + self.stages * BARRIER_BYTES

    @cached_property
    def tile_params_at(self) -> int:
        end = self.tile_barriers_at + 4 * TILE_STAGES * BARRIER_BYTES
        return -(-end // 16) * 16

    @cached_property
    def places_at(self) -> int:
        """Addresses of the results, one per state."""
        return self.tile_params_at + TILE_STAGES * 4 * PARAMS_WORDS

    @cached_property
    def sums_at(self) -> int:
        """[state][row] of maximum, sum."""
        return self.places_at + 16

    @cached_property
    def progress_at(self) -> int:
        """[consumer warp] of its piece and the next unit of it."""
        return self.sums_at + self.states * self.q_tile * STATE_BYTES

    @cached_property
    def shares_at(self) -> int:
        return self.progress_at + self.warps * PROGRESS_BYTES

    # a stage's folded parameters: factor f32, exponent of V's unit f32 | K as in WidePlan
    # | V: multiplier, offset [channel group][token] in B order

    @cached_property
    def folded_v_multiplier_at(self) -> int:
        return self.folded_mean_at + (self.head_dim * 2 if self.keeps_mean else 0)

    @cached_property
    def folded_v_offset_at(self) -> int:
        return self.folded_v_multiplier_at + self.v_groups * BLOCK_TOKENS * 2

    @cached_property
    def folded_bytes(self) -> int:
        return self.folded_v_offset_at + self.v_groups * BLOCK_TOKENS * 2


def decode_plan(config) -> Plan:
    """The plan of a decode kernel."""
    if config.mma != "wgmma":
        return Plan(config)
    return TilePlan(config) if config.q_tile >= MIN_TILE_COLUMNS else WidePlan(config)
