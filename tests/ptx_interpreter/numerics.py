"""Arithmetic that NumPy does not spell the PTX way. Arrays hold one element per lane (two for packed halves)."""

from __future__ import annotations

import numpy as np

F32_TINY = np.float32(2.0**-126)


def flush(x: np.ndarray) -> np.ndarray:
    """fp32 denormals to zero, sign kept."""
    return np.where(np.abs(x) < F32_TINY, np.copysign(np.float32(0), x), x)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of values of at most 24 significant bits, in fp64 rounded to odd.

    Rounding to odd keeps a trace of what was cut off, so that rounding again to a narrower type is exact.
    """
    product = a.astype(np.float64) * b  # exact: 48 bits
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    if inexact.any():
        away = (error > 0) == (total > 0)
        bits = np.where(inexact, bits + np.where(away, 1, -1), bits)
        total = bits.view(np.float64)
    return total


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    """uint16 bits -> fp32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """fp32 -> uint16 bits, to nearest even ("rn") or towards zero ("rz")."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    else:
        rounded = bits
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16)


def f64_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp64 rounded to odd -> bf16 bits: through fp32 rounded to odd."""
    f = x.astype(np.float32)
    bits = f.view(np.int32).copy()
    off = (f.astype(np.float64) != x) & np.isfinite(f)
    grew = np.abs(f.astype(np.float64)) > np.abs(x)
    bits = np.where(off & grew, bits - 1, bits)  # towards zero, then set the last bit
    bits = np.where(off, bits | 1, bits).astype(np.int32)
    return f32_to_bf16(bits.view(np.float32))


def f32_to_f16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    if mode == "rn":
        return x.astype(np.float16)
    half = x.astype(np.float16)  # "rz": step back where rounding went away from zero
    beyond = np.abs(half.astype(np.float64)) > np.abs(x.astype(np.float64))
    return np.where(beyond, (half.view(np.uint16) - np.uint16(1)).view(np.float16), half)


# f(a, b) for each of the 16 truth tables, bit 2 a + b
_BINARY = [
    lambda a, b: np.uint32(0) * a,
    lambda a, b: ~(a | b),
    lambda a, b: ~a & b,
    lambda a, b: ~a,
    lambda a, b: a & ~b,
    lambda a, b: ~b,
    lambda a, b: a ^ b,
    lambda a, b: ~(a & b),
    lambda a, b: a & b,
    lambda a, b: ~(a ^ b),
    lambda a, b: b,
    lambda a, b: ~a | b,
    lambda a, b: a,
    lambda a, b: a | ~b,
    lambda a, b: a | b,
    lambda a, b: ~(np.uint32(0) * a),
]


def lop3(table: int):
    """The function of a lop3 truth table (bit 4 a + 2 b + c), split at c."""
    zero = sum(((table >> (2 * ab)) & 1) << ab for ab in range(4))  # c = 0
    one = sum(((table >> (2 * ab + 1)) & 1) << ab for ab in range(4))
    f, g = _BINARY[zero], _BINARY[one]
    if zero == one:
        return lambda a, b, c: f(a, b)
    if zero == 0:
        return lambda a, b, c: g(a, b) & c
    if one == 15:
        return lambda a, b, c: f(a, b) | c
    if one == 0:
        return lambda a, b, c: f(a, b) & ~c
    return lambda a, b, c: (f(a, b) & ~c) | (g(a, b) & c)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Default mode: nibble i of the selector names the byte for byte i; its top bit spreads the sign."""
    source = np.stack([a, b], 1).view(np.uint8).reshape(-1, 8)
    nibbles = (np.broadcast_to(selector, a.shape)[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
    picked = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
    return np.where(nibbles & 8, signs, picked).astype(np.uint8).view(np.uint32).reshape(-1)


def reverse_bits(x: np.ndarray) -> np.ndarray:
    width = x.dtype.itemsize * 8
    shift, mask = width // 2, (1 << width) - 1
    pattern = mask
    while shift:
        pattern ^= (pattern << shift) & mask
        x = ((x >> x.dtype.type(shift)) & x.dtype.type(pattern)) | (
            (x << x.dtype.type(shift)) & x.dtype.type(~pattern & mask)
        )
        shift //= 2
    return x


def highest_bit(x: np.ndarray) -> np.ndarray:
    """Index of the highest set bit of unsigned x, 0xffffffff for 0."""
    result = np.full(x.shape, 0xFFFFFFFF, np.uint32)
    for bit in range(x.dtype.itemsize * 8):
        result[((x >> x.dtype.type(bit)) & x.dtype.type(1)) != 0] = bit
    return result


# -- MMA fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"; lane = 4 g + t) -------------------------------

_lane = np.arange(32)
_g, _t = _lane // 4, _lane % 4


def _element_index(rows: int, cols: int, place) -> np.ndarray:
    """Index into [register, lane, half] for each (row, col); ``place(register, half)`` gives rows and columns."""
    table = np.full((rows, cols), -1)
    registers = rows * cols // 64
    for register in range(registers):
        for half in range(2):
            row, col = place(register, half)
            table[row, col] = (register * 32 + _lane) * 2 + half
    assert (table >= 0).all()
    return table


A_INDEX = {k: _element_index(16, k, lambda r, e: (_g + 8 * (r & 1), 2 * _t + e + 8 * (r >> 1))) for k in (8, 16)}
B_INDEX = {k: _element_index(k, 8, lambda r, e: (2 * _t + e + 8 * r, _g)) for k in (8, 16)}
C_ROWS = np.stack([_g + 8 * (r >> 1) for r in range(4)])  # [register, lane] of fp32 C
C_COLS = np.stack([2 * _t + (r & 1) for r in range(4)])


def mma_operand(registers: np.ndarray, index: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [registers, 32] -> fp64 matrix."""
    halves = registers.view(np.uint16).reshape(-1)[index]
    return (halves.view(np.float16) if kind == "f16" else bf16_to_f32(halves)).astype(np.float64)


def matrix_8x8(registers: np.ndarray) -> np.ndarray:
    """uint32 [32] -> uint16 [8, 8]: lane l holds row l / 4, columns 2 (l % 4) and the next."""
    return registers.view(np.uint16).reshape(8, 8)
