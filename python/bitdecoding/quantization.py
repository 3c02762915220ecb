"""Quantisation: what the bits of a block mean. This module is the specification of the format.

A value is stored as ``x = scale * (code + zero)``, ``code`` in 0 .. 2**bits - 1, ``scale`` and ``zero`` fp16 per
group. Every step below is fp32, rounded to nearest even, with no fused multiply-add, so that a GPU kernel which
follows it writes the same bytes:

1. *Rotate* (``rotate_k`` / ``rotate_v``): :func:`rotate`, rounded to the dtype of the input, so that a rotated token
   has one form, in which a cache also keeps its 16-bit tokens.
2. *Condition*: convert to fp32, NaN -> 0, clamp to +-32768.
3. *Centre* (``k_mean="block"``): subtract the block's channel mean, itself rounded to fp16.
4. *Range* of each group over its valid tokens, *scale* and *zero* from it: :func:`_parameters`.
5. ``code = clamp(rint(x * inverse - zero), 0, levels)`` with ``inverse = 1 / scale``.

Groups: K with ``k_axis="channel"`` has ``k_group`` tokens of one channel, K with ``k_axis="token"`` and V have
``k_group`` / ``v_group`` channels of one token. Tokens beyond the valid ones have code 0, parameters of groups
without a valid token and the bytes that pad a block are 0, and no -0 is stored: the bytes are a pure function of the
valid values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cute_kernels.checks import check_int, check_one_of
from .cute_kernels.config import QuantSpec
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS, GROUPS, HEAD_DIMS, Section, block_format, symmetric_zero

VALUE_LIMIT = 32768.0  # fp16 products P * scale of the kernels stay finite
MIN_SCALE = 2.0**-24  # the smallest fp16
ZERO_LIMIT = 2.0**-10  # scale >= max|x| * ZERO_LIMIT: |zero| <= 1024, where fp16 still resolves half a step
MSE_FACTORS = tuple(1 - i / 32 for i in range(20))  # descending: on ties the first, that is the larger, wins
CPU = torch.device("cpu")
REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHUNK_VALUES = 1 << 20  # values of K (or V) that are worked on at once: bounds memory and stays in the caches


@dataclass(frozen=True)
class CachePolicy:
    """What a cache keeps in 16 bit: the first ``sink_tokens`` and at least the newest ``recent`` tokens."""

    recent: int = 0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        check_int("recent", self.recent)
        check_int("sink_tokens", self.sink_tokens)

    def packed_len(self, seqlen: int, packed_len: int) -> int:
        """Tokens in pages once a sequence of ``seqlen`` tokens, ``packed_len`` of them packed so far, is settled.

        The tail's oldest 128 tokens are packed as long as ``recent`` tokens remain, so a settled tail holds fewer
        than ``recent + 128``.
        """
        tail = seqlen - min(seqlen, self.sink_tokens) - packed_len
        return packed_len + max(0, tail - self.recent) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def tail_capacity(self) -> int:
        """Slots that a settled tail needs at most."""
        return self.recent + BLOCK_TOKENS - 1


_KV4_K = {"k_bits": 4, "k_axis": "channel", "k_group": 128, "rotate_k": True}
_V2 = {"v_bits": 2, "v_group": 64, "v_clip": 0.8, "rotate_v": True}
_PRESETS: dict[str, tuple[dict[str, Any], CachePolicy]] = {
    "kv8": ({"k_bits": 8, "v_bits": 8, "k_group": 128, "v_group": 64}, CachePolicy(0, 4)),
    "kv4": (
        _KV4_K | {"v_bits": 4, "v_group": 64, "v_symmetric": True, "v_clip": "mse", "rotate_v": True},
        CachePolicy(64, 4),
    ),
    "k4v2": (_KV4_K | _V2, CachePolicy(64, 4)),
    "kv2": (
        {
            "k_bits": 2,
            "k_axis": "token",
            "k_group": 64,
            "k_symmetric": True,
            "k_mean": "block",
            "k_clip": 0.75,
            "rotate_k": True,
        }
        | _V2,
        CachePolicy(64, 16),
    ),
    "kc4": ({"k_bits": 4, "v_bits": 4, "k_group": 128, "v_group": 128}, CachePolicy()),
    "kc2": ({"k_bits": 2, "v_bits": 2, "k_group": 128, "v_group": 128}, CachePolicy()),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, head_dim: int = 128) -> tuple[QuantSpec, CachePolicy]:
    """The named quantisation and cache policy: one of :data:`PRESETS`; the same objects at every call.

    Channel groups that do not divide ``head_dim`` shrink to the largest group that does.
    """
    check_one_of("name", name, PRESETS)
    check_one_of("head_dim", head_dim, HEAD_DIMS)
    return _preset(name, head_dim)


@lru_cache(maxsize=None)
def _preset(name: str, head_dim: int) -> tuple[QuantSpec, CachePolicy]:
    fields, policy = _PRESETS[name]
    for key in ("v_group", "k_group") if fields.get("k_axis") == "token" else ("v_group",):
        fields = fields | {key: max(g for g in GROUPS if g <= fields[key] and head_dim % g == 0)}
    return QuantSpec(**fields), policy


# ---------------------------------------------------------------------------------------------- arithmetic


def hadamard(x: Tensor) -> Tensor:
    """``x H / sqrt(h)`` over the last dimension, fp32; its own inverse.

    H is Sylvester's Walsh-Hadamard matrix of size h, the largest power of two that divides the dimension (96: three
    blocks of 32). The butterflies run in the order of stride 1, 2, 4, ..; the factor fp32(1 / sqrt(h)) comes last.
    """
    _check_channels(x)
    dim = x.shape[-1]
    h = dim & -dim
    y = x.float()
    stride = 1
    while stride < h:
        pairs = y.reshape(*x.shape[:-1], dim // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2)
        stride *= 2
    return y.reshape(x.shape) * h**-0.5


def _check_channels(x: object) -> None:
    if not isinstance(x, Tensor):
        raise InvalidArgument(f"x is a {type(x).__name__}: allowed is a torch.Tensor")
    if x.dtype not in REAL_DTYPES or x.dim() < 1 or x.shape[-1] == 0:
        names = ", ".join(map(str, REAL_DTYPES))
        raise InvalidArgument(f"x is {x.dtype} {list(x.shape)}: allowed is [.., head_dim] of {names}, head_dim from 1")


def _condition(x: Tensor) -> Tensor:
    """Step 2: finite fp32 values."""
    x = x.to(torch.float32, copy=True).nan_to_num_(nan=0.0, posinf=VALUE_LIMIT, neginf=-VALUE_LIMIT)
    return x.clamp_(-VALUE_LIMIT, VALUE_LIMIT)


def rotate(x: Tensor) -> Tensor:
    """Step 1: conditioned, through :func:`hadamard`, clamped, in x's dtype."""
    _check_channels(x)
    return hadamard(_condition(x)).clamp_(-VALUE_LIMIT, VALUE_LIMIT).to(x.dtype)


def _halving_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` (a power of two) by adding its upper half to its lower half until one is left."""
    while (n := x.shape[dim]) > 1:
        x = x.narrow(dim, 0, n // 2) + x.narrow(dim, n // 2, n // 2)
    return x


def _parameters(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """fp16-valued scale and zero (both fp32 tensors) of groups whose values are to span lo .. hi."""
    levels = lo.new_tensor(float((1 << bits) - 1))  # a tensor: dividing by a Python number may multiply instead
    largest = torch.maximum(lo.abs(), hi.abs())
    if symmetric:
        scale = (largest / (levels / 2)).clamp_(min=MIN_SCALE).half().float()
        return scale, torch.full_like(scale, symmetric_zero(bits))
    scale = torch.maximum((hi - lo) / levels, largest * ZERO_LIMIT).clamp_(min=MIN_SCALE).half().float()
    return scale, (lo / scale).half().float().add_(0.0)  # + 0: no negative zero, whichever zero was the minimum


def _encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes as fp32."""
    return (x * (1.0 / scale)).sub_(zero).round_().clamp_(0, (1 << bits) - 1)


def _quantise_groups(
    x: Tensor, valid: Tensor | None, dim: int, bits: int, symmetric: bool, clip: str | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise fp32 groups that extend over ``dim``.

    valid: bool, broadcastable to x, False for tokens that do not exist; None: all exist.
    -> codes uint8 like x; scale, zero fp32 (fp16 values), size 1 along ``dim``.
    """
    if valid is None:
        lo, hi = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        exists = None
    else:
        lo = x.masked_fill(~valid, torch.inf).amin(dim, keepdim=True)
        hi = x.masked_fill(~valid, -torch.inf).amax(dim, keepdim=True)
        exists = lo <= hi
        lo, hi = lo.where(exists, 0.0), hi.where(exists, 0.0)

    if clip == "mse":
        scale, zero = _search_mse(x, valid, dim, lo, hi, bits, symmetric)
    else:
        if clip not in ("minmax", 1.0):
            lo, hi = _shrink(lo, hi, float(clip), symmetric)
        scale, zero = _parameters(lo, hi, bits, symmetric)

    codes = _encode(x, scale, zero, bits).to(torch.uint8)
    if valid is not None and exists is not None:
        codes = codes.masked_fill_(~valid, 0)
        scale, zero = scale.where(exists, 0.0), zero.where(exists, 0.0)
    return codes, scale, zero


def _shrink(lo: Tensor, hi: Tensor, factor: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The range times a factor: about its middle, or about 0 if symmetric."""
    if symmetric:
        end = torch.maximum(lo.abs(), hi.abs()) * factor
        return -end, end
    mid, half = (lo + hi) * 0.5, (hi - lo) * 0.5 * factor
    return mid - half, mid + half


def _search_mse(
    x: Tensor, valid: Tensor | None, dim: int, lo: Tensor, hi: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """scale and zero of the range factor with the least squared error, of the larger factor on ties."""
    least = torch.full_like(lo, torch.inf)
    best_scale, best_zero = lo, hi
    for factor in MSE_FACTORS:
        scale, zero = _parameters(*_shrink(lo, hi, factor, symmetric), bits, symmetric)
        error = _encode(x, scale, zero, bits).add_(zero).mul_(scale).sub_(x).square_()
        if valid is not None:
            error = error.masked_fill_(~valid, 0.0)
        error = _halving_sum(error, dim)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


# ---------------------------------------------------------------------------------------------- packing


class _Codes:
    """Moves codes between [.., 128 * head_dim] (token-major, one per byte) and a section's bytes."""

    def __init__(self, section: Section, bits: int, device: torch.device) -> None:
        bit = torch.from_numpy(section.table()).flatten()  # of (token, channel)
        self.bits = bits
        # field f of byte i (lowest first) is element f * nbytes + i of the fields
        self.index = (bit % 8 // bits * section.nbytes + bit // 8).to(device)

    def pack(self, codes: Tensor) -> Tensor:
        fields = _put(codes, self.index).unflatten(-1, (8 // self.bits, -1))
        out = fields[..., 0, :].clone()
        for i in range(1, 8 // self.bits):
            out |= fields[..., i, :] << (i * self.bits)
        return out

    def unpack(self, data: Tensor) -> Tensor:
        mask = (1 << self.bits) - 1
        fields = [(data >> shift) & mask for shift in range(0, 8, self.bits)]
        return _take(torch.cat(fields, dim=-1), self.index)


class _Params:
    """Moves fp16 parameters between the shape of a section's table (flattened) and the section's bytes."""

    def __init__(self, section: Section, device: torch.device) -> None:
        self.index = torch.from_numpy(section.table()).flatten().to(device)

    def pack(self, values: Tensor) -> Tensor:
        return _put(values.half(), self.index).view(torch.uint8)

    def unpack(self, data: Tensor) -> Tensor:
        return _take(data.contiguous().view(torch.float16), self.index).float()


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index]; gather is several times faster here than index_select."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def _put(x: Tensor, index: Tensor) -> Tensor:
    """The inverse of :func:`_take`, for an index that names every element once."""
    return torch.empty_like(x, memory_format=torch.contiguous_format).scatter_(-1, index.expand_as(x), x)


@dataclass(frozen=True)
class _Operand:
    """How K or V is quantised: the fields of a QuantSpec that concern it."""

    name: str  # "k" or "v"
    bits: int
    group: int
    per_channel: bool  # a group is `group` tokens of a channel, otherwise `group` channels of a token
    symmetric: bool
    clip: str | float
    mean: bool

    @property
    def group_dim(self) -> int:
        """The dimension of [.., 128 tokens, head_dim] that falls into groups."""
        return -2 if self.per_channel else -1

    def split(self, x: Tensor) -> Tensor:
        """View [.., 128, head_dim] with one more dimension, so that ``group_dim`` runs over the values of a group."""
        return x.unflatten(self.group_dim, (-1, self.group))

    def split_tokens(self, per_token: Tensor) -> Tensor:
        """View [.., 128, 1] so that it broadcasts with :meth:`split`."""
        return self.split(per_token) if self.per_channel else per_token.unsqueeze(-1)

    def params_to_table(self, params: Tensor) -> Tensor:
        """One parameter per group, size 1 along ``group_dim`` of a split tensor -> the section's table, flattened."""
        params = params.squeeze(self.group_dim)
        return (params.mT if self.name == "v" else params).flatten(-2)

    def table_to_params(self, table: Tensor, head_dim: int) -> Tensor:
        """The inverse of :meth:`params_to_table`."""
        if self.name == "v":
            params = table.unflatten(-1, (-1, BLOCK_TOKENS)).mT
        else:
            params = table.unflatten(-1, (-1, head_dim) if self.per_channel else (BLOCK_TOKENS, -1))
        return params.unsqueeze(self.group_dim)


class Codec:
    """Quantises, packs, unpacks and dequantises blocks of one (head_dim, spec). Get it from :func:`codec`."""

    def __init__(self, head_dim: int, spec: QuantSpec, device: torch.device) -> None:
        self.head_dim = head_dim
        self.format = block_format(head_dim, spec)
        per_channel = spec.k_axis == "channel"
        mean = spec.k_mean == "block"
        s = spec
        self.k = _Operand("k", s.k_bits, s.k_group, per_channel, s.k_symmetric, s.k_clip, mean)
        self.v = _Operand("v", s.v_bits, s.v_group, False, s.v_symmetric, s.v_clip, False)
        bits = {"k_codes": s.k_bits, "v_codes": s.v_bits}
        self._packers = {
            name: _Codes(section, bits[name], device) if name in bits else _Params(section, device)
            for name, section in self.format.sections.items()
        }

    def encode(self, k: Tensor, v: Tensor, count: Tensor | None = None) -> Tensor:
        """k, v [.., 128, head_dim] fp16, bf16 or fp32, rotated where the spec rotates -> uint8 [.., block_bytes].

        count: int, broadcastable to [.., 1, 1], valid tokens of each block, at least 1; None: all 128.
        """
        blocks = torch.zeros(*k.shape[:-2], self.format.block_bytes, dtype=torch.uint8, device=k.device)
        valid = None if count is None else torch.arange(BLOCK_TOKENS, device=k.device)[:, None] < count
        for op, x in ((self.k, k), (self.v, v)):
            x = _condition(x)
            if op.mean:
                total = _halving_sum(x if valid is None else x.masked_fill(~valid, 0.0), -2)
                inverse = 1.0 / (x.new_tensor(BLOCK_TOKENS) if count is None else count).float()
                mean = (total * inverse).half().add_(0.0)
                self._store(blocks, op.name + "_mean", mean.flatten(-2))
                x.sub_(mean.float())
            valid_groups = None if valid is None else op.split_tokens(valid)
            codes, scale, zero = _quantise_groups(
                op.split(x), valid_groups, op.group_dim, op.bits, op.symmetric, op.clip
            )
            self._store(blocks, op.name + "_codes", codes.flatten(-3))
            self._store(blocks, op.name + "_scale", op.params_to_table(scale))
            if not op.symmetric:
                self._store(blocks, op.name + "_zero", op.params_to_table(zero))
        return blocks

    def decode_k(self, blocks: Tensor) -> Tensor:
        """uint8 [.., block_bytes] -> K fp32 [.., 128, head_dim], still rotated if the spec rotates."""
        return self._decode(blocks, self.k)

    def decode_v(self, blocks: Tensor) -> Tensor:
        """uint8 [.., block_bytes] -> V fp32 [.., 128, head_dim], still rotated if the spec rotates."""
        return self._decode(blocks, self.v)

    def _decode(self, blocks: Tensor, op: _Operand) -> Tensor:
        def load_params(name: str) -> Tensor:
            return op.table_to_params(self._load(blocks, op.name + name), self.head_dim)

        x = self._load(blocks, op.name + "_codes").float().unflatten(-1, (BLOCK_TOKENS, self.head_dim))
        groups = op.split(x)  # a view: written in place
        groups.add_(symmetric_zero(op.bits) if op.symmetric else load_params("_zero"))
        groups.mul_(load_params("_scale"))
        if op.mean:
            x.add_(self._load(blocks, op.name + "_mean").unsqueeze(-2))
        return x

    def _store(self, blocks: Tensor, name: str, values: Tensor) -> None:
        section = self.format.sections[name]
        blocks[..., section.offset : section.offset + section.nbytes] = self._packers[name].pack(values)

    def _load(self, blocks: Tensor, name: str) -> Tensor:
        section = self.format.sections[name]
        return self._packers[name].unpack(blocks[..., section.offset : section.offset + section.nbytes])


@lru_cache(maxsize=64)
def codec(head_dim: int, spec: QuantSpec, device: torch.device = CPU) -> Codec:
    """The codec of a block format; raises InvalidArgument where there is none."""
    return Codec(head_dim, spec, device)


def rotated(k: Tensor, v: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """k and v as a cache holds them."""
    return rotate(k) if spec.rotate_k else k, rotate(v) if spec.rotate_v else v


def quantise(k: Tensor, v: Tensor, spec: QuantSpec) -> Tensor:
    """k, v [num_tokens, num_kv_heads, head_dim] -> uint8 [ceil(num_tokens / 128), num_kv_heads, block_bytes]."""
    num_tokens, num_kv_heads, head_dim = k.shape
    blocks_of = codec(head_dim, spec, k.device)
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    out = torch.empty(num_blocks, num_kv_heads, blocks_of.format.block_bytes, dtype=torch.uint8, device=k.device)
    step = BLOCK_TOKENS * max(1, CHUNK_VALUES // (BLOCK_TOKENS * num_kv_heads * head_dim))
    for start in range(0, num_tokens, step):
        # blocks [n, num_kv_heads, 128, head_dim] of this chunk; only the very last one may be partial
        chunk_k, chunk_v = (x[start : start + step] for x in (k, v))
        chunk_k, chunk_v = rotated(chunk_k, chunk_v, spec)
        tokens = chunk_k.shape[0]
        padding = -tokens % BLOCK_TOKENS
        count = None
        if padding:
            chunk_k, chunk_v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (chunk_k, chunk_v))
            starts = torch.arange(0, tokens, BLOCK_TOKENS, device=k.device)
            count = (tokens - starts).clamp_(max=BLOCK_TOKENS)[:, None, None, None]
        chunk_k, chunk_v = (x.unflatten(0, (-1, BLOCK_TOKENS)).transpose(1, 2) for x in (chunk_k, chunk_v))
        first = start // BLOCK_TOKENS
        out[first : first + chunk_k.shape[0]] = blocks_of.encode(chunk_k, chunk_v, count)
    return out


def dequantise(blocks: Tensor, head_dim: int, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """uint8 [num_blocks, num_kv_heads, block_bytes] -> k, v [num_blocks * 128, num_kv_heads, head_dim], unrotated."""
    blocks_of = codec(head_dim, spec, blocks.device)
    num_blocks, num_kv_heads, _ = blocks.shape
    shape = (num_blocks, BLOCK_TOKENS, num_kv_heads, head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=blocks.device) for _ in range(2))
    step = max(1, CHUNK_VALUES // (BLOCK_TOKENS * max(1, num_kv_heads) * head_dim))
    for start in range(0, num_blocks, step):
        chunk = blocks[start : start + step]
        for out, values, rotate in (
            (k, blocks_of.decode_k(chunk), spec.rotate_k),
            (v, blocks_of.decode_v(chunk), spec.rotate_v),
        ):
            out[start : start + step] = (hadamard(values) if rotate else values).transpose(1, 2)
    return k.flatten(0, 1), v.flatten(0, 1)
