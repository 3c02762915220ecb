"""QuantSpec: what the bits of a cache mean. KernelConfig: what gets compiled.

Both are classes of the compiled module (the fields are declared in include/bitdecoding/config.hpp); this file adds
the methods. Objects are immutable, comparable, hashable, and can be copied, pickled and written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from tvm_ffi import Object
from tvm_ffi.dataclasses import c_class, fields

from . import native
from .checks import check_int, check_one_of, check_type, parse_json, shown
from .errors import InvalidArgument, UnsupportedConfig
from .layouts import BLOCK_TOKENS, HEAD_DIMS, NUM_SLICES

MMA_COLUMNS = 8  # query columns of one m16n8k16
FEW_COLUMNS = 4  # a tile of so few has each of them twice in the MMA's columns, and half of their arithmetic per lane
MAX_Q_TILE = 16
# (num_warps, warps_per_block, stages), the best first as measured on an H100 (docs/performance.md); the first that fits
# an architecture's shared memory and a lane's registers is taken
TILINGS = (
    (8, 2, 8), (8, 4, 8), (8, 2, 4), (8, 4, 4),
    (4, 2, 8), (4, 4, 8), (4, 2, 4), (4, 4, 4), (4, 2, 2), (4, 4, 2), (4, 4, 1), (2, 2, 1), (1, 1, 1),
)  # fmt: skip
# where a block has more arithmetic than bytes: twelve warps that compute, with registers moved to them (sm90a), or
# copies further ahead
TILING_OF_TWO_BITS = {"bulk": (12, 2, 12), "cp_async": (8, 2, 12)}
# num_warps -> estimated registers of a lane (see _registers) that ptxas can hold without spilling: with the producer
# and three merge warps, 8 warps leave 168 registers to a thread, 4 warps 255
MAX_REGISTERS = {12: 100, 8: 102, 4: 190, 2: 190, 1: 190}
MAX_REGISTERS_OF_TWO_TILES = {"bulk": 170, "cp_async": 190}  # of query columns
# wgmma kernels, as measured on an H100: head_dim -> query columns of a tile -> (num_warps, warps_per_block), the best
# first; of the rings the deepest that fits is taken. They beat mma.sync from 16 columns on. From MIN_TILE_COLUMNS on
# they dequantise tiles in shared memory, and any ring of at least MIN_STAGES will do.
WGMMA_TILINGS = {
    64: {16: ((12, 4), (8, 4)), 32: ((12, 4), (8, 4)), 64: ((8, 4),), 128: ((8, 8),)},
    128: {16: ((12, 4), (8, 4)), 32: ((12, 4), (8, 4)), 64: ((8, 4),), 128: ((8, 8),)},
    256: {16: ((8, 8),), 32: ((8, 8),)},
}
MIN_TILE_COLUMNS, MIN_STAGES = 64, 2
WGMMA_STAGES = (9, 8, 6, 4, 3, 2, 1)
HOPPER_ARCHS = ("sm90a", "sm100", "sm120")  # and later: bulk copies, mbarrier.try_wait

_quant_validate = native.function("quant_validate")
_quant_name = native.function("quant_name")
_config_validate = native.function("config_validate")
_config_name = native.function("config_name")
_config_parse = native.function("config_parse")
_config_smem_bytes = native.function("config_smem_bytes")
_block_bytes = native.function("block_bytes")
_device_info = native.function("device_info")


def _field_dict(obj: Any) -> dict[str, Any]:
    return {field.name: getattr(obj, field.name) for field in fields(type(obj))}


def _from_json(cls: type, text: str) -> Any:
    return _from_dict(cls, parse_json(cls.__name__, text))


def _from_dict(cls: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{cls.__name__}={shown(values)}: a JSON object is needed")
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise InvalidArgument(f"{cls.__name__}: unknown fields: {', '.join(unknown)}")
    if isinstance(values.get("quant"), dict):
        values = values | {"quant": _from_dict(QuantSpec, values["quant"])}
    made = cls(**values)
    made.validate()
    return made


Class = TypeVar("Class", bound=type)


def _checked(cls: Class) -> Class:
    """The class with a constructor that names a field of a wrong type."""
    kinds = {field.name: field.type for field in fields(cls)}
    construct: Callable[..., None] = cls.__init__

    @wraps(construct)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for name in values.keys() & kinds.keys():
            _check_field(name, values[name], kinds[name])
        construct(self, *args, **values)

    cls.__init__ = __init__
    return cls


def _check_field(name: str, value: object, kind: Any) -> None:
    if kind is int:
        check_int(name, value)
    elif kind is bool:
        check_one_of(name, value, (False, True))
    elif kind is str or (kind == str | float and isinstance(value, str)):
        if not (isinstance(value, str) and value.isascii()):
            raise InvalidArgument(f"{name}={shown(value)}: allowed is text of ASCII characters")
    elif kind == str | float:
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise InvalidArgument(f"{name}={shown(value)}: allowed are 'minmax', 'mse' and factors in (0, 1]")
    else:
        check_type(name, value, kind)


@_checked
@c_class("bitdecoding.QuantSpec", eq=True, unsafe_hash=True)
class QuantSpec(Object):
    """How K and V are quantised. All fields are keywords with defaults.

    A value is ``scale * (code + zero)``, scale and zero fp16, one pair per group.

    Attributes:
        k_bits, v_bits: 8, 4 or 2.
        k_axis: a K group holds tokens of one "channel", or channels of one "token". V groups hold channels.
        k_group, v_group: values per group: 32, 64 or 128.
        k_symmetric, v_symmetric: codes are centred and no zero is stored.
        k_mean: "block" subtracts the mean key of a block first and stores it once; or "none".
        k_clip, v_clip: range of a group: "minmax", "mse" (searched) or a factor in (0, 1].
        rotate_k, rotate_v: Hadamard transform over head_dim, of K and Q, and of V (undone on the output).
    """

    k_bits: int
    v_bits: int
    k_axis: str
    k_group: int
    v_group: int
    k_symmetric: bool
    v_symmetric: bool
    k_mean: str
    k_clip: str | float
    v_clip: str | float
    rotate_k: bool
    rotate_v: bool

    def __post_init__(self) -> None:
        self.validate()

    def validate(self, head_dim: int = 0) -> None:
        """Raises InvalidArgument for values that are not allowed (at this head_dim, if one is given)."""
        check_int("head_dim", head_dim)
        _quant_validate(self, head_dim)

    def name(self) -> str:
        """The part that decides the format of a block, such as ``k4c128_v4g128`` (s: symmetric, m: mean)."""
        return _quant_name(self)

    def block_bytes(self, head_dim: int) -> int:
        """Bytes of a block: 128 tokens of one KV head, K and V."""
        check_one_of("head_dim", head_dim, HEAD_DIMS)
        return _block_bytes(head_dim, self)

    def to_dict(self) -> dict[str, Any]:
        return _field_dict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> QuantSpec:
        """The inverse of to_json; raises InvalidArgument for anything else."""
        return _from_json(cls, text)

    def for_kernel(self) -> QuantSpec:
        """This spec without what does not reach the decode kernel: clipping and rotation."""
        keep = {k: v for k, v in _field_dict(self).items() if k not in ("k_clip", "v_clip", "rotate_k", "rotate_v")}
        return QuantSpec(**keep)


@_checked
@c_class("bitdecoding.KernelConfig", eq=True, unsafe_hash=True)
class KernelConfig(Object):
    """One kernel to compile. All fields are keywords with defaults; :meth:`for_problem` chooses them.

    Attributes:
        kind: "decode"; "step" for a decode that appends; "append" for the kernel of append and quantize, "merge" for
            that of merge. What these two do not need stays at its default and is no part of the name: the fields from
            q_tile on, and quant for merge.
        arch: "sm80", "sm86", "sm89", "sm90a", "sm100" or "sm120".
        head_dim: 64, 96, 128 or 256.
        quant: QuantSpec of the cache.
        q_tile: query columns (heads of a group x query tokens) of a tile: 4 (not with wgmma), or a multiple of 8.
        mma: "mma_sync", or "wgmma" (sm90a) for many query columns.
        copy: how blocks reach shared memory: "bulk" (sm90a and later) or "cp_async".
        num_warps: warps that compute.
        warps_per_block: warps that share a cache block: 1, 2 or 4; with wgmma 4, 8 or 16.
        stages: blocks in the shared-memory ring.
        ctas_per_sm: thread blocks that share an SM.
    """

    kind: str
    arch: str
    head_dim: int
    quant: QuantSpec
    q_tile: int
    mma: str
    copy: str
    num_warps: int
    warps_per_block: int
    stages: int
    ctas_per_sm: int

    def validate(self) -> None:
        """Raises InvalidArgument for a value that is not allowed, UnsupportedConfig if no such kernel can exist."""
        _config_validate(self)

    def name(self) -> str:
        """Canonical; two configurations share it only if they differ in nothing that reaches the kernel."""
        return _config_name(self)

    @classmethod
    def from_name(cls, name: str) -> KernelConfig:
        """The inverse of :meth:`name`, with the defaults for clipping and rotation."""
        check_type("name", name, str)
        return _config_parse(name)

    def smem_bytes(self) -> int:
        """Bytes of dynamic shared memory that the kernel uses; raises InvalidArgument as :meth:`validate`."""
        return _config_smem_bytes(self)

    def to_dict(self) -> dict[str, Any]:
        return _field_dict(self) | {"quant": self.quant.to_dict()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> KernelConfig:
        """The inverse of to_json; raises InvalidArgument for anything else."""
        return _from_json(cls, text)

    @classmethod
    def for_problem(
        cls,
        *,
        head_dim: int,
        quant: QuantSpec,
        num_q_heads: int,
        num_kv_heads: int,
        q_len: int = 1,
        arch: str | None = None,
        kind: str = "decode",
    ) -> KernelConfig:
        """The default kernel for a problem; ``arch`` None: that of device 0; ``kind``: "decode" or "step".

        Raises InvalidArgument, UnsupportedConfig (a step for more than 8 query columns of a KV head, too), or CudaError
        if a device is needed and there is none.
        """
        check_one_of("kind", kind, ("decode", "step"))
        check_one_of("head_dim", head_dim, HEAD_DIMS)
        check_type("quant", quant, QuantSpec)
        for name, value in (("num_kv_heads", num_kv_heads), ("num_q_heads", num_q_heads), ("q_len", q_len)):
            check_int(name, value, 1)
        if num_q_heads % num_kv_heads != 0:
            raise InvalidArgument(f"num_q_heads={num_q_heads}: must be a multiple of num_kv_heads={num_kv_heads}")
        columns = num_q_heads // num_kv_heads * q_len
        if arch is None:
            arch = device_arch(0)
        if kind == "step" and columns > MMA_COLUMNS:
            raise UnsupportedConfig(
                f"q_len={q_len}: kind=step has at most {MMA_COLUMNS} query columns, num_q_heads / num_kv_heads * q_len "
                f"is {columns}; append and decode have more"
            )
        if columns > MMA_COLUMNS and (wide := _wgmma_config(arch, head_dim, quant.for_kernel(), columns)):
            return wide
        q_tile = min(column_tile(columns), MAX_Q_TILE)
        copy = "bulk" if arch in HOPPER_ARCHS else "cp_async"
        tilings = TILINGS
        if quant.k_bits == quant.v_bits == 2:
            has_registers = quant.k_axis == "channel" or head_dim <= 64 or q_tile == FEW_COLUMNS
            if kind == "step" and q_tile > FEW_COLUMNS:  # twelve warps have no registers to pack blocks, too
                has_registers = False
            if copy == "cp_async" or (arch == "sm90a" and has_registers):
                tilings = (TILING_OF_TWO_BITS[copy], *TILINGS)
        if kind == "step":
            tilings = tuple(tiling for tiling in tilings if tiling[0] % NUM_SLICES == 0)  # teams of so many warps pack
        for columns in (q_tile, MMA_COLUMNS):
            for num_warps, warps_per_block, stages in tilings:
                config = cls(
                    kind=kind,
                    arch=arch,
                    head_dim=head_dim,
                    quant=quant.for_kernel(),
                    q_tile=columns,
                    copy=copy,
                    num_warps=num_warps,
                    warps_per_block=warps_per_block,
                    stages=stages,
                )
                limit = MAX_REGISTERS[num_warps]
                if columns > MMA_COLUMNS:
                    limit = min(limit, MAX_REGISTERS_OF_TWO_TILES[copy])
                if _registers(config) <= limit and _fits(config):
                    return config
        if kind == "step":
            raise UnsupportedConfig(
                f"head_dim={head_dim}: kind=step has no kernel for {quant.for_kernel().name()} on {arch}, whose shared "
                "memory or registers do not suffice; append and decode have"
            )
        config.validate()
        return config


def column_tile(columns: int) -> int:
    """The smallest tile of a kernel with mma.sync that holds so many query columns."""
    return FEW_COLUMNS if columns <= FEW_COLUMNS else -(-columns // MMA_COLUMNS) * MMA_COLUMNS


def _wgmma_config(arch: str, head_dim: int, quant: QuantSpec, columns: int) -> KernelConfig | None:
    """The kernel with wgmma for ``columns`` query columns; None if there is none."""
    tilings = WGMMA_TILINGS.get(head_dim, {}) if arch == "sm90a" else {}
    enough = min((q_tile for q_tile in tilings if q_tile >= columns), default=max(tilings, default=0))
    for q_tile in sorted((q_tile for q_tile in tilings if q_tile <= enough), reverse=True):
        for num_warps, warps_per_block in tilings[q_tile]:
            needs_registers = quant.k_axis == "token" or 8 in (quant.k_bits, quant.v_bits)
            if needs_registers and (num_warps, q_tile, head_dim) == (12, 32, 128):
                continue  # there a thread has none left
            groups = num_warps // warps_per_block
            for stages in WGMMA_STAGES:
                config = KernelConfig(
                    arch=arch, head_dim=head_dim, quant=quant, q_tile=q_tile, mma="wgmma", num_warps=num_warps,
                    warps_per_block=warps_per_block, stages=stages,
                )  # fmt: skip
                loads_ahead = stages % groups == 0 and stages > groups  # a block is loaded meanwhile
                if q_tile >= MIN_TILE_COLUMNS:
                    loads_ahead = stages >= MIN_STAGES
                if loads_ahead and _fits(config):
                    return config
    return None


def _registers(config: KernelConfig) -> int:
    """Registers of a lane for its part of the inner loop's arrays: queries, scores, O, sums of V's zeros, bounds."""
    quant, head_dim = config.quant, config.head_dim
    tiles = -(-config.q_tile // MMA_COLUMNS)
    queries = head_dim // 8
    if quant.k_axis == "token":
        queries += 10  # scores of one channel group
    else:
        queries += head_dim // 8  # scaled
        if quant.k_group < BLOCK_TOKENS // config.warps_per_block:
            queries += head_dim // 16  # the next group's
        if quant.k_bits == 2:
            queries += 4 * tiles  # two token tiles to a word
    scores = 32 // config.warps_per_block // (MMA_COLUMNS * tiles // config.q_tile)
    out = head_dim // 4
    zeros = 6 * head_dim // quant.v_group  # with their parameters
    bounds = 10  # and maximum, sum, power of a lane's columns
    return tiles * (queries + scores + out + zeros + bounds)


def _fits(config: KernelConfig) -> bool:
    try:
        config.validate()
    except UnsupportedConfig:
        return False
    return True


def device_arch(device: int) -> str:
    """The architecture whose kernels run on a GPU; raises CudaError without one, UnsupportedConfig if too old."""
    info = _device_info(device)
    if not info["arch"]:
        raise UnsupportedConfig(
            f"device {device} ({info['name']}) has compute capability {info['major']}.{info['minor']}: "
            "kernels need 8.0 or newer, of major 8, 9, 10 or 12"
        )
    return info["arch"]
