"""The CPU backend: decode and append on CPU tensors, fp32 throughout. It specifies what the kernels compute.

The way in is :mod:`bitdecoding.ops`, which validates. A sequence's tokens are, in the order of their positions, its
sink tokens, its packed tokens and its tail tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .cute_kernels.config import QuantSpec
from .cute_kernels.layouts import BLOCK_TOKENS
from .quantization import CHUNK_VALUES, Codec, codec, hadamard, rotated

Chunk = tuple[int, Tensor, Tensor]  # position of the first key; k, v fp32 [num_kv_heads, tokens, head_dim]


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Sequence[int],
    packed_lens: Sequence[int],
    spec: QuantSpec,
    *,
    tail_k: Tensor | None,
    tail_v: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    softmax_scale: float,
    window: int | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Attention of q [batch, q_len, num_q_heads, head_dim] over the cache, written to ``out``.

    -> lse fp32 [batch, q_len, num_q_heads].
    """
    batch, q_len, num_q_heads, head_dim = q.shape
    num_kv_heads = pages.shape[1]
    group = num_q_heads // num_kv_heads
    num_sink = 0 if sink_k is None else sink_k.shape[1]
    blocks_of = codec(head_dim, spec)
    values_per_block = num_kv_heads * BLOCK_TOKENS * max(2 * head_dim, group * q_len)  # of K and V, or scores
    blocks_at_once = max(1, 4 * CHUNK_VALUES // values_per_block)
    lse = torch.empty(batch, q_len, num_q_heads)

    for b, (seqlen, packed_len) in enumerate(zip(seqlens, packed_lens, strict=True)):
        # rows of a KV head: (query head of its group, query)
        queries = q[b].float().unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
        queries = (hadamard(queries) if spec.rotate_k else queries) * softmax_scale
        newest = torch.arange(seqlen - q_len, seqlen).repeat(group)  # the last position that a row sees
        oldest = newest - window + 1 if window else torch.zeros_like(newest)

        sinks = min(seqlen, num_sink)
        first_packed = sinks + packed_len
        unpacked: list[Chunk] = []
        if sinks:
            unpacked.append((0, _by_head(sink_k[b, :sinks]), _by_head(sink_v[b, :sinks])))
        if tail := seqlen - first_packed:
            unpacked.append((first_packed, _by_head(tail_k[b, :tail]), _by_head(tail_v[b, :tail])))
        first_block = max(0, int(oldest[0]) - sinks) // BLOCK_TOKENS if q_len else 0
        packed = _unpack(blocks_of, pages, block_table[b], sinks, packed_len, first_block, blocks_at_once)

        parts = [_attend(queries, chunks, oldest, newest, softcap) for chunks in (packed, unpacked)]
        if sink_logits is not None:  # a key with this score and a value of zero
            logits = sink_logits.float().view(num_kv_heads, group, 1).expand(-1, -1, q_len).flatten(1)
            parts.append((torch.zeros_like(parts[0][0]), logits))
        merged_out, merged_lse = merge(*(torch.stack(x) for x in zip(*parts, strict=True)))
        if spec.rotate_v:
            merged_out = hadamard(merged_out)

        out[b] = merged_out.view(num_q_heads, q_len, head_dim).transpose(0, 1)
        lse[b] = merged_lse.view(num_q_heads, q_len).T
    return lse


def _by_head(x: Tensor) -> Tensor:
    """[tokens, num_kv_heads, head_dim] -> fp32 [num_kv_heads, tokens, head_dim]"""
    return x.transpose(0, 1).float()


def _unpack(
    blocks_of: Codec, pages: Tensor, table: Tensor, start: int, packed_len: int, first_block: int, step: int
) -> Iterator[Chunk]:
    """A sequence's packed tokens (from position ``start``) from ``first_block`` on, ``step`` blocks at a time."""
    end_block = -(-packed_len // BLOCK_TOKENS)
    for block in range(first_block, end_block, step):
        used = table[block : min(block + step, end_block)].long()
        blocks = pages[used].transpose(0, 1).contiguous()  # head-major while the values are still packed
        tokens = packed_len - block * BLOCK_TOKENS
        k = blocks_of.decode_k(blocks).flatten(1, 2)[:, :tokens]
        v = blocks_of.decode_v(blocks).flatten(1, 2)[:, :tokens]
        yield start + block * BLOCK_TOKENS, k, v


def _attend(
    queries: Tensor, chunks: Iterable[Chunk], oldest: Tensor, newest: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over chunks of keys, with a running maximum.

    queries: fp32 [num_kv_heads, rows, head_dim], multiplied by the softmax scale.
    oldest, newest: int [rows], the first and the last position that a row sees.
    -> out [num_kv_heads, rows, head_dim], lse [num_kv_heads, rows]; zero and -inf for a row that sees no key.
    """
    largest = queries.new_full((*queries.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(largest)
    out = torch.zeros_like(queries)
    for start, k, v in chunks:
        positions = torch.arange(start, start + k.shape[1])
        scores = queries @ k.mT
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        hidden = (positions < oldest[:, None]) | (positions > newest[:, None])
        if hidden.any():
            scores.masked_fill_(hidden, -torch.inf)
        grown = torch.maximum(largest, scores.amax(-1, keepdim=True))
        reference = grown.masked_fill(grown == -torch.inf, 0.0)  # no key yet: exp(-inf - 0) = 0
        weights = scores.sub_(reference).exp_()
        rescale = (largest - reference).exp_()
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out.mul_(rescale).add_(weights @ v)
        largest = grown
    out = (out / total).masked_fill(total == 0, 0.0)
    return out, (largest + total.log()).squeeze(-1)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys, on any device.

    outs [parts, .., head_dim]; lses fp32 [parts, ..], -inf for a part without keys (its out does not matter).
    -> fp32 out [.., head_dim], lse [..]; zero and -inf where no part has keys.
    """
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().masked_fill(lses == -torch.inf, 0.0).unsqueeze(-1)
    return (outs.float() * weights).masked_fill(weights == 0, 0.0).sum(0), lse


def append(
    k_new: Tensor,
    v_new: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    packed_lens: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    spec: QuantSpec,
    *,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    lengths: Sequence[int],
    packed_after: Sequence[int],
) -> None:
    """Take ``lengths[b]`` new tokens into each sequence: into the sinks while there is room, then behind the tail,
    whose oldest blocks go to pages until ``packed_after[b]`` tokens are packed. Advances seqlens and packed_lens.

    Runs on any device, in step with the host.
    """
    k_new, v_new = rotated(k_new, v_new, spec)
    num_sink = 0 if sink_k is None else sink_k.shape[1]
    due_pages: list[int] = []
    due_k: list[Tensor] = []  # [num_kv_heads, 128, head_dim] each
    due_v: list[Tensor] = []

    for b, (seqlen, packed_len) in enumerate(zip(seqlens.tolist(), packed_lens.tolist(), strict=True)):
        sinks = min(seqlen, num_sink)
        tail = seqlen - sinks - packed_len
        to_sink = min(lengths[b], num_sink - sinks)
        packing = packed_after[b] - packed_len
        due_pages += block_table[b, packed_len // BLOCK_TOKENS : packed_after[b] // BLOCK_TOKENS].tolist()
        for x_new, x_sink, x_tail, due in ((k_new, sink_k, tail_k, due_k), (v_new, sink_v, tail_v, due_v)):
            new = x_new[b, : lengths[b]]
            if to_sink:
                x_sink[b, sinks : sinks + to_sink] = new[:to_sink]
            new = new[to_sink:]
            if packing:
                stream = torch.cat((x_tail[b, :tail], new))
                due += stream[:packing].unflatten(0, (-1, BLOCK_TOKENS)).transpose(1, 2)
                x_tail[b, : len(stream) - packing] = stream[packing:]
            else:
                x_tail[b, tail : tail + len(new)] = new

    if due_pages:
        blocks_of = codec(k_new.shape[-1], spec, k_new.device)
        step = max(1, CHUNK_VALUES // due_k[0].numel())
        for i in range(0, len(due_pages), step):
            blocks = blocks_of.encode(torch.stack(due_k[i : i + step]), torch.stack(due_v[i : i + step]))
            pages[due_pages[i : i + step]] = blocks
    seqlens += seqlens.new_tensor(lengths)
    packed_lens.copy_(packed_lens.new_tensor(packed_after))
