"""KVCache: a paged low-bit cache for a batch of sequences that owns its memory and keeps the books."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import ops
from .cute_kernels.checks import check_int, check_one_of, check_path, check_type, parse_json, shown
from .cute_kernels.config import MMA_COLUMNS, QuantSpec
from .cute_kernels.errors import CacheFormatError, InvalidArgument, OutOfPages
from .cute_kernels.layouts import BLOCK_TOKENS, FORMAT_VERSION
from .quantization import CachePolicy

METADATA_KEY = "bitdecoding.KVCache"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STEP_TOKENS = 8  # that a step attends to before blocks are packed
TAIL_ROOM = 2 * STEP_TOKENS  # beside a settled tail: for tokens that are left to the next step to pack, and for its own
NO_PAGE = -1  # an entry of the block table that names no page
SIZES = ("batch_size", "max_tokens", "num_kv_heads", "head_dim", "recent", "sink_tokens", "num_pages")


class KVCache:
    """Keys and values of ``batch_size`` sequences: sinks, pages of packed blocks, and a 16-bit tail.

    A sequence keeps its first ``sink_tokens`` and at least its newest ``recent`` tokens in 16 bit; a block of 128
    tokens is packed once there are ``recent + 128`` behind the last packed one.

    Pages are taken and freed by the host. :meth:`append` takes what it needs, or, with ``reserved=True``, leaves all to
    the device, which then packs into pages that :meth:`reserve` has set aside. That form, :meth:`decode`, and
    :meth:`step` that does both can be captured in a CUDA graph or compiled by torch.compile: they allocate nothing and
    wait for nothing. What replays append, the host learns by :meth:`sync`; every method that needs it calls that first.

    Args:
        batch_size, num_kv_heads, head_dim: of the attention layer (one cache serves one layer).
        max_tokens: the most tokens that a sequence may hold.
        quant: what the bits mean.
        recent, sink_tokens: as above; ``KVCache(**vars(policy), ..)`` takes them from a preset's policy.
        dtype: of keys, values and queries: float16 or bfloat16, on the CPU also float32.
        device: cpu or cuda.
        num_pages: the pool that the sequences share; default: enough for max_tokens in every one of them.
        workspace: from :func:`bitdecoding.ops.workspace`, for use within torch.compile (caches that are not used at the
            same time can share one); without, a compiled step zeroes one at every call.
    """

    @torch.inference_mode(False)  # what is allocated within inference mode cannot be changed outside
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
        workspace: Tensor | None = None,
    ) -> None:
        device = ops.check_device("device", device)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("recent", recent, 0),
            ("sink_tokens", sink_tokens, 0),
            ("num_pages", 0 if num_pages is None else num_pages, 0),
        ):
            check_int(name, value, least)
        check_one_of("dtype", dtype, tuple(d for d in DTYPES.values() if device.type == "cpu" or d != torch.float32))
        check_type("workspace", workspace, Tensor, None)
        quant = ops.parsed_spec(quant, "quant")
        bytes_per_block = ops.block_bytes(head_dim, quant)

        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.quant = quant
        self._quant_json = quant.to_json()  # for torch.compile
        self.recent = recent
        self.sink_tokens = sink_tokens
        self.policy = CachePolicy(recent, sink_tokens)
        self.dtype = dtype
        self.device = device
        self.workspace = workspace

        self._step_columns = MMA_COLUMNS  # queries of a KV head
        if device.type == "cuda":
            from . import cuda

            self._step_columns = cuda.step_columns(device.index, head_dim, quant)
        max_pages = self.policy.packed_len(max_tokens, 0) // BLOCK_TOKENS
        self.num_pages = batch_size * max_pages if num_pages is None else num_pages

        def tokens(count: int) -> Tensor:
            return torch.empty(batch_size, count, num_kv_heads, head_dim, dtype=dtype, device=device)

        def int32(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.pages = torch.empty(self.num_pages, num_kv_heads, bytes_per_block, dtype=torch.uint8, device=device)
        self.block_table = int32(batch_size, max_pages).fill_(NO_PAGE)
        self.packed_lens = int32(batch_size)
        self.seqlens = int32(batch_size)
        self.status = int32(1)  # see bitdecoding.append
        self.tail_k, self.tail_v = (tokens(self.policy.tail_capacity + TAIL_ROOM) for _ in range(2))
        self.sink_k, self.sink_v = (tokens(sink_tokens) if sink_tokens else None for _ in range(2))

        # the host's books
        self._lens = [0] * batch_size
        self._packed = [0] * batch_size
        self._pages_of: list[list[int]] = [[] for _ in range(batch_size)]  # in use, then reserved
        self._free = list(range(self.num_pages))[::-1]
        self._owners = [0] * self.num_pages  # sequences that a page belongs to
        self._stale = False  # lengths may be other than the books say
        self._captured = False  # and always may: graphs can be replayed at any time
        self._without_page = 0  # what status said

    # ------------------------------------------------------------------------------------------ use

    def append(
        self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None, *, reserved: bool = False
    ) -> None:
        """Append k, v [batch_size, new_tokens, num_kv_heads, head_dim], any number of tokens.

        lengths: how many of the new tokens count for each sequence; default: all.
        Raises InvalidArgument, or OutOfPages if a sequence would exceed max_tokens or the pool has no page left; the
        cache is then as it was.

        reserved: blocks go to reserved pages only, so that the host need not know the lengths (int32 [batch_size] on
        the cache's device, or None); always so while a graph is being captured or torch.compile traces. A sequence that
        has no page left for a full block stays as it was, and the next :meth:`sync` raises OutOfPages.
        """
        new_tokens = self._check_new(k, v)
        if reserved or self._recording():
            if lengths is not None:
                ops.check_tensor("lengths", lengths, (torch.int32,), batch_size=self.batch_size)
                assert isinstance(lengths, Tensor)
            self._append(k, v, lengths, self.status)
            self._leave_to_device()
            return

        self.sync()
        new = [new_tokens] * self.batch_size if lengths is None else self._per_sequence("lengths", lengths)
        for b, count in enumerate(new):
            if not 0 <= count <= new_tokens:
                raise InvalidArgument(f"lengths[{b}]={count}: allowed are 0 to new_tokens={new_tokens}")
        lens, packed = self._provide(new)
        self._append(k, v, None if lengths is None else self._on_device(new), None)
        self._lens, self._packed = lens, packed

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, reserved: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append k, v [batch_size, q_len, num_kv_heads, head_dim] and attend to all tokens; reserved: as for append.

        Up to STEP_TOKENS are attended to in 16 bit before a block that gets full is packed, see
        :func:`bitdecoding.step`: by one kernel that does it all where there is one (:meth:`can_step`), else the next
        step packs it. More tokens are appended, then attended to. An error leaves the cache as it was.
        """
        new_tokens = self._check_new(k, v)
        self._check_q(q, new_tokens)
        whole = self.can_step(q)
        if not whole:
            self._check_decode(q, options)  # before anything is appended
        more_recent = 0 if whole or new_tokens > STEP_TOKENS else new_tokens
        if reserved or self._recording():
            result = self._append_for_step(q, k, v, self.status, whole, more_recent, options)
            self._leave_to_device()
        else:
            self.sync()
            held = [len(pages) for pages in self._pages_of]
            lens, packed = self._provide([new_tokens] * self.batch_size, more_recent)
            try:
                result = self._append_for_step(q, k, v, None, whole, more_recent, options)
            except BaseException:
                self._keep_pages(held)
                raise
            self._lens, self._packed = lens, packed
        return self.decode(q, **options) if result is None else result

    def can_step(self, q: Tensor) -> bool:
        """Whether one kernel does the :meth:`step` of queries [batch_size, q_len, num_q_heads, head_dim]: there is one
        for so many queries of a KV head.
        """
        _, q_len, num_q_heads, _ = q.shape
        return q_len * num_q_heads <= self._step_columns * self.num_kv_heads

    def reserve(self, new_tokens: int | Sequence[int] | Tensor) -> None:
        """Set pages aside for so many more tokens of each sequence, to be appended with ``reserved=True``.

        Raises InvalidArgument, or OutOfPages if a sequence would exceed max_tokens or the pool has too few pages;
        nothing is changed then. Reserved pages that are not used stay with their sequence until it is truncated.
        """
        self.sync()
        many = [new_tokens] * self.batch_size if type(new_tokens) is int else new_tokens
        new = self._per_sequence("new_tokens", many)
        for b, count in enumerate(new):
            if count < 0:
                raise InvalidArgument(f"new_tokens[{b}]={count}: allowed are integers from 0")
        self._provide(new)

    def sync(self) -> None:
        """Learn what the device has appended with ``reserved=True``; waits for it only if there can be anything.

        Raises OutOfPages, once, if a sequence had no reserved page left for a full block; it then stayed as it was
        before that append, and the cache can be used on. In a graph, tokens are rolled back by lowering ``seqlens``.
        """
        self._refresh()
        if self._without_page:
            b, self._without_page = self._without_page - 1, 0
            raise OutOfPages(
                f"sequence {b} had no reserved page for a full block, so that its tokens were not appended: "
                f"{len(self._pages_of[b])} of its pages were reserved or in use"
            )

    def packs(self, new_tokens: int) -> bool:
        """Whether appending this many tokens to every sequence would fill a block of any."""
        check_int("new_tokens", new_tokens)
        self.sync()
        books = zip(self._lens, self._packed, strict=True)
        return any(self.policy.packed_len(n + new_tokens, packed) > packed for n, packed in books)

    def decode(self, q: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q [batch_size, q_len, num_q_heads, head_dim] over the cache; options: see bitdecoding.decode."""
        return ops.decode(
            q, self.pages, self.block_table, self.seqlens, self._spec(), packed_lens=self.packed_lens,
            tail_k=self.tail_k, tail_v=self.tail_v, sink_k=self.sink_k, sink_v=self.sink_v,
            workspace=self._workspace_to_trace(), **options,
        )  # fmt: skip

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Roll back to the first ``lengths`` tokens of each sequence, exactly, and free the pages behind them.

        A length must lie in the tail (at least the newest ``recent`` tokens), among the sinks, or on the border of a
        packed block: the tokens of a block that is packed are no longer there in 16 bit. Otherwise InvalidArgument
        says which lengths are possible, and nothing is changed. Pages that only this sequence holds are freed, reserved
        ones too.
        """
        self.sync()
        lens = [lengths] * self.batch_size if type(lengths) is int else self._per_sequence("lengths", lengths)
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
        self._keep_pages([n // BLOCK_TOKENS for n in packed])
        self._write_lengths(lens, packed)

    def fork(self, sources: Sequence[int] | Tensor) -> None:
        """Sequence b becomes a copy of what sequence ``sources[b]`` is now; where that is b itself, it stays.

        ``[0] * batch_size`` lets all go on from one prompt, the parents of its beams are what a beam search passes.
        Packed blocks are shared until the last sequence that holds them lets go; sinks and tail are copied, reserved
        pages stay behind. Needs no page. Raises InvalidArgument for what is not a sequence.
        """
        self.sync()
        parents = self._per_sequence("sources", sources)
        for b, source in enumerate(parents):
            if not 0 <= source < self.batch_size:
                raise InvalidArgument(f"sources[{b}]={source}: allowed are 0 to {self.batch_size - 1}")
        changed = [b for b, source in enumerate(parents) if b != source]
        if not changed:
            return
        shared = [self._pages_of[source][: self._packed[source] // BLOCK_TOKENS] for source in parents]
        for b in changed:
            for page in shared[b]:
                self._owners[page] += 1
        for b in changed:
            self._release(self._pages_of[b])
            self._pages_of[b] = shared[b]
        self._write_table(changed)
        into, out_of = (self._on_device(rows) for rows in (changed, [parents[b] for b in changed]))
        for x in (self.tail_k, self.tail_v, self.sink_k, self.sink_v):
            if x is not None:
                x.index_copy_(0, into.long(), x.index_select(0, out_of))
        self._write_lengths([self._lens[source] for source in parents], [self._packed[source] for source in parents])

    def to(self, device: torch.device | str) -> KVCache:
        """A copy on a device, byte for byte, with the same pages in use, shared and reserved."""
        self.sync()
        copy = KVCache(**{name: getattr(self, name) for name in (*SIZES, "quant", "dtype")}, device=device)
        for mine, its in zip(self._buffers(), copy._buffers(), strict=True):
            if mine is not None and its is not None:
                its.copy_(mine)
        copy._lens, copy._packed = list(self._lens), list(self._packed)
        copy._pages_of = [list(pages) for pages in self._pages_of]
        copy._free, copy._owners = list(self._free), list(self._owners)
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds, whether or not tokens fill it."""
        return sum(x.nbytes for x in self._buffers() if x is not None)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the blocks (shared ones count once) and 16-bit tokens that the sequences hold now."""
        self._refresh()
        held = zip(self._pages_of, self._packed, strict=True)
        used_pages = {page for pages, n in held for page in pages[: n // BLOCK_TOKENS]}
        in_16_bit = sum(self._lens) - sum(self._packed)
        return len(used_pages) * self.pages[:1].nbytes + 2 * in_16_bit * self.tail_k[:1, :1].nbytes

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence uses or has reserved."""
        return len(self._free)

    # ------------------------------------------------------------------------------------------ books

    def _check_new(self, k: Tensor, v: Tensor) -> int:
        """Check new keys and values -> how many tokens they are."""
        new_tokens = None
        for name, x in (("k", k), ("v", v)):
            ops.check_tensor(
                name, x, (self.dtype,), batch_size=self.batch_size, new_tokens=new_tokens,
                num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            )  # fmt: skip
            new_tokens = k.shape[1]
            if x.device != self.pages.device:
                raise InvalidArgument(f"{name} is on {x.device}: allowed is {self.pages.device}")
        return k.shape[1]

    def _check_q(self, q: Tensor, q_len: int) -> None:
        ops.check_tensor(
            "q", q, (self.dtype,), batch_size=self.batch_size, q_len=q_len, num_q_heads=None, head_dim=self.head_dim
        )
        if q.device != self.pages.device:
            raise InvalidArgument(f"q is on {q.device}: allowed is {self.pages.device}")
        if torch.compiler.is_compiling():
            return  # what it compiles says the rest
        if not q.shape[2] or q.shape[2] % self.num_kv_heads:
            raise InvalidArgument(
                f"q: shape {list(q.shape)}: num_q_heads must be a multiple of num_kv_heads={self.num_kv_heads}"
            )

    def _leave_to_device(self) -> None:
        """The device decides what is appended and packed, now or whenever this is replayed."""
        self._stale = True
        if self._recording():
            self._captured = True

    def _append(
        self, k: Tensor, v: Tensor, lengths: Tensor | None, status: Tensor | None, more_recent: int = 0
    ) -> None:
        ops.append(
            k, v, self.pages, self.block_table, self.seqlens, self.packed_lens, self.tail_k, self.tail_v, self._spec(),
            sink_k=self.sink_k, sink_v=self.sink_v, lengths=lengths,
            recent=self.recent + more_recent, status=status, workspace=self._workspace_to_trace(),
        )  # fmt: skip

    def _append_for_step(
        self, q: Tensor, k: Tensor, v: Tensor, status: Tensor | None, whole: bool, more_recent: int,
        options: dict[str, Any],
    ) -> Tensor | tuple[Tensor, Tensor] | None:  # fmt: skip
        """Append a step's tokens -> the attention of one that is done as a whole; None: decode is to follow."""
        if not whole:
            self._append(k, v, None, status, more_recent)
            return None
        return ops.step(
            q, k, v, self.pages, self.block_table, self.seqlens, self.packed_lens, self.tail_k, self.tail_v,
            self._spec(), sink_k=self.sink_k, sink_v=self.sink_v, recent=self.recent, status=status,
            workspace=self._workspace_to_trace(), **options,
        )  # fmt: skip

    def _check_decode(self, q: Tensor, options: dict[str, Any]) -> None:
        """Raise what :meth:`decode` would; it is done for none of the sequences."""
        if torch.compiler.is_compiling():
            return
        out = options.get("out")
        if out is not None:
            extents = zip(("batch_size", "q_len", "num_q_heads", "head_dim"), q.shape, strict=True)
            ops.check_tensor("out", out, (self.dtype,), **dict(extents))
            options = options | {"out": out[:0]}
        names = ("block_table", "seqlens", "packed_lens", "tail_k", "tail_v", "sink_k", "sink_v")
        none: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x[:0] for name in names}
        ops.decode(q[:0], self.pages, spec=self.quant, **none, **options)

    def _spec(self) -> QuantSpec | str:
        return self._quant_json if torch.compiler.is_compiling() else self.quant

    def _workspace_to_trace(self) -> Tensor | None:
        """In plain calls that of the stream, so that calls on several streams do not meet."""
        return self.workspace if torch.compiler.is_compiling() else None

    def _recording(self) -> bool:
        """Whether this call is recorded, to be done once or many times later."""
        return torch.compiler.is_compiling() or (
            self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        )

    def _refresh(self) -> None:
        """Bring the books up to date."""
        if not self._stale:
            return
        if self._recording():
            raise InvalidArgument("a graph is being captured: allowed are append, decode and step")
        read = torch.cat((self.seqlens, self.packed_lens, self.status)).tolist()
        self._lens, self._packed = read[: self.batch_size], read[self.batch_size : -1]
        self._stale = self._captured
        if read[-1]:
            self._without_page = read[-1]
            self.status.zero_()

    def _provide(self, new: list[int], more_recent: int = 0) -> tuple[list[int], list[int]]:
        """Make every row of the table long enough for new tokens -> tokens and packed tokens once they are there, if so
        many more than ``recent`` stay in 16 bit.
        """
        lens = [have + count for have, count in zip(self._lens, new, strict=True)]
        for b, n in enumerate(lens):
            if n > self.max_tokens:
                raise OutOfPages(f"sequence {b} would hold {n} tokens: allowed are max_tokens={self.max_tokens}")
        policy = CachePolicy(self.recent + more_recent, self.sink_tokens)
        packed = [policy.packed_len(n, before) for n, before in zip(lens, self._packed, strict=True)]
        needed = [max(0, n // BLOCK_TOKENS - len(pages)) for n, pages in zip(packed, self._pages_of, strict=True)]
        if sum(needed) > len(self._free):
            raise OutOfPages(
                f"{sum(needed)} pages are needed, {len(self._free)} of num_pages={self.num_pages} are free"
            )
        for pages, count in zip(self._pages_of, needed, strict=True):
            for page in [self._free.pop() for _ in range(count)]:
                self._owners[page] = 1
                pages.append(page)
        self._write_table([b for b, count in enumerate(needed) if count])
        return lens, packed

    def _keep_pages(self, counts: list[int]) -> None:
        """Leave so many pages to each sequence."""
        shorter = []
        for b, (pages, count) in enumerate(zip(self._pages_of, counts, strict=True)):
            if count < len(pages):
                self._release(pages[count:])
                del pages[count:]
                shorter.append(b)
        self._write_table(shorter)

    def _release(self, pages: list[int]) -> None:
        """Pages that a sequence lets go of; those that no other holds are free again."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)

    def _write_table(self, rows: list[int]) -> None:
        if rows:
            width = self.block_table.shape[1]
            lists = [self._pages_of[b] + [NO_PAGE] * (width - len(self._pages_of[b])) for b in rows]
            self.block_table.index_copy_(0, self._on_device(rows).long(), self._on_device(lists))

    def _write_lengths(self, lens: list[int], packed: list[int]) -> None:
        self._lens, self._packed = lens, packed
        self.seqlens.copy_(self._on_device(lens))
        self.packed_lens.copy_(self._on_device(packed))

    def _on_device(self, values: list) -> Tensor:
        """int32 values on the cache's device, without waiting for it."""
        if self._recording():
            raise InvalidArgument("a graph is being captured: allowed are append, decode and step")
        host = torch.tensor(values, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def _buffers(self) -> tuple[Tensor | None, ...]:
        return (
            *(self.pages, self.block_table, self.seqlens, self.packed_lens, self.status),
            *(self.tail_k, self.tail_v, self.sink_k, self.sink_v),
        )

    def _per_sequence(self, name: str, values: int | Sequence[int] | Tensor) -> list[int]:
        listed = values.tolist() if isinstance(values, Tensor) else values
        if isinstance(listed, Iterable):
            listed = list(listed)
            if len(listed) == self.batch_size and all(type(n) is int for n in listed):
                return listed
        raise InvalidArgument(f"{name}={shown(listed)}: allowed are batch_size={self.batch_size} integers")

    # ------------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache as safetensors: the blocks and 16-bit tokens in use, sequence after sequence.

        ``blocks`` lists the rows of ``pages`` that each sequence holds, in the order of their first use: shared blocks
        are written once.
        """
        check_path("path", path)
        self.sync()
        config = {name: getattr(self, name) for name in SIZES}
        config |= {"quant": self.quant.to_dict(), "dtype": next(n for n, d in DTYPES.items() if d == self.dtype)}
        held = zip(self._pages_of, self._packed, strict=True)
        blocks = [page for pages, n in held for page in pages[: n // BLOCK_TOKENS]]
        row_of = {page: row for row, page in enumerate(dict.fromkeys(blocks))}
        sinks = [min(n, self.sink_tokens) for n in self._lens]
        tails = [n - sink - packed for n, sink, packed in zip(self._lens, sinks, self._packed, strict=True)]
        tensors = {
            "seqlens": self.seqlens,
            "packed_lens": self.packed_lens,
            "pages": self.pages[list(row_of)],
            "blocks": torch.tensor([row_of[page] for page in blocks], dtype=torch.int32),
            "tail_k": _concatenate(self.tail_k, tails),
            "tail_v": _concatenate(self.tail_v, tails),
        }
        if self.sink_k is not None and self.sink_v is not None:
            tensors |= {"sink_k": _concatenate(self.sink_k, sinks), "sink_v": _concatenate(self.sink_v, sinks)}
        config |= {"format_version": FORMAT_VERSION}
        try:
            save_file(tensors, path, {METADATA_KEY: json.dumps(config)})  # one key: safetensors shuffles several
        except SafetensorError as error:
            raise InvalidArgument(f"path={shown(path)}: cannot be written: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> KVCache:
        """Read what :meth:`save` wrote, onto any device.

        Nothing in the file is trusted or executed: CacheFormatError for anything that save would not have written.
        """
        check_path("path", path)
        device = ops.check_device("device", device)
        if os.path.exists(path) and not os.path.isfile(path):
            raise CacheFormatError(f"{os.fspath(path)}: is not a file")
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
            config = parse_json("config", metadata[METADATA_KEY])
            if (version := config.pop("format_version")) != FORMAT_VERSION:
                raise CacheFormatError(f"format_version={version!r}: this library reads {FORMAT_VERSION}")
            quant = QuantSpec.from_json(json.dumps(config.pop("quant")))
            dtype = DTYPES[config.pop("dtype")]
            if set(config) != set(SIZES) or not all(type(n) is int for n in config.values()):
                raise CacheFormatError(f"config: allowed are integers {', '.join(SIZES)}, besides quant and dtype")
            bytes_per_block = ops.block_bytes(config["head_dim"], quant)
            policy = CachePolicy(config["recent"], config["sink_tokens"])
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
        sinks = [min(n, sink_tokens) for n in lens]
        tails = [n - sink - p for n, sink, p in zip(lens, sinks, packed, strict=True)]
        # on the device a sequence may go on beyond max_tokens while no block gets full
        most_packed = policy.packed_len(config["max_tokens"], 0)
        tail_capacity = policy.tail_capacity + STEP_TOKENS
        most = sink_tokens + most_packed + tail_capacity
        for b, (n, p, tail) in enumerate(zip(lens, packed, tails, strict=True)):
            if not 0 <= n <= most:
                raise CacheFormatError(f"seqlens[{b}]={n}: allowed are 0 to {most}")
            if not 0 <= p <= most_packed or p % BLOCK_TOKENS or not 0 <= tail <= tail_capacity:
                raise CacheFormatError(f"packed_lens[{b}]={p}: not possible for a sequence of {n} tokens")
        heads, head_dim = config["num_kv_heads"], config["head_dim"]
        blocks = read("blocks", (sum(packed) // BLOCK_TOKENS,), torch.int32).tolist()
        used = list(dict.fromkeys(blocks))
        if used != list(range(len(used))):
            raise CacheFormatError("blocks: allowed are rows of pages in the order of their first use")
        if len(used) > config["num_pages"]:
            raise CacheFormatError(f"num_pages={config['num_pages']}: {len(used)} blocks are held")
        pages = read("pages", (len(used), heads, bytes_per_block), torch.uint8)
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

        start = 0
        for b, n in enumerate(packed):
            cache._pages_of[b] = blocks[start : start + n // BLOCK_TOKENS]
            start += n // BLOCK_TOKENS
        for page in blocks:
            cache._owners[page] += 1
        del cache._free[len(cache._free) - len(used) :]  # the free list ends with the lowest pages
        cache.pages[: len(used)] = pages.to(device)
        cache._write_table(list(range(batch_size)))
        _scatter(cache.tail_k, tail_k, tails)
        _scatter(cache.tail_v, tail_v, tails)
        for own, saved in ((cache.sink_k, sink_k), (cache.sink_v, sink_v)):
            if own is not None and saved is not None:
                _scatter(own, saved, sinks)
        cache._write_lengths(lens, packed)
        return cache


def _concatenate(x: Tensor, counts: list[int]) -> Tensor:
    """The first counts[b] tokens of each sequence, [sum(counts), ..]."""
    return torch.cat([row[:count] for row, count in zip(x, counts, strict=True)])


def _scatter(x: Tensor, tokens: Tensor, counts: list[int]) -> None:
    """The inverse of :func:`_concatenate`."""
    for row, part in zip(x, tokens.split(counts), strict=True):
        row[: len(part)] = part
