"""What the kernels of decode work on: their parameters, and what is known of a sequence and of a piece of it.

A *piece* is one (sequence, KV head, query tile); its *units* are 128-token blocks, then chunks of 16-bit tokens (sinks,
then tail).
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute

from . import ptx
from .layouts import BLOCK_SHIFT, BLOCK_TOKENS

MAX_WINDOW = 1 << 30  # more than any length; the launcher passes no more, so that positions minus a window have 32 bits


class Params(NamedTuple):
    """The flat kernel parameters; shapes in elements. The order is the launch ABI of the C++ core."""

    q: cute.Pointer  # 16 bit [batch, q_len, num_q_heads, head_dim]
    pages: cute.Pointer  # u8 [num_pages, num_kv_heads, block_bytes], strides below
    block_table: cute.Pointer  # i32 [batch, max_pages]
    seqlens: cute.Pointer  # i32 [batch]
    packed_lens: cute.Pointer  # i32 [batch] or null
    tail_k: cute.Pointer  # 16 bit [batch, tail_capacity, num_kv_heads, head_dim]
    tail_v: cute.Pointer
    sink_k: cute.Pointer  # 16 bit [batch, num_sink, num_kv_heads, head_dim]
    sink_v: cute.Pointer
    sink_logits: cute.Pointer  # f32 [num_q_heads] or null
    out: cute.Pointer  # like q
    lse: cute.Pointer  # f32 [batch, q_len, num_q_heads] or null
    workspace: cute.Pointer  # f32 [2 grid, q_tile (head_dim + 2)], partial results (merge.py); zero between launches
    page_stride: Int64  # bytes
    head_stride: Int64  # bytes
    batch: Int32
    q_len: Int32
    num_q_heads: Int32
    num_kv_heads: Int32
    num_pages: Int32
    max_pages: Int32
    tail_capacity: Int32
    num_sink: Int32
    window: Int32  # at most MAX_WINDOW
    softmax_scale_log2: Float32
    softcap: Float32  # 0: none
    bfloat16: Int32  # 1: q, out, tail and sinks are bf16; 0: fp16
    rotate_q: Int32  # 1: q goes through a Hadamard transform (the cache's keys did)
    rotate_out: Int32  # 1: the output goes through a Hadamard transform (the cache's values did)
    group: Int32  # num_q_heads / num_kv_heads
    q_tiles: Int32  # tiles of query columns of a KV head


class Sequence(NamedTuple):
    """What the walk knows of one sequence."""

    length: Int32
    sinks: Int32  # tokens in the sink buffers
    packed: Int32  # tokens in blocks
    tail: Int32  # tokens in the tail
    first_block: Int32  # blocks before it are outside every query's window
    blocks: Int32  # blocks to read
    sink_chunks: Int32
    units: Int32  # of one piece; at least one, so that empty sequences are written too

    @property
    def packed_end(self) -> Int32:
        """Position behind the packed tokens."""
        return self.sinks + self.packed


class Piece(NamedTuple):
    """What a CTA does of a piece. The merge warps find it out; consumers read it from shared memory, field by field
    when they need it, and so hold few registers.
    """

    blocks: Int32  # to take from the ring
    first_position: Int32  # of their first token
    packed_end: Int32  # position behind the sequence's packed tokens
    seen_by_all: Int32  # positions below it are visible to every query, up to ..
    window_start: Int32  # .. the window of the newest one
    b: Int32
    head: Int32  # KV head
    first_row: Int32  # of the query tile
    first_chunk: Int32  # 16-bit chunks first_chunk .. end_chunk - 1; sinks come first
    end_chunk: Int32
    sink_chunks: Int32
    sinks: Int32  # tokens
    tail: Int32  # tokens
    is_last: Int32  # 1: the CTA's last
    collects: Int32  # 1: the CTA merges the partial results of the piece
    columns: Int32  # query columns of the tile; 0 if the CTA has nothing to do for it
    slot: Int32  # workspace slot of this CTA's partial result
    first_cta: Int32  # of those that share the piece
    first_slot: Int32  # slot of that CTA's partial result
    ctas: Int32  # how many share it; 1: no partial results


def store_piece(address: Int32, piece: Piece) -> None:
    """Write a Piece to shared memory."""
    ptx.store_record(address, piece)


def load_piece(address: Int32) -> Piece:
    return ptx.load_record(address, Piece)


def load_field(address: Int32, name: str) -> Int32:
    """One field of a Piece."""
    return ptx.load_shared(address, 4 * Piece._fields.index(name), 1)[0]


def blocks_due(p: Params, tail: Int32) -> Int32:
    """How many blocks of a tail of so many tokens a step packs."""
    return cutlass.max(tail - p.recent, 0) >> BLOCK_SHIFT


def whole_blocks(piece: Piece) -> tuple:
    """(first, end) of the piece's blocks that every query sees as a whole."""
    first = piece.window_start - piece.first_position + BLOCK_TOKENS - 1 >> BLOCK_SHIFT
    return first, piece.seen_by_all - piece.first_position >> BLOCK_SHIFT


@cute.jit
def tokens_of(p: Params, piece: Piece | Sequence, chunk: Int32, size: int):
    """(K, V, capacity, first token, tokens held, position of token 0) of the buffer that has the piece's 16-bit chunk,
    of ``size`` tokens: sinks come first, then the tail.
    """
    k, v, capacity = p.sink_k.toint(), p.sink_v.toint(), p.num_sink
    token, held, position = chunk * size, piece.sinks, Int32(0)
    if chunk >= piece.sink_chunks:
        k, v, capacity = p.tail_k.toint(), p.tail_v.toint(), p.tail_capacity
        token = (chunk - piece.sink_chunks) * size
        held = piece.tail
        position = piece.packed_end
    return k, v, capacity, token, held, position


def token_row(p: Params, b: Int32, head: Int32, capacity: Int32, token: Int32, head_dim: int) -> Int64:
    """Byte of a token's row in a buffer of 16-bit tokens, of ``capacity`` for each sequence."""
    return (Int64(b * capacity + token) * p.num_kv_heads + head) * (2 * head_dim)


def token_stride(p: Params, head_dim: int) -> Int32:
    """Bytes from there to the next token's row."""
    return p.num_kv_heads * (2 * head_dim)
