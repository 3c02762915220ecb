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
    workspace: cute.Pointer  # counters i32 [batch, num_kv_heads, q_tiles, merge_parts], then partial results
    page_stride: Int64  # bytes
    head_stride: Int64  # bytes
    batch: Int32
    q_len: Int32
    num_q_heads: Int32
    num_kv_heads: Int32
    num_pages: Int32
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
    is_last: Int32  # 1: the CTA's last
    index: Int32  # of the piece
    columns: Int32  # query columns of the tile; 0 if the CTA's share is empty
    slot: Int32  # workspace slot of this CTA's partial result
    first_cta: Int32  # of those that share the piece
    first_slot: Int32  # slot of that CTA's partial result
    ctas: Int32  # how many share it; 1: no partial results


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
        self.programmatic = plan.programmatic
        self.warm_blocks = plan.warm_blocks
        self.block_bytes = plan.fmt.block_bytes

    def lengths(self, p: Params, b: Int32) -> tuple:
        """seqlens and packed_lens of sequence b (of the last one beyond the batch), past L1: the previous kernel may be
        writing them.
        """
        row = Int64(cutlass.min(b, p.batch - 1)) * 4
        packed_lens = cutlass.select_(p.packed_lens.toint() != 0, p.packed_lens.toint(), p.seqlens.toint())
        return tuple(ptx.load_global(x + row, cache="cg")[0] for x in (p.seqlens.toint(), packed_lens))

    def sequence(self, p: Params, b: Int32) -> Sequence:
        """Units of sequence b, none beyond the batch."""
        return self.units_of(p, b, self.lengths(p, b))

    @cute.jit
    def units_of(self, p: Params, b: Int32, lengths: tuple):
        """The Sequence of these lengths, clamped to what the buffers hold, so that no read leaves them."""
        length = cutlass.max(lengths[0], 0)
        sinks = cutlass.min(length, p.num_sink)
        rest = length - sinks
        packed = rest
        if p.tail_capacity > 0:
            packed = (rest >> BLOCK_SHIFT) << BLOCK_SHIFT
        if p.packed_lens.toint() != 0:
            packed = cutlass.max(lengths[1], 0)
        packed = cutlass.min(packed, cutlass.min(rest, p.max_pages * BLOCK_TOKENS))
        tail = cutlass.min(rest - packed, p.tail_capacity)
        first_visible = length - p.q_len - p.window + 1  # to the oldest query
        first_block = cutlass.min(cutlass.max(first_visible - sinks, 0), packed) >> BLOCK_SHIFT
        blocks = ((packed + BLOCK_TOKENS - 1) >> BLOCK_SHIFT) - first_block
        sink_units = (sinks + self.chunk - 1) // self.chunk
        if first_visible >= sinks:
            sink_units = Int32(0)
        units = cutlass.max(blocks + sink_units + (tail + self.chunk - 1) // self.chunk, 1)
        units = cutlass.select_(b < p.batch, units, Int32(0))
        return Sequence(length, sinks, packed, tail, first_block, blocks, sink_units, units)

    @cute.jit
    def begin(self, p: Params, lane: Int32, meanwhile):
        """Where the CTA's share begins (Place), its end, the Sequence there, and the Shares. An empty share ends where
        it begins, somewhere in the list.

        With programmatic launch this, and ``meanwhile(at, end, seq, shares)``, is done before the previous kernel ends,
        and done again if the lengths turn out to be others then: it only has to be harmless whatever they are.
        """
        at, end, seq, shares = Place(*[lane] * 5), lane, Sequence(*[lane] * 8), Shares(lane, lane)
        may_repeat = Int32(1)
        again = Int32(1)
        while again == 1:
            again = Int32(0)
            seen = self.lengths(p, lane)
            at, end, seq, shares = self.share(p, lane, seen)
            meanwhile(at, end, seq, shares)
            if cutlass.const_expr(self.programmatic):
                ptx.wait_for_previous_kernel()
                now = self.lengths(p, lane)
                if ptx.any_lane((now[0] != seen[0]) | (now[1] != seen[1]) | (p.batch > LANES)):
                    again = may_repeat
                may_repeat = Int32(0)
        return at, end, seq, shares

    def share(self, p: Params, lane: Int32, lengths: tuple) -> tuple:
        """As :meth:`begin`, with the lengths of b = lane."""
        cta = cute.arch.block_idx()[0]
        mine = self.units_of(p, lane, lengths)
        shares = self.deal(p, lane, mine)
        x, end = shares.start(cta), shares.start(cta + 1)
        at, seq = self.locate(p, cutlass.min(x, cutlass.max(end - 1, 0)), lane, mine)
        return at._replace(x=x), end, seq, shares

    @cute.jit
    def deal(self, p: Params, lane: Int32, mine: Sequence):
        """The Shares of the CTAs; ``mine``: the Sequence of b = lane."""
        total = mine.units
        b = lane + LANES
        while b < p.batch:
            total += self.sequence(p, b).units
            b += LANES
        for i in range_constexpr(5):
            total += ptx.shuffle_xor(total, 1 << i)
        units = total * (p.num_kv_heads * p.q_tiles)
        ctas = cute.arch.grid_dim()[0]
        base = units // ctas
        return Shares(base, units - base * ctas)

    @cute.jit
    def locate(self, p: Params, x: Int32, lane: Int32, mine: Sequence):
        """The Place of unit x and its Sequence; ``mine``: the Sequence of b = lane. b is -1 if there is no x."""
        pieces = p.num_kv_heads * p.q_tiles  # of a sequence
        found = Int32(-1)
        start = Int32(0)
        before = Int32(0)  # units of one piece of all earlier sequences
        base = Int32(0)
        seq = mine
        while (found < 0) & (base < p.batch):
            upto = mine.units
            for i in range_constexpr(5):
                left = ptx.shuffle_up(upto, 1 << i)
                if lane >= 1 << i:
                    upto += left
            holder = ptx.first_lane((before + upto) * pieces > x)
            if holder >= 0:
                found = base + holder
                start = (before + ptx.shuffle(upto - mine.units, holder)) * pieces
                seq = Sequence(*[ptx.shuffle(value, holder) for value in mine])
            before += ptx.shuffle(upto, LANES - 1)
            base += LANES
            if (found < 0) & (base < p.batch):
                mine = self.sequence(p, base + lane)
        piece = (x - start) // cutlass.max(seq.units, 1)
        return Place(x, found, start, piece, x - start - piece * seq.units), seq

    @cute.jit
    def warm(self, p: Params, lane: Int32):
        """Bring the first blocks of the CTA's share into L2, while the previous kernel ends.

        Lengths and table may be stale: then it costs time, nothing else. Pages are checked, and entries are within the
        table whatever the lengths are.
        """
        at, end, seq, _ = self.share(p, lane, self.lengths(p, lane))
        left = Int32(self.warm_blocks)
        while (at.x < end) & (at.b >= 0) & (at.b < p.batch) & (left > 0):
            count, blocks, pages, table = self.blocks_of(p, at, end, seq)
            i = lane
            while i < cutlass.min(blocks, left):
                page = ptx.load_global(table + Int64(i) * 4, cache="cg")[0]
                if (page >= 0) & (page < p.num_pages):
                    ptx.prefetch(pages + Int64(page) * p.page_stride, self.block_bytes)
                i += LANES
            left -= blocks
            at = self.next_piece(p, at, seq.units, count)
            seq = self.sequence(p, at.b)

    def blocks_of(self, p: Params, at: Place, end: Int32, seq: Sequence) -> tuple:
        """Of a piece from ``at`` on, within ``end``: units, blocks, its KV head's pages, its table entries."""
        count = self.count(at, end, seq)
        head, _ = self.tile(p, at)
        pages = p.pages.toint() + Int64(head) * p.head_stride
        table = p.block_table.toint() + (Int64(at.b) * p.max_pages + seq.first_block + at.unit) * 4
        return count, self.blocks(at, count, seq), pages, table

    def tile(self, p: Params, at: Place) -> tuple:
        """KV head of a piece, and the first row of its query tile."""
        head = at.piece // p.q_tiles
        return head, (at.piece - head * p.q_tiles) * self.q_tile

    def piece(self, p: Params, at: Place, end: Int32, seq: Sequence, shares: Shares) -> Piece:
        """The part of a piece from Place ``at`` on, within the CTA's ``end``."""
        head, first_row = self.tile(p, at)
        count = self.count(at, end, seq)
        packed_end = seq.sinks + seq.packed
        cta = cute.arch.block_idx()[0]
        first_unit = at.x - at.unit
        first_cta = shares.holder(first_unit)
        return Piece(
            blocks=cutlass.max(self.blocks(at, count, seq), 0),
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
            is_last=cutlass.select_(at.x + count == end, Int32(1), Int32(0)),
            index=at.b * (p.num_kv_heads * p.q_tiles) + at.piece,
            columns=cutlass.select_(count > 0, cutlass.min(p.group * p.q_len - first_row, self.q_tile), Int32(0)),
            # a CTA has two slots, for the piece that its share begins with and for the one that it ends with
            slot=2 * cta + cutlass.select_(at.x == shares.start(cta), Int32(0), Int32(1)),
            first_cta=first_cta,
            first_slot=2 * first_cta + cutlass.select_(shares.start(first_cta) == first_unit, Int32(0), Int32(1)),
            ctas=shares.holder(first_unit + seq.units - 1) - first_cta + 1,
        )

    def count(self, at: Place, end: Int32, seq: Sequence) -> Int32:
        """Units of the piece from ``at`` on, within ``end``."""
        return cutlass.min(end - at.x, seq.units - at.unit)

    def blocks(self, at: Place, count: Int32, seq: Sequence) -> Int32:
        """How many of ``count`` units are blocks, if any."""
        return cutlass.min(at.unit + count, seq.blocks) - at.unit

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
