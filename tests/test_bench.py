"""`bitdecoding bench` on the CPU: small shapes, the table, the JSON, the errors."""

from __future__ import annotations

import json

import pytest
import torch

import bitdecoding as bd
from bitdecoding import bench
from bitdecoding.cli import main


def test_the_table_and_the_json(tmp_path, capsys) -> None:
    out = tmp_path / "bench.json"
    shapes = "1,8,2,300;2,4,4,256"
    assert (
        main(["bench", "--device", "cpu", "--shapes", shapes, "--rounds", "2", "--head-dim", "64", "--out", str(out)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 3
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert [row["candidate"] for row in rows[:3]] == ["kc4", "kc2", "sdpa"]
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 for row in rows)
    for row in rows:
        assert (row["error"] is None) == (row["candidate"] == "sdpa")
        assert (row["speedup"] is None) == (row["candidate"] == "sdpa")
        if row["error"] is not None:
            assert 0 < row["error"] < 1e-3
    assert rows[0]["shape"] == "1, 8/2, 300"


@pytest.mark.parametrize("name", ["kc4", "kc2", "kv8", "kv2"])
def test_random_pages_hold_values_of_unit_size(name: str) -> None:
    spec = bd.preset(name, head_dim=64)[0].for_kernel()
    pages = bench.random_pages(spec, 64, 3, 2, torch.Generator().manual_seed(0))
    for x in bd.dequantize(pages, 64, spec, torch.float32):
        assert x.isfinite().all()
        assert 0.5 < x.std() < 2


@pytest.mark.parametrize("shapes", ["1,8", "1,8,3,100", "0,8,2,100", "1,8,2,x"])
def test_shapes_that_make_no_sense(shapes: str, capsys) -> None:
    assert main(["bench", "--device", "cpu", "--shapes", shapes]) == 2
    assert shapes in capsys.readouterr().err
