"""How decode attention's work is dealt to CTAs: a flat list of units, walked from the lengths on the device.

Units (work.py) are ordered by sequence, piece, unit; every CTA takes an equal run of them, so neither the grid nor the
balance depends on how ragged the batch is. In a kernel that packs the blocks that get full, packing counts as units,
behind the others.
"""

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, Int64, cute, range_constexpr

from . import ptx
from .layouts import BLOCK_SHIFT, BLOCK_TOKENS, LANES
from .plan import Plan
from .work import Params, Piece, Sequence, blocks_due

FEW_CTAS = 4  # to a piece: then a piece of two rounds of the consumers stays whole; else of one
LATE_CTAS = 4  # the last to be launched
SHORT_UNITS = 16  # of a share: where it is less, shares begin and end where pieces do, though some CTAs get nothing
USED_CTAS = 15, 16  # where pieces can be divided each for itself among 15 of 16 CTAs, they are, however long
LATE_SHARE = 8  # what late CTAs lack is at most this part of a share, and of the number of CTAs
HELD = 2  # sequences whose lengths a lane holds: work for 64 is dealt before they are known for certain


class Shares(NamedTuple):
    """The flat list dealt to the CTAs: each gets ``base`` units, the first ``extra`` ones one more.

    The last CTAs to be launched get less, by ``late`` units, the very last one by thrice that: they wait for an SM on
    which the previous kernel still merges, and for their first blocks behind those of all the others.

    Pieces that are short and alike are divided each for itself: among ``group_ctas`` CTAs, ``base`` units for each but
    the last one. ``group`` is the first of those that share the CTA's piece; else -1.
    """

    base: Int32
    extra: Int32
    late: Int32  # at most an eighth of base
    group: Int32
    group_ctas: Int32

    def start(self, cta: Int32) -> Int32:
        """Of a CTA's share, if there are no groups."""
        late = cutlass.max(cta - (cute.arch.grid_dim()[0] - LATE_CTAS), 0)
        late += cutlass.select_(cta == cute.arch.grid_dim()[0], Int32(2), Int32(0))
        return cta * self.base + cutlass.min(cta, self.extra) - late * self.late

    def holder(self, x: Int32) -> Int32:
        """The CTA that has unit x, if there are no groups."""
        longer = self.extra * (self.base + 1)  # units of those that get one more
        after = cutlass.max(x - longer, 0)
        size = cutlass.select_(x < longer, self.base + 1, cutlass.max(self.base, 1))
        cta = quotient(cutlass.select_(x < longer, x, after), size) + cutlass.select_(x < longer, Int32(0), self.extra)
        # if none were late; the late ones begin less than a share earlier
        return cta + cutlass.select_(x >= self.start(cta + 1), Int32(1), Int32(0))


class Place(NamedTuple):
    """A position in the list: unit x is unit ``unit`` of piece ``piece`` of sequence ``b``."""

    x: Int32
    b: Int32
    start: Int32  # index of the sequence's first unit
    piece: Int32  # q tile + q_tiles * KV head
    unit: Int32


def nothing(lane: Int32) -> tuple:
    """Of the types that :meth:`Schedule.begin` returns."""
    place, seq, shares = (kind(*[lane] * len(kind._fields)) for kind in (Place, Sequence, Shares))
    return place, lane, seq, shares, lane


def quotient(x: Int32, divisor: Int32) -> Int32:
    """x // divisor for positive divisors, x >= 0 and quotients below 2^21: a third of the instructions of ``//``."""
    guess = ptx.truncated(ptx.floating(x) * ptx.reciprocal(ptx.floating(divisor)))  # off by one at most
    rest = x - guess * divisor
    return guess + cutlass.select_(rest >= divisor, Int32(1), Int32(0)) - cutlass.select_(rest < 0, Int32(1), Int32(0))


def differ(a: list, b: list) -> Boolean:
    """Whether two lists of integers do."""
    found = a[0] != b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        found = found | (x != y)
    return found


class Schedule:
    """Walks the list of units of one kernel."""

    def __init__(self, plan: Plan):
        self.chunk = plan.chunk
        self.q_tile = plan.q_tile
        self.programmatic = plan.programmatic
        self.steps = plan.steps
        self.warm_blocks = plan.warm_blocks
        self.late_units, self.round_units = plan.late_units, plan.block_groups
        self.block_bytes = plan.fmt.block_bytes
        self.pack_units, self.search_units = plan.pack_units, plan.search_units

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
        if cutlass.const_expr(self.steps):
            length += p.q_len  # the tokens that the kernel appends
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
        sink_chunks = (sinks + self.chunk - 1) // self.chunk
        if first_visible >= sinks:
            sink_chunks = Int32(0)
        units = cutlass.max(blocks + sink_chunks + (tail + self.chunk - 1) // self.chunk, 1) + self.packing(p, tail)
        units = cutlass.select_(b < p.batch, units, Int32(0))
        return Sequence(length, sinks, packed, tail, first_block, blocks, sink_chunks, units)

    def packing(self, p: Params, tail: Int32) -> Int32:
        """The last units of a piece, which stand for packing the full blocks of a tail of so many tokens."""
        if not self.steps:
            return Int32(0)
        searches = (p.k_clip == 0.0) | (p.v_clip == 0.0)
        return blocks_due(p, tail) * cutlass.select_(searches, Int32(self.search_units), Int32(self.pack_units))

    def deciding(self, p: Params, seq: Sequence) -> Int32:
        """The unit of a piece whose CTA has the piece's end: the last one, or that in the middle of the packing. That
        CTA packs and, if there is packing, attends to all 16-bit tokens; nothing is to be done for the units behind.
        """
        return seq.units - 1 - (self.packing(p, seq.tail) >> 1)

    @cute.jit
    def begin(self, p: Params, lane: Int32, announce, fetch, fetches: Boolean):
        """Where the CTA's share begins (Place), its end, the Sequence there, the Shares, and what ``fetch`` returned.
        An empty share ends where it begins, somewhere in the list.

        With programmatic launch the work is dealt, and ``announce(at, end, seq, shares)`` called, before the previous
        kernel ends; ``fetch(at, end, seq)`` loads what that kernel may have written, in the same breath as the lengths.
        If these turn out to be others, both are called again, but the work is dealt again only if a number of units
        changed. Before that they only have to be harmless whatever the lengths are. A warp that fetches nothing is done
        once it has announced.
        """
        at, end, seq, shares, fetched = nothing(lane)
        lengths = self.held(p, lane)
        dealt = [Int32(-1)] * HELD  # units of the held sequences that the work was dealt by
        may_repeat = Int32(1)
        again = Int32(1)
        while again == 1:
            again = Int32(0)
            units = self.units(p, lane, lengths)
            if ptx.any_lane(differ(units, dealt)) | self.holds_some_only(p):
                at, end, seq, shares = self.share(p, lane, lengths, units)
            else:
                b = at.b % LANES
                mine = [cutlass.select_(at.b < LANES, x, y) for x, y in zip(*lengths, strict=True)]
                seq = self.units_of(p, at.b, tuple(ptx.shuffle(x, b) for x in mine))
            dealt = units
            announce(at, end, seq, shares)
            if fetches:
                if cutlass.const_expr(self.programmatic):
                    ptx.wait_for_previous_kernel()
                now = self.held(p, lane)
                fetched = fetch(at, end, seq)
                if cutlass.const_expr(self.programmatic):
                    changed = differ([x for pair in now for x in pair], [x for pair in lengths for x in pair])
                    if ptx.any_lane(changed | self.holds_some_only(p)):
                        again = may_repeat
                    may_repeat = Int32(0)
                lengths = now
        return at, end, seq, shares, fetched

    def held(self, p: Params, lane: Int32) -> list:
        """:meth:`lengths` of the sequences lane, lane + 32, .."""
        return [self.lengths(p, lane + LANES * i) for i in range(HELD)]

    def holds_some_only(self, p: Params) -> Boolean:
        return p.batch > HELD * LANES

    def units(self, p: Params, lane: Int32, held: list) -> list:
        """Units of the held sequences."""
        return [self.units_of(p, lane + LANES * i, lengths).units for i, lengths in enumerate(held)]

    def share(self, p: Params, lane: Int32, held: list, units: list) -> tuple:
        """As :meth:`begin`, with the lengths and units of the held sequences."""
        shares, x, end = self.deal(p, lane, units)
        at, seq = self.locate(p, cutlass.min(x, cutlass.max(end - 1, 0)), lane, held, units)
        return at._replace(x=x), end, seq, shares

    @cute.jit
    def deal(self, p: Params, lane: Int32, units: list):
        """The Shares, begin and end of the CTA's; ``units``: of the held sequences."""
        total, largest = units[0], units[0]
        for i in range_constexpr(1, HELD):
            total += units[i]
            largest = cutlass.max(largest, units[i])
        b = lane + HELD * LANES
        while b < p.batch:
            more = self.sequence(p, b).units
            total += more
            largest = cutlass.max(largest, more)
            b += LANES
        for i in range_constexpr(5):
            total += ptx.shuffle_xor(total, 1 << i)
            largest = cutlass.max(largest, ptx.shuffle_xor(largest, 1 << i))
        pieces = p.batch * p.num_kv_heads * p.q_tiles
        alike = total == largest * p.batch
        total *= p.num_kv_heads * p.q_tiles
        cta, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        base = quotient(total, ctas)
        extra = total - base * ctas
        late = cutlass.min(self.late_units, cutlass.min(base, ctas) // LATE_SHARE)
        late = cutlass.select_(ctas > LATE_CTAS, late, Int32(0))
        extra += (LATE_CTAS + 2) * late  # less than twice the CTAs
        rounds = cutlass.select_(extra >= ctas, Int32(1), Int32(0))
        shares = Shares(base + rounds, extra - rounds * ctas, late, Int32(-1), Int32(0))
        x, end = shares.start(cta), shares.start(cta + 1)
        if alike:
            of_piece = cutlass.max(quotient(ctas, pieces), 1)  # CTAs
            if largest <= self.round_units * cutlass.select_(of_piece <= FEW_CTAS, Int32(2), Int32(1)):
                base = largest * quotient(pieces + ctas - 1, ctas)
                shares = Shares(base, Int32(0), Int32(0), Int32(-1), Int32(0))
                x, end = cutlass.min(shares.start(cta), total), cutlass.min(shares.start(cta + 1), total)
            elif (pieces <= ctas) & (
                (largest <= SHORT_UNITS * of_piece) | (USED_CTAS[1] * pieces * of_piece >= USED_CTAS[0] * ctas)
            ):
                base = cutlass.max(quotient(largest + of_piece - 1, of_piece), self.round_units)
                of_piece = quotient(largest + base - 1, base)
                piece = quotient(cta, of_piece)
                shares = Shares(base, Int32(0), Int32(0), piece * of_piece, of_piece)
                first, last = (cutlass.min((cta + i - piece * of_piece) * base, largest) for i in range(2))
                x, end = cutlass.min(piece * largest + first, total), cutlass.min(piece * largest + last, total)
        return shares, x, end

    @cute.jit
    def locate(self, p: Params, x: Int32, lane: Int32, held: list, units: list):
        """The Place of unit x and its Sequence; b is -1 if there is no x."""
        pieces = p.num_kv_heads * p.q_tiles  # of a sequence
        found = Int32(-1)
        start = Int32(0)
        before = Int32(0)  # units of one piece of all earlier sequences
        base = Int32(0)
        mine, mine_units = list(held[0]), units[0]  # of sequence base + lane
        while (found < 0) & (base < p.batch):
            upto = mine_units
            for i in range_constexpr(5):
                left = ptx.shuffle_up(upto, 1 << i)
                if lane >= 1 << i:
                    upto += left
            holder = ptx.first_lane((before + upto) * pieces > x)
            if holder >= 0:
                found = base + holder
                start = (before + ptx.shuffle(upto - mine_units, holder)) * pieces
                mine = [ptx.shuffle(value, holder) for value in mine]
            before += ptx.shuffle(upto, LANES - 1)
            base += LANES
            if (found < 0) & (base < p.batch):
                if base < HELD * LANES:
                    mine, mine_units = list(held[1]), units[1]
                else:
                    mine = list(self.lengths(p, base + lane))
                    mine_units = self.units_of(p, base + lane, tuple(mine)).units
        seq = self.units_of(p, found, tuple(mine))
        piece = quotient(x - start, cutlass.max(seq.units, 1))
        return Place(x, found, start, piece, x - start - piece * seq.units), seq

    def warm(self, p: Params, lane: Int32) -> None:
        """Find the CTA's share, and :meth:`warm_share`."""
        held = self.held(p, lane)
        self.warm_share(p, lane, *self.share(p, lane, held, self.units(p, lane, held))[:3])

    @cute.jit
    def warm_share(self, p: Params, lane: Int32, at: Place, end: Int32, seq: Sequence):
        """Bring the first blocks of a share into L2, while the previous kernel ends.

        Lengths and table may be stale: then it costs time, nothing else. Pages are checked, and entries are within the
        table whatever the lengths are.
        """
        left = Int32(self.warm_blocks)
        while (at.x < end) & (at.b >= 0) & (at.b < p.batch) & (left > 0):
            count, blocks, pages, table = self.blocks_of(p, at, end, seq)
            i = lane
            while i < cutlass.min(blocks, left):
                page = ptx.load_global(table + Int64(i) * 4, cache="cg")[0]
                if (page >= 0) & (page < p.num_pages):
                    ptx.prefetch(pages + Int64(page) * p.page_stride, self.block_bytes)
                i += LANES
            left -= count
            at = self.next_piece(p, at, seq.units, count)
            seq = self.sequence(p, at.b)

    @cute.jit
    def entries(self, p: Params, at: Place, end: Int32, seq: Sequence, first: Int32, lane: Int32):
        """The lanes' table entries: of the CTA's blocks ``first`` + lane of the piece; 0 where there are none."""
        _, blocks, _, table = self.blocks_of(p, at, end, seq)
        page = Int32(0)
        if (first < blocks) & (at.b >= 0):
            page = ptx.load_global(table + Int64(cutlass.min(first + lane, blocks - 1)) * 4, cache="cg")[0]
        return page

    def blocks_of(self, p: Params, at: Place, end: Int32, seq: Sequence) -> tuple:
        """Of a piece from ``at`` on, within ``end``: units, blocks, its KV head's pages, its table entries."""
        count = self.count(p, at, end, seq)
        head, _ = self.tile(p, at)
        pages = p.pages.toint() + Int64(head) * p.head_stride
        table = p.block_table.toint() + (Int64(at.b) * p.max_pages + seq.first_block + at.unit) * 4
        return count, self.blocks(at, count, seq), pages, table

    def tile(self, p: Params, at: Place) -> tuple:
        """KV head of a piece, and the first row of its query tile."""
        head = quotient(at.piece, p.q_tiles)
        return head, (at.piece - head * p.q_tiles) * self.q_tile

    @cute.jit
    def piece(self, p: Params, at: Place, end: Int32, seq: Sequence, shares: Shares):
        """The part of a piece from Place ``at`` on, within the CTA's ``end``."""
        head, first_row = self.tile(p, at)
        count = self.count(p, at, end, seq)
        cta = cute.arch.block_idx()[0]
        first_unit = at.x - at.unit
        deciding = self.deciding(p, seq)
        last_unit = first_unit + deciding
        has_work = (count > 0) & (at.unit <= deciding)
        first_chunk, end_chunk = self.chunks(p, at, count, seq)
        begin = shares.start(cta)
        first_cta, last_cta, first_slot = cta, cta, 2 * cta
        if shares.group >= 0:
            first_cta, last_cta = shares.group, shares.group + shares.group_ctas - 1
            if cutlass.const_expr(self.steps):
                last_cta = first_cta + quotient(deciding, shares.base)
            begin, first_slot = at.x, 2 * first_cta
        else:
            if first_unit < begin:
                first_cta = shares.holder(first_unit)
            if last_unit >= end:
                last_cta = shares.holder(last_unit)
            first_slot = 2 * first_cta + cutlass.select_(shares.start(first_cta) == first_unit, Int32(0), Int32(1))
        is_shared = first_cta != last_cta
        return Piece(
            blocks=cutlass.max(self.blocks(at, count, seq), 0),
            first_position=seq.sinks + (seq.first_block + at.unit) * BLOCK_TOKENS,
            packed_end=seq.packed_end,
            seen_by_all=cutlass.min(seq.packed_end, seq.length - p.q_len + 1),
            window_start=seq.length - p.window,
            b=at.b,
            head=head,
            first_row=first_row,
            first_chunk=first_chunk,
            end_chunk=end_chunk,
            sink_chunks=seq.sink_chunks,
            sinks=seq.sinks,
            tail=seq.tail,
            is_last=cutlass.select_(at.x + count >= end, Int32(1), Int32(0)),
            collects=cutlass.select_((count > 0) & is_shared & (cta == last_cta), Int32(1), Int32(0)),
            columns=cutlass.select_(has_work, cutlass.min(p.group * p.q_len - first_row, self.q_tile), Int32(0)),
            # a CTA has two slots, for the piece that its share begins with and for the one that it ends with
            slot=2 * cta + cutlass.select_(at.x == begin, Int32(0), Int32(1)),
            first_cta=first_cta,
            first_slot=first_slot,
            ctas=last_cta - first_cta + 1,
        )

    def count(self, p: Params, at: Place, end: Int32, seq: Sequence) -> Int32:
        """Units of the piece from ``at`` on, within ``end``, or up to the piece's."""
        rest = seq.units - at.unit
        count = cutlass.min(end - at.x, rest)
        if self.steps:
            count = cutlass.select_((count > 0) & (at.unit + count > self.deciding(p, seq)), rest, count)
        return count

    def blocks(self, at: Place, count: Int32, seq: Sequence) -> Int32:
        """How many of ``count`` units are blocks, if any."""
        return cutlass.min(at.unit + count, seq.blocks) - at.unit

    def chunks(self, p: Params, at: Place, count: Int32, seq: Sequence) -> tuple:
        """16-bit chunks among ``count`` units of a piece from ``at`` on: (first, end). All are for the CTA that packs
        the piece's blocks, if some are due.
        """
        first, end = cutlass.max(at.unit - seq.blocks, 0), at.unit + count - seq.blocks
        if not self.steps:
            return first, end
        packing = self.packing(p, seq.tail)
        packs = (count > 0) & (at.unit <= self.deciding(p, seq)) & (at.unit + count == seq.units)
        of_packer = cutlass.select_(packs, end - packing, Int32(0))
        return (
            cutlass.select_(packing > 0, Int32(0), first),
            cutlass.select_(packing > 0, of_packer, end),
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
