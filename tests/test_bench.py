"""`bitdecoding bench` on the CPU: small shapes, suites, the table, the JSON, the plots, the rivals, the errors."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import types

import pytest
import torch
from attention_reference import attention

import bitdecoding as bd
from bitdecoding import bench, candidates, timing
from bitdecoding.candidates import LowBitCache, Rivals, Shape
from bitdecoding.cli import main

CPU = torch.device("cpu")
SMALL = ["bench", "--device", "cpu", "--rounds", "2", "--head-dim", "64", "--ceiling", "10"]


def test_the_table_and_the_json(tmp_path, capsys) -> None:
    out = tmp_path / "bench.json"
    assert main([*SMALL, "--shapes", "1,8,2,300;2,4,4,256", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "cpu, read bandwidth 10.0 GB/s"
    assert "vs sdpa" in lines[1]
    assert len(lines) == 2 + 2 * 4 + 4
    assert lines[-1].startswith("kc2 against sdpa fp32: ")
    report = json.loads(out.read_text())
    assert report["head_dim"] == 64
    assert report["left_out"] == []
    rows = report["rows"]
    assert [row["candidate"] for row in rows] == ["kc4", "kc2", "sdpa", "sdpa fp32"] * 2
    for row in rows:
        assert row["us"] == row["plain_us"] > 0
        assert row["host_us"] is None
        assert row["gb_per_s"] == pytest.approx(row["cache_bytes"] / row["us"] / 1e3)
        assert row["percent_of_read"] == pytest.approx(10 * row["gb_per_s"])
    for first in (0, 4):
        *ours, half, single = rows[first : first + 4]
        for row in ours:
            assert 0 < row["error"] < 1e-3
            assert row["ratios"] == {"sdpa": half["us"] / row["us"], "sdpa fp32": single["us"] / row["us"]}
        assert single["cache_bytes"] == 2 * half["cache_bytes"]
        for row in (half, single):
            assert row["error"] is None
            assert row["ratios"] == {}
    assert [rows[0][key] for key in ("shape", "batch", "tokens")] == ["1, 8/2, 300", 1, 300]

    assert main(["bench", "--load", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_writes(tmp_path, capsys) -> None:
    """Quantising, appending and steps: their rows and table; a reset makes every append do the same."""
    out = tmp_path / "bench.json"
    assert main([*SMALL, "--suite", "write", "--presets", "kc4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["rows"] == []
    rows = {row["operation"]: row for row in report["writes"]}
    appends = ["append, no block full", "append, every block full"]
    steps = ["decode", "append + decode", "step"]
    assert list(rows) == ["quantize", *appends, *steps, *(f"{name}, mean of 128" for name in steps)]
    for row in rows.values():
        assert row["us"] == row["plain_us"] > 0
        assert row["candidate"] == "kc4"
    for name in list(rows)[:3]:
        row = rows[name]
        assert row["gb_per_s"] == pytest.approx(row["nbytes"] / row["us"] / 1e3)
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / report["copy_gb_per_s"])
    tokens, heads = 1024, 2
    assert rows["quantize"]["nbytes"] == tokens * heads * 4 * 64 + 8 * heads * bd.block_bytes(
        64, bd.preset("kc4", 64)[0]
    )
    assert all(name in printed for name in rows)
    assert main(["bench", "--load", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_a_report_is_written_after_every_shape(tmp_path, monkeypatch) -> None:
    out = tmp_path / "folder" / "bench.json"
    measure = bench.measure

    def fails_at_the_second(found, *args):
        if found[0].cache_bytes > 100_000:
            raise KeyboardInterrupt
        return measure(found, *args)

    monkeypatch.setattr(bench, "measure", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--shapes", "1,2,2,100;1,2,2,2000", "--out", str(out)])
    assert {row["tokens"] for row in json.loads(out.read_text())["rows"]} == {100}


def test_a_report_that_cannot_be_written_is_known_before_measuring(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delattr(bench, "measure_shape")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "a.json"):
        assert main([*SMALL, "--shapes", "1,2,2,100", "--out", str(out)]) == 2
        assert f"--out {out}" in capsys.readouterr().err


def test_suites() -> None:
    for suite in bench.SUITES:
        for cuda in (False, True):
            shapes = bench.shapes_of(suite, cuda)
            assert len(set(shapes)) == len(shapes)
            assert cuda or max((sum(shape.lengths) for shape in shapes), default=0) <= bench.MAX_CPU_TOKENS
    lengths = bench.shapes_of("length", True)
    batches = bench.shapes_of("batch", True)
    for heads in ((32, 8), (32, 32)):
        assert [s.tokens for s in lengths if s[1:3] == heads] == [1, 16, 128, 512, *(1024 << i for i in range(8))]
        assert [s.batch for s in batches if s[1:3] == heads and s.tokens == 8192] == [1, 2, 4, 8, 16, 32, 64]


def test_sweeps_are_drawn(tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "a.json"
    monkeypatch.setattr(bench, "LENGTHS", (1, 130, 300))
    monkeypatch.setattr(bench, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(bench, "BATCH_TOKENS", {False: (40,)})
    monkeypatch.setattr(bench, "HEADS", ((4, 2), (2, 2)))
    assert main([*SMALL, "--suite", "length", "batch", "--out", str(out), "--plot"]) == 0
    for name in ("a-length.png", "a-batch.png"):
        assert f"wrote {tmp_path / name}" in capsys.readouterr().out or name == "a-batch.png"
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report = bench.Report.from_json(out.read_text())
    panels = bench.sweeps(report.rows, "tokens")
    assert list(panels) == ["4/2 heads, batch 1", "2/2 heads, batch 1"]
    assert {row.tokens for row in panels["2/2 heads, batch 1"]} == {1, 40, 130, 300}
    panels = bench.sweeps(report.rows, "batch")
    assert list(panels) == ["4/2 heads, 40 tokens", "2/2 heads, 40 tokens"]
    # none of it beyond an axis, wherever in the row the extremes are
    for row in report.rows:
        row.ratios = dict.fromkeys(row.ratios, 8 * row.batch / row.num_q_heads)
    for axes in bench.draw(panels, "batch").axes:
        low, high = axes.get_ylim()
        points = [y for line in axes.lines for y in line.get_ydata()]
        assert low <= min(points) <= max(points) <= high
        assert len(points) > 2
    (tmp_path / "a-length.png").unlink()
    assert main(["bench", "--load", str(out), "--plot"]) == 0
    assert (tmp_path / "a-length.png").is_file()


def test_a_plot_needs_a_place_and_matplotlib(monkeypatch, capsys, tmp_path) -> None:
    assert main(["bench", "--plot"]) == 2
    assert "--out FILE" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", "--out", str(tmp_path / "a.json")]) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [], "x": 1}', "\0"])
def test_what_is_no_report_is_not_loaded(text: str, tmp_path, capsys) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert main(["bench", "--load", str(path)]) == 2
    assert "not a report" in capsys.readouterr().err
    assert main(["bench", "--load", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kc4", "kc2", "kv8", "kv2"])
def test_random_pages_hold_values_of_unit_size(name: str) -> None:
    spec = bd.preset(name, head_dim=64)[0].for_kernel()
    pages = candidates.random_pages(spec, 64, 3, 2, torch.Generator().manual_seed(0))
    for x in bd.dequantize(pages, 64, spec, torch.float32):
        assert x.isfinite().all()
        assert 0.5 < x.std() < 2


@pytest.mark.parametrize("tokens", [1, 3, 16, 128, 259, 260, 261, 400, 5000])
@pytest.mark.parametrize("name", ["kc4", "kv4", "kv2"])
def test_the_cache_is_split_as_kvcache_splits_it(name: str, tokens: int) -> None:
    cache = LowBitCache(name, Shape((tokens, 7), 4, 2), 64, torch.float16, CPU)
    spec, policy = bd.preset(name, 64)
    kept = bd.KVCache(
        batch_size=1, max_tokens=tokens, num_kv_heads=2, head_dim=64, quant=spec, **vars(policy), dtype=torch.float16,
        device="cpu",
    )  # fmt: skip
    kept.append(*torch.randn(2, 1, tokens, 2, 64, dtype=torch.float16))
    assert cache.packed[0] == kept.packed_lens[0]
    assert cache.sinks[0] + cache.packed[0] + cache.tails[0] == tokens
    used = kept.used_nbytes + 7 * 2 * 2 * 64 * 2
    assert cache.cache_bytes == used
    assert cache.error() < 1e-3


@pytest.mark.parametrize("q_len", [2, 5])
@pytest.mark.parametrize("name", ["kc4", "kv2"])
def test_many_query_tokens_are_causal(name: str, q_len: int, monkeypatch) -> None:
    decode, sdpa = candidates.decode, candidates.scaled_dot_product_attention

    def sees_all(q, *args, out, **options):
        for t in range(q_len):
            out[:, t : t + 1] = decode(q[:, t : t + 1].contiguous(), *args, **options)

    for tokens in (5, 30, 128, 260):  # in sinks, pages and tail, as the policies have it
        cache = LowBitCache(name, Shape((tokens, 7), 4, 2, q_len), 64, torch.float16, CPU)
        with monkeypatch.context() as patch:
            assert cache.error() < 1e-3
            patch.setattr(candidates, "decode", sees_all)
            assert cache.error() > 2e-3

    seen = []
    monkeypatch.setattr(
        candidates, "scaled_dot_product_attention", lambda *args, **kw: seen.append(args) or sdpa(*args, **kw)
    )
    got = Rivals(Shape((40, 40), 4, 2, q_len), 64, torch.float32, CPU).candidate("sdpa").call(0)
    q, k, v = seen[-1]
    for t in range(q_len):
        n = 40 - q_len + 1 + t
        want = sdpa(q[:, :, t : t + 1], k[:, :, :n], v[:, :, :n], enable_gqa=True)
        torch.testing.assert_close(got[:, :, t : t + 1], want)


def test_q_len(tmp_path, capsys) -> None:
    out = tmp_path / "a.json"
    assert main([*SMALL, "--shapes", "1,4,2,100", "--q-len", "1", "3", "--presets", "kc4", "--out", str(out)]) == 0
    assert "1, 4/2, 100, q_len 3" in capsys.readouterr().out
    assert [row["q_len"] for row in json.loads(out.read_text())["rows"] if row["candidate"] == "kc4"] == [1, 3]
    assert main([*SMALL, "--shapes", "1,4,2,2", "--q-len", "3"]) == 2
    assert "--q-len 3: there are shapes with fewer tokens: 1, 4/2, 2" in capsys.readouterr().err
    assert main([*SMALL, "--suite", "write", "--q-len", "1", "3"]) == 2
    assert "--q-len 1 3: with --suite write allowed is 1" in capsys.readouterr().err


def test_a_wrong_result_is_not_timed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(LowBitCache, "error", lambda self: float("nan"))
    assert main([*SMALL, "--shapes", "1,2,2,100"]) == 2
    assert "relative error nan" in capsys.readouterr().err


class FakeFlashInfer:
    """What the benchmark uses of FlashInfer, by its documentation, over the tests' reference."""

    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert kv_layout == "NHD"

    def plan(
        self, indptr, indices, last_page_len, q_heads, kv_heads, head_dim, page_size, *, q_data_type, kv_data_type
    ):
        self.tables = [indices[a:b].tolist() for a, b in itertools.pairwise(indptr)]
        self.lengths = [(len(t) - 1) * page_size + n for t, n in zip(self.tables, last_page_len.tolist(), strict=True)]

    def run(self, q, kv):
        self.seen = [
            kv[table].transpose(0, 1).flatten(1, 2)[:, :n] for table, n in zip(self.tables, self.lengths, strict=True)
        ]
        return torch.stack([attention(q[b : b + 1], *seen)[0][0] for b, seen in enumerate(self.seen)])


def test_flashinfer_sees_every_token(monkeypatch) -> None:
    made = []
    fake = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=lambda *args, **options: (
            made.append(FakeFlashInfer(*args, **options)) or made[0]
        )
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(candidates, "FLASHINFER_WORKSPACE", 1024)
    shape = Shape((1, 16, 17, 100), 4, 2)
    candidate = Rivals(shape, 64, torch.float32, CPU).candidate("flashinfer")
    assert candidate.call(5).shape == (4, 4, 64)
    assert candidate.cache_bytes == 2 * 134 * 2 * 64 * 4
    assert [seen.shape for seen in made[0].seen] == [(2, n, 2, 64) for n in shape.lengths]
    assert made[0].tables == [[0], [1], [2, 3], [*range(4, 11)]]


def test_rivals_that_cannot_are_named(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(Rivals, "names", ("sdpa", "flashinfer"))
    out = tmp_path / "a.json"
    assert main([*SMALL, "--shapes", "1,2,2,100", "--out", str(out)]) == 0
    assert "left out: flashinfer on 1, 2/2, 100: " in capsys.readouterr().out
    report = json.loads(out.read_text())
    ((name, shape, reason),) = [one.values() for one in report["left_out"]]
    assert (name, shape) == ("flashinfer", "1, 2/2, 100")
    assert "flashinfer" in reason
    assert [row["candidate"] for row in report["rows"]] == ["kc4", "kc2", "sdpa"]


def test_enough_copies_to_be_cold_within_bounds() -> None:
    gpu = torch.device("cuda")
    for cache_bytes in (1, 4096, 200_000, 1 << 20, timing.COLD_BYTES, 1 << 33):
        copies = timing.copies_of(cache_bytes, gpu)
        assert 1 <= copies <= timing.MAX_COPIES
        cold = timing.Candidate("x", print, copies, cache_bytes).cold
        assert cold or copies == timing.MAX_COPIES
        assert not cold or (copies - 1) * cache_bytes <= timing.COLD_BYTES
    assert timing.copies_of(4096, CPU) == 1


class FakeGpu:
    """torch.cuda as far as graphs are timed: what a graph captures takes its time at every replay."""

    def __init__(self) -> None:
        self.clock = 0.0  # milliseconds
        self.captured: list[float] | None = None
        self.log: list[tuple[str, int]] = []

    def candidate(self, name: str, us: float, copies: int) -> timing.Candidate:
        def call(i: int) -> None:
            self.log.append((name, i % copies))
            if self.captured is not None:
                self.captured.append(us / 1e3)

        return timing.Candidate(name, call, copies, 1 << 20)

    def install(self, monkeypatch) -> None:
        gpu = self

        class Stream:
            def wait_stream(self, other: str) -> None:
                gpu.log.append((f"waits for {other}", len(gpu.log)))

        class Graph:
            def replay(self) -> None:
                gpu.clock += sum(self.calls)

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self, stream: object) -> None:
                self.at = gpu.clock

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        @contextlib.contextmanager
        def graph(made: Graph, stream: object):
            gpu.captured = made.calls = []
            yield
            gpu.captured = None

        fakes = {"Stream": Stream, "stream": contextlib.nullcontext, "current_stream": lambda: "the caller's"}
        fakes |= {"synchronize": lambda: None, "CUDAGraph": Graph, "Event": Event, "graph": graph}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_graph_visits_every_copy(monkeypatch) -> None:
    gpu = FakeGpu()
    gpu.install(monkeypatch)
    candidates = [gpu.candidate("a", 7.0, 3), gpu.candidate("b", 2.5, 40)]
    times = timing.measure(candidates, 3, torch.device("cuda"))
    assert [t.us for t in times] == [pytest.approx(7.0), pytest.approx(2.5)]
    assert all(t.plain_us > 0 and t.host_us > 0 for t in times)
    gpu.log.clear()
    timing.graph_times(candidates, 3)
    assert gpu.log.pop(0) == ("waits for the caller's", 0)
    assert gpu.log == [("a", 0), *(("a", i % 3) for i in range(8)), ("b", 0), *(("b", i) for i in range(40))]


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_devices_that_cannot_be_used(device: str, capsys) -> None:
    assert main(["bench", "--device", device]) == 2
    assert f"--device='{device}': allowed are" in capsys.readouterr().err


@pytest.mark.parametrize("shapes", ["1,8", "1,8,3,100", "0,8,2,100", "1,8,2,x"])
def test_shapes_that_make_no_sense(shapes: str, capsys) -> None:
    assert main(["bench", "--device", "cpu", "--shapes", shapes]) == 2
    assert shapes in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path) -> None:
    out = tmp_path / "a.json"
    shapes = "1,8,2,1;1,8,2,1000;2,4,4,4096"
    assert main(["bench", "--shapes", shapes, "--presets", "kc4", "kv4", "--rounds", "2", "--out", str(out)]) == 0
    rows = bench.Report.from_json(out.read_text()).rows
    assert {"sdpa flash"} <= {row.candidate for row in rows}
    for row in rows:
        assert 0 < row.us < row.plain_us
        assert row.host_us > 0
        assert row.cold == (row.cache_bytes >= 300 << 20 >> 11)
