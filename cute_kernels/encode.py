"""Encoding of one operand (K or V) of a block whose 128 rows lie in shared memory: the steps of quantization.py, fp32,
rounded one by one, so that the bytes are the same.

A 16x16 tile of the rows comes as an MMA fragment (ldmatrix, transposed for V): a lane encodes what it will later read.
With g = lane / 4, q = lane % 4, register r of a tile holds row g + 8 (r & 1), columns 2q and 2q + 1, + 8 (r >> 1); rows
are tokens of K, channels of V. A *panel* is the parameters that the 32 lanes of a warp own, one each:
    columns (K per channel, V)   of two column tiles over one group of rows; lane's column: g = 4 tile + 2 r1 + e
    rows (K per token)           of a slice's 32 rows over one group of columns; lane's row: g + 8 q
Warps take panels in turn, with a search for the range if it is asked for (encode_search.py); then warp w encodes slice
w, whose code vectors it stores straight into the block (encode_codes.py). Parameters pass through shared memory
(encode_operand.py): an image of their sections, and 1 / scale in the same order.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .append_plan import VECTOR
from .encode_codes import Codes
from .encode_operand import Operand, half_value, pick
from .encode_search import Search
from .layouts import BLOCK_TOKENS, LANES, SLICE_TOKENS, TILE
from .values import floats

FP32_MAX = 3.0e38


class Encoder:
    """Encodes one operand in one kernel; ``plan`` is an AppendPlan."""

    def __init__(self, plan, name: str):
        self.plan = plan
        self.operand = Operand(plan, name)
        self.search = Search(self.operand)
        self.codes = Codes(self.operand)

    @cute.jit
    def find_parameters(
        self, p, smem: Int32, warp: Int32, lane: Int32, count: Int32, clip: Float32, limit: Float32
    ):  # fmt: skip
        """Find the parameters of the rows, and leave them in shared memory -> whether no value that the lane saw is NaN
        or beyond the limit. Rows from ``count`` on repeat a row of before.
        """
        rows = smem + self.operand.fragment_lane(lane)
        self.clear_padding(smem, warp, lane)
        fits = Boolean(True)
        if cutlass.const_expr(self.operand.mean is not None):
            fits = self.store_means(p, smem, rows, warp, lane, count, limit)
            ptx.sync_team(self.plan.barrier, self.plan.threads)
        for x in cutlass.range(warp, self.operand.minors * self.operand.groups, self.plan.warps, unroll=1):
            minor, group = x % self.operand.minors, x // self.operand.minors
            at = rows + self.operand.panel_offset(minor, group)
            fits = fits & self.parameters(p, smem, at, minor, group, lane, count, clip, limit)
        return fits

    @cute.jit
    def encode(self, p, smem: Int32, warp: Int32, lane: Int32, block: Int64, count: Int32):
        """Encode the rows into the block at this address; tokens from ``count`` on do not exist."""
        self.codes.store(p, smem, smem + self.operand.fragment_lane(lane), warp, lane, block, count)
        self.store_parameters(smem, warp * LANES + lane, block)

    # -- means -------------------------------------------------------------------------------------------------

    @cute.jit
    def store_means(self, p, smem: Int32, rows: Int32, warp: Int32, lane: Int32, count: Int32, limit: Float32):
        """The mean key over the first ``count`` tokens, two channel tiles at a time -> whether those of the lane are
        within half the limit: so are then, if they are that far from their mean at most, the keys within the limit.
        """
        fits = Boolean(True)
        inverse = ptx.divide(Float32(1.0), Float32(count))
        for pair in cutlass.range(warp, self.plan.head_dim // SLICE_TOKENS, self.plan.warps, unroll=1):
            base = rows + pair * (2 * SLICE_TOKENS)
            own = Float32(0.0)
            for j in range_constexpr(2):
                tiles = BLOCK_TOKENS // TILE
                sums = self.token_sums(p, base + j * TILE * 2, lane >> 2, count, tiles)  # [2 r + e] over the rows g
                sums = [ptx.add(sums[r], sums[r + 2]) for r in (0, 1, 4, 5)]  # and g + 8
                for mask in (16, 8, 4):
                    sums = [ptx.add(x, ptx.shuffle_xor(x, mask)) for x in sums]
                own = cutlass.select_(lane >> 4 == j, pick(sums, lane >> 2 & 3), own)
            mean = ptx.add(half_value(ptx.multiply(own, inverse)), Float32(0.0))  # + 0: no negative zero
            fits = fits & (ptx.fabs(mean) <= limit * 0.5)  # NaN is not
            mean = ptx.to_half2(mean, Float32(0.0))
            at = smem + 2 * (pair * SLICE_TOKENS + self.operand.mean_lane(lane))
            ptx.store_shared_half(at, self.operand.image(self.operand.mean), mean)
        return fits

    @cute.jit
    def token_sums(self, p, base: Int32, token: Int32, count: Int32, tiles: int, step: int = 1):
        """Sums over every ``step``-th token tile from base on, whose first row is ``token``; [2 r + e].

        In the order of a halving sum: even tiles and odd ones apart.
        """
        sums = [Float32(0.0)] * 8
        if cutlass.const_expr(tiles == 1):
            values = self.operand.values(p, self.operand.tile(base, 0, 0), [])
            exists = [token + 8 * (r & 1) < count for r in range(4)]
            sums = [cutlass.select_(exists[i // 2], x, Float32(0.0)) for i, x in enumerate(values)]
        else:
            for i in cutlass.range(2, unroll=1):
                at, first = base + i * (step * TILE * self.plan.row_bytes), token + i * (step * TILE)
                part = self.token_sums(p, at, first, count, tiles // 2, 2 * step)
                sums = [ptx.add(x, y) for x, y in zip(sums, part, strict=True)]
        return sums

    # -- parameters --------------------------------------------------------------------------------------------

    @cute.jit
    def parameters(
        self, p, smem: Int32, base: Int32, minor: Int32, group: Int32, lane: Int32, count: Int32, clip: Float32,
        limit: Float32,
    ):  # fmt: skip
        """Find and store the parameters of a panel; each lane those of its own line -> as find_parameters."""
        first = minor * self.operand.minor_stride + group * self.operand.group_stride
        quad, eighth = lane & 3, lane >> 2
        lines_at = first + (eighth if self.operand.by_rows else quad) * self.operand.lane_line
        element = lines_at + (quad if self.operand.by_rows else eighth)
        if cutlass.const_expr(self.operand.by_rows and self.operand.mean is not None):
            low, high = self.row_ranges(p, smem, base, group, lane)
            fits = (ptx.fabs(low) <= limit * 0.5) & (ptx.fabs(high) <= limit * 0.5)  # see store_means
        else:
            low, high, fits = self.ranges(p, smem, base, minor, lane, limit)
        scale, zero = Float32(1.0), Float32(0.0)
        if clip > 0.0:
            if clip < 1.0:
                low, high = self.operand.shrunk(low, high, clip)
            scale, zero = self.operand.scale_and_zero(low, high)
        else:
            scale, zero = self.search.best(p, smem, base, minor, group, lines_at, element, lane, count, low, high)
        exists = self.operand.first_token(minor, group, quad, eighth) < count
        scale, zero = (cutlass.select_(exists, x, Float32(0.0)) for x in (scale, zero))
        self.operand.store_line(smem, element, scale, zero)
        return fits

    @cute.jit
    def ranges(self, p, smem: Int32, base: Int32, minor: Int32, lane: Int32, limit: Float32):
        """Smallest and largest value of the lane's own line: in 16 bit, which loses nothing. And whether these and
        those of another line are within the limit.
        """
        packed = [Int32(0), Int32(0)]
        if p.bfloat16 == 1:
            packed = self.packed_ranges(base, lane, True)
        else:
            packed = self.packed_ranges(base, lane, False)
        low, low_odd, high, high_odd = floats(p, packed)
        fits = Boolean(True)
        for x in (low, low_odd, high, high_odd):
            fits = fits & (ptx.fabs(x) <= limit)  # NaN is not
        if cutlass.const_expr(self.operand.by_rows):
            low, high = ptx.fmin(low, low_odd), ptx.fmax(high, high_odd)
        else:
            odd = (lane >> 2 & 1) == 1
            low, high = cutlass.select_(odd, low_odd, low), cutlass.select_(odd, high_odd, high)
        if cutlass.const_expr(self.operand.mean is not None):  # subtracting is monotonous
            at = smem + 2 * (minor * SLICE_TOKENS + self.operand.mean_lane(lane))
            mean = ptx.load_shared_half(at, self.operand.image(self.operand.mean))
            low, high = ptx.subtract(low, mean), ptx.subtract(high, mean)
        return low, high, fits

    @cute.jit
    def packed_ranges(self, base: Int32, lane: Int32, bfloat: bool):
        """[minima, maxima], two lines in a register: the register that has the lane's own line."""
        low, high = self.widened(base, None, bfloat)
        for i in cutlass.range(2, self.operand.group // TILE, 2, unroll=1):
            low, high = self.widened(base + i * self.operand.along_bytes, (low, high), bfloat)
        for mask in self.operand.butterfly:
            low = [ptx.min_max(x, ptx.shuffle_xor(x, mask), bfloat, "min") for x in low]
            high = [ptx.min_max(x, ptx.shuffle_xor(x, mask), bfloat, "max") for x in high]
        own = lane & 3 if self.operand.by_rows else lane >> 3
        return [pick(low, own), pick(high, own)]

    def widened(self, base: Int32, so_far, bfloat: bool) -> tuple:
        """Packed minima and maxima by across, and r1 or (rows) r0; of two places along the group, which the assembler
        joins to an instruction of three operands.
        """
        low, high = ([*x] for x in so_far) if so_far else ([None] * 4, [None] * 4)
        for tiles in (self.operand.panel_tiles(base), self.operand.panel_tiles(base + self.operand.along_bytes)):
            for n, x in enumerate(tiles):
                i = n // 4 * 2 + (n & 1 if self.operand.by_rows else n >> 1 & 1)
                low[i] = x if low[i] is None else ptx.min_max(low[i], x, bfloat, "min")
                high[i] = x if high[i] is None else ptx.min_max(high[i], x, bfloat, "max")
        return low, high

    @cute.jit
    def row_ranges(self, p, smem: Int32, base: Int32, group: Int32, lane: Int32):
        """:meth:`ranges` of K per token less its mean, in fp32."""
        low, high = [Float32(FP32_MAX)] * 4, [Float32(-FP32_MAX)] * 4
        for i in cutlass.range(self.operand.group // TILE, unroll=1):
            means = self.operand.channel_means(smem + group * (2 * self.operand.group), lane, i)
            tiles = self.operand.panel_tiles(base + i * self.operand.along_bytes)
            for n, x in enumerate(self.operand.values(p, tiles, means * 2)):
                line = self.operand.line(n // 8, n // 2 % 4, n % 2)
                low[line], high[line] = ptx.fmin(low[line], x), ptx.fmax(high[line], x)
        for mask in self.operand.butterfly:
            low = [ptx.fmin(x, ptx.shuffle_xor(x, mask)) for x in low]
            high = [ptx.fmax(x, ptx.shuffle_xor(x, mask)) for x in high]
        return pick(low, lane & 3), pick(high, lane & 3)

    # -- parameters on their way out ---------------------------------------------------------------------------

    @cute.jit
    def clear_padding(self, smem: Int32, warp: Int32, lane: Int32):
        """Zero the bytes that pad the block."""
        image = self.plan.image_bytes[self.operand.name]
        section, mean = self.operand.section, self.operand.mean
        used = sum(s.nbytes for s in (section["scale"], section["zero"], mean) if s is not None)
        at = (warp * LANES + lane) * VECTOR
        if cutlass.const_expr(used < image):
            if at < image - used:
                ptx.store_shared(smem + at, self.plan.image_at + used, [Int32(0)] * 4)

    @cute.jit
    def store_parameters(self, smem: Int32, thread: Int32, block: Int64):
        """Copy the image of the parameters into the block."""
        image = self.plan.image_bytes[self.operand.name]
        at = thread * VECTOR
        target = block + self.operand.section["scale"].offset
        step = self.plan.threads * VECTOR
        for i in range_constexpr(-(-image // step)):
            if at + i * step < image:
                ptx.store_global(
                    target + Int64(at), ptx.load_shared(smem + at, self.plan.image_at + i * step, 4), i * step
                )
