"""What the kernels that append work on: their parameters, and what is to be done for a part of them."""

from typing import NamedTuple

from cutlass import Float32, Int32, Int64, cute

from . import ptx

OPERANDS = 2  # K and V


class Params(NamedTuple):
    """The flat kernel parameters; shapes in elements. The order is the launch ABI of the C++ core."""

    k_new: cute.Pointer  # 16 bit [batch, new_tokens, num_kv_heads, head_dim], strides below
    v_new: cute.Pointer
    lengths: cute.Pointer  # i32 [batch] or null
    cu_seqlens: cute.Pointer  # i32 [batch + 1] or null
    pages: cute.Pointer  # u8 [num_pages, num_kv_heads, block_bytes], strides below
    block_table: cute.Pointer  # i32 [batch, max_pages]
    seqlens: cute.Pointer  # i32 [batch]
    packed_lens: cute.Pointer  # i32 [batch]
    tail_k: cute.Pointer  # 16 bit [batch, tail_capacity, num_kv_heads, head_dim]
    tail_v: cute.Pointer
    sink_k: cute.Pointer  # 16 bit [batch, num_sink, num_kv_heads, head_dim]
    sink_v: cute.Pointer
    status: cute.Pointer  # i32 [1] or null
    workspace: cute.Pointer  # counters i32 [batch], COUNTER_BYTES apart; zero between launches
    new_batch_stride: Int64  # bytes, as the others
    new_token_stride: Int64
    new_head_stride: Int64
    page_stride: Int64
    head_stride: Int64
    batch: Int32
    new_tokens: Int32
    num_kv_heads: Int32
    num_pages: Int32
    max_pages: Int32
    tail_capacity: Int32
    num_sink: Int32
    recent: Int32
    items: Int32  # of an operand of a sequence's head
    k_clip: Float32  # 1: min/max, 0: searched
    v_clip: Float32
    rotate_k: Int32
    rotate_v: Int32
    bfloat16: Int32  # 1: all 16-bit tensors are bf16; 0: fp16
    pack_all: Int32  # 1: quantise


class Item(NamedTuple):
    """Which part of the work an item is."""

    b: Int32
    head: Int32
    operand: Int32  # 0: K, 1: V
    share: Int32


class Job(NamedTuple):
    """What there is to do for an item. The old tail, then the new tokens that do not go to sinks, are the *stream*."""

    b: Int32
    head: Int32
    operand: Int32
    start: Int32  # row of the sequence's first new token, with cu_seqlens
    sinks: Int32  # tokens in the sinks before
    to_sink: Int32  # new tokens that go there
    old: Int32  # tokens in the tail before
    total: Int32  # of the stream
    blocks: Int32  # of the stream that get packed, by all items
    column: Int32  # of the block table, for the first of them
    first: Int32  # blocks of this item: first .. end - 1; quantising, every ``items``-th of them
    end: Int32
    copies: Int32  # 16-bit tokens that this item copies
    length: Int32  # of the sequence, afterwards; -1: there is no page for one of the blocks, so nothing is done
    todo: Int32  # 1: for all warps; 0: no block, and no more copies than a warp has loaded first
    any: Int32  # 1: a thread has found what makes all do again


TODO_AT, ANY_AT = (4 * Job._fields.index(name) for name in ("todo", "any"))


def store_job(address: Int32, job: Job) -> None:
    """Write a Job to shared memory."""
    ptx.store_record(address, job)


def load_job(address: Int32) -> Job:
    return ptx.load_record(address, Job)
