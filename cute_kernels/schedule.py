"""How decode attention's work is dealt to CTAs: a flat list of units, walked from the lengths on the device.

A *piece* is one (sequence, KV head, query tile); a *unit* is a 128-token block of a piece or, after the blocks,
a chunk of its 16-bit tokens (sinks, then tail). Units are ordered by sequence, piece, unit; every CTA takes an
equal run of them, so neither the grid nor the balance depends on how ragged the batch is.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .layouts import BLOCK_TOKENS, LANES
from .plan import Plan

BLOCK_SHIFT = BLOCK_TOKENS.bit_length() - 1
TABLE_LINE = 32  # entries of the block table in a line of 128 bytes


class Params(NamedTuple):
    """The flat kernel parameters; shapes in elements. The order is the launch ABI of the C++ core."""

    q: cute.Pointer  # 16 bit [batch, q_len, num_q_heads, head_dim]
    pages: cute.Pointer  # u8 [num_pages, num_kv_heads, block_bytes], strides below
    block_table: cute.Pointer  # i32 [batch, max_pages]
    seqlens: cute.Pointer  # i32 [batch]
    packed_lens: cute.Pointer  # i32 [batch] or null
    tail_k: cute.Pointer  # 16 bit [batch, tail_capacity, num_kv_heads, head_dim]
    tail_v: cute.Pointer
    sink_k: cute.Pointer  # 16 bit [batch, num_sink, num_kv_heads, head_dim]
    sink_v: cute.Pointer
    sink_logits: cute.Pointer  # f32 [num_q_heads] or null
    out: cute.Pointer  # like q
    lse: cute.Pointer  # f32 [batch, q_len, num_q_heads] or null
    workspace: cute.Pointer  # counters i32 [batch, num_kv_heads, q_tiles], then partial results
    page_stride: Int64  # bytes
    head_stride: Int64  # bytes
    batch: Int32
    q_len: Int32
    num_q_heads: Int32
    num_kv_heads: Int32
    max_pages: Int32
    tail_capacity: Int32
    num_sink: Int32
    window: Int32
    softmax_scale_log2: Float32
    softcap: Float32  # 0: none
    bfloat16: Int32  # 1: q, out, tail and sinks are bf16; 0: fp16
    rotate_q: Int32  # 1: q goes through a Hadamard transform (the cache's keys did)
    rotate_out: Int32  # 1: the output goes through a Hadamard transform (the cache's values did)
    group: Int32  # num_q_heads / num_kv_heads
    q_tiles: Int32  # tiles of query columns of a KV head


class Sequence(NamedTuple):
    """What the walk knows of one sequence."""

    length: Int32
    sinks: Int32  # tokens in the sink buffers
    packed: Int32  # tokens in blocks
    tail: Int32  # tokens in the tail
    first_block: Int32  # blocks before it are outside every query's window
    blocks: Int32  # blocks to read
    sink_units: Int32
    units: Int32  # of one piece; at least one, so that empty sequences are written too


class Shares(NamedTuple):
    """The flat list dealt to the CTAs: each gets ``base`` units, the first ``extra`` CTAs one more."""

    base: Int32
    extra: Int32

    def start(self, cta: Int32) -> Int32:
        return cta * self.base + cutlass.min(cta, self.extra)

    def holder(self, x: Int32) -> Int32:
        """The CTA that has unit x."""
        longer = self.extra * (self.base + 1)
        late = self.extra + (x - longer) // cutlass.max(self.base, 1)
        return cutlass.select_(x < longer, x // (self.base + 1), late)


class Place(NamedTuple):
    """A position in the list: unit x is unit ``unit`` of piece ``piece`` of sequence ``b``."""

    x: Int32
    b: Int32
    start: Int32  # index of the sequence's first unit
    piece: Int32  # q tile + q_tiles * KV head
    unit: Int32


class Piece(NamedTuple):
    """What a CTA does of a piece. The merge warps find it out; consumers read it from shared memory, field by field
    when they need it, and so hold few registers.
    """

    blocks: Int32  # to take from the ring
    first_position: Int32  # of their first token
    packed_end: Int32  # position behind the sequence's packed tokens
    seen_by_all: Int32  # positions below it are visible to every query, up to ..
    window_start: Int32  # .. the window of the newest one
    b: Int32
    head: Int32  # KV head
    first_row: Int32  # of the query tile
    first_chunk: Int32  # 16-bit chunks first_chunk .. end_chunk - 1; sinks come first
    end_chunk: Int32
    sink_chunks: Int32
    sinks: Int32  # tokens
    tail: Int32  # tokens
    x: Int32  # place of the first unit in the list, and within the piece
    unit: Int32
    count: Int32  # units of this CTA
    units: Int32  # of the piece
    is_last: Int32  # 1: the CTA's last
    base: Int32  # Shares
    extra: Int32


def store_piece(address: Int32, piece: Piece) -> None:
    """Write a Piece to shared memory."""
    for i in range(0, len(piece), 4):
        ptx.store_shared(address, 4 * i, list(piece[i : i + 4]))


def load_piece(address: Int32) -> Piece:
    return Piece(*[word for i in range(0, len(Piece._fields), 4) for word in ptx.load_shared(address, 4 * i, 4)])


class Schedule:
    """Walks the list of units of one kernel."""

    def __init__(self, plan: Plan):
        self.chunk = plan.chunk
        self.q_tile = plan.q_tile

    @cute.jit
    def prefetch_table(self, p: Params):
        """Start fetching the block table, a line per thread of the grid, while the lengths are on their way."""
        thread = cute.arch.block_idx()[0] * cute.arch.block_dim()[0] + cute.arch.thread_idx()[0]
        if thread * TABLE_LINE < p.batch * p.max_pages:
            ptx.prefetch(p.block_table.toint() + Int64(thread) * (4 * TABLE_LINE))

    @cute.jit
    def sequence(self, p: Params, b: Int32):
        """Units of sequence b. Lengths are clamped to what the buffers hold, so that no read leaves them."""
        length = cutlass.max(ptx.load_global(p.seqlens.toint() + Int64(b) * 4)[0], 0)
        sinks = cutlass.min(length, p.num_sink)
        rest = length - sinks
        packed = rest
        if p.tail_capacity > 0:
            packed = (rest >> BLOCK_SHIFT) << BLOCK_SHIFT
        if p.packed_lens.toint() != 0:
            packed = cutlass.max(ptx.load_global(p.packed_lens.toint() + Int64(b) * 4)[0], 0)
        packed = cutlass.min(packed, cutlass.min(rest, p.max_pages * BLOCK_TOKENS))
        tail = cutlass.min(rest - packed, p.tail_capacity)
        first_visible = length - p.q_len - p.window + 1  # to the oldest query
        first_block = cutlass.min(cutlass.max(first_visible - sinks, 0), packed) >> BLOCK_SHIFT
        blocks = ((packed + BLOCK_TOKENS - 1) >> BLOCK_SHIFT) - first_block
        sink_units = (sinks + self.chunk - 1) // self.chunk
        if first_visible >= sinks:
            sink_units = Int32(0)
        units = cutlass.max(blocks + sink_units + (tail + self.chunk - 1) // self.chunk, 1)
        return Sequence(length, sinks, packed, tail, first_block, blocks, sink_units, units)

    @cute.jit
    def units_of(self, p: Params, b: Int32):
        """Units of one piece of sequence b, 0 beyond the batch."""
        units = Int32(0)
        if b < p.batch:
            units = self.sequence(p, b).units
        return units

    @cute.jit
    def total_units(self, p: Params, lane: Int32):
        """Units of one piece of every sequence, summed."""
        total = Int32(0)
        b = lane
        while b < p.batch:
            total += self.sequence(p, b).units
            b += LANES
        for i in range_constexpr(5):
            total += ptx.shuffle_xor(total, 1 << i)
        return total

    @cute.jit
    def locate(self, p: Params, x: Int32, lane: Int32):
        """The Place of unit x."""
        pieces = p.num_kv_heads * p.q_tiles  # of a sequence
        found = Int32(-1)
        start = Int32(0)
        before = Int32(0)  # units of one piece of all earlier sequences
        base = Int32(0)
        while (found < 0) & (base < p.batch):
            units = self.units_of(p, base + lane)
            upto = units
            for i in range_constexpr(5):
                left = ptx.shuffle_up(upto, 1 << i)
                if lane >= 1 << i:
                    upto += left
            holder = ptx.first_lane((before + upto) * pieces > x)
            if holder >= 0:
                found = base + holder
                start = (before + ptx.shuffle(upto - units, holder)) * pieces
            before += ptx.shuffle(upto, LANES - 1)
            base += LANES
        per_piece = self.sequence(p, found).units
        piece = (x - start) // per_piece
        return Place(x, found, start, piece, x - start - piece * per_piece)

    def tile(self, p: Params, at: Place) -> tuple:
        """KV head of a piece, and the first row of its query tile."""
        head = at.piece // p.q_tiles
        return head, (at.piece - head * p.q_tiles) * self.q_tile

    def piece(self, p: Params, at: Place, end: Int32, seq: Sequence, shares: Shares) -> Piece:
        """The part of a piece from Place ``at`` on, within the CTA's ``end``."""
        head, first_row = self.tile(p, at)
        count = cutlass.min(end - at.x, seq.units - at.unit)
        packed_end = seq.sinks + seq.packed
        return Piece(
            blocks=cutlass.max(cutlass.min(at.unit + count, seq.blocks) - at.unit, 0),
            first_position=seq.sinks + (seq.first_block + at.unit) * BLOCK_TOKENS,
            packed_end=packed_end,
            seen_by_all=cutlass.min(packed_end, seq.length - p.q_len + 1),
            window_start=seq.length - p.window,
            b=at.b,
            head=head,
            first_row=first_row,
            first_chunk=cutlass.max(at.unit - seq.blocks, 0),
            end_chunk=at.unit + count - seq.blocks,
            sink_chunks=seq.sink_units,
            sinks=seq.sinks,
            tail=seq.tail,
            x=at.x,
            unit=at.unit,
            count=count,
            units=seq.units,
            is_last=cutlass.select_(at.x + count == end, Int32(1), Int32(0)),
            base=shares.base,
            extra=shares.extra,
        )

    @cute.jit
    def next_piece(self, p: Params, at: Place, units: Int32, count: Int32):
        """The Place after ``count`` units, the rest of this piece; ``units``: of a piece of this sequence."""
        piece = at.piece + 1
        b, start = at.b, at.start
        pieces = p.num_kv_heads * p.q_tiles
        if piece == pieces:
            piece = Int32(0)
            start += pieces * units
            b += 1
        return Place(at.x + count, b, start, piece, Int32(0))
