"""The constants of one append kernel that follow from its KernelConfig: threads, shared-memory plan."""

from functools import cached_property

from .config import HOPPER_ARCHS
from .layouts import BLOCK_TOKENS, LANES, NUM_SLICES, block_format

VECTOR = 16  # bytes of the widest access
ROW_LANES = 4  # that share a row of 16-bit values
WARP_ROWS = LANES // ROW_LANES  # of a warp at once
ROW_PAD = 16  # bytes behind a row in shared memory: its vectors and the next row's are in other banks
JOB_BYTES = 64  # of a Job (append_work.py)
COUNTER_BYTES = 128  # from a sequence's counter to the next: in other parts of L2, so that they count at the same time
SMEM_ALIGN = 128
MAX_CTAS = 5  # that are to fit on an SM by their registers, if they do by their shared memory
MAX_CTAS_OF_96 = 4  # channels: with registers for five some formats would hold 8 bytes in local memory
SM_SMEM = 228 * 1024  # of Hopper, and what every CTA takes besides its own
CTA_SMEM = 1024


class AppendPlan:
    """The constants of one kernel; read-only.

    barrier: None, or where several teams of ``threads`` of a CTA pack a block each, the first of their named barriers.
    """

    def __init__(self, config, barrier: int | None = None):
        self.barrier = barrier
        self.config, self.quant = config, config.quant
        self.fmt = block_format(config.head_dim, config.quant)
        self.head_dim = config.head_dim
        self.hadamard = config.head_dim & -config.head_dim  # size of the transform
        self.vectors = 2 * config.head_dim // (VECTOR * ROW_LANES)  # of a row, a lane's
        # few rows are *spread* over as many lanes as they have vectors, or so that these are a power of two
        self.row_vectors = 2 * config.head_dim // VECTOR
        self.spread_lanes = 1 << (self.row_vectors - 1).bit_length()
        self.spread_rows = LANES // self.spread_lanes
        self.warps = NUM_SLICES
        self.threads = LANES * self.warps
        self.rows_at_once = WARP_ROWS * self.warps
        self.programmatic = config.arch in HOPPER_ARCHS
        self.row_bytes = 2 * config.head_dim + ROW_PAD

    # shared memory: rows [128][row_bytes] | image of the sections of parameters, of K or V | 1 / scale | jobs

    @cached_property
    def image_at(self) -> int:
        return BLOCK_TOKENS * self.row_bytes

    @cached_property
    def image_bytes(self) -> dict:
        """From an operand's scales to the end of its part of the block."""
        fmt = self.fmt
        return {"k": fmt.v_codes.offset - fmt.k_scale.offset, "v": fmt.block_bytes - fmt.v_scale.offset}

    @cached_property
    def inverse_at(self) -> int:
        return self.image_at + max(self.image_bytes.values())

    @cached_property
    def jobs_at(self) -> int:
        return self.inverse_at + 2 * max(self.fmt.k_scale.nbytes, self.fmt.v_scale.nbytes)  # fp32 for fp16

    @cached_property
    def smem_bytes(self) -> int:
        return -(-(self.jobs_at + self.warps * JOB_BYTES) // SMEM_ALIGN) * SMEM_ALIGN

    @cached_property
    def ctas_per_sm(self) -> int:
        most = MAX_CTAS_OF_96 if self.head_dim == 96 else MAX_CTAS
        return min(most, SM_SMEM // (self.smem_bytes + CTA_SMEM))
