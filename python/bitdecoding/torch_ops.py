"""The functions as torch operators ``torch.ops.bitdecoding.*``, which torch.compile can trace.

:mod:`bitdecoding.ops` calls them by itself while torch.compile traces, and only then: an operator costs tens of
microseconds of a plain call. They mutate exactly what they declare, have fake implementations, and take a QuantSpec and
a KernelConfig as JSON, which is what an operator's schema can hold.

On CUDA they should get a workspace of :func:`bitdecoding.ops.workspace` that lives as long as the compiled function:
memory that an operator allocates for itself while torch.compile records a CUDA graph belongs to that graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cute_kernels.config import KernelConfig, QuantSpec
from .cute_kernels.layouts import BLOCK_TOKENS

spec_from_json = lru_cache(maxsize=None)(QuantSpec.from_json)  # one object per spec: plans are kept by identity
config_from_json = lru_cache(maxsize=None)(KernelConfig.from_json)


def json_of(value: QuantSpec | KernelConfig | str) -> str:
    """The JSON of a QuantSpec or KernelConfig, or JSON as it is; a constant for torch.compile."""
    return value if isinstance(value, str) else _json_of_object(value)


@torch.compiler.assume_constant_result
def _json_of_object(value: Any) -> str:
    """torch.compile guards on the object; it cannot before torch 2.13, where only JSON is possible."""
    return value.to_json()


@torch.library.custom_op("bitdecoding::decode", mutates_args=("workspace",))
def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    packed_lens: torch.Tensor | None,
    tail_k: torch.Tensor | None,
    tail_v: torch.Tensor | None,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    workspace: torch.Tensor | None,
    spec: str,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    config: str | None,
) -> tuple[Tensor, Tensor]:
    """bitdecoding.decode -> out, lse; lse is empty unless it is asked for."""
    from . import ops

    result = ops.decode(
        q, pages, block_table, seqlens, spec_from_json(spec), packed_lens=packed_lens, tail_k=tail_k, tail_v=tail_v,
        sink_k=sink_k, sink_v=sink_v, softmax_scale=softmax_scale, window=window, softcap=softcap,
        sink_logits=sink_logits, return_lse=return_lse, workspace=workspace,
        config=None if config is None else config_from_json(config),
    )  # fmt: skip
    return _out_and_lse(result)


def _out_and_lse(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result if isinstance(result, tuple) else (result, result.new_empty(0, dtype=torch.float32))


def _fake_out_and_lse(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return_lse = args[-2]
    return torch.empty_like(q), q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)


decode.register_fake(_fake_out_and_lse)


@torch.library.custom_op(
    "bitdecoding::append",
    mutates_args=(*("pages", "seqlens", "packed_lens", "tail_k", "tail_v", "sink_k", "sink_v", "status", "workspace"),),
)
def append(
    k_new: Tensor,
    v_new: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    packed_lens: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    lengths: torch.Tensor | None,
    status: torch.Tensor | None,
    workspace: torch.Tensor | None,
    spec: str,
    recent: int,
) -> None:
    """bitdecoding.append."""
    from . import ops

    ops.append(
        k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec_from_json(spec), sink_k=sink_k,
        sink_v=sink_v, lengths=lengths, recent=recent, status=status, workspace=workspace,
    )  # fmt: skip


@append.register_fake
def _(*args: Any) -> None:
    return None


@torch.library.custom_op(
    "bitdecoding::step",
    mutates_args=(*("pages", "seqlens", "packed_lens", "tail_k", "tail_v", "sink_k", "sink_v", "status", "workspace"),),
)
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
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    status: torch.Tensor | None,
    workspace: torch.Tensor | None,
    spec: str,
    recent: int,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    config: str | None,
) -> tuple[Tensor, Tensor]:
    """bitdecoding.step -> out, lse as decode."""
    from . import ops

    result = ops.step(
        q, k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v, spec_from_json(spec), sink_k=sink_k,
        sink_v=sink_v, recent=recent, status=status, softmax_scale=softmax_scale, window=window, softcap=softcap,
        sink_logits=sink_logits, return_lse=return_lse, workspace=workspace,
        config=None if config is None else config_from_json(config),
    )  # fmt: skip
    return _out_and_lse(result)


step.register_fake(_fake_out_and_lse)


@torch.library.custom_op("bitdecoding::quantize", mutates_args=("pages",))
def quantize(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    spec: str,
) -> None:
    """bitdecoding.quantize into given pages."""
    from . import ops

    ops.quantize(
        k, v, spec_from_json(spec), pages=pages, block_table=block_table, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
    )


@quantize.register_fake
def _(*args: Any) -> None:
    return None


@torch.library.custom_op("bitdecoding::dequantize", mutates_args=())
def dequantize(blocks: Tensor, head_dim: int, spec: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """bitdecoding.dequantize."""
    from . import ops

    return ops.dequantize(blocks, head_dim, spec_from_json(spec), dtype)


@dequantize.register_fake
def _(blocks: Tensor, head_dim: int, spec: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_blocks, num_kv_heads, _ = blocks.shape
    shape = (num_blocks * BLOCK_TOKENS, num_kv_heads, head_dim)
    return blocks.new_empty(shape, dtype=dtype), blocks.new_empty(shape, dtype=dtype)


@torch.library.custom_op("bitdecoding::merge", mutates_args=())
def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """bitdecoding.merge of stacked parts."""
    from . import ops

    return ops.merge(outs, lses)


@merge.register_fake
def _(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])
