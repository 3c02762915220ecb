"""cubin.py reads what ptxas noted: checked on kernels made for it, and against the disassembler."""

import struct

import pytest
from bitdecoding.cute_kernels.cubin import read_cubin
from bitdecoding.cute_kernels.errors import InvalidArgument

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from bitdecoding.cute_kernels import ptx
from cutlass import Float32, Int32, Int64, Uint8, cute, range_constexpr
from dsl import compile_kernel, opcodes, sass

ARCHS = ["sm_80", "sm_89", "sm_90a", "sm_100f", "sm_120f"]
THREADS = 1024  # at most 64 registers each


@cute.kernel
def small(data: cute.Pointer, n: Int32):
    thread = cute.arch.thread_idx()[0]
    ptx.store_global(data.toint() + Int64(thread) * 4, [thread + n])


@cute.kernel
def spilling(data: cute.Pointer, n: Int32):
    """160 values alive at once, in a kernel of 1024 threads."""
    at = data.toint() + Int64(cute.arch.thread_idx()[0]) * 4
    values = [ptx.from_bits(ptx.load_global(at, offset=4096 * i, cache="cg")[0]) for i in range(160)]
    for _ in range(n):
        values = [ptx.exp2(a * b) for a, b in zip(values, [*values[7:], *values[:7]], strict=True)]
    for i in range_constexpr(160):
        ptx.store_global(at, [values[i]], 4096 * i)


@cute.kernel
def tensor_cores(data: cute.Pointer, n: Int32):
    """A bulk copy, vector loads from shared memory, an MMA and a transpose."""
    thread = cute.arch.thread_idx()[0]
    smem = cute.arch.get_dyn_smem(Uint8, alignment=128).toint()
    if thread == 0:
        ptx.mbarrier_init(smem + 1024, 1)
        ptx.fence_mbarrier_init()
    cute.arch.sync_threads()
    if thread == 0:
        ptx.mbarrier_expect(smem + 1024, 512)
        ptx.bulk_copy(smem, data.toint(), 512, smem + 1024)
    ptx.mbarrier_wait(smem + 1024, Int32(0), "try_wait")
    a = ptx.load_shared(smem + thread * 16, 0, 4)
    c = ptx.mma([Float32(0.0)] * 4, [x & 0x000F000F for x in a], [thread, n])
    ptx.store_global(data.toint() + Int64(thread) * 4, [ptx.transpose8x8(ptx.to_half2(c[0], c[1]))])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_small_kernel(arch):
    ((name, found),) = read_cubin(compile_kernel(small, 96, arch=arch).cubin).items()
    assert "small" in name
    assert 0 < found.registers <= 32
    assert (found.frame_bytes, found.stack_bytes) == (0, 0)
    assert found.max_threads == 96
    assert found.static_smem <= 1024
    assert found.code_bytes % 16 == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120f"])
def test_spilled_registers_show(arch):
    """The PTX of such a kernel shows no local memory."""
    made = compile_kernel(spilling, THREADS, arch=arch)
    (found,) = read_cubin(made.cubin).values()
    assert ".local" not in made.ptx
    assert found.registers == 64
    assert found.frame_bytes >= 4 * (160 - 64)
    assert found.stack_bytes >= found.frame_bytes
    assert found.max_threads == THREADS


def test_the_machine_code_has_what_the_source_asks_for():
    """The numbers of the notes agree with the disassembly, which also shows the instructions' forms."""
    made = compile_kernel(tensor_cores, 32, smem=1152)
    ops = sass(made.cubin)
    (found,) = read_cubin(made.cubin).values()
    assert len(ops) == found.code_bytes // 16
    assert sum(op.startswith("HMMA.16816.F32") for op in ops) == 1
    for wanted in ("UBLKCP", "LDS.128", "MOVM", "SYNCS"):
        assert any(op.startswith(wanted) for op in ops), wanted
    assert not any(op.startswith(("STL", "LDL")) for op in ops)
    spilled = sass(compile_kernel(spilling, THREADS).cubin)
    assert any(op.startswith("STL") for op in spilled)


def test_opcodes_of_a_listing():
    listing = """
        .text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   EXIT ;
        .L_x_1:
    """
    assert opcodes(listing) == ["LDC", "BRA", "EXIT"]


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cubin():
    return compile_kernel(small, 96).cubin


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"not an ELF file at all", b"\x7fELF\x01" + bytes(200)])
def test_no_cubin(data):
    with pytest.raises(InvalidArgument, match="cubin"):
        read_cubin(data)


def test_every_truncation_is_refused(cubin):
    for length in range(5, len(cubin) - 1, 97):
        with pytest.raises(InvalidArgument, match="cubin"):
            read_cubin(cubin[:length])


def test_damage_never_escapes_as_another_error(cubin):
    """Each header field and each note overwritten: a typed error or a result, nothing else."""
    for at in [*range(0, 64, 2), *range(64, len(cubin) - 8, 61)]:
        for value in (0, 0x7FFFFFFF, 0xFFFFFFFFFFFFFFFF):
            damaged = bytearray(cubin)
            damaged[at : at + 8] = struct.pack("<Q", value)
            try:
                read_cubin(bytes(damaged))
            except InvalidArgument:
                pass
