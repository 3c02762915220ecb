"""A warp in NumPy, as (lane, register): how the kernel reads a block, and that it equals a matmul.

Blocks are packed with the layout tables alone. The reading side below uses no table: it is written from the format's
description (16-byte vectors, lane-major; which tile is which word; the PTX ISA's fragments), and is the specification
that the kernel's loads follow. Numbers are chosen so that everything is exact: results must be equal, not close.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from bitdecoding.cute_kernels.layouts import BLOCK_TOKENS, block_format, symmetric_zero
from ptx_interpreter.numerics import A_INDEX, B_INDEX, C_COLS, C_ROWS, mma_operand

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # the fragment formulas' row group and position in it
QUERIES = 8


@dataclass(frozen=True)
class Spec:
    k_bits: int
    v_bits: int
    k_axis: str = "channel"
    k_group: int = 128
    v_group: int = 64
    k_symmetric: bool = False
    v_symmetric: bool = False
    k_mean: str = "none"


# -- packing: the layout tables say where everything goes --------------------------------------------------------


@dataclass
class Block:
    bytes: np.ndarray
    k: np.ndarray  # dequantised, fp64 [128, head_dim]
    v: np.ndarray


def random_block(fmt, spec: Spec, rng: np.random.Generator) -> Block:
    """A block of random codes, power-of-two scales and small integer zeros."""
    data = np.zeros(fmt.block_bytes, np.uint8)

    def put_halves(section, values):
        data[section.offset : section.offset + section.nbytes].view(np.float16)[section.table()] = values

    def operand(name: str, bits: int, symmetric: bool, per_channel: bool, group: int) -> np.ndarray:
        codes = rng.integers(0, 1 << bits, (BLOCK_TOKENS, fmt.head_dim))
        section = getattr(fmt, f"{name}_codes")
        stream = np.zeros(8 * section.nbytes, np.uint8)
        for bit in range(bits):
            stream[section.table() + bit] = codes >> bit & 1
        data[section.offset : section.offset + section.nbytes] = np.packbits(stream, bitorder="little")

        shape = getattr(fmt, f"{name}_scale").table().shape
        scale = 2.0 ** rng.integers(-3, 1, shape)
        put_halves(getattr(fmt, f"{name}_scale"), scale)
        if symmetric:
            zero = np.full(shape, symmetric_zero(bits))
        else:
            zero = rng.integers(-(1 << bits), 1, shape).astype(np.float64)
            put_halves(getattr(fmt, f"{name}_zero"), zero)
        if per_channel:  # (token group, channel)
            scale, zero = (np.repeat(x, group, 0) for x in (scale, zero))
        else:
            if name == "v":  # (channel group, token)
                scale, zero = scale.T, zero.T
            scale, zero = (np.repeat(x, group, 1) for x in (scale, zero))
        return scale * (codes + zero)

    k = operand("k", spec.k_bits, spec.k_symmetric, spec.k_axis == "channel", spec.k_group)
    v = operand("v", spec.v_bits, spec.v_symmetric, False, spec.v_group)
    if spec.k_mean == "block":
        mean = rng.integers(-4, 5, (1, fmt.head_dim)) / 4
        put_halves(fmt.k_mean, mean)
        k = k + mean
    return Block(data, k, v)


# -- reading: lanes, registers, words ----------------------------------------------------------------------------


def lane_vectors(block: Block, address: np.ndarray, nbytes: int) -> np.ndarray:
    """One vector load: bytes [32, nbytes] at an address per lane, aligned to its size."""
    assert (address % nbytes == 0).all()
    return block.bytes[address[:, None] + np.arange(nbytes)]


def slice_words(block: Block, fmt, operand: str, bits: int, token_slice: int) -> np.ndarray:
    """The code words of a slice: uint32 [words of a lane, 32 lanes]."""
    vector_bytes = 4 * (fmt.k_vector_words if operand == "k" else fmt.v_vector_words)
    slice_bytes = 32 * fmt.head_dim * bits // 8
    start = (fmt.k_codes if operand == "k" else fmt.v_codes).offset + token_slice * slice_bytes
    vectors = [
        lane_vectors(block, start + (v * 32 + LANE) * vector_bytes, vector_bytes).view(np.uint32)
        for v in range(slice_bytes // (32 * vector_bytes))
    ]
    return np.concatenate(vectors, axis=1).T


def a_registers(words: np.ndarray, operand: str, bits: int, tiles: int, t: int, c: int) -> tuple[np.ndarray, list]:
    """The A registers of token tile ``t`` of the slice and channel tile ``c``, uint32 [4, 32], and their powers of two.

    One AND per register (after a shift by 8 that two registers share); a half is the fp16 denormal code * power.
    """
    half = tiles // 2
    registers, powers = [], []
    for r in range(4):
        row8, col8 = r & 1, r >> 1
        if operand == "k":
            word = {8: col8 + 2 * (c % 2) + 4 * t + 8 * (c // 2), 4: c % 2 + 2 * t + 4 * (c // 2), 2: c}[bits]
            second = t
        else:
            at, upper = c % half, c // half
            word = {8: col8 + 2 * t + 4 * upper + 8 * at, 4: t + 2 * upper + 4 * at, 2: t + 2 * at}[bits]
            second = upper
        if bits == 8:
            shift, slot, mask = 8 * row8, 0, 0x00FF00FF
        else:
            shift, slot = 8 * col8, 4 * row8 + (2 * second if bits == 2 else 0)
            mask = ((1 << bits) - 1 << slot) * 0x00010001
        registers.append((words[word] >> np.uint32(shift)) & np.uint32(mask))
        powers.append(2.0 ** (slot - 24))
    return np.stack(registers), powers


def b_vectors(block: Block, offset: int, x: int) -> np.ndarray:
    """Lane t's 16-byte vector x of parameters in B order: fp64 [2 k tiles, 2 registers, 2 halves, 32 lanes]."""
    halves = lane_vectors(block, offset + (x * 4 + T) * 16, 16).view(np.float16)
    return halves.astype(np.float64).T.reshape(2, 2, 2, 32)


def half2(values: np.ndarray) -> np.ndarray:
    """[registers, 2 halves, 32] -> uint32 [registers, 32]; the values must be fp16 numbers."""
    halves = values.astype(np.float16)
    assert (halves == values).all()
    return np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.uint32).reshape(len(values), 32)


def mma(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Accumulator registers [4, 32] of one m16n8k16, exact."""
    product = mma_operand(a, A_INDEX[16], "f16") @ mma_operand(b, B_INDEX[16], "f16")
    return product[C_ROWS, C_COLS]


def b_rows(matrix: np.ndarray, k_tile: int) -> np.ndarray:
    """The B fragment of rows 16 k_tile .. + 15 of a [k, 8] matrix: fp64 [2 registers, 2 halves, 32]."""
    rows = [[matrix[16 * k_tile + 2 * T + e + 8 * r, G] for e in range(2)] for r in range(2)]
    return np.array(rows)


def row_registers(register: np.ndarray) -> np.ndarray:
    """A registers whose rows are all the same vector, given in B order: columns 2t + e and + 8."""
    return half2(register)[[0, 0, 1, 1]]


def undo_powers(accumulator: np.ndarray, powers: list) -> np.ndarray:
    """Accumulators 0, 1 are rows g, 2, 3 rows g + 8: one power of two each."""
    assert powers[0] == powers[2]
    assert powers[1] == powers[3]
    return accumulator / np.array([powers[0], powers[0], powers[1], powers[1]])[:, None]


def scores(block: Block, fmt, spec: Spec, q: np.ndarray, token_slice: int) -> np.ndarray:
    """S^T of a slice, [32 tokens, 8 queries], by a warp. q: [head_dim, 8]."""
    tiles = fmt.head_dim // 16
    words = slice_words(block, fmt, "k", spec.k_bits, token_slice)
    result = np.zeros((2, 4, 32))
    for c in range(tiles):
        q_c = b_rows(q, c)
        if spec.k_mean == "block":  # one row of A, the same for all tokens
            mean = b_vectors(block, fmt.k_mean.offset, c // 2)[c % 2]
            result += mma(row_registers(mean), half2(q_c))
        if spec.k_axis == "channel":
            group = token_slice * 32 // spec.k_group * fmt.head_dim * 2  # bytes before this token group
            q_c = q_c * b_vectors(block, fmt.k_scale.offset + group, c // 2)[c % 2]  # Q' = Q * scale
            if spec.k_symmetric:
                zero = np.full((2, 2, 32), symmetric_zero(spec.k_bits))
            else:
                zero = b_vectors(block, fmt.k_zero.offset + group, c // 2)[c % 2]
            result += mma(row_registers(zero), half2(q_c))
        for t in range(2):
            codes, powers = a_registers(words, "k", spec.k_bits, tiles, t, c)
            product = undo_powers(mma(codes, half2(q_c)), powers)
            if spec.k_axis == "token":  # scale and zero belong to the accumulator's rows
                groups = fmt.head_dim // spec.k_group
                at = ((token_slice * 8 + G) * groups + 16 * c // spec.k_group) * 8
                scale = lane_vectors(block, fmt.k_scale.offset + at, 8).view(np.float16).astype(np.float64).T
                if spec.k_symmetric:
                    zero = np.full((4, 32), symmetric_zero(spec.k_bits))
                else:
                    zero = lane_vectors(block, fmt.k_zero.offset + at, 8).view(np.float16).astype(np.float64).T
                q_sum = mma(row_registers(np.ones((2, 2, 32))), half2(q_c))
                for register in range(4):
                    row = 2 * t + (register >> 1)  # rows g, g + 8, g + 16, g + 24 of the slice
                    product[register] = scale[row] * (product[register] + zero[row] * q_sum[register])
            result[t] += product
    out = np.zeros((32, QUERIES))
    for t in range(2):
        out[16 * t + C_ROWS, C_COLS] = result[t]
    return out


def outputs(block: Block, fmt, spec: Spec, p: np.ndarray) -> np.ndarray:
    """O^T of a block, [head_dim, 8 queries], by a warp that goes through all slices. p: [128 tokens, 8]."""
    tiles = fmt.head_dim // 16
    result = np.zeros((tiles, 4, 32))
    for token_slice in range(BLOCK_TOKENS // 32):
        words = slice_words(block, fmt, "v", spec.v_bits, token_slice)
        for t in range(2):
            for c in range(tiles):
                group = 16 * c // spec.v_group * BLOCK_TOKENS * 2
                scale = b_vectors(block, fmt.v_scale.offset + group, token_slice)[t]
                p_t = half2(b_rows(p, 2 * token_slice + t) * scale)  # P' = P * scale
                if spec.v_symmetric:
                    zero = np.full((2, 2, 32), symmetric_zero(spec.v_bits))
                else:
                    zero = b_vectors(block, fmt.v_zero.offset + group, token_slice)[t]
                codes, powers = a_registers(words, "v", spec.v_bits, tiles, t, c)
                result[c] += undo_powers(mma(codes, p_t), powers) + mma(row_registers(zero), p_t)
    out = np.zeros((fmt.head_dim, QUERIES))
    for c in range(tiles):
        out[16 * c + C_ROWS, C_COLS] = result[c]
    return out


SPECS = [
    *(Spec(bits, bits, v_group=32) for bits in (8, 4, 2)),
    *(Spec(bits, bits, "token", 32, 32) for bits in (8, 4, 2)),
    Spec(4, 2, k_group=32, k_symmetric=True, v_symmetric=True, v_group=32),
    Spec(2, 8, "token", 32, 32, k_symmetric=True, k_mean="block"),
    Spec(8, 4, k_group=64, k_mean="block", v_group=32),
]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"k{s.k_bits}{s.k_axis[0]}{s.k_group}-v{s.v_bits}g{s.v_group}")
def test_a_warp_computes_the_matmuls_on_the_dequantised_block(head_dim, spec):
    rng = np.random.default_rng(head_dim)
    fmt = block_format(head_dim, spec)
    block = random_block(fmt, spec, rng)
    q = rng.integers(-8, 9, (head_dim, QUERIES)).astype(np.float64)
    p = rng.integers(0, 9, (BLOCK_TOKENS, QUERIES)) / 8
    s = np.concatenate([scores(block, fmt, spec, q, i) for i in range(4)])
    assert np.array_equal(s, block.k @ q)
    assert np.array_equal(outputs(block, fmt, spec, p), block.v.T @ p)


@pytest.mark.parametrize("v_group", [64, 128])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_wide_groups(bits, v_group):
    rng = np.random.default_rng(bits)
    spec = Spec(bits, bits, "token", 128, v_group)
    fmt = block_format(128, spec)
    block = random_block(fmt, spec, rng)
    q = rng.integers(-8, 9, (128, QUERIES)).astype(np.float64)
    p = rng.integers(0, 9, (BLOCK_TOKENS, QUERIES)) / 8
    s = np.concatenate([scores(block, fmt, spec, q, i) for i in range(4)])
    assert np.array_equal(s, block.k @ q)
    assert np.array_equal(outputs(block, fmt, spec, p), block.v.T @ p)


def test_the_model_sees_a_wrong_bit():
    """The comparison is able to fail: one flipped bit of the codes changes the result."""
    rng = np.random.default_rng(0)
    spec = SPECS[1]
    fmt = block_format(64, spec)
    block = random_block(fmt, spec, rng)
    q = rng.integers(1, 9, (64, QUERIES)).astype(np.float64)
    block.bytes[fmt.k_codes.offset + 100] ^= 4
    s = np.concatenate([scores(block, fmt, spec, q, i) for i in range(4)])
    assert (s != block.k @ q).any(1).sum() == 1
