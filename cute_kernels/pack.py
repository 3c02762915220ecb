"""Kernel packs: one file with the compiled kernels of an architecture, ``bitdecoding-<arch>.bdpack``.

    BDPACK 1                        magic and version of the container
    <bytes of the index>            decimal
    #format_version=1               index: header lines "#key=value" ...
    name=... entry=... threads=128 smem=86400 regs=168 ctas_per_sm=2 offset=0 size=41224
    <cubins>                        each at a multiple of 16 bytes; offsets count from the end of the index

The library reads packs itself (runtime/pack.cpp); the reader here serves tools and tests.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from .errors import CacheFormatError, InvalidArgument
from .layouts import FORMAT_VERSION

MAGIC = b"BDPACK 1\n"
IMAGE_ALIGN = 16
DSL = "nvidia-cutlass-dsl"  # the distribution that compiles kernels


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel and what its launch needs.

    name: KernelConfig.name(). entry: symbol in the cubin. threads: per block. smem: bytes of dynamic shared memory.
    regs: per thread. ctas_per_sm: the grid is this times the number of SMs.
    """

    name: str
    entry: str
    cubin: bytes
    threads: int
    smem: int
    regs: int
    ctas_per_sm: int


_TEXT_FIELDS = ("name", "entry")
_NUMBER_FIELDS = ("threads", "smem", "regs", "ctas_per_sm")


def cache_dir() -> Path:
    """Where kernels compiled at first use are kept: $XDG_CACHE_HOME/bitdecoding or ~/.cache/bitdecoding."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitdecoding"


def dsl_version() -> str | None:
    """Of the installed compiler; None without one."""
    try:
        return metadata.version(DSL)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=None)
def source_digest(version: str = "") -> str:
    """Changes with the sources of the kernels, and with ``version``, such as that of their compiler."""
    digest = hashlib.sha256(version.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def write_pack(path: str | os.PathLike, kernels: Iterable[CompiledKernel], header: Mapping[str, object]) -> None:
    """Write a pack; the file appears whole or not at all. ``header``: facts such as arch and compiler version.

    Raises InvalidArgument if two kernels have the same cubin: one of them would be the other's code.
    """
    lines = [f"#{key}={value}" for key, value in {"format_version": FORMAT_VERSION, **header}.items()]
    images = bytearray()
    owners: dict[bytes, str] = {}
    for kernel in kernels:
        if (owner := owners.setdefault(kernel.cubin, kernel.name)) != kernel.name:
            raise InvalidArgument(f"cubin of {kernel.name}: is that of {owner}")
        images.extend(bytes(-len(images) % IMAGE_ALIGN))
        fields = {field: getattr(kernel, field) for field in _TEXT_FIELDS + _NUMBER_FIELDS}
        fields |= {"offset": len(images), "size": len(kernel.cubin)}
        for field in _TEXT_FIELDS:
            if not fields[field] or fields[field].split() != [fields[field]]:
                raise InvalidArgument(f"{field}={fields[field]!r}: must be one word")
        lines.append(" ".join(f"{key}={value}" for key, value in fields.items()))
        images.extend(kernel.cubin)
    index = "".join(line + "\n" for line in lines).encode()

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(b"".join((MAGIC, f"{len(index)}\n".encode(), index, images)))
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_pack(path: str | os.PathLike) -> tuple[dict[str, str], list[CompiledKernel]]:
    """The header and the kernels of a pack; raises CacheFormatError if it is damaged."""
    data = Path(path).read_bytes()
    try:
        if not data.startswith(MAGIC):
            raise ValueError("it does not begin with 'BDPACK 1'")
        length_end = data.index(b"\n", len(MAGIC))
        index_size = int(data[len(MAGIC) : length_end])
        index, images = data[length_end + 1 :][:index_size], data[length_end + 1 + index_size :]
        if len(index) != index_size:
            raise ValueError("the index is cut off")
        header: dict[str, str] = {}
        kernels = []
        for line in index.decode().splitlines():
            if line.startswith("#"):
                key, value = line[1:].split("=", 1)
                header[key] = value
                continue
            fields = dict(pair.split("=", 1) for pair in line.split())
            offset, size = int(fields["offset"]), int(fields["size"])
            if offset < 0 or size < 0 or offset + size > len(images):
                raise ValueError(f"the cubin of {fields['name']} lies beyond the end")
            texts = {field: fields[field] for field in _TEXT_FIELDS}
            numbers = {field: int(fields[field]) for field in _NUMBER_FIELDS}
            kernels.append(CompiledKernel(cubin=images[offset : offset + size], **texts, **numbers))
    except (ValueError, KeyError) as error:
        raise CacheFormatError(f"{path}: not a usable kernel pack: {error}") from None
    return header, kernels


def describe_pack(path: str | os.PathLike) -> dict[str, object]:
    """What a pack holds and what it was made of; equal for equal sources and compilers."""
    header, kernels = read_pack(path)
    data = Path(path).read_bytes()
    return {
        **header,
        "source_digest": source_digest(),
        "pack": {"name": Path(path).name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "kernels": [
            {field: getattr(kernel, field) for field in _TEXT_FIELDS + _NUMBER_FIELDS}
            | {"bytes": len(kernel.cubin), "sha256": hashlib.sha256(kernel.cubin).hexdigest()}
            for kernel in kernels
        ],
    }
