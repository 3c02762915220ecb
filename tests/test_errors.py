"""Bad arguments of the public functions: a typed error names the argument. Those of commands: test_cli_errors.py."""

import math

import pytest
import torch
from bitdecoding.cute_kernels.layouts import HEAD_DIMS

import bitdecoding as bd
from bitdecoding import ops

HEAD_DIM = 64
SPEC, _ = bd.preset("kc4", HEAD_DIM)
INT32 = {"dtype": torch.int32}
NO_INTEGERS = (None, True, 1.0, "1", [1], 2**31, 2**70, math.nan, torch.tensor(1))
NO_SPECS = (None, True, 4, 4.0, "kv4", "", "[]", b"{}", {}, [], {"k_bits": 4}, torch.zeros(1))
NO_NUMBERS = (True, "1", [1.0], math.nan, math.inf, -math.inf, -1.0, 2**70, torch.tensor(1.0))
NO_TENSORS = (3, 1.5, "x", [1], {}, torch.float16)


def fp16(*shape):
    return torch.zeros(*shape, dtype=torch.float16)


def pages(count=4):
    return torch.zeros(count, 2, bd.block_bytes(HEAD_DIM, SPEC), dtype=torch.uint8)


def decode(**changes):
    lens = torch.zeros(2, **INT32)
    sound = {"q": fp16(2, 1, 4, HEAD_DIM), "pages": pages(), "block_table": torch.zeros(2, 2, **INT32), "seqlens": lens}
    return bd.decode(**sound | {"spec": SPEC} | changes)


def append(**changes):
    new, tail = fp16(2, 3, 2, HEAD_DIM), fp16(2, 140, 2, HEAD_DIM)
    sound = {"k_new": new, "v_new": new, "pages": pages(), "block_table": torch.zeros(2, 2, **INT32)}
    sound |= {name: torch.zeros(2, **INT32) for name in ("seqlens", "packed_lens")}
    return bd.append(**sound | {"tail_k": tail, "tail_v": tail.clone(), "spec": SPEC} | changes)


def step(**changes):
    new, tail = fp16(2, 1, 2, HEAD_DIM), fp16(2, 140, 2, HEAD_DIM)
    sound = {"q": fp16(2, 1, 4, HEAD_DIM), "k_new": new, "v_new": new, "pages": pages()}
    sound |= {name: torch.zeros(2, **INT32) for name in ("seqlens", "packed_lens")}
    sound |= {"block_table": torch.zeros(2, 2, **INT32), "tail_k": tail, "tail_v": tail.clone(), "spec": SPEC}
    try:
        return bd.step(**sound | changes)
    finally:
        assert not any(isinstance(x, torch.Tensor) and x.any() for x in (sound["pages"], sound["packed_lens"]))
        assert not sound["seqlens"].any()


def quantize(**changes):
    return bd.quantize(**{"k": fp16(130, 2, HEAD_DIM), "v": fp16(130, 2, HEAD_DIM), "spec": SPEC} | changes)


def cache(**changes):
    sizes = {"batch_size": 2, "max_tokens": 300, "num_kv_heads": 2, "head_dim": HEAD_DIM, "quant": SPEC}
    return bd.KVCache(**sizes | changes)


def for_problem(**changes):
    sizes = {"head_dim": 128, "quant": bd.QuantSpec(), "num_q_heads": 32, "num_kv_heads": 8, "arch": "sm90a"}
    return bd.KernelConfig.for_problem(**sizes | changes)


CASES = [  # (function, argument, values)
    (decode, "q", (None, *NO_TENSORS)),
    *((decode, name, (None, *NO_TENSORS)) for name in ("pages", "block_table", "seqlens")),
    *((decode, name, NO_TENSORS) for name in ("packed_lens", "tail_k", "sink_v", "sink_logits", "out", "workspace")),
    (decode, "spec", NO_SPECS),
    (decode, "softmax_scale", (*NO_NUMBERS, 0.0)),
    (decode, "softcap", (*NO_NUMBERS, False, "", [], 1e-60)),
    (decode, "window", (*NO_INTEGERS[1:], 0, -1, math.inf)),
    (decode, "config", (True, "sm90a", {}, SPEC)),
    *((append, name, (None, *NO_TENSORS)) for name in ("k_new", "v_new", "pages", "tail_k", "packed_lens")),
    *((append, name, NO_TENSORS) for name in ("sink_k", "lengths", "status", "workspace")),
    (append, "spec", NO_SPECS),
    (append, "recent", (*NO_INTEGERS, -1)),
    *((step, name, (None, *NO_TENSORS)) for name in ("q", "k_new", "v_new", "pages", "block_table", "seqlens")),
    *((step, name, (None, *NO_TENSORS)) for name in ("packed_lens", "tail_k", "tail_v")),
    *((step, name, NO_TENSORS) for name in ("sink_k", "sink_v", "sink_logits", "status", "out", "workspace")),
    (step, "spec", NO_SPECS),
    (step, "recent", (*NO_INTEGERS, -1)),
    (step, "softmax_scale", (*NO_NUMBERS, 0.0)),
    (step, "softcap", (*NO_NUMBERS, False, "", [], 1e-60)),
    (step, "window", (*NO_INTEGERS[1:], 0, -1, math.inf)),
    (step, "config", (True, "sm90a", {}, SPEC, bd.KernelConfig())),
    *((quantize, name, (None, *NO_TENSORS)) for name in ("k", "v")),
    (quantize, "spec", NO_SPECS),
    *((cache, name, (*NO_INTEGERS, 0, -1)) for name in ("batch_size", "max_tokens", "num_kv_heads")),
    *((cache, name, (*NO_INTEGERS, -1)) for name in ("recent", "sink_tokens")),
    (cache, "head_dim", (*NO_INTEGERS, "128", 0, 80, 64.0)),
    (cache, "quant", NO_SPECS),
    (cache, "dtype", (None, "float16", torch.float64, torch.zeros(2))),
    (cache, "device", (None, True, 1.5, "meta", "gpu", "cuda:99", [])),
    (cache, "workspace", NO_TENSORS),
    *((for_problem, name, (*NO_INTEGERS, 0)) for name in ("head_dim", "num_q_heads", "num_kv_heads", "q_len")),
    (for_problem, "kind", (None, True, 1, "steps", "append", "merge", [])),
    (for_problem, "quant", NO_SPECS),
    (bd.preset, "name", (None, 4, "kv5", "KV4", [], {}, torch.zeros(2))),
    (lambda head_dim: bd.preset("kv4", head_dim), "head_dim", (*NO_INTEGERS, 0, 32, 80, 128.0)),
    (lambda head_dim: bd.block_bytes(head_dim, SPEC), "head_dim", (*NO_INTEGERS, 0, 64.0)),
    (bd.hadamard, "x", (None, *NO_TENSORS, torch.tensor(1.0), torch.zeros(2, 0), torch.zeros(2, **INT32))),
    (bd.rotate, "x", (None, *NO_TENSORS, torch.zeros(2, 0))),
    (lambda outs: bd.merge(outs, torch.zeros(2, 3)), "outs", (None, 3, torch.tensor(1.0), [1, 2], [None, None])),
    (lambda lses: bd.merge(torch.zeros(2, 3, 64), lses), "lses", (None, 3, torch.tensor(1.0), [1, 2])),
    (lambda device: ops.workspace(device, 64), "device", (None, "meta", "gpu")),
    (lambda head_dim: ops.workspace("cpu", head_dim), "head_dim", (*NO_INTEGERS, 0)),
    (bd.CachePolicy, "recent", (*NO_INTEGERS, -1)),
    (bd.QuantPolicy, "default", (None, 4, [], {}, "kv5")),
    (bd.QuantPolicy, "layers", ([], "x", {True: "kv4"}, {"0": "kv4"}, {0: None}, {0: []})),
    (bd.QuantPolicy, "sink_tokens", (*NO_INTEGERS[1:], -1)),
    (bd.QuantPolicy, "hadamard", (0, 1, "on", torch.tensor(1))),
    *((bd.QuantSpec, name, (*NO_INTEGERS, 3)) for name in ("k_bits", "v_group")),
    *((bd.QuantSpec, name, (None, 0, 1, "yes", [])) for name in ("k_symmetric", "rotate_v")),
    *((bd.QuantSpec, name, (None, 0, [], "x", "\ud800")) for name in ("k_axis", "k_mean")),
    (bd.QuantSpec, "v_clip", (None, True, [], "x", 0, 2, math.nan, 2**70)),
    *((bd.KernelConfig, name, NO_INTEGERS) for name in ("head_dim", "stages", "ctas_per_sm")),
    (bd.KernelConfig, "quant", NO_SPECS),
    (bd.KernelConfig, "arch", (None, 90, [], "\ud800")),
]


@pytest.mark.parametrize(("function", "argument", "values"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_argument_is_named(function, argument, values):
    for value in values:
        with pytest.raises(bd.InvalidArgument, match=argument):
            function(**{argument: value})


@pytest.mark.parametrize("head_dim", [0, 1, 48, 80, 512])
def test_other_head_dims(head_dim):
    assert head_dim not in HEAD_DIMS
    x = fp16(3, 2, head_dim)
    new = fp16(2, 1, 2, head_dim)
    for call in (
        lambda: decode(q=fp16(2, 1, 4, head_dim)),
        lambda: quantize(k=x, v=x),
        lambda: step(q=fp16(2, 1, 4, head_dim), k_new=new, v_new=new),
    ):
        with pytest.raises(bd.InvalidArgument, match=f"head_dim={head_dim}: allowed are 64, 96, 128, 256"):
            call()


def test_tables_wider_than_a_sequence_can_be():
    table = torch.zeros(1, 1, **INT32).expand(2, 1 << 24)
    for call in (
        lambda: append(block_table=table),
        lambda: step(block_table=table),
        lambda: quantize(pages=pages(), block_table=table[:1]),
        lambda: decode(block_table=table.contiguous()),
    ):
        with pytest.raises(bd.InvalidArgument, match="max_pages=16777216: allowed are .*0 to 16777215"):
            call()


def test_strides_whose_products_have_no_room():
    wide = pages(1).as_strided((1, 2, pages().shape[2]), (2**62, pages().shape[2], 1))
    with pytest.raises(bd.InvalidArgument, match=f"page_stride_bytes={2**62}: allowed are multiples of 16 from 0 to"):
        decode(pages=wide)
    empty = torch.empty_strided((0, 2, 4, HEAD_DIM), (2**62, 2**62, 2**62, 1), dtype=torch.float16)
    with pytest.raises(bd.InvalidArgument, match="q: strides .* must be contiguous"):
        decode(q=empty)


NO_FIELDS = {
    bd.QuantSpec: [
        *('"k_bits": "4"', '"k_bits": 4.5', '"k_bits": true', '"k_bits": [4]', '"k_clip": {"a": []}', '"k_clip": NaN'),
        *('"rotate_k": 1', '"k_axis": null', '"evil": 1'),
    ],
    bd.KernelConfig: [
        *('"head_dim": 1e400', '"head_dim": {"a": 1}', '"quant": null', '"quant": "kv4"', '"quant": []'),
        *('"quant": {"quant": {}}', '"quant": {"k_bits": {}}', '"arch": "\\ud800"', f'"stages": {"9" * 30}'),
    ],
    bd.QuantPolicy: [
        *('"default": []', '"default": {"k_bits": "4"}', '"default": "kv5"', '"layers": {"0": "kv4"}'),
        *(
            f'"default": "kv4", {more}'
            for more in (
                *('"layers": []', '"layers": {"1_0": "kv4"}', '"layers": {"+1": "kv4"}', '"layers": {"0": {"a": 1}}'),
                *('"recent": 1.5', '"recent": true', f'"recent": {"9" * 20}', '"hadamard": 1', '"evil": 1'),
            )
        ),
    ],
}


@pytest.mark.parametrize("kind", NO_FIELDS)
def test_json_of_other_types(kind):
    texts = ["", "1", "null", "[]", '"kv4"', "{", "[" * 100_000, "9" * 5000, "\0", "\ud800", b"\xff"]
    for text in [*texts, *(f"{{{fields}}}" for fields in NO_FIELDS[kind])]:
        with pytest.raises(bd.InvalidArgument):
            kind.from_json(text)
    for value in (None, 1, {}, []):
        with pytest.raises(bd.InvalidArgument, match="allowed is str or bytes"):
            kind.from_json(value)


def test_paths():
    held = cache()
    for call in (held.save, bd.KVCache.load, bd.QuantPolicy("kv4").save, bd.QuantPolicy.load):
        for value in (None, 1, [], b"x"):
            with pytest.raises(bd.InvalidArgument, match="path="):
                call(value)
    with pytest.raises(bd.InvalidArgument, match="path='/none/cache': cannot be written"):
        held.save("/none/cache")
    with pytest.raises(bd.CacheFormatError, match="/dev: is not a file"):
        bd.KVCache.load("/dev")


def test_numbers_of_tokens():
    held = cache()
    for call, name in ((held.truncate, "lengths"), (held.reserve, "new_tokens"), (held.packs, "new_tokens")):
        for value in (True, 1.0, "1", None):
            with pytest.raises(bd.InvalidArgument, match=name):
                call(value)
    policy = bd.QuantPolicy("kv4")
    for sizes in ((0, 64, 1), (2, 80, 1), (2, 64, 0), (True, 64, 1), (2, 64, 1.5)):
        with pytest.raises(bd.InvalidArgument, match="num_layers|head_dim|tokens"):
            policy.bits_per_value(*sizes)
    for text in ("kv4:recent=1:recent=2", "kv4:sinks=99999999999", "kv4:recent=-1", "kv4:", "", 5):
        with pytest.raises(bd.InvalidArgument):
            bd.QuantPolicy.parse(text)
