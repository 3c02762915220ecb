"""The BitFusion block, written down once as CuTe layouts.

A block holds 128 tokens of one KV head: K and V codes and their parameters, contiguous, one bulk copy.
Both GEMMs of decode attention run transposed, with the cache as the A operand of ``m16n8k16``:

    S^T[token, q] = K[token, channel] Q^T[channel, q]        A tile: 16 tokens   x 16 channels
    O^T[channel, q] = V^T[channel, token] P^T[token, q]      A tile: 16 channels x 16 tokens

so codes are stored in the order in which a lane's A registers want them, and never pass through a
dequantised tile. wgmma with A in registers has the same fragment per warp.

Code words (32 bit, one lane): half ``e`` of a register is the word's upper or lower 16 bits, so one AND
extracts a register's pair of codes as two fp16 denormals.
    8 bit: half a tile  (rows g, g+8);     2 words per tile
    4 bit: one tile;                       rows g: bits 0-3, 8-11, rows g+8: bits 4-7, 12-15
    2 bit: two tiles;                      as 4 bit, the second tile 2 bits higher. K pairs token tiles
                                           (2i, 2i+1), V pairs channel tiles (c, c + head_dim/32), so that
                                           the two never share an accumulator
Words of a lane are grouped to 16-byte vectors (8-byte for 2 bit at head_dim 96), vectors are lane-major.
A *slice* is 32 tokens (two token tiles); no vector crosses it, so a warp may own any number of slices.
Which tiles share a vector at 4 bit: K channel tiles {2j, 2j+1} x token tiles {2i, 2i+1}; V channel tiles
{c, c + head_dim/32} x token tiles {2i, 2i+1}; at 8 bit it is half of that, at 2 bit twice. So a warp of the
mma.sync path (all channels of its slice) and one of the wgmma path (K: token tiles 2w, 2w+1; V: channel
tiles w, w+4) read whole vectors, but for 2-bit V on the wgmma path: half vectors.

Values are ``scale * (code + zero)``; scale and zero are fp16, in the order of the MMA operand they meet.
Layout codomains: bits for codes, fp16 elements for parameters, both relative to their section.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from pycute import Layout, composition, right_inverse, size

from .checks import check_one_of

FORMAT_VERSION = 1
BLOCK_TOKENS = 128
BLOCK_SHIFT = BLOCK_TOKENS.bit_length() - 1
TILE = 16  # rows and columns of an A tile of m16n8k16
SLICE_TOKENS = 2 * TILE  # two token tiles share vectors
NUM_SLICES = BLOCK_TOKENS // SLICE_TOKENS
WORD_BITS = 32
HALF_BITS = 16  # distance of the two halves of an MMA register
LANES = 32
BLOCK_ALIGN = 128  # bytes; a DRAM burst and more than the 16 of a bulk copy
HEAD_DIMS = (64, 96, 128, 256)
BITS = (8, 4, 2)
GROUPS = (32, 64, 128)

# Thread-value layouts of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16", CuTe SM80_16x8x16):
# (lane, value) -> row + 16 * column of A, and n + 8 * k of B. lane = t + 4 g, A value = e + 2 r0 + 4 r1.
MMA_A_TV = Layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128)))
MMA_B_TV = Layout(((4, 8), (2, 2)), ((16, 1), (8, 64)))


class Quant(Protocol):
    """What a block format needs to know of a QuantSpec."""

    k_bits: int
    v_bits: int
    k_axis: str
    k_group: int
    v_group: int
    k_symmetric: bool
    v_symmetric: bool
    k_mean: str


@dataclass(frozen=True)
class Section:
    """A part of a block: byte offset, size in bytes, and where each coordinate lies inside it."""

    offset: int
    nbytes: int
    layout: Layout

    def table(self) -> np.ndarray:
        """Offsets of all coordinates of a rank-2 layout, int64 [size(mode 0), size(mode 1)]."""
        rows, cols = (np.array([mode(i) for i in range(size(mode))]) for mode in self.layout)
        return (rows[:, None] + cols[None, :]).astype(np.int64)


def codes_layout(operand: str, head_dim: int, bits: int) -> tuple[Layout, int]:
    """(token, channel) -> bit offset of a code, and the number of words in a lane's vector.

    The A tile's place in the words comes from the atom (``right_inverse`` of its TV layout); the order of
    the words of a slice in a lane is ``stream``, fastest first.
    """
    tiles = head_dim // TILE
    # (name, size) of a lane's words within a slice; "r1" is the MMA register bit that selects columns + 8
    if operand == "k":  # rows are tokens
        stream = {
            8: (("r1", 2), ("c0", 2), ("t0", 2), ("c1", tiles // 2)),
            4: (("c0", 2), ("t0", 2), ("c1", tiles // 2)),
            2: (("c0", 2), ("c1", tiles // 2)),
        }[bits]
    else:  # rows are channels; c1 = 0, 1 are the halves of head_dim
        stream = {
            8: (("r1", 2), ("t0", 2), ("c1", 2), ("c0", tiles // 2)),
            4: (("t0", 2), ("c1", 2), ("c0", tiles // 2)),
            2: (("t0", 2), ("c0", tiles // 2)),
        }[bits]
    words = 1
    word_index = {}
    for name, extent in stream:
        word_index[name] = Layout(extent, words)
        words *= extent
    vector_words = 4 if words % 4 == 0 else 2
    lane_bits = vector_words * WORD_BITS
    # word of the stream -> bits: words of a vector are adjacent, then come the other lanes' vectors
    place = Layout((vector_words, words // vector_words), (WORD_BITS, LANES * lane_bits))
    at = {name: composition(place, index) for name, index in word_index.items()}
    if bits == 2:  # the second tile of a word
        at["t0" if operand == "k" else "c1"] = Layout(2, bits)

    # bit of (lane, value): r0 (rows + 8) is the next code, r1 (columns + 8) the next byte or word
    r0 = 8 if bits == 8 else 4
    r1 = at["r1"].stride if bits == 8 else 8
    tv_bits = Layout(((4, 8), (2, 2, 2)), ((lane_bits, 4 * lane_bits), (HALF_BITS, r0, r1)))
    tile_bits = composition(composition(tv_bits, right_inverse(MMA_A_TV)), Layout((TILE, TILE)))
    row, col = tile_bits[0], tile_bits[1]

    token, channel = (row, col) if operand == "k" else (col, row)
    slices = Layout(NUM_SLICES, words * LANES * WORD_BITS)
    first, second = at["c0"], at["c1"]
    return _nest(_nest(token, at["t0"], slices), _nest(channel, first, second)), vector_words


def _nest(*modes: Layout) -> Layout:
    """One layout whose modes are the given ones."""
    return Layout(tuple(m.shape for m in modes), tuple(m.stride for m in modes))


def b_order(extent: int) -> Layout:
    """Index along the k dimension of B -> fp16 element: lane t's 16-byte vector x serves k tiles 2x, 2x+1.

    Parameters that scale rows of B (K per channel, V per token) or are A's columns lie in this order.
    """
    # bits of k inside a tile: e (k+1), t (2 k), r (k+8); a lane's elements e, r and the odd tile are adjacent
    tv = Layout(((4, 8), (2, 2)), ((8, 0), (1, 2)))
    k = composition(composition(tv, right_inverse(MMA_B_TV)), Layout(TILE, 8))
    return _nest(k, Layout(2, 4), Layout(extent // (2 * TILE), 2 * TILE))


def row_order(num_groups: int) -> Layout:
    """(token, channel group) -> fp16 element: lane group g reads rows g, g+8, g+16, g+24 of a slice at once."""
    rows = 4
    token = Layout((8, 2, 2, NUM_SLICES), (rows * num_groups, 1, 2, SLICE_TOKENS * num_groups))
    return _nest(token, Layout(num_groups, rows))


def token_rows(head_dim: int, tokens: int) -> Layout:
    """(token, operand, channel) -> fp16 element of 16-bit tokens in a stage: each one's key, then its value.

    A pad turns each row's vectors to other banks than the next one's: ``ldmatrix`` reads those of eight rows at once.
    """
    return Layout((tokens, 2, head_dim), (2 * head_dim + 8, head_dim, 1))


def transform_parts(size: int) -> Layout:
    """(half, odd, high) -> byte of that half of quarter ``odd + 2 high`` of ``size`` 16-bit values, as four lanes that
    transform them read and store them (rows.py).
    """
    return Layout((2, 2, 2), (size // 4, size // 2, size))


@dataclass(frozen=True)
class BlockFormat:
    """Where everything lies in a block. Build it with :func:`block_format`.

    Sections, in memory order (absent ones are None):
        k_codes  (token, channel) -> bit
        k_scale, k_zero  axis "channel": (token group, channel); axis "token": (token, channel group) -> fp16 element
        k_mean   (0, channel) -> fp16 element
        v_codes  (token, channel) -> bit
        v_scale, v_zero  (channel group, token) -> fp16 element
    """

    head_dim: int
    k_codes: Section
    k_scale: Section
    k_zero: Section | None
    k_mean: Section | None
    v_codes: Section
    v_scale: Section
    v_zero: Section | None
    k_vector_words: int
    v_vector_words: int
    block_bytes: int

    @cached_property
    def sections(self) -> dict[str, Section]:
        names = ("k_codes", "k_scale", "k_zero", "k_mean", "v_codes", "v_scale", "v_zero")
        return {name: section for name in names if (section := getattr(self, name)) is not None}


def block_format(head_dim: int, quant: Quant) -> BlockFormat:
    """The block format of ``quant`` at ``head_dim``; raises InvalidArgument where there is none."""
    check_one_of("head_dim", head_dim, HEAD_DIMS)
    q = quant
    return _block_format(
        head_dim, q.k_bits, q.v_bits, q.k_axis, q.k_group, q.v_group, q.k_symmetric, q.v_symmetric, q.k_mean
    )


@lru_cache(maxsize=None)
def _block_format(
    head_dim: int,
    k_bits: int,
    v_bits: int,
    k_axis: str,
    k_group: int,
    v_group: int,
    k_symmetric: bool,
    v_symmetric: bool,
    k_mean: str,
) -> BlockFormat:
    check_one_of("k_bits", k_bits, BITS)
    check_one_of("v_bits", v_bits, BITS)
    check_one_of("k_axis", k_axis, ("channel", "token"))
    check_one_of("k_mean", k_mean, ("none", "block"))
    dividing = tuple(g for g in GROUPS if head_dim % g == 0)
    check_one_of("k_group", k_group, GROUPS if k_axis == "channel" else dividing)
    check_one_of("v_group", v_group, dividing)

    if k_axis == "channel":
        k_param = _nest(Layout(BLOCK_TOKENS // k_group, head_dim), b_order(head_dim))
    else:
        k_param = row_order(head_dim // k_group)
    v_param = _nest(Layout(head_dim // v_group, BLOCK_TOKENS), b_order(BLOCK_TOKENS))

    offset = 0

    def section(layout: Layout, element_bits: int) -> Section:
        nonlocal offset
        made = Section(offset, size(layout) * element_bits // 8, layout)
        offset += made.nbytes
        return made

    half = 16
    k_layout, k_vector_words = codes_layout("k", head_dim, k_bits)
    v_layout, v_vector_words = codes_layout("v", head_dim, v_bits)
    k_codes = section(k_layout, k_bits)
    k_scale = section(k_param, half)
    k_zero = None if k_symmetric else section(k_param, half)
    mean = section(_nest(Layout(1, 0), b_order(head_dim)), half) if k_mean == "block" else None
    v_codes = section(v_layout, v_bits)
    v_scale = section(v_param, half)
    v_zero = None if v_symmetric else section(v_param, half)
    block_bytes = -(-offset // BLOCK_ALIGN) * BLOCK_ALIGN
    return BlockFormat(
        head_dim, k_codes, k_scale, k_zero, mean, v_codes, v_scale, v_zero, k_vector_words, v_vector_words, block_bytes
    )


def symmetric_zero(bits: int) -> float:
    """The zero of a symmetric quantiser, not stored: codes are centred, x = scale * (code + symmetric_zero)."""
    return -((1 << bits) - 1) / 2
