"""Whole steps on a GPU (``pytest -m gpu``): the cache that the CPU makes of the same tokens, and the same attention."""

from __future__ import annotations

import random

import pytest
import torch
from attention_reference import relative_error
from step_cases import LENGTHS, TOLERANCE, begun_cache, check_steps, no_sinks
from torch import Tensor

import bitdecoding as bd
from bitdecoding.candidates import random_pages

pytestmark = pytest.mark.gpu

PRESETS = ["kv8", "kv4", "k4v2", "kv2", "kc4", "kc2"]
REPLAYS, COMPARED = 600, 50  # steps of the graph test, and how often it compares


def on_gpu(spec: bd.QuantSpec):
    def run(cache: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, arguments: dict) -> Tensor:
        moved = {name: x.cuda() for name, x in cache.items()}
        # on the GPU the new tokens stay slices of one tensor
        new = torch.cat((k, v), dim=2).cuda().split(k.shape[2], dim=2)
        sinks = no_sinks(cache["sink_k"].shape[1])
        out = bd.step(q.cuda(), *new, **(moved | sinks), spec=spec, **arguments)
        for name, x in moved.items():
            cache[name].copy_(x)
        return out.cpu()

    return run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("recent", "num_sink"), [(0, 0), (0, 3), (40, 4), (300, 16)])
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, recent: int, num_sink: int, dtype: torch.dtype) -> None:
    spec, _ = bd.preset(name, 128)
    steps = [1] * 5
    check_steps(128, spec, on_gpu(spec), heads=3, group=4, steps=steps, recent=recent, num_sink=num_sink, dtype=dtype)


@pytest.mark.parametrize("name", ["kv4", "kc2"])
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (2, 3), (7, 1), (2, 4), (8, 1)])
def test_query_columns(name: str, group: int, q_len: int) -> None:
    spec, _ = bd.preset(name, 128)
    options = {"window": 150, "softcap": 20.0} if group == 2 else {}
    check_steps(128, spec, on_gpu(spec), heads=2, group=group, steps=[q_len] * 4, recent=10, num_sink=4, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["kv4", "k4v2", "kv2", "kc4"])
def test_values_beyond_the_limit(name: str, dtype: torch.dtype) -> None:
    spec, _ = bd.preset(name, 128)
    options = dict(heads=3, group=1, recent=10, num_sink=4, dtype=dtype, hostile=True)
    check_steps(128, spec, on_gpu(spec), steps=[1, 5, 8], **options)


@pytest.mark.parametrize("seed", range(24))
def test_many_sequences(seed: int) -> None:
    """So many that a CTA has several pieces, and blocks of some of them get full in a step."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    name, dtype = PRESETS[seed % len(PRESETS)], rng.choice([torch.float16, torch.bfloat16])
    spec, _ = bd.preset(name, 128)
    batch, heads = rng.choice([(1, 8), (5, 3), (33, 2), (64, 8), (70, 3), (130, 2)])
    group, q_len = rng.choice([(1, 1), (4, 1), (8, 1), (2, 2), (1, 8), (3, 1), (4, 2)])
    recent, num_sink, most = rng.choice([0, 1, 64, 130]), rng.choice([0, 4, 16]), rng.choice([1, 4, 12, 30])
    options = {"recent": recent} | rng.choice([{}, {"window": 100}, {"window": 700}])
    full = rng.random()  # share of the tails to which the step's tokens add a full block
    blocks = [rng.randint(0, most) for _ in range(batch)]
    tails = [recent + 127 - rng.randrange(q_len if rng.random() < full else recent + 128) for _ in range(batch)]

    def tokens(count: int) -> Tensor:
        return torch.randn(batch, count, heads, 128, generator=generator).to(dtype)

    cache = {
        "pages": random_pages(spec, 128, batch * (most + 2), heads, generator),
        "block_table": torch.randperm(batch * (most + 2), generator=generator).int().view(batch, -1),
        "seqlens": torch.tensor([num_sink + 128 * n + tail for n, tail in zip(blocks, tails, strict=True)]).int(),
        "packed_lens": 128 * torch.tensor(blocks, dtype=torch.int32),
        "tail_k": tokens(recent + 143), "tail_v": tokens(recent + 143),
        "sink_k": tokens(num_sink), "sink_v": tokens(num_sink), "status": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    for _ in range(2):
        got = {name: x.clone() for name, x in cache.items()}
        q = torch.randn(batch, q_len, heads * group, 128, generator=generator).to(dtype)
        new = tokens(q_len), tokens(q_len)
        want = bd.step(q, *new, **(cache | no_sinks(num_sink)), spec=spec, **options)
        out = on_gpu(spec)(got, q, *new, options)
        tail = (cache["seqlens"] - num_sink - cache["packed_lens"])[:, None]
        for name, x in cache.items():
            held = torch.arange(x.shape[1]) < tail if name.startswith("tail") else slice(None)
            assert torch.equal(got[name][held].view(torch.uint8), x[held].view(torch.uint8)), name
        for b in range(batch):
            assert relative_error(out[b], want[b]) < TOLERANCE[dtype], b


def test_more_columns_than_a_step_has() -> None:
    spec, _ = bd.preset("kc4", 128)
    cache = {name: x.cuda() for name, x in begun_cache(128, spec, 2, 0, 0, torch.float16, 3).items()} | no_sinks(0)
    new = torch.zeros(len(LENGTHS), 3, 2, 128, dtype=torch.float16, device="cuda")
    q = torch.zeros(len(LENGTHS), 3, 8, 128, dtype=torch.float16, device="cuda")
    with pytest.raises(bd.UnsupportedConfig, match="q_len=3"):
        bd.step(q, new, new, **cache, spec=spec)


def test_a_graph_of_a_step() -> None:
    """Replayed over many borders of blocks; now and then compared with the CPU from the same bytes."""
    spec, _ = bd.preset("kv4", 128)
    heads, group, batch, recent = 2, 4, 5, 20
    cache = bd.KVCache(
        batch_size=batch, max_tokens=REPLAYS + 700, num_kv_heads=heads, head_dim=128, quant=spec, recent=recent,
        sink_tokens=4, device="cuda",
    )  # fmt: skip
    start = torch.tensor([0, 3, 131, 500, 640], dtype=torch.int32)
    k, v = torch.randn(2, batch, 640, heads, 128, device="cuda").half()
    cache.append(k, v, start)
    cache.reserve(REPLAYS + 3)
    q = torch.zeros(batch, 1, heads * group, 128, dtype=torch.float16, device="cuda")
    k_new, v_new = torch.zeros(2, batch, 1, heads, 128, dtype=torch.float16, device="cuda")
    generator = torch.Generator().manual_seed(0)

    def new_tokens() -> None:
        for x in (q, k_new, v_new):
            x.copy_(torch.randn(x.shape, generator=generator))

    graph = torch.cuda.CUDAGraph()
    cache.step(q, k_new, v_new, reserved=True)
    with torch.cuda.graph(graph):
        out = cache.step(q, k_new, v_new)
    for i in range(REPLAYS):
        new_tokens()
        compares = i % COMPARED == 0
        twin = cache.to("cpu") if compares else None
        graph.replay()
        if twin is not None:
            want = twin.step(q.cpu(), k_new.cpu(), v_new.cpu())
            assert relative_error(out.cpu(), want) < 1e-3, i
            cache.sync()
            assert cache.seqlens.tolist() == twin.seqlens.tolist()
            assert cache.packed_lens.tolist() == twin.packed_lens.tolist()
    assert cache.seqlens.tolist() == (start + REPLAYS + 1).tolist()
