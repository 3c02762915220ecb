"""bd.step on the CPU: append and decode, but that tokens which fill a block are attended to in 16 bit."""

from __future__ import annotations

import pytest
import torch
from attention_reference import attention, relative_error
from test_quantization import random_kv
from torch import Tensor

import bitdecoding as bd

HEADS, GROUP, HEAD_DIM = 2, 3, 64
LENGTHS = (0, 1, 3, 124, 126, 127, 128, 129, 131, 259)
MAX_PAGES = 3
STATE = ("pages", "block_table", "seqlens", "packed_lens", "tail_k", "tail_v")
TOLERANCE = 2e-3


def tokens(count: int, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, v = random_kv(count, batch * HEADS, HEAD_DIM, seed, dtype)
    return tuple(x.unflatten(1, (batch, HEADS)).transpose(0, 1).contiguous() for x in (k, v))


def queries(q_len: int, batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, q_len, HEADS * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def filled(
    spec: bd.QuantSpec, k: Tensor, v: Tensor, lengths: tuple[int, ...], recent: int, num_sink: int, slack: int
) -> dict[str, Tensor]:
    """A cache of the first ``lengths`` tokens; the rest of its memory is poison."""
    batch = len(lengths)
    cache = {
        "pages": torch.full((batch * MAX_PAGES, HEADS, bd.block_bytes(HEAD_DIM, spec)), 0xA5, dtype=torch.uint8),
        "block_table": torch.arange(batch * MAX_PAGES, dtype=torch.int32).flip(0).view(batch, MAX_PAGES),
        "seqlens": torch.zeros(batch, dtype=torch.int32), "packed_lens": torch.zeros(batch, dtype=torch.int32),
    }  # fmt: skip
    for name, count in (("tail", recent + 127 + slack), ("sink", num_sink)):
        for part in ("k", "v") if count else ():
            cache[f"{name}_{part}"] = torch.full((batch, count, HEADS, HEAD_DIM), torch.nan, dtype=k.dtype)
    bd.append(k, v, **cache, spec=spec, lengths=torch.tensor(lengths, dtype=torch.int32), recent=recent)
    return cache


def copied(cache: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in cache.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], sequences: range | None = None) -> None:
    """Lengths and pages, and of sinks and tails what the lengths say is there."""
    for name in ("seqlens", "packed_lens", "block_table", "pages"):
        assert torch.equal(got[name], want[name]), name
    for b, (seqlen, packed) in enumerate(zip(want["seqlens"].tolist(), want["packed_lens"].tolist(), strict=True)):
        sinks = min(seqlen, want["sink_k"].shape[1] if "sink_k" in want else 0)
        for kind, count in (("sink", sinks), ("tail", seqlen - sinks - packed)):
            for name in (f"{kind}_k", f"{kind}_v") if count else ():
                assert torch.equal(got[name][b, :count], want[name][b, :count]), f"{name} of sequence {b}"


def new_of(x: Tensor, lengths: tuple[int, ...], q_len: int) -> Tensor:
    """Of each sequence the tokens behind its first ones."""
    return torch.stack([row[n : n + q_len] for row, n in zip(x, lengths, strict=True)])


@pytest.mark.parametrize(
    ("preset", "q_len", "recent", "num_sink", "dtype"),
    [
        ("kv8", 1, 0, 0, torch.float16),
        ("kv4", 2, 0, 4, torch.bfloat16),
        ("k4v2", 3, 5, 4, torch.float16),
        ("kv2", 4, 0, 2, torch.float32),
        ("kc2", 1, 1, 0, torch.float16),
        ("kc4", 4, 128, 16, torch.float16),
    ],
)
def test_blocks_are_packed_after_the_attention(preset, q_len, recent, num_sink, dtype):
    spec, _ = bd.preset(preset, HEAD_DIM)
    lengths = tuple(n + num_sink + recent for n in LENGTHS)
    k, v = tokens(max(lengths) + q_len, len(lengths), dtype)
    q, k_new, v_new = queries(q_len, len(lengths), dtype), new_of(k, lengths, q_len), new_of(v, lengths, q_len)
    cache = filled(spec, k, v, lengths, recent, num_sink, q_len)
    before, appended = copied(cache), copied(cache)
    options = {"window": 150, "softcap": 9.0, "softmax_scale": 0.2, "sink_logits": torch.linspace(-1, 1, HEADS * GROUP)}
    out = torch.full_like(q, torch.nan)
    result, lse = bd.step(q, k_new, v_new, **cache, spec=spec, recent=recent, out=out, return_lse=True, **options)
    assert result is out

    bd.append(k_new, v_new, **appended, spec=spec, recent=recent)
    assert_same(cache, appended)
    decoded = bd.decode(q, **appended, spec=spec, return_lse=True, **options)
    full = appended["packed_lens"] > before["packed_lens"]
    assert full.any()
    assert not full.all()
    for b, n in enumerate(lengths):
        if not full[b]:
            assert torch.equal(out[b], decoded[0][b])
            assert torch.equal(lse[b], decoded[1][b])
        packed = int(before["packed_lens"][b])
        pages = before["pages"][before["block_table"][b, : packed // 128].long()]
        stored = bd.dequantize(pages, HEAD_DIM, spec, torch.float32)
        first = min(n, num_sink)
        values = [
            torch.cat((x[b, :first], y, x[b, first + packed : n + q_len])) for x, y in zip((k, v), stored, strict=True)
        ]
        want, want_lse = attention(q[b], *values, **options)
        assert relative_error(out[b], want) < TOLERANCE * (4 if dtype == torch.bfloat16 else 1), n
        assert (lse[b] - want_lse).abs().max() < (3e-2 if dtype == torch.bfloat16 else 4e-3), n


def test_a_step_sees_what_a_decode_after_append_does_not():
    """The tokens of a block of 2 bits, before they are that: the test above would notice."""
    spec, _ = bd.preset("kc2", HEAD_DIM)
    k, v = tokens(128, 1, torch.float16)
    q, cache = queries(1, 1, torch.float16), filled(spec, k, v, (127,), 0, 0, 1)
    appended = copied(cache)
    out = bd.step(q, k[:, 127:], v[:, 127:], **cache, spec=spec)
    bd.append(k[:, 127:], v[:, 127:], **appended, spec=spec)
    want, _ = attention(q[0], k[0], v[0])
    assert (
        relative_error(out[0], want) < TOLERANCE < 0.05 < relative_error(bd.decode(q, **appended, spec=spec)[0], want)
    )


def test_a_tail_that_other_calls_left_long():
    """With more recent tokens before, several blocks are due at once; they are attended to in 16 bit, too."""
    spec, _ = bd.preset("kc2", HEAD_DIM)
    k, v = tokens(390, 1, torch.float16)
    q, cache = queries(1, 1, torch.float16), filled(spec, k, v, (389,), 300, 0, 1)
    out = bd.step(q, k[:, 389:], v[:, 389:], **cache, spec=spec, recent=3)
    assert cache["packed_lens"].tolist() == [384]
    assert relative_error(out[0], attention(q[0], k[0], v[0])[0]) < TOLERANCE
    assert torch.equal(cache["tail_k"][0, :6], k[0, 384:])
    full = {"seqlens": torch.tensor([427], dtype=torch.int32), "packed_lens": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(bd.InvalidArgument, match=r"seqlens\[0\]=428: allowed are at most 427 "):
        bd.step(q, k[:, :1], v[:, :1], **cache | full | {"seqlens": full["seqlens"] + 1}, spec=spec, recent=3)
    assert full["seqlens"].tolist() == [427]


# ---------------------------------------------------------------------------------------------- pages that are missing

NO_PAGE = {"the row ends": None, "a negative entry": -1, "an entry beyond": 2**30}


def out_of_pages(entry: int | None, spec: bd.QuantSpec) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Sequences whose next tokens fill a block, of which the second and the third have no page -> cache, q, k, v."""
    lengths = (127, 255, 255, 130, 126)
    k, v = tokens(257, len(lengths), torch.float16)
    cache = filled(spec, k, v, lengths, 0, 0, 2)
    if entry is None:
        cache["block_table"] = cache["block_table"][:, :1].contiguous()
    else:
        cache["block_table"][1:3, 1] = entry
    return cache, queries(2, len(lengths), torch.float16), new_of(k, lengths, 2), new_of(v, lengths, 2)


@pytest.mark.parametrize("entry", NO_PAGE.values(), ids=NO_PAGE)
def test_a_sequence_without_a_page_stays_as_it_was(entry):
    spec, _ = bd.preset("kv4", HEAD_DIM)
    cache, q, k_new, v_new = out_of_pages(entry, spec)
    before = copied(cache)
    status = torch.tensor([1], dtype=torch.int32)
    out = bd.step(q, k_new, v_new, **cache, spec=spec, status=status)
    assert status.item() == 3
    assert cache["seqlens"].tolist() == [129, 255, 255, 132, 128]
    assert cache["packed_lens"].tolist() == [128, 128, 128, 128, 128]
    for b in (1, 2):
        rows = before["tail_k"][b, :127]
        assert torch.equal(cache["tail_k"][b, :127], rows)
        assert torch.equal(cache["pages"][before["block_table"][b, 0]], before["pages"][before["block_table"][b, 0]])
    # its output counts: with a page it would be the same
    paged, q, k_new, v_new = out_of_pages(-1, spec)
    paged["block_table"][1:3, 1] = torch.tensor([0, 3], dtype=torch.int32)
    assert torch.equal(bd.step(q, k_new, v_new, **paged, spec=spec), out)
    assert paged["seqlens"].tolist() == [129, 257, 257, 132, 128]
    greater = torch.tensor([9], dtype=torch.int32)
    bd.step(q, k_new, v_new, **before, spec=spec, status=greater)
    assert greater.item() == 9


@pytest.mark.parametrize("entry", NO_PAGE.values(), ids=NO_PAGE)
def test_without_status_a_missing_page_is_an_error(entry):
    spec, _ = bd.preset("kv4", HEAD_DIM)
    cache, q, k_new, v_new = out_of_pages(entry, spec)
    before, out = copied(cache), torch.zeros_like(q)
    kind, message = (bd.OutOfPages, "sequence 1 needs 2 pages") if entry is None else (bd.InvalidArgument, r"\[1, 1\]=")
    with pytest.raises(kind, match=message):
        bd.step(q, k_new, v_new, **cache, spec=spec, out=out)
    assert not out.any()
    assert all(torch.equal(x.view(torch.uint8), before[name].view(torch.uint8)) for name, x in cache.items())


# ---------------------------------------------------------------------------------------------- errors


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


WRONG = [  # (changes, message)
    ({"q": half(2, 1, 5, HEAD_DIM)}, "num_q_heads must be a multiple of num_kv_heads=2"),
    ({"q": half(3, 1, 6, HEAD_DIM)}, "k_new is .*batch=3"),
    ({"q": half(2, 2, 6, HEAD_DIM)}, "k_new is .*q_len=2"),
    ({"q": half(2, 0, 6, HEAD_DIM)}, "q_len=0: allowed are"),
    ({"q": half(2, 1, 6, 80)}, "k_new is .*head_dim=80"),
    ({"q": torch.zeros(2, 1, 6, HEAD_DIM)}, "k_new is .*torch.float32"),
    ({"q": half(2, 1, 6, 2 * HEAD_DIM)[..., ::2]}, "q: strides"),
    ({"k_new": half(2, 1, 3, HEAD_DIM)}, "v_new is .*num_kv_heads=3"),
    ({"v_new": half(2, 2, HEADS, HEAD_DIM)}, "v_new is .*new_tokens=1"),
    ({"pages": torch.zeros(6, HEADS, 64, dtype=torch.uint8)}, "pages is .*block_bytes="),
    ({"block_table": int32(0, 1)}, "block_table is .*max_pages"),
    ({"seqlens": int32(127)}, "seqlens is .*batch=2"),
    ({"seqlens": int32(127, -1)}, r"seqlens\[1\]=-1"),
    ({"seqlens": int32(127, 300)}, r"seqlens\[1\]=300: allowed are at most 255"),
    ({"packed_lens": int32(0, 129)}, r"packed_lens\[1\]=129: allowed are multiples of 128"),
    ({"packed_lens": int32(0, 384)}, r"packed_lens\[1\]=384"),
    ({"tail_k": half(2, 127, HEADS, HEAD_DIM)}, "tail_v is .*tail_capacity=127"),
    ({"tail_v": half(1, 128, HEADS, HEAD_DIM)}, "tail_v is .*batch=2"),
    ({"sink_k": half(2, 4, HEADS, HEAD_DIM)}, "sink_v=None: sink_k and sink_v are allowed together"),
    ({"recent": 1}, "tail_capacity=128: allowed are .*129"),
    ({"recent": -1}, "recent=-1"),
    ({"status": int32(0, 0)}, "status is .*one=1"),
    ({"softmax_scale": 0.0}, "softmax_scale=0"),
    ({"window": 0}, "window=0"),
    ({"softcap": -1.0}, "softcap=-1"),
    ({"sink_logits": torch.zeros(5)}, "sink_logits"),
    ({"out": half(2, 1, 5, HEAD_DIM)}, "out"),
    ({"config": bd.KernelConfig()}, "config.kind=decode: allowed is step"),
    ({"q": half(2, 1, 6, HEAD_DIM).to("meta")}, "k_new is on cpu: allowed is meta"),
    ({"pages": torch.zeros(6, HEADS, 1, dtype=torch.uint8, device="meta")}, "pages is"),
    ({"block_table": int32(0, 1, 2, 2, 4, 5).view(2, 3)}, None),
    ({"block_table": int32(2, 1, 0, 3, 2, 5).view(2, 3)}, "names page 2 twice"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_what_is_wrong_changes_nothing(changes, message):
    spec, lengths = bd.preset("kc4", HEAD_DIM)[0], (127, 255)
    k, v = tokens(256, 2, torch.float16)
    cache = filled(spec, k, v, lengths, 0, 0, 1)
    new = {"q": queries(1, 2, torch.float16), "k_new": new_of(k, lengths, 1), "v_new": new_of(v, lengths, 1)}
    sound = new | cache | {"spec": spec, "status": int32(0)}
    before = copied(cache)
    if message is None:  # as it should be
        bd.step(**sound | changes)
        return
    with pytest.raises(bd.InvalidArgument, match=message):
        bd.step(**sound | changes)
    assert_same(cache, before)
    assert sound["status"].item() == 0
    bd.step(**sound)
    assert cache["seqlens"].tolist() == cache["packed_lens"].tolist() == [128, 256]


def test_no_sequences():
    spec, _ = bd.preset("kv4", HEAD_DIM)
    cache = filled(spec, *tokens(1, 0, torch.float16), (), 0, 4, 1)
    new = half(0, 1, HEADS, HEAD_DIM)
    out, lse = bd.step(half(0, 1, 6, HEAD_DIM), new, new, **cache, spec=spec, return_lse=True, status=int32(0))
    assert (out.shape, lse.shape) == ((0, 1, 6, HEAD_DIM), (0, 1, 6))


def test_tokens_that_are_slices_of_a_projection():
    spec, _ = bd.preset("kv4", HEAD_DIM)
    k, v = tokens(128, 2, torch.float16)
    caches = [filled(spec, k, v, (127, 5), 0, 3, 1) for _ in range(2)]
    q, new = queries(1, 2, torch.float16), [new_of(x, (127, 5), 1) for x in (k, v)]
    outs = [
        bd.step(q, *pair, **cache, spec=spec)
        for pair, cache in zip((new, torch.cat(new, dim=2).split(HEADS, dim=2)), caches, strict=True)
    ]
    assert torch.equal(*outs)
    assert_same(*caches)


def test_gradients_do_not_flow():
    spec, _ = bd.preset("kv4", HEAD_DIM)
    k, v = tokens(4, 1, torch.float16)
    cache = filled(spec, k, v, (3,), 0, 0, 1)
    q = queries(1, 1, torch.float16).requires_grad_()
    assert not bd.step(q, k[:, 3:].requires_grad_(), v[:, 3:], **cache, spec=spec).requires_grad
