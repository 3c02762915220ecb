"""The kernels on a GPU (``pytest -m gpu``), against fp64 attention over the dequantised cache and the CPU backend."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from attention_reference import attention, relative_error
from bitdecoding.cute_kernels.compile import MANIFEST_HEAD_DIMS, manifest_specs
from test_cpu_decode import RAGGED, Problem, problem, random_q

import bitdecoding as bd

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}  # bf16: the rounding of out
LSE_TOLERANCE = 5e-3  # Q is rounded to fp16, and the keys have channel offsets that its error multiplies
FORMATS = [(d, i) for d in MANIFEST_HEAD_DIMS for i in range(len(manifest_specs(d)))]
KV4 = bd.QuantSpec()


def on_gpu(case: Problem, device: str = "cuda") -> Problem:
    move = lambda x: None if x is None else tuple(t.to(device) for t in x)  # noqa: E731
    tensors = {name: getattr(case, name).to(device) for name in ("pages", "block_table", "seqlens", "packed_lens")}
    return replace(case, **tensors, tail=move(case.tail), sink=move(case.sink))


def check(case: Problem, q: torch.Tensor, slack: float = 1.0, **options) -> torch.Tensor:
    """Decode on the GPU; compare with the reference, sequence by sequence -> out on the GPU."""
    on_device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out, lse = on_gpu(case).decode(q.cuda(), return_lse=True, **on_device)
    for b, (k, v) in enumerate(case.values):
        want, want_lse = attention(q[b], k, v, **options)
        assert relative_error(out[b].cpu(), want) < slack * TOLERANCE[q.dtype], f"sequence {b} of {len(k)} tokens"
        torch.testing.assert_close(lse[b].cpu().double(), want_lse, atol=LSE_TOLERANCE, rtol=1e-4)
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("head_dim", "index"), FORMATS)
def test_every_format(head_dim: int, index: int, dtype: torch.dtype) -> None:
    spec = manifest_specs(head_dim)[index]
    shape = dict(heads=2, head_dim=head_dim, num_sink=4 * (index % 2), dtype=dtype)
    q = random_q(len(RAGGED), 1, 8, head_dim, dtype)
    check(problem(RAGGED, spec, **shape, offset=0.0), q)
    # channels with offsets of three standard deviations: Q * scale is rounded per block, and multiplies them
    check(problem(RAGGED, spec, **shape, offset=3.0), q)


@pytest.mark.parametrize("name", ["kv8", "kv4", "k4v2", "kv2", "kc4", "kc2"])
def test_presets_rotate_queries_and_outputs(name: str) -> None:
    spec, policy = bd.preset(name, head_dim=128)
    case = problem([(384, 130), (0, 5)], spec, head_dim=128, num_sink=policy.sink_tokens)
    check(case, random_q(2, 1, 4, 128))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_any_number_of_query_heads(group: int) -> None:
    case = problem([(300, 0), (128, 30)], KV4, heads=3, head_dim=128)
    check(case, random_q(2, 1, 3 * group, 128))
    tiles = 3 * group > 32  # of K and V as fp16
    check(case, random_q(2, 3, 3 * group, 128), slack=1.5 if tiles else 1.0)


@pytest.mark.parametrize("name", ["kv8", "kv4", "k4v2", "kv2", "kc4", "kc2"])
@pytest.mark.parametrize(("group", "q_len"), [(16, 1), (5, 5), (8, 4), (7, 9), (4, 30), (1, 200)])
def test_many_query_columns(name: str, group: int, q_len: int) -> None:
    spec = bd.preset(name, head_dim=128)[0].for_kernel()
    lengths = [(0, 0), (1, 0), (127, 1), (129, 3), (384, 150), (5000, 0), (0, 140)]
    case = problem(lengths, spec, heads=2, head_dim=128, num_sink=3 * (q_len % 2), offset=0.0)
    check(case, random_q(len(lengths), q_len, 2 * group, 128), slack=1.5)


def test_a_chunk_of_a_prompt_over_a_quantised_prefix() -> None:
    case = problem([(4096, 160)], KV4, heads=2, head_dim=128, offset=0.0)
    check(case, random_q(1, 160, 8, 128))


@pytest.mark.parametrize("window", [None, 1, 130, 300, 5000])
@pytest.mark.parametrize("q_len", [1, 2, 9, 200])
def test_causal_queries_and_windows(window: int | None, q_len: int) -> None:
    case = problem([(640, 21), (256, 100), (40, 0), (0, 3)], KV4, head_dim=128, num_sink=4)
    check(case, random_q(4, q_len, 4, 128), window=window)


def test_softcap_and_sink_logits() -> None:
    case = problem([(300, 9), (0, 0)], KV4, head_dim=128)
    check(case, random_q(2, 2, 4, 128), softcap=3.0, sink_logits=torch.tensor([0.0, 1.0, -2.0, 9.0]))


@pytest.mark.parametrize("tokens", [65536, 131072])
@pytest.mark.parametrize("group", [4, 16])
def test_flat_attention_over_long_contexts(group: int, tokens: int) -> None:
    """Offsets left in a running sum would show here: relative error at most 5e-4."""
    case = problem([(tokens, 0)], KV4, heads=2, head_dim=128)
    q = random_q(1, 1, 2 * group, 128) * 0.02
    out = on_gpu(case).decode(q.cuda())
    want, _ = attention(q[0], *case.values[0])
    assert relative_error(out[0].cpu(), want) < 5e-4


def hard_data(name: str, heads: int) -> tuple[torch.Tensor, ...]:
    """q [1, 1, heads, 128], k and v [tokens, 1, 128] in fp16 that make trouble."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = 1 << 20 if name == "a million tokens" else 40_000
    q, k, v = (
        torch.randn(n, 128, generator=generator, device="cuda").half() for n in (heads, tokens, tokens)
    )  # fmt: skip
    if name == "outlier channels":
        k[:, ::16] *= 100
    elif name == "offsets":
        k += 500 * torch.sign(k[:1])
    elif name == "one key takes all":
        q = q + 8 * k[777]
    elif name == "equal scores":
        k[:] = k[0]
    else:
        q *= 0.02
    return q[None, None], k[:, None], v[:, None]


HARD_DATA = ["outlier channels", "offsets", "one key takes all", "equal scores"]


@pytest.mark.parametrize("preset", ["kc4", "kc2", "kv2"])
@pytest.mark.parametrize(
    ("name", "heads"), [*itertools.product(HARD_DATA, (4, 8, 16, 32)), ("a million tokens", 4), ("a million tokens", 8)]
)
def test_hard_data(name: str, preset: str, heads: int) -> None:
    """The error is at most twice that of torch's attention in fp16 over the same values, or 5e-4."""
    q, k, v = hard_data(name, heads)
    spec = bd.preset(preset, 128)[0].for_kernel()
    pages = bd.quantize(k, v, spec)
    blocks, tokens = len(pages), len(k)
    table = torch.arange(blocks, dtype=torch.int32, device="cuda")[None]
    out = bd.decode(q, pages, table, torch.tensor([tokens], dtype=torch.int32, device="cuda"), spec)
    k, v = (x[:tokens] for x in bd.dequantize(pages, 128, spec, torch.float32))
    want = attention(q[0], k, v)[0]
    rows = [x.transpose(0, 1)[None].half() for x in (q[0], k.expand(-1, heads, -1), v.expand(-1, heads, -1))]
    torch16 = torch.nn.functional.scaled_dot_product_attention(*rows)[0].transpose(0, 1)
    assert relative_error(out[0], want) <= max(2 * relative_error(torch16, want), 5e-4)


def test_offsets_beyond_32_bits() -> None:
    case = on_gpu(problem([(700, 0)], KV4, heads=2, head_dim=128))
    want = case.decode(random_q(1, 1, 8, 128).cuda())
    held = case.pages.shape[0]
    shift = (1 << 32) // case.pages[0].numel() + 1
    far = torch.empty((shift + held, *case.pages.shape[1:]), dtype=torch.uint8, device="cuda")
    far[shift:] = case.pages
    moved = replace(case, pages=far, block_table=torch.where(case.block_table < held, case.block_table + shift, 2**30))
    assert torch.equal(moved.decode(random_q(1, 1, 8, 128).cuda()), want)


def test_results_are_deterministic_and_streams_independent() -> None:
    case = on_gpu(problem([(5000, 0), (129, 60), (2000, 1)], KV4, heads=4, head_dim=128))
    q = random_q(3, 1, 16, 128).cuda()
    want = case.decode(q)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            results.append(case.decode(q))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


def test_graph_replay_with_other_lengths() -> None:
    lengths = [(1000, 30), (128, 0), (640, 128)]
    case = problem(lengths, KV4, heads=2, head_dim=128)
    moved = on_gpu(case)
    q = random_q(3, 1, 8, 128)
    device_q, out = q.cuda(), torch.empty_like(q, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        moved.decode(device_q, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            moved.decode(device_q, out=out)
    for cut in (0, 1, 127, 128):
        tails = torch.tensor([max(tail - cut, 0) for _, tail in lengths], dtype=torch.int32)
        moved.seqlens.copy_(moved.packed_lens + tails.cuda())
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for b, (k, v) in enumerate(case.values):
            kept = lengths[b][0] + int(tails[b])
            want, _ = attention(q[b], k[:kept], v[:kept])
            assert relative_error(out[b].cpu(), want) < TOLERANCE[torch.float16]


def test_agrees_with_the_cpu_backend() -> None:
    spec, policy = bd.preset("kv4", head_dim=64)
    case = problem([(1280, 150), (3000, 1)], spec, heads=3, head_dim=64, num_sink=policy.sink_tokens)
    q = random_q(2, 1, 9, 64)
    assert relative_error(on_gpu(case).decode(q.cuda()).cpu(), case.decode(q)) < TOLERANCE[torch.float16]


def test_bad_input_raises_before_the_launch() -> None:
    case = on_gpu(problem([(300, 9)], KV4, head_dim=128))
    q = random_q(1, 1, 4, 128).cuda()
    out = torch.full_like(q, 7.0)
    for bad, word in (
        (dict(q=q.float()), "q"),
        (dict(q=q[..., :64].contiguous()), "head_dim"),
        (dict(q=q, window=0), "window"),
        (dict(q=q, packed_lens=case.packed_lens.cpu()), "packed_lens"),
        (dict(q=q, tail_v=None), "tail"),
        (dict(q=q, sink_logits=torch.zeros(3, device="cuda")), "sink_logits"),
    ):
        with pytest.raises(bd.InvalidArgument, match=word):
            case.decode(**{"out": out if bad["q"] is q else None, **bad})
    torch.cuda.synchronize()
    assert (out == 7.0).all()


def test_a_model_generates_on_the_gpu() -> None:
    transformers = pytest.importorskip("transformers")
    from bitdecoding.integrations.transformers import enable

    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=128, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to("cuda", torch.float16)
    tokens = torch.randint(0, 128, (1, 500), device="cuda")
    with torch.no_grad():
        want = model(tokens).logits[:, -1].float()
        enable(model, "kv8")
        got = model(tokens[:, :-1], use_cache=True)
        got = model(tokens[:, -1:], past_key_values=got.past_key_values, use_cache=True).logits[:, -1].float()
    assert relative_error(got.cpu(), want.cpu()) < 2e-2
    assert model.generate(tokens, max_new_tokens=20, do_sample=False).shape == (1, 520)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_merge_equals_the_cpu(head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    for parts, rows in ((1, 1), (2, 7), (5, 4097)):
        outs = torch.randn(parts, rows, 2, head_dim, generator=generator).to(dtype)
        lses = 4 * torch.randn(parts, rows, 2, generator=generator)
        lses[0, ::3] = lses[:, 0] = -torch.inf
        outs[0, ::3] = torch.nan
        want, want_lse = bd.merge(outs, lses)
        out, lse = bd.merge(outs.cuda(), lses.cuda())
        unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]  # in the last place
        torch.testing.assert_close(out.cpu(), want, atol=1e-3, rtol=unit)
        torch.testing.assert_close(lse.cpu(), want_lse, atol=1e-5, rtol=1e-5)
    assert bd.merge(outs[:, :0].cuda(), lses[:, :0].cuda())[0].shape == (0, 2, head_dim)
