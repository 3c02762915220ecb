"""The transformers integration, on tiny models with random weights: no downloads."""

import copy
import itertools

import pytest
import torch

pytest.importorskip("transformers")

from bitdecoding.cute_kernels.errors import CacheFormatError, InvalidArgument, OutOfPages, UnsupportedConfig
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CompileConfig,
    DiffLlamaConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from bitdecoding import QuantPolicy, QuantSpec
from bitdecoding.integrations.transformers import NAME, BitDecodingCache, disable, enable
from bitdecoding.quantization import CachePolicy, preset

VOCABULARY = 97
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,  # large enough for attention to prefer some keys
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=100),
    "gemma2": Gemma2Config(**SIZES, sliding_window=100, attn_logit_softcapping=2.0, query_pre_attn_scalar=64),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=100, sliding_window_pattern=2, query_pre_attn_scalar=64),
    "mqa": LlamaConfig(**SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 192}),
    "gpt_oss": GptOssConfig(**SIZES, sliding_window=100, num_local_experts=2, num_experts_per_tok=2),
}
EIGHT_BIT = (QuantSpec(k_bits=8, v_bits=8, k_group=32, v_group=32), CachePolicy(recent=16, sink_tokens=2))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def build(family="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # gpt_oss leaves them uninitialised
            torch.nn.init.normal_(parameter)
    return model


def tokens(batch, length, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, ids, cache, sizes):
    """Logits of a text fed in chunks of these sizes."""
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], dim=1)


def cut(length, first, pattern):
    """Sizes of chunks that add up to a length: the first ones, then a pattern again and again."""
    sizes = list(first)
    for size in itertools.cycle(pattern):
        if sum(sizes) == length:
            return sizes
        sizes.append(min(size, length - sum(sizes)))


@pytest.mark.parametrize("family", CONFIGS)
def test_eight_bits_come_close_to_the_plain_cache(family):
    model, ids, sizes = build(family), tokens(2, 400), [150, 1, 147, 99, 1, 1, 1]
    expected = feed(model, ids, DynamicCache(config=model.config), sizes)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, EIGHT_BIT)
    actual = feed(model, ids, cache, sizes)
    assert all(layer.kv.packed_lens.tolist() == [256, 256] for layer in cache.layers)
    error = (actual - expected).std() / expected.std()
    assert error < 0.02
    assert error > 1e-5, "the packed tokens were not read"


@pytest.mark.parametrize("family", CONFIGS)
def test_other_caches_and_no_cache_get_exact_attention(family):
    model, ids = build(family), tokens(2, 250)
    sizes = [150, 1, 99]
    expected = feed(model, ids, DynamicCache(config=model.config), sizes)
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(feed(model, ids, DynamicCache(config=model.config), sizes), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("quant", ["kv8", "kv4", "kv2", "kc4"])
def test_chunks_and_single_steps_agree(quant):
    """Chunks see the same 16-bit and packed tokens as single steps, if the tokens that fill a block come alone."""
    model, ids = build(), tokens(1, 420)
    model.set_attn_implementation(NAME)
    policy = preset(quant)[1]
    prompt = policy.sink_tokens + max(1, policy.recent) + 127
    caches = [BitDecodingCache(model.config, quant) for _ in range(3)]
    stepped, halves, blocks = (
        feed(model, ids, cache, cut(420, [prompt], pattern))
        for cache, pattern in zip(caches, ([1], [1, 63, 64], [1, 127]), strict=True)
    )
    assert len({cache.layers[1].kv.packed_lens.item() for cache in caches}) == 1
    assert caches[0].layers[1].kv.packed_lens > 0
    assert (stepped - halves).abs().max() < 0.05 * stepped.std()
    assert (stepped - blocks).abs().max() < 0.05 * stepped.std()


def test_generate_equals_teacher_forcing():
    model, ids = build(), tokens(2, 120)
    enable(model, "kv4")
    generated = model.generate(ids, max_new_tokens=20, do_sample=False)
    cache = BitDecodingCache(model.config, "kv4")
    logits = feed(model, generated[:, :-1], cache, [120] + [1] * 19)
    assert generated[:, 120:].equal(logits[:, 119:].argmax(-1))


def test_enable_and_disable():
    model, ids = build(), tokens(1, 300)
    with torch.no_grad():
        plain = model(ids).logits
        enable(model, "kv2", max_tokens=512)
        enable(model, "kv4", max_tokens=512)  # replaces the first
        out = model(ids)
        assert isinstance(out.past_key_values, BitDecodingCache)
        assert out.past_key_values.get_max_length() == 512
        assert out.past_key_values.layers[0].kv.quant.k_bits == 4
        assert isinstance(model(ids, None, None, None, use_cache=None).past_key_values, BitDecodingCache)
        assert model(ids, use_cache=False).past_key_values is None
        torch.testing.assert_close(out.logits, plain)  # a first chunk reads no cache
        result = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
        assert isinstance(result.past_key_values, BitDecodingCache)
        own = DynamicCache(config=model.config)
        assert model(ids, past_key_values=own).past_key_values is own
        assert model(ids, None, None, own).past_key_values is own
        disable(model)
        disable(model)
        assert model.config._attn_implementation == "eager"
        assert type(model(ids).past_key_values) is DynamicCache
        result = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
        assert type(result.past_key_values) is DynamicCache


def test_a_cache_outlives_inference_mode():
    model, ids = build(), tokens(1, 150)
    model.set_attn_implementation(NAME)
    begun, plain = (BitDecodingCache(model.config, "kv4", max_tokens=300) for _ in range(2))
    with torch.inference_mode():
        model(ids[:, :100], past_key_values=begun)
    feed(model, ids[:, :100], plain, [100])
    assert feed(model, ids[:, 100:], begun, [49, 1]).equal(feed(model, ids[:, 100:], plain, [49, 1]))
    begun.reset()


def test_sampling_with_chunked_prefill():
    model, ids = build(), tokens(2, 200)
    enable(model, "kv8")
    torch.manual_seed(3)
    first = model.generate(ids, max_new_tokens=8, do_sample=True, prefill_chunk_size=64)
    torch.manual_seed(3)
    again = model.generate(ids, max_new_tokens=8, do_sample=True, prefill_chunk_size=64)
    assert first.shape == (2, 208)
    assert first.equal(again)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_left_padding(family):
    """A padded sequence in a batch gives what it gives alone."""
    model, ids = build(family), tokens(2, 290)
    padded = ids.clone()
    padded[1, :70] = 0
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, EIGHT_BIT)
    logits, at = [], 0
    for size in (60, 140, 88, 1, 1):  # the second sequence begins in the second chunk
        step = slice(at, at := at + size)
        with torch.no_grad():
            out = model(
                padded[:, step], attention_mask=mask[:, :at], position_ids=position[:, step], past_key_values=cache
            )
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    assert cache.layers[0].kv.seqlens.tolist() == [290, 220]

    for row, start, sizes in ((0, 0, [60, 140, 88, 1, 1]), (1, 70, [130, 88, 1, 1])):
        alone = feed(model, ids[row : row + 1, start:], BitDecodingCache(model.config, EIGHT_BIT), sizes)
        assert (logits[row, start:] - alone[0]).abs().max() < 0.01 * alone.std()

    enable(model, EIGHT_BIT)
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    single = model.generate(ids[1:, 70:], max_new_tokens=6, do_sample=False)
    assert batch[1, 290:].equal(single[0, 220:])


def test_left_padding_of_a_later_chunk():
    """Another turn of a conversation, shorter in one sequence, after both have begun."""
    model, ids, turn = build(), tokens(2, 150), tokens(2, 40, seed=5)
    mask = torch.ones(2, 190, dtype=torch.int64)
    mask[1, 150:165] = 0
    position = mask.cumsum(1) - 1
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, EIGHT_BIT)
    feed(model, ids, cache, [150])
    with torch.no_grad():
        logits = model(turn, attention_mask=mask, position_ids=position[:, 150:], past_key_values=cache).logits
    assert cache.layers[0].kv.seqlens.tolist() == [190, 175]
    alone = BitDecodingCache(model.config, EIGHT_BIT)
    feed(model, ids[1:], alone, [150])
    expected = feed(model, turn[1:, 15:], alone, [25])
    assert (logits[1, 15:] - expected[0]).abs().max() < 0.01 * expected.std()


def test_crop_is_exact_within_the_recent_tokens():
    model, ids, other = build(), tokens(1, 400), tokens(1, 10, seed=5)
    model.set_attn_implementation(NAME)
    cache, fresh = (BitDecodingCache(model.config, EIGHT_BIT) for _ in range(2))
    feed(model, ids, cache, [300, 90, 10])
    feed(model, ids[:, :390], fresh, [300, 90])
    cache.crop(0)
    assert cache.get_seq_length() == 400
    cache.crop(-10)
    assert cache.get_seq_length() == 390
    assert feed(model, other, cache, 1).equal(feed(model, other, fresh, 1))
    with pytest.raises(InvalidArgument, match="packed block"):
        cache.crop(-200)
    with pytest.raises(InvalidArgument, match="tokens_to_remove=5"):
        cache.crop(5)


def test_assisted_decoding_gives_the_same_text():
    model, ids = build(), tokens(1, 150)
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    enable(model, (QuantSpec(k_bits=8, v_bits=8, k_group=32, v_group=32), CachePolicy(recent=64)))
    assistant = build()
    with torch.no_grad():  # wrong often enough for drafts to be rolled back
        assistant.lm_head.weight += 0.2 * torch.randn_like(assistant.lm_head.weight)
    assert model.generate(ids, assistant_model=assistant, max_new_tokens=24, do_sample=False).equal(plain)


def test_drafts_from_the_prompt_may_go_beyond_the_end():
    model, ids = build(), tokens(1, 20).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 8, "max_new_tokens": 3, "do_sample": False}
    plain = model.generate(ids, **options)
    enable(model, "kv8")
    assert model.generate(ids, **options).equal(plain)
    with pytest.raises(OutOfPages, match="may need 70"):
        model.generate(ids, **options, past_key_values=BitDecodingCache(model.config, "kv8", max_tokens=69))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_steps_equal_plain_ones(family, device):
    """A whole model's step, over the border of a block, in one graph that is compiled once; layers of four formats."""
    model, ids = build(family).to(device), tokens(2, 200).to(device)
    model.set_attn_implementation(NAME)
    policy = QuantPolicy("kv4", {0: "16bit"} if family == "qwen3" else {0: "kv8"} if family == "llama" else {})
    plain, compiled = (BitDecodingCache(model.config, policy, max_tokens=200) for _ in range(2))
    feed(model, ids[:, :193], plain, [193])
    feed(model, ids[:, :193], compiled, [193])
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for i in range(193, 200):
            expected = model(ids[:, i : i + 1], past_key_values=plain).logits
            actual = step(ids[:, i : i + 1], past_key_values=compiled).logits
            torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1
    compiled.sync()
    assert int(compiled.get_seq_length()) == 200
    assert compiled.layers[1].kv.packed_lens.tolist() == plain.layers[1].kv.packed_lens.tolist() == [128, 128]


def test_generate_compiles_its_steps():
    model, ids = build(), tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    enable(model, "kv4")
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiling = CompileConfig(fullgraph=True, backend=count, mode=None)
    compiling._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **options)
    assert not graphs
    for _ in range(2):  # a second generation has another cache and the same graph
        assert model.generate(ids, **options, compile_config=compiling).equal(plain)
        assert len(graphs) == 1
    plain = model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=60)
    chunked = model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=60, compile_config=compiling)
    assert chunked.equal(plain)
    assert len(graphs) > 1


def test_compiled_prompts_with_padding():
    model, ids = build(), tokens(2, 40)
    model.set_attn_implementation(NAME)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    step = torch.compile(model, fullgraph=True, backend="eager")
    plain, compiled = (BitDecodingCache(model.config, "kv8", max_tokens=64) for _ in range(2))
    with pytest.raises(Exception, match="early_initialization"):
        step(ids, attention_mask=mask, past_key_values=BitDecodingCache(model.config, "kv8", max_tokens=64))
    compiled.initialize(model, 2)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, past_key_values=plain).logits
        actual = step(ids, attention_mask=mask, past_key_values=compiled).logits
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1, 9:], expected[1, 9:])
        with pytest.raises(RuntimeError, match="padding on the left"):
            step(ids, attention_mask=1 - mask, past_key_values=compiled)


def test_layers_in_16_bit_are_exact():
    model, ids, sizes = build(), tokens(2, 400), [150, 1, 147, 99, 1, 1, 1]
    expected = feed(model, ids, DynamicCache(config=model.config), sizes)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, "16bit", max_tokens=400)
    assert (feed(model, ids, cache, sizes) - expected).std() < 1e-3 * expected.std()  # K and V are rounded to fp16
    assert cache.used_nbytes == 2 * 2 * 2 * 400 * 2 * 64 * 2


def test_saved_cache_goes_on_where_it_was(tmp_path):
    model, ids = build(), tokens(2, 320)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, QuantPolicy("kv4", {0: "16bit"}, recent=32), max_tokens=400)
    feed(model, ids[:, :300], cache, [300])
    cache.save(tmp_path / "prompt")
    loaded = BitDecodingCache.load(tmp_path / "prompt", model.config)
    assert loaded.policy == cache.policy
    assert int(loaded.get_seq_length()) == 300
    assert feed(model, ids[:, 300:], loaded, 1).equal(feed(model, ids[:, 300:], cache, 1))

    for layers, message in ((1, "more than 1 layers"), (3, "not a cache of 3 layers")):
        with pytest.raises(CacheFormatError, match=message):
            BitDecodingCache.load(tmp_path / "prompt", LlamaConfig(**SIZES | {"num_hidden_layers": layers}))
    for changed in ({"head_dim": 128}, {"num_key_value_heads": 4}):
        with pytest.raises(CacheFormatError, match="num_kv_heads=2, head_dim=64: the model has"):
            BitDecodingCache.load(tmp_path / "prompt", LlamaConfig(**SIZES | changed))
    cache.layers[1].kv.save(tmp_path / "prompt" / "layer-001.safetensors")  # 20 tokens more than layer 0 has
    with pytest.raises(CacheFormatError, match="layer-001.safetensors: not a layer of this cache"):
        BitDecodingCache.load(tmp_path / "prompt", model.config)
    (tmp_path / "prompt" / "policy.json").write_text('{"policy": {"default": "kv4"}, "length": 299}')
    with pytest.raises(CacheFormatError, match="length=299: a sequence has 300 tokens"):
        BitDecodingCache.load(tmp_path / "prompt", model.config)
    (tmp_path / "prompt" / "policy.json").write_text('{"policy": {"default": "kv2"}, "length": 300}')
    with pytest.raises(CacheFormatError, match="layer"):
        BitDecodingCache.load(tmp_path / "prompt", model.config)
    for length in ("NaN", "1e400", "true", "-1", "300.5", '"300"', "9" * 30):
        (tmp_path / "prompt" / "policy.json").write_text(f'{{"policy": {{"default": "kv4"}}, "length": {length}}}')
        with pytest.raises(CacheFormatError, match="policy.json: .*length="):
            BitDecodingCache.load(tmp_path / "prompt", model.config)
    with pytest.raises(CacheFormatError, match="policy.json"):
        BitDecodingCache.load(tmp_path / "nothing", model.config)


def test_arguments_of_other_types(tmp_path):
    model = build()
    cache = BitDecodingCache(model.config)
    attention = model.config._attn_implementation
    for call, message in (
        *((lambda x=x: enable(x), "model=") for x in (None, "kv4", model.config)),
        *((lambda x=x: BitDecodingCache(x), "config=") for x in (None, "kv4", model)),
        *((lambda x=x: enable(model, x), "quant=") for x in (None, 4, {}, [], ())),
        *((lambda x=x: enable(model, x), "quant has") for x in (("kv4",), ["kv4"] * 3)),
        *((lambda x=x: enable(model, x), "default=") for x in ("kv5", b"kv4", [1, 2])),
        *((lambda x=x: enable(model, "kv4", x), "max_tokens=") for x in (0, -1, True, 1.5, "1", 2**31)),
        *((lambda x=x: cache.save(x), "folder=") for x in (None, 1)),
        *((lambda x=x: BitDecodingCache.load(x, model.config), "folder=") for x in (None, 1)),
        (lambda: BitDecodingCache.load(tmp_path, None), "config="),
        *((lambda x=x: cache.layers[0].crop(x), "tokens_to_remove=") for x in (None, 1, -1.5, "1")),
    ):
        with pytest.raises(InvalidArgument, match=message):
            call()
    assert model.config._attn_implementation == attention


@pytest.mark.gpu
def test_a_thousand_tokens_on_the_gpu_are_those_of_the_cpu(tmp_path):
    """From the same cache bytes, the same text fed to both: logits within rounding, so that likeliest tokens agree
    wherever the two likeliest are farther apart."""
    model, ids = build(), tokens(2, 1000)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, "kv4", max_tokens=2100)
    feed(model, ids, cache, [1000])
    cache.save(tmp_path)
    twin = build().cuda()
    twin.set_attn_implementation(NAME)
    on_gpu = BitDecodingCache.load(tmp_path, model.config, "cuda")
    token, worst, margins = ids[:, :1], 0.0, 0
    with torch.no_grad():
        for _ in range(1000):
            expected = model(token, past_key_values=cache).logits[:, -1]
            actual = twin(token.cuda(), past_key_values=on_gpu).logits[:, -1].cpu()
            error = (actual - expected).abs().max().item()
            worst = max(worst, error)
            top = expected.topk(2).values
            same = actual.argmax(-1) == expected.argmax(-1)
            assert (same | (top[:, 0] - top[:, 1] < 2 * error)).all()
            margins += int((top[:, 0] - top[:, 1] >= 2 * error).sum())
            token = actual.argmax(-1, keepdim=True)
    assert worst < 0.02 * expected.std()
    assert margins > 1900, "hardly any token was decided"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reduce_overhead_on_the_gpu(family):
    """generate() compiles by itself on a GPU: CUDA graphs, and the same text as without."""
    model, ids = build(family).cuda(), tokens(2, 200).cuda()
    enable(model, "kv4")
    options = {"max_new_tokens": 100, "do_sample": False, "return_dict_in_generate": True}
    compiled = model.generate(ids, **options, compile_config=CompileConfig(fullgraph=True, mode="reduce-overhead"))
    plain = model.generate(ids, **options, disable_compile=True)
    compiled.past_key_values.sync()
    same = (compiled.sequences == plain.sequences)[:, 200:]
    assert same[:, :20].all(), "rounding alone does not change the text at once"
    assert same.float().mean() > 0.8


def test_too_many_compiled_steps_are_found_by_sync():
    """Steps that nobody awaits go on behind max_tokens while no block gets full; sync tells."""
    model, ids = build(), tokens(1, 40)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, "kv4", max_tokens=30)
    feed(model, ids[:, :29], cache, [29])
    cache.sync()
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for i in (29, 30):
            step(ids[:, i : i + 1], past_key_values=cache)
    with pytest.raises(OutOfPages, match="max_tokens=30"):
        cache.sync()
    enable(model, "kv4")
    with pytest.raises(OutOfPages, match="max_tokens=30"):
        model.generate(ids, max_new_tokens=2, past_key_values=BitDecodingCache(model.config, "kv4", max_tokens=30))


def test_beam_search():
    model, ids = build(), tokens(2, 150)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    enable(model, EIGHT_BIT)
    assert model.generate(ids, **options).equal(plain)


def test_bits_per_layer_and_memory():
    model, ids = build(), tokens(1, 300)
    model.set_attn_implementation(NAME)
    cache = BitDecodingCache(model.config, ["kv8", "kv2"], max_tokens=300)
    assert cache.nbytes == 0
    feed(model, ids, cache, [300])
    first, second = (layer.kv for layer in cache.layers)
    assert (first.quant.k_bits, second.quant.k_bits) == (8, 2)
    assert cache.nbytes == first.nbytes + second.nbytes
    cache.reset()
    logits = feed(model, ids, cache, [300])
    cache.reset()
    assert (cache.get_seq_length(), cache.used_nbytes) == (0, 0)
    assert feed(model, ids, cache, [300]).equal(logits)


class TestErrors:
    def test_arguments(self):
        config = CONFIGS["llama"]
        with pytest.raises(InvalidArgument, match="kv5"):
            BitDecodingCache(config, "kv5")
        with pytest.raises(InvalidArgument, match="2 layers"):
            BitDecodingCache(config, ["kv4"])
        with pytest.raises(InvalidArgument, match="kv5"):
            enable(build(), "kv5")

    def test_layers_of_other_kinds(self):
        config = LlamaConfig(**SIZES)
        config.layer_types = ["full_attention", "chunked_attention"]
        with pytest.raises(UnsupportedConfig, match="chunked_attention"):
            BitDecodingCache(config)

    def test_model_that_attends_twice(self):
        config = DiffLlamaConfig(**SIZES | {"num_key_value_heads": 4})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
        with pytest.raises(UnsupportedConfig, match="attends twice"):
            model(tokens(1, 8), past_key_values=BitDecodingCache(config))

    @pytest.mark.parametrize("max_tokens", [None, 0, 2.5])
    def test_capacity(self, max_tokens):
        config = BloomConfig(hidden_size=128, n_head=2, n_layer=2)  # without a maximum of positions
        with pytest.raises(InvalidArgument, match=f"max_tokens={max_tokens}: allowed are integers"):
            BitDecodingCache(config, "kv4", max_tokens)

    def test_model_that_attends_otherwise(self):
        model, ids = build(), tokens(1, 10)
        with pytest.raises(InvalidArgument, match="set_attn_implementation"):
            feed(model, ids, BitDecodingCache(model.config), [5, 5])

    def test_masks(self):
        model, ids = build(), tokens(1, 8)
        model.set_attn_implementation(NAME)
        with pytest.raises(UnsupportedConfig, match="padding on the left"):
            model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]))
        with pytest.raises(UnsupportedConfig, match="attention_mask"):
            model(ids, attention_mask=torch.zeros(1, 1, 8, 8))
        with pytest.raises(UnsupportedConfig, match="static"):
            model(ids, past_key_values=StaticCache(model.config, 32))

    def test_bidirectional_model(self):
        config = Gemma3TextConfig(**SIZES, use_bidirectional_attention=True)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
        with pytest.raises(UnsupportedConfig):
            model(tokens(1, 8), use_cache=False)

    @pytest.mark.parametrize("held", [0, 20])
    def test_refused_tokens_leave_the_cache_as_it_was(self, held):
        model, ids, more = build(), tokens(2, 20), tokens(2, 5, seed=5)
        model.set_attn_implementation(NAME)
        cache, fresh = (BitDecodingCache(model.config, max_tokens=30) for _ in range(2))
        for each in (cache, fresh):
            if held:
                feed(model, ids, each, [held])
        with pytest.raises(OutOfPages, match="max_tokens=30"):
            feed(model, tokens(2, 31 - held), cache, [31 - held])
        if held:
            with pytest.raises(InvalidArgument, match=r"key_states .* \[3, 2, 5, 64\]: allowed is \[batch_size=2"):
                feed(model, tokens(3, 5), cache, [5])
        assert int(cache.get_seq_length()) == held
        assert feed(model, more, cache, [5]).equal(feed(model, more, fresh, [5]))
