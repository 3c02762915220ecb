"""Two GPUs in one process (``pytest -m gpu``): work on that which is not current, and models spread over both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cpu_decode import RAGGED, Problem, problem, random_q
from test_gpu import on_gpu
from test_transformers import build, tokens

import bitdecoding as bd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="there is one GPU only"),
]

KV4, POLICY = bd.preset("kv4", 64)
HEADS, HEAD_DIM = 2, 64
SECOND = "cuda:1"  # cuda:0 is current


@pytest.fixture(scope="module")
def case() -> Problem:
    return problem(RAGGED, KV4, heads=HEADS, num_sink=POLICY.sink_tokens)


def filled(device: str, counts: list[int]) -> bd.KVCache:
    cache = bd.KVCache(
        batch_size=len(counts), max_tokens=1024, num_kv_heads=HEADS, head_dim=HEAD_DIM, quant=KV4, device=device,
        recent=POLICY.recent, sink_tokens=POLICY.sink_tokens,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, len(counts), max(counts), HEADS, HEAD_DIM, generator=generator).half().to(device)
    cache.append(k, v, lengths=counts)
    return cache


def test_the_second_gives_the_bits_of_the_first(case: Problem) -> None:
    q = random_q(len(RAGGED), 2, 4 * HEADS, HEAD_DIM)
    want, want_lse = on_gpu(case, "cuda:0").decode(q.to("cuda:0"), return_lse=True)
    out, lse = on_gpu(case, SECOND).decode(q.to(SECOND), return_lse=True)
    assert out.device == torch.device(SECOND)
    assert torch.cuda.current_device() == 0
    assert torch.equal(out.cpu(), want.cpu())
    assert torch.equal(lse.cpu(), want_lse.cpu())
    outs, lses = torch.stack((out, out * 2)), torch.stack((lse, lse))
    for got, expected in zip(bd.merge(outs, lses), bd.merge(outs.to("cuda:0"), lses.to("cuda:0")), strict=True):
        assert torch.equal(got.cpu(), expected.cpu())


def test_caches_on_both(tmp_path) -> None:
    counts = [700, 0, 131]
    first, second = filled("cuda:0", counts), filled(SECOND, counts)
    q = random_q(3, 1, 4 * HEADS, HEAD_DIM)
    want = first.decode(q.to("cuda:0")).cpu()
    assert torch.equal(second.decode(q.to(SECOND)).cpu(), want)
    assert torch.equal(first.to(SECOND).decode(q.to(SECOND)).cpu(), want)
    first.save(tmp_path / "cache.safetensors")
    loaded = bd.KVCache.load(tmp_path / "cache.safetensors", SECOND)
    assert torch.equal(loaded.decode(q.to(SECOND)).cpu(), want)
    second.truncate([690, 0, 130])
    second.fork([0, 0, 2])
    first.truncate([690, 0, 130])
    first.fork([0, 0, 2])
    assert torch.equal(second.decode(q.to(SECOND)).cpu(), first.decode(q.to("cuda:0")).cpu())


def test_tensors_on_different_gpus_are_refused(case: Problem) -> None:
    here, there = on_gpu(case, "cuda:0"), on_gpu(case, SECOND)
    q = random_q(len(RAGGED), 1, 4 * HEADS, HEAD_DIM)
    with pytest.raises(bd.InvalidArgument, match="seqlens"):
        replace(there, seqlens=here.seqlens).decode(q.to(SECOND))
    with pytest.raises(bd.InvalidArgument, match="pages"):
        replace(here, pages=there.pages).decode(q.to("cuda:0"))
    with pytest.raises(bd.InvalidArgument, match="out"):
        here.decode(q.to("cuda:0"), out=torch.empty_like(q, device=SECOND))


def test_graphs_of_both_replay_side_by_side() -> None:
    """Each graph appends a token and attends; all steps end as those of the CPU backend do."""
    steps, counts = 150, [100, 700, 260]
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(2, steps, len(counts), 1, HEADS, HEAD_DIM, generator=generator).half()
    q = random_q(len(counts), 1, 4 * HEADS, HEAD_DIM)
    graphs = []
    for device in ("cuda:0", SECOND):
        cache = filled(device, counts)
        cache.reserve(steps + 1)
        k, v, query = (x.to(device) for x in (new[0, 0], new[1, 0], q))
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(stream):
            cache.append(k, v, reserved=True)  # compiles and allocates
            cache.decode(query)
            torch.cuda.synchronize()
            cache.sync()
            cache.truncate(counts)
            cache.reserve(steps)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                cache.append(k, v, reserved=True)
                out = cache.decode(query)
        graphs.append((device, cache, stream, graph, k, v, out))
    assert torch.cuda.current_device() == 0
    for i in range(steps):
        for _, _, stream, graph, k, v, _ in graphs:
            with torch.cuda.stream(stream):
                k.copy_(new[0, i])
                v.copy_(new[1, i])
                graph.replay()
    for device, *_ in graphs:
        torch.cuda.synchronize(device)
    cpu = filled("cpu", counts)
    for i in range(steps):
        cpu.append(new[0, i], new[1, i])
    want = cpu.decode(q)
    for _, cache, *_, out in graphs:
        cache.sync()
        assert cache.seqlens.tolist() == cpu.seqlens.tolist()
        torch.testing.assert_close(out.cpu(), want, atol=2e-3, rtol=2e-3)
    assert torch.equal(graphs[0][-1].cpu(), graphs[1][-1].cpu())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_spread_over_both(family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from bitdecoding.integrations.transformers import BitDecodingCache, enable

    alone, spread = build(family).to("cuda:0"), build(family)
    # lm_head where the embedding is: their weights may be one
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 0}
    spread = accelerate.dispatch_model(spread, places | {"model.rotary_emb": 0})
    ids = tokens(2, 300).to("cuda:0")
    mask = torch.ones_like(ids)
    mask[1, :140] = 0  # left padding
    caches = []
    for model in (alone, spread):
        enable(model, "kv8")
        caches.append(BitDecodingCache(model.config, "kv8", 512))
    for part in ((0, 290), (290, 299), (299, 300)):  # a prompt, a chunk, a step
        options = {"attention_mask": mask[:, : part[1]], "use_cache": True}
        with torch.no_grad():
            want, got = (
                model(ids[:, slice(*part)], past_key_values=cache, **options).logits[:, -1]
                for model, cache in zip((alone, spread), caches, strict=True)
            )
        assert (got.to(want.device) - want).std() / want.std() < 1e-3
    assert {layer.kv.device.index for layer in caches[1].layers} == {0, 1}
    written = [
        model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, **options)
        for model in (alone, spread) for options in ({}, {"num_beams": 2})
    ]  # fmt: skip
    assert torch.equal(written[0], written[2])
    assert torch.equal(written[1], written[3])
