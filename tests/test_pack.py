"""Kernel packs: what is written is read, by Python and by the library; damaged and hostile files give errors."""

import pytest
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import CompiledKernel, read_pack, write_pack

from bitdecoding import CacheFormatError, InvalidArgument, KernelConfig, KernelNotFound

load_pack = native.function("load_pack")
find_kernel = native.function("find_kernel")
list_kernels = native.function("list_kernels")


def kernel(stages, **fields):
    """A kernel that no other test registers under its name, as long as ``stages`` is the test's own."""
    values = {"entry": "entry", "cubin": b"\x7fELF" + bytes(13), "threads": 160, "smem": 4096, "regs": 128}
    name = KernelConfig(q_tile=24, stages=stages).name()
    return CompiledKernel(**({"name": name, "ctas_per_sm": 1} | values | fields))


def test_round_trip(tmp_path):
    path = tmp_path / "a.bdpack"
    kernels = [kernel(1, cubin=b"\x00\n#\xff" * 5), kernel(2, cubin=b"x"), kernel(3, regs=255, entry="_Zk.$1")]
    write_pack(path, kernels, {"arch": "sm90a", "dsl": "4.8.1"})
    assert read_pack(path) == ({"format_version": "1", "arch": "sm90a", "dsl": "4.8.1"}, kernels)
    assert find_kernel(kernels[0].name) == -1
    assert load_pack(str(path)) == 3
    handles = [find_kernel(each.name) for each in kernels]
    assert len(set(handles)) == 3
    assert min(handles) >= 0
    assert set(list_kernels()) >= {each.name for each in kernels}
    assert load_pack(str(path)) == 3  # again: the same kernels
    assert [find_kernel(each.name) for each in kernels] == handles
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_pack_is_one(tmp_path):
    write_pack(tmp_path / "a.bdpack", [], {})
    assert load_pack(str(tmp_path / "a.bdpack")) == 0


def test_missing_file(tmp_path):
    with pytest.raises(InvalidArgument, match="cannot be opened"):
        load_pack(str(tmp_path / "none.bdpack"))


def test_a_directory_is_no_pack(tmp_path):
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load_pack(str(tmp_path))


def test_no_two_kernels_share_their_code(tmp_path):
    with pytest.raises(InvalidArgument, match=f"cubin of {kernel(2).name}: is that of {kernel(1).name}"):
        write_pack(tmp_path / "a.bdpack", [kernel(1, cubin=b"x"), kernel(2, cubin=b"x")], {})


def test_words_only(tmp_path):
    with pytest.raises(InvalidArgument, match="entry='two words': must be one word"):
        write_pack(tmp_path / "a.bdpack", [kernel(1, entry="two words")], {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pack(tmp_path):
    path = tmp_path / "a.bdpack"
    write_pack(path, [kernel(4), kernel(5, cubin=b"\x7fELF" + bytes(12) + b"5")], {"arch": "sm90a"})
    return path


def assert_rejected(path, data):
    path.write_bytes(data)
    with pytest.raises(CacheFormatError, match="not a usable kernel pack"):
        load_pack(str(path))
    assert find_kernel(kernel(4).name) == -1  # all or nothing


def test_every_truncation_is_rejected(pack):
    data = pack.read_bytes()
    for length in range(len(data)):
        assert_rejected(pack, data[:length])


def with_index(data, edit):
    """The pack with its index rewritten and the length of the index put right."""
    magic, length, rest = data.split(b"\n", 2)
    index = edit(rest[: int(length)])
    return b"\n".join((magic, str(len(index)).encode(), index + rest[int(length) :]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"BDPACK 1", b"BDPACK 2"),
        (b"BDPACK 1\n", b"BDPACK 1\n-"),
        (b"BDPACK 1\n", b"BDPACK 1\n99999999999999999999"),
        (b"BDPACK 1\n", b"BDPACK 1\n9999999"),
    ],
)
def test_damaged_beginning(pack, old, new):
    assert_rejected(pack, pack.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"#format_version=1", b"#format_version=2"),
        (b"#format_version=1\n", b""),
        (b"#arch=sm90a", b"#arch"),
        (b"offset=0", b"offset=100000"),
        (b"offset=0", b"offset=8"),
        (b"offset=0", b"offset=-16"),
        (b"offset=32", b"offset=18446744073709551600"),
        (b"offset=0", b"offset=9223372036854775792"),
        (b"size=17", b"size=999999999999999999"),
        (b"size=17", b"size=50"),
        (b"size=17", b"size=0"),
        (b"size=17", b"size=1e1"),
        (b"size=17", b""),
        (b"threads=160", b"threads=0"),
        (b"threads=160", b"threads=161"),
        (b"threads=160", b"threads=2048"),
        (b"threads=160", b"threads=160 threads=160"),
        (b"smem=4096", b"smem=999999"),
        (b"regs=128", b"regs=256"),
        (b"ctas_per_sm=1", b"ctas_per_sm=0"),
        (b"ctas_per_sm=1", b"ctas_per_sm=2"),
        (b"entry=entry", b"entry="),
        (b"name=decode", b"name=encode"),
        (b"_s5_", b"_s4_"),  # two kernels of one name
    ],
)
def test_damaged_index(pack, old, new):
    data = pack.read_bytes()
    damaged = with_index(data, lambda index: new.join(index.rsplit(old, 1)))
    assert damaged != data
    assert_rejected(pack, damaged)


def test_the_python_reader_rejects_too(pack):
    data = pack.read_bytes()
    for damaged in (
        b"",
        data[:-1],
        data[:40],
        data.replace(b"BDPACK", b"XDPACK"),
        data.replace(b"size=17", b"size=99"),
    ):
        pack.write_bytes(damaged)
        with pytest.raises(CacheFormatError):
            read_pack(pack)


def test_add_kernel_checks_its_arguments():
    add_kernel = native.function("add_kernel")
    good = kernel(6)
    arguments = [good.name, good.entry, good.cubin, good.threads, good.smem, good.regs, good.ctas_per_sm]
    for position, value, message in [
        (0, "decode_sm90a", "is not the name of a kernel configuration"),
        (1, "", "entry: is empty"),
        (2, b"", "cubin: is empty"),
        (3, 33, "threads=33"),
        (4, 300_000, "smem=300000"),
        (5, -1, "regs=-1"),
        (6, 0, "ctas_per_sm=0"),
    ]:
        wrong = arguments.copy()
        wrong[position] = value
        with pytest.raises(InvalidArgument) as caught:
            add_kernel(*wrong)
        assert message in str(caught.value)
    assert find_kernel(good.name) == -1
    handle = add_kernel(*arguments)
    assert find_kernel(good.name) == handle == add_kernel(*arguments)


def test_unknown_handle():
    with pytest.raises(KernelNotFound, match="handle=1000000"):
        native.function("workspace_bytes")(1_000_000, 0)
