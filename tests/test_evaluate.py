"""eval and calibrate, on a tiny model with random weights: no downloads."""

import argparse
import itertools
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bitdecoding.cute_kernels.errors import InvalidArgument
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bitdecoding import QuantPolicy, calibrate, evaluate
from bitdecoding.integrations.transformers import NAME, BitDecodingCache


class Tokenizer:
    """One token per character."""

    def __call__(self, text, return_tensors, add_special_tokens=True):
        return argparse.Namespace(input_ids=torch.tensor([[ord(c) % 128 for c in text]]))

    def batch_decode(self, ids):
        return ["".join(map(chr, row)) for row in ids.tolist()]


def build(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def tokens(*shape, seed=1):
    return torch.randint(128, shape, generator=torch.Generator().manual_seed(seed))


def arguments(*words):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(words)


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, "load_model", lambda device, dtype, name: (build(), Tokenizer()))
    monkeypatch.setattr(evaluate, "CALIBRATION_TOKENS", 1024)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, words in zip(files, ("Whereof one cannot speak, ", "thereof one must be silent. "), strict=True):
        file.write_text(words * 100)
    out = tmp_path / "new"
    words = (
        "--policies",
        "kv8",
        "kv2:recent=32",
        "--calibrate",
        "6.5:recent=16",
        "--tokens",
        "512",
        "--skip",
        "256",
        "--needle",
        "300",
    )
    words += ("--generate", "20", "--device", "cpu", "--out", str(out), "--text", *map(str, files))
    assert evaluate.run(arguments(*words)) == 0

    report = json.loads((out / "eval.json").read_text())
    names = ["16-bit", "kv8", "kv2:recent=32", "calibrated 6.5:recent=16"]
    assert list(dict.fromkeys(row["policy"] for row in report["rows"])) == names
    rows = {(row["policy"], row["text"]): row for row in report["rows"]}
    assert rows["16-bit", "one.txt"]["kl"] == rows["16-bit", "mean"]["change"] == 0
    kv8, kv2, found = (rows[name, "mean"] for name in names[1:])
    assert 0 < kv8["kl"] < 1e-3 < kv2["kl"]
    assert kv8["top1"] > kv2["top1"]
    assert abs(kv8["change"]) < 0.01
    assert kv2["change"] == pytest.approx(
        (rows[names[2], "one.txt"]["change"] + rows[names[2], "two.txt"]["change"]) / 2
    )
    assert kv2["bits_per_value"] == pytest.approx(QuantPolicy("kv2", recent=32).bits_per_value(3, 64, 512))
    assert kv2["bits_per_value"] < found["bits_per_value"] <= 6.5
    assert found["kl"] < kv2["kl"]
    assert QuantPolicy.load(out / "calibrated-6.5-recent=16.json").recent == 16
    assert set(report["needle"]) == set(report["generation"]) == set(names)
    assert all(judged["perplexity"] > 1 for judged in report["generation"].values())
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert "kv2:recent=32" in capsys.readouterr().out


@torch.no_grad()
def test_scores_are_those_of_single_steps():
    """Perplexity, KL and agreement in chunks are what a decode step by step gives, for mixed policies too."""
    model, ids = build(), tokens(2, 500)
    first = 300
    plain = model(ids).logits.log_softmax(-1)[:, first:-1]
    reference = evaluate.score(
        model, ids, DynamicCache(config=model.config), [0, 200, 500], first, None, evaluate.tqdm(disable=True)
    )
    loss = torch.nn.functional.cross_entropy(plain.flatten(0, 1), ids[:, first + 1 :].flatten())
    assert reference.loss.mean() == pytest.approx(loss.item(), rel=1e-4)

    model.set_attn_implementation(NAME)
    policy = QuantPolicy("kv2", {1: "kv8", 2: "16bit"}, recent=20)
    cache, stepped = (BitDecodingCache(model.config, policy, max_tokens=500) for _ in range(2))
    bounds = evaluate.chunk_bounds(cache, 500)
    assert {16 + 20 + 127, 16 + 20 + 128, 4 + 20 + 127 + 128} <= set(bounds)
    scores = evaluate.score(model, ids, cache, bounds, first, reference, evaluate.tqdm(disable=True))
    start = bounds[1]
    logits = [model(ids[:, :start], past_key_values=stepped).logits]
    for i in range(start, 500):
        logits.append(model(ids[:, i : i + 1], past_key_values=stepped).logits)
    here = torch.cat(logits, dim=1).log_softmax(-1)[:, first:-1]
    kl = (plain.exp() * (plain - here)).sum(-1)
    assert scores.kl.mean() > 1e-4
    torch.testing.assert_close(scores.kl, kl, atol=3e-3, rtol=0.05)  # the reference is stored in 16 bit
    assert scores.same.mean() == pytest.approx((plain.argmax(-1) == here.argmax(-1)).float().mean().item(), abs=0.01)


def test_standard_errors():
    values = torch.randn(4, 8 * 128, generator=torch.Generator().manual_seed(0))
    mean, error = evaluate._mean(values + 3)
    assert mean == pytest.approx(3, abs=0.1)
    assert error == pytest.approx(1 / math.sqrt(values.numel()), rel=0.3)
    neighbours = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(128, dim=1)
    assert evaluate._mean(neighbours)[1] == pytest.approx(1 / math.sqrt(32), rel=0.3)


def test_a_needle_is_found_by_a_model_that_copies(monkeypatch):
    """What counts as found, with a model that answers rightly for some rows."""
    model = build()
    monkeypatch.setattr(evaluate, "NEEDLE_NUMBERS", ("7", "8"))
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", 1)

    def answers_seven(ids, **kwargs):
        logits = torch.zeros(ids.shape[0], 1, 128)
        logits[:, :, ord("7")] = 1
        return argparse.Namespace(logits=logits)

    answers_seven.config = model.config
    assert evaluate.find_needle(answers_seven, Tokenizer(), tokens(500), 300, QuantPolicy("kv4")) == 0.5
    with pytest.raises(InvalidArgument, match="--needle 5000"):
        evaluate.find_needle(answers_seven, Tokenizer(), tokens(500), 5000, QuantPolicy("kv4"))


class TestCalibrate:
    def test_layers_that_matter_get_the_bits(self):
        model, ids = build(), tokens(2, 1024)
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight *= 0.01  # what this layer attends to hardly matters
        attention = model.config._attn_implementation
        policy = calibrate.calibrate(model, ids, 3.3, tokens=8192, recent=16, progress=False)
        assert model.config._attn_implementation == attention
        formats = [policy.layers.get(i, policy.default) for i in range(3)]
        assert formats[1] == "kv2"
        assert formats.count("kv2") < 3
        assert policy.bits_per_value(3, 64, 8192) <= 3.3
        assert policy.recent == 16

    def test_choice_is_the_best(self):
        """Against all combinations, for prices that fall with the size."""
        generator = torch.Generator().manual_seed(3)
        sizes = {"kv2": 2.0, "kv4": 4.0, "kv8": 8.0}
        prices = []
        for scale in torch.rand(4, generator=generator).tolist():
            prices.append({"kv2": scale, "kv4": scale / 10, "kv8": scale / 1000})
        for budget in (8, 10, 14, 32):
            chosen = calibrate.choose(prices, sizes, budget)
            assert sum(map(sizes.get, chosen)) <= budget
            cost = sum(row[wanted] for row, wanted in zip(prices, chosen, strict=True))
            best = min(
                sum(row[wanted] for row, wanted in zip(prices, every, strict=True))
                for every in itertools.product(sizes, repeat=4)
                if sum(map(sizes.get, every)) <= budget
            )
            assert cost <= 1.2 * best

    def test_bad_arguments(self):
        with pytest.raises(InvalidArgument, match="the smallest of the formats takes"):
            calibrate.calibrate(build(), tokens(1, 1024), 2.0, formats=["kv2"], progress=False)
        with pytest.raises(InvalidArgument, match="ids is"):
            calibrate.calibrate(build(), tokens(1, 100), 4.0)
        with pytest.raises(InvalidArgument, match="formats is empty"):
            calibrate.calibrate(build(), tokens(1, 1024), 4.0, formats=[])

    def test_a_failure_leaves_the_model_as_it_was(self):
        model = build()
        attention = model.config._attn_implementation
        with pytest.raises(IndexError):  # ids of another vocabulary
            calibrate.calibrate(model, tokens(1, 1024) + 10**6, 4.0, progress=False)
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize(("words", "message"), [
    (("--policies", "kv5"), "kv5"),
    (("--policies", "kv4:colour=red"), "colour=red"),
    (("--calibrate", "few"), "--calibrate few"),
])  # fmt: skip
def test_bad_arguments(words, message):
    with pytest.raises(InvalidArgument, match=message):
        evaluate.run(arguments(*words, "--device", "cpu"))


def test_short_texts(monkeypatch):
    with pytest.raises(InvalidArgument, match="9 tokens"):
        evaluate.cut(tokens(9), "poem", 300, 1)
