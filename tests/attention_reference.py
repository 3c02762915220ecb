"""Plain fp64 attention of one sequence: what every backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [q_len, num_q_heads, head_dim]; k, v [tokens, num_kv_heads, head_dim], the last query is the newest token.

    -> out fp64 like q, lse fp64 [q_len, num_q_heads].
    """
    q_len, num_q_heads, head_dim = q.shape
    tokens, num_kv_heads, _ = k.shape
    k, v = (x.double().repeat_interleave(num_q_heads // num_kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * (softmax_scale or head_dim**-0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(tokens - q_len, tokens, device=q.device)[:, None]
    key = torch.arange(tokens, device=q.device)[None, :]
    visible = key <= query
    if window:
        visible &= key > query - window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.double()[:, None, None].expand(-1, q_len, 1)
        scores = torch.cat((scores, extra), dim=-1)
    lse = scores.logsumexp(-1)
    weights = (scores[..., :tokens] - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weights, v), lse.T


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the 2-norm; 0 if both are zero."""
    difference = (got.double() - want.double()).norm().item()
    return difference / want.double().norm().item() if difference else 0.0
