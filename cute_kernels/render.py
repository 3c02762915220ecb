"""Draws the block format from its layouts: ``python -m bitdecoding.cute_kernels.render docs/layout.svg``."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .layouts import LANES, MMA_A_TV, TILE, WORD_BITS, BlockFormat, Section, block_format

HEAD_DIM = 128  # of the pictures
WIDTH, MARGIN = 1280, 40
INK, MUTED, LINE = "#1f2933", "#6b7785", "#ffffff"
REGISTER_COLORS = (("#b5d3f0", "#86b6e3"), ("#fbd6a5", "#f5b866"), ("#bfe3c0", "#8fcb93"), ("#dccbec", "#bfa2dc"))
SECTION_COLORS = {
    "k_codes": "#86b6e3", "k_scale": "#3b78b5", "k_zero": "#1d4e80", "k_mean": "#7a8da3",
    "v_codes": "#8fcb93", "v_scale": "#429a4a", "v_zero": "#22662b",
}  # fmt: skip


class Spec(NamedTuple):
    """The fields of a QuantSpec that a block knows."""

    k_bits: int = 4
    v_bits: int = 4
    k_axis: str = "channel"
    k_group: int = 128
    v_group: int = 128
    k_symmetric: bool = False
    v_symmetric: bool = False
    k_mean: str = "none"


class Canvas:
    """SVG elements in drawing order."""

    def __init__(self):
        self.parts: list[str] = []

    def box(self, x, y, width, height, fill, stroke=LINE) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(self, x, y, words, size=13, color=INK, anchor="start", weight="normal", mono=False) -> None:
        family = ' font-family="ui-monospace,Menlo,Consolas,monospace"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
            f'font-weight="{weight}"{family}>{escape(str(words))}</text>'
        )

    def svg(self, height: float) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" font-family="Inter,Helvetica,Arial,sans-serif">'
        )
        return "\n".join([head, f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>', *self.parts, "</svg>\n"])


def render() -> str:
    """The whole picture."""
    canvas = Canvas()
    canvas.text(MARGIN, 50, "The BitFusion block", 26, weight="bold")
    canvas.text(
        MARGIN, 76, "128 tokens of one KV head. The cache is the A operand of mma.m16n8k16: every lane finds its codes "
        f"where its registers need them. Pictures for head_dim {HEAD_DIM}.", 14, MUTED,
    )  # fmt: skip
    bottom = draw_tile(canvas, MARGIN, 120)
    draw_words(canvas, 590, 120)
    bottom = draw_vectors(canvas, MARGIN, bottom + 50)
    bottom = draw_blocks(canvas, MARGIN, bottom + 50)
    return canvas.svg(bottom + 30)


def heading(canvas: Canvas, x: float, y: float, title: str, *lines: str) -> float:
    canvas.text(x, y, title, 17, weight="bold")
    for i, line in enumerate(lines):
        canvas.text(x, y + 22 + 17 * i, line, 12.5, MUTED)
    return y + 22 + 17 * len(lines)


# -- the A tile ----------------------------------------------------------------------------------------------------


def fragment_of() -> dict[tuple[int, int], tuple[int, int, int]]:
    """(row, column) of an A tile -> lane, register, half, from the MMA atom."""
    places = {}
    for lane in range(LANES):
        for value in range(8):
            column, row = divmod(int(MMA_A_TV(lane, value)), TILE)
            places[row, column] = (lane, value // 2, value % 2)
    return places


def draw_tile(canvas: Canvas, x: float, y: float) -> float:
    """One A tile: a cell per code, coloured by register, darker for the upper half."""
    y = heading(
        canvas, x, y, "1  An A tile, 16 x 16 codes",
        "Numbers are lanes, colours registers, the darker cell is the upper half.",
        "K: rows are tokens, columns channels. V: rows are channels, columns tokens.",
    )  # fmt: skip
    left, top, width, height = x + 28, y + 24, 29, 24
    for i in range(TILE):
        canvas.text(left + (i + 0.5) * width, top - 6, i, 10.5, MUTED, "middle")
        canvas.text(left - 8, top + (i + 0.7) * height, i, 10.5, MUTED, "end")
    for (row, column), (lane, register, half) in fragment_of().items():
        at = left + column * width, top + row * height
        canvas.box(*at, width, height, REGISTER_COLORS[register][half])
        canvas.text(at[0] + width / 2, at[1] + height * 0.68, lane, 11, anchor="middle", mono=True)
    bottom = top + TILE * height
    for register in range(4):
        for half in range(2):
            at = left + (register * 2 + half) * 58
            canvas.box(at, bottom + 14, 14, 14, REGISTER_COLORS[register][half])
            canvas.text(at + 19, bottom + 25.5, f"r{register}.{'lo' if half == 0 else 'hi'}", 11, mono=True)
    return bottom + 28


# -- the words -----------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A code of a lane's word."""

    bit: int
    token: int
    channel: int


def lane_words(section: Section, vector_words: int, lane: int) -> list[list[Code]]:
    """The codes of a lane's first vector, word by word, lowest bit first."""
    offsets = section.table()
    words: list[list[Code]] = [[] for _ in range(vector_words)]
    first = lane * vector_words
    for token, channel in np.argwhere((offsets // WORD_BITS >= first) & (offsets // WORD_BITS < first + vector_words)):
        offset = int(offsets[token, channel])
        words[offset // WORD_BITS - first].append(Code(offset % WORD_BITS, int(token), int(channel)))
    return [sorted(word) for word in words]


def draw_words(canvas: Canvas, x: float, y: float) -> None:
    """The bits of lane 0's words of K."""
    y = heading(
        canvas, x, y, "2  The bits of a word (K, lane 0)",
        "One AND extracts a register: two codes, 16 bits apart, read as fp16 denormals code * 2^(slot - 24).",
        "Codes show register, token t and channel c. 2 bit: the upper bits of a nibble are the next token tile.",
    )  # fmt: skip
    places, pixel = fragment_of(), 20.0
    masks = {
        8: ("w & 0x00ff00ff is r0;  (w >> 8) & 0x00ff00ff is r1;  the next word holds r2 and r3",),
        4: ("w & 0x000f000f is r0;  w & 0x00f000f0 is r1 * 2^4;  the same of w >> 8: r2, r3",),
        2: ("w & 0x00030003 is r0;  0x000c000c: r0 of the second tile * 2^2;  0x00300030: r1 * 2^4;",
            "0x00c000c0: r1 of the second tile * 2^6;  the same of w >> 8: r2, r3"),
    }  # fmt: skip
    top = y + 10
    for bits in (8, 4, 2):
        fmt = block_format(HEAD_DIM, Spec(bits, bits))
        words = lane_words(fmt.k_codes, fmt.k_vector_words, 0)
        canvas.text(x, top + 12, f"{bits} bit", 13, weight="bold")
        for edge in (31, 24, 16, 15, 8, 0):
            canvas.text(x + (31.5 - edge) * pixel, top + 30, edge, 9.5, MUTED, "middle")
        for code in words[0]:
            _, register, half = places[code.token % TILE, code.channel % TILE]
            left, width = x + (WORD_BITS - code.bit - bits) * pixel, bits * pixel
            canvas.box(left, top + 35, width, 40, REGISTER_COLORS[register][half])
            canvas.text(left + width / 2, top + 51, f"r{register}", 11, anchor="middle", weight="bold", mono=True)
            size = 11 if bits > 2 else 8.5
            name = f"t{code.token} c{code.channel}"
            canvas.text(left + width / 2, top + 67, name, size, anchor="middle", mono=True)
        for i, line in enumerate(masks[bits]):
            canvas.text(x, top + 92 + 16 * i, line, 11.5, mono=True)
        top += 126 if bits != 2 else 140


# -- vectors -------------------------------------------------------------------------------------------------------


def spans(values: set[int]) -> str:
    """{0..15, 64..79} -> "0-15, 64-79"."""
    ordered = sorted(values)
    starts = [v for v in ordered if v - 1 not in values]
    ends = [v for v in ordered if v + 1 not in values]
    return ", ".join(f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def draw_vectors(canvas: Canvas, x: float, y: float) -> float:
    """Lane-major vectors, and the tiles of the words of the first one."""
    y = heading(
        canvas, x, y, "3  Vectors: what a lane loads at once",
        "16 bytes per lane, lane after lane: 512 bytes that 32 lanes read without a bank conflict. 32 tokens are one "
        "run of vectors (a slice), so a warp may own any number of slices.",
        "Below, the tiles whose codes the four words of vector 0 hold.",
    )  # fmt: skip
    top, cell = y + 8, (WIDTH - 2 * MARGIN) / LANES
    for lane in range(LANES):
        canvas.box(x + lane * cell, top, cell, 26, "#e8eef5" if lane % 2 else "#d8e2ee")
        canvas.text(x + (lane + 0.5) * cell, top + 17, lane, 11, anchor="middle", mono=True)
    top += 52
    names, half_width = ("K", "V"), (WIDTH - 2 * MARGIN - 40) / 2
    width = (half_width - 44) / 4
    for side, operand in enumerate(("k", "v")):
        left = x + side * (half_width + 40)
        for word in range(4):
            canvas.text(left + 44 + (word + 0.5) * width, top, f"{names[side]} word {word}", 11.5, MUTED, "middle")
        for row, bits in enumerate((8, 4, 2)):
            fmt = block_format(HEAD_DIM, Spec(bits, bits))
            section = fmt.k_codes if operand == "k" else fmt.v_codes
            per_lane = [lane_words(section, 4, lane) for lane in range(LANES)]
            at = top + 10 + row * 44
            canvas.text(left, at + 24, f"{bits} bit", 12.5, weight="bold")
            for word in range(4):
                codes = [code for lane in per_lane for code in lane[word]]
                canvas.box(left + 44 + word * width, at, width, 40, SECTION_COLORS[f"{operand}_codes"] + "55")
                middle = left + 44 + (word + 0.5) * width
                canvas.text(middle, at + 17, "tokens " + spans({c.token for c in codes}), 10.5, anchor="middle")
                canvas.text(middle, at + 32, "ch. " + spans({c.channel for c in codes}), 10.5, anchor="middle")
    return top + 10 + 3 * 44


# -- blocks --------------------------------------------------------------------------------------------------------


def draw_blocks(canvas: Canvas, x: float, y: float) -> float:
    """Byte maps of a few formats."""
    y = heading(
        canvas, x, y, "4  The block in memory",
        "To scale, with the byte offset and size of every section. Sections begin at multiples of 16 bytes, blocks are "
        "multiples of 128: one bulk copy each.",
    )  # fmt: skip
    examples = {
        "4 bit, K per channel, groups of 128": Spec(),
        "preset kv4: V per token in symmetric groups of 64": Spec(v_group=64, v_symmetric=True),
        "2 bit, K per channel, groups of 128": Spec(2, 2),
        "preset kv2: K per token, symmetric, block mean": Spec(2, 2, "token", 64, 64, True, False, "block"),
        "8 bit, groups of 128": Spec(8, 8),
    }
    scale = (WIDTH - 2 * MARGIN) / block_format(HEAD_DIM, Spec(8, 8)).block_bytes
    for name, spec in examples.items():
        y = draw_block(canvas, x, y + 14, name, block_format(HEAD_DIM, spec), scale)
    return y


def draw_block(canvas: Canvas, x: float, y: float, name: str, fmt: BlockFormat, scale: float) -> float:
    canvas.text(x, y + 12, name, 13, weight="bold")
    bits = 8 * fmt.block_bytes / (2 * 128 * fmt.head_dim)
    canvas.text(WIDTH - MARGIN, y + 12, f"{fmt.block_bytes:,} bytes, {bits:.2f} bits per value", 12.5, MUTED, "end")
    for section_name, section in fmt.sections.items():
        canvas.box(x + section.offset * scale, y + 20, section.nbytes * scale, 24, SECTION_COLORS[section_name])
    column = (WIDTH - 2 * MARGIN) / 7
    for i, (section_name, section) in enumerate(fmt.sections.items()):
        at = x + i * column
        canvas.box(at, y + 53, 11, 11, SECTION_COLORS[section_name])
        label = f"{section_name} @{section.offset} +{section.nbytes}"
        canvas.text(at + 16, y + 63, label, 10.5, mono=True)
    return y + 72


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(f"usage: python -m {__spec__.name if __spec__ else __name__} OUT.svg", file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
