"""The quantiser's arithmetic and bytes: against a scalar model, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitdecoding.cute_kernels.layouts import BITS, BLOCK_TOKENS, GROUPS, HEAD_DIMS, block_format
from hypothesis import given, settings
from hypothesis import strategies as st

import bitdecoding as bd
from bitdecoding import quantization

F = np.float32
LIMIT = F(32768)

# Every value of every field at least once, and the pairs that share code
SPECS = {
    "default": {},
    "8-bit": {"k_bits": 8, "v_bits": 8, "k_group": 64, "v_group": 32},
    "2-bit": {"k_bits": 2, "v_bits": 2, "k_group": 32, "v_group": 64},
    "token": {"k_axis": "token", "k_group": 64, "v_group": 64, "v_bits": 2},
    "token-8-mean": {"k_bits": 8, "k_axis": "token", "k_group": 32, "v_group": 32, "k_mean": "block"},
    "symmetric": {"k_symmetric": True, "v_symmetric": True, "k_group": 64, "v_group": 64},
    "symmetric-8": {"k_bits": 8, "v_bits": 8, "k_symmetric": True, "v_symmetric": True, "v_group": 32},
    "mean-channel": {"k_mean": "block", "k_bits": 2, "v_group": 64},
    "clipped": {"k_clip": 0.8, "v_clip": 0.75, "v_group": 64, "v_bits": 2},
    "clipped-symmetric": {"k_clip": 0.9, "v_clip": 0.8, "k_symmetric": True, "v_symmetric": True, "v_group": 32},
    "mse": {"k_clip": "mse", "v_clip": "mse", "v_group": 64, "k_bits": 2},
    "mse-symmetric": {"k_clip": "mse", "v_clip": "mse", "k_symmetric": True, "v_symmetric": True, "v_group": 32},
    "rotated": {"rotate_k": True, "rotate_v": True, "v_group": 64},
    "kv2-like": {
        "k_bits": 2,
        "k_axis": "token",
        "k_group": 64,
        "k_symmetric": True,
        "k_mean": "block",
        "rotate_k": True,
        "v_bits": 2,
        "v_group": 64,
        "v_clip": 0.8,
        "rotate_v": True,
    },
}


def spec_for(name: str, head_dim: int) -> bd.QuantSpec:
    fields = dict(SPECS[name])
    for key in ("v_group", "k_group"):
        if key == "v_group" or fields.get("k_axis") == "token":
            fields[key] = max(g for g in GROUPS if g <= fields.get(key, 128) and head_dim % g == 0)
    return bd.QuantSpec(**fields)


def random_kv(
    tokens: int, heads: int, head_dim: int, seed: int = 0, dtype: torch.dtype = torch.float16, offset: float = 3.0
):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, heads, head_dim, generator=generator)
    k += offset * torch.randn(heads, head_dim, generator=generator)  # channels with offsets, as keys have them
    return k.to(dtype), v.to(dtype)


# ---------------------------------------------------------------------------------------------- scalar model


def halving_sum(values: np.ndarray) -> np.float32:
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def scalar_group(x: np.ndarray, valid: np.ndarray, bits: int, symmetric: bool, clip) -> tuple:
    """x fp32 [group] -> codes, scale, zero."""
    levels = F(2**bits - 1)
    if not valid.any():
        return np.zeros(len(x), int), F(0), F(0)

    def parameters(factor):
        lo, hi = x[valid].min(), x[valid].max()
        if symmetric:
            lo, hi = (-max(abs(lo), abs(hi)), max(abs(lo), abs(hi)))
        if factor is not None:
            f = F(factor)
            mid, half = (lo + hi) * F(0.5), (hi - lo) * F(0.5)
            lo, hi = (lo * f, hi * f) if symmetric else (mid - half * f, mid + half * f)
        if symmetric:
            scale = F(np.float16(max(hi / (levels / F(2)), F(2.0**-24))))
            return scale, -levels / F(2)
        scale = max((hi - lo) / levels, max(abs(lo), abs(hi)) * F(2.0**-10), F(2.0**-24))
        scale = F(np.float16(scale))
        return scale, F(np.float16(lo / scale)) + F(0)

    def encode(scale, zero):
        return np.clip(np.rint(x * (F(1) / scale) - zero), F(0), levels)

    if clip == "mse":
        candidates = []
        for i in range(20):
            scale, zero = parameters(1 - i / 32)
            error = (encode(scale, zero) + zero) * scale - x
            candidates.append((halving_sum(np.where(valid, error * error, F(0))), i, scale, zero))
        _, _, scale, zero = min(candidates, key=lambda c: c[:2])
    else:
        scale, zero = parameters(None if clip == "minmax" else clip)
    return np.where(valid, encode(scale, zero), 0).astype(int), scale, zero


def scalar_hadamard(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    h = len(x) & -len(x)
    stride = 1
    while stride < h:
        for i in range(len(x)):
            if not i & stride:
                x[i], x[i + stride] = x[i] + x[i + stride], x[i] - x[i + stride]
        stride *= 2
    return x * F(1 / np.sqrt(h))


def conditioned(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), F(0), np.clip(x, -LIMIT, LIMIT)).astype(F)


def scalar_block(k: torch.Tensor, v: torch.Tensor, spec: bd.QuantSpec) -> bytes:
    """k, v [tokens <= 128, head_dim] of one KV head -> the bytes of its block, one element at a time."""
    tokens, head_dim = k.shape
    fmt = block_format(head_dim, spec)
    block = bytearray(fmt.block_bytes)

    def put_code(section, coordinate, bits, code):
        bit = section.layout(*coordinate)
        block[section.offset + bit // 8] |= int(code) << (bit % 8)

    def put_half(section, coordinate, value):
        at = section.offset + 2 * section.layout(*coordinate)
        block[at : at + 2] = np.float16(value).tobytes()

    valid = np.arange(BLOCK_TOKENS) < tokens
    for name, tokens_of in (("k", k), ("v", v)):
        get = {f: getattr(spec, f"{name}_{f}") for f in ("bits", "group", "symmetric", "clip")}
        x = conditioned(tokens_of.float().numpy())
        if getattr(spec, f"rotate_{name}"):
            x = np.clip(np.stack([scalar_hadamard(row) for row in x]), -LIMIT, LIMIT)
            x = conditioned(torch.from_numpy(x).to(tokens_of.dtype).float().numpy())
        x = np.concatenate((x, np.zeros((BLOCK_TOKENS - tokens, head_dim), F)))
        if name == "k" and spec.k_mean == "block":
            for c in range(head_dim):
                mean = np.float16(halving_sum(x[:, c]) * (F(1) / F(tokens))) + np.float16(0)
                put_half(fmt.k_mean, (0, c), mean)
                x[:, c] -= F(mean)
        g = get["group"]
        arguments = (get["bits"], get["symmetric"], get["clip"])

        def put(cells, where, values, cell_valid, name=name, arguments=arguments):
            codes, scale, zero = scalar_group(values, cell_valid, *arguments)
            for cell, code in zip(cells, codes, strict=True):
                put_code(fmt.sections[name + "_codes"], cell, arguments[0], code)
            put_half(fmt.sections[name + "_scale"], where, scale)
            if not arguments[1]:
                put_half(fmt.sections[name + "_zero"], where, zero)

        if name == "k" and spec.k_axis == "channel":
            for i in range(BLOCK_TOKENS // g):
                rows = np.arange(i * g, (i + 1) * g)
                for c in range(head_dim):
                    put([(int(t), c) for t in rows], (i, c), x[rows, c], valid[rows])
        else:
            for t in range(BLOCK_TOKENS):
                for i in range(head_dim // g):
                    cols = np.arange(i * g, (i + 1) * g)
                    where = (t, i) if name == "k" else (i, t)
                    put([(t, int(c)) for c in cols], where, x[t, cols], np.full(g, valid[t]))
    return bytes(block)


@pytest.mark.parametrize("tokens", [128, 37])
@pytest.mark.parametrize(("name", "head_dim"), [(name, HEAD_DIMS[i % 3]) for i, name in enumerate(SPECS)])
def test_bytes_equal_the_scalar_model(name: str, head_dim: int, tokens: int) -> None:
    spec = spec_for(name, head_dim)
    k, v = random_kv(tokens, 1, head_dim, seed=tokens)
    k[3, 0, 5], k[4, 0, 6], v[5, 0, 7], v[6, 0, 1] = torch.nan, torch.inf, -torch.inf, -0.0
    k[7] = 0
    v[8] = -0.0
    with np.errstate(invalid="ignore", over="ignore"):
        expected = scalar_block(k[:, 0], v[:, 0], spec)
    got = bd.quantize(k, v, spec)
    assert got.shape == (1, 1, bd.block_bytes(head_dim, spec))
    assert got[0, 0].numpy().tobytes() == expected


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_larger_factor_wins_ties(symmetric: bool) -> None:
    """Small integers at 2 bits: some fifty groups of these have two factors with the least error."""
    k, v = torch.randint(-3, 4, (2, 128, 1, 256), generator=torch.Generator().manual_seed(0)).float()
    flags = {"k_symmetric": symmetric, "v_symmetric": symmetric}
    spec = bd.QuantSpec(k_bits=2, v_bits=2, k_group=32, v_group=32, k_clip="mse", v_clip="mse", **flags)
    assert bd.quantize(k, v, spec)[0, 0].numpy().tobytes() == scalar_block(k[:, 0], v[:, 0], spec)


def test_zero_has_one_sign() -> None:
    """-0 and what underflows to it are stored as +0."""
    spec = bd.QuantSpec(v_group=64, k_mean="block")
    zeros = torch.zeros(128, 1, 64)
    for x in (-zeros, zeros - 1e-40):
        assert torch.equal(bd.quantize(x, x, spec), bd.quantize(zeros, zeros, spec))


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack_agree_with_the_layout(head_dim: int, bits: int) -> None:
    """Blocks of known codes, written bit by bit, dequantise to exactly these codes."""
    for axis, group in (("channel", 32), ("channel", 128), ("token", 32)):
        spec = bd.QuantSpec(k_bits=bits, v_bits=bits, k_axis=axis, k_group=group, v_group=32)
        fmt = block_format(head_dim, spec)
        rng = np.random.default_rng(bits + head_dim)
        block = np.zeros(fmt.block_bytes, np.uint8)
        values = {}
        for name, section in fmt.sections.items():
            table = section.table()
            if name.endswith("codes"):
                values[name] = rng.integers(0, 2**bits, table.shape)
                np.bitwise_or.at(block, section.offset + table // 8, (values[name] << (table % 8)).astype(np.uint8))
            else:
                values[name] = rng.integers(1, 9, table.shape).astype(np.float16)
                halves = block[section.offset : section.offset + section.nbytes].view(np.float16)
                halves[table] = values[name]
        k, v = bd.dequantize(torch.from_numpy(block)[None, None], head_dim, spec, torch.float32)
        if axis == "channel":
            zero, scale = (np.repeat(values[n], group, axis=0) for n in ("k_zero", "k_scale"))
        else:
            zero, scale = (np.repeat(values[n], group, axis=1) for n in ("k_zero", "k_scale"))
        np.testing.assert_array_equal(k[:, 0].numpy(), (values["k_codes"] + zero) * scale)
        zero, scale = (np.repeat(values[n], 32, axis=0).T for n in ("v_zero", "v_scale"))
        np.testing.assert_array_equal(v[:, 0].numpy(), (values["v_codes"] + zero) * scale)


def error_bound(x: torch.Tensor, dim: int, bits: int, symmetric: bool) -> torch.Tensor:
    """Of min/max quantisation of the groups of x (fp64) along ``dim``."""
    levels = 2**bits - 1
    lo, hi = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    largest = torch.maximum(lo.abs(), hi.abs())
    span = 2 * largest if symmetric else hi - lo
    scale = (span / levels).clamp(min=2.0**-24)
    if not symmetric:
        scale = torch.maximum(scale, largest * 2.0**-10)
    scale = scale + torch.clamp(scale * 2.0**-11, min=2.0**-25)  # fp16 rounding
    # half a step, and at the ends of the range what the rounding of the scale adds up to, and a hair of fp32
    return scale * 0.5 + levels * torch.clamp(scale * 2.0**-11, min=2.0**-25) + largest * 2.0**-20


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(BITS),
    axis=st.sampled_from(["channel", "token"]),
    group=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    log_scale=st.floats(-9, 4),
    offset=st.sampled_from([0.0, 1.0, -500.0, 500.0, 3e4]),
    tokens=st.integers(1, 130),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_error_is_bounded_by_the_step(seed, bits, axis, group, symmetric, log_scale, offset, tokens, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, 1, 128, generator=generator) * 10**log_scale + offset
    k, v = (x.clamp(-3.2e4, 3.2e4).to(dtype) for x in (k, v))
    spec = bd.QuantSpec(
        k_bits=bits,
        v_bits=bits,
        k_axis=axis,
        k_group=group,
        v_group=group,
        k_symmetric=symmetric,
        v_symmetric=symmetric,
    )
    k2, v2 = bd.dequantize(bd.quantize(k, v, spec), 128, spec, torch.float32)
    for name, x, y in (("k", k, k2), ("v", v, v2)):
        x, y = x[:, 0].double(), y[:tokens, 0].double()
        if name == "k" and axis == "channel":
            bounds = [error_bound(part, 0, bits, symmetric).expand_as(part) for part in x.split(group)]
            bound = torch.cat(bounds)
        else:
            bound = error_bound(x.unflatten(-1, (-1, group)), -1, bits, symmetric)
            bound = bound.expand(-1, -1, group).flatten(1)
        assert ((x - y).abs() <= bound).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 500.0, -30000.0, 2.0**-14, 1e-7])
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_keep_their_value(value: float, bits: int) -> None:
    x = torch.full((128, 1, 64), value)
    spec = bd.QuantSpec(k_bits=bits, v_bits=bits, v_group=64)
    for y in bd.dequantize(bd.quantize(x, x, spec), 64, spec, torch.float32):
        # half a step of zero (relative 2^-11), or half of fp16's smallest number
        assert (y - value).abs().max() <= max(abs(value) * 2.0**-11, 2.0**-24)


def test_offsets_of_several_hundred_cost_only_what_fp16_costs() -> None:
    """Keys with a bias (Qwen2.5): the error stays below a step of the range or of fp16 at the bias."""
    k, v = random_kv(1024, 2, 128)
    biased = k.float() + 500.0
    spec = bd.QuantSpec()
    got, _ = bd.dequantize(bd.quantize(biased, v.float(), spec), 128, spec, torch.float32)
    blocks = biased.unflatten(0, (-1, 128))
    step = torch.maximum((blocks.amax(1) - blocks.amin(1)) / 15, blocks.amax(1) * 2.0**-10)
    error = (got - biased).unflatten(0, (-1, 128)).abs().amax(1)
    assert (error <= 0.51 * step).all()


def test_non_finite_values_count_as_zero_or_the_limit() -> None:
    k, v = random_kv(128, 1, 64)
    k[5, 0, 3], k[6, 0, 4], v[7, 0, 5] = torch.nan, torch.inf, -torch.inf
    tamed_k, tamed_v = k.nan_to_num(0.0, 32768.0, -32768.0), v.nan_to_num(0.0, 32768.0, -32768.0)
    for name in SPECS:
        spec = spec_for(name, 64)
        blocks = bd.quantize(k, v, spec)
        assert torch.equal(blocks, bd.quantize(tamed_k, tamed_v, spec))
        assert all(x.isfinite().all() for x in bd.dequantize(blocks, 64, spec, torch.float32))


@pytest.mark.parametrize("name", SPECS)
def test_the_largest_values_stay_finite(name: str) -> None:
    sign = torch.where(torch.arange(64) % 3 == 0, 1.0, -1.0)
    x = (sign * 3e38).expand(130, 2, 64).contiguous()
    spec = spec_for(name, 64)
    for y in bd.dequantize(bd.quantize(x, -x, spec), 64, spec, torch.float32):
        assert y.isfinite().all()


@pytest.mark.parametrize("name", SPECS)
def test_bytes_depend_on_valid_tokens_only(name: str) -> None:
    """A partial block equals the prefix of a larger buffer, whatever follows; its padding is zero."""
    spec = spec_for(name, 96)
    storage_k, storage_v = random_kv(400, 2, 96)
    blocks = bd.quantize(storage_k[:200], storage_v[:200], spec)
    storage_k[200:], storage_v[200:] = torch.nan, 1e4
    assert torch.equal(bd.quantize(storage_k[:200], storage_v[:200], spec), blocks)
    fmt = block_format(96, spec)
    end = max(s.offset + s.nbytes for s in fmt.sections.values())
    assert (blocks[..., end:] == 0).all()
    first, second = bd.quantize(storage_k[:128], storage_v[:128], spec), blocks[1:]
    assert torch.equal(first, blocks[:1])
    assert torch.equal(bd.quantize(storage_k[128:200], storage_v[128:200], spec), second)


def test_strides_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = bd.preset("kv4", 64)
    k, v = random_kv(700, 3, 64)
    blocks = bd.quantize(k, v, spec)
    values = bd.dequantize(blocks, 64, spec, torch.float32)
    strided_k, strided_v = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (k, v))
    assert torch.equal(bd.quantize(strided_k, strided_v, spec), blocks)
    monkeypatch.setattr(quantization, "CHUNK_VALUES", 2 * 128 * 3 * 64)
    assert torch.equal(bd.quantize(k, v, spec), blocks)
    for got, want in zip(bd.dequantize(blocks, 64, spec, torch.float32), values, strict=True):
        assert torch.equal(got, want)


def test_no_tokens_make_no_blocks() -> None:
    spec = bd.QuantSpec()
    blocks = bd.quantize(torch.zeros(0, 2, 128), torch.zeros(0, 2, 128), spec)
    assert blocks.shape == (0, 2, bd.block_bytes(128, spec))
    assert bd.dequantize(blocks, 128, spec)[0].shape == (0, 2, 128)


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (96, 32), (128, 128), (256, 256)])
def test_hadamard_is_sylvesters_and_its_own_inverse(head_dim: int, size: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    matrix = torch.block_diag(*[matrix / size**0.5] * (head_dim // size))
    x = torch.randn(7, head_dim)
    torch.testing.assert_close(quantization.hadamard(x).double(), x.double() @ matrix, atol=1e-5, rtol=0)
    torch.testing.assert_close(quantization.hadamard(quantization.hadamard(x)), x, atol=1e-5, rtol=0)


def test_better_ranges_make_smaller_errors() -> None:
    k, v = random_kv(1024, 2, 128)

    def error(**fields) -> float:
        spec = bd.QuantSpec(v_bits=2, v_group=64, **fields)
        return (bd.dequantize(bd.quantize(k, v, spec), 128, spec, torch.float32)[1] - v.float()).pow(2).mean().item()

    assert error(v_clip="mse") < error(v_clip=0.75) < error(v_clip="minmax")


def test_rotation_spreads_outliers() -> None:
    k, v = random_kv(1024, 2, 128)
    v[:, :, 7] *= 40
    errors = []
    for rotate in (False, True):
        spec = bd.QuantSpec(rotate_v=rotate)
        got = bd.dequantize(bd.quantize(k, v, spec), 128, spec, torch.float32)[1]
        errors.append((got - v.float())[:, :, torch.arange(128) != 7].pow(2).mean())
    assert errors[1] < 0.5 * errors[0]


# ---------------------------------------------------------------------------------------------- presets, errors


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", quantization.PRESETS)
def test_presets_exist_for_every_head_dim(name: str, head_dim: int) -> None:
    spec, policy = bd.preset(name, head_dim)
    assert bd.block_bytes(head_dim, spec) % 128 == 0
    assert policy.recent in (0, 64)
    assert head_dim % spec.v_group == 0


def test_presets_say_what_the_design_says() -> None:
    spec, policy = bd.preset("kv4")
    assert spec == bd.QuantSpec(v_group=64, v_symmetric=True, v_clip="mse", rotate_k=True, rotate_v=True)
    assert (policy.recent, policy.sink_tokens) == (64, 4)
    spec, policy = bd.preset("kv2", 96)
    assert (spec.k_axis, spec.k_group, spec.v_group, spec.k_mean) == ("token", 32, 32, "block")
    assert policy.sink_tokens == 16
    assert bd.block_bytes(128, bd.preset("kc4")[0]) == 17408
    assert bd.block_bytes(128, bd.preset("kc2")[0]) == 9216


K = torch.zeros(5, 2, 64, dtype=torch.float16)
SPEC64 = {"v_group": 64}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda s: bd.preset("kv3"), ["name='kv3'", "kv4"]),
        (lambda s: bd.preset("kv4", 80), ["head_dim=80", "96"]),
        (lambda s: bd.quantize(K[0], K, s), ["k is", "num_tokens"]),
        (lambda s: bd.quantize(K.int(), K, s), ["k is torch.int32", "torch.bfloat16"]),
        (lambda s: bd.quantize([1], K, s), ["k is a list"]),
        (lambda s: bd.quantize(K, K[:4], s), ["v is", "num_tokens=5"]),
        (lambda s: bd.quantize(K, K.bfloat16(), s), ["v is torch.bfloat16", "torch.float16"]),
        (lambda s: bd.quantize(K, K.to("meta"), s), ["v is on meta", "cpu"]),
        (lambda s: bd.quantize(K[:, :0], K[:, :0], s), ["num_kv_heads=0"]),
        (lambda s: bd.quantize(K[..., :48], K[..., :48], s), ["head_dim=48", "96"]),
        (lambda s: bd.quantize(K, K, bd.QuantSpec(v_group=128)), ["v_group=128", "64"]),
        (lambda s: bd.dequantize(torch.zeros(1, 2, 100, dtype=torch.uint8), 64, s), ["blocks is", "block_bytes="]),
        (lambda s: bd.dequantize(bd.quantize(K, K, s), 64, s, torch.int8), ["dtype=torch.int8", "torch.float16"]),
        (lambda s: bd.block_bytes(72, s), ["head_dim=72", "64"]),
    ],
)
def test_errors_name_argument_value_and_allowed_values(call, names: list[str]) -> None:
    with pytest.raises(bd.InvalidArgument) as error:
        call(bd.QuantSpec(**SPEC64))
    for name in names:
        assert name in str(error.value)
