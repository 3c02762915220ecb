"""The constants of one decode kernel that follow from its KernelConfig: tiles, warps, shared-memory plan."""

from functools import cached_property

from .append_plan import VECTOR, AppendPlan
from .config import HOPPER_ARCHS
from .layouts import LANES, NUM_SLICES, TILE, block_format, token_rows

COLUMNS = 8  # of one MMA
LANE_COLUMNS = 2  # of these in a lane's accumulator
ROW_PAD = 4  # floats behind a row of the merge scratch: spreads the rows over banks, holds maximum and sum
SMEM_ALIGN = 128
BARRIER_BYTES = 8
QUERY_VECTOR = 16  # bytes
QUAD = 4  # floats of a 16-byte vector
WARM_BYTES = 128 << 10  # per SM, a third of L2 in all: what memory delivers between two kernels
# with twelve consumer warps a thread starts with 128 registers: 12 x 136 + 4 x 104 are all that an SM has, too
MOVING_WARPS, CONSUMER_REGISTERS, OTHERS_REGISTERS = 12, 136, 104
LATE_BYTES = 80 << 10  # what an SM reads in the two microseconds that some CTAs begin later than the others
# what an SM reads while it packs a block of K and V, and while it searches for its ranges, too
PACK_BYTES, SEARCH_BYTES = 256 << 10, 768 << 10
SLOTS = 2  # the next piece is prepared while the consumers are at a piece
PIECE_WORDS = 20  # of a Piece (work.py)
# warps that merge: with producer and up to 8 consumers a scheduler holds three warps, as without them, so they cost no
# registers
MERGE_WARPS = 3
ROWS_WARP = 1  # of them: appends new rows, and has nothing to do for the queries of 8 columns
FETCHES = 8  # of new rows, at once: K and V of 8 tokens at head_dim 128
# named barriers (0 is the CTA's): of the consumers, of the merge warps, and of the teams of warps that pack blocks
CONSUMER_BARRIER, MERGE_BARRIER, FIRST_TEAM_BARRIER = 1, 2, 3
MERGE_FLOATS = 72  # of partial results that a thread has in flight while merging: one round trip for 18 CTAs


class Plan:
    """Read-only; sizes in bytes where the name says so."""

    def __init__(self, config):
        quant = config.quant
        self.config = config
        self.quant = quant
        self.fmt = block_format(config.head_dim, quant)
        self.head_dim = config.head_dim
        self.tiles = config.head_dim // TILE
        self.hadamard = config.head_dim & -config.head_dim  # size of the transform
        self.q_tile = config.q_tile
        self.column_tiles = -(-config.q_tile // COLUMNS)
        self.copies = COLUMNS * self.column_tiles // config.q_tile  # of a query column in a tile
        self.lane_columns = LANE_COLUMNS // self.copies
        self.k_groups = config.head_dim // quant.k_group if quant.k_axis == "token" else 1  # along channels
        self.v_groups = config.head_dim // quant.v_group
        # log2 of the largest P: times any scale of V, at most 2^16 / (2^bits - 1), it is within fp16; and the larger P
        # is, the smaller may scales be before P * scale loses bits
        self.p_limit = quant.v_bits - 1
        self.bulk = config.copy == "bulk"
        # try_wait suspends the warp; before Hopper test_wait polls
        self.wait = "try_wait" if config.arch in HOPPER_ARCHS else "test_wait"
        self.programmatic = config.arch in HOPPER_ARCHS  # may start before the previous kernel of the stream ends
        self.stages = config.stages
        # blocks that are copied at once, when their stages are empty: a power of two, and a third of the ring at most
        self.blocks_at_once = 1 << (max(self.stages // 3, 1).bit_length() - 1) if self.bulk else 1
        self.warps = config.num_warps
        self.warps_per_block = config.warps_per_block
        self.block_groups = self.warps // self.warps_per_block  # blocks in work at once
        self.slices = NUM_SLICES // self.warps_per_block  # of a block, per warp
        # 16-bit tokens pass through the ring, as many at once as a stage holds: a tile to each warp of a group, or less
        tiles = self.fmt.block_bytes // (2 * token_rows(config.head_dim, TILE)(TILE, 0, 0))
        self.chunk_tiles = min(self.warps_per_block, tiles)
        self.chunk = TILE * self.chunk_tiles  # tokens of a 16-bit unit
        self.chunk_rows = token_rows(config.head_dim, self.chunk)
        self.rings_chunks = True
        self.steps = config.kind == "step"  # the kernel appends, too
        self.preparers = MERGE_WARPS - self.steps  # merge warps that tell of a piece or prepare its queries
        self.states = self.warps  # results of a piece that the CTA merges
        self.merge_floats = MERGE_FLOATS
        self.threads = LANES * (self.warps + 1 + MERGE_WARPS)  # consumers, producer, mergers

    # registers of a thread, where twelve warps compute: more than they would get by even shares (setmaxnreg)

    @cached_property
    def moves_registers(self) -> bool:
        return self.warps == MOVING_WARPS and self.config.arch == "sm90a" and self.config.ctas_per_sm == 1

    @cached_property
    def consumer_registers(self) -> int:
        return CONSUMER_REGISTERS

    @cached_property
    def auxiliary_registers(self) -> int:
        return OTHERS_REGISTERS

    # shared memory: ring | merge scratch | piece slots | first piece | barriers of the ring and of the scratch: full,
    # empty | barriers of the piece slots: full

    @cached_property
    def row_bytes(self) -> int:
        """A row of the merge scratch: one query column of one warp."""
        return (self.head_dim + ROW_PAD) * 4

    @cached_property
    def scratch_at(self) -> int:
        return self.stages * self.fmt.block_bytes

    @cached_property
    def slots_at(self) -> int:
        return self.scratch_at + self.warps * self.q_tile * self.row_bytes

    @cached_property
    def query_vectors(self) -> int:
        """A lane's vectors of a column tile: half of its channels' halves."""
        return self.head_dim * COLUMNS * 2 // LANES // QUERY_VECTOR

    @cached_property
    def factors_offset(self) -> int:
        """In a slot, behind the B operands."""
        return self.q_tile * self.copies * self.head_dim * 2

    @cached_property
    def highs_offset(self) -> int:
        return self.factors_offset + self.q_tile * 4

    @cached_property
    def piece_offset(self) -> int:
        return self.highs_offset + self.q_tile * 4

    @cached_property
    def slot_bytes(self) -> int:
        """What the consumers are told of a piece: its queries, and the Piece."""
        return self.piece_offset + PIECE_WORDS * 4

    @cached_property
    def first_piece_at(self) -> int:
        """The CTA's first Piece, whose partial results it may have to merge."""
        return self.slots_at + SLOTS * self.slot_bytes

    @cached_property
    def full_at(self) -> int:
        return self.first_piece_at + PIECE_WORDS * 4

    @cached_property
    def empty_at(self) -> int:
        return self.full_at + self.stages * BARRIER_BYTES

    @cached_property
    def merge_full_at(self) -> int:
        return self.empty_at + self.stages * BARRIER_BYTES

    @cached_property
    def merge_empty_at(self) -> int:
        return self.merge_full_at + BARRIER_BYTES

    @cached_property
    def slot_full_at(self) -> int:
        return self.merge_empty_at + BARRIER_BYTES

    @cached_property
    def rows_full_at(self) -> int:
        """Of a kernel that appends: as slot_full_at, of the pieces' new rows."""
        return self.slot_full_at + SLOTS * BARRIER_BYTES

    @cached_property
    def due_at(self) -> int:
        """Then a word that is not 0 if the CTA has a block to pack."""
        return self.rows_full_at + SLOTS * BARRIER_BYTES

    @cached_property
    def fetched_at(self) -> int:
        """Then room for new rows that are fetched: of each fetch a vector to a lane."""
        return -(-(self.due_at + VECTOR) // VECTOR) * VECTOR

    @cached_property
    def smem_bytes(self) -> int:
        end = self.rows_full_at
        if self.steps:
            end = self.fetched_at + FETCHES * LANES * VECTOR
        return -(-end // SMEM_ALIGN) * SMEM_ALIGN

    @cached_property
    def append(self) -> AppendPlan:
        """The plan of packing a block, in a kernel that appends."""
        return AppendPlan(self.config, FIRST_TEAM_BARRIER)

    @cached_property
    def teams(self) -> int:
        """How many teams of warps pack a block each, in the memory of the ring."""
        return min(self.warps // self.append.warps, self.scratch_at // self.append.smem_bytes)

    @cached_property
    def width(self) -> int:
        """Channels of a row that a thread merges: 4, or 8 so that a warp has the whole row."""
        return max(QUAD, self.head_dim // LANES)

    @cached_property
    def items(self) -> int:
        """Lanes that a row takes to merge: a power of two, so that a row is a single warp's."""
        return 1 << (self.head_dim // self.width - 1).bit_length()

    @cached_property
    def warm_blocks(self) -> int:
        """Blocks that a CTA brings into L2 before its turn."""
        return max(1, WARM_BYTES // self.fmt.block_bytes)

    @cached_property
    def late_units(self) -> int:
        return LATE_BYTES // self.fmt.block_bytes

    @cached_property
    def pack_units(self) -> int:
        """Units that packing a block of a piece counts for."""
        return PACK_BYTES // self.fmt.block_bytes

    @cached_property
    def search_units(self) -> int:
        """The same where K's or V's ranges are searched for."""
        return SEARCH_BYTES // self.fmt.block_bytes

    @cached_property
    def partial_bytes(self) -> int:
        """A partial result in the workspace: O [q_tile, head_dim], then (maximum, sum) [q_tile], fp32."""
        return self.q_tile * (self.head_dim + 2) * 4
