"""The constants of one decode kernel that follow from its KernelConfig: tiles, warps, shared-memory plan."""

from functools import cached_property

from .config import HOPPER_ARCHS
from .layouts import LANES, NUM_SLICES, TILE, block_format

COLUMNS = 8  # query columns of one MMA
ROW_PAD = 4  # floats behind a row of the merge scratch: spreads the rows over banks, holds maximum and sum
SMEM_ALIGN = 128
BARRIER_BYTES = 8
FLAG_BYTES = 16


class Plan:
    """Read-only; sizes in bytes where the name says so."""

    def __init__(self, config):
        quant = config.quant
        self.config = config
        self.quant = quant
        self.fmt = block_format(config.head_dim, quant)
        self.head_dim = config.head_dim
        self.tiles = config.head_dim // TILE
        self.q_tile = config.q_tile
        self.column_tiles = config.q_tile // COLUMNS
        self.k_groups = config.head_dim // quant.k_group if quant.k_axis == "token" else 1  # along channels
        self.v_groups = config.head_dim // quant.v_group
        self.bulk = config.copy == "bulk"
        # try_wait suspends the warp; before Hopper test_wait polls
        self.wait = "try_wait" if config.arch in HOPPER_ARCHS else "test_wait"
        self.stages = config.stages
        self.warps = config.num_warps
        self.warps_per_block = config.warps_per_block
        self.block_groups = self.warps // self.warps_per_block  # blocks in work at once
        self.slices = NUM_SLICES // self.warps_per_block  # of a block, per warp
        self.chunk = TILE * self.warps_per_block  # tokens of a 16-bit unit
        self.threads = LANES * (self.warps + 1)  # and the producer

    # shared memory: ring | merge scratch | full barriers | empty barriers | last-arriver flag

    @cached_property
    def row_bytes(self) -> int:
        """A row of the merge scratch: one query column of one warp."""
        return (self.head_dim + ROW_PAD) * 4

    @cached_property
    def scratch_at(self) -> int:
        return self.stages * self.fmt.block_bytes

    @cached_property
    def full_at(self) -> int:
        return self.scratch_at + self.warps * self.q_tile * self.row_bytes

    @cached_property
    def empty_at(self) -> int:
        return self.full_at + self.stages * BARRIER_BYTES

    @cached_property
    def flag_at(self) -> int:
        return self.empty_at + self.stages * BARRIER_BYTES

    @cached_property
    def smem_bytes(self) -> int:
        return -(-(self.flag_at + FLAG_BYTES) // SMEM_ALIGN) * SMEM_ALIGN

    @cached_property
    def slot_bytes(self) -> int:
        """A partial result in the workspace: O [q_tile, head_dim], then (maximum, sum) [q_tile], fp32."""
        return self.q_tile * (self.head_dim + 2) * 4
