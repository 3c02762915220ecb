"""append and merge as torch operations, fp32 throughout. They specify what the kernels compute.

The way in is :mod:`bitdecoding.ops`, which validates; decode on CPU tensors is in the library
(``cute_kernels/runtime/cpu_decode.cpp``). A sequence's tokens are, in the order of their positions, its sink tokens,
its packed tokens and its tail tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cute_kernels.config import QuantSpec
from .cute_kernels.layouts import BLOCK_TOKENS
from .quantization import CHUNK_VALUES, codec, rotated


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys, on any device.

    outs [parts, .., head_dim]; lses fp32 [parts, ..], -inf for a part without keys (its out does not matter).
    -> fp32 out [.., head_dim], lse [..]; zero and -inf where no part has keys.
    """
    largest = lses.amax(0)
    base = largest.masked_fill(largest == -torch.inf, 0.0)
    # their sum divides the result: relative to an lse rounded to fp32, weights of large lses would not add up to 1
    weights = (lses - base).exp()
    total = weights.sum(0)
    weights = weights.unsqueeze(-1)
    out = (outs.float() * weights).masked_fill(weights == 0, 0.0).sum(0)
    return out / total.masked_fill(total == 0, 1.0).unsqueeze(-1), base + total.log()


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
            if x_sink is not None and to_sink:
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
