"""The runtime without a GPU: the validator of decode's tensors, errors without a driver, kernel look-up, command line.

The launch itself is tested on a GPU with a hand-written kernel that reports its parameters.
"""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bitdecoding.cute_kernels import native
from bitdecoding.cute_kernels.pack import CompiledKernel, read_pack, source_digest

import bitdecoding as bd
from bitdecoding import CudaError, InvalidArgument, KernelConfig, KernelNotFound, QuantSpec, cli, cuda

ROOT = Path(__file__).parents[1]
decode_cpu = native.function("decode_cpu")  # checks its tensors as the launch does
NO_WINDOW = 2**31 - 1
SPEC = QuantSpec()
NAMES = ["q", "pages", "block_table", "seqlens", "packed_lens", "tail_k", "tail_v", "sink_k", "sink_v", "sink_logits"]
NAMES += ["out", "lse"]


def decode_tensors(dtype=torch.float16, device="cpu"):
    """All tensors of a small decode call, by argument name."""
    batch, q_len, num_q_heads, num_kv_heads, head_dim = 2, 1, 32, 8, 128
    new = {"dtype": dtype, "device": device}
    int32 = {"dtype": torch.int32, "device": device}
    return {
        "q": torch.zeros(batch, q_len, num_q_heads, head_dim, **new),
        "pages": torch.zeros(5, num_kv_heads, SPEC.block_bytes(head_dim), dtype=torch.uint8, device=device),
        "block_table": torch.zeros(batch, 3, **int32),
        "seqlens": torch.zeros(batch, **int32),
        "packed_lens": torch.zeros(batch, **int32),
        "tail_k": torch.zeros(batch, 16, num_kv_heads, head_dim, **new),
        "tail_v": torch.zeros(batch, 16, num_kv_heads, head_dim, **new),
        "sink_k": torch.zeros(batch, 4, num_kv_heads, head_dim, **new),
        "sink_v": torch.zeros(batch, 4, num_kv_heads, head_dim, **new),
        "sink_logits": torch.zeros(num_q_heads, device=device),
        "out": torch.zeros(batch, q_len, num_q_heads, head_dim, **new),
        "lse": torch.zeros(batch, q_len, num_q_heads, device=device),
    }


def check(tensors, spec=SPEC, window=NO_WINDOW, softmax_scale=0.1, softcap=0.0):
    decode_cpu(*(tensors[name] for name in NAMES), spec, window, softmax_scale, softcap, 1)


# ---------------------------------------------------------------------------------------------- the validator


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sound_tensors_pass(dtype):
    check(decode_tensors(dtype))
    required = decode_tensors(dtype) | dict.fromkeys([*NAMES[4:10], "lse"])
    check(required)
    check(required, window=1, softmax_scale=2.0, softcap=50.0)


def test_pages_may_be_a_slice_of_a_pool():
    tensors = decode_tensors()
    pool = torch.zeros(5, 3, *tensors["pages"].shape[1:], dtype=torch.uint8)
    check(tensors | {"pages": pool[:, 1]})
    check(tensors | {"pages": tensors["pages"][::2]})


WRONG_TENSORS = [
    ("q", lambda t: t.float().double(), "q: dtype float64: allowed are float16, bfloat16, float32"),
    ("q", lambda t: t[0], "q: shape [1, 32, 128]: must be [batch, q_len, num_q_heads, head_dim]"),
    ("q", lambda t: t[:, :, :31].contiguous(), "num_q_heads must be a multiple of num_kv_heads=8"),
    ("q", lambda t: t[:, :0], "q_len must be positive"),
    ("q", lambda t: t[..., :80].contiguous(), "head_dim=80: allowed are 64, 96, 128, 256"),
    ("q", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "q: strides"),
    ("q", lambda t: torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape), "q: address must be a multiple of 16"),
    ("pages", lambda t: t.int(), "pages: dtype int32: allowed are uint8"),
    ("pages", lambda t: t[..., :-1], "block_bytes=17408"),
    ("pages", lambda t: t[0], "pages: shape [8, 17408]"),
    ("pages", lambda t: t[:, :0], "num_q_heads must be a multiple of num_kv_heads=0"),
    ("pages", lambda t: t.mT.contiguous().mT, "pages: strides"),
    ("block_table", lambda t: t.long(), "block_table: dtype int64: allowed are int32"),
    ("block_table", lambda t: t[:1], "block_table: shape [1, 3]: must be [batch=2, max_pages]"),
    ("block_table", lambda t: t.T.contiguous().T, "block_table: strides"),
    ("seqlens", lambda t: t[:1], "seqlens: shape [1]: must be [batch=2]"),
    ("seqlens", lambda t: t.float(), "seqlens: dtype float32"),
    ("packed_lens", lambda t: t[None], "packed_lens: shape [1, 2]"),
    ("tail_k", lambda t: None, "tail_k: is missing, tail_v is given"),
    ("tail_v", lambda t: None, "tail_v: is missing, tail_k is given"),
    ("tail_k", lambda t: t.bfloat16(), "tail_k: dtype bfloat16: allowed are float16"),
    ("tail_k", lambda t: t[:, :, :4], "num_kv_heads=8"),
    ("tail_v", lambda t: t[:, :8].contiguous(), "tail_capacity=16"),
    ("tail_v", lambda t: t[:, ::2], "tail_v: shape [2, 8, 8, 128]"),
    ("sink_v", lambda t: None, "sink_v: is missing, sink_k is given"),
    ("sink_k", lambda t: t[..., :64].contiguous(), "head_dim=128"),
    ("sink_v", lambda t: t[:, :3].contiguous(), "num_sink=4"),
    ("sink_logits", lambda t: t.half(), "sink_logits: dtype float16: allowed are float32"),
    ("sink_logits", lambda t: t[:8], "sink_logits: shape [8]: must be [num_q_heads=32]"),
    ("out", lambda t: t.float(), "out: dtype float32: allowed are float16"),
    ("out", lambda t: t[:, :, :16].contiguous(), "out: shape [2, 1, 16, 128]"),
    ("lse", lambda t: t[..., None], "lse: shape [2, 1, 32, 1]: must be [batch=2, q_len=1, num_q_heads=32]"),
    ("lse", lambda t: t.half(), "lse: dtype float16"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_TENSORS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_tensors_are_named(name, change, message):
    tensors = decode_tensors()
    tensors[name] = change(tensors[name])
    with pytest.raises(InvalidArgument) as caught:
        check(tensors)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0: allowed are 1 to 2^31 - 1"),
        ({"window": 2**31}, "window=2147483648"),
        ({"softmax_scale": 0.0}, "softmax_scale=0: must be positive and finite"),
        ({"softmax_scale": float("nan")}, "softmax_scale=nan"),
        ({"softcap": -1.0}, "softcap=-1: must be positive and finite, or 0"),
        ({"softcap": float("inf")}, "softcap=inf"),
        ({"softcap": 1e-60}, "softcap=1e-60"),
        ({"softcap": False}, "softcap=False: allowed is a number"),
        ({"softmax_scale": "1"}, "softmax_scale='1': allowed is a number"),
        ({"window": True}, "window=True: allowed is an integer"),
        ({"window": 2.0}, "window=2: allowed is an integer"),
        ({"window": 2**70}, "window=ffi.BigInt: allowed is an integer"),
    ],
)
def test_wrong_scalars_are_named(options, message):
    with pytest.raises(InvalidArgument) as caught:
        check(decode_tensors(), **options)
    assert message in str(caught.value)


def test_spec_must_fit_head_dim():
    tensors = decode_tensors()
    tensors["q"] = tensors["q"][..., :64].contiguous()
    with pytest.raises(InvalidArgument, match="v_group=128: must divide head_dim=64"):
        check(tensors)


def test_tensors_are_needed():
    for name, value, message in (
        ("q", [1.0], "q=ffi.Array: allowed is a tensor"),
        ("pages", None, "pages=None: allowed is a tensor"),
        ("tail_k", 3, "tail_k=3: allowed is a tensor or None"),
        ("lse", "kv4", "lse='kv4': allowed is a tensor or None"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            check(decode_tensors() | {name: value})
        assert str(caught.value) == message


# ---------------------------------------------------------------------------------------------- append and quantize

# Kernels check everything else before the device, so that sound tensors are those that only are in the wrong place.
APPEND_NAMES = ["k_new", "v_new", "pages", "block_table", "seqlens", "packed_lens", "tail_k", "tail_v", "workspace"]
APPEND_NAMES += ["sink_k", "sink_v", "lengths", "status"]
OPTIONS = (1.0, 1.0, False, False)  # k_clip, v_clip, rotate_k, rotate_v


def append_kernel():
    return native.function("add_kernel")(KernelConfig(kind="append").name(), "entry", b"cubin", 128, 0, 0, 1)


def append_tensors(dtype=torch.float16, device="cpu"):
    """All tensors of a small append, by argument name; the new tokens are slices of a projection of Q, K and V."""
    batch, new_tokens, heads, head_dim = 2, 3, 8, 128
    new = {"dtype": dtype, "device": device}
    int32 = {"dtype": torch.int32, "device": device}
    qkv = torch.zeros(batch, new_tokens, 3 * heads, head_dim, **new)
    return {
        "k_new": qkv[:, :, heads : 2 * heads],
        "v_new": qkv[:, :, 2 * heads :],
        "pages": torch.zeros(5, heads, SPEC.block_bytes(head_dim), dtype=torch.uint8, device=device),
        "block_table": torch.zeros(batch, 6, **int32),
        "seqlens": torch.zeros(batch, **int32),
        "packed_lens": torch.zeros(batch, **int32),
        "tail_k": torch.zeros(batch, 140, heads, head_dim, **new),
        "tail_v": torch.zeros(batch, 140, heads, head_dim, **new),
        "workspace": torch.zeros(1024, dtype=torch.uint8, device=device),
        "sink_k": torch.zeros(batch, 4, heads, head_dim, **new),
        "sink_v": torch.zeros(batch, 4, heads, head_dim, **new),
        "lengths": torch.zeros(batch, **int32),
        "status": torch.zeros(1, **int32),
    }


def launch_append(tensors, recent=13):
    native.function("append")(append_kernel(), *(tensors[name] for name in APPEND_NAMES), recent, *OPTIONS)


def quantize_tensors(device="cpu"):
    qkv = torch.zeros(300, 3, 8, 128, dtype=torch.float16, device=device)
    int32 = {"dtype": torch.int32, "device": device}
    pages = torch.zeros(5, 8, SPEC.block_bytes(128), dtype=torch.uint8, device=device)
    return [qkv[:, 1], qkv[:, 2], pages, torch.zeros(2, 3, **int32), torch.zeros(3, **int32)]


def test_an_append_names_what_is_no_tensor():
    for name, value, message in (
        ("v_new", [1.0], "v_new=ffi.Array: allowed is a tensor"),
        ("tail_k", None, "tail_k=None: allowed is a tensor"),
        ("status", 3, "status=3: allowed is a tensor or None"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            launch_append(append_tensors() | {name: value})
        assert str(caught.value) == message
    with pytest.raises(InvalidArgument, match="recent=True: allowed is an integer"):
        launch_append(append_tensors(), recent=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sound_tensors_of_an_append_only_are_in_the_wrong_place(dtype):
    for change in ({}, dict.fromkeys(APPEND_NAMES[9:])):
        with pytest.raises(InvalidArgument, match="k_new: is on cpu: kernels need CUDA tensors"):
            launch_append(append_tensors(dtype) | change)
    for cu_seqlens in (quantize_tensors()[4], None):
        tensors = quantize_tensors()
        tensors[3:] = [tensors[3] if cu_seqlens is not None else tensors[3][:1], cu_seqlens]
        with pytest.raises(InvalidArgument, match="k: is on cpu: kernels need CUDA tensors"):
            native.function("quantize")(append_kernel(), *tensors, 300, *OPTIONS)


WRONG_APPENDS = [
    ("k_new", lambda t: t.float(), "k_new: dtype float32: allowed are float16, bfloat16"),
    ("k_new", lambda t: t[0], "k_new: shape [3, 8, 128]: must be [batch, new_tokens, num_kv_heads, head_dim=128]"),
    ("k_new", lambda t: t[..., :64], "k_new: shape [2, 3, 8, 64]"),
    ("k_new", lambda t: t.contiguous(), "v_new: strides [9216, 3072, 128, 1]: must be those of k_new"),
    ("v_new", lambda t: t[:, :, :4], "v_new: shape [2, 3, 4, 128]"),
    ("v_new", lambda t: t[:, :2], "v_new: shape [2, 2, 8, 128]: must be [batch=2, new_tokens=3"),
    ("v_new", lambda t: t.bfloat16(), "v_new: dtype bfloat16: allowed are float16"),
    ("pages", lambda t: t[..., 1:], "block_bytes=17408"),
    ("pages", lambda t: t[:, :4], "num_kv_heads=8"),
    ("block_table", lambda t: t.long(), "block_table: dtype int64: allowed are int32"),
    ("block_table", lambda t: t[:, ::2], "block_table: strides [6, 2]"),
    ("seqlens", lambda t: t[:1], "seqlens: shape [1]: must be [batch=2]"),
    ("packed_lens", lambda t: t.float(), "packed_lens: dtype float32"),
    ("tail_k", lambda t: t.bfloat16(), "tail_k: dtype bfloat16: allowed are float16"),
    ("tail_v", lambda t: t[:, :139], "tail_v: shape [2, 139, 8, 128]: must be [batch=2, tail_capacity=140"),
    ("sink_v", lambda t: None, "sink_v: is missing, sink_k is given"),
    ("sink_k", lambda t: t[:, :, ::2], "sink_k: shape"),
    ("lengths", lambda t: t.long(), "lengths: dtype int64"),
    ("status", lambda t: torch.zeros(2, dtype=torch.int32), "status: shape [2]: must be [one=1]"),
    ("workspace", lambda t: t.int(), "workspace: dtype int32: allowed are uint8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG_APPENDS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_tensors_of_an_append_are_named(name, change, message):
    tensors = append_tensors()
    tensors[name] = change(tensors[name])
    with pytest.raises(InvalidArgument) as caught:
        launch_append(tensors)
    assert message in str(caught.value)


def test_new_tokens_need_vectors():
    tensors = append_tensors()
    odd = torch.zeros(2, 3, 8, 132, dtype=torch.float16)
    with pytest.raises(InvalidArgument, match="k_new: strides .*multiples of 16 bytes"):
        launch_append(tensors | dict.fromkeys(("k_new", "v_new"), odd[..., :128]))
    odd = torch.zeros(2, 3, 8, 136, dtype=torch.float16)
    with pytest.raises(InvalidArgument, match="k_new: address must be a multiple of 16"):
        launch_append(tensors | dict.fromkeys(("k_new", "v_new"), odd[..., 4:132]))
    with pytest.raises(InvalidArgument, match="k_new: strides .*the last must be 1"):
        launch_append(tensors | dict.fromkeys(("k_new", "v_new"), torch.zeros(2, 3, 128, 8).half().mT))


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda t: t.float(), "k: dtype float32: allowed are float16, bfloat16"),
        (0, lambda t: t[None], "k: shape [1, 300, 8, 128]: must be [num_tokens, num_kv_heads, head_dim=128]"),
        (1, lambda t: t[1:], "v: shape [299, 8, 128]: must be [num_tokens=300"),
        (3, lambda t: t[:1], "block_table: shape [1, 3]: must be [batch=2, max_pages]"),
        (4, lambda t: t.long(), "cu_seqlens: dtype int64"),
        (4, lambda t: t[:0], "cu_seqlens: shape [0]"),
        (5, lambda n: 301, "max_seqlen=301: allowed are 0 to num_tokens=300"),
    ],
)
def test_wrong_arguments_of_a_quantize_are_named(at, change, message):
    arguments = [*quantize_tensors(), 300]
    arguments[at] = change(arguments[at])
    with pytest.raises(InvalidArgument) as caught:
        native.function("quantize")(append_kernel(), *arguments, *OPTIONS)
    assert message in str(caught.value)


def test_append_kernels_are_found_and_compiled_as_the_others(monkeypatch, tmp_path):
    calls = []
    fake_compiler(monkeypatch, tmp_path, calls)
    monkeypatch.setattr(cuda, "device_arch", lambda device: "sm120")
    spec = QuantSpec(k_bits=2, k_clip=0.75, v_clip="mse", rotate_v=True)
    plan = cuda._append_plan(0, 256, spec)
    assert calls == ["append_sm120_d256_k2c128_v4g128"]
    assert plan.options == (0.75, 0.0, False, True)
    assert cuda._append_plan(0, 256, QuantSpec(k_bits=2)).handle == plan.handle
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------- without a driver

WITHOUT_DRIVER = """
import bitdecoding as bd
from bitdecoding.cute_kernels import native
for call in (
    lambda: native.function("device_count")(),
    lambda: native.function("device_info")(0),
    lambda: native.function("capture_id")(0, 0),
    lambda: bd.KernelConfig.for_problem(
        head_dim=128, quant=bd.QuantSpec(), num_q_heads=8, num_kv_heads=8
    ),
):
    try:
        call()
    except bd.CudaError as error:
        print(error)
"""


def test_without_a_usable_driver_errors_say_what_is_missing():
    # hidden devices make a machine with a driver fail alike, at cuInit
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_DRIVER]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    lines = output.splitlines()
    assert len(lines) == 4
    assert all("libcuda.so.1: not found" in line or "CUDA_ERROR" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_driver():
    name = KernelConfig(q_tile=40).name()
    handle = native.function("add_kernel")(name, "entry", b"cubin", 160, 0, 0, 1)
    with pytest.raises(CudaError, match=r"libcuda\.so\.1|CUDA_ERROR"):
        native.function("workspace_bytes")(handle, 0)


def test_kernels_reject_cpu_tensors():
    handle = native.function("add_kernel")(KernelConfig(q_tile=40).name(), "entry", b"cubin", 160, 0, 0, 1)
    tensors = decode_tensors()
    workspace = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(InvalidArgument, match="q: is on cpu: kernels need CUDA tensors"):
        native.function("decode")(handle, *tensors.values(), workspace, NO_WINDOW, 0.1, 0.0, False, False)


def test_registry_from_many_threads():
    names = [
        KernelConfig(
            q_tile=48, stages=2 + 2 * (i % 4), num_warps=4 * (1 + i % 2), head_dim=64, quant=QuantSpec(v_group=64)
        ).name()
        for i in range(64)
    ]
    handles = [None] * len(names)

    def register(i):
        handles[i] = native.function("add_kernel")(names[i], "entry", b"cubin", 160, 0, 0, 1)

    threads = [threading.Thread(target=register, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handles == [native.function("find_kernel")(name) for name in names]
    assert len(set(handles)) == len(set(names))


# ---------------------------------------------------------------------------------------------- finding kernels


def fake_compiler(monkeypatch, tmp_path, calls):
    """Replaces the compiler by one that records its calls; the cache of compiled kernels is empty."""
    module = type(sys)("bitdecoding.cute_kernels.compile")

    def compile_kernel(config):
        calls.append(config.name())
        return CompiledKernel(config.name(), "entry", b"cubin", 160, config.smem_bytes(), 128, 1)

    module.compile_kernel = compile_kernel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cuda, "dsl_version", lambda: "4.8.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_missing_kernel_is_compiled_once_and_kept_on_disk(monkeypatch, tmp_path):
    calls = []
    fake_compiler(monkeypatch, tmp_path, calls)
    config = KernelConfig(q_tile=56, stages=1)
    handle = cuda.kernel_handle(config)
    assert cuda.kernel_handle(config) == handle
    assert calls == [config.name()]
    (path,) = (tmp_path / "bitdecoding").iterdir()
    assert path.name.startswith(config.name() + "-")
    assert [kernel.name for kernel in read_pack(path)[1]] == [config.name()]


def test_a_damaged_cache_file_is_compiled_anew(monkeypatch, tmp_path):
    calls = []
    fake_compiler(monkeypatch, tmp_path, calls)
    config = KernelConfig(q_tile=56, stages=2)
    path = tmp_path / "bitdecoding" / f"{config.name()}-{source_digest('4.8.1')}.bdpack"
    path.parent.mkdir()
    path.write_bytes(b"BDPACK 1\n7\n")
    assert cuda.kernel_handle(config) >= 0
    assert calls == [config.name()]
    assert len(read_pack(path)[1]) == 1


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    calls = []
    (tmp_path / "file").touch()
    fake_compiler(monkeypatch, tmp_path / "file", calls)
    config = KernelConfig(q_tile=64, stages=1)
    assert cuda.kernel_handle(config) == cuda.kernel_handle(config) >= 0
    assert calls == [config.name()]


def test_without_a_compiler_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr(cuda, "dsl_version", lambda: None)
    with pytest.raises(KernelNotFound) as caught:
        cuda.kernel_handle(KernelConfig(q_tile=56, stages=3))
    assert "BITDECODING_ARCH=sm90a pip install ." in str(caught.value)
    assert "pip install '.[jit]'" in str(caught.value)


def test_without_a_compiler_a_kernel_of_fewer_columns_serves(monkeypatch):
    spec = QuantSpec(k_bits=8, v_bits=2, v_group=64)
    q, pages = torch.empty(1, 4, 64, 128), torch.empty(1, 8, spec.block_bytes(128), dtype=torch.uint8)
    for name, known in (
        ("device_arch", "sm90a"), ("_device_info", {"name": "a GPU"}), ("dsl_version", None), ("_workspace_bytes", 0),
    ):  # fmt: skip
        monkeypatch.setattr(cuda, name, lambda *args, known=known: known)
    with pytest.raises(KernelNotFound, match="_q32_wgmma"):
        cuda._plan(("none", "decode"), q, pages, spec, None)
    small = KernelConfig.for_problem(head_dim=128, quant=spec, num_q_heads=8, num_kv_heads=1, arch="sm90a")
    handle = native.function("add_kernel")(small.name(), "entry", b"cubin", 160, small.smem_bytes(), 128, 1)
    with pytest.warns(cuda.KernelWarning, match=f"_q32_wgmma.*{small.name()} is used.* per 8 query columns"):
        assert cuda._plan(("small", "decode"), q, pages, spec, None).handle == handle
    with pytest.raises(KernelNotFound, match="_q32_wgmma"):  # it was asked for
        wanted = cuda.choose(0, 128, spec, 64, 8, 4)
        cuda._plan(("wanted", "decode"), q, pages, spec, wanted)


# ---------------------------------------------------------------------------------------------- command line


def test_info_as_text(capsys):
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("bitdecoding 0.1.0")
    assert "libbitdecoding_ffi.so" in output
    if not torch.cuda.is_available():
        assert "GPU        none: " in output


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format_version"] == 1
    assert bool(facts["gpus"]) == (facts["no_gpu_because"] is None)
    for gpu in facts["gpus"]:
        assert facts["install"][gpu["arch"]] == f"BITDECODING_ARCH={gpu['arch']} pip install ."


def test_errors_of_a_command_are_one_line(monkeypatch, capsys):
    def fail(args):
        raise InvalidArgument("tokens=0: must be positive")

    monkeypatch.setattr("bitdecoding.info.run", fail)
    assert cli.main(["info"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "bitdecoding info: tokens=0: must be positive\n"
    assert captured.out == ""


def test_a_command_without_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "demo", ("no_such_module", "about"))
    assert cli.main(["demo"]) == 2
    assert "pip install '.[demo]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what launches pass


def test_launches_pass_the_parameters_of_the_kernels_in_their_order():
    """By name, as launch.cpp lists them; a driver would not see two of one size exchanged."""
    pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")
    from bitdecoding.cute_kernels import append_work, merge_parts, step, work

    source = (ROOT / "cute_kernels" / "runtime" / "launch.cpp").read_text()
    lists = re.findall(r"void\* arguments\[\] = \{(.*?)\};", source, re.DOTALL)
    lists += re.findall(r"launch_decode\(r, decode, workspace_bytes, options, (.*?)\);", source, re.DOTALL)
    decode, of_append, merge, more = (
        [name.removesuffix("_bytes").replace("num_items", "items") for name in re.findall(r"&(?:\w\.)?(\w+)", x)]
        for x in lists
    )
    assert decode == list(work.Params._fields)
    assert of_append == list(append_work.Params._fields)
    assert merge == list(merge_parts.Params._fields)
    assert [*decode, *more[:-1]] == list(step.Params._fields[:-1])
    assert (more[-1], step.Params._fields[-1]) == ("workspace", "counter")


# ---------------------------------------------------------------------------------------------- on a GPU

# Thread 0 of the first CTA writes its parameters to one of them, then grid, block and shared-memory sizes.
PARAMETERS = [("u64", 15), ("u32", 12)]
APPEND_PARAMETERS = [("u64", 19), ("u32", 15)]
STEP_PARAMETERS = [("u64", 15), ("u32", 16), ("u64", 8), ("u32", 8), ("u64", 1)]


def reporting_ptx(parameters=PARAMETERS, report_to=10):
    kinds = [kind for kind, count in parameters for _ in range(count)]
    size = sum(4 if kind == "u32" else 8 for kind in kinds)
    offsets = [sum(4 if kind == "u32" else 8 for kind in kinds[:i]) for i in range(len(kinds))]
    declared = ", ".join(f".param .{kind} p{i}" for i, kind in enumerate(kinds))
    stores = []
    for i, (kind, offset) in enumerate(zip(kinds, offsets, strict=True)):
        register = "%r1" if kind == "u32" else "%rd2"
        stores.append(f"ld.param.{kind} {register}, [p{i}]; st.global.{kind} [%rd1+{offset}], {register};")
    for i, special in enumerate(("%nctaid.x", "%ntid.x", "%dynamic_smem_size")):
        stores.append(f"mov.u32 %r1, {special}; st.global.u32 [%rd1+{size + 4 * i}], %r1;")
    body = "\n".join(stores)
    return (
        f"""
.version 7.8
.target sm_80
.address_size 64
.visible .entry report({declared})
{{
    .reg .pred %p1; .reg .b32 %r<4>; .reg .b64 %rd<4>;
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; or.b32 %r2, %r2, %r3;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra DONE;
    ld.param.u64 %rd1, [p{report_to}];
    {body}
DONE:
    ret;
}}
""".encode()
        + b"\0"
    )


@pytest.fixture(scope="module")
def report_kernel():
    from bitdecoding.cute_kernels.config import device_arch

    config = KernelConfig(
        arch=device_arch(0), copy="cp_async", q_tile=64, num_warps=1, warps_per_block=1, stages=1, ctas_per_sm=2
    )
    smem = 70_000  # more than a kernel gets without asking
    handle = native.function("add_kernel")(config.name(), "report", reporting_ptx(), 160, smem, 0, 2)
    return config, handle, smem


@pytest.mark.gpu
def test_launch_passes_every_parameter(report_kernel):
    _, handle, smem = report_kernel
    tensors = decode_tensors(device="cuda")
    size = native.function("workspace_bytes")(handle, 0)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        native.function("decode")(handle, *tensors.values(), workspace, 77, 0.25, 0.0, False, False)
    stream.synchronize()
    report = tensors["out"].view(torch.uint8).flatten()[:180].cpu()
    words = report[:120].view(torch.int64).tolist()
    ints = report[120:156].view(torch.int32).tolist()
    floats = report[156:164].view(torch.float32).tolist()
    expected = [tensors[name].data_ptr() for name in NAMES]
    counters = native.function("counter_bytes")()
    assert words[:12] == expected
    assert words[12] == workspace.data_ptr() + counters
    assert words[13:] == [8 * SPEC.block_bytes(128), SPEC.block_bytes(128)]
    assert ints == [2, 1, 32, 8, tensors["pages"].shape[0], 3, 16, 4, 77]
    assert report[164:168].view(torch.int32).item() == 0  # float16
    assert floats == [pytest.approx(0.25 * 1.4426950408889634), 0.0]
    sms = native.function("device_info")(0)["num_sms"]
    assert report[168:].view(torch.int32).tolist() == [2 * sms, 160, smem]
    with pytest.raises(InvalidArgument, match="workspace: has 128 bytes"):
        native.function("decode")(handle, *tensors.values(), workspace[:128], 77, 0.25, 0.0, False, False)
    on_cpu = tensors | {"seqlens": tensors["seqlens"].cpu()}
    with pytest.raises(InvalidArgument, match="seqlens: is on cpu: q is on cuda:0"):
        native.function("decode")(handle, *on_cpu.values(), workspace, 77, 0.25, 0.0, False, False)
    bf16 = decode_tensors(torch.bfloat16, "cuda")
    native.function("decode")(handle, *bf16.values(), workspace, 77, 0.25, 30.0, False, False)
    report = bf16["out"].view(torch.uint8).flatten()[160:168].cpu()
    assert report[:4].view(torch.float32).item() == 30.0
    assert report[4:].view(torch.int32).item() == 1


@pytest.mark.gpu
def test_append_passes_every_parameter():
    from bitdecoding.cute_kernels.config import device_arch

    # a format that no build has: names that are registered keep their first kernel
    config = KernelConfig(kind="append", arch=device_arch(0), quant=QuantSpec(k_group=32, k_symmetric=True))
    image = reporting_ptx(APPEND_PARAMETERS, report_to=8)  # tail_k
    handle = native.function("add_kernel")(config.name(), "report", image, 128, config.smem_bytes(), 0, 1)
    tensors = append_tensors(torch.bfloat16, "cuda")
    tensors["pages"] = torch.zeros(5, 8, config.quant.block_bytes(128), dtype=torch.uint8, device="cuda")
    arguments = [tensors[name] for name in APPEND_NAMES]
    native.function("append")(handle, *arguments, 13, 0.75, 0.0, False, True)
    report = tensors["tail_k"].view(torch.uint8).flatten()[: 19 * 8 + 18 * 4].cpu()
    order = ["k_new", "v_new", "lengths", None, "pages", "block_table", "seqlens", "packed_lens"]
    order += ["tail_k", "tail_v", "sink_k", "sink_v", "status", "workspace"]
    words = report[: 19 * 8].view(torch.int64).tolist()
    assert words[:14] == [0 if name is None else tensors[name].data_ptr() for name in order]
    block = config.quant.block_bytes(128)
    assert words[14:] == [3 * 3072 * 2, 3072 * 2, 128 * 2, 8 * block, block]
    ints = report[19 * 8 :].view(torch.int32).tolist()
    assert ints[:9] == [2, 3, 8, 5, 6, 140, 4, 13, 1]
    assert report[19 * 8 :].view(torch.float32).tolist()[9:11] == [0.75, 0.0]
    assert ints[11:15] == [0, 1, 1, 0]
    assert ints[15:] == [2 * 8 * 1 * 2, 128, config.smem_bytes()]
    for recent, match in ((14, "tail_capacity=140: allowed are numbers from 141"), (-1, "recent=-1")):
        with pytest.raises(InvalidArgument, match=match):
            native.function("append")(handle, *arguments, recent, *OPTIONS)
    with pytest.raises(InvalidArgument, match=r"workspace: has 4 bytes, 256 are needed"):
        native.function("append")(handle, *arguments[:8], tensors["workspace"][:4], *arguments[9:], 13, *OPTIONS)


@pytest.mark.gpu
def test_step_passes_every_parameter():
    # a format that no build has, as above
    quant = QuantSpec(k_group=32, k_symmetric=True, v_group=32)
    config = KernelConfig.for_problem(kind="step", head_dim=128, quant=quant, num_q_heads=32, num_kv_heads=8)
    image, smem = reporting_ptx(STEP_PARAMETERS), config.smem_bytes()
    handle = native.function("add_kernel")(config.name(), "report", image, 160, smem, 0, config.ctas_per_sm)
    tensors = decode_tensors(torch.bfloat16, "cuda") | append_tensors(torch.bfloat16, "cuda")
    tensors |= {name: tensors[name][:, :1] for name in ("k_new", "v_new")}
    tensors["pages"] = torch.zeros(5, 8, quant.block_bytes(128), dtype=torch.uint8, device="cuda")
    size = native.function("workspace_bytes")(handle, 0)
    tensors["workspace"] = torch.zeros(size, dtype=torch.uint8, device="cuda")
    order = ["q", *APPEND_NAMES[:11], "sink_logits", "status", "out", "lse"]
    step = native.function("step")
    step(handle, *(tensors[name] for name in order), 12, 77, 0.25, 30.0, 0.75, 0.0, False, True)
    report = tensors["out"].view(torch.uint8).flatten()[:300].cpu()
    words = report[:120].view(torch.int64).tolist()
    block = quant.block_bytes(128)
    assert words[:12] == [tensors[name].data_ptr() for name in NAMES]
    assert words[12:] == [tensors["workspace"].data_ptr() + native.function("counter_bytes")(), 8 * block, block]
    assert report[120:156].view(torch.int32).tolist() == [2, 1, 32, 8, 5, 6, 140, 4, 77]
    assert report[156:164].view(torch.float32).tolist() == [pytest.approx(0.25 * 1.4426950408889634), 30.0]
    assert report[164:184].view(torch.int32).tolist() == [1, 0, 1, 4, 1]
    words = report[184:248].view(torch.int64).tolist()
    assert words == [
        *(tensors[name].data_ptr() for name in ("k_new", "v_new")), 0, 0, tensors["status"].data_ptr(),
        3 * 3072 * 2, 0, 128 * 2,  # of one token
    ]  # fmt: skip
    assert report[248:260].view(torch.int32).tolist() == [1, 12, 1]
    assert report[260:268].view(torch.float32).tolist() == [0.75, 0.0]
    assert report[268:280].view(torch.int32).tolist() == [0, 1, 0]
    assert report[280:288].view(torch.int64).item() == tensors["workspace"].data_ptr()
    sms = native.function("device_info")(0)["num_sms"]
    assert report[288:].view(torch.int32).tolist() == [config.ctas_per_sm * sms, 160, smem]
    tensors["workspace"] = tensors["workspace"][:128]
    with pytest.raises(InvalidArgument, match="workspace: has 128 bytes"):
        step(handle, *(tensors[name] for name in order), 12, 77, 0.25, 0.0, *OPTIONS)


@pytest.mark.gpu
def test_decode_runs_in_threads_and_graphs(report_kernel):
    config, _, _ = report_kernel
    tensors = decode_tensors(device="cuda")
    q, pages, table, seqlens = (tensors[name] for name in NAMES[:4])

    def run():
        return cuda.decode(q, pages, table, seqlens, SPEC, config=config, return_lse=True)

    def batch_of(out):
        return out.view(torch.uint8).flatten()[120:124].view(torch.int32).item()

    results = []
    thread = threading.Thread(target=lambda: results.append(run()[0]))  # no current context there yet
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert batch_of(results[0]) == 2

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run()
        again, _ = run()
    out.zero_()
    again.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert batch_of(out) == batch_of(again) == 2
    workspaces = [x.view(torch.uint8).flatten()[96:104].view(torch.int64).item() for x in (out, again, results[0])]
    assert workspaces[0] == workspaces[1] != workspaces[2]  # a graph has its own


def test_kernels_of_the_other_kind_are_refused():
    with pytest.raises(InvalidArgument, match=r"kernel append_sm90a.*allowed are those of kind=decode"):
        native.function("workspace_bytes")(append_kernel(), 0)


@pytest.mark.gpu
def test_wrong_arch_is_a_typed_error():
    from bitdecoding.cute_kernels.config import device_arch

    arch = "sm80" if device_arch(0) != "sm80" else "sm89"
    name = KernelConfig(arch=arch, copy="cp_async", q_tile=16, stages=1).name()
    handle = native.function("add_kernel")(name, "report", reporting_ptx(), 160, 0, 0, 1)
    tensors = decode_tensors(device="cuda")
    workspace = torch.zeros(1 << 23, dtype=torch.uint8, device="cuda")
    with pytest.raises(bd.UnsupportedConfig, match=f"arch={arch}"):
        native.function("decode")(handle, *tensors.values(), workspace, NO_WINDOW, 0.25, 0.0, False, False)
