"""decode, append and merge on CPU tensors against plain fp64 attention over the dequantised values."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
from attention_reference import attention, relative_error
from bitdecoding.cute_kernels.layouts import BITS, BLOCK_TOKENS, HEAD_DIMS
from test_quantization import SPECS, random_kv, spec_for
from torch import Tensor

import bitdecoding as bd

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 2e-5}  # bf16: the rounding of out
NAN_BYTES = 0xFF  # as fp16 parameters: NaN


@dataclass
class Problem:
    """The arguments of a decode, and per sequence the keys and values that they stand for (original space)."""

    spec: bd.QuantSpec
    pages: Tensor
    block_table: Tensor
    seqlens: Tensor
    packed_lens: Tensor
    tail: tuple[Tensor, Tensor]
    sink: tuple[Tensor, Tensor] | None
    values: list[tuple[Tensor, Tensor]]

    def decode(self, q: Tensor, **options):
        (tail_k, tail_v), (sink_k, sink_v) = self.tail, self.sink or (None, None)
        arguments = {
            "packed_lens": self.packed_lens, "tail_k": tail_k, "tail_v": tail_v, "sink_k": sink_k, "sink_v": sink_v,
        }  # fmt: skip
        return bd.decode(q, self.pages, self.block_table, self.seqlens, self.spec, **{**arguments, **options})

    def check(self, q: Tensor, **options) -> None:
        """Compare with the reference, sequence by sequence."""
        out, lse = self.decode(q, return_lse=True, **options)
        assert out.dtype == q.dtype
        assert lse.dtype == torch.float32
        for b, (k, v) in enumerate(self.values):
            want, want_lse = attention(q[b], k, v, **options)
            assert relative_error(out[b], want) < TOLERANCE[q.dtype], f"sequence {b} of {len(k)} tokens"
            torch.testing.assert_close(lse[b].double(), want_lse, atol=2e-4, rtol=2e-5)


def problem(
    lengths: list[tuple[int, int]],
    spec: bd.QuantSpec,
    *,
    heads: int = 2,
    head_dim: int = 64,
    num_sink: int = 0,
    dtype: torch.dtype = torch.float16,
    tail_capacity: int = 160,
    seed: int = 0,
    offset: float = 3.0,
    v_factor: float = 1.0,
) -> Problem:
    """A cache of sequences of (packed, tail) tokens behind up to num_sink sinks, with poison wherever it may lie."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    blocks = [-(-packed // BLOCK_TOKENS) for packed, _ in lengths]
    num_pages = sum(blocks) + 3
    max_pages = max(blocks) + 2
    free = torch.randperm(num_pages, generator=generator).tolist()
    shape = (num_pages, heads, bd.block_bytes(head_dim, spec))
    pages = torch.full(shape, NAN_BYTES, dtype=torch.uint8)
    block_table = torch.full((batch, max_pages), 2**30, dtype=torch.int32)
    tail = tuple(torch.full((batch, tail_capacity, heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    sink = tuple(torch.full((batch, num_sink, heads, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    seqlens, values = [], []
    for b, (packed, in_tail) in enumerate(lengths):
        used = [free.pop() for _ in range(blocks[b])]
        block_table[b, : len(used)] = torch.tensor(used, dtype=torch.int32)
        packed_k, packed_v = random_kv(packed, heads, head_dim, seed + 3 * b, dtype, offset)
        pages[used] = bd.quantize(packed_k, packed_v * v_factor, spec)
        stored = [x[:packed] for x in bd.dequantize(pages[used], head_dim, spec, torch.float32)]
        tail_kv = list(random_kv(in_tail, heads, head_dim, seed + 3 * b + 1, dtype, offset))
        # a sequence with anything behind its sinks has all of them
        sinks = num_sink if packed or in_tail else min(num_sink, b)
        sink_kv = list(random_kv(sinks, heads, head_dim, seed + 3 * b + 2, dtype, offset))
        for i, rotates in enumerate((spec.rotate_k, spec.rotate_v)):
            tail[i][b, :in_tail], tail_kv[i] = kept(tail_kv[i], rotates)
            sink[i][b, :sinks], sink_kv[i] = kept(sink_kv[i], rotates)
        seqlens.append(sinks + packed + in_tail)
        values.append(tuple(torch.cat((sink_kv[i], stored[i], tail_kv[i])) for i in range(2)))
    return Problem(
        spec,
        pages,
        block_table,
        torch.tensor(seqlens, dtype=torch.int32),
        torch.tensor([packed for packed, _ in lengths], dtype=torch.int32),
        tail,
        sink if num_sink else None,
        values,
    )


def kept(x: Tensor, rotates: bool) -> tuple[Tensor, Tensor]:
    """Tokens as tail and sinks hold them, and the values that these stand for."""
    held = bd.rotate(x) if rotates else x
    return held, bd.hadamard(held) if rotates else held


def random_q(batch: int, q_len: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(batch, q_len, heads, head_dim, generator=torch.Generator().manual_seed(7)).to(dtype)


RAGGED = [(0, 0), (0, 1), (127, 0), (128, 0), (129, 0), (1000, 0), (256, 37), (0, 150), (384, 128)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_and_head_dim(name: str, head_dim: int) -> None:
    dtype = (torch.float16, torch.bfloat16, torch.float32)[(len(name) + head_dim // 32) % 3]
    made = problem([(0, 0), (129, 0), (384, 20)], spec_for(name, head_dim), head_dim=head_dim, num_sink=3, dtype=dtype)
    made.check(random_q(3, 1, 4, head_dim, dtype))


@pytest.mark.parametrize("k_bits", BITS)
@pytest.mark.parametrize("v_bits", BITS)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_every_combination_of_bits(k_bits: int, v_bits: int, axis: str) -> None:
    spec = bd.QuantSpec(k_bits=k_bits, v_bits=v_bits, k_axis=axis, k_group=32, v_group=32)
    problem([(200, 0), (128, 9)], spec).check(random_q(2, 2, 2, 64))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_sink", [0, 4])
def test_ragged_lengths(num_sink: int, dtype: torch.dtype) -> None:
    made = problem(RAGGED, spec_for("default", 128), head_dim=128, num_sink=num_sink, dtype=dtype)
    made.check(random_q(len(RAGGED), 1, 4, 128, dtype))


@pytest.mark.parametrize("group", [1, 3, 5, 6, 7, 8, 16])
def test_any_number_of_query_heads(group: int) -> None:
    made = problem([(300, 0), (128, 30)], spec_for("rotated", 64), heads=3)
    made.check(random_q(2, 1, 3 * group, 64))
    made.check(random_q(2, 3, 3 * group, 64))


@pytest.mark.parametrize("window", [None, 1, 7, 130, 300, 5000])
@pytest.mark.parametrize("q_len", [1, 2, 9, 200])
def test_causal_queries_and_windows(q_len: int, window: int | None) -> None:
    made = problem(RAGGED, spec_for("rotated", 64), num_sink=4)
    # more queries than tokens: the first see no key, and give zeros
    made.check(random_q(len(RAGGED), q_len, 4, 64), **({"window": window} if window else {}))


def test_many_query_rows_over_many_blocks() -> None:
    made = problem([(4700, 9)], spec_for("rotated", 64), heads=1, num_sink=4)
    made.check(random_q(1, 130, 5, 64))


@pytest.mark.parametrize("name", ["default", "kv2-like"])
def test_soft_cap_sink_logits_and_scale(name: str) -> None:
    made = problem(RAGGED, spec_for(name, 64), num_sink=2)
    q = random_q(len(RAGGED), 2, 6, 64) * 3
    made.check(q, softcap=5.0)
    made.check(q, softmax_scale=0.3)
    logits = torch.tensor([-torch.inf, -3.0, 0.0, 1.0, 8.0, 100.0])
    made.check(q, sink_logits=logits)
    made.check(q, sink_logits=logits, softcap=20.0, window=100, softmax_scale=0.05)


def test_scores_of_any_size_stay_finite() -> None:
    made = problem([(500, 3)], spec_for("symmetric-8", 64))
    made.check(random_q(1, 1, 2, 64) * 1000)


def test_no_key_gives_zero_and_minus_infinity_or_the_sink_logit() -> None:
    made = problem([(0, 0), (0, 0)], bd.QuantSpec(v_group=64))
    q = random_q(2, 3, 4, 64)
    out, lse = made.decode(q, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    logits = torch.tensor([0.5, -1.0, 3.0, 0.0])
    out, lse = made.decode(q, return_lse=True, sink_logits=logits)
    assert (out == 0).all()
    torch.testing.assert_close(lse, logits.expand(2, 3, 4))


def test_pages_behind_the_window_are_not_read() -> None:
    made = problem([(1000, 0)], bd.QuantSpec(v_group=64))
    q = random_q(1, 1, 2, 64)
    want = made.decode(q, window=200)
    made.pages[made.block_table[0, :6].long()] = NAN_BYTES  # 768 tokens; the window starts at 800
    assert torch.equal(made.decode(q, window=200), want)


def test_default_lengths() -> None:
    """Without packed_lens: all tokens but the sinks are packed; with a tail, the full blocks among them."""
    spec = bd.QuantSpec(v_group=64)
    q = random_q(2, 1, 2, 64)
    made = problem([(200, 0), (128, 0)], spec, num_sink=4)
    want = made.decode(q)
    assert torch.equal(made.decode(q, packed_lens=None, tail_k=None, tail_v=None), want)
    made = problem([(256, 100), (0, 127)], spec, num_sink=4)
    assert torch.equal(made.decode(q, packed_lens=None), made.decode(q))


def test_out_is_written_and_returned() -> None:
    made = problem([(200, 5)], bd.QuantSpec(v_group=64))
    q = random_q(1, 2, 2, 64)
    out = torch.full_like(q, torch.nan)
    assert made.decode(q, out=out) is out
    assert torch.equal(out, made.decode(q))


def test_pages_may_be_a_slice_of_a_larger_pool() -> None:
    made = problem([(300, 5)], bd.QuantSpec(v_group=64))
    q = random_q(1, 1, 2, 64)
    pool = torch.full((len(made.pages), 5, made.pages.shape[2] + 64), NAN_BYTES, dtype=torch.uint8)
    pool[:, 1:3, : made.pages.shape[2]] = made.pages
    assert torch.equal(replace(made, pages=pool[:, 1:3, : made.pages.shape[2]]).decode(q), made.decode(q))


def test_threads_do_not_change_the_result() -> None:
    made = problem([(5000, 0), (2500, 37)], bd.QuantSpec(v_group=64), num_sink=4)
    q = random_q(2, 2, 4, 64)
    want, want_lse = made.decode(q, return_lse=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            out, lse = made.decode(q, return_lse=True)
            assert torch.equal(out, want)
            assert torch.equal(lse, want_lse)
    finally:
        torch.set_num_threads(threads)


def test_decode_works_in_a_forked_process() -> None:
    """Threads do not survive a fork; waiting for them would never end."""
    made = problem([(5000, 0)], bd.QuantSpec(v_group=64))
    q = random_q(1, 1, 2, 64)
    want = made.decode(q)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(made.decode(q), want) else 1)
    deadline = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


# ---------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge_of_parts_equals_the_whole(dtype: torch.dtype) -> None:
    k, v = random_kv(300, 2, 64)
    q = random_q(1, 1, 6, 64)[0]
    parts = [attention(q, k[a:b], v[a:b]) for a, b in ((0, 100), (100, 101), (101, 300))]
    empty = torch.full_like(parts[0][0], torch.nan), torch.full_like(parts[0][1], -torch.inf)
    outs, lses = zip(*([*parts[:1], empty, *parts[1:]]), strict=True)
    outs, lses = [x.to(dtype) for x in outs], [x.float() for x in lses]
    want, want_lse = attention(q, k, v)
    for out, lse in (bd.merge(outs, lses), bd.merge(torch.stack(outs), torch.stack(lses))):
        assert out.dtype == dtype
        assert relative_error(out, want) < TOLERANCE[dtype]
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lse", [-1e30, 1000.3, 12345.6, 1e30])
def test_merge_of_large_lses(lse: float) -> None:
    """Equal parts give themselves, however coarse fp32 is at their lse."""
    part = torch.randn(5, 96)
    out, merged = bd.merge(part.expand(3, 5, 96), torch.full((3, 5), lse))
    torch.testing.assert_close(out, part)
    torch.testing.assert_close(merged, torch.full((5,), lse + math.log(3)))


def test_merge_of_nothing_is_nothing() -> None:
    out, lse = bd.merge(torch.full((2, 3, 64), torch.nan), torch.full((2, 3), -torch.inf))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


# ---------------------------------------------------------------------------------------------- append

APPEND_SPEC = bd.QuantSpec(v_group=64, rotate_k=True)


def empty_cache(batch: int = 2, capacity: int = 159, max_pages: int = 4, num_sink: int = 0) -> dict[str, Tensor]:
    tail = torch.full((2, batch, capacity, 2, 64), torch.nan, dtype=torch.float16)
    cache = {
        "pages": torch.full((9, 2, bd.block_bytes(64, APPEND_SPEC)), NAN_BYTES, dtype=torch.uint8),
        "block_table": torch.arange(8, dtype=torch.int32).flip(0).reshape(2, 4)[:batch, :max_pages].contiguous(),
        "seqlens": torch.zeros(batch, dtype=torch.int32),
        "packed_lens": torch.zeros(batch, dtype=torch.int32),
        "tail_k": tail[0],
        "tail_v": tail[1],
    }
    if num_sink:
        sinks = torch.full((2, batch, num_sink, 2, 64), torch.nan, dtype=torch.float16)
        cache |= {"sink_k": sinks[0], "sink_v": sinks[1]}
    return cache


def append(cache: dict[str, Tensor], k: Tensor, v: Tensor, **options) -> None:
    bd.append(k, v, spec=APPEND_SPEC, **(cache | options))


@pytest.mark.parametrize("steps", [[1] * 5, [127, 1, 1], [128, 128], [300, 1, 200], [500], [0, 13, 0]])
@pytest.mark.parametrize(("recent", "num_sink"), [(0, 0), (32, 3)])
def test_append_packs_what_is_not_recent(steps: list[int], recent: int, num_sink: int) -> None:
    cache = empty_cache(num_sink=num_sink)
    k, v = (x.unflatten(1, (2, 2)).transpose(0, 1) for x in random_kv(sum(steps), 4, 64))  # [batch, tokens, 2, 64]
    done = [0, 0]
    for n in steps:
        counts = [n, n // 2]  # the second sequence takes half of the tokens of a step
        new_k, new_v = (torch.full((2, n, 2, 64), torch.nan, dtype=torch.float16) for _ in range(2))
        for b, count in enumerate(counts):
            new_k[b, :count], new_v[b, :count] = (x[b, done[b] : done[b] + count] for x in (k, v))
            done[b] += count
        append(cache, new_k, new_v, recent=recent, lengths=torch.tensor(counts, dtype=torch.int32))
    for b, tokens in enumerate(done):
        sinks = min(tokens, num_sink)
        packed = max(0, tokens - sinks - recent) // 128 * 128
        assert cache["seqlens"][b] == tokens
        assert cache["packed_lens"][b] == packed
        if num_sink:
            assert torch.equal(cache["sink_k"][b, :sinks], bd.rotate(k[b, :sinks]))
            assert torch.equal(cache["sink_v"][b, :sinks], v[b, :sinks])
        blocks = cache["pages"][cache["block_table"][b, : packed // 128].long()]
        assert torch.equal(blocks, bd.quantize(k[b, sinks : sinks + packed], v[b, sinks : sinks + packed], APPEND_SPEC))
        tail = tokens - sinks - packed
        assert torch.equal(cache["tail_k"][b, :tail], bd.rotate(k[b, tokens - tail : tokens]))
        assert torch.equal(cache["tail_v"][b, :tail], v[b, tokens - tail : tokens])
    used = {int(p) for b in range(2) for p in cache["block_table"][b, : cache["packed_lens"][b] // 128]}
    assert (cache["pages"][sorted(set(range(9)) - used)] == NAN_BYTES).all()


def test_rejected_drafts_roll_back_by_lowering_seqlens() -> None:
    cache = empty_cache()
    k, v = (x[None].expand(2, -1, -1, -1) for x in random_kv(140, 2, 64))
    append(cache, k[:, :120], v[:, :120], recent=8)
    append(cache, k[:, 120:139] * 0, v[:, 120:139] * 0, recent=32)
    cache["seqlens"] -= 19
    append(cache, k[:, 120:140], v[:, 120:140], recent=8)
    assert (cache["packed_lens"] == 128).all()
    blocks = cache["pages"][cache["block_table"][:, 0].long()]
    assert torch.equal(blocks[0], bd.quantize(k[0, :128], v[0, :128], APPEND_SPEC)[0])
    assert torch.equal(cache["tail_k"][:, :12], bd.rotate(k[:, 128:]))


def test_rotated_and_unrotated_caches_attend_alike() -> None:
    """Up to what 8 bits cost: blocks, tail and sinks all agree about the space they are in."""
    results = []
    for rotates in (False, True):
        spec = bd.QuantSpec(k_bits=8, v_bits=8, k_group=32, v_group=32, rotate_k=rotates, rotate_v=rotates)
        made = problem([(256, 40), (0, 90)], spec, num_sink=4)
        results.append(made.decode(random_q(2, 2, 4, 64)))
    assert relative_error(results[1], results[0].double()) < 5e-3


# ---------------------------------------------------------------------------------------------- errors


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


APPEND_ERRORS = [
    ({"k_new": torch.zeros(2, 3, 2, 64, dtype=torch.int8)}, ["k_new is torch.int8", "torch.float16"]),
    ({"v_new": torch.zeros(2, 4, 2, 64).half()}, ["v_new is", "new_tokens=3"]),
    ({"v_new": torch.zeros(2, 3, 2, 64)}, ["v_new is torch.float32", "torch.float16"]),
    ({"pages": torch.zeros(9, 2, 99, dtype=torch.uint8)}, ["pages is", "block_bytes="]),
    ({"block_table": torch.zeros(2, 4, dtype=torch.int64)}, ["block_table is torch.int64", "torch.int32"]),
    ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, ["block_table is", "batch=2"]),
    ({"seqlens": int32(0)}, ["seqlens is", "batch=2"]),
    ({"packed_lens": torch.zeros(2)}, ["packed_lens is torch.float32", "torch.int32"]),
    ({"tail_k": torch.zeros(2, 159, 1, 64).half()}, ["tail_k is", "num_kv_heads=2"]),
    ({"tail_v": torch.zeros(2, 158, 2, 64).half()}, ["tail_v is", "tail_capacity=159"]),
    ({"tail_v": None}, ["tail_v=None", "tail_k"]),
    ({"recent": 33}, ["tail_capacity=159", "160"]),
    ({"recent": -1}, ["recent=-1", "0"]),
    ({"sink_k": torch.zeros(2, 3, 2, 64).half()}, ["sink_v=None", "sink_k"]),
    ({"lengths": int32(4, 0)}, ["lengths[0]=4", "new_tokens=3"]),
    ({"lengths": int32(0, -1)}, ["lengths[1]=-1"]),
    ({"lengths": torch.zeros(2)}, ["lengths is torch.float32", "torch.int32"]),
    ({"seqlens": int32(0, -1)}, ["seqlens[1]=-1", "0"]),
    ({"packed_lens": int32(128, 0)}, ["packed_lens[0]=128", "0 to 126"]),
    ({"packed_lens": int32(100, 0)}, ["packed_lens[0]=100", "multiples of 128"]),
    ({"seqlens": int32(126, 160)}, ["seqlens[1]=160", "159"]),
    ({"block_table": torch.full((2, 4), 9, dtype=torch.int32)}, ["block_table[0, 0]=9", "0 to 8"]),
    ({"block_table": torch.full((2, 4), -1, dtype=torch.int32)}, ["block_table[0, 0]=-1", "0 to 8"]),
    ({"block_table": torch.full((2, 4), 5, dtype=torch.int32)}, ["page 5 twice", "once"]),
]


@pytest.mark.parametrize(("change", "names"), APPEND_ERRORS)
def test_append_errors_change_nothing(change: dict, names: list[str]) -> None:
    cache = empty_cache()
    k, v = (x[None].expand(2, -1, -1, -1).contiguous() for x in random_kv(129, 2, 64))
    append(cache, k[:, :126], v[:, :126])
    arguments = cache | {"k_new": k[:, 126:], "v_new": v[:, 126:], "spec": APPEND_SPEC} | change
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    with pytest.raises(bd.InvalidArgument) as error:
        bd.append(**arguments)
    for name in names:
        assert name in str(error.value)
    for name, x in before.items():
        assert torch.equal(arguments[name].view(torch.uint8), x.view(torch.uint8))


def test_append_without_a_table_entry_left_is_out_of_pages() -> None:
    cache = empty_cache(max_pages=1)
    k, v = (x[None].expand(2, -1, -1, -1) for x in random_kv(256, 2, 64))
    with pytest.raises(bd.OutOfPages, match=r"sequence 0 needs 2 pages.* has 1"):
        append(cache, k, v)
    assert (cache["seqlens"] == 0).all()
    append(cache, k[:, :255], v[:, :255])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seqlens": int32(300, 300)}, ["seqlens[0]=300", "160"]),
        ({"seqlens": int32(133, -3)}, ["seqlens[1]=-3", "0"]),
        ({"seqlens": int32(133)}, ["seqlens", "batch=2"]),
        ({"seqlens": torch.zeros(2)}, ["seqlens", "float32", "int32"]),
        ({"packed_lens": int32(128, -128)}, ["packed_lens[1]=-128", "0 to 133"]),
        ({"packed_lens": int32(128, 134)}, ["packed_lens[1]=134", "0 to 133"]),
        ({"packed_lens": int32(600, 128), "seqlens": int32(605, 133)}, ["sequence 0 has 5 blocks", "3 (max_pages)"]),
        ({"block_table": torch.full((2, 3), 5, dtype=torch.int32)}, ["block_table[0, 0]=5", "0 to 4"]),
        ({"block_table": torch.full((2, 3), -7, dtype=torch.int32)}, ["block_table[0, 0]=-7"]),
        ({"block_table": torch.zeros(2, 3)}, ["block_table", "float32", "int32"]),
        ({"q": torch.zeros(2, 1, 3, 64).half()}, ["q", "num_kv_heads=2"]),
        ({"q": torch.zeros(2, 1, 4, 64, dtype=torch.int32)}, ["q", "int32", "float16"]),
        ({"q": torch.zeros(2, 1, 4, 80).half()}, ["head_dim=80", "96"]),
        ({"q": torch.zeros(2, 4, 64).half()}, ["q", "num_q_heads"]),
        ({"q": torch.zeros(2, 4, 3, 64).half().transpose(1, 2)}, ["q", "strides", "contiguous"]),
        ({"pages": torch.zeros(5, 2, 64, dtype=torch.uint8)}, ["pages", "block_bytes="]),
        ({"tail_k": None}, ["tail_k", "tail_v"]),
        ({"sink_k": torch.zeros(2, 1, 2, 64).half()}, ["sink_v", "sink_k"]),
        ({"tail_k": torch.zeros(2, 160, 2, 64)}, ["tail_k", "float32", "float16"]),
        ({"sink_logits": torch.zeros(3)}, ["sink_logits", "num_q_heads=4"]),
        ({"sink_logits": torch.zeros(4).half()}, ["sink_logits", "float32"]),
        ({"window": 0}, ["window=0", "1"]),
        ({"softcap": -1.0}, ["softcap=-1", "positive"]),
        ({"softcap": float("nan")}, ["softcap=nan", "positive"]),
        ({"softmax_scale": 0.0}, ["softmax_scale=0", "positive"]),
        ({"softmax_scale": float("inf")}, ["softmax_scale=inf", "finite"]),
        ({"out": torch.zeros(2, 1, 4, 64)}, ["out", "float32", "float16"]),
        ({"out": torch.zeros(2, 1, 2, 64).half()}, ["out", "num_q_heads=4"]),
    ],
)
def test_decode_errors_name_argument_value_and_allowed_values(change: dict, names: list[str]) -> None:
    made = problem([(128, 5), (128, 5)], bd.QuantSpec(v_group=64))
    arguments = {
        "q": random_q(2, 1, 4, 64), "pages": made.pages, "block_table": made.block_table, "seqlens": made.seqlens,
        "packed_lens": made.packed_lens, "tail_k": made.tail[0], "tail_v": made.tail[1], "spec": made.spec,
    }  # fmt: skip
    bd.decode(**arguments)
    with pytest.raises(bd.InvalidArgument) as error:
        bd.decode(**(arguments | change))
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("outs", "lses", "names"),
    [
        ([], [], ["outs has 0", "at least 1"]),
        ([torch.zeros(2, 64)], [], ["outs has 1 parts and lses 0"]),
        ([torch.zeros(2, 64), torch.zeros(3, 64)], [torch.zeros(2), torch.zeros(3)], ["outs[1] is", "one shape"]),
        ([torch.zeros(2, 64)], [torch.zeros(3)], ["lses[0] is", "[2]"]),
        ([torch.zeros(2, 64)], [torch.zeros(2).half()], ["lses[0] is torch.float16", "torch.float32"]),
        ([torch.zeros(2, 64).int()], [torch.zeros(2)], ["outs[0] is torch.int32", "torch.float16"]),
    ],
)
def test_merge_errors(outs: list, lses: list, names: list[str]) -> None:
    with pytest.raises(bd.InvalidArgument) as error:
        bd.merge(outs, lses)
    for name in names:
        assert name in str(error.value)
