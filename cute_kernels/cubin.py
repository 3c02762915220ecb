"""What a cubin says about its kernels: registers, stack, shared memory, threads. Reads the ELF notes, nothing else.

ptxas writes ``.nv.info`` (facts per function, by symbol) and ``.nv.info.<kernel>``; an entry is one byte of format,
one of attribute and a 16-bit value, which for format 4 is the length of the data that follow. A spilled register is
stack (PTX does not show it): ``frame_bytes`` 0 means no spills and no local arrays. The reverse does not hold: ptxas
may reserve a few bytes that no instruction touches; the machine code then has neither STL nor LDL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import InvalidArgument

SIZED = 4  # entry format: value is the length of the data
REGISTERS, FRAME_SIZE, STACK_SIZE = 0x2F, 0x11, 0x12  # in .nv.info: symbol index, value
REQUIRED_THREADS, MAX_THREADS = 0x10, 0x05  # in .nv.info.<kernel>: x, y, z
INFO, INFO_OF, SHARED_OF, TEXT_OF = ".nv.info", ".nv.info.", ".nv.shared.", ".text."


@dataclass(frozen=True)
class Resources:
    """Of one kernel. Bytes, per thread where not said otherwise.

    registers: 32-bit. frame_bytes: own stack, that is spills and local arrays. stack_bytes: with called functions.
    static_smem: per CTA, with the 1 KB that sm_90 and later reserve. max_threads: per CTA, 0 if the kernel sets none.
    code_bytes: machine code.
    """

    registers: int
    frame_bytes: int
    stack_bytes: int
    static_smem: int
    max_threads: int
    code_bytes: int


def read_cubin(cubin: bytes) -> dict[str, Resources]:
    """Resources of every kernel by its symbol; raises InvalidArgument for anything that is not a whole cubin."""
    try:
        return _read(memoryview(bytes(cubin)))
    except (struct.error, IndexError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"cubin of {len(cubin)} bytes: damaged ({error})") from None


def _read(data: memoryview) -> dict[str, Resources]:
    if bytes(data[:5]) != b"\x7fELF\x02":
        raise InvalidArgument(f"cubin: starts with {bytes(data[:5])!r}, not with a 64-bit ELF header")
    segments, table = struct.unpack_from("<QQ", data, 0x20)
    segment_size, num_segments, entry_size, count, names_at = struct.unpack_from("<HHHHH", data, 0x36)
    if segments + segment_size * num_segments > len(data):
        raise InvalidArgument(f"cubin of {len(data)} bytes: cut short")
    headers = [struct.unpack_from("<IIQQQQII", data, table + i * entry_size) for i in range(count)]

    def text(at: int) -> str:
        end = at
        while data[end]:
            end += 1
        return bytes(data[at:end]).decode()

    sizes, contents = {}, {}
    for name_at, kind, _, _, offset, size, link, _ in headers:
        name = text(headers[names_at][4] + name_at)
        sizes[name] = size
        if kind != 8:  # NOBITS: nothing in the file
            if offset + size > len(data):
                raise InvalidArgument(f"cubin: section {name} ends at byte {offset + size} of {len(data)}")
            contents[name] = (data[offset : offset + size], link)

    symbols, strings = contents[".symtab"]
    strings_at = headers[strings][4]
    kernels, facts = {}, {}
    info, _ = contents[INFO]
    for attribute, value in _entries(info):
        if attribute in (REGISTERS, FRAME_SIZE, STACK_SIZE):
            symbol, number = struct.unpack("<II", value)
            (name_at,) = struct.unpack_from("<I", symbols, 24 * symbol)
            facts[text(strings_at + name_at), attribute] = number
    for section, (content, _) in contents.items():
        if section.startswith(INFO_OF):
            name = section[len(INFO_OF) :]
            threads = 0
            for attribute, value in _entries(content):
                if attribute in (REQUIRED_THREADS, MAX_THREADS):
                    x, y, z = struct.unpack("<III", value)
                    threads = x * y * z
            kernels[name] = Resources(
                facts[name, REGISTERS],
                facts[name, FRAME_SIZE],
                facts.get((name, STACK_SIZE), 0),
                sizes.get(SHARED_OF + name, 0),
                threads,
                sizes[TEXT_OF + name],
            )
    if not kernels:
        raise InvalidArgument("cubin: no kernel in it")
    return kernels


def _entries(info: memoryview) -> Iterator[tuple[int, bytes]]:
    """(attribute, data) of the entries that have data."""
    at = 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == SIZED:
            if at + value > len(info):
                raise InvalidArgument(f"cubin: an attribute of {value} bytes at the end of {INFO}")
            yield attribute, bytes(info[at : at + value])
            at += value
