"""Quantise and append of the library on the CPU, through its C ABI: the bytes that the specification gives."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys

import pytest
import torch
from bitdecoding.cute_kernels import native

import bitdecoding as bd

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # enum bitdecoding_dtype
CLIPS = {"minmax": 0.0, "mse": -1.0}
INVALID_ARGUMENT = 1

library = ctypes.CDLL(str(native.LIBRARY_PATH.parent / "libbitdecoding.so"))
library.bitdecoding_last_error.restype = ctypes.c_char_p


def fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


class Quant(ctypes.Structure):
    """bitdecoding_quant_spec"""

    _fields_ = (
        fields(ctypes.c_size_t, "size")
        + fields(ctypes.c_int32, "k_bits v_bits k_per_token k_group v_group k_symmetric v_symmetric k_mean")
        + fields(ctypes.c_int32, "rotate_k rotate_v")
        + fields(ctypes.c_float, "k_clip v_clip")
    )

    def __init__(self, spec: bd.QuantSpec) -> None:
        same = "k_bits v_bits k_group v_group k_symmetric v_symmetric rotate_k rotate_v".split()
        clips = {name: CLIPS.get(getattr(spec, name), getattr(spec, name)) for name in ("k_clip", "v_clip")}
        super().__init__(size=ctypes.sizeof(Quant), k_per_token=spec.k_axis == "token", k_mean=spec.k_mean == "block")
        for name, value in ({name: getattr(spec, name) for name in same} | clips).items():
            setattr(self, name, value)


class Params(ctypes.Structure):
    """bitdecoding_append_params"""

    _fields_ = (
        fields(ctypes.c_size_t, "size")
        + fields(ctypes.c_int32, "dtype batch new_tokens num_kv_heads head_dim num_pages max_pages tail_capacity")
        + fields(ctypes.c_int32, "num_sink recent")
        + fields(ctypes.c_void_p, "k_new v_new")
        + fields(ctypes.c_int64, "new_batch_stride_bytes new_token_stride_bytes new_head_stride_bytes")
        + fields(ctypes.c_void_p, "cu_seqlens pages")
        + fields(ctypes.c_int64, "page_stride_bytes head_stride_bytes")
        + fields(ctypes.c_void_p, "block_table lengths seqlens packed_lens tail_k tail_v sink_k sink_v status")
    )

    def __init__(self, **values) -> None:
        super().__init__(size=ctypes.sizeof(Params))
        for name, value in values.items():
            setattr(self, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)


def call(name: str, spec: bd.QuantSpec, params: Params, num_threads: int = 2) -> int:
    return getattr(library, name)(ctypes.byref(Quant(spec)), ctypes.byref(params), num_threads)


def must(status: int) -> None:
    assert status == 0, library.bitdecoding_last_error().decode()


def quantize(k: torch.Tensor, v: torch.Tensor, spec: bd.QuantSpec) -> torch.Tensor:
    tokens, heads, head_dim = k.shape
    blocks = -(-tokens // 128)
    table = torch.arange(blocks, dtype=torch.int32).flip(0).contiguous()
    pages = torch.full((blocks, heads, bd.block_bytes(head_dim, spec)), 0xA5, dtype=torch.uint8)
    params = Params(
        dtype=DTYPES[k.dtype], batch=1, new_tokens=tokens, num_kv_heads=heads, head_dim=head_dim, num_pages=blocks,
        max_pages=blocks, k_new=k, v_new=v, pages=pages, block_table=table,
    )  # fmt: skip
    must(call("bitdecoding_quantize_cpu", spec, params))
    return pages.flip(0)


def random_spec(rng: random.Random, head_dim: int) -> bd.QuantSpec:
    groups = [g for g in (32, 64, 128) if head_dim % g == 0]
    axis = rng.choice(("channel", "token"))
    choices = dict.fromkeys(("k_bits", "v_bits"), (8, 4, 2))
    choices |= {"k_group": (32, 64, 128) if axis == "channel" else groups, "v_group": groups}
    choices |= dict.fromkeys(("k_symmetric", "v_symmetric", "rotate_k", "rotate_v"), (False, True))
    choices |= {"k_mean": ("none", "block"), "k_clip": ("minmax", "mse", 0.75), "v_clip": ("minmax", "mse", 0.8)}
    return bd.QuantSpec(k_axis=axis, **{name: rng.choice(values) for name, values in choices.items()})


def random_tokens(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Keys or values of any size, with offsets, equal channels, signed zeros and values that are not finite."""
    x = torch.randn(shape) * rng.choice((1e-9, 1e-6, 1.0, 1e3, 3e4)) + rng.choice((0.0, 300.0))
    if rng.random() < 0.5:
        x[..., 3], x[..., 8:24], x[..., 40:42] = torch.nan, -0.0, 1.25
        x[0, ..., 5], x[-1, ..., 6] = torch.inf, -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_quantise_is_the_specification_bit_for_bit(head_dim: int) -> None:
    rng = random.Random(head_dim)
    torch.manual_seed(head_dim)
    for tokens in (1, 127, 128, 129, 300) * 2:
        dtype, spec = rng.choice(list(DTYPES)), random_spec(rng, head_dim)
        k, v = (random_tokens(rng, (tokens, 2, head_dim), dtype) for _ in range(2))
        assert torch.equal(quantize(k, v, spec), bd.quantize(k, v, spec)), (spec.to_json(), dtype, tokens)


def test_every_instruction_set_gives_the_same_bytes() -> None:
    """The test above, in a process that uses none."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "quantise_is and 96", __file__]
    subprocess.run(command, check=True, env=os.environ | {"BITDECODING_CPU": "baseline"}, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("seed", range(4))
def test_append_is_the_specification_bit_for_bit(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, heads, batch, max_pages = rng.choice((64, 96)), 2, 3, 6
    spec, dtype = random_spec(rng, head_dim), rng.choice(list(DTYPES))
    recent, num_sink = rng.choice((0, 5, 128)), rng.choice((0, 4))
    capacity = recent + 127
    table = torch.randperm(batch * max_pages).to(torch.int32).view(batch, max_pages)
    table[1, 1:] = -1  # sequence 1 runs out of pages
    names = ("pages", "seqlens", "packed_lens", "tail_k", "tail_v", "sink_k", "sink_v", "status")
    ours = {
        "pages": torch.zeros(batch * max_pages, heads, bd.block_bytes(head_dim, spec), dtype=torch.uint8),
        "seqlens": torch.zeros(batch, dtype=torch.int32),
        "packed_lens": torch.zeros(batch, dtype=torch.int32),
        "status": torch.zeros(1, dtype=torch.int32),
    }
    ours |= {name: torch.zeros(batch, capacity, heads, head_dim, dtype=dtype) for name in ("tail_k", "tail_v")}
    ours |= {name: torch.zeros(batch, num_sink, heads, head_dim, dtype=dtype) for name in ("sink_k", "sink_v")}
    theirs = {name: x.clone() for name, x in ours.items()}
    for new_tokens in (1, 3, 130, 1, 127, 300, 2, 1):
        stored = random_tokens(rng, (2, batch, new_tokens, heads + 1, head_dim), dtype)
        k, v = stored[:, :, :, :heads]  # with gaps
        lengths = torch.tensor([rng.randint(0, new_tokens), new_tokens, new_tokens // 2], dtype=torch.int32)
        keep = {name: x for name, x in theirs.items() if num_sink or "sink" not in name}
        bd.append(k, v, block_table=table, spec=spec, lengths=lengths, recent=recent, **keep)
        row = head_dim * k.element_size()
        params = Params(
            dtype=DTYPES[dtype], batch=batch, new_tokens=new_tokens, num_kv_heads=heads, head_dim=head_dim,
            num_pages=len(ours["pages"]), max_pages=max_pages, tail_capacity=capacity, num_sink=num_sink,
            recent=recent, k_new=k, v_new=v, new_token_stride_bytes=(heads + 1) * row, block_table=table,
            lengths=lengths, **ours,
        )  # fmt: skip
        must(call("bitdecoding_append_cpu", spec, params))
        for name in names:
            same = torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
            assert same, f"{name} after {new_tokens} tokens, {spec.to_json()}, {dtype}"
    assert ours["status"].item() == 2


def test_ragged_sequences_are_quantised_one_by_one() -> None:
    torch.manual_seed(0)
    spec, bounds = bd.QuantSpec(v_group=64), [0, 130, 130, 258]
    k, v = torch.randn(2, 258, 2, 64)
    cu_seqlens, table = (
        torch.tensor(bounds, dtype=torch.int32),
        torch.tensor([[3, 1], [9, 9], [2, 9]], dtype=torch.int32),
    )
    pages = torch.zeros(4, 2, bd.block_bytes(64, spec), dtype=torch.uint8)
    params = Params(
        dtype=2, batch=3, new_tokens=130, num_kv_heads=2, head_dim=64, num_pages=4, max_pages=2, k_new=k, v_new=v,
        cu_seqlens=cu_seqlens, pages=pages, block_table=table,
    )  # fmt: skip
    must(call("bitdecoding_quantize_cpu", spec, params))
    assert torch.equal(pages[[3, 1]], bd.quantize(k[:130], v[:130], spec))
    assert torch.equal(pages[2:3], bd.quantize(k[130:], v[130:], spec))
    assert not pages[0].any()


def test_what_is_wrong_changes_nothing() -> None:
    torch.manual_seed(0)
    spec, heads, head_dim = bd.QuantSpec(v_group=64), 1, 64
    k, v = torch.randn(2, 2, 200, heads, head_dim)
    state = {
        "pages": torch.zeros(4, heads, bd.block_bytes(head_dim, spec), dtype=torch.uint8),
        "seqlens": torch.tensor([100, 0], dtype=torch.int32),
        "packed_lens": torch.zeros(2, dtype=torch.int32),
        "tail_k": torch.zeros(2, 127, heads, head_dim),
        "tail_v": torch.zeros(2, 127, heads, head_dim),
    }
    before = {name: x.clone() for name, x in state.items()}
    good = {
        "dtype": 2, "batch": 2, "new_tokens": 200, "num_kv_heads": heads, "head_dim": head_dim, "num_pages": 4,
        "max_pages": 2, "tail_capacity": 127, "k_new": k, "v_new": v,
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), **state,
    }  # fmt: skip

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    for wrong, message in (
        ({"block_table": ints(0, 1, 0, 3)}, "names page 0 twice"),
        ({"block_table": ints(0, 4, 2, 3)}, "block_table[0, 1]=4: allowed are 0 to 3"),
        ({"block_table": ints(-1, 1, 2, 3)}, "block_table[0, 0]=-1"),
        ({"max_pages": 1, "block_table": ints(0, 2)}, "sequence 0 needs 2 pages: allowed are 1"),
        ({"seqlens": ints(300, 0)}, "seqlens[0]=300: allowed are at most 127"),
        ({"seqlens": ints(2**31 - 1, 0)}, "seqlens[0]=2147483647"),
        ({"seqlens": ints(-1, 0)}, "seqlens[0]=-1"),
        ({"packed_lens": ints(0, 1)}, "packed_lens[1]=1"),
        ({"packed_lens": ints(0, 128)}, "packed_lens[1]=128"),
        ({"lengths": ints(201, 0)}, "lengths[0]=201: allowed are 0 to new_tokens=200"),
        ({"lengths": ints(1, -1)}, "lengths[1]=-1"),
        ({"cu_seqlens": ints(0, 201, 201)}, "cu_seqlens[0]=0, cu_seqlens[1]=201"),
        ({"cu_seqlens": ints(0, 100, 50)}, "cu_seqlens[1]=100, cu_seqlens[2]=50"),
        ({"cu_seqlens": ints(0, 9, 9), "lengths": ints(1, 1)}, "lengths: must be null with cu_seqlens"),
        ({"tail_capacity": 126}, "tail_capacity=126: allowed are numbers from 127"),
        ({"recent": -1}, "recent=-1"),
        ({"num_sink": 4}, "sink_k: is null"),
        ({"tail_v": None}, "tail_v: is null"),
        ({"seqlens": None}, "seqlens: is null"),
        ({"packed_lens": None}, "packed_lens: is null"),
        ({"pages": None}, "pages: is null"),
        ({"block_table": None}, "block_table: is null"),
        ({"k_new": None}, "k_new: is null"),
        ({"v_new": v.view(-1)[1:]}, "v_new: address must be a multiple of 16"),
        ({"new_token_stride_bytes": 8}, "new_token_stride_bytes=8"),
        ({"page_stride_bytes": 64}, "page_stride_bytes=64: must be at least block_bytes"),
        ({"batch": 0}, "batch=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"num_kv_heads": -1}, "num_kv_heads=-1"),
        ({"head_dim": 65}, "head_dim=65"),
        ({"dtype": 3}, "dtype=3: allowed are 0, 1, 2"),
        ({"num_pages": -1}, "num_pages=-1"),
    ):
        status = call("bitdecoding_append_cpu", spec, Params(**(good | wrong)))
        assert status == INVALID_ARGUMENT, wrong
        assert message in library.bitdecoding_last_error().decode()
    assert call("bitdecoding_append_cpu", spec, Params(**good), -1) == INVALID_ARGUMENT
    assert call("bitdecoding_quantize_cpu", spec, Params(**good)) == INVALID_ARGUMENT
    assert "seqlens: must be null with pack_all" in library.bitdecoding_last_error().decode()
    assert all(torch.equal(x, before[name]) for name, x in state.items())
    must(call("bitdecoding_append_cpu", spec, Params(**good)))
    assert state["seqlens"].tolist() == [300, 200]
