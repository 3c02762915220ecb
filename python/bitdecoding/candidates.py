"""What `bitdecoding bench` and `tune` time: our decode over a random low-bit cache, and rivals over whole values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from . import cuda
from .arguments import MAX_BATCH
from .cute_kernels.checks import INT32_MAX
from .cute_kernels.config import KernelConfig, QuantSpec
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS, block_format, symmetric_zero
from .ops import decode, dequantize, rotate
from .quantization import preset
from .timing import Candidate, copies_of, memory_bytes

RAGGED = tuple(1024 * n for n in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128))
CHECKED_TOKENS = 4096  # packed tokens of a sequence that is compared with fp32 attention
FLASHINFER_PAGE = 16  # tokens, as in its own benchmark
FLASHINFER_WORKSPACE = 128 << 20  # bytes, as its documentation recommends


class Shape(NamedTuple):
    """A problem: the tokens of each sequence, of which the last ``q_len`` are query tokens, and the heads."""

    lengths: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    q_len: int = 1

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int | None:
        """Of every sequence; None if they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    def __str__(self) -> str:
        tokens = self.tokens or f"{min(self.lengths)}-{max(self.lengths)}"
        of_queries = f", q_len {self.q_len}" if self.q_len > 1 else ""
        return f"{self.batch}, {self.num_q_heads}/{self.num_kv_heads}, {tokens}{of_queries}"


def parse_shapes(text: str) -> list[Shape]:
    """ "batch,num_q_heads,num_kv_heads,tokens;..." or "ragged" -> Shapes; raises InvalidArgument."""
    shapes = []
    for part in [part for part in text.split(";") if part] or [""]:
        if part == "ragged":
            shapes.append(Shape(RAGGED, 32, 8))
            continue
        try:
            batch, num_q_heads, num_kv_heads, tokens = map(int, part.split(","))
        except ValueError:
            batch = 0
        sizes = (num_q_heads, num_kv_heads, tokens) if batch else (0,)
        if not (1 <= batch <= MAX_BATCH and 1 <= min(sizes) and max(sizes) <= INT32_MAX) or num_q_heads % num_kv_heads:
            raise InvalidArgument(
                f"--shapes {part}: allowed are 'ragged' and batch,num_q_heads,num_kv_heads,tokens, all from 1, "
                f"batch to {MAX_BATCH}, num_q_heads a multiple of num_kv_heads"
            )
        shapes.append(Shape((tokens,) * batch, num_q_heads, num_kv_heads))
    return shapes


# ---------------------------------------------------------------------------------------------- ours


def random_pages(
    spec: QuantSpec, head_dim: int, num_pages: int, num_kv_heads: int, generator: torch.Generator
) -> Tensor:
    """Pages of random codes with parameters that make values of about unit size."""
    fmt = block_format(head_dim, spec)
    device = generator.device
    shape = (num_pages, num_kv_heads, fmt.block_bytes)
    pages = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    for operand, bits in (("k", spec.k_bits), ("v", spec.v_bits)):
        centre, step = symmetric_zero(bits), 3.5 / ((1 << bits) - 1)
        for part, low, high in (
            ("scale", step / 2, 1.5 * step),
            ("zero", 1.2 * centre, 0.8 * centre),
            ("mean", -0.5, 0.5),
        ):
            section = fmt.sections.get(f"{operand}_{part}")
            if section is None:
                continue
            values = torch.rand((*shape[:2], section.nbytes // 2), device=device, generator=generator)
            target = pages[..., section.offset : section.offset + section.nbytes]
            target.copy_((low + (high - low) * values).half().view(torch.uint8))
    return pages


class LowBitCache:
    """Copies of a random cache of one shape, split into sinks, pages and tail as KVCache does, and queries on it."""

    def __init__(self, name: str, shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """name: of a preset."""
        generator = torch.Generator(device).manual_seed(0)
        heads, batch = shape.num_kv_heads, shape.batch
        self.spec, policy = preset(name, head_dim)
        self.name, self.shape = name, shape
        self.packed = [policy.packed_len(n, 0) for n in shape.lengths]
        self.sinks = [min(n, policy.sink_tokens) for n in shape.lengths]
        self.tails = [n - s - p for n, s, p in zip(shape.lengths, self.sinks, self.packed, strict=True)]
        blocks = [n // BLOCK_TOKENS for n in self.packed]
        token_bytes = 2 * heads * head_dim * dtype.itemsize
        in_16_bit = sum(self.sinks) + sum(self.tails)
        self.cache_bytes = sum(blocks) * heads * self.spec.block_bytes(head_dim) + in_16_bit * token_bytes
        self.copies = copies_of(self.cache_bytes, device)
        if (needed := self.copies * self.cache_bytes) > (memory := memory_bytes(device)):
            raise InvalidArgument(f"--shapes {shape}: caches take {needed:,} bytes, {device} has {memory:,}")

        def tokens(count: int) -> Tensor:
            size = (2, self.copies, batch, count, heads, head_dim)
            return torch.randn(size, dtype=dtype, device=device, generator=generator)

        order = torch.randperm(sum(blocks), device=device, generator=generator).int()
        self.table = torch.zeros(batch, max(1, *blocks), dtype=torch.int32, device=device)
        for row, entries in zip(self.table, order.split(blocks), strict=True):
            row[: len(entries)] = entries
        self.seqlens = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        self.packed_lens = torch.tensor(self.packed, dtype=torch.int32, device=device)
        size = (batch, shape.q_len, shape.num_q_heads, head_dim)
        self.q = torch.randn(size, device=device, generator=generator).to(dtype)
        self.out = torch.empty_like(self.q)
        pages = random_pages(self.spec, head_dim, max(1, sum(blocks)), heads, generator)
        self.pages = pages.repeat(self.copies, 1, 1, 1).view(self.copies, *pages.shape).unbind()
        tails = zip(*tokens(max(1, *self.tails)), strict=True)
        self.in_16_bit = [{"tail_k": k, "tail_v": v} for k, v in tails]
        if policy.sink_tokens:
            sinks = zip(*tokens(policy.sink_tokens), strict=True)
            self.in_16_bit = [
                kept | {"sink_k": k, "sink_v": v} for kept, (k, v) in zip(self.in_16_bit, sinks, strict=True)
            ]

    @property
    def kernel(self) -> str | None:
        """The name of the kernel that the library chooses; None on the CPU."""
        if self.q.device.type != "cuda":
            return None
        heads = self.shape.num_q_heads, self.shape.num_kv_heads
        return cuda.choose(self.q.get_device(), self.q.shape[-1], self.spec, *heads, self.shape.q_len).name()

    def candidate(self, config: KernelConfig | None = None) -> Candidate:
        """Decode with the kernel of ``config``, or the one that the library chooses."""
        name = self.name if config is None else config.name()
        arguments = [
            ((self.q, pages, self.table, self.seqlens, self.spec), in_16_bit | {"packed_lens": self.packed_lens})
            for pages, in_16_bit in zip(self.pages, self.in_16_bit, strict=True)
        ]

        def call(i: int) -> object:
            tensors, options = arguments[i % self.copies]
            return decode(*tensors, **options, out=self.out, config=config)

        return Candidate(name, call, self.copies, self.cache_bytes)

    def error(self, config: KernelConfig | None = None) -> float:
        """Relative error of the first sequence's result against fp32 attention over its dequantised cache.

        Of its packed tokens the first CHECKED_TOKENS take part.
        """
        sinks, tail, packed = self.sinks[0], self.tails[0], min(self.packed[0], CHECKED_TOKENS)
        packed_lens = self.packed_lens.clamp(max=CHECKED_TOKENS)
        seqlens = self.seqlens - self.packed_lens + packed_lens
        first, in_16_bit = self.pages[0], self.in_16_bit[0]
        decode(
            self.q, first, self.table, seqlens, self.spec, **in_16_bit, packed_lens=packed_lens, out=self.out,
            config=config,
        )  # fmt: skip
        heads, head_dim = self.shape.num_kv_heads, self.q.shape[-1]
        blocks = first[self.table[0, : packed // BLOCK_TOKENS].long()].cpu()

        def kept(where: str, part: str, count: int) -> list[Tensor]:  # in 16 bit, as before a rotation
            if count == 0:
                return []
            x = in_16_bit[f"{where}_{part}"][0, :count].float()
            return [rotate(x) if getattr(self.spec, f"rotate_{part}") else x]  # its own inverse

        values = []  # of K and V: [num_kv_heads, tokens, head_dim]
        for part, unpacked in zip("kv", dequantize(blocks, head_dim, self.spec, torch.float32), strict=True):
            in_order = [*kept("sink", part, sinks), unpacked.to(self.q.device), *kept("tail", part, tail)]
            values.append(torch.cat(in_order).transpose(0, 1))
        k, v = values
        q_len = self.shape.q_len

        def rows(x: Tensor) -> Tensor:  # [q_len, num_q_heads, head_dim] -> fp32 [num_kv_heads, q_len * group, head_dim]
            return x.float().view(q_len, heads, -1, head_dim).transpose(0, 1).reshape(heads, -1, head_dim)

        got, scores = rows(self.out[0]), rows(self.q[0]) @ k.transpose(1, 2) * head_dim**-0.5
        tokens = scores.shape[-1]
        unseen = torch.ones(q_len, tokens, dtype=torch.bool, device=scores.device).triu(tokens - q_len + 1)
        scores.masked_fill_(unseen.repeat_interleave(scores.shape[1] // q_len, 0), -torch.inf)
        want = scores.softmax(-1) @ v
        return ((got - want).norm() / want.norm()).item()


# ---------------------------------------------------------------------------------------------- rivals

RIVALS = {"cuda": ("sdpa flash", "sdpa cudnn", "flashinfer"), "cpu": ("sdpa", "sdpa fp32")}
BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


class Rivals:
    """Attention over a random cache of whole values by other libraries. A method raises where its library cannot.

    The caches are 16 bit, and on a CPU also fp32, where torch is faster with those.
    """

    def __init__(self, shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.head_dim, self.dtype, self.device = shape, head_dim, dtype, device
        self._contiguous: dict[torch.dtype, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return RIVALS[self.device.type]

    def candidate(self, name: str) -> Candidate:
        dtype = torch.float32 if name == "sdpa fp32" else self.dtype
        cache_bytes = 2 * sum(self.shape.lengths) * self.shape.num_kv_heads * self.head_dim * dtype.itemsize
        copies = copies_of(cache_bytes, self.device)
        call = self._flashinfer(copies) if name == "flashinfer" else self._sdpa(name, dtype, copies)
        call(0)  # raises where the library cannot
        return Candidate(name, call, copies, cache_bytes)

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def _sdpa(self, name: str, dtype: torch.dtype, copies: int) -> Callable[[int], Tensor]:
        """torch SDPA over caches [K and V, batch, num_kv_heads, tokens, head_dim], which its backends share."""
        shape = self.shape
        if shape.tokens is None:
            raise InvalidArgument("SDPA takes no ragged batch")
        size = (copies, 2, shape.batch, shape.num_kv_heads, shape.tokens, self.head_dim)
        if dtype not in self._contiguous:
            self._contiguous[dtype] = self._random(*size, dtype=dtype)
        caches = [kv.unbind() for kv in self._contiguous[dtype]]
        group = shape.num_q_heads // shape.num_kv_heads
        backend = BACKENDS.get(name)
        if backend is None and shape.q_len == 1:
            # on a CPU the heads of a group are faster as rows of one query: the cache is then read once for all
            q = self._random(shape.batch, shape.num_kv_heads, group, self.head_dim, dtype=dtype)
            return lambda i: scaled_dot_product_attention(q, caches[i % copies][0], caches[i % copies][1])
        q = self._random(shape.batch, shape.num_q_heads, shape.q_len, self.head_dim, dtype=dtype)
        mask = causal_lower_right(shape.q_len, shape.tokens) if shape.q_len > 1 else None

        def call(i: int) -> Tensor:
            k, v = caches[i % copies]
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)

        return call

    def _flashinfer(self, copies: int) -> Callable[[int], Tensor]:
        """Its batch decode over pages of 16 tokens, on tensor cores as in its own benchmark; planning is not timed."""
        import flashinfer

        shape = self.shape
        if shape.q_len > 1:
            raise InvalidArgument("its batch decode takes one query token")
        pages = [-(-n // FLASHINFER_PAGE) for n in shape.lengths]
        first_page = [0, *itertools.accumulate(pages)]
        last_page_len = [n - (count - 1) * FLASHINFER_PAGE for n, count in zip(shape.lengths, pages, strict=True)]
        caches = self._random(copies, sum(pages), 2, FLASHINFER_PAGE, shape.num_kv_heads, self.head_dim).unbind()
        q = self._random(shape.batch, shape.num_q_heads, self.head_dim)

        def int32(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=self.device)

        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, kv_layout="NHD", use_tensor_cores=True)
        wrapper.plan(
            int32(first_page), int32(range(sum(pages))), int32(last_page_len), shape.num_q_heads, shape.num_kv_heads,
            self.head_dim, FLASHINFER_PAGE, q_data_type=self.dtype, kv_data_type=self.dtype,
        )  # fmt: skip
        return lambda i: wrapper.run(q, caches[i % copies])
