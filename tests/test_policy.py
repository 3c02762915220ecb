"""QuantPolicy: formats per layer, what stays in 16 bit, JSON."""

import pytest
import torch
from bitdecoding.cute_kernels.errors import InvalidArgument

import bitdecoding as bd
from bitdecoding.cli import main
from bitdecoding.quantization import CachePolicy

SPEC = bd.QuantSpec(k_bits=4, v_bits=2, k_group=64, v_group=32)


def test_resolve():
    policy = bd.QuantPolicy("k4v2", {0: "kv8", -1: "16bit", 2: SPEC})
    first, second, third, last = policy.resolve(4, 64)
    assert first == bd.preset("kv8", 64)
    assert second == bd.preset("k4v2", 64)
    assert third == (SPEC, CachePolicy(recent=64, sink_tokens=4))
    assert last[0] is None
    assert policy.name() == f"k4v2+1*16bit+1*{SPEC.name()}+1*kv8"


def test_overrides():
    policy = bd.QuantPolicy("kv4", {1: "kc4"}, sink_tokens=7, recent=3, hadamard=False)
    for spec, kept in policy.resolve(2, 128):
        assert kept == CachePolicy(recent=3, sink_tokens=7)
        assert (spec.rotate_k, spec.rotate_v) == (False, False)
    assert policy.resolve(2, 128)[0][0] is policy.resolve(2, 128)[0][0]


@pytest.mark.parametrize("policy", [
    bd.QuantPolicy(),
    bd.QuantPolicy(SPEC, {3: "kv2", -1: SPEC}, sink_tokens=0, recent=64, hadamard=True),
])  # fmt: skip
def test_json_and_files(policy, tmp_path):
    assert bd.QuantPolicy.from_json(policy.to_json()) == policy
    policy.save(tmp_path / "policy.json")
    assert bd.QuantPolicy.load(tmp_path / "policy.json") == policy


def test_of():
    assert bd.QuantPolicy.of("kv2") == bd.QuantPolicy("kv2")
    assert bd.QuantPolicy.of((SPEC, CachePolicy(5, 6))) == bd.QuantPolicy(SPEC, sink_tokens=6, recent=5)
    assert bd.QuantPolicy.of(["kv4", "16bit"]).resolve(2, 64)[1][0] is None
    policy = bd.QuantPolicy("kv8")
    assert bd.QuantPolicy.of(policy) is policy


@pytest.mark.parametrize("name", ["kv8", "kv4", "kv2"])
def test_bits_are_those_of_a_cache(name):
    tokens = 1000
    spec, kept = bd.preset(name, 64)
    cache = bd.KVCache(batch_size=1, max_tokens=tokens, num_kv_heads=2, head_dim=64, quant=spec, **vars(kept))
    cache.append(*torch.zeros(2, 1, tokens, 2, 64, dtype=torch.float16))
    bits = cache.used_nbytes * 8 / (2 * tokens * 2 * 64)
    assert bd.QuantPolicy(name).bits_per_value(30, 64, tokens) == pytest.approx(bits)
    mixed = bd.QuantPolicy(name, {0: "16bit"}).bits_per_value(2, 64, tokens)
    assert mixed == pytest.approx((bits + 16) / 2)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"default": "kv5"}, "default='kv5'"),
    ({"layers": {0: "kv5"}}, "kv5"),
    ({"layers": {"0": "kv4"}}, "layers="),
    ({"layers": ["kv4"]}, "layers="),
    ({"sink_tokens": -1}, "sink_tokens=-1"),
    ({"recent": 1.5}, "recent=1.5"),
    ({"hadamard": "yes"}, "hadamard='yes'"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        bd.QuantPolicy(**arguments)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"default": "kv4", "colour": 1}', '{"default": {"k_bits": 5}}',
    '{"default": "kv4", "layers": {"x": "kv4"}}', '{"default": "kv4", "layers": [1]}', '{"default": 4}',
    "[" * 100_000, b"\xff\xfe",
])  # fmt: skip
def test_bad_json(text):
    with pytest.raises(InvalidArgument):
        bd.QuantPolicy.from_json(text)


def test_files_and_command_lines(tmp_path, capsys):
    (tmp_path / "policy.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match=r"policy\.json: QuantPolicy=.*: not JSON"):
        bd.QuantPolicy.load(tmp_path / "policy.json")
    with pytest.raises(InvalidArgument, match="allowed changes"):
        bd.QuantPolicy.parse("kv4:recent=²")
    assert main(["eval", "--policies", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_layers_that_do_not_exist():
    with pytest.raises(InvalidArgument, match="4 layers"):
        bd.QuantPolicy("kv4", {4: "kv8"}).resolve(4, 64)
    with pytest.raises(InvalidArgument, match="list"):
        bd.QuantPolicy.of(5)
