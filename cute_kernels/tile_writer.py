"""Tiles of K and V^T in fp16, written from blocks and 16-bit tokens in the order in which wgmma reads B.

A tile is made of core matrices (warpgroup.py), 8 of k by 8 of n: K has tokens as n and channels as k, V^T channels as n
and tokens as k. An A fragment of the packed words, 16 x 16, is four core matrices: one stmatrix. Of its registers each
is one AND and one HFMA2 with a folded multiplier and offset (fold.py), which for V and K per channel belong to columns
of the fragment: so a warp has channels of K and tokens of V for its own, and loads their parameters once.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute
from pycute import Layout

from . import ptx
from . import warpgroup as wg
from .fold import at_runtime, centred
from .fragments import extract, fragments, half2_constant
from .layouts import BLOCK_TOKENS, LANES, NUM_SLICES, SLICE_TOKENS, TILE, Section
from .tile_plan import WRITER_WARPS, TilePlan
from .values import halves
from .work import Params, Piece, tokens_of

PAIR = 2 * TILE  # channels of two channel tiles, which share vectors of K
CHUNK = wg.CORE_DEPTH  # values of a core matrix's row, and its rows
QUAD_LANES = 4  # that share a row of a fragment
UNIT_CHUNKS = SLICE_TOKENS // CHUNK  # of a warp's tokens of a 16-bit unit
COPY_CHANNELS = QUAD_LANES * CHUNK  # that a warp copies at once
# bits -> words of codes that a lane loads before it uses them; all of them at 2 bits, whose Multipliers are many
WORDS_AT_ONCE = {8: 4, 4: 4, 2: 8}


class Tile(NamedTuple):
    """An A fragment of a warp's part of a block."""

    slice: int  # of the warp's
    t: int  # token tile of the slice
    c: int  # channel tile, of the first warp
    fragments: list  # by A register


class Multiplier:
    """A half2 that scales codes read from any of their bits, made when first asked for (trace time)."""

    def __init__(self, register: Int32):
        self.made = {0: register}

    def at(self, bit: int) -> Int32:
        if bit not in self.made:
            self.made[bit] = ptx.mul_half2(self.made[0], half2_constant(2.0**-bit))
        return self.made[bit]


class TileWriter:
    """Writes the tiles of one kernel."""

    def __init__(self, plan: TilePlan):
        self.plan = plan
        self.fmt = plan.fmt
        self.quant = plan.quant
        self.k_fragments = fragments(self.fmt.k_codes, "k", plan.head_dim, self.fmt.k_vector_words)
        self.v_fragments = fragments(self.fmt.v_codes, "v", plan.head_dim, self.fmt.v_vector_words)
        self.key_tile = wg.operand_layout(BLOCK_TOKENS, plan.head_dim)  # (token, channel) -> byte
        self.value_tile = wg.operand_layout(plan.head_dim, BLOCK_TOKENS)  # (channel, token) -> byte
        # K is dealt to the warps by pairs of channel tiles and, if there are less of these than warps, by slices
        self.pair_warps = min(WRITER_WARPS, plan.head_dim // PAIR)
        self.key_slices = NUM_SLICES * self.pair_warps // WRITER_WARPS

    # -- blocks ------------------------------------------------------------------------------------------------------

    def keys(self, stage: Int32, folded: Int32, tile: Int32, warp: Int32, lane: Int32) -> None:
        """The warp's part of K of the block in ``stage``."""
        layout = self.fmt.k_codes.layout
        pair, part = warp % self.pair_warps, warp // self.pair_warps
        codes = stage + lane * (layout(0, 2) // 8) + part * (self.key_slices * layout(SLICE_TOKENS, 0) // 8)
        codes += at_runtime(lambda i: layout(0, PAIR * i) // 8, pair, self.pair_warps)
        target = tile + core_row(self.key_tile, lane) + pair * self.key_tile(0, PAIR)
        target += part * self.key_tile(self.key_slices * SLICE_TOKENS, 0)
        section, words, bits = self.fmt.k_codes, self.fmt.k_vector_words, self.quant.k_bits
        centres = self.plan.centres_keys
        for first in range(0, self.plan.tiles, 2 * self.pair_warps):
            tiles = [
                Tile(s, t, c, self.k_fragments[t, c])
                for s in range(self.key_slices)
                for t in range(2)
                for c in (first, first + 1)
            ]
            by_channel = self.quant.k_axis == "channel"
            params = (self.channel_params if by_channel else self.token_params)(folded, pair, part, first, lane)
            self.write(codes, section, words, bits, tiles, params, self.key_at, target, centres=centres)

    def values(self, stage: Int32, folded: Int32, tile: Int32, warp: Int32, lane: Int32) -> None:
        """The warp's slice of V."""
        layout = self.fmt.v_codes.layout
        codes = stage + lane * (layout(2, 0) // 8) + warp * (layout(SLICE_TOKENS, 0) // 8)
        target = tile + core_row(self.value_tile, lane) + warp * self.value_tile(0, SLICE_TOKENS)
        params = self.value_params(folded, warp, lane)
        section, words, bits = self.fmt.v_codes, self.fmt.v_vector_words, self.quant.v_bits
        # a group's parameters at a time; but words of 2-bit codes belong to both halves of head_dim
        at_once = self.plan.tiles if bits == 2 else self.quant.v_group // TILE
        for first in range(0, self.plan.tiles, at_once):
            channels = range(first, first + at_once)
            tiles = [Tile(0, t, c, self.v_fragments[t, c]) for t in range(2) for c in channels]
            self.write(
                codes, section, words, bits, tiles, params, self.value_at, target, ahead=at_once == self.plan.tiles
            )

    def write(
        self, codes: Int32, section: Section, vector_words: int, bits: int, tiles: list, params: Callable, at: Callable,
        target: Int32, centres: bool = False, ahead: bool = True
    ) -> None:  # fmt: skip
        """Dequantise and store a warp's tiles. codes: address of the first warp's and lane's; params: of a Tile the
        Multipliers and offsets by A register; at: its place behind ``target``; centres: codes get their zero first;
        ahead: there are registers for words that are loaded before they are needed.
        """
        tiles = sorted(tiles, key=lambda tile: (tile.slice, tile.fragments[0].vector))
        vectors = list(dict.fromkeys((tile.slice, tile.fragments[0].vector) for tile in tiles))
        count = WORDS_AT_ONCE[bits] // len({f.word for tile in tiles for f in tile.fragments})
        # the bits of the codes in turn, so that few Multipliers are needed at a time
        tiles.sort(key=lambda tile: (tile.fragments[0].bit, tile.t))
        batches = [vectors[i : i + count] for i in range(0, len(vectors), count)]

        def load(i: int) -> dict:
            return self.load_words(codes, section, vector_words, tiles, batches[i]) if i < len(batches) else {}

        following = load(0)
        for i in range(len(batches)):
            words = following
            if ahead:
                following = load(i + 1)
            for tile in tiles:
                vector = tile.fragments[0].vector
                if (tile.slice, vector) in words:
                    multipliers, offsets = params(tile)
                    found = {vector: words[tile.slice, vector]}
                    a = []
                    for r, f in enumerate(tile.fragments):
                        code, bit = extract(found, f, bits), f.bit % 8
                        if centres:
                            code, bit = centred(code, bit, bits), 0
                        a.append(wg.fma_half2(code, multipliers[r].at(bit), offsets[r]))
                    wg.store_matrices(target, at(tile), a, transposed=False)
            if not ahead:
                following = load(i + 1)

    def load_words(self, codes: Int32, section: Section, vector_words: int, tiles: list, vectors: list) -> dict:
        """{(slice, vector): {word: register}} of the words of these vectors that the tiles have codes in."""
        words = {}
        for s, vector in vectors:
            mine = [tile for tile in tiles if (tile.slice, tile.fragments[0].vector) == (s, vector)]
            used = sorted({f.word for tile in mine for f in tile.fragments})
            offset = s * (section.nbytes // NUM_SLICES) + 4 * (vector * LANES * vector_words + used[0])
            got = ptx.load_shared(codes, section.offset + offset, used[-1] - used[0] + 1)
            words[s, vector] = dict(enumerate(got, used[0]))
        return words

    def key_at(self, tile: Tile) -> int:
        return self.key_tile(tile.slice * SLICE_TOKENS + tile.t * TILE, tile.c * TILE)

    def value_at(self, tile: Tile) -> int:
        return self.value_tile(tile.c * TILE, tile.t * TILE)

    # -- parameters: functions of a Tile, which load when first asked --------------------------------------------------

    def channel_params(self, folded: Int32, pair: Int32, part: Int32, first: int, lane: Int32) -> Callable:
        """Of K per channel; ``first``: channel tile of the first warp's pair."""
        row_bytes = 2 * self.plan.head_dim
        base = folded + (lane & 3) * 16 + pair * (2 * PAIR)
        if self.key_slices < NUM_SLICES and self.plan.k_rows >= NUM_SLICES // self.key_slices:
            base += part * (self.key_slices * SLICE_TOKENS // self.quant.k_group * 2 * row_bytes)
        found = {}

        def params(tile: Tile) -> tuple:
            row = tile.slice * SLICE_TOKENS // self.quant.k_group
            if row not in found:
                # B order: a vector has columns 2q.., 2q + 8.. of one tile, then those of the next
                at = self.plan.folded_k_at + row * 2 * row_bytes + first * (2 * TILE)
                multipliers = [Multiplier(x) for x in ptx.load_shared(base, at, 4)]
                found[row] = multipliers, ptx.load_shared(base, at + row_bytes, 4)
            return tuple(by_column(x[2 * (tile.c - first) :]) for x in found[row])

        return params

    def token_params(self, folded: Int32, pair: Int32, part: Int32, first: int, lane: Int32) -> Callable:
        """Of K per token."""
        group_bytes = 8 * BLOCK_TOKENS
        base = folded + (lane >> 2) * 8 + part * (self.key_slices * SLICE_TOKENS * 8)
        base += at_runtime(lambda i: PAIR * i // self.quant.k_group * group_bytes, pair, self.pair_warps)
        mean = None
        if self.fmt.k_mean is not None:
            at = self.plan.folded_mean_at + first * (2 * TILE)
            mean = ptx.load_shared(folded + (lane & 3) * 16 + pair * (2 * PAIR), at, 4)
        found = {}

        def params(tile: Tile) -> tuple:
            token = tile.slice * SLICE_TOKENS + tile.t * TILE
            if token not in found:
                at = self.plan.folded_k_at + first * TILE // self.quant.k_group * group_bytes + token * 8
                words = 1 if self.plan.centres_keys else 2
                rows = [ptx.load_shared(base, at + 8 * CHUNK * r, words) for r in range(2)]
                found[token] = [Multiplier(row[0]) for row in rows], [row[1:] for row in rows]
            multipliers, offsets = (x * 2 for x in found[token])  # A registers 0 and 2 are row g, 1 and 3 row g + 8
            means = [None] * 4 if mean is None else by_column(mean[2 * (tile.c - first) :])
            if self.plan.centres_keys:
                return multipliers, means
            offsets = [x if y is None else wg.add_half2(x, y) for (x,), y in zip(offsets, means, strict=True)]
            return multipliers, offsets

        return params

    def value_params(self, folded: Int32, warp: Int32, lane: Int32) -> Callable:
        """Of V."""
        layout = self.fmt.v_scale.layout  # (channel group, token) -> fp16 element
        base = folded + (lane & 3) * 16 + warp * (2 * layout(0, SLICE_TOKENS))
        found = {}

        def params(tile: Tile) -> tuple:
            group = tile.c * TILE // self.quant.v_group
            if group not in found:
                at = 2 * layout(group, 0)
                multipliers = [Multiplier(x) for x in ptx.load_shared(base, self.plan.folded_v_multiplier_at + at, 4)]
                found[group] = multipliers, ptx.load_shared(base, self.plan.folded_v_offset_at + at, 4)
            return tuple(by_column(x[2 * tile.t :]) for x in found[group])

        return params

    # -- 16-bit tokens -----------------------------------------------------------------------------------------------

    @cute.jit
    def copy(self, p: Params, tiles: Int32, is_value: bool, warp: Int32, lane: Int32, piece: Piece, chunk: Int32):
        """The warp's 32 tokens of a 16-bit unit, into the tile of K or V at ``tiles``. Beyond the unit's tokens the
        last one is repeated; of an empty unit V is zero.
        """
        k, v, capacity, first, held, _ = tokens_of(p, piece, chunk, self.plan.chunk)
        source = v if is_value else k
        row_bytes = p.num_kv_heads * (2 * self.plan.head_dim)  # from a token to the next
        source += Int64(piece.b * capacity) * row_bytes + piece.head * (2 * self.plan.head_dim)
        thread = wg.thread_again()
        matrix, line = thread >> 3 & 3, thread & 7  # of stmatrix, whose address the lane has
        # a lane's token of 8, and its 8 channels of 32; K: tokens fastest, V: channels
        row, quad = (thread >> 2 & 7, thread & 3) if is_value else (line, matrix)
        for i in cutlass.range(UNIT_CHUNKS, unroll=1):
            octet = warp * UNIT_CHUNKS + i  # of tokens
            token = cutlass.min(first + octet * CHUNK + row, held - 1)
            at = source + Int64(token) * row_bytes + quad * wg.CORE_ROW_BYTES
            if cutlass.const_expr(is_value):
                # a matrix has of the lanes' 8 channels each two that follow: its rows are of four core matrices
                target = tiles + octet * self.value_tile(0, CHUNK) + (line >> 1) * self.value_tile(CHUNK, 0)
                target += (2 * matrix + (line & 1)) * self.value_tile(1, 0)
            else:
                target = tiles + quad * self.key_tile(0, CHUNK) + octet * self.key_tile(CHUNK, 0)
                target += row * self.key_tile(1, 0)
            for _ in cutlass.range(self.plan.head_dim // COPY_CHANNELS, unroll=1):
                values = [Int32(0)] * 4
                if first < held:
                    values = halves(p, ptx.load_global(at, 4))
                if cutlass.const_expr(is_value):
                    cute.arch.sync_warp()
                    wg.store_matrices(target, 0, values)
                    target += self.value_tile(COPY_CHANNELS, 0)
                else:
                    ptx.store_shared(target, 0, values)
                    target += self.key_tile(0, COPY_CHANNELS)
                at += QUAD_LANES * wg.CORE_ROW_BYTES


def core_row(tile: Layout, lane: Int32) -> Int32:
    """Byte of a lane's row of four core matrices: two along n, then the next two along k."""
    matrix, row = lane >> 3, lane & 7
    return (matrix & 1) * tile(CHUNK, 0) + (matrix >> 1) * tile(0, CHUNK) + row * tile(1, 0)


def by_column(pair: list) -> list:
    """By A register, what belongs to columns 2q.. (registers 0 and 1) and 2q + 8.. (2 and 3)."""
    return [pair[0], pair[0], pair[1], pair[1]]
