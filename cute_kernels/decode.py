"""Decode attention over BitFusion blocks with mma.sync: one launch, any batch of ragged sequences.

Work is a flat list of units over (sequence, KV head, query tile): 128-token blocks, then 16-bit chunks (sinks,
tail). Every CTA takes an equal share, so lengths do not shape the grid; the list is walked from the lengths on
the device. Units of one (sequence, KV head, query tile) form a piece.

    producer warp   walks the share, copies each block into a ring of shared-memory stages (bulk copy; cp.async
                    before Hopper), signalled through "full"/"empty" mbarriers
    consumer warps  in groups of ``warps_per_block``; a group takes every n-th block, a warp its token slices:
        Q' = Q * scale_k            B operand, once per token group (K per channel)
        S^T = codes_k Q' + bias     A = codes as fp16 denormals, one AND per register; the bias MMA has the
                                    zeros as rows of A; powers of two leave with the accumulator
        P = exp2(S - max)           the warp's own running maximum, rescaled only when it grows by > 2^1
        O^T += codes_v (P * scale_v)    P transposed by movmatrix; zeros by one MMA per 16 tokens and group
    16-bit units    the same MMAs with K and V from global memory
    end of a piece  warps merge through shared memory; a piece split over CTAs goes to the workspace, where the
                    CTA that arrives last merges it in a fixed order, so results are deterministic

K per token: the channel groups' partial S are scaled by rows instead, zeros times the group's sum of Q.
All parameters of a token lie in the order of the operand they meet (layouts.py).
"""

from typing import NamedTuple

import cutlass
import numpy as np
from cutlass import Boolean, Float32, Int32, Int64, cute
from cutlass import range_constexpr
from cutlass.cute.runtime import make_ptr

from . import ptx
from .layouts import (
    BLOCK_TOKENS,
    NUM_SLICES,
    SLICE_TOKENS,
    TILE,
    BlockFormat,
    Section,
    block_format,
    symmetric_zero,
)

WARP = 32
COLUMNS = 8  # query columns of one MMA
LOG2E = 1.4426950408889634
FIRST_MAX = -1.0e30  # running maximum before the first key: finite, so that masked scores give exp2(-inf) = 0
RESCALE_ABOVE = 1.0  # log2; P <= 2 keeps P * scale within fp16 for every scale of the quantiser
ROW_PAD = 4  # floats behind a row of the merge scratch: spreads the rows over banks, holds maximum and sum
MERGE_BATCH = 8  # partial results a thread has in flight while merging
HALF_MAX = 65504.0
CONSUMER_BARRIER = 1


class Params(NamedTuple):
    """The flat kernel parameters; shapes in elements. The order is the launch ABI (include/bitdecoding)."""

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
    softcap: Float32


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
    """The flat list of units dealt to the CTAs: each gets ``base``, the first ``extra`` one more."""

    base: Int32
    extra: Int32

    def start(self, cta: Int32) -> Int32:
        return cta * self.base + cutlass.min(cta, self.extra)

    def holder(self, x: Int32) -> Int32:
        """The CTA that has unit x."""
        longer = self.extra * (self.base + 1)
        late = self.extra + (x - longer) // cutlass.max(self.base, 1)
        return cutlass.select_(x < longer, x // (self.base + 1), late)


class Fragment(NamedTuple):
    """Where an A register lies: vector of the slice, word of the vector, first bit."""

    vector: int
    word: int
    bit: int


def fragments(section: Section, operand: str, head_dim: int, vector_words: int) -> dict:
    """(token tile of the slice, channel tile) -> the four Fragments of its A registers, from the block's layout."""

    def at(token: int, channel: int) -> Fragment:
        bit = section.layout(token, channel)
        vector, word = divmod(bit // 32, WARP * vector_words)
        return Fragment(vector, word, bit % 32)

    tiles = {}
    for t in range(2):
        for c in range(head_dim // TILE):
            rows_cols = [(8 * (r & 1), 8 * (r >> 1)) for r in range(4)]
            tiles[t, c] = tuple(
                at(TILE * t + (row if operand == "k" else col), TILE * c + (col if operand == "k" else row))
                for row, col in rows_cols
            )
    return tiles


def power(fragment: Fragment) -> float:
    """What a code at this place is multiplied by when its AND-ed register is read as fp16: q * 2^-24 * 2^(bit mod 8)."""
    return 2.0 ** (fragment.bit % 8 - 24)


def extract(vectors: list, fragment: Fragment, bits: int) -> Int32:
    """The A register of a fragment: two codes as fp16 denormals; one AND, and a shift shared by two registers."""
    word = vectors[fragment.vector][fragment.word]
    if fragment.bit >= 8:
        word = word >> 8
    mask = ((1 << bits) - 1) << (fragment.bit % 8)
    return word & (mask | mask << 16)


class Addresses(NamedTuple):
    """A lane's bases within a stage; the layouts give the offsets that follow."""

    k_lane: Int32  # code vectors of K
    v_lane: Int32
    k_quad: Int32  # parameters in B order (K: channels, V: tokens)
    v_quad: Int32
    rows: Int32  # parameters in row order


def half2_constant(value: float) -> Int32:
    """A register with the fp16 value twice."""
    half = int(np.float16(value).view(np.uint16))
    word = half | half << 16
    return Int32(word - (1 << 32) if word >> 31 else word)


class DecodeKernel:
    """The kernel of one KernelConfig, and the host function that the DSL compiles."""

    def __init__(self, config):
        quant = config.quant
        self.config = config
        self.fmt: BlockFormat = block_format(config.head_dim, quant)
        self.head_dim = config.head_dim
        self.tiles = config.head_dim // TILE
        self.q_tile = config.q_tile
        self.column_tiles = config.q_tile // COLUMNS
        self.k_bits, self.v_bits = quant.k_bits, quant.v_bits
        self.k_axis = quant.k_axis
        self.k_group, self.v_group = quant.k_group, quant.v_group
        self.k_groups = config.head_dim // quant.k_group if quant.k_axis == "token" else 1  # along channels
        self.v_groups = config.head_dim // quant.v_group
        self.bfloat16 = config.dtype == "bfloat16"
        self.softcap = config.softcap
        self.bulk = config.copy == "bulk"
        self.wait_form = "test_wait" if config.arch in ("sm80", "sm89") else "try_wait"
        # warps and slices
        self.warps = config.num_warps
        self.warps_per_block = config.warps_per_block
        self.block_groups = self.warps // self.warps_per_block
        self.slices = NUM_SLICES // self.warps_per_block  # per warp and block
        self.chunk = TILE * self.warps_per_block  # tokens of a 16-bit unit
        self.threads = WARP * (self.warps + 1)
        self.min_ctas = getattr(config, "min_ctas", 1)
        # shared memory: ring | merge scratch | full and empty barriers | last-arriver flag
        self.stages = config.stages
        self.row_floats = self.head_dim + ROW_PAD
        self.scratch_at = self.stages * self.fmt.block_bytes
        self.full_at = self.scratch_at + self.warps * self.q_tile * self.row_floats * 4
        self.empty_at = self.full_at + 8 * self.stages
        self.flag_at = self.empty_at + 8 * self.stages
        self.smem_bytes = -(-(self.flag_at + 16) // 128) * 128
        # code places
        self.k_fragments = fragments(self.fmt.k_codes, "k", self.head_dim, self.fmt.k_vector_words)
        self.v_fragments = fragments(self.fmt.v_codes, "v", self.head_dim, self.fmt.v_vector_words)

    # -- schedule ----------------------------------------------------------------------------------------------

    @cute.jit
    def sequence(self, p: Params, b: Int32):
        """Units of sequence b. Lengths are clamped to what the buffers hold, so that no read leaves them."""
        length = cutlass.max(ptx.load_global(p.seqlens.toint() + Int64(b) * 4)[0], 0)
        sinks = cutlass.min(length, p.num_sink)
        rest = length - sinks
        packed = rest
        if p.tail_capacity > 0:
            packed = (rest >> 7) << 7  # whole blocks
        if p.packed_lens.toint() != 0:
            packed = cutlass.max(ptx.load_global(p.packed_lens.toint() + Int64(b) * 4)[0], 0)
        packed = cutlass.min(packed, cutlass.min(rest, p.max_pages * BLOCK_TOKENS))
        tail = cutlass.min(rest - packed, p.tail_capacity)
        first_visible = length - p.q_len - p.window + 1  # to the oldest query
        first_block = cutlass.min(cutlass.max(first_visible - sinks, 0), packed) >> 7
        blocks = ((packed + BLOCK_TOKENS - 1) >> 7) - first_block
        sink_units = (sinks + self.chunk - 1) // self.chunk
        if first_visible >= sinks:
            sink_units = Int32(0)
        units = cutlass.max(blocks + sink_units + (tail + self.chunk - 1) // self.chunk, 1)
        return Sequence(length, sinks, packed, tail, first_block, blocks, sink_units, units)

    @cute.jit
    def units_of(self, p: Params, b: Int32):
        """Units of sequence b, 0 beyond the batch."""
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
            b += WARP
        for i in range_constexpr(5):
            total += ptx.shuffle_xor(total, 1 << i)
        return total

    @cute.jit
    def locate(self, p: Params, pieces: Int32, x: Int32, lane: Int32):
        """The sequence that holds unit x, and the index of the sequence's first unit."""
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
            before += ptx.shuffle(upto, WARP - 1)
            base += WARP
        return found, start

    # -- producer ----------------------------------------------------------------------------------------------

    @cute.jit
    def produce(self, p: Params, smem: Int32, lane: Int32, b: Int32, piece: Int32, unit: Int32, x: Int32, x1: Int32, q_tiles: Int32):
        """Copy the blocks of the share [x, x1) into the ring."""
        stage = Int32(0)
        parity = Int32(1)  # the first round finds every stage empty
        while x < x1:
            seq = self.sequence(p, b)
            count = cutlass.min(x1 - x, seq.units - unit)
            blocks = cutlass.min(unit + count, seq.blocks) - unit
            head = p.pages.toint() + Int64(piece // q_tiles) * p.head_stride
            table = p.block_table.toint() + (Int64(b) * p.max_pages + seq.first_block + unit) * 4
            page = Int32(0)
            i = Int32(0)
            while i < blocks:
                if i & (WARP - 1) == 0:  # the next 32 table entries, one per lane
                    page = ptx.load_global(table + Int64(cutlass.min(i + lane, blocks - 1)) * 4)[0]
                source = head + Int64(ptx.shuffle(page, i & (WARP - 1))) * p.page_stride
                self.copy_block(smem, source, stage, parity, lane)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    parity = parity ^ 1
                i += 1
            x += count
            unit = Int32(0)
            piece += 1
            if piece == p.num_kv_heads * q_tiles:
                piece = Int32(0)
                b += 1

    @cute.jit
    def copy_block(self, smem: Int32, source: Int64, stage: Int32, parity: Int32, lane: Int32):
        full = smem + self.full_at + stage * 8
        empty = smem + self.empty_at + stage * 8
        target = smem + stage * self.fmt.block_bytes
        if cutlass.const_expr(self.bulk):
            if lane == 0:
                ptx.mbarrier_wait(empty, parity, self.wait_form)
                ptx.mbarrier_expect(full, self.fmt.block_bytes)
                ptx.bulk_copy(target, source, self.fmt.block_bytes, full)
        else:
            ptx.mbarrier_wait(empty, parity, self.wait_form)
            row = WARP * 16
            for i in range_constexpr(self.fmt.block_bytes // row):
                ptx.copy16(target + lane * 16, source + Int64(lane) * 16, i * row)
            if cutlass.const_expr(self.fmt.block_bytes % row != 0):
                if lane * 16 < self.fmt.block_bytes % row:
                    ptx.copy16(target + lane * 16, source + Int64(lane) * 16, self.fmt.block_bytes // row * row)
            ptx.mbarrier_arrive_after_copies(full)

    # -- queries -----------------------------------------------------------------------------------------------

    def row_of(self, p: Params, row: Int32):
        """(query token, head of the group) of a query row; rows of a token are adjacent."""
        group = p.num_q_heads // p.num_kv_heads
        token = row // group
        return token, row - token * group

    @cute.jit
    def load_queries(self, p: Params, lane: Int32, b: Int32, head: Int32, first_row: Int32):
        """Q as B operand, scaled to log2 scores and normalised per column by a power of two.

        Returns queries [column tile][channel tile][2] half2, powers [column tile][2] (of the lane's columns 2t,
        2t+1) and, for K per token, sums [column tile][channel group][2]: the groups' sums of Q.
        """
        group = p.num_q_heads // p.num_kv_heads
        queries, powers, sums = [], [], []
        for n in range_constexpr(self.column_tiles):
            row = first_row + n * COLUMNS + (lane >> 2)
            valid = row < group * p.q_len
            token, member = self.row_of(p, cutlass.select_(valid, row, Int32(0)))
            at = (Int64(b * p.q_len + token) * p.num_q_heads + head * group + member) * (2 * self.head_dim)
            at = p.q.toint() + at + Int64(lane & 3) * 4
            scale = cutlass.select_(valid, p.softmax_scale_log2, Float32(0.0))
            values = []
            largest = Float32(0.0)
            for i in range_constexpr(2 * self.tiles):
                low, high = self.floats(ptx.load_global(at, offset=16 * i)[0])
                values.append((low * scale, high * scale))
                largest = ptx.fmax(largest, ptx.fmax(ptx.fabs(values[i][0]), ptx.fabs(values[i][1])))
            for i in range_constexpr(2):
                largest = ptx.fmax(largest, ptx.shuffle_xor(largest, 1 << i))
            exponent = ptx.bits(largest) & 0x7F800000
            inverse = ptx.from_bits(0x7F000000 - exponent)
            tiles = []
            for c in range_constexpr(self.tiles):
                pairs = [values[2 * c], values[2 * c + 1]]
                tiles.append([ptx.to_half2(low * inverse, high * inverse) for low, high in pairs])
            queries.append(tiles)
            lane_of_column = (lane & 3) * 8
            powers.append([ptx.from_bits(ptx.shuffle(exponent, lane_of_column + 4 * j)) for j in range(2)])
            if cutlass.const_expr(self.k_axis == "token"):
                one = Int32(0x3C003C00)
                group_sums = []
                for j in range_constexpr(self.k_groups):
                    total = [Float32(0.0)] * 4
                    for c in range_constexpr(self.k_group // TILE):
                        total = ptx.mma(total, [one] * 4, tiles[j * self.k_group // TILE + c])
                    group_sums.append(total[:2])
                sums.append(group_sums)
        return queries, powers, sums

    def floats(self, register: Int32):
        """Two 16-bit values of the model's dtype as fp32."""
        return ptx.bfloat2_floats(register) if self.bfloat16 else ptx.half2_floats(register)

    def halves(self, register: Int32):
        """Two 16-bit values of the model's dtype as fp16; bf16 beyond its range saturates."""
        if not self.bfloat16:
            return register
        clamped = [ptx.fmin(ptx.fmax(x, Float32(-HALF_MAX)), Float32(HALF_MAX)) for x in ptx.bfloat2_floats(register)]
        return ptx.to_half2(*clamped)

    # -- one slice of a block ----------------------------------------------------------------------------------

    def code_vectors(self, lane_base: Int32, section: Section, slice_: int, vector_words: int) -> list:
        """All code vectors of a slice; lane_base = stage + the lane's place in a vector."""
        slice_bytes = section.nbytes // NUM_SLICES
        step = WARP * vector_words * 4
        at = section.offset + slice_ * slice_bytes
        return [ptx.load_shared(lane_base, at + v * step, vector_words) for v in range(slice_bytes // step)]

    def b_params(self, quad_base: Int32, section: Section, row: int, tile_pair: int) -> list:
        """Parameters in B order: [tile][2] half2 of two tiles; quad_base = stage + 16 (lane % 4)."""
        got = ptx.load_shared(quad_base, section.offset + 2 * section.layout(row, 2 * TILE * tile_pair), 4)
        return [got[:2], got[2:]]

    def scaled_queries(self, quad_base: Int32, row: int, queries: list):
        """Q' = Q * scale and the bias sum_c Q' * zero, for K per channel: [n][c][2] half2, [n][2] floats."""
        scaled = [[None] * self.tiles for _ in queries]
        bias = [[Float32(0.0)] * 4 for _ in queries]
        symmetric = self.fmt.k_zero is None
        constant = half2_constant(symmetric_zero(self.k_bits))
        for pair in range(self.tiles // 2):
            scale = self.b_params(quad_base, self.fmt.k_scale, row, pair)
            zero = [[constant] * 2] * 2 if symmetric else self.b_params(quad_base, self.fmt.k_zero, row, pair)
            for n, tiles in enumerate(queries):
                for i in range(2):
                    c = 2 * pair + i
                    scaled[n][c] = [ptx.mul_half2(tiles[c][r], scale[i][r]) for r in range(2)]
                    z0, z1 = zero[i]
                    bias[n] = ptx.mma(bias[n], [z0, z0, z1, z1], scaled[n][c])
        return scaled, [total[:2] for total in bias]

    def code_products(self, vectors: list, operand: list, channel_tiles: range) -> list:
        """codes_k Q over some channel tiles: [n][token tile][4], rows still scaled by the codes' powers of two."""
        acc = [[[Float32(0.0)] * 4 for _ in range(2)] for _ in operand]
        for c in channel_tiles:
            for t in range(2):
                a = [extract(vectors, f, self.k_bits) for f in self.k_fragments[t, c]]
                for n, tiles in enumerate(operand):
                    acc[n][t] = ptx.mma(acc[n][t], a, tiles[c])
        return acc

    def row_factor(self, t: int, i: int) -> float:
        """What takes accumulator i of token tile t back from the codes' power of two."""
        return 1.0 / power(self.k_fragments[t, 0][i // 2])

    def scores(self, addresses, slice_: int, queries: list, scaled, bias, powers: list, sums: list, mean: list) -> list:
        """log2 scores of a slice, [n][token tile][4]: rows g (0, 1) and g + 8 (2, 3), columns 2t, 2t + 1."""
        vectors = self.code_vectors(addresses.k_lane, self.fmt.k_codes, slice_, self.fmt.k_vector_words)
        if self.k_axis == "channel":
            acc = self.code_products(vectors, scaled, range(self.tiles))
            for n in range(self.column_tiles):
                offset = [(bias[n][j] + mean[n][j]) * powers[n][j] for j in range(2)]
                for t in range(2):
                    acc[n][t] = [
                        x * (powers[n][i % 2] * self.row_factor(t, i)) + offset[i % 2] for i, x in enumerate(acc[n][t])
                    ]
            return acc
        total = [[[mean[n][i % 2] for i in range(4)] for _ in range(2)] for n in range(self.column_tiles)]
        per_group = self.k_group // TILE
        for j in range(self.k_groups):
            acc = self.code_products(vectors, queries, range(j * per_group, (j + 1) * per_group))
            scale = self.row_params(addresses.rows, self.fmt.k_scale, slice_, j)
            symmetric = self.fmt.k_zero is None
            zero = None if symmetric else self.row_params(addresses.rows, self.fmt.k_zero, slice_, j)
            for n in range(self.column_tiles):
                for t in range(2):
                    for i in range(4):
                        row = 2 * t + i // 2
                        z = Float32(symmetric_zero(self.k_bits)) if symmetric else zero[row]
                        value = acc[n][t][i] * self.row_factor(t, i) + z * sums[n][j][i % 2]
                        total[n][t][i] = value * scale[row] + total[n][t][i]
        return [[[x * powers[n][i % 2] for i, x in enumerate(t)] for t in total[n]] for n in range(self.column_tiles)]

    def row_params(self, row_base: Int32, section: Section, slice_: int, group: int) -> list:
        """Four parameters of rows g, g+8, g+16, g+24 as fp32; row_base = stage + the lane group's place."""
        at = section.offset + 2 * section.layout(slice_ * SLICE_TOKENS, group)
        first, second = ptx.load_shared(row_base, at, 2)
        return [*ptx.half2_floats(first), *ptx.half2_floats(second)]

    @cute.jit
    def masked(self, scores: list, first_position: Int32, bounds: list):
        """Scores with -inf where a key is outside [low, high) of its column; rows are consecutive positions."""
        for n in range_constexpr(self.column_tiles):
            for t in range_constexpr(len(scores[n])):
                for i in range_constexpr(4):
                    position = first_position + TILE * t + 8 * (i // 2)
                    low, high = bounds[n][i % 2]
                    if (position < low) | (position >= high):
                        scores[n][t][i] = Float32(-float("inf"))
        return scores

    @cute.jit
    def softmax(self, scores: list, top: list, total: list, out: list, zeros: list):
        """P = exp2(S - max) with the warp's running maximum; rescales the accumulators if it must grow.

        scores [n][token tile][4]; top, total [n][2]; out [n][channel tile][4]; zeros [n][group][4].
        Returns P in place of the scores.
        """
        highest = []
        grown = Boolean(False)
        for n in range_constexpr(self.column_tiles):
            peaks = []
            for j in range_constexpr(2):
                peak = ptx.fmax(scores[n][0][j], scores[n][0][j + 2])
                for t in range_constexpr(1, len(scores[n])):
                    peak = ptx.fmax(peak, ptx.fmax(scores[n][t][j], scores[n][t][j + 2]))
                grown = grown | (peak > top[n][j] + RESCALE_ABOVE)
                peaks.append(peak)
            highest.append(peaks)
        if ptx.any_lane(grown):
            for n in range_constexpr(self.column_tiles):
                for j in range_constexpr(2):
                    peak = highest[n][j]
                    for i in range_constexpr(3):
                        peak = ptx.fmax(peak, ptx.shuffle_xor(peak, 4 << i))
                    peak = ptx.fmax(peak, top[n][j])
                    factor = ptx.exp2(top[n][j] - peak)
                    top[n][j] = peak
                    total[n][j] = total[n][j] * factor
                    for r in range_constexpr(2):
                        i = 2 * r + j
                        for c in range_constexpr(self.tiles):
                            out[n][c][i] = out[n][c][i] * factor
                        for g in range_constexpr(len(zeros[n])):
                            zeros[n][g][i] = zeros[n][g][i] * factor
        for n in range_constexpr(self.column_tiles):
            for t in range_constexpr(len(scores[n])):
                for i in range_constexpr(4):
                    p = ptx.exp2(scores[n][t][i] - top[n][i % 2])
                    scores[n][t][i] = p
                    total[n][i % 2] = total[n][i % 2] + p
        return scores, top, total, out, zeros

    def transposed(self, p_tile: list) -> list:
        """P of a token tile from accumulator order to B operand: 4 floats -> 2 half2."""
        return [ptx.transpose8x8(ptx.to_half2(p_tile[2 * r], p_tile[2 * r + 1])) for r in range(2)]

    @cute.jit
    def only_tokens(self, register: Int32, token: Int32, end: Int32):
        """A half2 of parameters of tokens (token, token + 1), zero from token ``end`` on."""
        if token + 1 >= end:
            register = register & 0xFFFF
        if token >= end:
            register = Int32(0)
        return register

    @cute.jit
    def value_params(self, addresses: Addresses, section: cutlass.Constexpr, group: cutlass.Constexpr, slice_: cutlass.Constexpr, partial: Boolean, token: Int32, end: Int32):
        """V parameters of a slice, [token tile][2] half2; unwritten ones beyond the length read as 0, never NaN."""
        params = self.b_params(addresses.v_quad, section, group, slice_)
        if partial:
            for t in range_constexpr(2):
                for r in range_constexpr(2):
                    params[t][r] = self.only_tokens(params[t][r], token + TILE * t + 8 * r, end)
        return params

    @cute.jit
    def accumulate(self, addresses: Addresses, slice_: cutlass.Constexpr, p: list, out: list, zeros: list, partial: Boolean, token: Int32, end: Int32):
        """O^T += V^T P^T of a slice; ``token`` is the lane's first token in B order, ``end`` the end of the cache."""
        operand = [[self.transposed(t) for t in tiles] for tiles in p]
        vectors = self.code_vectors(addresses.v_lane, self.fmt.v_codes, slice_, self.fmt.v_vector_words)
        constant = half2_constant(symmetric_zero(self.v_bits))
        per_group = self.v_group // TILE
        for g in range_constexpr(self.v_groups):
            scale = self.value_params(addresses, self.fmt.v_scale, g, slice_, partial, token, end)
            zero = [[constant] * 2] * 2
            if cutlass.const_expr(self.fmt.v_zero is not None):
                zero = self.value_params(addresses, self.fmt.v_zero, g, slice_, partial, token, end)
            for n in range_constexpr(self.column_tiles):
                scaled = [[ptx.mul_half2(operand[n][t][r], scale[t][r]) for r in range(2)] for t in range(2)]
                for t in range_constexpr(2):
                    z0, z1 = zero[t]
                    zeros[n][g] = ptx.mma(zeros[n][g], [z0, z0, z1, z1], scaled[t])
                    for c in range_constexpr(g * per_group, (g + 1) * per_group):
                        a = [extract(vectors, f, self.v_bits) for f in self.v_fragments[t, c]]
                        out[n][c] = ptx.mma(out[n][c], a, scaled[t])
        return out, zeros

    # -- consumers ---------------------------------------------------------------------------------------------

    @cute.jit
    def consume(self, p: Params, smem: Int32, warp: Int32, lane: Int32, b: Int32, start: Int32, piece: Int32, unit: Int32, x: Int32, shares: Shares, q_tiles: Int32):
        """Attend over this CTA's share, from unit x on: blocks from the ring, 16-bit units from global memory, merge."""
        x0 = x
        x1 = shares.start(cute.arch.block_idx()[0] + 1)
        group_index = warp // self.warps_per_block
        member = warp % self.warps_per_block
        next_block = group_index  # of this warp, counted over the CTA's share
        stage = group_index
        parity = Int32(0)
        ring = Int32(0)  # blocks of the share before this piece
        while x < x1:
            seq = self.sequence(p, b)
            count = cutlass.min(x1 - x, seq.units - unit)
            head = piece // q_tiles
            first_row = (piece - head * q_tiles) * self.q_tile
            queries, powers, sums = self.load_queries(p, lane, b, head, first_row)
            bounds = self.column_bounds(p, lane, seq, first_row)
            top = [[Float32(FIRST_MAX)] * 2 for _ in range(self.column_tiles)]
            total = [[Float32(0.0)] * 2 for _ in range(self.column_tiles)]
            out = [[[Float32(0.0)] * 4 for _ in range(self.tiles)] for _ in range(self.column_tiles)]
            zeros = [[[Float32(0.0)] * 4 for _ in range(self.v_groups)] for _ in range(self.column_tiles)]

            ring_end = ring + cutlass.max(cutlass.min(unit + count, seq.blocks) - unit, 0)
            end = seq.sinks + seq.packed
            all_see = cutlass.min(end, seq.length - p.q_len + 1)  # positions below it are visible to every query
            while next_block < ring_end:
                first_token = (seq.first_block + unit + next_block - ring) * BLOCK_TOKENS  # of the packed tokens
                position = seq.sinks + first_token
                partial = (position + BLOCK_TOKENS > all_see) | (position < seq.length - p.window)
                ptx.mbarrier_wait(smem + self.full_at + stage * 8, parity, self.wait_form)
                top, total, out, zeros = self.attend_block(
                    p, smem + stage * self.fmt.block_bytes, member, lane, position, partial, end,
                    queries, powers, sums, bounds, top, total, out, zeros,
                )
                cute.arch.sync_warp()
                if lane == 0:
                    ptx.mbarrier_arrive(smem + self.empty_at + stage * 8)
                next_block += self.block_groups
                stage += self.block_groups
                if stage >= self.stages:
                    stage -= self.stages
                    parity = parity ^ 1
            out = self.in_value_units(out, zeros)
            chunk = cutlass.max(unit - seq.blocks, 0) + group_index
            while chunk < unit + count - seq.blocks:
                top, total, out = self.attend_chunk(
                    p, seq, chunk, member, lane, b, head, queries, powers, bounds, top, total, out
                )
                chunk += self.block_groups
            self.merge(p, smem, warp, lane, b, head, first_row, piece, start, seq.units, x, count, x0, shares, top, total, out)

            ring = ring_end
            x += count
            unit = Int32(0)
            piece += 1
            if piece == p.num_kv_heads * q_tiles:
                piece = Int32(0)
                start += p.num_kv_heads * q_tiles * seq.units
                b += 1

    def column_bounds(self, p: Params, lane: Int32, seq: Sequence, first_row: Int32) -> list:
        """[n][2] of (low, high): the positions that the lane's columns 2t, 2t + 1 see, less the lane's row g."""
        group = p.num_q_heads // p.num_kv_heads
        bounds = []
        for n in range(self.column_tiles):
            pair = []
            for j in range(2):
                token = (first_row + n * COLUMNS + (lane & 3) * 2 + j) // group
                high = seq.length - p.q_len + token + 1 - (lane >> 2)
                pair.append((high - p.window, high))
            bounds.append(pair)
        return bounds

    @cute.jit
    def attend_block(self, p: Params, stage: Int32, member: Int32, lane: Int32, position: Int32, partial: Boolean, end: Int32, queries: list, powers: list, sums: list, bounds: list, top: list, total: list, out: list, zeros: list):
        """A warp's slices of one block."""
        fmt = self.fmt
        first = member * self.slices
        quad = (lane & 3) * 16
        group_row = first * SLICE_TOKENS // self.k_group * (2 * self.head_dim)
        addresses = Addresses(
            stage + first * (fmt.k_codes.nbytes // NUM_SLICES) + lane * (4 * fmt.k_vector_words),
            stage + first * (fmt.v_codes.nbytes // NUM_SLICES) + lane * (4 * fmt.v_vector_words),
            stage + quad + (group_row if self.k_axis == "channel" else 0),
            stage + quad + first * (2 * SLICE_TOKENS),
            stage + (lane >> 2) * (8 * self.k_groups) + first * (2 * SLICE_TOKENS * self.k_groups),
        )
        mean = self.mean_scores(stage + quad, queries)
        scaled, bias = [], []
        for i in range_constexpr(self.slices):
            if cutlass.const_expr(self.k_axis == "channel" and i * SLICE_TOKENS % self.k_group == 0):
                scaled, bias = self.scaled_queries(addresses.k_quad, i * SLICE_TOKENS // self.k_group, queries)
            scores = self.scores(addresses, i, queries, scaled, bias, powers, sums, mean)
            if cutlass.const_expr(self.softcap):
                scores = self.soft_capped(scores, p.softcap)
            at = position + (first + i) * SLICE_TOKENS
            if partial:
                limited = [[(low, cutlass.min(high, end - (lane >> 2))) for low, high in pair] for pair in bounds]
                scores = self.masked(scores, at, limited)
            scores, top, total, out, zeros = self.softmax(scores, top, total, out, zeros)
            out, zeros = self.accumulate(addresses, i, scores, out, zeros, partial, at + (lane & 3) * 2, end)
        return top, total, out, zeros

    def mean_scores(self, quad_base: Int32, queries: list) -> list:
        """[n][2]: Q times the block's channel mean (0 without one)."""
        if self.fmt.k_mean is None:
            return [[Float32(0.0)] * 2 for _ in queries]
        total = [[Float32(0.0)] * 4 for _ in queries]
        for pair in range(self.tiles // 2):
            mean = self.b_params(quad_base, self.fmt.k_mean, 0, pair)
            for n, tiles in enumerate(queries):
                for i in range(2):
                    m0, m1 = mean[i]
                    total[n] = ptx.mma(total[n], [m0, m0, m1, m1], tiles[2 * pair + i])
        return [t[:2] for t in total]

    def soft_capped(self, scores: list, cap: Float32) -> list:
        """cap * tanh(s / cap) on log2 scores; tanh from exp2, since tanh.approx has 11 bits only."""
        inverse = ptx.reciprocal(cap) * 2.0  # exp2 of log2 scores times 2 / cap is e^(2 s / cap)
        limit = cap * LOG2E

        def capped(x: Float32) -> Float32:
            return limit - 2.0 * limit * ptx.reciprocal(ptx.exp2(x * inverse) + 1.0)

        return [[[capped(x) for x in tile] for tile in tiles] for tiles in scores]

    def in_value_units(self, out: list, zeros: list) -> list:
        """O^T = codes P' / their power of two + zeros P': what the warp's blocks add up to."""
        per_group = self.v_group // TILE
        for n in range(self.column_tiles):
            for c in range(self.tiles):
                factor = [1.0 / power(self.v_fragments[0, c][i // 2]) for i in range(4)]
                zero = zeros[n][c // per_group]
                out[n][c] = [x * factor[i] + zero[i] for i, x in enumerate(out[n][c])]
        return out

    @cute.jit
    def attend_chunk(self, p: Params, seq: Sequence, chunk: Int32, member: Int32, lane: Int32, b: Int32, head: Int32, queries: list, powers: list, bounds: list, top: list, total: list, out: list):
        """A warp's 16 tokens of a 16-bit unit; sinks come first, then the tail."""
        k_rows, v_rows, capacity = p.sink_k.toint(), p.sink_v.toint(), p.num_sink
        token, held, offset = chunk * self.chunk, seq.sinks, Int32(0)
        if chunk >= seq.sink_units:
            k_rows, v_rows, capacity = p.tail_k.toint(), p.tail_v.toint(), p.tail_capacity
            token = (chunk - seq.sink_units) * self.chunk
            held = seq.tail
            offset = seq.sinks + seq.packed
        token += member * TILE
        if token < held:
            # byte offsets of the lane's rows g and g + 8; rows beyond the last are read as the last and masked
            rows = []
            for r in range_constexpr(2):
                row = cutlass.min(token + (lane >> 2) + 8 * r, held - 1)
                at = (Int64(b * capacity + row) * p.num_kv_heads + head) * (2 * self.head_dim)
                rows.append(at + Int64(lane & 3) * 4)
            scores = [[[Float32(0.0)] * 4] for _ in range(self.column_tiles)]
            for c in range_constexpr(self.tiles):
                a = [self.halves(ptx.load_global(k_rows + rows[r & 1], offset=2 * TILE * c + 16 * (r >> 1))[0]) for r in range(4)]
                for n in range_constexpr(self.column_tiles):
                    scores[n][0] = ptx.mma(scores[n][0], a, queries[n][c])
            scores = [[[x * powers[n][i % 2] for i, x in enumerate(scores[n][0])]] for n in range(self.column_tiles)]
            if cutlass.const_expr(self.softcap):
                scores = self.soft_capped(scores, p.softcap)
            limited = [[(low, cutlass.min(high, offset + held - (lane >> 2))) for low, high in pair] for pair in bounds]
            scores = self.masked(scores, offset + token, limited)
            scores, top, total, out, _ = self.softmax(scores, top, total, out, [[]] * self.column_tiles)
            operand = [self.transposed(scores[n][0]) for n in range(self.column_tiles)]
            for c in range_constexpr(self.tiles):
                # 8 x 8 matrices (tokens 8 r1.., channels 8 r0..) transposed to A registers r0 + 2 r1
                a = [ptx.transpose8x8(self.halves(ptx.load_global(v_rows + rows[r >> 1], offset=2 * TILE * c + 16 * (r & 1))[0])) for r in range(4)]
                for n in range_constexpr(self.column_tiles):
                    out[n][c] = ptx.mma(out[n][c], a, operand[n])
        return top, total, out

    # -- merging -----------------------------------------------------------------------------------------------

    @cute.jit
    def merge(self, p: Params, smem: Int32, warp: Int32, lane: Int32, b: Int32, head: Int32, first_row: Int32, piece: Int32, start: Int32, units: Int32, x: Int32, count: Int32, x0: Int32, shares: Shares, top: list, total: list, out: list):
        """Merge the warps' results of a piece's part; store the output, or a partial result and merge the last."""
        scratch = smem + self.scratch_at
        row_bytes = self.row_floats * 4
        mine = scratch + warp * (self.q_tile * row_bytes)
        for n in range_constexpr(self.column_tiles):
            for j in range_constexpr(2):
                row = mine + (n * COLUMNS + (lane & 3) * 2 + j) * row_bytes
                for c in range_constexpr(self.tiles):
                    for r in range_constexpr(2):
                        at = 4 * (TILE * c + 8 * r)
                        ptx.store_shared_floats(row + (lane >> 2) * 4, at, [out[n][c][2 * r + j]])
                weight = total[n][j]
                for i in range_constexpr(3):
                    weight += ptx.shuffle_xor(weight, 4 << i)
                if lane < 4:
                    ptx.store_shared_floats(row, 4 * self.head_dim, [top[n][j], weight])
        consumers = self.warps * WARP
        ptx.barrier(CONSUMER_BARRIER, consumers)

        group = p.num_q_heads // p.num_kv_heads
        columns = cutlass.min(group * p.q_len - first_row, self.q_tile)
        quads = self.head_dim // 4  # 4 channels per thread
        first = start + piece * units  # first unit of the piece
        whole = count == units
        cta = cute.arch.block_idx()[0]
        slot_bytes = self.q_tile * (self.head_dim + 2) * 4
        slots = p.workspace.toint() + Int64(self.counter_bytes(p))
        my_slot = slots + Int64(2 * cta + cutlass.select_(x == x0, Int32(0), Int32(1))) * slot_bytes
        item = warp * WARP + lane
        while item < columns * quads:
            column = item // quads
            quad = item - column * quads
            row = scratch + column * row_bytes
            states = [ptx.load_shared_floats(row, w * self.q_tile * row_bytes + 4 * self.head_dim, 2) for w in range(self.warps)]
            values = [ptx.load_shared_floats(row + quad * 16, w * self.q_tile * row_bytes, 4) for w in range(self.warps)]
            peak, weight, value = self.combine(states, values)
            if whole:
                self.store_output(p, b, head, first_row + column, quad, peak, weight, value)
            else:
                ptx.store_global(my_slot + Int64(column * self.head_dim + quad * 4) * 4, value)
                if quad == 0:
                    ptx.store_global(my_slot + Int64(self.q_tile * self.head_dim + column * 2) * 4, [peak, weight])
            item += consumers
        ptx.barrier(CONSUMER_BARRIER, consumers)
        if count != units:
            first_cta, last_cta = shares.holder(first), shares.holder(first + units - 1)
            counter = p.workspace.toint() + Int64((b * p.num_kv_heads + head) * self.q_tiles(p) + first_row // self.q_tile) * 4
            flag = smem + self.flag_at
            if (warp == 0) & (lane == 0):
                arrived = ptx.atomic_add(counter, Int32(1))
                is_last = cutlass.select_(arrived == last_cta - first_cta, Int32(1), Int32(0))
                if is_last == 1:
                    ptx.store_global(counter, [Int32(0)])  # ready for the next launch
                ptx.store_shared_floats(flag, 0, [ptx.from_bits(is_last)])
            ptx.barrier(CONSUMER_BARRIER, consumers)
            if ptx.load_shared(flag, 0, 1)[0] == 1:
                # a piece starts in the second slot of its first CTA unless that CTA starts with it
                first_slot = cutlass.select_(shares.start(first_cta) == first, Int32(0), Int32(1))
                item = warp * WARP + lane
                while item < columns * quads:
                    column = item // quads
                    quad = item - column * quads
                    peak, weight, value = self.combine_slots(slots, slot_bytes, first_cta, last_cta, first_slot, column, quad)
                    self.store_output(p, b, head, first_row + column, quad, peak, weight, value)
                    item += consumers
            ptx.barrier(CONSUMER_BARRIER, consumers)

    def combine(self, states: list, values: list) -> tuple:
        """Merge (maximum, sum) pairs and their vectors of 4 -> maximum, sum, 4 floats, both unnormalised."""
        peak = states[0][0]
        for top, _ in states[1:]:
            peak = ptx.fmax(peak, top)
        weight = Float32(0.0)
        value = [Float32(0.0)] * 4
        for (top, part), vector in zip(states, values, strict=True):
            factor = ptx.exp2(top - peak)
            weight = weight + factor * part
            value = [a + factor * v for a, v in zip(value, vector, strict=True)]
        return peak, weight, value

    @cute.jit
    def combine_slots(self, slots: Int64, slot_bytes: cutlass.Constexpr, first_cta: Int32, last_cta: Int32, first_slot: Int32, column: Int32, quad: Int32):
        """Merge the partial results of CTAs first_cta..last_cta in that order, MERGE_BATCH at a time."""
        peak = Float32(FIRST_MAX)
        weight = Float32(0.0)
        value = [Float32(0.0)] * 4
        cta = first_cta
        while cta <= last_cta:
            states, values = [[peak, weight]], [value]
            for i in range_constexpr(MERGE_BATCH):
                source = cutlass.min(cta + i, last_cta)
                slot = 2 * source + cutlass.select_(source == first_cta, first_slot, Int32(0))
                base = slots + Int64(slot) * slot_bytes
                state = ptx.load_global(base + Int64(self.q_tile * self.head_dim + column * 2) * 4, 2, cache="cg")
                vector = ptx.load_global(base + Int64(column * self.head_dim + quad * 4) * 4, 4, cache="cg")
                top = cutlass.select_(cta + i <= last_cta, ptx.from_bits(state[0]), Float32(-float("inf")))
                states.append([top, ptx.from_bits(state[1])])
                values.append([ptx.from_bits(v) for v in vector])
            peak, weight, value = self.combine(states, values)
            cta += MERGE_BATCH
        return peak, weight, value

    @cute.jit
    def store_output(self, p: Params, b: Int32, head: Int32, row: Int32, quad: Int32, peak: Float32, weight: Float32, value: list):
        """Normalise and store 4 channels of one query row; no visible key gives zeros and an lse of -inf."""
        group = p.num_q_heads // p.num_kv_heads
        token, member = self.row_of(p, row)
        q_head = head * group + member
        scale = Float32(1.0)
        if p.sink_logits.toint() != 0:
            sink = ptx.from_bits(ptx.load_global(p.sink_logits.toint() + Int64(q_head) * 4)[0]) * LOG2E
            with_sink = ptx.fmax(peak, sink)
            scale = ptx.exp2(peak - with_sink)
            weight = weight * scale + ptx.exp2(sink - with_sink)
            peak = with_sink
        inverse = Float32(0.0)
        if weight > 0.0:
            inverse = scale * ptx.reciprocal(weight)
        value = [v * inverse for v in value]
        pack = ptx.to_bfloat2 if self.bfloat16 else ptx.to_half2
        at = Int64(b * p.q_len + token) * p.num_q_heads + q_head
        target = p.out.toint() + at * (2 * self.head_dim) + Int64(quad) * 8
        ptx.store_global(target, [pack(value[0], value[1]), pack(value[2], value[3])])
        if (p.lse.toint() != 0) & (quad == 0):
            ptx.store_global(p.lse.toint() + at * 4, [(peak + ptx.log2(weight)) * (1.0 / LOG2E)])

    # -- sizes and launch --------------------------------------------------------------------------------------

    def q_tiles(self, p: Params) -> Int32:
        rows = p.num_q_heads // p.num_kv_heads * p.q_len
        return (rows + self.q_tile - 1) // self.q_tile

    def counter_bytes(self, p: Params) -> Int32:
        """The counters at the start of the workspace, to a multiple of 128 bytes."""
        return (p.batch * p.num_kv_heads * self.q_tiles(p) * 4 + 127) // 128 * 128

    @cute.kernel
    def kernel(self, p: Params):
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // WARP)
        lane = thread % WARP
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        if thread == 0:
            for stage in range_constexpr(self.stages):
                ptx.mbarrier_init(smem + (self.full_at + 8 * stage), 1 if self.bulk else WARP)
                ptx.mbarrier_init(smem + (self.empty_at + 8 * stage), self.warps_per_block)
            if cutlass.const_expr(self.bulk):
                ptx.fence_mbarrier_init()
        cute.arch.sync_threads()

        q_tiles = self.q_tiles(p)
        pieces = p.num_kv_heads * q_tiles  # of a sequence
        units = self.total_units(p, lane) * pieces
        ctas = cute.arch.grid_dim()[0]
        shares = Shares(units // ctas, units % ctas)
        cta = cute.arch.block_idx()[0]
        x, x1 = shares.start(cta), shares.start(cta + 1)
        if x < x1:
            b, start = self.locate(p, pieces, x, lane)
            per_piece = self.sequence(p, b).units
            piece = (x - start) // per_piece
            unit = x - start - piece * per_piece
            if warp == self.warps:
                self.produce(p, smem, lane, b, piece, unit, x, x1, q_tiles)
            else:
                self.consume(p, smem, warp, lane, b, start, piece, unit, x, shares, q_tiles)

    @cute.jit
    def __call__(self, p: Params, grid: Int32):
        self.kernel(p).launch(
            grid=(grid, 1, 1),
            block=(self.threads, 1, 1),
            smem=self.smem_bytes,
            min_blocks_per_mp=self.min_ctas,
            preferred_smem_carveout=100,
        )


def example_params() -> Params:
    """Arguments of the right types, for compiling."""

    def pointer(dtype: type) -> cute.Pointer:
        return make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=16)

    types = {"block_table": Int32, "seqlens": Int32, "packed_lens": Int32, "sink_logits": Float32, "lse": Float32}
    values = []
    for name, kind in Params.__annotations__.items():
        values.append(pointer(types.get(name, cutlass.Uint8)) if kind is cute.Pointer else kind(1))
    return Params(*values)
