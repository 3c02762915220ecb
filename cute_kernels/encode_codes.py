"""The codes of an operand on their way into the block, in the terms of encode.py."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, range_constexpr

from . import ptx
from .encode_operand import Lines, Operand, less
from .fragments import fragments
from .layouts import BLOCK_TOKENS, HALF_BITS, LANES, NUM_SLICES, SLICE_TOKENS, TILE, WORD_BITS


class Run(NamedTuple):
    """Code vectors of a slice come in runs that differ only in the channel tiles that they hold."""

    count: int
    vectors: int  # of a lane in a run
    members: list  # (token tile of the slice, channel tile) of the first run
    tiles: int  # channel tiles from a run to the next


class Codes:
    """Encodes and stores the codes of one operand in one kernel."""

    def __init__(self, operand: Operand):
        self.operand, self.plan = operand, operand.plan
        fmt = self.plan.fmt
        self.vector_words = fmt.k_vector_words if operand.is_k else fmt.v_vector_words
        self.fragments = fragments(operand.section["codes"], operand.name, self.plan.head_dim, self.vector_words)
        self.run = find_run(self.fragments, 2 if operand.bits == 8 else 1)

    @cute.jit
    def store(self, p, smem: Int32, rows: Int32, warp: Int32, lane: Int32, block: Int64, count: Int32):
        """Encode slice ``warp`` and store its code vectors, run by run."""
        section = self.operand.section["codes"]
        base = rows + warp * (SLICE_TOKENS * self.plan.row_bytes)
        group = warp * SLICE_TOKENS // self.operand.group if self.operand.per_channel else Int32(0)
        element = group * self.operand.group_stride if self.operand.per_channel else warp * self.operand.minor_stride
        element += (lane >> 2 if self.operand.by_rows else lane & 3) * self.operand.lane_line
        lane_bytes = 4 * self.vector_words
        target = block + Int64(section.offset + warp * (section.nbytes // NUM_SLICES) + lane * lane_bytes)
        rest = count - warp * SLICE_TOKENS - (lane >> 2 if self.operand.is_k else 2 * (lane & 3))
        for run in cutlass.range(self.run.count, unroll=1):
            at = base + run * (self.run.tiles * TILE * 2)
            if p.bfloat16 == 1:  # around much code, or the assembler would execute both sides
                self.store_run(smem, at, element, lane, run, ptx.bfloat2_floats, target, count, rest)
            else:
                self.store_run(smem, at, element, lane, run, ptx.half2_floats, target, count, rest)
            target += self.run.vectors * LANES * lane_bytes

    @cute.jit
    def store_run(
        self, smem: Int32, base: Int32, element: Int32, lane: Int32, run: Int32, floats_of, target: Int64,
        count: Int32, rest: Int32,
    ):  # fmt: skip
        """Encode and store the lane's vectors of a run; floats_of: a register's values."""
        vectors = self.encoded(smem, base, element, lane, run, floats_of)
        if count < BLOCK_TOKENS:  # tokens that do not exist have code 0
            vectors = [self.existing(*vector, rest) for vector in zip(vectors, self.code_masks(), strict=True)]
        for v in range_constexpr(self.run.vectors):
            ptx.store_global(target, vectors[v], v * LANES * 4 * self.vector_words)

    def encoded(self, smem: Int32, base: Int32, element: Int32, lane: Int32, run: Int32, floats_of) -> list:
        """The lane's vectors of a run; floats_of: a register's values."""
        vectors: list = [[{} for _ in range(self.vector_words)] for _ in range(self.run.vectors)]  # of codes by bit
        known: dict = {}  # Lines that are in registers
        for i in range(0, len(self.run.members), 2):
            pair = self.run.members[i : i + 2]
            registers = [x for t, c in pair for x in self.operand.tile(base, t, c)]
            means = []
            if self.operand.mean is not None:
                means = [x for _, c in pair for x in self.operand.channel_means(smem, lane, run * self.run.tiles + c)]
            values = [x for register in registers for x in floats_of(register)]
            for n, x in enumerate(less(values, means)):
                (t, c), r, e = pair[n // 8], n // 2 % 4, n % 2
                lines = self.code_lines(smem, element, run, c, known)
                line = self.operand.line(c % 2 if self.operand.per_channel else t, r, e)
                place = self.fragments[t, c][r]
                words = vectors[place.vector]
                words[place.word][place.bit + HALF_BITS * e] = self.code(x, lines, line)
                if len(words[place.word]) == WORD_BITS // self.operand.bits:
                    words[place.word] = packed_codes(words[place.word], self.operand.bits)
        return vectors

    def code(self, x: Float32, lines: Lines, line: int) -> Int32:
        """The code of a value before it is limited to what there is."""
        return ptx.to_integer(ptx.subtract(ptx.multiply(x, lines.inverse[line]), lines.zero[line]))

    def code_masks(self) -> list:
        """Of each word of a lane's vectors in a run {token, from the lane's first on: bits of its codes}."""
        masks: list = [[{} for _ in range(self.vector_words)] for _ in range(self.run.vectors)]
        for t, c in self.run.members:
            for r, place in enumerate(self.fragments[t, c]):
                bits = masks[place.vector][place.word]
                for e in range(2):
                    token = TILE * t + (8 * (r & 1) if self.operand.is_k else 8 * (r >> 1) + e)
                    bits[token] = bits.get(token, 0) | (1 << self.operand.bits) - 1 << place.bit + HALF_BITS * e
        return masks

    def existing(self, words: list, masks: list, rest: Int32) -> list:
        """The words of a vector without the codes of tokens that do not exist: masks by token, of which ``rest`` do."""
        kept = [Int32(0)] * len(words)
        for i, by_token in enumerate(masks):
            for token, mask in by_token.items():
                kept[i] = kept[i] | cutlass.select_(token < rest, Int32(signed(mask)), Int32(0))
        return [word & mask for word, mask in zip(words, kept, strict=True)]

    def code_lines(self, smem: Int32, element: Int32, run: Int32, c: int, known: dict) -> Lines:
        """The Lines for channel tile c of a run; element: of the slice's first lines of the lane."""
        if self.operand.per_channel:
            key = c // 2
        else:  # tiles share lines if they are in the same group in every run
            key = tuple((c + i * self.run.tiles) * TILE // self.operand.group for i in range(self.run.count))
        if key not in known:
            at = (c + run * self.run.tiles) * TILE // (SLICE_TOKENS if self.operand.per_channel else self.operand.group)
            at = at * (self.operand.minor_stride if self.operand.per_channel else self.operand.group_stride)
            known[key] = self.operand.load_lines(smem, element + at)
        return known[key]


def find_run(places: dict, vectors: int) -> Run:
    """The Run of ``vectors`` vectors; places: Fragments of the tiles of a slice."""
    count = (max(registers[0].vector for registers in places.values()) + 1) // vectors
    members = [[at for at, registers in places.items() if registers[0].vector // vectors == i] for i in range(count)]
    step = members[1][0][1] - members[0][0][1] if count > 1 else 0
    for i in range(count):
        for t, c in members[0]:
            moved = [place._replace(vector=place.vector + i * vectors) for place in places[t, c]]
            assert places[t, c + i * step] == moved, "runs of code vectors differ"
    return Run(count, vectors, members[0], step)


def packed_codes(codes: dict, bits: int) -> Int32:
    """The word of these codes, {bit: code}: two by two from its upper end, each two saturated."""
    word = Int32(0)
    for bit in range(WORD_BITS - 2 * bits, -1, -2 * bits):
        word = ptx.pack_integers(codes[bit], codes[bit + bits], word, bits)
    return word


def signed(x: int) -> int:
    """The lowest 32 bits as an Int32 has them."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
