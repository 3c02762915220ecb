"""KVCache: a paged low-bit cache for a batch of sequences that owns its memory and keeps the books."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import ops
from .cute_kernels.config import QuantSpec
from .cute_kernels.errors import CacheFormatError, InvalidArgument, OutOfPages
from .cute_kernels.layouts import BLOCK_TOKENS, FORMAT_VERSION
from .quantization import CachePolicy

METADATA_KEY = "bitdecoding.KVCache"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INT32_MAX = 2**31 - 1
SIZES = ("batch_size", "max_tokens", "num_kv_heads", "head_dim", "recent", "sink_tokens", "num_pages")


class KVCache:
    """Keys and values of ``batch_size`` sequences: sinks, pages of packed blocks, and a 16-bit tail.

    A sequence keeps its first ``sink_tokens`` and at least its newest ``recent`` tokens in 16 bit; a block of 128
    tokens is packed once there are ``recent + 128`` behind the last packed one.

    Args:
        batch_size, num_kv_heads, head_dim: of the attention layer (one cache serves one layer).
        max_tokens: the most tokens that a sequence may hold.
        quant: what the bits mean.
        recent, sink_tokens: as above; ``KVCache(**vars(policy), ..)`` takes them from a preset's policy.
        dtype: of keys, values and queries: float16 or bfloat16, on the CPU also float32.
        device: cpu or cuda.
        num_pages: the pool that the sequences share; default: enough for max_tokens in every one of them.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        max_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        quant: QuantSpec,
        recent: int = 0,
        sink_tokens: int = 0,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        num_pages: int | None = None,
    ) -> None:
        device = torch.device(device)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("recent", recent, 0),
            ("sink_tokens", sink_tokens, 0),
            ("num_pages", 0 if num_pages is None else num_pages, 0),
        ):
            if type(value) is not int or not least <= value <= INT32_MAX:
                raise InvalidArgument(f"{name}={value!r}: allowed are integers from {least} to 2^31 - 1")
        allowed = [d for d in DTYPES.values() if device.type == "cpu" or d != torch.float32]
        if dtype not in allowed:
            raise InvalidArgument(f"dtype={dtype}: allowed on {device} are {', '.join(map(str, allowed))}")
        bytes_per_block = ops.block_bytes(head_dim, quant)

        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.quant = quant
        self.recent = recent
        self.sink_tokens = sink_tokens
        self.policy = CachePolicy(recent, sink_tokens)
        self.dtype = dtype
        self.device = device

        max_pages = self.policy.packed_len(max_tokens, 0) // BLOCK_TOKENS
        self.num_pages = batch_size * max_pages if num_pages is None else num_pages

        def tokens(count: int) -> Tensor:
            return torch.empty(batch_size, count, num_kv_heads, head_dim, dtype=dtype, device=device)

        def int32(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.pages = torch.empty(self.num_pages, num_kv_heads, bytes_per_block, dtype=torch.uint8, device=device)
        self.block_table = int32(batch_size, max_pages)
        self.packed_lens = int32(batch_size)
        self.seqlens = int32(batch_size)
        self.tail_k, self.tail_v = (tokens(self.policy.tail_capacity) for _ in range(2))
        self.sink_k, self.sink_v = (tokens(sink_tokens) if sink_tokens else None for _ in range(2))

        # the host's books: nothing below waits for the device
        self._lens = [0] * batch_size
        self._packed = [0] * batch_size
        self._pages_of: list[list[int]] = [[] for _ in range(batch_size)]
        self._free = list(range(self.num_pages))[::-1]

    # ------------------------------------------------------------------------------------------ use

    def append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Append k, v [batch_size, new_tokens, num_kv_heads, head_dim], any number of tokens.

        lengths: how many of the new tokens count for each sequence; default: all.
        Raises InvalidArgument, or OutOfPages if a sequence would exceed max_tokens or the pool has no page left; the
        cache is then as it was.
        """
        for name, x in (("k", k), ("v", v)):
            ops.check_tensor(
                name, x, (self.dtype,), batch_size=self.batch_size, new_tokens=k.shape[1] if k.dim() == 4 else None,
                num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            )  # fmt: skip
            if x.device != self.pages.device:
                raise InvalidArgument(f"{name} is on {x.device}: allowed is {self.pages.device}")
        new_tokens = k.shape[1]
        new = [new_tokens] * self.batch_size if lengths is None else self._per_sequence("lengths", lengths)
        for b, count in enumerate(new):
            if not 0 <= count <= new_tokens:
                raise InvalidArgument(f"lengths[{b}]={count}: allowed are 0 to new_tokens={new_tokens}")
            if self._lens[b] + count > self.max_tokens:
                raise OutOfPages(
                    f"sequence {b} would hold {self._lens[b] + count} tokens: allowed are max_tokens={self.max_tokens}"
                )
        lens = [have + count for have, count in zip(self._lens, new, strict=True)]
        packed = [self.policy.packed_len(n, before) for n, before in zip(lens, self._packed, strict=True)]
        needed = [n // BLOCK_TOKENS - len(pages) for n, pages in zip(packed, self._pages_of, strict=True)]
        if sum(needed) > len(self._free):
            raise OutOfPages(
                f"{sum(needed)} pages are needed, {len(self._free)} of num_pages={self.num_pages} are free"
            )

        for b, count in enumerate(needed):
            if count:
                pages = [self._free.pop() for _ in range(count)]
                have = len(self._pages_of[b])
                self.block_table[b, have : have + count] = self.block_table.new_tensor(pages)
                self._pages_of[b] += pages
        ops.append(
            k, v, self.pages, self.block_table, self.seqlens, self.packed_lens, self.tail_k, self.tail_v, self.quant,
            sink_k=self.sink_k, sink_v=self.sink_v, lengths=self.seqlens.new_tensor(new), recent=self.recent,
        )  # fmt: skip
        self._lens, self._packed = lens, packed

    def packs(self, new_tokens: int) -> bool:
        """Whether appending this many tokens to every sequence would fill a block of any."""
        books = zip(self._lens, self._packed, strict=True)
        return any(self.policy.packed_len(n + new_tokens, packed) > packed for n, packed in books)

    def decode(self, q: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q [batch_size, q_len, num_q_heads, head_dim] over the cache; options: see bitdecoding.decode."""
        return ops.decode(
            q, self.pages, self.block_table, self.seqlens, self.quant, packed_lens=self.packed_lens,
            tail_k=self.tail_k, tail_v=self.tail_v, sink_k=self.sink_k, sink_v=self.sink_v, **options,
        )  # fmt: skip

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Roll back to the first ``lengths`` tokens of each sequence, exactly, and free the pages behind them.

        A length must lie in the tail (at least the newest ``recent`` tokens), among the sinks, or on the border of a
        packed block: the tokens of a block that is packed are no longer there in 16 bit. Otherwise InvalidArgument
        says which lengths are possible, and nothing is changed.
        """
        lens = [lengths] * self.batch_size if isinstance(lengths, int) else self._per_sequence("lengths", lengths)
        packed = []
        for b, (n, have, have_packed) in enumerate(zip(lens, self._lens, self._packed, strict=True)):
            if not 0 <= n <= have:
                raise InvalidArgument(f"lengths[{b}]={n}: allowed are 0 to {have}, the tokens of sequence {b}")
            sinks = min(have, self.sink_tokens)
            remaining = max(0, n - sinks)
            if remaining < have_packed and remaining % BLOCK_TOKENS:
                below = sinks + remaining - remaining % BLOCK_TOKENS
                raise InvalidArgument(
                    f"lengths[{b}]={n} would cut a packed block: allowed are {sinks + have_packed} to {have} "
                    f"(the newest {have - sinks - have_packed} tokens can be rolled back one by one), "
                    f"or the borders of blocks, the next ones are {below} and {below + BLOCK_TOKENS}"
                )
            packed.append(min(have_packed, remaining))
        for pages, n in zip(self._pages_of, packed, strict=True):
            self._free += pages[n // BLOCK_TOKENS :][::-1]
            del pages[n // BLOCK_TOKENS :]
        self._lens, self._packed = lens, packed
        self.seqlens.copy_(self.seqlens.new_tensor(lens))
        self.packed_lens.copy_(self.packed_lens.new_tensor(packed))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds, whether or not tokens fill it."""
        return sum(x.nbytes for x in self._buffers() if x is not None)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the blocks and 16-bit tokens that the sequences hold now."""
        used_pages = self.num_pages - len(self._free)
        in_16_bit = sum(self._lens) - sum(self._packed)
        return used_pages * self.pages[:1].nbytes + 2 * in_16_bit * self.tail_k[:1, :1].nbytes

    def _buffers(self) -> tuple[Tensor | None, ...]:
        return (
            *(self.pages, self.block_table, self.seqlens, self.packed_lens),
            *(self.tail_k, self.tail_v, self.sink_k, self.sink_v),
        )

    def _per_sequence(self, name: str, values: Sequence[int] | Tensor) -> list[int]:
        listed = values.tolist() if isinstance(values, Tensor) else list(values)
        if len(listed) != self.batch_size or not all(type(n) is int for n in listed):
            raise InvalidArgument(f"{name}={listed!r}: allowed are batch_size={self.batch_size} integers")
        return listed

    # ------------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache as safetensors: the blocks and 16-bit tokens in use, sequence after sequence."""
        config = {name: getattr(self, name) for name in SIZES}
        config |= {"quant": self.quant.to_dict(), "dtype": next(n for n, d in DTYPES.items() if d == self.dtype)}
        order = [page for pages in self._pages_of for page in pages]
        sinks = [min(n, self.sink_tokens) for n in self._lens]
        tails = [n - sink - packed for n, sink, packed in zip(self._lens, sinks, self._packed, strict=True)]
        tensors = {
            "seqlens": self.seqlens,
            "packed_lens": self.packed_lens,
            "pages": self.pages[order],
            "tail_k": _concatenate(self.tail_k, tails),
            "tail_v": _concatenate(self.tail_v, tails),
        }
        if self.sink_k is not None and self.sink_v is not None:
            tensors |= {"sink_k": _concatenate(self.sink_k, sinks), "sink_v": _concatenate(self.sink_v, sinks)}
        config |= {"format_version": FORMAT_VERSION}
        save_file(tensors, path, {METADATA_KEY: json.dumps(config)})  # one key: safetensors shuffles several

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> KVCache:
        """Read what :meth:`save` wrote, onto any device.

        Nothing in the file is trusted or executed: CacheFormatError for anything that save would not have written.
        """
        try:
            with safe_open(path, framework="pt") as file:
                cache = cls._from_metadata(file.metadata() or {}, file, device)
        except (SafetensorError, UnicodeError) as error:
            raise CacheFormatError(f"{os.fspath(path)}: not a safetensors file: {error}") from None
        except CacheFormatError as error:
            raise CacheFormatError(f"{os.fspath(path)}: {error}") from None
        return cache

    @classmethod
    def _from_metadata(cls, metadata: dict[str, str], file: safe_open, device: torch.device | str) -> KVCache:
        if METADATA_KEY not in metadata:
            raise CacheFormatError(f"metadata has no {METADATA_KEY}: not a saved KVCache")
        try:
            config = json.loads(metadata[METADATA_KEY])
            if (version := config.pop("format_version")) != FORMAT_VERSION:
                raise CacheFormatError(f"format_version={version!r}: this library reads {FORMAT_VERSION}")
            quant = QuantSpec.from_json(json.dumps(config.pop("quant")))
            dtype = DTYPES[config.pop("dtype")]
            if set(config) != set(SIZES) or not all(type(n) is int for n in config.values()):
                raise CacheFormatError(f"config: allowed are integers {', '.join(SIZES)}, besides quant and dtype")
            bytes_per_block = ops.block_bytes(config["head_dim"], quant)
        except Exception as error:  # whatever plain values of hostile text provoke in the constructors
            raise CacheFormatError(f"config: {error!r}") from None

        # the lengths are as long as the file says, so they bound batch_size; they decide all other shapes
        def read(name: str, shape: tuple[int, ...], want: torch.dtype) -> Tensor:
            if name not in names:
                raise CacheFormatError(f"tensor {name} is missing")
            view = file.get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise CacheFormatError(f"{name}: shape {view.get_shape()}: allowed is {list(shape)}")
            x = file.get_tensor(name)
            if x.dtype != want:
                raise CacheFormatError(f"{name}: dtype {x.dtype}: allowed is {want}")
            return x

        names = set(file.keys())
        batch_size, sink_tokens = config["batch_size"], config["sink_tokens"]
        lens = read("seqlens", (batch_size,), torch.int32).tolist()
        packed = read("packed_lens", (batch_size,), torch.int32).tolist()
        policy = CachePolicy(config["recent"], sink_tokens)
        sinks = [min(n, sink_tokens) for n in lens]
        tails = [n - sink - p for n, sink, p in zip(lens, sinks, packed, strict=True)]
        for b, (n, p, tail) in enumerate(zip(lens, packed, tails, strict=True)):
            if not 0 <= n <= config["max_tokens"]:
                raise CacheFormatError(f"seqlens[{b}]={n}: allowed are 0 to max_tokens={config['max_tokens']}")
            if p < 0 or p % BLOCK_TOKENS or not 0 <= tail <= policy.tail_capacity:
                raise CacheFormatError(f"packed_lens[{b}]={p}: not possible for a sequence of {n} tokens")
        heads, head_dim = config["num_kv_heads"], config["head_dim"]
        num_blocks = sum(packed) // BLOCK_TOKENS
        if num_blocks > config["num_pages"]:
            raise CacheFormatError(f"num_pages={config['num_pages']}: {num_blocks} blocks are held")
        pages = read("pages", (num_blocks, heads, bytes_per_block), torch.uint8)
        tail_k, tail_v = (read(name, (sum(tails), heads, head_dim), dtype) for name in ("tail_k", "tail_v"))
        sink_k, sink_v = (
            read(name, (sum(sinks), heads, head_dim), dtype) if sink_tokens else None for name in ("sink_k", "sink_v")
        )
        try:
            cache = cls(**config, quant=quant, dtype=dtype, device=device)
        except InvalidArgument as error:
            raise CacheFormatError(f"config: {error}") from None
        except RuntimeError as error:
            raise CacheFormatError(f"config: no memory for {config}: {error}") from None

        next_page = 0
        for b, n in enumerate(packed):
            count = n // BLOCK_TOKENS
            cache._pages_of[b] = list(range(next_page, next_page + count))
            cache.block_table[b, :count] = torch.arange(next_page, next_page + count)
            next_page += count
        del cache._free[len(cache._free) - num_blocks :]  # the free list ends with the lowest pages
        cache.pages[:num_blocks] = pages.to(device)
        _scatter(cache.tail_k, tail_k, tails)
        _scatter(cache.tail_v, tail_v, tails)
        if cache.sink_k is not None and cache.sink_v is not None:
            _scatter(cache.sink_k, sink_k, sinks)
            _scatter(cache.sink_v, sink_v, sinks)
        cache.seqlens.copy_(torch.tensor(lens))
        cache.packed_lens.copy_(torch.tensor(packed))
        cache._lens, cache._packed = lens, packed
        return cache


def _concatenate(x: Tensor, counts: list[int]) -> Tensor:
    """The first counts[b] tokens of each sequence, [sum(counts), ..]."""
    return torch.cat([row[:count] for row, count in zip(x, counts, strict=True)])


def _scatter(x: Tensor, tokens: Tensor, counts: list[int]) -> None:
    """The inverse of :func:`_concatenate`."""
    for row, part in zip(x, tokens.split(counts), strict=True):
        row[: len(part)] = part
