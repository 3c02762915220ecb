"""bench-model on a CPU, with a tiny model: the whole command, and its arithmetic."""

import argparse
import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bitdecoding.cute_kernels.errors import InvalidArgument
from torch._inductor.utils import run_and_get_code
from transformers import LlamaConfig

from bitdecoding import QuantPolicy, bench_model


def arguments(*words):
    parser = argparse.ArgumentParser()
    bench_model.add_arguments(parser)
    return parser.parse_args(["--shape", "tiny", "--device", "cpu", *words])


def test_command(tmp_path, capsys):
    words = ("--lengths", "300", "--policies", "kv4", "--batches", "2", "--compile", "no", "--steps", "1")
    words += ("--searches", "2", "--inductor", "combo_kernels", "realize_opcount_threshold=4")
    assert bench_model.run(arguments(*words, "--out", str(tmp_path / "new"))) == 0
    report = json.loads((tmp_path / "new" / "bench-model.json").read_text())
    assert [row["candidate"] for row in report["rows"]] == ["transformers", "sdpa", "kv4"]
    assert report["inductor"] == ["combo_kernels", "realize_opcount_threshold=4"]
    assert not torch._inductor.config.combo_kernels
    plain, _, ours = report["rows"]
    assert plain["bits_per_value"] == pytest.approx(32, rel=0.01)  # the model is fp32 on a CPU
    policy = QuantPolicy("kv4")
    assert ours["bits_per_value"] == pytest.approx(policy.bits_per_value(2, 64, 300))
    assert all(len(row["searches_ms"]) == 2 and row["ms"] == min(row["searches_ms"]) for row in report["rows"])
    assert all(row["ms"] > 0 and row["over_floor"] > 1 for row in report["rows"])
    config = LlamaConfig(**bench_model.SHAPES["tiny"])
    assert plain["cache_bytes"] == 2 * 2 * bench_model.sequence_bytes(config, None, 300 + bench_model.ROOM)
    bookkeeping = ours["cache_bytes"] - 2 * bench_model.sequence_bytes(config, policy, 300 + bench_model.ROOM)
    assert 0 <= bookkeeping < 2000  # table and lengths
    assert (tmp_path / "new" / "bench-model.png").read_bytes().startswith(b"\x89PNG")
    assert "kv4" in capsys.readouterr().out


@torch.no_grad()
def test_steps_are_the_models():
    """A filled cache's step, layer by layer and as a whole, is what the model gives."""
    torch.manual_seed(0)
    model = bench_model.random_model(LlamaConfig(**bench_model.SHAPES["tiny"]), torch.device("cpu"))
    model.set_attn_implementation("bitdecoding")
    tokens, results = 300, []
    for how in ("no", "layer"):
        cache = bench_model.filled_cache(model, QuantPolicy("kv4"), 2, tokens)
        torch.manual_seed(1)
        for layer in cache.layers:
            for x in (layer.kv.tail_k, layer.kv.tail_v, layer.kv.sink_k, layer.kv.sink_v):
                x.normal_()
        step = bench_model.Step(model, cache, 2, tokens, how)
        _, code = run_and_get_code(step)
        step()
        assert cache.layers[1].kv.seqlens.tolist() == [302, 302]
        assert int(step.position) == 302
        results.append(step.ids)
    assert results[0].equal(results[1])
    # one kernel appends and attends, in each layer
    layers = [re.findall(r"torch\.ops\.bitdecoding\.(\w+)\.default\(|\b(cpp_fused_\w+)\(", text) for text in code]
    calls = [[op or "kernel" for op, _ in layer] for layer in layers if any(op for op, _ in layer)]
    assert len(calls) == 1  # one compiled layer serves all
    for order in calls:
        assert [op for op in order if op != "kernel"] == ["step"]
        assert order.count("kernel") > 2


@pytest.mark.parametrize(("words", "message"), [
    (("--batches", "largest"), "needs a GPU"),
    (("--batches", "0"), "--batches 0"),
    (("--policies", "kv5"), "kv5"),
    (("--steps", "1000"), "--steps 1000"),
    (("--steps", "40", "--searches", "3"), "--steps 40: with --searches 3 allowed are 1 to 27"),
    (("--inductor", "combos"), "--inductor combos"),
    (("--inductor", "max_fusion_size"), "--inductor max_fusion_size"),
    (("--inductor", "combo_kernels=1"), "--inductor combo_kernels=1"),
    (("--inductor", "max_fusion_size=x"), "--inductor max_fusion_size=x"),
    (("--inductor", "trace.debug_dir=3"), "--inductor trace.debug_dir=3"),
])  # fmt: skip
def test_bad_arguments(words, message):
    with pytest.raises(InvalidArgument, match=message):
        bench_model.run(arguments("--batches", "1", *words))
