"""Post-conditions of the block format: everything that the kernels, the packers and the MMA rely on."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from bitdecoding.cute_kernels.append_plan import ROW_PAD
from bitdecoding.cute_kernels.errors import InvalidArgument
from bitdecoding.cute_kernels.layouts import (
    BITS,
    BLOCK_ALIGN,
    BLOCK_TOKENS,
    GROUPS,
    HEAD_DIMS,
    MMA_A_TV,
    MMA_B_TV,
    NUM_SLICES,
    SLICE_TOKENS,
    TILE,
    Section,
    b_order,
    block_format,
    codes_layout,
    row_order,
    symmetric_zero,
    token_rows,
    transform_parts,
)
from bitdecoding.cute_kernels.render import render

ROOT = Path(__file__).parents[1]
LANES = 32
WORD_BYTES = 4
BANKS = 32


@dataclass(frozen=True)
class Spec:
    k_bits: int = 4
    v_bits: int = 4
    k_axis: str = "channel"
    k_group: int = 128
    v_group: int = 128
    k_symmetric: bool = False
    v_symmetric: bool = False
    k_mean: str = "none"


def all_formats():
    """Every combination at the group sizes and flags; bits of K and V vary together and against each other."""
    for head_dim in HEAD_DIMS:
        groups = [g for g in GROUPS if head_dim % g == 0]
        for (k_bits, v_bits), axis in product(product(BITS, BITS), ("channel", "token")):
            for k_group, v_group in product(GROUPS if axis == "channel" else groups, groups):
                for symmetric, mean in ((False, "none"), (True, "block"), (False, "block"), (True, "none")):
                    yield head_dim, Spec(k_bits, v_bits, axis, k_group, v_group, symmetric, symmetric, mean)


CODES = list(product("kv", HEAD_DIMS, BITS))


@pytest.fixture(params=CODES, ids=lambda p: f"{p[0]}-d{p[1]}-{p[2]}bit")
def codes(request):
    """(operand, head_dim, bits, bit offset of (token, channel), bytes of a lane's vector)."""
    operand, head_dim, bits = request.param
    layout, vector_words = codes_layout(operand, head_dim, bits)
    return operand, head_dim, bits, Section(0, 0, layout).table(), vector_words * WORD_BYTES


def fragment(operand: str, head_dim: int):
    """Lane, register and half of every (token, channel), and the A tile it is in: the PTX ISA's formula.

    Register r, half e of lane 4 g + t holds row g + 8 (r & 1), column 2 t + e + 8 (r >> 1).
    """
    token, channel = np.meshgrid(np.arange(BLOCK_TOKENS), np.arange(head_dim), indexing="ij")
    row, col = (token % TILE, channel % TILE) if operand == "k" else (channel % TILE, token % TILE)
    lane = 4 * (row % 8) + col % 8 // 2
    register = row // 8 + 2 * (col // 8)
    return lane, register, col % 2, token // TILE, channel // TILE


# -- the code words --------------------------------------------------------------------------------------------


def test_codes_fill_their_section_without_overlap(codes):
    _, head_dim, bits, table, _ = codes
    assert np.array_equal(np.sort(table.reshape(-1)), bits * np.arange(BLOCK_TOKENS * head_dim))


def test_a_vector_is_16_bytes_but_8_where_tiles_are_few(codes):
    _, head_dim, bits, _, vector = codes
    assert vector == (8 if (head_dim, bits) == (96, 2) else 16)


def test_codes_lie_in_the_lane_that_multiplies_them(codes):
    """Vectors are lane-major: [vector][lane][bytes]."""
    operand, head_dim, _, table, vector = codes
    lane = fragment(operand, head_dim)[0]
    assert np.array_equal(table // 8 // vector % LANES, lane)


def test_one_and_extracts_a_register(codes):
    """The two halves of a register lie in one word, 16 bits apart, and are the fragment's pair of columns."""
    operand, head_dim, bits, table, _ = codes
    lane, register, half, token_tile, channel_tile = fragment(operand, head_dim)
    word, bit = table // 32, table % 32
    assert np.array_equal(bit // 16, half)
    assert (bit % 16 % bits == 0).all()
    pair_axis = 1 if operand == "k" else 0  # columns of A
    first, second = (np.take(table, range(e, table.shape[pair_axis], 2), pair_axis) for e in range(2))
    assert np.array_equal(first + 16, second)
    # all codes of (lane, register, tile) are that pair, so the word masked to their bits is the register
    key = ((token_tile * 64 + channel_tile) * LANES + lane) * 4 + register
    order = np.argsort(key.reshape(-1), kind="stable")
    pairs = word.reshape(-1)[order].reshape(-1, 2)
    assert np.array_equal(pairs[:, 0], pairs[:, 1])


def test_registers_of_a_word_are_where_the_kernel_masks(codes):
    """Slots of a word's half: 8 bit: rows g at 0, rows g + 8 at 8; 4 and 2 bit: the register's nibble.

    The power of two of a slot must be one per row, or it could not leave with the accumulator.
    """
    operand, head_dim, bits, table, _ = codes
    _, register, _, token_tile, channel_tile = fragment(operand, head_dim)
    slot = table % 16
    if bits == 8:
        expected = 8 * (register & 1)
    else:
        expected = 4 * (register & 1) + 8 * (register >> 1)
        if bits == 2:
            second = token_tile % 2 if operand == "k" else channel_tile // (head_dim // TILE // 2)
            expected = expected + 2 * second
    assert np.array_equal(slot, expected)


@pytest.mark.parametrize("bits", BITS)
def test_codes_as_fp16_denormals_are_exact(bits):
    """Every slot that the words use, read as fp16, is code * 2^(slot - 24); 8 bits go up to 255 * 2^-24 exactly."""
    for slot in {8: (0,), 4: (0, 4), 2: (0, 2, 4, 6)}[bits]:
        codes = np.arange(1 << bits, dtype=np.uint16)
        values = (codes << slot).astype(np.uint16).view(np.float16)
        assert np.array_equal(values.astype(np.float64), codes * 2.0 ** (slot - 24))


def test_no_vector_crosses_a_slice(codes):
    """A slice is 32 tokens and one run of bytes."""
    _, head_dim, bits, table, vector = codes
    slice_bytes = SLICE_TOKENS * head_dim * bits // 8
    assert slice_bytes % (LANES * vector) == 0
    token = np.arange(BLOCK_TOKENS)[:, None]
    assert np.array_equal(table // 8 // slice_bytes, np.broadcast_to(token // SLICE_TOKENS, table.shape))
    assert NUM_SLICES * SLICE_TOKENS == BLOCK_TOKENS


def test_which_tiles_share_a_vector(codes):
    """K: channel tiles {2j, 2j+1} of token tiles {2i, 2i+1}; V: channel tiles {c, c + half} of the same.

    So a warp of the mma.sync path (a slice) and, for K, of the wgmma path (token tiles 2w, 2w+1) reads whole vectors;
    for V, a warp of the wgmma path (channel tiles w, w + 4 at head_dim 128) does at 8 and 4 bit. A 2-bit vector holds
    two such groups: there it reads half vectors.
    """
    operand, head_dim, bits, table, vector = codes
    _, _, _, token_tile, channel_tile = fragment(operand, head_dim)
    half = head_dim // TILE // 2
    group = channel_tile // 2 if operand == "k" else channel_tile % half
    place = (token_tile // 2) * 64 + group
    owner = {}
    for vector_index, tile in zip((table // 8 // vector // LANES).reshape(-1), place.reshape(-1), strict=True):
        owner.setdefault(int(vector_index), set()).add(int(tile))
    shared_by = {8: 1, 4: 1, 2: 2 if vector == 16 else 1}[bits]  # a 16-byte vector of 2-bit codes spans two such groups
    assert {len(tiles) for tiles in owner.values()} == {shared_by}


# -- bank conflicts --------------------------------------------------------------------------------------------


def wavefronts(addresses: np.ndarray, nbytes: int) -> int:
    """Wavefronts of one shared-memory read: 128 bytes of lanes per phase, distinct words of a bank one after another.

    16-byte reads go in quarter warps, 8-byte reads in half warps.
    """
    lanes = 128 // nbytes
    total = 0
    for phase in range(0, LANES, lanes):
        words = {a // 4 + i for a in addresses[phase : phase + lanes] for i in range(nbytes // 4)}
        total += max(np.bincount([w % BANKS for w in words]))
    return total


def test_wavefront_count_sees_conflicts():
    lane = np.arange(LANES)
    assert wavefronts(16 * lane, 16) == 4
    assert wavefronts(32 * lane, 16) == 8
    assert wavefronts(0 * lane, 4) == 1
    assert wavefronts(128 * lane, 4) == 32


def test_vector_reads_are_free_of_bank_conflicts(codes):
    operand, head_dim, _, table, vector = codes
    lane = fragment(operand, head_dim)[0]
    vectors = {}
    for byte, owner in zip((table // 8).reshape(-1), lane.reshape(-1), strict=True):
        vectors.setdefault(byte // (vector * LANES), {})[int(owner)] = byte // vector * vector
    for lanes in vectors.values():
        addresses = np.array([lanes[i] for i in range(LANES)])
        assert wavefronts(addresses, vector) == LANES * vector // 128


# -- 16-bit tokens in a stage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tokens_in_a_stage(head_dim):
    """Each value in its own place, copied 16 bytes at a time; a tile at least in a stage of any format."""
    rows = token_rows(head_dim, TILE)
    at = {rows(token, operand, c) for token in range(TILE) for operand in range(2) for c in range(head_dim)}
    assert len(at) == TILE * 2 * head_dim
    for token, operand, c in product(range(TILE), range(2), range(0, head_dim, 8)):
        assert 2 * rows(token, operand, c) % 16 == 0
        assert [rows(token, operand, c + i) - rows(token, operand, c) for i in range(8)] == list(range(8))
    smallest = min(block_format(d, spec).block_bytes for d, spec in all_formats() if d == head_dim)
    assert max(at) < rows(TILE, 0, 0) <= smallest // 2


@pytest.mark.parametrize(("head_dim", "operand"), list(product(HEAD_DIMS, range(2))))
def test_matrices_of_tokens_are_read_without_bank_conflicts(head_dim, operand):
    """``ldmatrix``: eight tokens' 16 bytes of K, and of V, at once."""
    rows = token_rows(head_dim, TILE)
    lane = np.arange(LANES)
    token, channel = lane % 8 + 8 * (lane // 8 % 2), 8 * (lane // 16)
    for c in range(0, head_dim, TILE):
        addresses = np.array([2 * rows(int(t), operand, int(c + d)) for t, d in zip(token, channel, strict=True)])
        assert wavefronts(addresses, 16) == 4


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (96, 32), (128, 128), (256, 256)])
def test_parts_of_a_transform(head_dim, size):
    """Halves of quarters side by side, each read by a lane of the row and stored by one; vectors use all banks."""
    parts = transform_parts(size)
    at = [parts(half, odd, high) for high, odd, half in product(range(2), repeat=3)]
    assert at == list(range(0, 2 * size, size // 4))
    row_bytes, vector, lanes = 2 * head_dim + ROW_PAD, min(size // 4, 16), list(product(range(2), range(2)))
    read = [[parts(y ^ odd, odd, high) for high, odd in lanes] for y in range(2)]
    stored = [[parts(odd, high, difference) for high, odd in lanes] for difference in range(2)]
    for places in (read, stored):
        assert sorted([*places[0], *places[1]]) == at
        for own, first in product(places, range(0, size // 4, vector)):
            addresses = np.array([row * row_bytes + place + first for place in own for row in range(8)])
            assert wavefronts(addresses, vector) == LANES * vector // 128


# -- parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extent", [64, 96, 128, 256])
def test_b_order_is_the_b_operand(extent):
    """Lane t's vector x holds, for k tiles 2x and 2x+1, B's registers: rows 2 t + e + 8 r (PTX ISA), e fastest."""
    order = [int(b_order(extent)(k)) for k in range(extent)]
    assert sorted(order) == list(range(extent))
    for t, x, odd, r, e in product(range(4), range(extent // 32), range(2), range(2), range(2)):
        k = 32 * x + 16 * odd + 8 * r + 2 * t + e
        assert order[k] == (x * 4 + t) * 8 + 4 * odd + 2 * r + e


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8])
def test_row_order_gives_a_lane_group_its_four_rows(num_groups):
    """The rows g, g+8, g+16, g+24 of a slice are 8 adjacent bytes, per channel group; groups of a lane are adjacent."""
    layout = row_order(num_groups)
    seen = set()
    for s, group, g, i in product(range(NUM_SLICES), range(num_groups), range(8), range(4)):
        at = int(layout(SLICE_TOKENS * s + 8 * i + g, group))
        assert at == ((s * 8 + g) * num_groups + group) * 4 + i
        seen.add(at)
    assert seen == set(range(BLOCK_TOKENS * num_groups))


def test_mma_tv_layouts_are_those_of_the_ptx_isa():
    for lane, value in product(range(LANES), range(8)):
        g, t, e, r = lane // 4, lane % 4, value % 2, value // 2
        assert int(MMA_A_TV(lane, value)) == (g + 8 * (r & 1)) + 16 * (2 * t + e + 8 * (r >> 1))
        if value < 4:
            assert int(MMA_B_TV(lane, value)) == g + 8 * (2 * t + e + 8 * r)


# -- blocks ----------------------------------------------------------------------------------------------------


def test_every_block_is_sections_side_by_side():
    """For all combinations: sections are 16-byte aligned, adjacent, bijective; blocks are a multiple of 128 bytes."""
    layouts_seen = {}
    for head_dim, spec in all_formats():
        fmt = block_format(head_dim, spec)
        end = 0
        for name, section in fmt.sections.items():
            assert section.offset == end, name
            assert section.offset % 16 == 0, (name, head_dim, spec)
            end += section.nbytes
            key = (name, head_dim, section.nbytes, str(section.layout))
            if key not in layouts_seen:
                element = {"k_codes": spec.k_bits, "v_codes": spec.v_bits}.get(name, 16)
                step = element if "codes" in name else 1
                table = section.table()
                layouts_seen[key] = np.array_equal(np.sort(table.reshape(-1)), step * np.arange(table.size))
                assert table.size * element == section.nbytes * 8, key
            assert layouts_seen[key], key
        assert end <= fmt.block_bytes < end + BLOCK_ALIGN
        assert fmt.block_bytes % BLOCK_ALIGN == 0
        assert (fmt.k_zero is None, fmt.v_zero is None) == (spec.k_symmetric, spec.v_symmetric)
        assert (fmt.k_mean is None) == (spec.k_mean == "none")


def test_shapes_of_the_parameters():
    fmt = block_format(128, Spec(k_group=32, v_group=64))
    assert fmt.k_scale.table().shape == (4, 128)  # token groups x channels
    assert fmt.v_scale.table().shape == (2, 128)  # channel groups x tokens
    fmt = block_format(96, Spec(k_axis="token", k_group=32, v_group=32, k_mean="block"))
    assert fmt.k_scale.table().shape == (128, 3)  # tokens x channel groups
    assert fmt.k_mean.table().shape == (1, 96)


@pytest.mark.parametrize(
    ("head_dim", "spec", "nbytes"),
    [
        (128, Spec(4, 4), 17408),
        (128, Spec(2, 2), 9216),
        (128, Spec(8, 8), 33792),
        (128, Spec(4, 2), 13312),
        (128, Spec(4, 4, v_group=64), 17920),
        (64, Spec(4, 4, v_group=64), 8960),
        (64, Spec(2, 2, k_group=32, v_group=32, v_symmetric=True), 5632),
        (256, Spec(2, 2, "token", 64, 64, True, True, "block"), 18944),
        (96, Spec(4, 4, "token", 32, 32), 15360),
    ],
)
def test_block_sizes(head_dim, spec, nbytes):
    assert block_format(head_dim, spec).block_bytes == nbytes


@pytest.mark.parametrize(
    ("head_dim", "changes", "named"),
    [
        (80, {}, "head_dim=80"),
        (128, {"k_bits": 3}, "k_bits=3"),
        (128, {"v_bits": 16}, "v_bits=16"),
        (128, {"k_axis": "head"}, "k_axis='head'"),
        (128, {"k_mean": "token"}, "k_mean='token'"),
        (128, {"k_group": 16}, "k_group=16"),
        (64, {"v_group": 128}, "v_group=128"),
        (96, {"v_group": 64}, "v_group=64"),
        (64, {"k_axis": "token", "v_group": 64}, "k_group=128"),
    ],
)
def test_impossible_formats_are_refused_by_name(head_dim, changes, named):
    with pytest.raises(InvalidArgument, match=named):
        block_format(head_dim, Spec(**changes))


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_codes_are_centred(bits):
    codes = np.arange(1 << bits)
    assert (codes + symmetric_zero(bits)).sum() == 0


def test_the_picture_in_the_documentation_is_of_this_format():
    """Redraw it with ``python -m bitdecoding.cute_kernels.render docs/layout.svg``."""
    assert (ROOT / "docs" / "layout.svg").read_text(encoding="utf-8") == render()
