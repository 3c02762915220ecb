"""Quantize, append and KVCache on a GPU (``pytest -m gpu``): the bytes that the CPU makes of the same tokens."""

from __future__ import annotations

import pytest
import torch
from append_cases import HEADS, STEPS, check_appends, check_quantize, empty_cache, hostile_kv
from attention_reference import relative_error
from bitdecoding.cute_kernels.compile import MANIFEST_HEAD_DIMS, manifest_specs
from torch import Tensor

import bitdecoding as bd

pytestmark = pytest.mark.gpu

FORMATS = [(d, i) for d in MANIFEST_HEAD_DIMS for i in range(len(manifest_specs(d)))]
DTYPES = [torch.float16, torch.bfloat16]
LENGTHS = [0, 1, 127, 128, 129, 1000]
PRESETS = ["kv8", "kv4", "k4v2", "kv2", "kc4", "kc2"]
REPLAYS, COMPARED = 2000, 100  # steps of the graph test, and how often it compares


def quantize_on_gpu(spec: bd.QuantSpec):
    def run(k: Tensor, v: Tensor, pages: Tensor, table: Tensor, bounds: Tensor) -> None:
        moved = pages.cuda()
        bd.quantize(k.cuda(), v.cuda(), spec, pages=moved, block_table=table.cuda(), cu_seqlens=bounds.cuda())
        pages.copy_(moved)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "index"), FORMATS)
def test_every_format(head_dim: int, index: int, dtype: torch.dtype) -> None:
    spec = manifest_specs(head_dim)[index]
    check_quantize(head_dim, spec, LENGTHS, dtype, quantize_on_gpu(spec), seed=index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", MANIFEST_HEAD_DIMS)
@pytest.mark.parametrize("name", PRESETS)
def test_clips_and_rotations_of_the_presets(name: str, head_dim: int, dtype: torch.dtype) -> None:
    spec, _ = bd.preset(name, head_dim)
    check_quantize(head_dim, spec, LENGTHS, dtype, quantize_on_gpu(spec), heads=3)


def test_one_sequence_into_new_pages() -> None:
    k, v = hostile_kv(5000, 8, 128, 0, torch.bfloat16)
    qkv = torch.stack((k, v), dim=1).cuda()  # strided, as slices of a projection
    spec = bd.preset("kv4", 128)[0]
    assert torch.equal(bd.quantize(qkv[:, 0], qkv[:, 1], spec).cpu(), bd.quantize(k, v, spec))


def test_quantize_so_many_blocks_that_a_thread_block_takes_some() -> None:
    spec = bd.preset("kv2", 128)[0]
    check_quantize(128, spec, [30_000, 127, 4000], torch.bfloat16, quantize_on_gpu(spec), heads=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("recent", "num_sink"), [(0, 0), (0, 3), (40, 0), (300, 16)])
@pytest.mark.parametrize("name", ["kv8", "kv4", "kv2", "kc4"])
def test_append(name: str, recent: int, num_sink: int, dtype: torch.dtype) -> None:
    spec, _ = bd.preset(name, 128)

    def run(cache: dict[str, Tensor], k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        moved = {name: x.cuda() for name, x in cache.items()}
        sinks = {} if num_sink else {"sink_k": None, "sink_v": None}
        counts = None if lengths is None else lengths.cuda()
        # on the GPU the new tokens stay slices of one tensor
        both = torch.cat((k, v), dim=2).cuda().split(HEADS, dim=2)
        bd.append(*both, **(moved | sinks), spec=spec, lengths=counts, recent=recent)
        for name, x in moved.items():
            cache[name].copy_(x)

    check_appends(128, spec, STEPS, recent, num_sink, dtype, run)


def test_a_sequence_without_pages_stays_as_it_was_and_others_go_on() -> None:
    spec = bd.QuantSpec(v_group=64)
    cache = {name: x.cuda() for name, x in empty_cache(64, spec, 0, 0, torch.float16).items()}
    cache |= {"sink_k": None, "sink_v": None}
    k, v = (x[None].expand(3, -1, -1, -1).contiguous().cuda() for x in hostile_kv(300, HEADS, 64, 1, torch.float16))
    bd.append(k, v, **cache, spec=spec)
    assert cache["seqlens"].tolist() == [0, 300, 300]  # the first has one page, the second two
    assert cache["packed_lens"].tolist() == [0, 256, 256]
    assert cache["status"].item() == 1
    del cache["status"]
    bd.append(k, v, **cache, spec=spec)  # nobody has two more
    assert cache["seqlens"].tolist() == [0, 300, 300]


def test_bad_input_raises_before_the_launch() -> None:
    spec = bd.QuantSpec(v_group=64)
    cache = {name: x.cuda() for name, x in empty_cache(64, spec, 0, 3, torch.float16).items()}
    before = {name: x.clone() for name, x in cache.items()}
    k, v = (x[None].expand(3, -1, -1, -1).contiguous().cuda() for x in hostile_kv(9, HEADS, 64, 1, torch.float16))
    for change, word in (
        ({"k_new": k.float()}, "k_new"),
        ({"v_new": v[:, :5]}, "v_new"),
        ({"tail_k": cache["tail_k"].cpu()}, "tail_k"),
        ({"seqlens": cache["seqlens"].long()}, "seqlens"),
        ({"recent": 6}, "tail_capacity"),
        ({"sink_v": None}, "sink_v"),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="cuda")}, "lengths"),
    ):
        with pytest.raises(bd.InvalidArgument, match=word):
            bd.append(**({"k_new": k, "v_new": v, "spec": spec, **cache} | change))
    with pytest.raises(bd.OutOfPages):
        bd.quantize(
            k.flatten(0, 1), v.flatten(0, 1), spec, pages=cache["pages"], block_table=cache["block_table"][:1, :0]
        )
    torch.cuda.synchronize()
    assert all(torch.equal(cache[name].view(torch.uint8), x.view(torch.uint8)) for name, x in before.items())


# -- KVCache -------------------------------------------------------------------------------------------------------


def assert_same_bytes(got: bd.KVCache, want: bd.KVCache) -> None:
    """All that the sequences hold, whichever pages they hold it in."""
    got = got.to("cpu")
    assert got.seqlens.tolist() == want.seqlens.tolist()
    assert got.packed_lens.tolist() == want.packed_lens.tolist()
    for b, (n, packed) in enumerate(zip(want.seqlens.tolist(), want.packed_lens.tolist(), strict=True)):
        sinks = min(n, want.sink_tokens)
        mine, its = (cache.pages[cache.block_table[b, : packed // 128].long()] for cache in (got, want))
        assert torch.equal(mine, its), f"blocks of sequence {b}"
        for name, held in (("tail", n - sinks - packed), ("sink", sinks)):
            for operand in "kv":
                mine, its = (getattr(cache, f"{name}_{operand}") for cache in (got, want))
                if mine is not None:
                    assert torch.equal(mine[b, :held], its[b, :held]), f"{name}_{operand} of sequence {b}"


def caches(name: str, head_dim: int, batch: int, **options) -> list[bd.KVCache]:
    """On the CPU and on the GPU."""
    spec, policy = bd.preset(name, head_dim)
    fields = {"batch_size": batch, "max_tokens": 4096, "num_kv_heads": 2, "head_dim": head_dim, "quant": spec}
    return [bd.KVCache(**(fields | vars(policy) | options), device=device) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("name", ["kv8", "kv4", "k4v2", "kv2"])
def test_cache_holds_the_bytes_of_the_cpu(name: str) -> None:
    """Appends across block borders in steps of several sizes, forks and truncations."""
    on_cpu, on_gpu = caches(name, 64, 3)
    generator = torch.Generator().manual_seed(3)
    for step in (300, 1, 1, 130, 1, 517, 2):
        k, v = torch.randn(2, 3, step, 2, 64, generator=generator).half()
        q = torch.randn(3, 1, 6, 64, generator=generator).half()
        lengths = [step, step // 2, 1]
        outs = []
        for cache in (on_cpu, on_gpu):
            cache.append(k.to(cache.device), v.to(cache.device), lengths)
            outs.append(cache.decode(q.to(cache.device)).cpu())
        assert relative_error(outs[1], outs[0]) < 1e-3
        assert_same_bytes(on_gpu, on_cpu)
        for cache in (on_cpu, on_gpu):
            if step == 130:
                cache.fork([0, 0, 1])
            if step == 517:
                cache.truncate([n - min(n, 3) for n in cache.seqlens.tolist()])
        assert_same_bytes(on_gpu, on_cpu)


@pytest.mark.parametrize("batch", [70, 200, 700])
def test_many_sequences(batch: int) -> None:
    """Thread blocks have up to four items, and for some of them blocks get full."""
    on_cpu, on_gpu = caches("kv4", 64, batch, max_tokens=300, recent=0)
    generator = torch.Generator().manual_seed(batch)
    for step in (130, 1, 8, 1):
        k, v = torch.randn(2, batch, step, 2, 64, generator=generator).half()
        lengths = torch.randint(max(0, step - 10), step + 1, (batch,), generator=generator).tolist()
        for cache in (on_cpu, on_gpu):
            cache.append(k.to(cache.device), v.to(cache.device), lengths)
        assert_same_bytes(on_gpu, on_cpu)


def test_exhausted_pages_leave_the_cache_usable() -> None:
    for cache in caches("kv4", 64, 2, recent=0, sink_tokens=0, num_pages=2):
        k, v = (
            x.to(cache.device) for x in torch.randn(2, 2, 200, 2, 64, generator=torch.Generator().manual_seed(1)).half()
        )
        cache.append(k, v)
        q = torch.randn(2, 1, 2, 64, generator=torch.Generator().manual_seed(2)).half().to(cache.device)
        want = cache.decode(q)
        with pytest.raises(bd.OutOfPages):
            cache.append(k, v)
        cache.append(k[:, :50], v[:, :50], torch.full((2,), 50, dtype=torch.int32, device=cache.device), reserved=True)
        cache.append(k[:, :20], v[:, :20], reserved=True)  # 270 tokens: a block would get full
        with pytest.raises(bd.OutOfPages, match="sequence 1 had no reserved page"):
            cache.sync()
        assert cache.seqlens.tolist() == [250, 250]
        cache.truncate(200)
        assert torch.equal(cache.decode(q), want)


def test_a_graph_of_a_step_replayed_two_thousand_times() -> None:
    """A ragged batch that crosses dozens of block borders, sequences skipping steps at random, all on the device."""
    batch = 4
    on_cpu, on_gpu = caches("kv4", 128, batch)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randn(2, batch, 300, 2, 128, generator=generator).half()
    start = [300, 131, 4, 0]
    for cache in (on_cpu, on_gpu):
        cache.append(*prompt.to(cache.device), start)
    on_gpu.reserve(REPLAYS + 10)

    new = torch.zeros(2, batch, 1, 2, 128, dtype=torch.float16, device="cuda")
    lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, 1, 8, 128, generator=generator).half()
    device_q, out = q.cuda(), torch.empty_like(q, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        on_gpu.append(new[0], new[1], lengths, reserved=True)  # no token counts: loads the kernels
        on_gpu.decode(device_q, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            on_gpu.append(new[0], new[1], lengths, reserved=True)
            on_gpu.decode(device_q, out=out)
    tokens = torch.randn(REPLAYS, 2, batch, 1, 2, 128, generator=generator).half()
    counts = (torch.rand(REPLAYS, batch, generator=generator) < 0.9).int()
    for step in range(REPLAYS):
        new.copy_(tokens[step])
        lengths.copy_(counts[step])
        graph.replay()
        on_cpu.append(*tokens[step], counts[step].tolist())
        if (step + 1) % COMPARED == 0:
            torch.cuda.synchronize()
            assert_same_bytes(on_gpu, on_cpu)
            assert relative_error(out.cpu(), on_cpu.decode(q)) < 1e-3, f"step {step}"
    assert (on_gpu.packed_lens.cpu() > 1400).all()
