"""Trace-time helpers of the kernels: where an A register lies in the packed words, and how one AND extracts it."""

from typing import NamedTuple

import numpy as np
from cutlass import Int32

from .layouts import LANES, TILE, WORD_BITS, Section


class Fragment(NamedTuple):
    """Where an A register lies: vector of the slice, word of the vector, first bit."""

    vector: int
    word: int
    bit: int


def fragments(section: Section, operand: str, head_dim: int, vector_words: int) -> dict:
    """(token tile of the slice, channel tile) -> the four Fragments of its A registers, from the block's layout."""

    def at(token: int, channel: int) -> Fragment:
        bit = section.layout(token, channel)
        vector, word = divmod(bit // WORD_BITS, LANES * vector_words)
        return Fragment(vector, word, bit % WORD_BITS)

    tiles = {}
    for t in range(2):
        for c in range(head_dim // TILE):
            registers = []
            for r in range(4):
                row, col = 8 * (r & 1), 8 * (r >> 1)
                token, channel = (row, col) if operand == "k" else (col, row)
                registers.append(at(TILE * t + token, TILE * c + channel))
            tiles[t, c] = registers
    return tiles


def matrix_row(lane: Int32, is_k: bool) -> tuple:
    """(token, channel) of a tile whose address a lane gives to ``ldmatrix`` (V: transposed), which names row lane % 8
    of matrix lane / 8; matrix r becomes A register r.
    """
    low, high = lane >> 3 & 1, lane >> 4
    tokens, channels = (low, high) if is_k else (high, low)
    return lane % 8 + 8 * tokens, 8 * channels


def power(fragment: Fragment) -> float:
    """Code q at this place reads as the fp16 denormal q * power once its register is AND-ed out."""
    return 2.0 ** (fragment.bit % 8 - 24)


def extract(vectors: list, fragment: Fragment, bits: int) -> Int32:
    """The A register of a fragment: two codes as fp16 denormals; one AND, and a shift that two registers share."""
    word = vectors[fragment.vector][fragment.word]
    if fragment.bit >= 8:
        word = word >> 8
    mask = ((1 << bits) - 1) << (fragment.bit % 8)
    return word & (mask | mask << 16)


def half2_constant(value: float) -> Int32:
    """A register with the fp16 value twice."""
    half = int(np.float16(value).view(np.uint16))
    return Int32(np.uint32(half | half << 16).view(np.int32).item())
