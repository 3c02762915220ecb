"""The table of tuned kernels: which one `bitdecoding tune` found fastest, per device and problem.

It is the JSON file $BITDECODING_TUNED (empty: no table), or tuned.json among the kernels compiled at first use. Kernels
that tune had to compile lie beside it in a pack. A table holds for the kernel sources that it was measured with;
another one, a damaged one or an entry that does not fit gives a TuningWarning and the default kernel, never another
problem's kernel.

A problem is a head_dim, a cache format and a number of query columns (query heads per KV head times new tokens).
Lengths are no part of it: the device reads them, and they may change between replays of a CUDA graph.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .cute_kernels.checks import parse_json
from .cute_kernels.config import KernelConfig, QuantSpec, column_tile
from .cute_kernels.errors import BitDecodingError, CacheFormatError, InvalidArgument
from .cute_kernels.pack import cache_dir, source_digest

VERSION = 1  # of the table
VARIABLE = "BITDECODING_TUNED"


class TuningWarning(UserWarning):
    """The table of tuned kernels, or a part of it, cannot be used; the default kernels are."""


class Entry(NamedTuple):
    """What tune found for a problem: names of kernels, and microseconds per call for each shape measured."""

    kernel: str
    us: dict[str, float]
    default: str
    default_us: dict[str, float]


Table = dict[str, dict[str, Entry]]  # device name -> problem -> entry


def table_path() -> Path | None:
    """Where the table is, or would be; None: there is to be none."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    try:
        return cache_dir() / "tuned.json"
    except RuntimeError:  # the user has no home
        return None


def pack_of(table: Path) -> Path:
    """Where the kernels are that were compiled for a table from these sources."""
    return table.with_name(f"{table.stem}-{source_digest()}.bdpack")


def pack_path() -> Path | None:
    """The same of the table in use."""
    table = table_path()
    return None if table is None else pack_of(table)


def query_columns(num_q_heads: int, num_kv_heads: int, q_len: int = 1) -> int:
    """Query columns of a problem, in whole column tiles."""
    return column_tile(num_q_heads // num_kv_heads * q_len)


def problem(head_dim: int, quant: QuantSpec, columns: int) -> str:
    """The key of a problem, such as d128_k4c128_v4g128_q8."""
    return f"d{head_dim}_{quant.name()}_q{columns}"


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Table:
    """The table in a file; empty where there is none. Raises CacheFormatError for anything that is not a table of these
    kernel sources."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise CacheFormatError(f"{path}: cannot be read: {error}") from None
    try:
        values = parse_json("table", text)
    except InvalidArgument as error:
        raise CacheFormatError(f"{path}: {error}") from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise CacheFormatError(f"{path}: not a table of version {VERSION}")
    if values.get("sources") != source_digest():
        raise CacheFormatError(f"{path}: tuned with other kernels than those installed; run `bitdecoding tune` again")
    try:
        return {
            device: {key: _entry(entry) for key, entry in entries.items()}
            for device, entries in values["devices"].items()
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CacheFormatError(f"{path}: damaged: {type(error).__name__}: {error}") from None


def _entry(values: dict[str, Any]) -> Entry:
    entry = Entry(**values)
    times = [*entry.us.values(), *entry.default_us.values()]
    if not all(isinstance(name, str) for name in (entry.kernel, entry.default)):
        raise TypeError("a kernel's name is text")
    if not all(isinstance(us, float | int) for us in times):
        raise TypeError("a time is a number")
    return entry


@lru_cache(maxsize=None)
def _known(path: Path | None) -> Table:
    """The table, read once per process."""
    try:
        return {} if path is None else read(path)
    except CacheFormatError as error:
        _warn(str(error))
        return {}


def lookup(device: str, default: KernelConfig, columns: int) -> KernelConfig | None:
    """The kernel that won on a device at the problem that ``default`` would solve; None if no table says so."""
    path = table_path()
    entry = _known(path).get(device, {}).get(problem(default.head_dim, default.quant, columns))
    if entry is None:
        return None
    try:
        config = KernelConfig.from_name(entry.kernel)
    except BitDecodingError as error:
        _warn(f"{path}: {error}")
        return None
    if any(getattr(config, name) != getattr(default, name) for name in ("kind", "arch", "head_dim", "quant")):
        _warn(f"{path}: {entry.kernel}: is for another problem than {default.name()}")
        return None
    return config


def _warn(message: str) -> None:
    warnings.warn(f"{message}; default kernels are used", TuningWarning, stacklevel=3)


def facts() -> dict[str, Any]:
    """For `bitdecoding info`: where the table is, and how many problems it holds."""
    path = table_path()
    return {"path": None if path is None else str(path), "problems": sum(map(len, _known(path).values()))}


# ---------------------------------------------------------------------------------------------- writing


def store(path: Path, device: str, found: dict[str, Entry]) -> None:
    """Add what was found for a device's problems to a table; other entries stay, as long as they count.

    Raises InvalidArgument if the file cannot be written.
    """
    try:
        table = read(path)
    except CacheFormatError as error:
        warnings.warn(f"{error}; a new table takes its place", TuningWarning, stacklevel=2)
        table = {}
    table[device] = table.get(device, {}) | found
    devices = {name: {key: entry._asdict() for key, entry in sorted(has.items())} for name, has in table.items()}
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(
            json.dumps({"version": VERSION, "sources": source_digest(), "devices": devices}, indent=1) + "\n"
        )
        os.replace(scratch, path)  # whole or not at all
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise InvalidArgument(f"{path}: cannot be written: {error.strerror}") from None
    _known.cache_clear()
