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
how a prompt is cut into chunks, and let the token that completes a block see itself quantised. ``KVCache.step`` does
that for a few tokens. A single one beside left padding can be appended first, since the newest ``recent`` tokens, of
which a layer keeps one at least, are not packed. The first chunk of an empty cache needs no cache and goes to torch's
own attention.

The cache is static: all memory is allocated, and all pages are assigned, when the first tokens arrive; then steps
neither allocate nor wait for the device, and can be compiled with ``torch.compile(fullgraph=True,
mode="reduce-overhead")``, which ``generate`` does by itself on a GPU.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMode
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from .. import ops
from ..cache import STEP_TOKENS, KVCache
from ..cute_kernels.checks import check_int, check_path, check_type, parse_json
from ..cute_kernels.config import QuantSpec
from ..cute_kernels.errors import CacheFormatError, InvalidArgument, OutOfPages, UnsupportedConfig
from ..policy import QuantPolicy
from ..quantization import CachePolicy, preset, rotate

NAME = "bitdecoding"  # of the attention and of the mask function
LAYER_TYPES = ("full_attention", "sliding_attention")
QUERY_CHUNK = 1024  # queries whose mask or scores are in memory at once
POLICY_FILE = "policy.json"
PADDING_ERROR = "attention_mask has padding behind tokens: supported is padding on the left"

# what QuantPolicy.of takes
Quantisation: TypeAlias = QuantPolicy | str | QuantSpec | tuple[QuantSpec, CachePolicy] | list


class _Shared:
    """What the layers of a cache share: they are used one after the other."""

    def __init__(self) -> None:
        self.length: Tensor | None = None  # int64 [], tokens of the longest sequence, padding included
        self.workspaces: dict[tuple[torch.device, int], Tensor | None] = {}

    @torch.inference_mode(False)
    def count(self, tokens: int, device: torch.device | str) -> None:
        """Begin to count, from so many tokens on."""
        self.length = _static(torch.tensor(tokens, dtype=torch.int64, device=device))

    def workspace(self, device: torch.device, head_dim: int) -> Tensor | None:
        key = (device, head_dim)
        if key not in self.workspaces:
            self.workspaces[key] = _static(ops.workspace(device, head_dim))
        return self.workspaces[key]


def _static(x: Tensor | None) -> Tensor | None:
    """x, known to torch.compile as memory that stays where it is, so that CUDA graphs may change it in place."""
    if x is not None:
        torch._dynamo.mark_static_address(x)
    return x


class BitDecodingLayer(CacheLayerMixin):
    """The cache of one attention layer: a :class:`bitdecoding.KVCache`, created when the first tokens arrive.

    Sequences may differ in length: left padding is not stored.
    """

    is_sliding = False  # a sliding window is applied when the cache is read
    is_compileable = True
    is_croppable = False  # only tokens that still are in 16 bit come back exactly, see `crop`

    def __init__(self, quant: QuantSpec | None, policy: CachePolicy, max_tokens: int, index: int, shared: _Shared):
        """quant: None keeps all tokens in 16 bit. index: of the layer."""
        super().__init__()
        self.quant = quant
        self.policy = policy
        self.max_tokens = max_tokens
        self.index = index
        self.counts = index == 0  # the tokens, for all layers
        self.shared = shared
        self.kv: KVCache | None = None
        self.empty = True  # no tokens yet
        self.begun = False  # every sequence has tokens: there can be no more left padding
        self.awaiting_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if torch.compiler.is_compiling():
            raise InvalidArgument(
                "a BitDecodingCache cannot be created within torch.compile: call early_initialization"
            )
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise UnsupportedConfig(f"values have head_dim {value_states.shape[-1]}, keys {head_dim}: must be equal")
        # a tail that never gets full keeps all tokens in 16 bit; of others one token, see the module's text
        recent = self.max_tokens if self.quant is None else max(1, self.policy.recent)
        self._use(
            KVCache(
                batch_size=batch_size,
                max_tokens=self.max_tokens,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                quant=preset("kv8", head_dim)[0] if self.quant is None else self.quant,
                recent=recent,
                sink_tokens=self.policy.sink_tokens,
                dtype=key_states.dtype if key_states.dtype.itemsize == 2 else torch.float16,
                device=key_states.device,
            )
        )
        if self.shared.length is None:
            self.shared.count(0, key_states.device)

    def _use(self, kv: KVCache) -> None:
        self.kv = kv
        self.rotates = bool(kv.quant.rotate_k), bool(kv.quant.rotate_v)  # torch.compile cannot read a QuantSpec
        self.batch_size = kv.batch_size
        for x in kv._buffers():
            _static(x)
        kv.workspace = self.shared.workspace(kv.device, kv.head_dim)
        self._reserve()
        self.is_initialized = True

    def _reserve(self) -> None:
        """Give every sequence the pages for all its tokens, so that the device can pack on its own."""
        self.kv.reserve([self.max_tokens - n for n in self.kv.seqlens.tolist()])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """key_states, value_states [batch, num_kv_heads, new_tokens, head_dim] -> the same, marked for `attention`."""
        if self.awaiting_attention:
            raise InvalidArgument(
                f"this model does not attend through bitdecoding, so its cache cannot be a BitDecodingCache: "
                f"call model.set_attn_implementation({NAME!r}) or bitdecoding.integrations.transformers.enable(model)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ops.check_tensor(
            "key_states", key_states, (key_states.dtype,), batch_size=self.kv.batch_size,
            num_kv_heads=self.kv.num_kv_heads, new_tokens=None, head_dim=self.kv.head_dim,
        )  # fmt: skip
        self.awaiting_attention = True
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
        if not self.awaiting_attention:
            raise UnsupportedConfig("this model attends twice to the same keys: a BitDecodingCache takes them once")
        kv, first, new_tokens = self.kv, self.empty, q.shape[1]
        self.awaiting_attention = False
        if self.begun and new_tokens == 1:
            padding = None
        begun = self.begun or padding is None
        lengths = order = None
        if padding is not None:
            lengths = padding.sum(1, dtype=torch.int32)
            if not begun and not torch.compiler.is_compiling():
                begun = bool((lengths > 0).all())
            order = padding.int().argsort(dim=1, descending=True, stable=True)
            k, v = _reorder(k, order), _reorder(v, order)

        q16, k16, v16 = (x.to(kv.dtype).contiguous() for x in (q, k, v))
        if new_tokens == 1 and torch.compiler.is_compiling():
            q16, k16, v16 = _in_one_buffer(q16, k16, v16)
        if first and order is not None:
            # with padding behind, causal attention needs no mask
            out = _dense_attention(_reorder(q, order), k, v, None, **options)
            out = _reorder(out, order.argsort(dim=1))
        elif first:
            out = _dense_attention(q, k, v, None, **options)
        # a step on the device does not ask the device for lengths
        alone = torch.compiler.is_compiling() or (new_tokens == 1 and kv.device.type == "cuda")
        if not first and lengths is None and new_tokens <= STEP_TOKENS:
            out = kv.step(q16, k16, v16, reserved=alone, **options).to(q.dtype)
        else:
            if not first and new_tokens > 1:
                out = self._decode_with(q16, k16, v16, lengths, **options).to(q.dtype)
            kv.append(k16, v16, lengths, reserved=alone)
            if not first and new_tokens == 1:
                out = kv.decode(q16, **options).to(q.dtype)
        self.empty, self.begun = False, begun  # and no sooner: what raises leaves the cache as it was
        if self.counts:
            self.shared.length.add_(new_tokens)
        return out

    def _decode_with(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **options) -> Tensor:
        """Attention over the cache as if it also held new tokens, all in 16 bit; the cache does not change.

        lengths: int32 [batch], how many of the new tokens count; the others come last. Otherwise as for `bd.decode`.
        """
        kv, (batch, new_tokens) = self.kv, k.shape[:2]
        k, v = (rotate(x) if rotates else x for x, rotates in zip((k, v), self.rotates, strict=True))
        if lengths is None:
            lengths = torch.full_like(kv.seqlens, new_tokens)
        order = torch.arange(new_tokens, device=k.device)
        position = kv.seqlens[:, None] + order  # [batch, new_tokens]
        exists = order < lengths[:, None]
        in_sink = position < kv.sink_tokens
        slot = position - kv.sink_tokens - kv.packed_lens[:, None]

        def with_new(old: Tensor, new: Tensor, room: int, slots: Tensor, here: Tensor) -> Tensor:
            """old with room for more tokens, and those of the new ones that belong here at their slots."""
            old = torch.cat((old, new.new_zeros(batch, room + 1, *new.shape[2:])), dim=1)
            index = torch.where(here, slots, old.shape[1] - 1)  # the last slot is for those that do not
            old = old.scatter(1, index.long()[:, :, None, None].expand_as(new), new)
            return old[:, :-1].contiguous()

        tail_k, tail_v = (
            with_new(old, new, new_tokens, slot, exists & ~in_sink) for old, new in ((kv.tail_k, k), (kv.tail_v, v))
        )
        sink_k = sink_v = None
        if kv.sink_tokens:
            sink_k, sink_v = (
                with_new(old, new, 0, position, exists & in_sink) for old, new in ((kv.sink_k, k), (kv.sink_v, v))
            )
        return ops.decode(
            q, kv.pages, kv.block_table, kv.seqlens + lengths, kv._spec(), packed_lens=kv.packed_lens, tail_k=tail_k,
            tail_v=tail_v, sink_k=sink_k, sink_v=sink_v, workspace=kv.workspace, **options,
        )  # fmt: skip

    def sync(self) -> None:
        """Raise OutOfPages if a sequence got more than max_tokens in steps on the device, which nobody awaits."""
        if not self.is_initialized:
            return
        self.kv.sync()
        if (longest := int(self.kv.seqlens.max())) > self.max_tokens:
            raise OutOfPages(f"a sequence has {longest} tokens: allowed are max_tokens={self.max_tokens}")

    def get_seq_length(self) -> Tensor | int:
        return self.shared.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is for the new tokens, of which `update` returns the keys; the lengths of the others are known."""
        return query_length, 0

    def get_max_length(self) -> int:
        return self.max_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens of each sequence, such as rejected drafts.

        Exact as long as they are in the 16-bit tail, which holds at least the policy's ``recent`` tokens.
        """
        check_type("tokens_to_remove", tokens_to_remove, int, Tensor)
        if tokens_to_remove > 0:
            raise InvalidArgument(f"tokens_to_remove={tokens_to_remove}: allowed are negative numbers and 0")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        check_int("-tokens_to_remove", -int(tokens_to_remove))
        lengths = (self.kv.seqlens + int(tokens_to_remove)).clamp_(min=0).tolist()
        self.kv.truncate(lengths)
        self._reserve()
        self.empty, self.begun = not any(lengths), all(lengths)
        if self.counts:
            self.shared.length.add_(int(tokens_to_remove)).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b goes on as sequence ``beam_idx[b]``."""
        if self.is_initialized:
            self.kv.fork(beam_idx)
            self._reserve()

    def batch_repeat_interleave(self, *args) -> None:
        raise UnsupportedConfig("a BitDecodingCache cannot change its number of sequences")

    batch_select_indices = batch_repeat_interleave

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.empty, self.begun, self.awaiting_attention = True, False, False
        if self.is_initialized:
            self.kv.truncate(0)
            self._reserve()
            self.shared.length.zero_()


class BitDecodingCache(Cache):
    """A transformers cache that keeps keys and values in low-bit blocks.

    config: of the model.
    quant: a :class:`bitdecoding.QuantPolicy` or what stands for one: the name of a preset, a QuantSpec, a pair
        (QuantSpec, CachePolicy), or a list with a format per layer.
    max_tokens: capacity of a sequence. Default: ``config.max_position_embeddings``, for which memory is then reserved;
        ``generate`` on a model prepared by :func:`enable` asks for what it needs.
    Layers with a sliding window keep all tokens and read those inside the window.
    Raises UnsupportedConfig for models with other kinds of layers (linear or chunked attention, shared caches).
    Steps of one token are not checked against max_tokens on a GPU, where that would mean to wait: :meth:`sync` does.
    """

    def __init__(self, config: PreTrainedConfig, quant: Quantisation = "kv4", max_tokens: int | None = None) -> None:
        check_type("config", config, PreTrainedConfig)
        config = config.get_text_config(decoder=True)
        num_layers = config.num_hidden_layers
        strange = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
        if strange or getattr(config, "num_kv_shared_layers", 0):
            kinds = ", ".join(sorted(strange)) or "layers that share a cache"
            raise UnsupportedConfig(f"{config.model_type} has {kinds}: supported are {', '.join(LAYER_TYPES)}")
        self.policy = QuantPolicy.of(quant)
        by_layer = isinstance(quant, list | tuple) and not isinstance(quant[-1], CachePolicy)
        if by_layer and len(quant) != num_layers:
            raise InvalidArgument(f"quant has {len(quant)} entries: the model has {num_layers} layers")
        _, head_dim = kv_shape(config)
        if max_tokens is None:
            max_tokens = getattr(config, "max_position_embeddings", None)
        check_int("max_tokens", max_tokens, 1)
        self._shared = _Shared()
        formats = self.policy.resolve(num_layers, head_dim)
        layers = [BitDecodingLayer(*wanted, max_tokens, i, self._shared) for i, wanted in enumerate(formats)]
        super().__init__(layers=layers)

    def initialize(self, model: PreTrainedModel, batch_size: int) -> None:
        """Allocate everything now, which the first tokens do otherwise: before a first chunk that is compiled."""
        shape = kv_shape(model.config.get_text_config(decoder=True))
        self.early_initialization(batch_size, *shape, model.dtype, model.device)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache occupies, unused room included."""
        return sum(layer.kv.nbytes for layer in self.layers if layer.is_initialized)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the blocks and 16-bit tokens that the sequences hold now."""
        return sum(layer.kv.used_nbytes for layer in self.layers if layer.is_initialized)

    def sync(self) -> None:
        """Wait for the device; raises OutOfPages if a sequence got more than max_tokens."""
        for layer in self.layers:
            layer.sync()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the policy and every layer's tokens into a folder."""
        check_path("folder", folder)
        if not self.is_initialized:
            raise InvalidArgument("the cache is empty: there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"policy": json.loads(self.policy.to_json()), "length": int(self._shared.length)}
        (folder / POLICY_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        for layer in self.layers:
            layer.kv.save(folder / _layer_file(layer.index))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], config: PreTrainedConfig, device: torch.device | str = "cpu"
    ) -> BitDecodingCache:
        """Read what :meth:`save` wrote for a model with this config; raises CacheFormatError for anything else."""
        check_path("folder", folder)
        check_type("config", config, PreTrainedConfig)
        folder, config = Path(folder), config.get_text_config(decoder=True)
        try:
            state = parse_json("policy", (folder / POLICY_FILE).read_bytes())
            policy, length = QuantPolicy.from_json(json.dumps(state["policy"])), state["length"]
            check_int("length", length)
        except (OSError, TypeError, KeyError, InvalidArgument) as error:
            raise CacheFormatError(f"{folder / POLICY_FILE}: {error!r}") from None
        try:
            kvs = [KVCache.load(folder / _layer_file(i), device) for i in range(config.num_hidden_layers)]
        except FileNotFoundError as error:
            raise CacheFormatError(f"{folder}: not a cache of {config.num_hidden_layers} layers: {error}") from None
        if (folder / _layer_file(len(kvs))).exists():
            raise CacheFormatError(f"{folder}: a cache of more than {len(kvs)} layers")
        lengths = kvs[0].seqlens.tolist()
        if length < max(lengths):
            raise CacheFormatError(f"{folder / POLICY_FILE}: length={length}: a sequence has {max(lengths)} tokens")
        cache = cls(config, policy, kvs[0].max_tokens)
        cache._shared.count(length, device)
        for layer, kv in zip(cache.layers, kvs, strict=True):
            if (kv.num_kv_heads, kv.head_dim) != kv_shape(config):
                raise CacheFormatError(
                    f"{folder / _layer_file(layer.index)}: num_kv_heads={kv.num_kv_heads}, head_dim={kv.head_dim}: "
                    f"the model has {' and '.join(map(str, kv_shape(config)))}"
                )
            if (kv.max_tokens, kv.seqlens.tolist()) != (kvs[0].max_tokens, lengths) or (
                layer.quant not in (None, kv.quant)
            ):
                raise CacheFormatError(f"{folder / _layer_file(layer.index)}: not a layer of this cache")
            layer._use(kv)
            layer.empty, layer.begun = not any(lengths), all(lengths)
        return cache


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """num_kv_heads and head_dim of a text decoder."""
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return num_kv_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer_file(index: int) -> str:
    return f"layer-{index:03}.safetensors"


def enable(model: PreTrainedModel, quant: Quantisation = "kv4", max_tokens: int | None = None) -> None:
    """Let a model keep its KV cache in low-bit blocks from now on; :func:`disable` undoes it.

    ``model.generate(..)`` then creates a :class:`BitDecodingCache` of the size it needs, ``model(..)`` one for
    ``max_tokens`` (default: the model's maximum). A cache that the caller passes is used as it is.
    """
    check_type("model", model, PreTrainedModel)
    BitDecodingCache(model.config, quant, max_tokens)  # raises if the model or the arguments cannot do
    disable(model)
    previous = model.config.get_text_config(decoder=True)._attn_implementation
    _set_attention(model, NAME)
    prepare_cache = model._prepare_cache_for_generation

    def prepare_own_cache(generation_config, model_kwargs, mode, batch_size, max_cache_length):
        cache = model_kwargs.get("past_key_values")
        # drafts may go beyond the end: those from the prompt, and by a token those of another tokenizer's assistant
        needed = max_cache_length + (generation_config.prompt_lookup_num_tokens or 0)
        if cache is None and generation_config.use_cache:
            spare = int(mode == GenerationMode.ASSISTED_GENERATION)
            cache = BitDecodingCache(model.config, quant, max_tokens or needed + spare)
            model_kwargs["past_key_values"] = cache
            if generation_config.prefill_chunk_size is not None:  # then the first chunk is compiled, too
                sequences = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
                cache.initialize(model, sequences)
        if isinstance(cache, BitDecodingCache) and cache.get_max_length() < needed:
            raise OutOfPages(f"max_tokens={cache.get_max_length()} of the cache: this generation may need {needed}")
        return prepare_cache(generation_config, model_kwargs, mode, batch_size, max_cache_length)

    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    def add_cache(module, args, kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        uses_cache = given.get("use_cache")
        if uses_cache is None:
            uses_cache = model.config.get_text_config(decoder=True).use_cache
        if uses_cache and not module.training and given.get("past_key_values") is None:
            return args[len(names) :], given | {"past_key_values": BitDecodingCache(model.config, quant, max_tokens)}
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
    """transformers' attention interface: query [batch, heads, new_tokens, head_dim], mask from `padding_mask`.

    Keys and values that a BitDecodingLayer marked are read from its cache; others (no cache, a cache of another class)
    get ordinary attention. -> [batch, new_tokens, heads, head_dim] and no attention weights.
    """
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedConfig(f"{type(module).__name__} passes {name}, which {NAME} attention does not know")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedConfig(f"{type(module).__name__} is not causal: {NAME} attention is")
    if attention_mask is not None and tuple(attention_mask.shape[1:3]) != (1, 1):
        raise UnsupportedConfig(f"attention_mask is {list(attention_mask.shape)}: allowed is [batch, 1, 1, tokens]")
    padding = None if attention_mask is None else attention_mask[:, 0, 0]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {"softmax_scale": scaling, "window": sliding_window, "softcap": softcap, "sink_logits": s_aux}
    layer = getattr(key, "bitdecoding_layer", None)
    if layer is None:
        return _dense_attention(q, k, v, padding, dropout=dropout, **options), None
    return layer.attend(q, k, v, padding, **options), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """transformers' mask interface -> bool [batch, 1, 1, kv_length], False for left padding; None where there is none.

    For a BitDecodingCache the keys are those of the new tokens. Causality and sliding windows need no mask here; any
    other pattern raises UnsupportedConfig. A single new token is not looked at: that would wait for the device.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not _is_causal(mask_function):  # it looks into closures, which cannot be traced
        raise UnsupportedConfig(f"{NAME} attention knows causal masks and sliding windows, not this model's mask")
    if kv_length != q_length and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise UnsupportedConfig(f"{NAME} attention does not work with static caches of other classes")
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].to(torch.bool)
    if compiling:
        if kv_length > 1:
            torch._assert_async((~mask[:, :-1] | mask[:, 1:]).all(), PADDING_ERROR)
    elif kv_length > 1:
        if mask.all():
            return None
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            raise UnsupportedConfig(PADDING_ERROR)
    return mask[:, None, None]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)


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
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    special = softcap is not None or sink_logits is not None
    if queries == keys and padding is None and (window is None or window >= keys) and not special:
        out = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    # a chunk of queries at a time, with the keys that it can see
    outs = []
    for start in range(0, queries, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, queries)
        last = keys - queries + end  # behind the last key that is visible
        first = 0 if window is None else max(0, keys - queries + start - window + 1)
        query_at = torch.arange(last - (end - start), last, device=q.device)[:, None]
        key_at = torch.arange(first, last, device=q.device)
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
        if padding is not None:  # a padding token sees itself: a softmax over nothing would be NaN
            visible = (visible & padding[:, None, None, first:last]) | (key_at == query_at)
        part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        if special:
            outs.append(_special_attention(*part, visible, softmax_scale, softcap, sink_logits, dropout))
        else:
            outs.append(
                functional.scaled_dot_product_attention(
                    *part, visible, dropout_p=dropout, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outs, dim=2).transpose(1, 2)


def _special_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    softmax_scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention with soft cap or sink logits, which torch's own does not know; heads before tokens."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return functional.dropout(weights, dropout).to(v.dtype).matmul(v)


def _in_one_buffer(*tensors: Tensor) -> list[Tensor]:
    """The tensors as parts of one. torch.compile then makes them all before it appends, rather than the queries between
    append and decode, which overlap where nothing comes between them.
    """
    parts = torch.cat([x.flatten() for x in tensors]).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x [batch, tokens, ..] in another order [batch, tokens]."""
    return x.gather(1, order[:, :, None, None].expand_as(x))
