"""Decode, append and quantize on CUDA tensors: finds the kernel for a problem, keeps workspaces, launches.

The path of a repeated call is short: one dictionary look-up, one allocation for a result, one call into the library,
which checks the tensors and launches on torch's current stream. Nothing waits for the device. Values on the device
(lengths, table) are trusted, not checked. All functions raise InvalidArgument, UnsupportedConfig, KernelNotFound or
CudaError before anything is launched.
"""

from __future__ import annotations

import contextlib
import warnings
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from . import tuned
from .cute_kernels import native
from .cute_kernels.checks import check_one_of, check_type
from .cute_kernels.config import FEW_COLUMNS, MMA_COLUMNS, KernelConfig, QuantSpec, device_arch
from .cute_kernels.errors import BitDecodingError, CacheFormatError, InvalidArgument, KernelNotFound
from .cute_kernels.layouts import HEAD_DIMS
from .cute_kernels.pack import DSL, CompiledKernel, cache_dir, dsl_version, source_digest, write_pack

MAX_COLUMNS_PER_SM = 128  # q_tile x ctas_per_sm of any configuration
MAX_PLANS = 4096  # a bound for callers that make a new QuantSpec for every call

_decode = native.function("decode")
_append = native.function("append")
_step = native.function("step")
_quantize = native.function("quantize")
_merge = native.function("merge")
_device_info = native.function("device_info")
_find_kernel = native.function("find_kernel")
_add_kernel = native.function("add_kernel")
_load_pack = native.function("load_pack")
_workspace_bytes = native.function("workspace_bytes")
_capture_id = native.function("capture_id")
_counter_bytes: int = native.function("counter_bytes")()


class KernelWarning(UserWarning):
    """A kernel is missing, and a slower one is used."""


class _Plan(NamedTuple):
    handle: int
    workspace_bytes: int
    softmax_scale: float
    keys: tuple  # the objects whose id() is part of the plan's key: kept alive so that the ids stay theirs


class _AppendPlan(NamedTuple):
    handle: int
    options: tuple[float, float, bool, bool]  # see write_options
    spec: QuantSpec  # its id() is part of the plan's key


_plans: dict[tuple, _Plan] = {}
_append_plans: dict[tuple, _AppendPlan] = {}
_workspaces: dict[tuple[int, int], Tensor] = {}  # by device and stream
_capture_workspace: tuple[tuple[int, int, int], Tensor] | None = None  # of the latest (device, stream, capture)
_lock = Lock()


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    spec: QuantSpec,
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
    """:func:`bitdecoding.decode` on CUDA tensors."""
    if not isinstance(pages, Tensor):
        raise InvalidArgument(f"pages is a {type(pages).__name__}: allowed is a torch.Tensor")
    device = q.get_device()
    key = (q.shape, device, pages.shape, id(spec), id(config), "decode")
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(key, q, pages, spec, config)
    if workspace is None:
        workspace = _workspace(device, plan.workspace_bytes)
    if out is None:
        out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    _decode(
        plan.handle, q, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k, sink_v, sink_logits, out,
        lse, workspace, native.NO_WINDOW if window is None else window,
        plan.softmax_scale if softmax_scale is None else softmax_scale, 0.0 if softcap is None else softcap,
        spec.rotate_k, spec.rotate_v,
    )  # fmt: skip
    return out if lse is None else (out, lse)


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
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    lengths: Tensor | None = None,
    recent: int = 0,
    status: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """:func:`bitdecoding.append` on CUDA tensors."""
    device = k_new.get_device()
    plan = _append_plans.get((device, k_new.shape[-1], id(spec))) or _append_plan(device, k_new.shape[-1], spec)
    if workspace is None:
        workspace = _workspace(device, _counter_bytes)
    _append(
        plan.handle, *_alike(k_new, v_new), pages, block_table, seqlens, packed_lens, tail_k, tail_v, workspace, sink_k,
        sink_v, lengths, status, recent, *plan.options,
    )  # fmt: skip


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
    spec: QuantSpec,
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
    """:func:`bitdecoding.step` on CUDA tensors."""
    if not isinstance(pages, Tensor):
        raise InvalidArgument(f"pages is a {type(pages).__name__}: allowed is a torch.Tensor")
    device = q.get_device()
    key = (q.shape, device, pages.shape, id(spec), id(config), "step")
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(key, q, pages, spec, config)
    if workspace is None:
        workspace = _workspace(device, plan.workspace_bytes)
    if out is None:
        out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    _step(
        plan.handle, q, *_alike(k_new, v_new), pages, block_table, seqlens, packed_lens, tail_k, tail_v, workspace,
        sink_k, sink_v, sink_logits, status, out, lse, recent, native.NO_WINDOW if window is None else window,
        plan.softmax_scale if softmax_scale is None else softmax_scale, 0.0 if softcap is None else softcap,
        *write_options(spec),
    )  # fmt: skip
    return out if lse is None else (out, lse)


def quantize(
    k: Tensor,
    v: Tensor,
    spec: QuantSpec,
    pages: Tensor,
    block_table: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int,
) -> None:
    """:func:`bitdecoding.quantize` on CUDA tensors, into given pages."""
    device = k.get_device()
    plan = _append_plans.get((device, k.shape[-1], id(spec))) or _append_plan(device, k.shape[-1], spec)
    _quantize(plan.handle, *_alike(k, v), pages, block_table, cu_seqlens, max_seqlen, *plan.options)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bitdecoding.merge` on CUDA tensors of 16 bit with a head_dim of :data:`HEAD_DIMS`, parts stacked."""
    device = outs.get_device()
    outs, lses = outs.contiguous(), lses.contiguous()
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    if out.numel():
        config = KernelConfig(kind="merge", arch=device_arch(device), head_dim=outs.shape[-1])
        _merge(kernel_handle(config), outs, lses, out, lse)
    return out, lse


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with the same strides, as the kernel wants them; copies where they differ."""
    for name, x in (("k_new", k), ("v_new", v)):
        if not isinstance(x, Tensor):
            raise InvalidArgument(f"{name} is a {type(x).__name__}: allowed is a torch.Tensor")
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


# ---------------------------------------------------------------------------------------------- workspaces


def _workspace(device: int, size: int) -> Tensor:
    """The workspace of the current stream, or of the graph that it captures; at least ``size`` bytes."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    if torch.cuda.is_current_stream_capturing():
        return _workspace_for_capture(device, stream, size)
    found = _workspaces.get((device, stream))
    if found is None or found.numel() < size:
        found = _workspaces[device, stream] = _new_workspace(device, size)
    return found


@torch.inference_mode(False)  # it is used, that is changed, within that mode and outside
def _new_workspace(device: int, size: int) -> Tensor:
    """A workspace of zeros, which is how kernels leave it."""
    return torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))


@torch.compiler.assume_constant_result
def largest_workspace(device: int, head_dim: int) -> int:
    """Bytes of workspace that suffice for every kernel at a head_dim."""
    columns = 2 * _device_info(device)["num_sms"] * MAX_COLUMNS_PER_SM  # two partial results per CTA, see runtime.hpp
    return _counter_bytes + columns * (head_dim + 2) * torch.float32.itemsize


def new_workspace(device: torch.device, head_dim: int) -> Tensor:
    """A workspace for every kernel at a head_dim."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _new_workspace(index, largest_workspace(index, head_dim))


def _workspace_for_capture(device: int, stream: int, size: int) -> Tensor:
    """The workspace of the graph that is being captured: its own, since replays may run beside other work.

    It comes from the graph's memory pool and its zeroing is captured, once per graph and stream.
    """
    global _capture_workspace
    key = (device, stream, _capture_id(device, stream))
    if _capture_workspace is None or _capture_workspace[0] != key or _capture_workspace[1].numel() < size:
        _capture_workspace = (key, _new_workspace(device, size))
    return _capture_workspace[1]


# ---------------------------------------------------------------------------------------------- kernels


def _plan(key: tuple, q: Tensor, pages: Tensor, spec: QuantSpec, config: KernelConfig | None) -> _Plan:
    """Find or compile the kernel for a problem, and remember the answer."""
    if q.dim() != 4:
        raise InvalidArgument(f"q: shape {list(q.shape)}: must be [batch, q_len, num_q_heads, head_dim]")
    if pages.dim() != 3:
        raise InvalidArgument(f"pages: shape {list(pages.shape)}: must be [num_pages, num_kv_heads, block_bytes]")
    device = q.get_device()
    _, q_len, num_q_heads, head_dim = q.shape
    check_one_of("head_dim", head_dim, HEAD_DIMS)
    check_type("config", config, KernelConfig, None)
    kind = key[-1]
    if config is None and kind == "step":
        config = KernelConfig.for_problem(
            head_dim=head_dim, quant=spec, num_q_heads=num_q_heads, num_kv_heads=pages.shape[1], q_len=q_len,
            arch=device_arch(device), kind=kind,
        )  # fmt: skip
        handle = kernel_handle(config)
    elif config is None:
        config = choose(device, head_dim, spec, num_q_heads, pages.shape[1], q_len)
        handle = _default_handle(config)
    elif config.kind != kind:
        raise InvalidArgument(f"config.kind={config.kind}: allowed is {kind}")
    elif config.quant.for_kernel() != spec.for_kernel():
        raise InvalidArgument(f"config.quant={config.quant.name()}: differs from spec={spec.name()}")
    else:
        handle = kernel_handle(config)
    plan = _Plan(handle, _workspace_bytes(handle, device), head_dim**-0.5, (spec, key, config))
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _append_plan(device: int, head_dim: int, spec: QuantSpec) -> _AppendPlan:
    """Find or compile the kernel that packs blocks of a format, and remember the answer."""
    config = KernelConfig(kind="append", arch=device_arch(device), head_dim=head_dim, quant=spec.for_kernel())
    plan = _AppendPlan(kernel_handle(config), write_options(spec), spec)
    if len(_append_plans) >= MAX_PLANS:
        _append_plans.clear()
    _append_plans[device, head_dim, id(spec)] = plan
    return plan


def write_options(spec: QuantSpec) -> tuple[float, float, bool, bool]:
    """k_clip (1: min/max, 0: searched), v_clip, rotate_k, rotate_v."""
    k_clip, v_clip = ({"minmax": 1.0, "mse": 0.0}.get(clip, clip) for clip in (spec.k_clip, spec.v_clip))
    return k_clip, v_clip, spec.rotate_k, spec.rotate_v


def choose(
    device: int, head_dim: int, spec: QuantSpec, num_q_heads: int, num_kv_heads: int, q_len: int = 1
) -> KernelConfig:
    """The kernel for a problem: the one that `bitdecoding tune` found fastest on this device, else the default.

    Warns (TuningWarning) and takes the default where the table of tuned kernels cannot be used.
    """
    default = KernelConfig.for_problem(
        head_dim=head_dim, quant=spec, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, q_len=q_len,
        arch=device_arch(device),
    )  # fmt: skip
    winner = tuned.lookup(_device_info(device)["name"], default, tuned.query_columns(num_q_heads, num_kv_heads, q_len))
    if winner is None:
        return default
    try:
        kernel_handle(winner)
    except BitDecodingError as error:
        warnings.warn(f"the default kernel is used instead of a tuned one: {error}", tuned.TuningWarning, stacklevel=2)
        return default
    return winner


def kernel_handle(config: KernelConfig) -> int:
    """The handle of a kernel: from the packs that were built or tuned, from the disk cache, or compiled now."""
    name = config.name()
    with _lock:
        load_built_pack(config.arch)
        if _find_kernel(name) < 0:
            _load_tuned_pack(tuned.pack_path())
        handle = _find_kernel(name)
        return handle if handle >= 0 else _compile(config, name)


def step_columns(device: int, head_dim: int, spec: QuantSpec) -> int:
    """The most query columns of a KV head for which a kernel does a whole step, or can be compiled; 0: none."""
    arch, most = device_arch(device), 0
    load_built_pack(arch)
    for columns in (FEW_COLUMNS, MMA_COLUMNS):
        try:
            config = KernelConfig.for_problem(
                head_dim=head_dim, quant=spec, num_q_heads=columns, num_kv_heads=1, arch=arch, kind="step"
            )
        except BitDecodingError:
            break
        if _find_kernel(config.name()) < 0 and dsl_version() is None:
            break
        most = columns
    return most


def _default_handle(config: KernelConfig) -> int:
    """The handle of a problem's default kernel; where that neither is nor can be compiled, of the one for as many query
    columns as possible, with a KernelWarning.
    """
    try:
        return kernel_handle(config)
    except KernelNotFound as error:
        columns = config.q_tile // 2
        while columns >= FEW_COLUMNS:
            smaller = KernelConfig.for_problem(
                head_dim=config.head_dim, quant=config.quant, num_q_heads=columns, num_kv_heads=1, arch=config.arch
            )
            if (handle := _find_kernel(smaller.name())) >= 0:
                warnings.warn(
                    f"{error}; until then {smaller.name()} is used, which reads the cache once per {smaller.q_tile} "
                    "query columns",
                    KernelWarning,
                    stacklevel=5,  # the line that calls bd.decode
                )
                return handle
            columns //= 2
        raise


@lru_cache(maxsize=None)
def load_built_pack(arch: str) -> None:
    """Register the kernels that were built for an architecture."""
    path = native.PACKS_DIR / f"bitdecoding-{arch}.bdpack"
    if path.is_file():
        _load_pack(str(path))


@lru_cache(maxsize=None)
def _load_tuned_pack(path: Path | None) -> None:
    if path is not None and path.is_file():
        try:
            _load_pack(str(path))
        except (InvalidArgument, CacheFormatError) as error:
            warnings.warn(str(error), tuned.TuningWarning, stacklevel=2)


def install_command(arch: str) -> str:
    """The command that installs the library with the kernels of an architecture."""
    return f"BITDECODING_ARCH={arch} pip install ."


def _why_missing(arch: str) -> str:
    built = [path.stem.removeprefix("bitdecoding-") for path in sorted(native.PACKS_DIR.glob("*.bdpack"))]
    if arch in built:
        return f"the kernels for {arch} of this installation lack one"
    has = f"those for {', '.join(built)}" if built else "none"
    return f"the GPU needs kernels for {arch}, this installation has {has}"


def _compile(config: KernelConfig, name: str) -> int:
    version = dsl_version()
    if version is None:
        raise KernelNotFound(
            f"{_why_missing(config.arch)}, and {DSL} is not installed to compile {name}; "
            f"install with `{install_command(config.arch)}`, or `pip install '.[jit]'` to compile at first use"
        )
    from .cute_kernels.compile import compile_kernel

    path = cache_dir() / f"{name}-{source_digest(version)}.bdpack"
    try:
        _load_pack(str(path))
    except (InvalidArgument, CacheFormatError):  # not there yet, or damaged
        kernel: CompiledKernel = compile_kernel(config)
        _add_kernel(
            kernel.name, kernel.entry, kernel.cubin, kernel.threads, kernel.smem, kernel.regs, kernel.ctas_per_sm
        )
        with contextlib.suppress(OSError):  # without a place to keep it, the next process compiles it again
            write_pack(path, [kernel], {"arch": config.arch, "dsl": version})
    return _find_kernel(name)
