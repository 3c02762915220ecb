"""QuantPolicy: how the cache of a whole model is quantised, layer by layer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from .cute_kernels.checks import check_int, check_one_of, check_path, check_type, parse_json, shown
from .cute_kernels.config import QuantSpec
from .cute_kernels.errors import InvalidArgument
from .cute_kernels.layouts import BLOCK_TOKENS
from .ops import block_bytes
from .quantization import PRESETS, CachePolicy, preset
from .torch_ops import spec_from_json

UNQUANTISED = "16bit"  # the format of a layer that is kept in 16 bit
MAX_DIGITS = 10  # of a number in a policy's text
MAX_LAYERS = 9999
DEFAULT_POLICY = CachePolicy(recent=64, sink_tokens=4)  # of a bare QuantSpec

Format: TypeAlias = str | QuantSpec  # a preset's name, "16bit", or a spec


@dataclass(frozen=True)
class QuantPolicy:
    """The format of every layer's cache, and what all of them keep in 16 bit.

    ::

        QuantPolicy("kv4")                                        # a preset everywhere
        QuantPolicy("k4v2", layers={0: "kv8", -1: "16bit"})       # first layer 8 bit, last layer not quantised
        QuantPolicy(my_spec, sink_tokens=4, recent=64, hadamard=True)

    default: the format of all layers that are not named: a preset, "16bit", or a QuantSpec.
    layers: formats of single layers; negative numbers count from the last layer.
    sink_tokens, recent: tokens that every layer keeps in 16 bit: the first ones and at least the newest ones. None:
        what the layer's preset says, 4 and 64 for a QuantSpec.
    hadamard: whether K and V are rotated. None: what the layer's preset or spec says.
    """

    default: Format = "kv4"
    layers: Mapping[int, Format] = field(default_factory=dict)
    sink_tokens: int | None = None
    recent: int | None = None
    hadamard: bool | None = None

    def __post_init__(self) -> None:
        _check_format("default", self.default)
        if not isinstance(self.layers, Mapping) or not all(type(i) is int for i in self.layers):
            raise InvalidArgument(f"layers={shown(self.layers)}: allowed is a mapping from layer numbers to formats")
        for i, wanted in self.layers.items():
            _check_format(f"layers[{i}]", wanted)
        for name in ("sink_tokens", "recent"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value)
        check_one_of("hadamard", self.hadamard, (True, False, None))

    @classmethod
    def of(cls, value: QuantPolicy | Format | tuple[QuantSpec, CachePolicy] | Sequence) -> QuantPolicy:
        """A policy from what stands for one: a format, (QuantSpec, CachePolicy), or a list with a format per layer."""
        if isinstance(value, QuantPolicy):
            return value
        if isinstance(value, str | QuantSpec):
            return cls(value)
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], CachePolicy):
            return cls(value[0], sink_tokens=value[1].sink_tokens, recent=value[1].recent)
        if isinstance(value, Sequence) and value:
            return cls(value[0], dict(enumerate(value)))
        raise InvalidArgument(
            f"quant={shown(value)}: allowed are a QuantPolicy, {_FORMATS}, (QuantSpec, CachePolicy), or a list"
        )

    @classmethod
    def parse(cls, text: str) -> QuantPolicy:
        """A policy from a command line: a preset or "16bit", with changes such as ``kv2:recent=32:sinks=4`` or
        ``kv4:hadamard=off``, or a JSON file that :meth:`save` wrote."""
        check_type("policy", text, str)
        if text.endswith(".json"):
            return cls.load(text)
        head, *changes = text.split(":")
        values: dict[str, Any] = {}
        for change in changes:
            key, _, value = change.partition("=")
            field = "sink_tokens" if key == "sinks" else key
            if field in values:
                raise InvalidArgument(f"policy={shown(text)}: {key} is there twice")
            if key in ("sinks", "recent") and value.isdecimal() and len(value) <= MAX_DIGITS:
                values[field] = int(value)
            elif key == "hadamard" and value in ("on", "off"):
                values[field] = value == "on"
            else:
                raise InvalidArgument(
                    f"policy={shown(text)}: allowed changes are sinks=N, recent=N, hadamard=on and hadamard=off"
                )
        return cls(head, **values)

    def resolve(self, num_layers: int, head_dim: int) -> list[tuple[QuantSpec | None, CachePolicy]]:
        """What each layer does: its spec, None where it is not quantised, and what it keeps in 16 bit."""
        check_int("num_layers", num_layers, 1, MAX_LAYERS)
        chosen = [self.default] * num_layers
        for i, wanted in self.layers.items():
            if not -num_layers <= i < num_layers:
                raise InvalidArgument(f"layers[{i}]: the model has {num_layers} layers")
            chosen[i] = wanted
        return [self._resolve(wanted, head_dim) for wanted in chosen]

    def _resolve(self, wanted: Format, head_dim: int) -> tuple[QuantSpec | None, CachePolicy]:
        spec: QuantSpec | None
        if isinstance(wanted, QuantSpec):
            spec, kept = wanted, DEFAULT_POLICY
            spec.validate(head_dim)
        elif wanted == UNQUANTISED:
            spec, kept = None, CachePolicy()
        else:
            spec, kept = preset(wanted, head_dim)
        if spec is not None and self.hadamard is not None:
            rotation = {"rotate_k": self.hadamard, "rotate_v": self.hadamard}
            spec = spec_from_json(json.dumps(spec.to_dict() | rotation))  # the same object at every call
        if self.sink_tokens is not None:
            kept = replace(kept, sink_tokens=self.sink_tokens)
        if self.recent is not None:
            kept = replace(kept, recent=self.recent)
        return spec, kept

    def bits_per_value(self, num_layers: int, head_dim: int, tokens: int) -> float:
        """Bits that a cached value takes on average, everything counted, in a sequence of so many tokens."""
        check_int("tokens", tokens, 1)
        total = 0
        for spec, kept in self.resolve(num_layers, head_dim):
            packed = 0 if spec is None else kept.packed_len(tokens, 0)
            total += (tokens - packed) * 2 * head_dim * 16
            if spec is not None:
                total += packed // BLOCK_TOKENS * block_bytes(head_dim, spec) * 8
        return total / (num_layers * tokens * 2 * head_dim)

    def name(self) -> str:
        """A short name: the formats with the number of layers that have them, such as ``kv4+2*kv8``."""
        counts: dict[str, int] = {}
        for wanted in self.layers.values():
            counts[_format_name(wanted)] = counts.get(_format_name(wanted), 0) + 1
        parts = [_format_name(self.default), *(f"{count}*{name}" for name, count in sorted(counts.items()))]
        return "+".join(parts)

    def to_json(self) -> str:
        def plain(wanted: Format) -> Any:
            return wanted.to_dict() if isinstance(wanted, QuantSpec) else wanted

        values: dict[str, Any] = {"default": plain(self.default)}
        if self.layers:
            values["layers"] = {str(i): plain(wanted) for i, wanted in sorted(self.layers.items())}
        values |= {key: x for key in _KEPT if (x := getattr(self, key)) is not None}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str | bytes) -> QuantPolicy:
        """The inverse of to_json; raises InvalidArgument for anything else."""
        values = parse_json("QuantPolicy", text)
        if not isinstance(values, dict) or "default" not in values:
            raise InvalidArgument(f"QuantPolicy={shown(values)}: allowed is an object with a default format")
        if unknown := sorted(set(values) - {"default", "layers", *_KEPT}):
            raise InvalidArgument(f"QuantPolicy: unknown fields: {', '.join(unknown)}")
        named = values.get("layers", {})
        if not isinstance(named, dict) or not all(_LAYER_NUMBER.fullmatch(i) for i in named):
            raise InvalidArgument(f"layers={shown(named)}: allowed is an object from layer numbers to formats")
        layers = {int(i): _parsed(wanted) for i, wanted in named.items()}
        return cls(_parsed(values["default"]), layers, **{key: values.get(key) for key in _KEPT})

    def save(self, path: str | os.PathLike[str]) -> None:
        check_path("path", path)
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantPolicy:
        """Read what :meth:`save` wrote; raises InvalidArgument for anything else."""
        check_path("path", path)
        try:
            return cls.from_json(Path(path).read_bytes())
        except InvalidArgument as error:
            raise InvalidArgument(f"{os.fspath(path)}: {error}") from None


_KEPT = ("sink_tokens", "recent", "hadamard")
_LAYER_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,3}")  # in the one form that to_json writes
_FORMATS = f"a QuantSpec, {UNQUANTISED!r} or a preset ({', '.join(PRESETS)})"


def _check_format(name: str, wanted: object) -> None:
    if not isinstance(wanted, QuantSpec) and not (isinstance(wanted, str) and wanted in (UNQUANTISED, *PRESETS)):
        raise InvalidArgument(f"{name}={shown(wanted)}: allowed are {_FORMATS}")


def _format_name(wanted: Format) -> str:
    return wanted.name() if isinstance(wanted, QuantSpec) else wanted


def _parsed(wanted: Any) -> Format:
    return spec_from_json(json.dumps(wanted)) if isinstance(wanted, dict) else wanted
