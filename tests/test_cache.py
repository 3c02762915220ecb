"""KVCache: against a plain 16-bit model, and its files against damage."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pytest
import torch
from attention_reference import attention, relative_error
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors import safe_open
from safetensors.torch import save_file
from test_quantization import random_kv
from torch import Tensor

import bitdecoding as bd

KEY = "bitdecoding.KVCache"  # of a file's metadata
HEADS, HEAD_DIM = 2, 64
BATCH = 3
SPEC = bd.QuantSpec(k_bits=4, v_bits=2, v_group=32, rotate_v=True)


def make(**fields) -> bd.KVCache:
    defaults = {
        "batch_size": BATCH, "max_tokens": 900, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, "quant": SPEC,
    }  # fmt: skip
    return bd.KVCache(**(defaults | fields))


def new_tokens(count: int, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    k, v = random_kv(count, batch * HEADS, HEAD_DIM, seed)
    return tuple(x.unflatten(1, (batch, HEADS)).transpose(0, 1).contiguous() for x in (k, v))


def random_q(q_len: int = 1, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, q_len, 2 * HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)).half()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


known_blocks: dict[
    tuple[bytes, bytes], Tensor
] = {}  # by their tokens: the model asks for the same ones again and again


def quantised(k: Tensor, v: Tensor) -> Tensor:
    """bd.quantize of full blocks."""
    blocks = [torch.zeros(0, HEADS, bd.block_bytes(HEAD_DIM, SPEC), dtype=torch.uint8)]
    for both in zip(k.split(128), v.split(128), strict=True) if len(k) else ():
        key = tuple(x.numpy().tobytes() for x in both)
        if key not in known_blocks:
            known_blocks[key] = bd.quantize(*both, SPEC)
        blocks.append(known_blocks[key])
    return torch.cat(blocks)


class Model(RuleBasedStateMachine):
    """A cache beside lists of 16-bit tokens; which of them are packed follows from the documented rule alone.

    Tokens are appended by the host or, with reserved pages, as the device would on its own; after the latter the books
    are sometimes left stale, so that whatever comes next must notice.
    """

    @initialize(recent=st.sampled_from([0, 5, 128]), sinks=st.sampled_from([0, 4]), pages=st.sampled_from([None, 7]))
    def start(self, recent: int, sinks: int, pages: int | None) -> None:
        self.recent, self.sinks = recent, sinks
        self.cache = make(recent=recent, sink_tokens=sinks, num_pages=pages)
        self.tokens: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, HEADS, HEAD_DIM).half(),) * 2 for _ in range(BATCH)]
        self.packed = [0] * BATCH
        self.seed = 0

    def after(self, b: int, total: int, more_recent: int = 0) -> int:
        packed = self.packed[b]
        while total - min(total, self.sinks) - packed >= self.recent + more_recent + 128:
            packed += 128
        return packed

    @rule(count=st.sampled_from([1, 2, 100, 130, 400]), counts=st.none() | st.tuples(*[st.integers(0, 130)] * BATCH))
    def append(self, count: int, counts: tuple[int, ...] | None) -> None:
        self.seed += 1
        k, v = new_tokens(count, self.seed)
        lengths = [count] * BATCH if counts is None else [min(n, count) for n in counts]
        before = self.state()
        if self.too_many(lengths):
            with pytest.raises(bd.OutOfPages):
                self.cache.append(k, v, None if counts is None else lengths)
            assert all(torch.equal(x, y) for x, y in zip(before, self.state(), strict=True))
            return
        self.cache.append(k, v, None if counts is None else lengths)
        for b, n in enumerate(lengths):
            self.take(b, k[b, :n], v[b, :n])

    def take(self, b: int, *new: Tensor, more_recent: int = 0) -> None:
        self.packed[b] = self.after(b, len(self.tokens[b][0]) + len(new[0]), more_recent)
        self.tokens[b] = tuple(torch.cat(both) for both in zip(self.tokens[b], new, strict=True))

    def too_many(self, lengths: list[int], more_recent: int = 0) -> bool:
        totals = [len(have[0]) + n for have, n in zip(self.tokens, lengths, strict=True)]
        needed = [max(0, self.after(b, n, more_recent) // 128 - self.pages_of(b)) for b, n in enumerate(totals)]
        return max(totals) > 900 or sum(needed) > self.cache.free_pages

    def pages_of(self, b: int) -> int:
        return int((self.cache.block_table[b] >= 0).sum())

    @rule(counts=st.tuples(*[st.integers(0, 300)] * BATCH))
    def reserve(self, counts: tuple[int, ...]) -> None:
        before = self.state()
        if self.too_many(list(counts)):
            with pytest.raises(bd.OutOfPages):
                self.cache.reserve(counts)
            assert all(torch.equal(x, y) for x, y in zip(before, self.state(), strict=True))
            return
        self.cache.reserve(counts)
        for b, n in enumerate(counts):
            assert self.pages_of(b) * 128 >= self.after(b, len(self.tokens[b][0]) + n)

    @rule(counts=st.none() | st.tuples(*[st.integers(0, 200)] * BATCH), synced=st.booleans())
    def append_reserved(self, counts: tuple[int, ...] | None, synced: bool) -> None:
        self.seed += 1
        k, v = new_tokens(200 if counts else 40, self.seed)
        self.cache.append(k, v, None if counts is None else int32(*counts), reserved=True)
        without_page = []
        for b, n in enumerate(counts or [40] * BATCH):
            if self.after(b, len(self.tokens[b][0]) + n) // 128 > self.pages_of(b):
                without_page.append(b)
            else:
                self.take(b, k[b, :n], v[b, :n])
        if without_page:
            with pytest.raises(bd.OutOfPages, match=f"sequence {without_page[-1]} had no reserved page"):
                self.cache.sync()
        elif synced:
            self.cache.sync()

    @rule(q_len=st.sampled_from([1, 2, 4, 5, 8, 9]), reserved=st.booleans(), synced=st.booleans())
    def step(self, q_len: int, reserved: bool, synced: bool) -> None:
        """Up to 4 tokens by a kernel for steps; of 5 to 8 a block that gets full is left to the next step; more are
        appended, then attended to.
        """
        self.seed += 1
        k, v = new_tokens(q_len, self.seed)
        q = random_q(q_len)
        whole, more_recent = q_len <= 4, q_len if 4 < q_len <= 8 else 0
        assert self.cache.can_step(q) == whole
        if not reserved and self.too_many([q_len] * BATCH, more_recent):
            before = self.state()
            with pytest.raises(bd.OutOfPages):
                self.cache.step(q, k, v)
            assert all(torch.equal(x, y) for x, y in zip(before, self.state(), strict=True))
            return
        without_page = [
            b
            for b, kv in enumerate(self.tokens)
            if reserved and self.after(b, len(kv[0]) + q_len, more_recent) // 128 > self.pages_of(b)
        ]
        out = self.cache.step(q, k, v, reserved=reserved)
        for b in range(BATCH):
            attended, packed = (
                tuple(torch.cat(x) for x in zip(self.tokens[b], (k[b], v[b]), strict=True)),
                self.packed[b],
            )
            if b not in without_page:
                self.take(b, k[b], v[b], more_recent=more_recent)
            if not whole:
                attended, packed = self.tokens[b], self.packed[b]
            self.check(out[b], q[b], attended, packed)
        if without_page:
            with pytest.raises(bd.OutOfPages, match=f"sequence {without_page[-1]} had no reserved page"):
                self.cache.sync()
        elif synced:
            self.cache.sync()

    @rule(q_len=st.sampled_from([1, 5, 9]), reserved=st.booleans())
    def step_that_fails(self, q_len: int, reserved: bool) -> None:
        free = self.cache.free_pages
        with pytest.raises((bd.OutOfPages, bd.InvalidArgument), match="softmax_scale|pages are needed|would hold"):
            self.cache.step(random_q(q_len), *new_tokens(q_len), reserved=reserved, softmax_scale=-1.0)
        assert self.cache.free_pages == free

    @rule(sources=st.tuples(*[st.integers(0, BATCH - 1)] * BATCH))
    def fork(self, sources: tuple[int, ...]) -> None:
        self.cache.fork(sources)
        self.tokens = [self.tokens[b] for b in sources]
        self.packed = [self.packed[b] for b in sources]

    @rule()
    def decode(self) -> None:
        q = random_q(2)
        out = self.cache.decode(q)
        for b, kv in enumerate(self.tokens):
            self.check(out[b], q[b], kv, self.packed[b])

    def check(self, out: Tensor, q: Tensor, kv: tuple[Tensor, Tensor], packed: int) -> None:
        """out is attention over the tokens of a sequence, so many of them packed."""
        sinks = min(len(kv[0]), self.sinks)
        blocks = quantised(*(x[sinks : sinks + packed] for x in kv))
        stored = bd.dequantize(blocks, HEAD_DIM, SPEC, torch.float32)
        k, v = (torch.cat((x[:sinks], y, x[sinks + packed :])) for x, y in zip(kv, stored, strict=True))
        assert relative_error(out, attention(q, k, v)[0]) < 2e-3

    @rule()
    def copy(self) -> None:
        self.cache = self.cache.to("cpu")

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache")
            self.cache = bd.KVCache.load(Path(folder) / "cache")

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        lengths = []
        for b, (k, _) in enumerate(self.tokens):
            first_tail = min(len(k), self.sinks) + self.packed[b]
            borders = range(min(len(k), self.sinks), first_tail, 128)
            kept = st.integers(first_tail, len(k)) | st.integers(0, min(len(k), self.sinks))
            lengths.append(data.draw(kept | st.sampled_from(borders) if len(borders) else kept))
        self.cache.truncate(lengths)
        for b, n in enumerate(lengths):
            self.tokens[b] = tuple(x[:n] for x in self.tokens[b])
            self.packed[b] = min(self.packed[b], max(0, n - self.sinks))

    def state(self) -> list[Tensor]:
        cache = self.cache
        return [x.clone() for x in (cache.seqlens, cache.packed_lens, cache.block_table, cache.pages)]

    @invariant()
    def books_balance(self) -> None:
        cache = self.cache
        assert cache.seqlens.tolist() == [len(k) for k, _ in self.tokens]
        assert cache.packed_lens.tolist() == self.packed
        rows = [row[: self.pages_of(b)].tolist() for b, row in enumerate(cache.block_table)]
        assert all((row[len(pages) :] == -1).all() for pages, row in zip(rows, cache.block_table, strict=True))
        assert all(len(set(row)) == len(row) for row in rows)
        used = {page for b, row in enumerate(rows) for page in row[: self.packed[b] // 128]}
        reserved = [page for b, row in enumerate(rows) for page in row[self.packed[b] // 128 :]]
        assert len({*used, *reserved}) == len(used) + len(reserved) == cache.num_pages - cache.free_pages
        unpacked = sum(len(k) for k, _ in self.tokens) - sum(self.packed)
        block = bd.block_bytes(HEAD_DIM, SPEC) * HEADS
        assert cache.used_nbytes == len(used) * block + unpacked * 2 * HEADS * HEAD_DIM * 2

    @invariant()
    def every_token_is_where_it_belongs(self) -> None:
        cache = self.cache
        for b, (k, v) in enumerate(self.tokens):
            sinks, packed = min(len(k), self.sinks), self.packed[b]
            tail = len(k) - sinks - packed
            if sinks:
                assert torch.equal(cache.sink_k[b, :sinks], k[:sinks])
                assert torch.equal(cache.sink_v[b, :sinks], bd.rotate(v[:sinks]))
            assert torch.equal(cache.tail_k[b, :tail], k[sinks + packed :])
            assert torch.equal(cache.tail_v[b, :tail], bd.rotate(v[sinks + packed :]))
            blocks = cache.pages[cache.block_table[b, : packed // 128].long()]
            assert torch.equal(blocks, quantised(k[sinks : sinks + packed], v[sinks : sinks + packed]))


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("preset", ["kv8", "kv4", "k4v2", "kv2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decode_is_close_to_attention_over_the_tokens(preset: str, dtype: torch.dtype) -> None:
    """Prefill in chunks, then single tokens; the error is that of the quantiser, and small for short contexts."""
    spec, policy = bd.preset(preset, HEAD_DIM)
    cache = make(quant=spec, recent=policy.recent, sink_tokens=policy.sink_tokens, dtype=dtype)
    k, v = (x.to(dtype) for x in new_tokens(600))
    k = k / 4
    done = 0
    for step in (250, 250, 97, 1, 1, 1):
        cache.append(k[:, done : done + step], v[:, done : done + step])
        done += step
        q = random_q(step).to(dtype)
        out, lse = cache.decode(q, return_lse=True, window=300)
        assert lse.shape == (BATCH, step, 2 * HEADS)
        for b in range(BATCH):
            want, _ = attention(q[b], k[b, :done], v[b, :done], window=300)
            in_16_bit = done < 128 + policy.recent
            bits_error = {"kv8": 0.02, "kv4": 0.15, "k4v2": 0.5, "kv2": 0.9}[preset]
            assert relative_error(out[b], want) < (4e-3 if in_16_bit else bits_error)


def test_a_tail_only_cache_is_exact() -> None:
    cache = make(recent=300)
    k, v = new_tokens(400)
    cache.append(k, v)
    assert cache.packed_lens.tolist() == [0] * BATCH
    out = cache.decode(random_q(3))
    for b in range(BATCH):
        assert relative_error(out[b], attention(random_q(3)[b], k[b], v[b])[0]) < 1e-3


def test_a_cache_without_pages_has_its_tail() -> None:
    cache = make(num_pages=0)
    k, v = new_tokens(128)
    cache.append(k[:, :127], v[:, :127])
    out = cache.decode(random_q())
    for b in range(BATCH):
        assert relative_error(out[b], attention(random_q()[b], k[b, :127], v[b, :127])[0]) < 1e-3
    with pytest.raises(bd.OutOfPages, match=r"3 pages are needed, 0 of num_pages=0"):
        cache.append(k[:, 127:], v[:, 127:])


def test_a_cache_outlives_inference_mode() -> None:
    k, v = new_tokens(300)
    with torch.inference_mode():
        cache = make(recent=7, sink_tokens=2)
        cache.append(k, v)
    cache.append(k, v)
    cache.fork([1, 1, 1])
    cache.truncate(2)
    assert cache.seqlens.tolist() == [2, 2, 2]


def test_one_by_one_equals_all_at_once() -> None:
    k, v = new_tokens(300)
    at_once, one_by_one = (make(recent=7, sink_tokens=2) for _ in range(2))
    at_once.append(k, v)
    for i in range(300):
        one_by_one.append(k[:, i : i + 1], v[:, i : i + 1])
    assert torch.equal(at_once.decode(random_q()), one_by_one.decode(random_q()))


def test_a_shared_prefix_is_held_once_and_survives_its_owners() -> None:
    cache = make(recent=5, sink_tokens=4, num_pages=5)
    k, v = new_tokens(300)
    cache.append(k, v, [300, 0, 0])
    cache.fork([0, 0, 0])
    assert cache.free_pages == 3
    q = random_q(batch=1).expand(BATCH, -1, -1, -1).contiguous()
    want = cache.decode(q)
    assert torch.equal(want[0], want[1])
    cache.truncate([0, 300, 132])
    assert (cache.free_pages, cache.packed_lens.tolist()) == (3, [0, 256, 128])
    cache.append(*new_tokens(140, seed=1), [0, 0, 140])  # its second block is its own, the shared one stays as it was
    assert cache.free_pages == 2
    assert torch.equal(cache.decode(q)[1], want[1])
    cache.truncate(0)
    assert cache.free_pages == 5
    with pytest.raises(bd.InvalidArgument, match=r"sources\[2\]=3: allowed are 0 to 2"):
        cache.fork([0, 1, 3])


def test_appends_by_the_device_go_on_until_the_reserved_pages_are_full() -> None:
    """The last of them is refused for the sequences that have no page, and for no others."""
    cache = make(recent=16)
    cache.append(*new_tokens(100))
    cache.reserve([300, 44, 43])  # up to 400, 144 and 143 tokens: 2 blocks, 1, none
    free = cache.free_pages
    for i in range(60):
        cache.append(*(x[:, i : i + 1] for x in new_tokens(60, seed=1)), reserved=True)
    assert cache.seqlens.tolist() == [160, 160, 143]
    assert cache.packed_lens.tolist() == [128, 128, 0]
    assert cache.free_pages == free
    with pytest.raises(bd.OutOfPages, match=r"sequence 2 had no reserved page"):
        cache.append(*new_tokens(1))
    assert cache.seqlens.tolist() == [160, 160, 143]
    cache.append(*new_tokens(1))  # the host takes a page where one is needed
    assert cache.packed_lens.tolist() == [128, 128, 128]
    assert cache.free_pages == free - 1
    with pytest.raises(bd.InvalidArgument, match=r"lengths is a list: allowed is a torch.Tensor"):
        cache.append(*new_tokens(1), [1, 1, 1], reserved=True)
    with pytest.raises(bd.InvalidArgument, match=r"new_tokens\[1\]=-1"):
        cache.reserve([0, -1, 0])
    with pytest.raises(bd.OutOfPages, match=r"sequence 0 would hold 901 tokens: allowed are max_tokens=900"):
        cache.reserve(900 - 161 + 1)


def test_steps_are_appends_and_decodes() -> None:
    """Only where a block gets full in one of a few tokens results differ."""
    for recent, sinks, reserved in ((0, 0, False), (7, 4, True), (130, 2, False)):
        steps, appends = (make(recent=recent, sink_tokens=sinks) for _ in range(2))
        for cache in (steps, appends):
            cache.append(*new_tokens(120, seed=3))
            cache.reserve(300)
        for i in range(60):
            q_len = (1, 4, 9)[i % 3]
            q, new = random_q(q_len), new_tokens(q_len, seed=i)
            full = appends.packs(q_len)
            appends.append(*new)
            want, out = appends.decode(q), steps.step(q, *new, reserved=reserved)
            assert torch.equal(out, want) != (full and q_len < 9)
        steps.sync()
        assert steps.packed_lens.tolist() == appends.packed_lens.tolist() == [128 * ((400 - sinks - recent) // 128)] * 3
        assert (steps.used_nbytes, steps.free_pages) == (appends.used_nbytes, appends.free_pages)
        assert all(torch.equal(x, y) for x, y in zip(steps._buffers()[1:5], appends._buffers()[1:5], strict=True))
        used = steps.block_table[:, : steps.packed_lens[0] // 128].long()
        assert torch.equal(steps.pages[used], appends.pages[used])


def test_a_step_without_a_kernel_leaves_packing_to_the_next(tmp_path: Path) -> None:
    """Whichever kind that is, and with a tail as long as it can be."""
    k, v = new_tokens(148)
    for then in (1, 4, 8, 9):
        for reserved in (False, True):
            cache, q = make(recent=5), random_q(8)
            cache.append(k[:, :132], v[:, :132])
            cache.reserve(9)
            out = cache.step(q, k[:, 132:140], v[:, 132:140], reserved=reserved)
            assert (cache.seqlens.tolist(), cache.packed_lens.tolist()) == ([140] * 3, [0] * 3)
            for b in range(BATCH):
                assert relative_error(out[b], attention(q[b], k[b, :140], v[b, :140])[0]) < 1e-3
            cache.save(tmp_path / "cache")
            loaded = bd.KVCache.load(tmp_path / "cache")
            cache.truncate(138)  # all of them can be rolled back
            cache.step(random_q(2)[:, :, :2].contiguous(), k[:, 138:140], v[:, 138:140])
            for each in (cache.to("cpu"), loaded):
                if each.packed_lens[0] == 0:
                    each.step(random_q(then), *new_tokens(then, seed=1))
                assert each.packed_lens.tolist() == [128] * 3
                packed = each.pages[each.block_table[:, 0].long()]
                assert torch.equal(packed, torch.cat([quantised(k[b, :128], v[b, :128]) for b in range(BATCH)]))


def test_steps_by_the_device_go_on_until_the_reserved_pages_are_full() -> None:
    cache = make(recent=16, num_pages=5)
    cache.append(*new_tokens(142))
    cache.reserve([130, 1, 2])  # to 272, 143 and 144 tokens: 2 blocks, none, 1
    for i in range(4):
        cache.step(random_q(), *new_tokens(1, seed=i), reserved=True)
    assert cache.seqlens.tolist() == [146, 143, 146]
    assert cache.packed_lens.tolist() == [128, 0, 128]
    with pytest.raises(bd.OutOfPages, match=r"sequence 1 had no reserved page"):
        cache.step(random_q(), *new_tokens(1))
    assert cache.seqlens.tolist() == [146, 143, 146]
    cache.step(random_q(), *new_tokens(1))  # the host takes a page where one is needed
    assert cache.packed_lens.tolist() == [128, 128, 128]


def test_a_step_that_fails_leaves_the_cache_as_it_was() -> None:
    """And pages that were taken for its blocks are free again."""
    cache = make(num_pages=4)
    k, v = new_tokens(128)
    cache.append(k[:, :127], v[:, :127])
    before = [x.clone() for x in cache._buffers()[:4]]
    q, new = random_q(), (k[:, 127:], v[:, 127:])
    wrong = {
        "softmax_scale": 0.0, "window": 0, "softcap": -1.0, "sink_logits": torch.zeros(3), "out": q[:2], "config": 3,
    }  # fmt: skip
    calls = [(q, *new, {name: value}, bd.InvalidArgument, name) for name, value in wrong.items()]
    calls += [
        (q, *new, {"nonsense": 1}, TypeError, "nonsense"),
        (q, *new, {"recent": 1}, TypeError, "recent"),
        (random_q(2), *new, {}, bd.InvalidArgument, "q is .*q_len=1"),
        (q[:, :, :3], *new, {}, bd.InvalidArgument, "num_q_heads must be a multiple of num_kv_heads=2"),
        (q.repeat(1, 1, 5, 1)[:, :, :17], *new, {}, bd.InvalidArgument, "num_q_heads must be a multiple"),
        (q[:, :, :0], *new, {}, bd.InvalidArgument, "num_q_heads must be a multiple of num_kv_heads=2"),
        (q.float(), *new, {}, bd.InvalidArgument, "q is torch.float32"),
        (q[..., :32], *new, {}, bd.InvalidArgument, "q is .*head_dim=64"),
        (q.to("meta"), *new, {}, bd.InvalidArgument, "q is on meta: allowed is cpu"),
        (None, *new, {}, bd.InvalidArgument, "q is a NoneType"),
        (q, None, new[1], {}, bd.InvalidArgument, "k is a NoneType"),
        (q, new[0], new[1][:2], {}, bd.InvalidArgument, "v is .*batch_size=3"),
        (q[:, :0], k[:, :0], v[:, :0], {}, bd.InvalidArgument, "q_len=0"),
    ]
    many = random_q(5), *new_tokens(5)
    calls += [(*many, {name: value}, bd.InvalidArgument, name) for name, value in wrong.items()]
    calls += [(random_q(9), *new_tokens(9), {"out": many[0]}, bd.InvalidArgument, "out is .*q_len=9")]
    for queries, keys, values, options, kind, message in calls:
        for reserved in (False, True):
            with pytest.raises(kind, match=message):
                cache.step(queries, keys, values, reserved=reserved, **options)
            assert cache.free_pages == 4
            assert all(torch.equal(x, y) for x, y in zip(before, cache._buffers()[:4], strict=True))
    cache.append(*new_tokens(1), [1, 0, 0])  # others may have the pages
    with pytest.raises(bd.OutOfPages, match="6 pages are needed, 3 of num_pages=4 are free"):
        cache.append(*new_tokens(300, seed=1), [0, 300, 300])
    cache.step(q, *new)
    assert cache.packed_lens.tolist() == [128, 128, 128]


def test_rolling_back_on_the_device() -> None:
    """Drafts that are rejected within a step, by lowering seqlens: the host learns it, and later bytes agree."""
    cache, plain = make(recent=20), make(recent=20)
    k, v = new_tokens(400)
    cache.reserve(400)
    for i in range(0, 390, 3):
        cache.append(*new_tokens(7, seed=1), reserved=True)
        cache.seqlens -= 7
        cache.append(k[:, i : i + 3], v[:, i : i + 3], reserved=True)
    plain.append(k[:, :390], v[:, :390])
    cache.truncate(388)
    plain.truncate(388)
    assert cache.used_nbytes == plain.used_nbytes
    assert torch.equal(cache.decode(random_q()), plain.decode(random_q()))


def test_freed_pages_are_used_again() -> None:
    cache = make(num_pages=4)
    k, v = new_tokens(256)
    cache.append(k, v, [256, 256, 0])
    with pytest.raises(bd.OutOfPages, match=r"2 pages are needed, 0 of num_pages=4"):
        cache.append(k, v, [0, 0, 256])
    cache.truncate([0, 256, 0])
    want = cache.decode(random_q())[1]
    cache.append(k, v, [0, 0, 256])
    out = cache.decode(random_q())
    assert torch.equal(out[1], want)
    assert (out[0] == 0).all()


def test_memory_is_what_the_bits_say() -> None:
    cache = make(max_tokens=128 * 100, quant=bd.QuantSpec(v_group=64))
    pages = BATCH * 100 * HEADS * bd.block_bytes(HEAD_DIM, bd.QuantSpec(v_group=64))
    assert pages <= cache.nbytes <= 1.1 * pages
    assert cache.used_nbytes == 0
    k, v = new_tokens(128)
    cache.append(k, v)
    assert cache.used_nbytes == pages // 100


def test_truncate_says_what_is_possible() -> None:
    cache = make(recent=16, sink_tokens=4)
    cache.append(*new_tokens(300))  # 4 sinks, 256 packed, 40 in the tail
    for length in (259, 150, 10):
        with pytest.raises(bd.InvalidArgument, match=r"lengths\[1\]=.*260 to 300.*newest 40 tokens"):
            cache.truncate([300, length, 300])
    with pytest.raises(bd.InvalidArgument, match=r"lengths\[2\]=301.*0 to 300"):
        cache.truncate([300, 300, 301])
    with pytest.raises(bd.InvalidArgument, match=r"lengths=\[1\].*batch_size=3"):
        cache.truncate([1])
    assert cache.seqlens.tolist() == [300] * 3
    cache.truncate(torch.tensor([260, 132, 2]))
    assert cache.seqlens.tolist() == [260, 132, 2]
    assert cache.packed_lens.tolist() == [256, 128, 0]
    cache.truncate(0)
    assert cache.used_nbytes == 0


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"batch_size": 0}, ["batch_size=0", "1"]),
        ({"max_tokens": 2**31}, ["max_tokens=2147483648", "2^31"]),
        ({"num_kv_heads": 1.5}, ["num_kv_heads=1.5"]),
        ({"recent": -1}, ["recent=-1", "0"]),
        ({"sink_tokens": -1}, ["sink_tokens=-1"]),
        ({"num_pages": -1}, ["num_pages=-1"]),
        ({"head_dim": 80}, ["head_dim=80", "96"]),
        ({"dtype": torch.float64}, ["dtype=torch.float64", "torch.float16"]),
    ],
)
def test_constructor_errors(fields: dict, names: list[str]) -> None:
    with pytest.raises(bd.InvalidArgument) as error:
        make(**fields)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("k", "lengths", "names"),
    [
        (torch.zeros(2, 1, HEADS, HEAD_DIM).half(), None, ["k is", "batch_size=3"]),
        (torch.zeros(3, 1, HEADS, HEAD_DIM), None, ["k is torch.float32", "torch.float16"]),
        (torch.zeros(3, HEADS, HEAD_DIM).half(), None, ["k is", "new_tokens"]),
        (torch.zeros(3, 1, HEADS, HEAD_DIM).half(), [1, 1], ["lengths=[1, 1]", "batch_size=3"]),
        (torch.zeros(3, 1, HEADS, HEAD_DIM).half(), [1, 2, 1], ["lengths[1]=2", "new_tokens=1"]),
        (torch.zeros(3, 1, HEADS, HEAD_DIM).half(), [1, 0.5, 1], ["lengths=[1, 0.5, 1]", "integers"]),
        (torch.zeros(3, 1, HEADS, HEAD_DIM, device="meta").half(), None, ["k is on meta", "cpu"]),
    ],
)
def test_append_errors(k: Tensor, lengths: list | None, names: list[str]) -> None:
    cache = make()
    with pytest.raises(bd.InvalidArgument) as error:
        cache.append(k, k, lengths)
    for name in names:
        assert name in str(error.value)
    assert cache.seqlens.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- files


def filled(**fields) -> bd.KVCache:
    cache = make(**({"recent": 10, "sink_tokens": 4} | fields))
    k, v = (x.to(cache.dtype) for x in new_tokens(500))
    cache.append(k, v, [500, 3, 290])
    cache.truncate([500, 3, cache.sink_tokens + 128])
    cache.append(k, v, [0, 0, 135])
    return cache


def test_copies_and_files_keep_what_is_shared(tmp_path: Path) -> None:
    cache = filled(num_pages=9)
    cache.fork([0, 0, 2])
    cache.reserve([0, 200, 0])
    cache.save(tmp_path / "cache")
    copy, loaded = cache.to("cpu"), bd.KVCache.load(tmp_path / "cache")
    assert (copy.free_pages, loaded.free_pages) == (cache.free_pages, cache.free_pages + 2)
    k, v = new_tokens(300, seed=5)
    want = cache.decode(random_q())
    for other in (copy, loaded):
        assert torch.equal(other.decode(random_q()), want)
        other.append(k, v, [300, 0, 0])
        assert torch.equal(other.decode(random_q())[1:], want[1:])
        other.truncate(0)
        assert other.free_pages == 9
    assert torch.equal(cache.decode(random_q()), want)


@pytest.mark.parametrize("fields", [{}, {"sink_tokens": 0}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}])
def test_save_and_load(fields: dict, tmp_path: Path) -> None:
    cache = filled(**fields)
    cache.save(tmp_path / "cache.safetensors")
    loaded = bd.KVCache.load(tmp_path / "cache.safetensors")
    assert (loaded.quant, loaded.policy, loaded.dtype) == (cache.quant, cache.policy, cache.dtype)
    assert (loaded.nbytes, loaded.used_nbytes) == (cache.nbytes, cache.used_nbytes)
    q = random_q(2).to(cache.dtype)
    assert torch.equal(loaded.decode(q), cache.decode(q))
    k, v = (x.to(cache.dtype) for x in new_tokens(300, seed=5))
    for both in (cache, loaded):
        both.append(k, v, [200, 300, 300])
    assert torch.equal(loaded.decode(q), cache.decode(q))


def test_files_hold_nothing_but_the_tokens(tmp_path: Path) -> None:
    """Equal contents give equal files, whatever memory held before and in whatever order pages were taken."""
    cache = filled()
    cache.save(tmp_path / "a")
    other = make(recent=10, sink_tokens=4)
    other.append(*new_tokens(700, seed=9))
    other.truncate(0)
    k, v = new_tokens(500)
    other.append(k, v, [500, 3, 132])
    other.append(k, v, [0, 0, 135])
    other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rewrite(path: Path, tensors: dict | None = None, config: dict | None = None, metadata: dict | None = None) -> None:
    """Change a saved cache: tensors (None: remove), fields of its config, or all metadata."""
    with safe_open(path, framework="pt") as file:
        data = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})
        meta = file.metadata()
    if metadata is None:
        metadata = {KEY: json.dumps(json.loads(meta[KEY]) | (config or {}))}
    save_file({n: x for n, x in data.items() if x is not None}, path, metadata)


HOSTILE = {
    "no metadata": ({"metadata": {}}, "not a saved KVCache"),
    "another format": ({"metadata": {"format": "pt"}}, "not a saved KVCache"),
    "another version": ({"config": {"format_version": 2}}, "format_version=2"),
    "no version": ({"metadata": {KEY: "{}"}}, "format_version"),
    "config is no JSON": ({"metadata": {KEY: "{"}}, "config"),
    "config is a list": ({"metadata": {KEY: "[]"}}, "config"),
    "config is deep": ({"metadata": {KEY: "[" * 100_000}}, "config"),
    "an unknown field": ({"config": {"more": 1}}, "config"),
    "a float": ({"config": {"recent": 1.5}}, "config"),
    "a bool": ({"config": {"recent": True}}, "config"),
    "a string": ({"config": {"max_tokens": "900"}}, "config"),
    "head_dim": ({"config": {"head_dim": 65}}, "head_dim=65"),
    "other heads": ({"config": {"num_kv_heads": 1}}, "shape"),
    "huge heads": ({"config": {"num_kv_heads": 2**62}}, "shape"),
    "huge recent": ({"config": {"recent": 2**62}}, "recent"),
    "huge max_tokens": ({"config": {"max_tokens": 2**80}}, "max_tokens"),
    "memory beyond all machines": (
        {"config": {"num_pages": 2**31 - 1, "recent": 2**30, "max_tokens": 2**31 - 1}},
        "no memory",
    ),
    "negative sinks": ({"config": {"sink_tokens": -4}}, "sink_tokens=-4"),
    "batch": ({"config": {"batch_size": 4}}, "seqlens: shape"),
    "batch 0": ({"config": {"batch_size": 0}}, "seqlens: shape"),
    "few pages": ({"config": {"num_pages": 3}}, "num_pages=3"),
    "short": ({"config": {"max_tokens": 300}}, "seqlens[0]=500"),
    "unknown quant": ({"config": {"quant": {"k_bits": 3}}}, "k_bits"),
    "quant with more": ({"config": {"quant": {"evil": 3}}}, "evil"),
    "quant beyond int64": ({"config": {"quant": {"k_bits": 2**70}}}, "config"),
    "quant nan": ({"config": {"quant": {"k_clip": float("nan")}}}, "config"),
    "quant is a number": ({"config": {"quant": 3}}, "config"),
    "dtype": ({"config": {"dtype": "float64"}}, "float64"),
    "dtype of tokens": ({"config": {"dtype": "bfloat16"}}, "dtype"),
    "no tensor": ({"tensors": {"pages": None}}, "pages is missing"),
    "no sinks": ({"tensors": {"sink_v": None}}, "sink_v is missing"),
    "negative length": ({"tensors": {"seqlens": int32(500, -3, 267)}}, "seqlens[1]=-3"),
    "other length": ({"tensors": {"seqlens": int32(501, 3, 267)}}, "tail_k: shape"),
    "length beyond": ({"tensors": {"seqlens": int32(2**31 - 1, 3, 267)}}, "seqlens[0]=2147483647"),
    "negative packed": ({"tensors": {"packed_lens": int32(384, -128, 128)}}, "packed_lens[1]=-128"),
    "partial block": ({"tensors": {"packed_lens": int32(384, 0, 255)}}, "packed_lens[2]=255"),
    "packed beyond": ({"tensors": {"packed_lens": int32(512, 0, 128)}}, "packed_lens[0]=512"),
    "lengths of another type": ({"tensors": {"seqlens": torch.tensor([500, 3, 267])}}, "seqlens: dtype torch.int64"),
    "floating lengths": ({"tensors": {"packed_lens": torch.zeros(3)}}, "packed_lens: dtype"),
    "no blocks": ({"tensors": {"blocks": None}}, "blocks is missing"),
    "fewer blocks": ({"tensors": {"blocks": int32(0, 1, 2)}}, "blocks: shape"),
    "a block too far": ({"tensors": {"blocks": int32(0, 1, 2, 4)}}, "order of their first use"),
    "a negative block": ({"tensors": {"blocks": int32(0, 1, 2, -1)}}, "order of their first use"),
    "another order": ({"tensors": {"blocks": int32(1, 0, 2, 3)}}, "order of their first use"),
    "more blocks than pages": (
        {"tensors": {"pages": torch.zeros(3, 2, bd.block_bytes(64, SPEC)).byte()}},
        "pages: shape",
    ),
    "fewer pages": ({"tensors": {"pages": torch.zeros(3, 2, 10, dtype=torch.uint8)}}, "pages: shape"),
    "pages of another type": (
        {"tensors": {"pages": torch.zeros(4, 2, bd.block_bytes(64, SPEC), dtype=torch.int8)}},
        "pages: dtype",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    changes, message = HOSTILE[name]
    path = tmp_path / "cache.safetensors"
    filled().save(path)
    rewrite(path, **changes)
    with pytest.raises(bd.CacheFormatError) as error:
        bd.KVCache.load(path)
    assert message.lower() in str(error.value).lower()
    assert str(path) in str(error.value)


def test_truncated_and_scrambled_files(tmp_path: Path) -> None:
    """Whatever is cut off or overwritten in the header: a CacheFormatError, or a cache of the same data."""
    path = tmp_path / "cache.safetensors"
    filled().save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    for size in [0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1, *rng.sample(range(len(data)), 10)]:
        path.write_bytes(data[:size])
        with pytest.raises(bd.CacheFormatError):
            bd.KVCache.load(path)
    loaded = 0
    for _ in range(300):
        scrambled = bytearray(data)
        scrambled[rng.randrange(header)] = rng.choice(b'0123456789-.eE"{}[],:aZ\x00\xff ')
        path.write_bytes(scrambled)
        try:
            loaded += bd.KVCache.load(path).batch_size == BATCH
        except bd.CacheFormatError:
            pass
    assert loaded < 100


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    """They are no fault of the file that is to be loaded."""
    filled().save(tmp_path / "cache")
    for device in ("meta", "nonsense", None):
        with pytest.raises(bd.InvalidArgument, match=r"device=.*: allowed are cpu and cuda"):
            make(device=device)
        with pytest.raises(bd.InvalidArgument, match=r"device=.*: allowed are cpu and cuda"):
            bd.KVCache.load(tmp_path / "cache", device)


def test_arguments_of_other_types() -> None:
    cache = filled()
    k, v = new_tokens(1)
    for call, message in (
        (lambda: cache.truncate(3.0), "lengths=3.0: allowed are batch_size=3 integers"),
        (lambda: cache.truncate(torch.tensor(3)), "lengths=3: allowed are batch_size=3 integers"),
        (lambda: cache.fork(None), "sources=None: allowed are batch_size=3 integers"),
        (lambda: cache.reserve(None), "new_tokens=None: allowed are batch_size=3 integers"),
        (lambda: cache.append(k, v, 1), "lengths=1: allowed are batch_size=3 integers"),
        (lambda: cache.append(k.numpy(), v), "k is a ndarray: allowed is a torch.Tensor"),
        (lambda: cache.append(k, None), "v is a NoneType: allowed is a torch.Tensor"),
    ):
        with pytest.raises(bd.InvalidArgument, match=message):
            call()


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bd.KVCache.load(tmp_path / "none")


def test_steps_without_a_kernel_for_them_attend_alike() -> None:
    """They pack a block a step later, so that its tokens are attended to in 16 bit as often."""
    spec, _ = bd.preset("kv4", 64)
    caches = [
        bd.KVCache(batch_size=3, max_tokens=700, num_kv_heads=2, head_dim=64, quant=spec, recent=2, sink_tokens=4)
        for _ in range(2)
    ]
    caches[1]._step_columns = 0
    assert [cache.can_step(torch.zeros(3, 2, 8, 64)) for cache in caches] == [True, False]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    prompt = random(2, 3, 300, 2, 64)
    for cache in caches:
        cache.append(*prompt, [300, 126, 0])
    for i in range(100):
        q_len = 1 + i % 2
        q, new = random(3, q_len, 8, 64), random(2, 3, q_len, 2, 64)
        outs = [cache.step(q, *new) for cache in caches]
        assert torch.equal(*outs), i
    assert caches[0].seqlens.tolist() == caches[1].seqlens.tolist()
    assert caches[0].packed_lens.tolist() == [384, 256, 128]
