"""One operand (K or V) of a block that is being encoded: a lane's part of its rows and parameters in shared memory, in
the terms of encode.py.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

from . import ptx
from .fragments import matrix_row
from .layouts import BLOCK_TOKENS, NUM_SLICES, SLICE_TOKENS, TILE, symmetric_zero
from .values import floats

MIN_SCALE = 2.0**-24  # these as in quantization.py
ZERO_LIMIT = 2.0**-10


class Lines(NamedTuple):
    """Coefficients of the lane's columns (8 of two column tiles) or rows (4 of a slice) within a group."""

    inverse: list  # 1 / scale
    zero: list
    scale: list  # empty unless asked for


class Operand:
    """The constants of one operand in one kernel, and what a lane reads and writes of it; ``plan`` is an AppendPlan."""

    def __init__(self, plan, name: str):
        quant, fmt = plan.quant, plan.fmt
        self.plan, self.name = plan, name
        self.is_k = name == "k"
        self.bits, self.group, self.symmetric = (getattr(quant, f"{name}_{x}") for x in ("bits", "group", "symmetric"))
        self.section = {x: getattr(fmt, f"{name}_{x}") for x in ("codes", "scale", "zero")}
        self.mean = fmt.k_mean if self.is_k else None
        self.by_rows = self.is_k and quant.k_axis == "token"
        self.per_channel = self.is_k and not self.by_rows
        self.levels = float((1 << self.bits) - 1)
        # panels: x = minor + minors * (group)
        self.minors = plan.head_dim // SLICE_TOKENS if self.per_channel else NUM_SLICES
        self.groups = (BLOCK_TOKENS if self.per_channel else plan.head_dim) // self.group
        # of the parameters' elements: from a group to the next, from a panel to the next in its group
        layout = self.section["scale"].layout
        across, along = (layout[0], layout[1]) if self.by_rows else (layout[1], layout[0])
        self.minor_stride, self.group_stride = across(SLICE_TOKENS), along.stride if self.groups > 1 else 0
        self.lane_line = across(1) if self.by_rows else across(2)  # from a lane's first line to that of the next g or q
        self.lines = 4 if self.by_rows else 8
        # bytes from a tile of a panel to the next along its group
        self.along_bytes = TILE * plan.row_bytes if self.per_channel else TILE * 2
        self.butterfly = (2, 1) if self.by_rows else (16, 8, 4)  # lanes that share a line, in the order of halving sums

    # -- rows --------------------------------------------------------------------------------------------------

    def fragment_lane(self, lane: Int32) -> Int32:
        """The lane's part of a tile's address."""
        token, channel = matrix_row(lane, self.is_k)
        return token * self.plan.row_bytes + 2 * channel

    def tile(self, base: Int32, token_tile: int, channel_tile: int) -> list:
        """The four registers of a tile, from the fragment address of tile (0, 0)."""
        offset = token_tile * TILE * self.plan.row_bytes + channel_tile * TILE * 2
        return ptx.load_matrices(base + offset, not self.is_k)

    def panel_offset(self, minor: Int32, group: Int32) -> Int32:
        """Of a panel's tile (0, 0)."""
        token, channel = minor * SLICE_TOKENS, group * self.group
        if self.per_channel:
            token, channel = group * self.group, minor * SLICE_TOKENS
        return token * self.plan.row_bytes + channel * 2

    def panel_tiles(self, base: Int32) -> list:
        """The two tiles of a panel at one place along its group, [4 across + r]."""
        tiles = [self.tile(base, 0, i) if self.per_channel else self.tile(base, i, 0) for i in range(2)]
        return tiles[0] + tiles[1]

    def line(self, across: int, r: int, e: int) -> int:
        """The line, in the order of the lane's parameters, of half e of register r of a panel's tile."""
        return 2 * across + (r & 1) if self.by_rows else 4 * across + 2 * (r >> 1) + e

    def first_token(self, minor: Int32, group: Int32, quad: Int32, eighth: Int32) -> Int32:
        """Of the lane's own line."""
        if self.per_channel:
            return group * self.group
        in_slice = eighth + 8 * quad
        if not self.by_rows:
            in_slice = TILE * (eighth >> 2) + 8 * (eighth >> 1 & 1) + 2 * quad + (eighth & 1)
        return minor * SLICE_TOKENS + in_slice

    @cute.jit
    def values(self, p, registers: list, means: list):
        """Registers of tiles as fp32; with means (of the same channels) less these."""
        return less(floats(p, registers), means)

    # -- means -------------------------------------------------------------------------------------------------

    def mean_lane(self, lane: Int32) -> Int32:
        """Element of the lane's channel among those of two channel tiles, in B order."""
        return (lane & 3) * 8 + (lane >> 2)

    def channel_means(self, base: Int32, lane: Int32, tile: Int32) -> list:
        """Means of the channels of a tile, for its eight values of the lane; base: smem, or from a pair of tiles on."""
        element = (tile >> 1) * SLICE_TOKENS + (lane & 3) * 8 + (tile & 1) * 4  # in B order
        got = ptx.load_shared(base + 2 * element, self.image(self.mean), 2)  # registers r1 of halves e
        means = [ptx.half2_floats(register) for register in got]
        return [means[r >> 1][e] for r in range(4) for e in range(2)]

    # -- parameters --------------------------------------------------------------------------------------------

    def image(self, section) -> int:
        """Where a section of parameters lies in shared memory."""
        return self.plan.image_at + section.offset - self.section["scale"].offset

    def shrunk(self, low: Float32, high: Float32, factor: Float32) -> tuple:
        """The range times a factor: about its middle, or about 0 if symmetric."""
        if self.symmetric:
            end = ptx.multiply(ptx.fmax(ptx.fabs(low), ptx.fabs(high)), factor)
            return -end, end
        middle = ptx.multiply(ptx.add(low, high), Float32(0.5))
        half = ptx.multiply(ptx.multiply(ptx.subtract(high, low), Float32(0.5)), factor)
        return ptx.subtract(middle, half), ptx.add(middle, half)

    def scale_and_zero(self, low: Float32, high: Float32) -> tuple:
        """Of a line that is to span low .. high; fp16 values."""
        largest = ptx.fmax(ptx.fabs(low), ptx.fabs(high))
        if self.symmetric:
            scale = half_value(ptx.fmax(ptx.divide(largest, Float32(self.levels / 2)), Float32(MIN_SCALE)))
            return scale, Float32(symmetric_zero(self.bits))
        scale = ptx.divide(ptx.subtract(high, low), Float32(self.levels))
        scale = ptx.fmax(scale, ptx.multiply(largest, Float32(ZERO_LIMIT)))
        scale = half_value(ptx.fmax(scale, Float32(MIN_SCALE)))
        return scale, ptx.add(half_value(ptx.divide(low, scale)), Float32(0.0))

    def store_line(self, smem: Int32, element: Int32, scale: Float32, zero: Float32) -> None:
        """The parameters of a line, and what encoding needs (anything, if the line does not exist)."""
        ptx.store_shared(smem + 4 * element, self.plan.inverse_at, [ptx.divide(Float32(1.0), scale)])
        for name, x in (("scale", scale), ("zero", zero)):
            if self.section[name] is not None:
                ptx.store_shared_half(smem + 2 * element, self.image(self.section[name]), ptx.to_half2(x, Float32(0.0)))

    def load_lines(self, smem: Int32, element: Int32, across: int | None = None) -> Lines:
        """The coefficients of the lane's lines, from ``element`` on: all, or with their scales those of one tile."""
        count = self.lines if across is None else self.lines // 2
        first = 0 if across is None else across * count
        at, width = smem + 4 * element, min(count, 4)
        places = [self.plan.inverse_at + 4 * i for i in range(first, first + count, width)]
        inverse = [x for place in places for x in ptx.load_shared_floats(at, place, width)]

        def halves(section) -> list:
            got = ptx.load_shared(smem + 2 * element, self.image(section) + 2 * first, count // 2)
            return [x for register in got for x in ptx.half2_floats(register)]

        zero = [Float32(symmetric_zero(self.bits))] * count if self.symmetric else halves(self.section["zero"])
        return Lines(inverse, zero, [] if across is None else halves(self.section["scale"]))


def pick(values: list, index: Int32):
    """values[index], of a power of two of registers."""
    bit = 0
    while len(values) > 1:
        odd = (index >> bit & 1) == 1
        values = [cutlass.select_(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit += 1
    return values[0]


def less(values: list, means: list) -> list:
    """values - means, if there are any."""
    return [ptx.subtract(x, m) for x, m in zip(values, means, strict=True)] if means else values


def half_value(x: Float32) -> Float32:
    """Rounded to fp16."""
    return ptx.half2_floats(ptx.to_half2(x, Float32(0.0)))[0]
