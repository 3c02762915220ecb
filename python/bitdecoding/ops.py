"""The public functions. They validate every argument before anything is changed, then dispatch by device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import cpu, quantization, torch_ops
from .cute_kernels import native
from .cute_kernels.checks import INT32_MAX, check_int, check_one_of, check_type, shown
from .cute_kernels.config import KernelConfig, QuantSpec
from .cute_kernels.errors import InvalidArgument, OutOfPages
from .cute_kernels.layouts import BLOCK_TOKENS, HEAD_DIMS, block_format
from .quantization import REAL_DTYPES, CachePolicy

MAX_PAGES = INT32_MAX // BLOCK_TOKENS  # of a sequence, whose tokens are counted in 32 bits

_decode_cpu = native.function("decode_cpu")


@torch.compiler.assume_constant_result
def block_bytes(head_dim: int, spec: QuantSpec | str) -> int:
    """Bytes of a block: 128 tokens of one KV head, K and V, codes and parameters. A multiple of 128."""
    return block_format(head_dim, parsed_spec(spec)).block_bytes


def parsed_spec(spec: QuantSpec | str, name: str = "spec") -> QuantSpec:
    """A spec, from its JSON if it is that."""
    if isinstance(spec, QuantSpec):
        return spec
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        return torch_ops.spec_from_json(spec)
    raise InvalidArgument(
        f"{name}={shown(spec)}: allowed is a QuantSpec, or its JSON; that of a preset is preset(name, head_dim)[0]"
    )


@torch.no_grad()
def quantize(
    k: Tensor,
    v: Tensor,
    spec: QuantSpec | str,
    *,
    pages: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Quantise and pack all tokens of one or more sequences, each from position 0 of its first block on.

    k, v: [num_tokens, num_kv_heads, head_dim], fp16 or bf16, on the CPU also fp32; only the channels of a head must be
        contiguous. NaN counts as 0, values beyond +-32768 as +-32768.
    spec: or its JSON, here and in the functions below: within torch.compile, torch before 2.13 knows only that.
    pages: uint8 [num_pages, num_kv_heads, block_bytes], written and returned; default: new ones, for one sequence.
    block_table: int32 [batch, max_pages], goes with pages: where the blocks of each sequence go.
    cu_seqlens: int32 [batch + 1], needs pages: sequence b has the rows from cu_seqlens[b] to cu_seqlens[b + 1];
        default: one sequence with all rows.
    max_seqlen: the most tokens of a sequence, at most num_tokens; with cu_seqlens it saves work on CUDA.
    -> pages, new ones [ceil(num_tokens / 128), num_kv_heads, block_bytes]. The last block of a sequence may be partial.
    A block is a pure function of its tokens and spec (bit for bit, on every device); what its bits mean is in
    :mod:`bitdecoding.quantization`.
    Raises InvalidArgument, and OutOfPages where a row of the table is too short; nothing is written then. On CUDA
    nothing waits for the device, so cu_seqlens and entries of the table are trusted; a block whose entry names no page,
    or that the table has no entry for, is left out.
    """
    check_tensor("k", k, REAL_DTYPES, num_tokens=None, num_kv_heads=None, head_dim=None)
    num_tokens, num_kv_heads, head_dim = k.shape
    check_tensor("v", v, (k.dtype,), num_tokens=num_tokens, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check_int("num_kv_heads", num_kv_heads, 1)
    bytes_per_block = block_bytes(head_dim, spec)
    if (pages is None) != (block_table is None) or (cu_seqlens is not None and pages is None):
        given = {"pages": pages, "block_table": block_table, "cu_seqlens": cu_seqlens}
        names = [name for name, x in given.items() if x is not None]
        raise InvalidArgument(
            f"only {', '.join(names)} given: allowed are pages with block_table, cu_seqlens with both"
        )
    if pages is None or block_table is None:
        if k.device.type != "cuda" and not torch.compiler.is_compiling():
            _check_device(k=k, v=v)
            return quantization.quantise(k, v, parsed_spec(spec))
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        pages = torch.empty(num_blocks, num_kv_heads, bytes_per_block, dtype=torch.uint8, device=k.device)
        block_table = torch.arange(num_blocks, dtype=torch.int32, device=k.device)[None]
    check_tensor("pages", pages, (torch.uint8,), num_pages=None, num_kv_heads=num_kv_heads, block_bytes=bytes_per_block)
    batch = 1
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, (torch.int32,), **{"batch + 1": None})
        batch = len(cu_seqlens) - 1
    check_tensor("block_table", block_table, (torch.int32,), batch=batch, max_pages=None)
    check_int("max_pages", block_table.shape[1], 0, MAX_PAGES)
    _check_device(k=k, v=v, pages=pages, block_table=block_table, cu_seqlens=cu_seqlens)
    if max_seqlen is not None:
        check_int("max_seqlen", max_seqlen)
    longest = num_tokens if cu_seqlens is None or max_seqlen is None else min(max_seqlen, num_tokens)
    needed, max_pages = -(-longest // BLOCK_TOKENS), block_table.shape[1]
    if needed > max_pages and (cu_seqlens is None or max_seqlen is not None):
        raise OutOfPages(f"{longest} tokens need {needed} pages, a row of block_table has {max_pages}")

    if torch.compiler.is_compiling():
        torch_ops.quantize(k, v, pages, block_table, cu_seqlens, max_seqlen, torch_ops.json_of(spec))
        return pages
    spec = parsed_spec(spec)

    if k.device.type == "cuda":
        from . import cuda

        longest = min(longest, max_pages * BLOCK_TOKENS)
        cuda.quantize(k, v, spec, pages, block_table, cu_seqlens=cu_seqlens, max_seqlen=longest)
        return pages

    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    rows = list(pairwise(bounds))
    for b, (start, stop) in enumerate(rows):
        if not 0 <= start <= stop <= num_tokens or stop - start > longest:
            raise InvalidArgument(
                f"cu_seqlens[{b}]={start}, cu_seqlens[{b + 1}]={stop}: allowed are ascending numbers from 0 to "
                f"num_tokens={num_tokens}, at most max_seqlen={longest} apart"
            )
    blocks = [range(-(-(stop - start) // BLOCK_TOKENS)) for start, stop in rows]
    entries = [_check_table(block_table, b, columns, pages.shape[0]) for b, columns in enumerate(blocks)]
    _check_once([page for used in entries for page in used])
    for (start, stop), used in zip(rows, entries, strict=True):
        if used:
            pages[used] = quantization.quantise(k[start:stop], v[start:stop], spec)
    return pages


@torch.no_grad()
def rotate(x: Tensor) -> Tensor:
    """Tokens [.., head_dim] as tail and sinks hold them where a spec rotates: the normalised Walsh-Hadamard transform
    over head_dim, in x's dtype (fp16, bf16 or fp32). NaN counts as 0, values beyond +-32768 as +-32768.
    """
    return quantization.rotate(x)


@torch.no_grad()
def dequantize(
    blocks: Tensor, head_dim: int, spec: QuantSpec | str, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """The values that blocks stand for, rotated back where the spec rotates.

    blocks: uint8 [num_blocks, num_kv_heads, block_bytes]. dtype: fp16, bf16 or fp32.
    -> k, v [num_blocks * 128, num_kv_heads, head_dim]; rows beyond the tokens that were quantised mean nothing.
    """
    check_tensor(
        "blocks", blocks, (torch.uint8,), num_blocks=None, num_kv_heads=None, block_bytes=block_bytes(head_dim, spec)
    )
    if torch.compiler.is_compiling():
        return torch_ops.dequantize(blocks, head_dim, torch_ops.json_of(spec), dtype)
    check_one_of("dtype", dtype, REAL_DTYPES)
    return quantization.dequantise(blocks, head_dim, parsed_spec(spec), dtype)


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    spec: QuantSpec | str,
    *,
    packed_lens: Tensor | None = None,
    tail_k: Tensor | None = None,
    tail_v: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its cache.

    q: [batch, q_len, num_q_heads, head_dim]; the last query is the newest token, query i sees the keys at positions
        up to seqlen - q_len + i. Of sequences with fewer new tokens the last rows count. num_q_heads is a multiple of
        num_kv_heads.
    pages: uint8 [num_pages, num_kv_heads, block_bytes].
    block_table: int32 [batch, max_pages]; entries beyond a sequence's packed tokens are never read.
    seqlens: int32 [batch], all tokens of a sequence: first its sink tokens, then its packed, then its tail tokens.
    packed_lens: int32 [batch], tokens in pages (the last block may be partial). Default: all that are not sinks,
        with a tail the largest multiple of 128 of them.
    tail_k, tail_v: [batch, tail_capacity, num_kv_heads, head_dim], like q; the rest of the tokens.
    sink_k, sink_v: [batch, num_sink, num_kv_heads, head_dim], like q; the first min(seqlen, num_sink) tokens.
    softmax_scale: default head_dim ** -0.5.
    window: number of keys that a query sees, its own included.
    softcap: scores s become softcap * tanh(s / softcap); None or 0: they stay.
    sink_logits: fp32 [num_q_heads], a score per head that takes part in the softmax with a value of zero.
    out: written and returned, like q, which it must not overlap.
    config: the kernel to use on CUDA; CPU tensors need none.
    workspace: from :func:`workspace`, for calls that do not overlap; default: one per stream or captured graph.
    All tensors contiguous and 16-byte aligned but pages, of which only the blocks must be. CPU tensors may be fp32.
    Where the spec rotates, tail and sinks hold rotated tokens, as :func:`append` writes them (:func:`rotate` for those
    who write them on their own); q and out are in the original space.
    -> out; with return_lse also lse fp32 [batch, q_len, num_q_heads], the natural logarithm of the softmax's
    denominator (sink_logits included). A query that sees no key gives zeros, and -inf or its sink logit.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            new_out, lse = torch_ops.decode(
                q, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k, sink_v, sink_logits,
                _workspace_to_trace(q, workspace), torch_ops.json_of(spec), softmax_scale, window, softcap, return_lse,
                None if config is None else torch_ops.json_of(config),
            )  # fmt: skip
            out = new_out if out is None else out.copy_(new_out)
        return (out, lse) if return_lse else out

    spec = parsed_spec(spec)
    if isinstance(q, Tensor) and q.is_cuda:
        from . import cuda

        return cuda.decode(
            q, pages, block_table, seqlens, spec, packed_lens=packed_lens, tail_k=tail_k, tail_v=tail_v,
            sink_k=sink_k, sink_v=sink_v, softmax_scale=softmax_scale, window=window, softcap=softcap,
            sink_logits=sink_logits, out=out, return_lse=return_lse, config=config, workspace=workspace,
        )  # fmt: skip

    check_tensor("q", q, REAL_DTYPES, batch=None, q_len=None, num_q_heads=None, head_dim=None)
    check_one_of("head_dim", q.shape[-1], HEAD_DIMS)
    check_type("config", config, KernelConfig, None)
    check_type("workspace", workspace, Tensor, None)
    if out is None:
        out = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
    _decode_cpu(
        q, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k, sink_v, sink_logits, out, lse, spec,
        native.NO_WINDOW if window is None else window, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        0.0 if softcap is None else softcap, torch.get_num_threads(),
    )  # fmt: skip
    return out if lse is None else (out, lse)


@torch.no_grad()
def append(
    k_new: Tensor,
    v_new: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    packed_lens: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    spec: QuantSpec | str,
    *,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    lengths: Tensor | None = None,
    recent: int = 0,
    status: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """Append new tokens to each sequence, in place; any number of them, so that it also fills a cache with a prompt.

    A sequence's new tokens go to its sinks while these have room, the others behind its tail. Then, as long as the
    tail holds ``recent + 128`` tokens or more, its oldest 128 move to the sequence's next page (entry
    ``packed_lens / 128`` of its table row) and the others move up to the front of the tail. So a tail of
    ``recent + 127`` tokens always suffices, whatever the number of new tokens, and at least ``recent`` tokens can be
    rolled back exactly (by lowering seqlens) after any append.

    k_new, v_new: [batch, new_tokens, num_kv_heads, head_dim], fp16 or bf16, on the CPU also fp32, in the original
        space; only the channels of a head must be contiguous.
    pages: uint8 [num_pages, num_kv_heads, block_bytes]. block_table: int32 [batch, max_pages]; the entries of blocks
        that get full must name pages that no other sequence uses.
    seqlens, packed_lens: int32 [batch] as for :func:`decode`, packed_lens multiples of 128; both are advanced.
    tail_k, tail_v: [batch, tail_capacity >= recent + 127, num_kv_heads, head_dim], like k_new; here and in the sinks
        tokens are rotated where the spec rotates.
    sink_k, sink_v: [batch, num_sink, num_kv_heads, head_dim], like k_new.
    lengths: int32 [batch], how many of the new tokens count for each sequence; default: all.
    status: int32 [1]; where sequence b has no page for a full block, because its row of the table ends or its entry
        names no page, it stays as it was and status becomes 1 + b, unless it is greater already. Zero it beforehand.
    workspace: as for :func:`decode`.
    Without status, the CPU raises OutOfPages where a row ends, InvalidArgument for an entry that names no page; errors
    leave everything as it was. On CUDA nothing waits for the device, so that a step can be captured in a graph: lengths
    are trusted (``lengths`` are clamped), and without status a sequence that has no page stays as it was silently.
    """
    if torch.compiler.is_compiling():
        torch_ops.append(
            k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k, sink_v, lengths, status,
            _workspace_to_trace(k_new, workspace), torch_ops.json_of(spec), recent,
        )  # fmt: skip
        return None

    spec = parsed_spec(spec)
    if isinstance(k_new, Tensor) and k_new.device.type == "cuda" and k_new.dim() == 4:
        from . import cuda

        return cuda.append(
            k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec, sink_k=sink_k, sink_v=sink_v,
            lengths=lengths, recent=recent, status=status, workspace=workspace,
        )  # fmt: skip

    check_tensor("k_new", k_new, REAL_DTYPES, batch=None, new_tokens=None, num_kv_heads=None, head_dim=None)
    batch, new_tokens, _, _ = k_new.shape
    if lengths is not None:
        check_tensor("lengths", lengths, (torch.int32,), batch=batch)
        _check_device(k_new=k_new, lengths=lengths)
    policy = _check_append(
        k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec, sink_k=sink_k, sink_v=sink_v,
        recent=recent, status=status, workspace=workspace,
    )  # fmt: skip
    check_int("tail_capacity", tail_k.shape[1], policy.tail_capacity)

    counts = [new_tokens] * batch if lengths is None else lengths.tolist()
    for b, count in enumerate(counts):
        if not 0 <= count <= new_tokens:
            raise InvalidArgument(f"lengths[{b}]={count}: allowed are 0 to new_tokens={new_tokens}")
    lens, packed = _checked_lengths(seqlens, packed_lens, policy, tail_k.shape[1])
    after = [policy.packed_len(n + count, p) for n, count, p in zip(lens, counts, packed, strict=True)]
    without_page = _without_page(block_table, packed, after, pages.shape[0], status)
    for b in without_page:
        counts[b], after[b] = 0, packed[b]

    cpu.append(
        k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec, sink_k=sink_k, sink_v=sink_v,
        lengths=counts, packed_after=after,
    )  # fmt: skip
    _report(status, without_page)


@torch.no_grad()
def step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    packed_lens: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    spec: QuantSpec | str,
    *,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    recent: int = 0,
    status: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A step of decoding in one kernel: append the tokens of the queries, attend to all, pack the blocks that are full.

    It is :func:`append` and then :func:`decode`, but that a block which gets full is packed after the attention, which
    so sees its tokens in 16 bit.
    q: [batch, q_len, num_q_heads, head_dim] as for decode. k_new, v_new: [batch, q_len, num_kv_heads, head_dim] as for
        append, the queries' own tokens, all of which count.
    pages .. sink_v, recent, status: as for append, but the tail must have room for the new tokens beside all others:
        tail_capacity >= recent + 127 + q_len.
    softmax_scale .. workspace: as for decode; config: of kind "step".
    -> as decode. A sequence without a page for a full block stays as it was (see append's status); its output counts.
    On CUDA it raises UnsupportedConfig where num_q_heads / num_kv_heads * q_len is more than 8: append and decode do
    that. Otherwise it raises as append and decode do.
    """
    if torch.compiler.is_compiling():
        new_out, lse = torch_ops.step(
            q, k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k, sink_v, sink_logits,
            status, _workspace_to_trace(q, workspace), torch_ops.json_of(spec), recent, softmax_scale, window, softcap,
            return_lse, None if config is None else torch_ops.json_of(config),
        )  # fmt: skip
        out = new_out if out is None else out.copy_(new_out)
        return (out, lse) if return_lse else out

    spec = parsed_spec(spec)
    if isinstance(q, Tensor) and q.is_cuda:
        from . import cuda

        return cuda.step(
            q, k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec, sink_k=sink_k,
            sink_v=sink_v, recent=recent, status=status, softmax_scale=softmax_scale, window=window, softcap=softcap,
            sink_logits=sink_logits, out=out, return_lse=return_lse, config=config, workspace=workspace,
        )  # fmt: skip

    check_tensor("q", q, REAL_DTYPES, batch=None, q_len=None, num_q_heads=None, head_dim=None)
    batch, q_len, _, head_dim = q.shape
    check_int("q_len", q_len, 1)
    check_type("config", config, KernelConfig, None)
    if config is not None and config.kind != "step":
        raise InvalidArgument(f"config.kind={config.kind}: allowed is step")
    check_tensor("k_new", k_new, (q.dtype,), batch=batch, q_len=q_len, num_kv_heads=None, head_dim=head_dim)
    _check_device(q=q, k_new=k_new)
    policy = _check_append(
        k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec, sink_k=sink_k, sink_v=sink_v,
        recent=recent, status=status, workspace=workspace,
    )  # fmt: skip
    check_int("tail_capacity", tail_k.shape[1], policy.tail_capacity + q_len)
    lens, packed = _checked_lengths(seqlens, packed_lens, policy, tail_k.shape[1], q_len)
    after = [policy.packed_len(n + q_len, p) for n, p in zip(lens, packed, strict=True)]
    without_page = _without_page(block_table, packed, after, pages.shape[0], status)

    cache = (pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec)
    sinks: dict[str, Any] = {"sink_k": sink_k, "sink_v": sink_v}
    before = seqlens.clone()
    cpu.append(k_new, v_new, *cache, **sinks, lengths=[q_len] * batch, packed_after=packed)
    try:
        result = decode(
            q, pages, block_table, seqlens, spec, packed_lens=packed_lens, tail_k=tail_k, tail_v=tail_v, **sinks,
            softmax_scale=softmax_scale, window=window, softcap=softcap, sink_logits=sink_logits, out=out,
            return_lse=return_lse, config=config,
        )  # fmt: skip
    except BaseException:
        seqlens.copy_(before)  # what was written lies beyond
        raise
    for b in without_page:
        seqlens[b], after[b] = before[b], packed[b]
    cpu.append(k_new[:, :0], v_new[:, :0], *cache, **sinks, lengths=[0] * batch, packed_after=after)
    _report(status, without_page)
    return result


@torch.no_grad()
def merge(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine partial attention over disjoint sets of keys: splits, devices, a shared prefix.

    outs: parts of one dtype and shape [.., head_dim], as a sequence or stacked along a first dimension.
    lses: for each part fp32 [..], natural logarithm; -inf where the part has no key (its out does not matter there).
    -> out like a part, lse fp32; zeros and -inf where no part has a key. Sink logits must be in one part only.
    """
    for name, x in (("outs", outs), ("lses", lses)):
        check_type(name, x, Tensor, Sequence)
        if isinstance(x, Tensor) and x.dim() == 0:
            raise InvalidArgument(f"{name} is {_describe(x)}: allowed are parts along a first dimension")
    if len(outs) == 0 or len(outs) != len(lses):
        raise InvalidArgument(f"outs has {len(outs)} parts and lses {len(lses)}: allowed are equal numbers, at least 1")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_type(f"outs[{i}]", out, Tensor)
        check_type(f"lses[{i}]", lse, Tensor)
        if out.dtype not in REAL_DTYPES or out.dtype != outs[0].dtype or out.dim() < 1 or out.shape != outs[0].shape:
            raise InvalidArgument(
                f"outs[{i}] is {_describe(out)}: allowed are parts of one shape and dtype ({_names(REAL_DTYPES)})"
            )
        if lse.dtype != torch.float32 or lse.shape != out.shape[:-1]:
            raise InvalidArgument(f"lses[{i}] is {_describe(lse)}: allowed is torch.float32 {list(out.shape[:-1])}")
        _check_device(**{"outs[0]": outs[0], f"outs[{i}]": out, f"lses[{i}]": lse})
    stacked = [x if isinstance(x, Tensor) else torch.stack(tuple(x)) for x in (outs, lses)]
    if torch.compiler.is_compiling():
        return torch_ops.merge(*stacked)
    if outs[0].is_cuda and outs[0].dtype != torch.float32 and outs[0].shape[-1] in HEAD_DIMS:
        from . import cuda

        return cuda.merge(*stacked)
    out, lse = cpu.merge(*stacked)
    return out.to(outs[0].dtype), lse


def workspace(device: torch.device | str, head_dim: int) -> Tensor | None:
    """A workspace for every call of :func:`decode`, :func:`append` and :func:`step` at this head_dim; None on the CPU.

    For torch.compile: calls that share it must not overlap, and it must outlive the functions compiled with it.
    """
    device = check_device("device", device)
    check_one_of("head_dim", head_dim, HEAD_DIMS)
    if device.type != "cuda":
        return None
    from . import cuda

    return cuda.new_workspace(device, head_dim)


def _workspace_to_trace(x: Tensor, given: Tensor | None) -> Tensor | None:
    """The workspace of an operator that is being traced: the given one, or one that is zeroed at every call."""
    if given is not None or x.device.type != "cuda":
        return given
    from . import cuda

    return torch.zeros(cuda.largest_workspace(x.get_device(), x.shape[-1]), dtype=torch.uint8, device=x.device)


# ---------------------------------------------------------------------------------------------- checks


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(str, dtypes))


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def check_tensor(name: str, x: object, dtypes: Sequence[torch.dtype], **shape: int | None) -> None:
    """Raise unless x is a tensor of one of the dtypes and of this shape; None stands for any extent."""
    if not isinstance(x, Tensor):
        raise InvalidArgument(f"{name} is a {type(x).__name__}: allowed is a torch.Tensor")
    sound = x.dim() == len(shape) and all(
        # not `in`, which torch.compile does not do with an extent that it has made a variable
        want is None or want == have
        for want, have in zip(shape.values(), x.shape, strict=True)
    )
    if not sound or x.dtype not in dtypes:
        want = ", ".join(label if extent is None else f"{label}={extent}" for label, extent in shape.items())
        raise InvalidArgument(f"{name} is {_describe(x)}: allowed is [{want}] of {_names(dtypes)}")


def _check_pair(
    name: str, k: Tensor | None, v: Tensor | None, dtype: torch.dtype, batch: int, label: str, heads: int, head_dim: int
) -> int:
    """Check an optional pair of 16-bit tensors -> the number of token slots, 0 if there is no pair."""
    if (k is None) != (v is None):
        given, missing = (f"{name}_{x}" for x in (("v", "k") if k is None else ("k", "v")))
        raise InvalidArgument(f"{missing}=None: {given} and {missing} are allowed together or not at all")
    if k is None:
        return 0
    check_tensor(f"{name}_k", k, (dtype,), batch=batch, **{label: None}, num_kv_heads=heads, head_dim=head_dim)
    check_tensor(f"{name}_v", v, (dtype,), batch=batch, **{label: k.shape[1]}, num_kv_heads=heads, head_dim=head_dim)
    return k.shape[1]


def check_device(name: str, device: torch.device | str | int) -> torch.device:
    """A device that is there and that a cache can be on, with its index."""
    found, reason = None, ""
    try:
        if device is not None:
            found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # what torch raises
        reason = f", where they are there: {str(error).partition(chr(10))[0]}"
    if found is None or found.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"{name}={shown(device)}: allowed are cpu and cuda{reason}")
    return found


def _check_device(**tensors: Tensor | None) -> None:
    (first, x), *others = ((name, x) for name, x in tensors.items() if x is not None)
    for name, y in others:
        if y.device != x.device:
            raise InvalidArgument(f"{name} is on {y.device}: allowed is {x.device}, where {first} is")


def _check_append(
    k_new: Tensor, v_new: Tensor, pages: Tensor, block_table: Tensor, seqlens: Tensor, packed_lens: Tensor,
    tail_k: Tensor, tail_v: Tensor, spec: QuantSpec, *, sink_k: Tensor | None, sink_v: Tensor | None, recent: int,
    status: Tensor | None, workspace: Tensor | None,
) -> CachePolicy:  # fmt: skip
    """Check the cache that k_new [batch, .., num_kv_heads, head_dim] are appended to, but for values -> its policy."""
    batch, new_tokens, num_kv_heads, head_dim = k_new.shape
    dtype = k_new.dtype
    check_tensor(
        "v_new", v_new, (dtype,), batch=batch, new_tokens=new_tokens, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    bytes_per_block = block_bytes(head_dim, spec)
    check_tensor("pages", pages, (torch.uint8,), num_pages=None, num_kv_heads=num_kv_heads, block_bytes=bytes_per_block)
    check_tensor("block_table", block_table, (torch.int32,), batch=batch, max_pages=None)
    check_int("max_pages", block_table.shape[1], 0, MAX_PAGES)
    check_tensor("seqlens", seqlens, (torch.int32,), batch=batch)
    check_tensor("packed_lens", packed_lens, (torch.int32,), batch=batch)
    check_tensor(
        "tail_k", tail_k, (dtype,), batch=batch, tail_capacity=None, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    _check_pair("tail", tail_k, tail_v, dtype, batch, "tail_capacity", num_kv_heads, head_dim)
    num_sink = _check_pair("sink", sink_k, sink_v, dtype, batch, "num_sink", num_kv_heads, head_dim)
    if status is not None:
        check_tensor("status", status, (torch.int32,), one=1)
    check_type("workspace", workspace, Tensor, None)
    _check_device(
        k_new=k_new, v_new=v_new, pages=pages, block_table=block_table, seqlens=seqlens, packed_lens=packed_lens,
        tail_k=tail_k, tail_v=tail_v, sink_k=sink_k, sink_v=sink_v, status=status,
    )  # fmt: skip
    return CachePolicy(recent, num_sink)


def _checked_lengths(
    seqlens: Tensor, packed_lens: Tensor, policy: CachePolicy, tail_capacity: int, q_len: int = 0
) -> tuple[list[int], list[int]]:
    """The lengths of a cache that is appended to, if its tails have room for q_len tokens more."""
    lens, packed = seqlens.tolist(), packed_lens.tolist()
    _check_lengths(lens, packed, policy.sink_tokens, tail_capacity, q_len)
    for b, packed_len in enumerate(packed):
        if packed_len % BLOCK_TOKENS:
            raise InvalidArgument(f"packed_lens[{b}]={packed_len}: allowed are multiples of {BLOCK_TOKENS}")
    return lens, packed


def _check_lengths(seqlens: list[int], packed_lens: list[int], num_sink: int, tail_capacity: int, q_len: int) -> None:
    for b, (seqlen, packed_len) in enumerate(zip(seqlens, packed_lens, strict=True)):
        if seqlen < 0:
            raise InvalidArgument(f"seqlens[{b}]={seqlen}: allowed are numbers from 0")
        unpacked = seqlen - min(seqlen, num_sink)
        if not 0 <= packed_len <= unpacked:
            raise InvalidArgument(f"packed_lens[{b}]={packed_len}: allowed are 0 to {unpacked} (seqlen less sinks)")
        if unpacked - packed_len > tail_capacity - q_len:
            less = f" less q_len {q_len}" if q_len else ""
            raise InvalidArgument(
                f"seqlens[{b}]={seqlen}: allowed are at most {seqlen - unpacked + packed_len + tail_capacity - q_len} "
                f"({seqlen - unpacked} sink tokens, packed_len {packed_len}, tail_capacity {tail_capacity}{less})"
            )


def _check_table(block_table: Tensor, b: int, columns: range, num_pages: int) -> list[int]:
    """The entries of row b in these columns; raises unless they exist (OutOfPages) and name pages."""
    if columns.stop > block_table.shape[1]:
        raise OutOfPages(f"sequence {b} needs {columns.stop} pages, its row of block_table has {block_table.shape[1]}")
    entries = block_table[b, columns.start : columns.stop].tolist()
    for column, page in zip(columns, entries, strict=True):
        if not 0 <= page < num_pages:
            raise InvalidArgument(f"block_table[{b}, {column}]={page}: allowed are 0 to {num_pages - 1} (num_pages)")
    return entries


def _without_page(
    block_table: Tensor, packed: list[int], after: list[int], num_pages: int, status: Tensor | None
) -> list[int]:
    """The sequences that have no page for a block that gets full, if there is a status to say so; else raises."""
    due: list[int] = []
    without_page = []
    for b, (first, last) in enumerate(zip(packed, after, strict=True)):
        try:
            due += _check_table(block_table, b, range(first // BLOCK_TOKENS, last // BLOCK_TOKENS), num_pages)
        except (InvalidArgument, OutOfPages):
            if status is None:
                raise
            without_page.append(b)
    _check_once(due)
    return without_page


def _report(status: Tensor | None, without_page: list[int]) -> None:
    if status is not None and without_page:
        status.clamp_(min=1 + without_page[-1])


def _check_once(due: list[int]) -> None:
    """Raise if blocks that are to be written share a page."""
    if len(set(due)) < len(due):
        twice = next(page for page in due if due.count(page) > 1)
        raise InvalidArgument(f"block_table names page {twice} twice for blocks to be written: allowed is once")
