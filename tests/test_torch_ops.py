"""The torch operators: opcheck, and the functions inside torch.compile(fullgraph=True)."""

import pytest
import torch
from bitdecoding.cute_kernels.errors import InvalidArgument

import bitdecoding as bd
from bitdecoding import torch_ops

HEADS, DIM, BATCH = 2, 128, 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def random(*shape, seed=0, dtype=torch.float16, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def filled(name, device, tokens=(300, 5, 129)):
    """A cache that holds some tokens and has pages for more."""
    spec, policy = bd.preset(name, DIM)
    cache = bd.KVCache(
        batch_size=BATCH, max_tokens=1024, num_kv_heads=HEADS, head_dim=DIM, quant=spec, **vars(policy), device=device,
        workspace=bd.ops.workspace(device, DIM),
    )  # fmt: skip
    k, v = (random(BATCH, max(tokens), HEADS, DIM, seed=i, device=device) for i in (1, 2))
    cache.append(k, v, list(tokens))
    cache.reserve([1024 - n for n in tokens])
    return cache


OPTIONS = ("softmax_scale", "window", "softcap")


def decode_arguments(cache, q, return_lse=False, **options):
    return (
        q, cache.pages, cache.block_table, cache.seqlens, cache.packed_lens, cache.tail_k, cache.tail_v, cache.sink_k,
        cache.sink_v, options.get("sink_logits"), cache.workspace, cache.quant.to_json(),
        *map(options.get, OPTIONS), return_lse, None,
    )  # fmt: skip


def check(operator, arguments):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
class TestOpcheck:
    @pytest.mark.parametrize("return_lse", [False, True])
    @pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.5, "window": 40, "softcap": 3.0}])
    def test_decode(self, device, options, return_lse):
        q = random(BATCH, 2, 6, DIM, device=device)
        check(torch_ops.decode, decode_arguments(filled("kv4", device), q, return_lse, **options))

    @pytest.mark.parametrize("name", ["kv4", "kc2"])  # with and without sinks
    def test_append(self, device, name):
        cache = filled(name, device)
        k, v = (random(BATCH, 3, HEADS, DIM, seed=i, device=device) for i in (3, 4))
        lengths = torch.tensor([3, 0, 1], dtype=torch.int32, device=device)
        arguments = (
            k, v, cache.pages, cache.block_table, cache.seqlens, cache.packed_lens, cache.tail_k, cache.tail_v,
            cache.sink_k, cache.sink_v, lengths, cache.status, cache.workspace, cache.quant.to_json(), cache.recent,
        )  # fmt: skip
        check(torch_ops.append, arguments)

    @pytest.mark.parametrize(
        ("name", "options"), [("kv4", {}), ("kc2", {"softmax_scale": 0.5, "window": 40, "softcap": 3.0})]
    )
    def test_step(self, device, name, options):
        cache = filled(name, device)
        q, k, v = (random(BATCH, 2, heads, DIM, seed=heads, device=device) for heads in (6, HEADS, HEADS))
        arguments = (
            q, k, v, cache.pages, cache.block_table, cache.seqlens, cache.packed_lens, cache.tail_k, cache.tail_v,
            cache.sink_k, cache.sink_v, torch.zeros(6, device=device) if options else None, cache.status,
            cache.workspace, cache.quant.to_json(), cache.recent, *map(options.get, OPTIONS), bool(options), None,
        )  # fmt: skip
        check(torch_ops.step, arguments)

    def test_quantize_and_dequantize(self, device):
        spec = bd.preset("kv2", DIM)[0]
        k, v = (random(300, HEADS, DIM, seed=i, device=device) for i in (1, 2))
        pages = torch.zeros(5, HEADS, bd.block_bytes(DIM, spec), dtype=torch.uint8, device=device)
        table = torch.tensor([[4, 0, 2]], dtype=torch.int32, device=device)
        check(torch_ops.quantize, (k, v, pages, table, None, None, spec.to_json()))
        check(torch_ops.dequantize, (pages, DIM, spec.to_json(), torch.float32))

    def test_merge(self, device):
        outs, lses = random(3, BATCH, 6, DIM, device=device), random(3, BATCH, 6, dtype=torch.float32, device=device)
        check(torch_ops.merge, (outs, lses))
        compiled = torch.compile(lambda x, y: bd.merge([x, x + 1], [y, y - 1]), fullgraph=True, backend="aot_eager")
        for x, y in zip(
            compiled(outs[0], lses[0]), bd.merge([outs[0], outs[0] + 1], [lses[0], lses[0] - 1]), strict=True
        ):
            assert x.equal(y)


def append_and_decode(cache, k, v, q):
    cache.append(k, v, reserved=True)
    return cache.decode(q, return_lse=True)


def whole_step(cache, k, v, q):
    return cache.step(q, k, v, reserved=True, return_lse=True, out=torch.empty_like(q))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [append_and_decode, whole_step])
@pytest.mark.parametrize("name", ["kv4", "kv2"])
def test_compiled_steps_equal_plain_ones(device, step, name):
    """append and decode, over the border of a block, in one graph that is compiled once."""
    plain, compiled = filled(name, device), filled(name, device)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled_step = torch.compile(step, fullgraph=True, backend=count)
    for i in range(60):
        k, v = (random(BATCH, 2, HEADS, DIM, seed=10 * i + j, device=device) for j in (1, 2))
        q = random(BATCH, 2, 6, DIM, seed=10 * i + 3, device=device)
        for x, y in zip(step(plain, k, v, q), compiled_step(compiled, k, v, q), strict=True):
            assert x.equal(y)
    assert len(graphs) == 1
    compiled.sync()
    assert compiled.packed_lens.tolist() == plain.packed_lens.tolist() != filled(name, device).packed_lens.tolist()
    assert all(x.equal(y) for x, y in zip(compiled._buffers()[1:5], plain._buffers()[1:5], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_json", [True, False])
def test_quantize_and_dequantize_compiled(device, as_json):
    if not as_json and torch.__version__ < (2, 13):
        pytest.skip("torch.compile does not take a QuantSpec before torch 2.13")
    first, second = (bd.preset(name, DIM)[0] for name in ("kv4", "kv2"))
    if as_json:
        first, second = first.to_json(), second.to_json()
    k, v = (random(300, HEADS, DIM, seed=i, device=device) for i in (1, 2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(k, v, spec):
        blocks = bd.quantize(k, v, spec)
        return blocks, *bd.dequantize(blocks, DIM, spec)

    for spec in (first, second, first):  # another spec is another graph
        blocks, *values = there_and_back(k, v, spec)
        assert blocks.equal(bd.quantize(k, v, spec))
        for x, y in zip(values, bd.dequantize(blocks, DIM, spec), strict=True):
            assert x.equal(y)


@pytest.mark.parametrize(
    ("device", "whole"), [("cpu", False), *(pytest.param("cuda", x, marks=pytest.mark.gpu) for x in (False, True))]
)
def test_reduce_overhead(device, whole):
    """The mode that makes CUDA graphs, with inductor: the cache is mutated in place, not copied."""
    plain, compiled = filled("kv4", device), filled("kv4", device)
    for x in (*compiled._buffers(), compiled.workspace):
        if x is not None:
            torch._dynamo.mark_static_address(x)
    weight = random(DIM, DIM, seed=7, device=device)

    def step(cache, x):
        q = (x @ weight).view(BATCH, 1, 6, DIM)
        new = q[:, :, :HEADS], q[:, :, HEADS : 2 * HEADS]
        if whole:
            return cache.step(q, *new).sum(2)
        cache.append(*new, reserved=True)
        return cache.decode(q).sum(2)

    compiled_step = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for i in range(4):
        x = random(BATCH * 6, DIM, seed=i, device=device)
        torch.testing.assert_close(compiled_step(compiled, x), step(plain, x), atol=2e-3, rtol=2e-3)
    compiled.sync()
    assert compiled.seqlens.tolist() == [304, 9, 133]


@pytest.mark.parametrize("step", [append_and_decode, whole_step])
def test_extents_that_torch_compile_has_made_variables(step):
    """The batch size, as an earlier call of the compiled function had another one."""
    plain, compiled = filled("kv4", "cpu"), filled("kv4", "cpu")

    def first_without(cache, k, v, q):
        return q if cache is None else step(cache, k, v, q)[0]

    k, v = (random(BATCH, 1, HEADS, DIM, seed=i) for i in (1, 2))
    q = random(BATCH, 1, 6, DIM, seed=3)
    compiled_step = torch.compile(first_without, fullgraph=True, backend="aot_eager")
    compiled_step(None, *(torch.cat((x, x)) for x in (k, v, q)))
    assert compiled_step(compiled, k, v, q).equal(first_without(plain, k, v, q))


def test_a_compiled_step_without_a_kernel_for_so_many_columns():
    """It is append and decode, in one graph, too."""
    plain, compiled = filled("kv4", "cpu"), filled("kv4", "cpu")
    k, v = (random(BATCH, 5, HEADS, DIM, seed=i) for i in (1, 2))
    q = random(BATCH, 5, 6, DIM, seed=3)
    assert not plain.can_step(q)
    step = torch.compile(whole_step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for x, y in zip(step(compiled, k, v, q), append_and_decode(plain, k, v, q), strict=True):
            assert x.equal(y)
    assert compiled.seqlens.equal(plain.seqlens)


def test_bad_arguments_are_typed_errors():
    cache = filled("kv4", "cpu")
    step = torch.compile(lambda q: cache.decode(q), fullgraph=True, backend="eager")
    with pytest.raises(InvalidArgument, match="num_q_heads"):
        step(random(BATCH, 1, 5, DIM))
    new = random(BATCH, 1, HEADS, DIM)
    step = torch.compile(lambda q: cache.step(q, new, new), fullgraph=True, backend="eager")
    with pytest.raises(InvalidArgument, match="num_q_heads"):
        step(random(BATCH, 1, 5, DIM))
