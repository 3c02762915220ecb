"""Combines attention over disjoint sets of keys: parts that several decodes left, over splits, devices or a prefix.

A thread owns eight channels of a row (16 bytes): the largest lse of the row's parts, then the sum of the parts' outputs
by the weights exp(lse - largest). A part whose lse is -inf is not read. One pass over the parts, bound by memory.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .merge_plan import THREADS, VECTOR, MergePartsPlan
from .values import LOG2E, floats


class Params(NamedTuple):
    """The flat kernel parameters; shapes in elements. The order is the launch ABI of the C++ core."""

    outs: cute.Pointer  # 16 bit [num_parts, rows, head_dim]
    lses: cute.Pointer  # f32 [num_parts, rows]
    out: cute.Pointer  # 16 bit [rows, head_dim]
    lse: cute.Pointer  # f32 [rows] or null
    rows: Int64
    num_parts: Int32
    bfloat16: Int32  # 1: outs and out are bf16; 0: fp16


class MergePartsKernel:
    """The kernel of one KernelConfig of kind "merge", and the host function that the DSL compiles."""

    def __init__(self, config):
        self.plan = MergePartsPlan(config)

    @cute.jit
    def __call__(self, p: Params, grid: Int32):
        self.kernel(p).launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), smem=0)

    @cute.kernel
    def kernel(self, p: Params):
        if cutlass.const_expr(self.plan.programmatic):
            ptx.wait_for_previous_kernel()
        item = Int64(cute.arch.block_idx()[0]) * THREADS + cute.arch.thread_idx()[0]
        row = item // self.plan.vectors
        vector = Int32(item - row * self.plan.vectors)
        if row < p.rows:
            largest = Float32(-Float32.inf)
            for i in cutlass.range(p.num_parts, unroll=1):
                largest = ptx.fmax(largest, self.part_lse(p, i, row))
            base = cutlass.select_(largest == -Float32.inf, Float32(0.0), largest)
            sums = [Float32(0.0) for _ in range(VECTOR)]
            total = Float32(0.0)
            for i in cutlass.range(p.num_parts, unroll=1):
                lse = self.part_lse(p, i, row)
                if lse != -Float32.inf:
                    weight = ptx.exp2((lse - base) * LOG2E)
                    values = floats(p, ptx.load_global(self.at(p, p.outs, i, row, vector), 4, cache="cg"))
                    for j in range_constexpr(VECTOR):
                        sums[j] = sums[j] + values[j] * weight
                    total = total + weight
            factor = cutlass.select_(total == 0.0, Float32(0.0), ptx.reciprocal(total))
            result = [x * factor for x in sums]
            packed = [ptx.to_half2(*result[j : j + 2]) for j in range(0, VECTOR, 2)]
            if p.bfloat16 == 1:
                packed = [ptx.to_bfloat2(*result[j : j + 2]) for j in range(0, VECTOR, 2)]
            ptx.store_global(self.at(p, p.out, Int32(0), row, vector), packed)
            if (p.lse.toint() != 0) & (vector == 0):
                ptx.store_global(p.lse.toint() + row * 4, [base + ptx.log2(total) * (1.0 / LOG2E)])

    def part_lse(self, p: Params, part: Int32, row: Int64) -> Float32:
        return ptx.from_bits(ptx.load_global(p.lses.toint() + (Int64(part) * p.rows + row) * 4, cache="cg")[0])

    def at(self, p: Params, base: cute.Pointer, part: Int32, row: Int64, vector: Int32) -> Int64:
        """Address of a vector of [parts, rows, head_dim]."""
        return base.toint() + ((Int64(part) * p.rows + row) * self.plan.vectors + vector) * (2 * VECTOR)
