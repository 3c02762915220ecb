"""The low-bit KV cache under Hugging Face transformers models.

::

    from bitdecoding.integrations.transformers import enable

    enable(model, "kv4")          # from now on model.generate(..) and model(..) keep their KV cache in 4 bits
    model.generate(**inputs)

or, by hand, ``model.set_attn_implementation("bitdecoding")`` (importing this module registers the name) and
``model.generate(**inputs, past_key_values=BitDecodingCache(model.config, "kv4"))``.

transformers hands the attention function keys and values, not the cache. So ``BitDecodingLayer.update`` returns the
new tokens' keys and values with a reference to the layer attached, and the attention function finds the packed tokens
through it.

New tokens attend before they, or older ones, are quantised: a chunk of a prompt sees the cache as it was and its own
tokens in 16 bit, and only then is it appended and full blocks are packed. Packing first would make the result depend on
how a prompt is cut into chunks, and let the token that completes a block see itself quantised. Where the append packs
nothing, as in 127 of 128 decode steps, the order makes no difference; then the tokens are appended first and attention
is one call on the cache. The first chunk of an empty cache needs no cache and goes to torch's own attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from .. import ops
from ..cache import KVCache
from ..cute_kernels.config import QuantSpec
from ..cute_kernels.errors import InvalidArgument, UnsupportedConfig
from ..quantization import CachePolicy, preset, rotated

NAME = "bitdecoding"  # of the attention and of the mask function
LAYER_TYPES = ("full_attention", "sliding_attention")

Quantisation = str | tuple[QuantSpec, CachePolicy]  # the name of a preset, or what it stands for


class BitDecodingLayer(CacheLayerMixin):
    """The cache of one attention layer: a :class:`bitdecoding.KVCache`, created when the first tokens arrive.

    Sequences may differ in length: left padding is not stored.
    """

    is_sliding = False  # a sliding window is applied when the cache is read
    is_compileable = False
    is_croppable = False  # only tokens that still are in 16 bit come back exactly, see `crop`

    def __init__(self, quant: Quantisation, max_tokens: int) -> None:
        super().__init__()
        self.quant = quant
        self.max_tokens = max_tokens
        self.kv: KVCache | None = None
        self.length = 0  # of the longest sequence, padding included: the length transformers counts with
        self.awaiting_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise UnsupportedConfig(f"values have head_dim {value_states.shape[-1]}, keys {head_dim}: must be equal")
        spec, policy = preset(self.quant, head_dim) if isinstance(self.quant, str) else self.quant
        self.kv = KVCache(
            batch_size=batch_size,
            max_tokens=self.max_tokens,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            quant=spec,
            **vars(policy),
            dtype=key_states.dtype if key_states.dtype.itemsize == 2 else torch.float16,
            device=key_states.device,
        )
        self.batch_size = batch_size
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """key_states, value_states [batch, num_kv_heads, new_tokens, head_dim] -> the same, marked for `attention`."""
        if self.awaiting_attention:
            raise InvalidArgument(
                f"this model does not attend through bitdecoding, so its cache cannot be a BitDecodingCache: "
                f"call model.set_attn_implementation({NAME!r}) or bitdecoding.integrations.transformers.enable(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.awaiting_attention = True
        self.length += key_states.shape[-2]
        key_states = key_states.detach()  # a new tensor object, to carry the mark
        key_states.bitdecoding_layer = self
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, **options) -> Tensor:
        """Attention of the new tokens over the cache and themselves; they are in the cache afterwards.

        q [batch, new_tokens, num_q_heads, head_dim], k and v [batch, new_tokens, num_kv_heads, head_dim].
        padding: bool [batch, new_tokens], False for padding, which comes first; None: no padding.
        options: softmax_scale, window, softcap, sink_logits as for `bitdecoding.decode`.
        -> out like q; rows of padding mean nothing.
        """
        self.awaiting_attention = False
        new_tokens, kv = q.shape[1], self.kv
        q16, k16, v16 = (x.to(kv.dtype).contiguous() for x in (q, k, v))
        lengths = None
        if padding is not None:
            k16, v16, lengths = _to_front(k16, padding), _to_front(v16, padding), padding.sum(1, dtype=torch.int32)

        if self.length > new_tokens and not kv.packs(new_tokens):
            kv.append(k16, v16, lengths)
            return kv.decode(q16, **options).to(q.dtype)
        if self.length == new_tokens:
            out = _dense_attention(q, k, v, padding, **options)
        else:
            out = _decode_with(kv, q16, k16, v16, lengths, **options).to(q.dtype)
        kv.append(k16, v16, lengths)
        return out

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.max_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens of each sequence, such as rejected drafts.

        Exact as long as they are in the 16-bit tail, which holds at least the policy's ``recent`` tokens.
        """
        if tokens_to_remove > 0:
            raise InvalidArgument(f"tokens_to_remove={tokens_to_remove}: allowed are negative numbers and 0")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.kv.truncate((self.kv.seqlens + tokens_to_remove).clamp_(min=0))
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, *args) -> None:
        raise UnsupportedConfig("a BitDecodingCache cannot change the order of its sequences: no beam search")

    batch_repeat_interleave = batch_select_indices = reorder_cache

    def reset(self) -> None:
        self.kv, self.length, self.is_initialized, self.awaiting_attention = None, 0, False, False


class BitDecodingCache(Cache):
    """A transformers cache that keeps keys and values in low-bit blocks.

    config: of the model.
    quant: name of a preset, a pair (QuantSpec, CachePolicy), or a list with one of these per layer.
    max_tokens: capacity of a sequence. Default: ``config.max_position_embeddings``, for which memory is then reserved;
        ``generate`` on a model prepared by :func:`enable` asks for what it needs.
    Layers with a sliding window keep all tokens and read those inside the window.
    Raises UnsupportedConfig for models with other kinds of layers (linear or chunked attention, shared caches).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        quant: Quantisation | Sequence[Quantisation] = "kv4",
        max_tokens: int | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        num_layers = config.num_hidden_layers
        strange = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
        if strange or getattr(config, "num_kv_shared_layers", 0):
            kinds = ", ".join(sorted(strange)) or "layers that share a cache"
            raise UnsupportedConfig(f"{config.model_type} has {kinds}: supported are {', '.join(LAYER_TYPES)}")
        quants = [quant] * num_layers if isinstance(quant, str | tuple) else list(quant)
        if len(quants) != num_layers:
            raise InvalidArgument(f"quant has {len(quants)} entries: the model has {num_layers} layers")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in quants:
            if isinstance(name, str):
                preset(name, head_dim)  # raises for unknown names
        if max_tokens is None:
            max_tokens = config.max_position_embeddings
        super().__init__(layers=[BitDecodingLayer(q, max_tokens) for q in quants])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache occupies, unused room included."""
        return sum(layer.kv.nbytes for layer in self.layers if layer.is_initialized)


def enable(
    model: PreTrainedModel, quant: Quantisation | Sequence[Quantisation] = "kv4", max_tokens: int | None = None
) -> None:
    """Let a model keep its KV cache in low-bit blocks from now on; :func:`disable` undoes it.

    ``model.generate(..)`` then creates a :class:`BitDecodingCache` of the size it needs, ``model(..)`` one for
    ``max_tokens`` (default: the model's maximum). A cache that the caller passes is used as it is.
    """
    BitDecodingCache(model.config, quant)  # raises if the model or the argument cannot do
    disable(model)
    previous = model.config.get_text_config(decoder=True)._attn_implementation
    _set_attention(model, NAME)
    prepare_cache = model._prepare_cache_for_generation

    def prepare_own_cache(generation_config, model_kwargs, mode, batch_size, max_cache_length):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = BitDecodingCache(model.config, quant, max_tokens or max_cache_length)
        return prepare_cache(generation_config, model_kwargs, mode, batch_size, max_cache_length)

    def add_cache(module, args, kwargs):
        uses_cache = kwargs.get("use_cache", model.config.get_text_config(decoder=True).use_cache)
        if uses_cache and not module.training and kwargs.get("past_key_values") is None:
            return args, kwargs | {"past_key_values": BitDecodingCache(model.config, quant, max_tokens)}
        return None

    model._prepare_cache_for_generation = prepare_own_cache
    hook = model.register_forward_pre_hook(add_cache, with_kwargs=True)
    model._bitdecoding_undo = (hook, previous)


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable`; a model that was not enabled stays as it is."""
    if not hasattr(model, "_bitdecoding_undo"):
        return
    hook, previous = model._bitdecoding_undo
    hook.remove()
    del model._prepare_cache_for_generation, model._bitdecoding_undo
    _set_attention(model, previous)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Change the attention of the text decoder, not that of an image or audio tower."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        model.set_attn_implementation(name)
    else:
        keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
        model.set_attn_implementation(dict.fromkeys(keys, name))


# ------------------------------------------------------------------------------------- attention and mask function


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [batch, heads, new_tokens, head_dim], mask from `attention_mask_2d`.

    Keys and values that a BitDecodingLayer marked are read from its cache; others (no cache, a cache of another class)
    get ordinary attention. -> [batch, new_tokens, heads, head_dim] and no attention weights.
    """
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedConfig(f"{type(module).__name__} passes {name}, which {NAME} attention does not know")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedConfig(f"{type(module).__name__} is not causal: {NAME} attention is")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedConfig(f"attention_mask is {list(attention_mask.shape)}: allowed is [batch, tokens]")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {"softmax_scale": scaling, "window": sliding_window, "softcap": softcap, "sink_logits": s_aux}
    layer = getattr(key, "bitdecoding_layer", None)
    if layer is None:
        return _dense_attention(q, k, v, attention_mask, dropout=dropout, **options), None
    padding = None if attention_mask is None else attention_mask[:, -q.shape[1] :]
    return layer.attend(q, k, v, padding, **options), None


def attention_mask_2d(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask interface -> bool [batch, kv_length], False for left padding; None where there is none.

    Causality and sliding windows need no mask here; any other pattern raises UnsupportedConfig.
    """
    if not _is_causal(mask_function):
        raise UnsupportedConfig(f"{NAME} attention knows causal masks and sliding windows, not this model's mask")
    if q_offset + q_length != kv_offset + kv_length:
        raise UnsupportedConfig(f"{NAME} attention does not work with static caches")
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    if attention_mask.all():
        return None
    if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
        raise UnsupportedConfig("attention_mask has padding behind tokens: supported is padding on the left")
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask_2d)


_WINDOW_PARTS = {
    part.__code__ for part in inspect.getclosurevars(sliding_window_causal_mask_function(1)).nonlocals["mask_functions"]
}


def _is_causal(mask_function: Callable) -> bool:
    """Whether a mask function of transformers is plain causal, with or without a sliding window."""
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", [mask_function])
    return {part.__code__ for part in parts} <= _WINDOW_PARTS


def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    *,
    softmax_scale: float | None,
    window: int | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention over keys in full precision; the last query belongs to the last key.

    q [batch, queries, num_q_heads, head_dim], k, v [batch, keys, num_kv_heads, head_dim]; padding bool [batch, keys].
    """
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    query_at = torch.arange(keys - queries, keys, device=q.device)[:, None]
    key_at = torch.arange(keys, device=q.device)
    visible = key_at <= query_at
    if window is not None:
        visible &= key_at > query_at - window
    if padding is not None:  # a padding token sees itself: a softmax over nothing would be NaN
        visible = (visible & padding[:, None, None, :]) | (key_at == query_at)

    if softcap is None and sink_logits is None:
        plain = queries == keys and padding is None and (window is None or window >= keys)
        mask = None if plain else visible
        out = functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=plain, scale=softmax_scale
        )
        return out.transpose(1, 2)
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return functional.dropout(weights, dropout).to(v.dtype).matmul(v).transpose(1, 2)


def _decode_with(kv: KVCache, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **options) -> Tensor:
    """Attention over a cache as if it also held new tokens, all in 16 bit; the cache does not change.

    lengths: int32 [batch], how many of the new tokens count; the others come last. Otherwise as for `bd.decode`.
    """
    batch, new_tokens = k.shape[:2]
    k, v = rotated(k, v, kv.quant)
    if lengths is None:
        lengths = torch.full_like(kv.seqlens, new_tokens)
    row = torch.arange(batch, device=k.device)[:, None].expand(batch, new_tokens)
    order = torch.arange(new_tokens, device=k.device)
    position = kv.seqlens[:, None] + order
    slot = position - kv.sink_tokens - kv.packed_lens[:, None]  # in the tail
    exists = order < lengths[:, None]
    to_sink, to_tail = exists & (position < kv.sink_tokens), exists & (position >= kv.sink_tokens)

    def extended(sink: Tensor | None, tail: Tensor, new: Tensor) -> tuple[Tensor | None, Tensor]:
        tail = torch.cat((tail, torch.zeros_like(new)), dim=1)
        tail[row[to_tail], slot[to_tail]] = new[to_tail]
        if sink is not None:
            sink = sink.clone()
            sink[row[to_sink], position[to_sink]] = new[to_sink]
        return sink, tail

    sink_k, tail_k = extended(kv.sink_k, kv.tail_k, k)
    sink_v, tail_v = extended(kv.sink_v, kv.tail_v, v)
    return ops.decode(
        q, kv.pages, kv.block_table, kv.seqlens + lengths, kv.quant, packed_lens=kv.packed_lens, tail_k=tail_k,
        tail_v=tail_v, sink_k=sink_k, sink_v=sink_v, **options,
    )  # fmt: skip


def _to_front(x: Tensor, padding: Tensor) -> Tensor:
    """Move each sequence's tokens [batch, tokens, ..] to the front, in order; padding comes behind."""
    order = padding.int().argsort(dim=1, descending=True, stable=True)
    return x.gather(1, order[:, :, None, None].expand_as(x))
