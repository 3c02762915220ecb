"""The PTX interpreter itself: instructions against Python integers and fp64, and faults that it must notice.

These tests are plain PTX text; tests/test_ptx_kernels.py runs what the DSL emits.
"""

import math
import struct

import numpy as np
import pytest
from ptx_interpreter import (
    BarrierMisuse,
    CopyInFlight,
    Deadlock,
    Divergence,
    Memory,
    OutOfBounds,
    PtxError,
    Race,
    StepLimit,
    Uninitialised,
    UnknownInstruction,
    parse,
    run,
)

SIZE = {"b16": 2, "b32": 4, "b64": 8}
DTYPE = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


def entry(body: str, params: str = ".param .u64 p0", registers: str = "") -> str:
    return f"""
.version 8.8
.target sm_90a
.address_size 64
.visible .entry kernel({params})
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>;
    {registers}
    {body}
}}
"""


def evaluate(instruction: str, inputs: list[tuple[str, list[int]]], output: str) -> list[int]:
    """Bits of {d} of one instruction for 32 lanes of inputs {0}, {1}, ...; shorter lists repeat."""
    letters = {"b16": "h", "b32": "r", "b64": "rd"}
    memory, addresses, loads = Memory(), [], []
    names = {}
    for i, (kind, values) in enumerate(inputs):
        array = np.array([values[j % len(values)] for j in range(32)], DTYPE[kind])
        addresses.append(memory.add(array, writable=False))
        names[str(i)] = f"%{letters[kind]}{i + 1}"
        loads.append(
            f"ld.param.b64 %rd10, [p{i}]; mad.wide.u32 %rd10, %r31, {SIZE[kind]}, %rd10;"
            f"ld.global.{kind} {names[str(i)]}, [%rd10];"
        )
    out = np.zeros(32, DTYPE[output])
    addresses.append(memory.add(out))
    body = "mov.u32 %r31, %tid.x;" + "".join(loads)
    body += instruction.replace("{d}", f"%{letters[output]}0")
    for name, register in names.items():
        body = body.replace(f"{{{name}}}", register)
    n = len(inputs)
    body += f"ld.param.b64 %rd10, [p{n}]; mad.wide.u32 %rd10, %r31, {SIZE[output]}, %rd10;"
    body += f"st.global.{output} [%rd10], %{letters[output]}0; ret;"
    run(entry(body, ", ".join(f".param .u64 p{i}" for i in range(n + 1))), None, (1,), (32,), addresses, 0, memory)
    return [int(v) for v in out]


def s32(x: int) -> int:
    return x - (1 << 32) if x & 0x80000000 else x


def f32(x: int) -> float:
    return struct.unpack("<f", struct.pack("<I", x))[0]


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


WORDS = [
    0,
    1,
    2,
    7,
    31,
    32,
    33,
    0x7F,
    0x80,
    0xFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0xFFFFFFFE,
    0xDEADBEEF,
    0x12345678,
]
OTHERS = [3, 0xFFFFFFFF, 5, 0, 31, 1, 0x80000000, 16, 0x0F0F0F0F, 9, 0x7FFFFFFF, 40, 0xFFFFFFF9, 2, 0x3254, 0x76543210]
THIRDS = [0, 0xFFFFFFFF, 0xAAAAAAAA, 4, 17, 0x100, 63]
MASK = 0xFFFFFFFF


def div_trunc(a: int, b: int) -> int:
    return int(math.copysign(abs(a) // abs(b), a * b)) if b else -1


INTEGER = {
    "add.s32 {d}, {0}, {1};": lambda a, b, c: a + b,
    "sub.s32 {d}, {0}, {1};": lambda a, b, c: a - b,
    "mul.lo.s32 {d}, {0}, {1};": lambda a, b, c: a * b,
    "mul.hi.u32 {d}, {0}, {1};": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 {d}, {0}, {1};": lambda a, b, c: s32(a) * s32(b) >> 32,
    "mad.lo.u32 {d}, {0}, {1}, {2};": lambda a, b, c: a * b + c,
    "div.u32 {d}, {0}, {1};": lambda a, b, c: a // b if b else MASK,
    "div.s32 {d}, {0}, {1};": lambda a, b, c: div_trunc(s32(a), s32(b)),
    "rem.u32 {d}, {0}, {1};": lambda a, b, c: a % b if b else a,
    "rem.s32 {d}, {0}, {1};": lambda a, b, c: s32(a) - div_trunc(s32(a), s32(b)) * s32(b) if s32(b) else a,
    "min.s32 {d}, {0}, {1};": lambda a, b, c: min(s32(a), s32(b)),
    "min.relu.s32 {d}, {0}, {1};": lambda a, b, c: max(min(s32(a), s32(b)), 0),
    "max.u32 {d}, {0}, {1};": lambda a, b, c: max(a, b),
    "neg.s32 {d}, {0};": lambda a, b, c: -a,
    "abs.s32 {d}, {0};": lambda a, b, c: abs(s32(a)),
    "and.b32 {d}, {0}, {1};": lambda a, b, c: a & b,
    "xor.b32 {d}, {0}, {1};": lambda a, b, c: a ^ b,
    "not.b32 {d}, {0};": lambda a, b, c: ~a,
    "shl.b32 {d}, {0}, {1};": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 {d}, {0}, {1};": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 {d}, {0}, {1};": lambda a, b, c: s32(a) >> min(b, 31),
    "shf.l.wrap.b32 {d}, {0}, {1}, {2};": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 {d}, {0}, {1}, {2};": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "lop3.b32 {d}, {0}, {1}, {2}, 0xEA;": lambda a, b, c: (a & b) | c,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x1D;": lambda a, b, c: sum(
        1 << i for i in range(32) if 0x1D >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1
    ),
    "bfe.u32 {d}, {0}, 4, 9;": lambda a, b, c: a >> 4 & 0x1FF,
    "bfe.s32 {d}, {0}, 28, 4;": lambda a, b, c: s32(a) >> 28,
    "bfi.b32 {d}, {0}, {1}, 8, 5;": lambda a, b, c: (b & ~(31 << 8)) | (a & 31) << 8,
    "brev.b32 {d}, {0};": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "popc.b32 {d}, {0};": lambda a, b, c: a.bit_count(),
    "clz.b32 {d}, {0};": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 {d}, {0};": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 {d}, {0};": lambda a, b, c: 32 - a.bit_length() if a else MASK,
    "prmt.b32 {d}, {0}, {1}, 0x7A20;": lambda a, b, c: int.from_bytes(
        bytes([(a & 255), (a >> 16 & 255), 255 * (a >> 23 & 1), (b >> 24)]), "little"),
    "{ .reg .pred q; setp.lt.s32 q, {0}, {1}; selp.b32 {d}, {0}, {1}, q; }": lambda a, b, c: min(s32(a), s32(b)),
    "{ .reg .pred q, z; setp.hi.u32 q|z, {0}, {1}; selp.u32 {d}, 1, 2, z; }": lambda a, b, c: 1 if a <= b else 2,
    "{ .reg .pred q; setp.eq.u32 q, {2}, 0; setp.ge.and.u32 q, {0}, {1}, !q; selp.u32 {d}, 1, 0, q; }":
        lambda a, b, c: int(a >= b and c != 0),
    "cvt.pack.sat.u4.s32.b32 {d}, {0}, {1}, {2};": (
        lambda a, b, c: c << 8 | min(max(s32(a), 0), 15) << 4 | min(max(s32(b), 0), 15)
    ),
    "cvt.u32.u8 {d}, {0};": lambda a, b, c: a & 255,
    "cvt.s32.s8 {d}, {0};": lambda a, b, c: (a & 255) - 256 * (a >> 7 & 1),
    "{ .reg .b16 l, h; mov.b32 {l, h}, {0}; mov.b32 {d}, {h, l}; }": lambda a, b, c: (a << 16) | a >> 16,
    "{ .reg .b64 w; mul.wide.s32 w, {0}, {1}; shr.s64 w, w, 7; cvt.u32.u64 {d}, w; }":
        lambda a, b, c: s32(a) * s32(b) >> 7,
    "{ .reg .b32 l; add.cc.u32 l, {0}, {1}; addc.u32 {d}, {2}, 0; }": lambda a, b, c: c + (a + b >> 32),
    "{ .reg .b32 l; sub.cc.u32 l, {0}, {1}; subc.u32 {d}, {2}, 0; }": lambda a, b, c: c - (a < b),
}  # fmt: skip


@pytest.mark.parametrize("instruction", INTEGER)
def test_integer_instruction(instruction):
    got = evaluate(instruction, [("b32", WORDS), ("b32", OTHERS), ("b32", THIRDS)], "b32")
    for i in range(32):
        a, b, c = WORDS[i % len(WORDS)], OTHERS[i % len(OTHERS)], THIRDS[i % len(THIRDS)]
        assert got[i] == INTEGER[instruction](a, b, c) & MASK, (hex(a), hex(b), hex(c))


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.1415927, 1e-20, -2e-39, 6e4, 7e7, 2.0**-24, math.inf, -math.inf, math.nan, 0.1]
SECONDS = [1.0, 2.0, -3.0, 0.1, 1e-20, 5.5, 1e30, -0.25, 2.0**-24, math.nan, 3.0]
A32, B32 = [bits(x) for x in FLOATS], [bits(x) for x in SECONDS]


def one_rounding(a: float, b: float, c: float) -> np.float32:
    """fma through exact rationals."""
    from fractions import Fraction

    if not all(map(math.isfinite, (a, b, c))):
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return np.float32(a * b + c)
    near = np.float32(float(exact))  # float() rounds once to fp64; look at the fp32 neighbours for the nearest
    if np.isinf(near):
        return near
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    finite = [x for x in candidates if np.isfinite(x)]
    return min(finite, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


FLOAT = {
    "add.f32 {d}, {0}, {1};": lambda a, b: np.float32(a) + np.float32(b),
    "sub.rn.f32 {d}, {0}, {1};": lambda a, b: np.float32(a) - np.float32(b),
    "mul.f32 {d}, {0}, {1};": lambda a, b: np.float32(a) * np.float32(b),
    "mul.ftz.f32 {d}, {0}, {1};": lambda a, b: (0.0 if abs(a) < 2.0**-126 else np.float32(a)) * np.float32(b),
    "fma.rn.f32 {d}, {0}, {1}, {1};": lambda a, b: one_rounding(a, b, b),
    "div.rn.f32 {d}, {0}, {1};": lambda a, b: np.float32(a) / np.float32(b),
    "max.f32 {d}, {0}, {1};": lambda a, b: np.fmax(np.float32(a), np.float32(b)),
    "min.NaN.f32 {d}, {0}, {1};": lambda a, b: np.minimum(np.float32(a), np.float32(b)),
    "abs.f32 {d}, {0};": lambda a, b: abs(a),
    "neg.f32 {d}, {0};": lambda a, b: -a,
    "ex2.approx.ftz.f32 {d}, {0};": lambda a, b: np.exp2(np.float64(a)),
    "lg2.approx.ftz.f32 {d}, {1};": lambda a, b: np.log2(np.float64(b)),
    "rcp.approx.ftz.f32 {d}, {1};": lambda a, b: 1 / np.float64(b),
    "sqrt.rn.f32 {d}, {0};": lambda a, b: np.sqrt(np.float64(a)),
    "tanh.approx.f32 {d}, {0};": lambda a, b: np.tanh(a),
    "cvt.rni.f32.f32 {d}, {0};": lambda a, b: np.rint(a),
    "{ .reg .pred q; setp.ltu.f32 q, {0}, {1}; selp.f32 {d}, 0f3F800000, 0f00000000, q; }":
        lambda a, b: float(not a >= b),
    "{ .reg .pred q; setp.gt.f32 q, {0}, {1}; selp.f32 {d}, 0f3F800000, 0f00000000, q; }": lambda a, b: float(a > b),
    "{ .reg .b16 h; cvt.rn.f16.f32 h, {0}; cvt.f32.f16 {d}, h; }": lambda a, b: np.float32(np.float16(a)),
}  # fmt: skip


@pytest.mark.parametrize("instruction", FLOAT)
def test_float_instruction(instruction):
    got = evaluate(instruction, [("b32", A32), ("b32", B32)], "b32")
    with np.errstate(all="ignore"):
        for i in range(32):
            a, b = f32(A32[i % len(A32)]), f32(B32[i % len(B32)])
            expected = np.float32(FLOAT[instruction](a, b))
            if "ftz" in instruction and abs(expected) < 2.0**-126:
                expected = np.copysign(np.float32(0), expected)
            assert np.array_equal(np.float32(f32(got[i])), expected, equal_nan=True), (a, b)


def test_fma_rounds_once():
    """Cases where fp64 arithmetic rounded to fp32 would round twice."""
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=32).astype(np.float32) for _ in range(2))
    c = (-(a.astype(np.float64) * b) * (1 + rng.choice([2.0**-24, 2.0**-25, 3 * 2.0**-30], 32))).astype(np.float32)
    inputs = [("b32", [int(v) for v in x.view(np.uint32)]) for x in (a, b, c)]
    got = np.array(evaluate("fma.rn.f32 {d}, {0}, {1}, {2};", inputs, "b32"), np.uint32).view(np.float32)
    assert [float(g) for g in got] == [float(one_rounding(*map(float, x))) for x in zip(a, b, c, strict=True)]


def test_conversions_between_integers_and_floats():
    words = [0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 16777217, 12345]
    got = evaluate("cvt.rn.f32.s32 {d}, {0};", [("b32", words)], "b32")
    assert [f32(x) for x in got[:7]] == [float(np.float32(s32(w))) for w in words]
    got = evaluate("cvt.rn.f32.u32 {d}, {0};", [("b32", words)], "b32")
    assert [f32(x) for x in got[:7]] == [float(np.float32(w)) for w in words]
    values = [1.5, 2.5, -1.5, 3e9, -3e9, math.nan, 0.99]
    got = evaluate("cvt.rni.s32.f32 {d}, {0};", [("b32", [bits(v) for v in values])], "b32")
    assert [s32(x) for x in got[:7]] == [2, 2, -2, 2**31 - 1, -(2**31), 0, 1]
    got = evaluate("cvt.rzi.u32.f32 {d}, {0};", [("b32", [bits(v) for v in values])], "b32")
    assert got[:7] == [1, 2, 0, 3000000000, 0, 0, 0]


def halves(low: float, high: float) -> int:
    return int(np.array([low, high], np.float16).view(np.uint32)[0])


PAIRS = [(1.0, -2.0), (0.1, 1e-7), (60000.0, 60000.0), (-0.0, 3.5), (2.0**-24, 2.0**-14), (math.nan, 1.0)]


@pytest.mark.parametrize(
    ("instruction", "reference"),
    [
        ("mul.rn.f16x2 {d}, {0}, {1};", lambda a, b: np.float16(np.float64(a) * np.float64(b))),
        ("add.f16x2 {d}, {0}, {1};", lambda a, b: np.float16(np.float64(a) + np.float64(b))),
        ("fma.rn.f16x2 {d}, {0}, {1}, {0};", lambda a, b: np.float16(np.float64(a) * np.float64(b) + np.float64(a))),
        ("max.f16x2 {d}, {0}, {1};", np.fmax),
        ("neg.f16x2 {d}, {0};", lambda a, b: -a),
        ("abs.f16x2 {d}, {0};", lambda a, b: abs(a)),
    ],
)
def test_packed_halves(instruction, reference):
    """Denormals are kept: the codes of the cache are denormals."""
    first, second = [halves(*p) for p in PAIRS], [halves(*p) for p in PAIRS[::-1]]
    got = np.array(evaluate(instruction, [("b32", first), ("b32", second)], "b32"), np.uint32).view(np.float16)
    with np.errstate(all="ignore"):
        for i in range(12):
            a, b = np.float16(PAIRS[i // 2][i % 2]), np.float16(PAIRS[::-1][i // 2][i % 2])
            assert np.array_equal(got[i], np.float16(reference(a, b)), equal_nan=True), (a, b)


def test_packing_conversions_put_the_first_operand_high():
    got = evaluate("cvt.rn.f16x2.f32 {d}, {0}, {1};", [("b32", A32), ("b32", B32)], "b32")
    with np.errstate(over="ignore"):
        assert got[3] == halves(SECONDS[3], FLOATS[3])
    got = evaluate(
        "cvt.rn.bf16x2.f32 {d}, {0}, {1};", [("b32", [bits(1.00390625)]), ("b32", [bits(-1.01171875)])], "b32"
    )
    assert got[0] == 0x3F80 << 16 | 0xBF82  # ties to even, both ways


# -- warps -----------------------------------------------------------------------------------------------------


def on_lanes(instruction: str, values: list[int]) -> list[int]:
    return evaluate(instruction, [("b32", values)], "b32")


def test_shuffles_and_votes():
    values = [1000 + i for i in range(32)]
    assert on_lanes("shfl.sync.bfly.b32 {d}, {0}, 5, 31, -1;", values) == [1000 + (i ^ 5) for i in range(32)]
    assert on_lanes("shfl.sync.up.b32 {d}, {0}, 3, 0, -1;", values) == [
        1000 + max(i - 3, i if i < 3 else 0) for i in range(32)
    ]
    assert on_lanes("shfl.sync.down.b32 {d}, {0}, 4, 31, -1;", values) == [
        1000 + (i + 4 if i < 28 else i) for i in range(32)
    ]
    # segments of 8: the clamp operand holds 0x18 as segment mask
    expected = [1000 + (i & 24 | 2) for i in range(32)]
    assert on_lanes("shfl.sync.idx.b32 {d}, {0}, 2, 0x181f, -1;", values) == expected
    text = "{ .reg .pred q, o; setp.gt.u32 q, {0}, 1029; vote.sync.%s o, q, -1; selp.u32 {d}, 1, 0, o; }"
    assert on_lanes(text % "any.pred", values)[0] == 1
    assert on_lanes(text % "all.pred", values)[0] == 0
    ballot = "{ .reg .pred q; setp.gt.u32 q, {0}, 1029; vote.sync.ballot.b32 {d}, q, -1; }"
    assert on_lanes(ballot, values) == [0xC0000000] * 32
    assert on_lanes("redux.sync.add.u32 {d}, {0}, -1;", values) == [sum(values)] * 32
    assert on_lanes("activemask.b32 {d};", values) == [MASK] * 32
    assert on_lanes("{ .reg .pred q; elect.sync _|q, -1; selp.u32 {d}, 1, 0, q; }", values) == [1] + [0] * 31


def test_movmatrix_transposes():
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    values = [int(v) for v in matrix.view(np.uint32).reshape(-1)]
    got = on_lanes("movmatrix.sync.aligned.m8n8.trans.b16 {d}, {0};", values)
    assert np.array_equal(np.array(got, np.uint32).view(np.uint16).reshape(8, 8), matrix.T)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_against_the_ptx_isa_fragments(kind):
    """Operands are placed by the ISA's formulas, element by element; fp16 denormals multiply exactly."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(-8, 9, (16, 16)).astype(np.float64), rng.integers(-8, 9, (16, 8)).astype(np.float64)
    if kind == "f16":
        a = np.abs(a) * 2.0**-24  # denormals
        to_bits = lambda x: int(np.float16(x).view(np.uint16))  # noqa: E731
    else:
        to_bits = lambda x: bits(x) >> 16  # noqa: E731
    c = rng.normal(size=(16, 8)).astype(np.float32)
    inputs = []
    for r in range(4):
        inputs.append(("b32", [
            to_bits(a[i // 4 + 8 * (r & 1), 2 * (i % 4) + 8 * (r >> 1)])
            | to_bits(a[i // 4 + 8 * (r & 1), 2 * (i % 4) + 1 + 8 * (r >> 1)]) << 16 for i in range(32)]))  # fmt: skip
    for r in range(2):
        inputs.append(("b32", [
            to_bits(b[2 * (i % 4) + 8 * r, i // 4]) | to_bits(b[2 * (i % 4) + 1 + 8 * r, i // 4]) << 16
            for i in range(32)]))  # fmt: skip
    for r in range(4):
        inputs.append(("b32", [bits(c[i // 4 + 8 * (r >> 1), 2 * (i % 4) + (r & 1)]) for i in range(32)]))
    text = (
        "{ .reg .b32 d<4>; mma.sync.aligned.m16n8k16.row.col.f32.%s.%s.f32 {d0, d1, d2, d3}, {{0}, {1}, {2}, {3}}, "
        "{{4}, {5}}, {{6}, {7}, {8}, {9}}; mov.b32 {d}, d%d; }"
    )
    expected = (a @ b + c).astype(np.float32)
    for r in range(4):
        got = evaluate(text % (kind, kind, r), inputs, "b32")
        for i in range(32):
            assert f32(got[i]) == expected[i // 4 + 8 * (r >> 1), 2 * (i % 4) + (r & 1)]


def test_ldmatrix_and_stmatrix():
    body = """
    .shared .align 16 .b8 tile[512];
    mov.u32 %r1, %tid.x; mov.b32 %r2, tile; shl.b32 %r3, %r1, 4; add.u32 %r4, %r2, %r3;
    shl.b32 %r5, %r1, 2; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 16, %rd1;
    ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd2];
    st.shared.v4.b32 [%r4], {%r6, %r7, %r8, %r9};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r10, %r11, %r12, %r13}, [%r4];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r10, %r11, %r12, %r13};
    bar.sync 0;
    ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r4];
    st.global.v4.b32 [%rd2], {%r6, %r7, %r8, %r9};
    ret;
    """
    data = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out, memory = data.copy(), Memory()
    run(entry(body), None, (1,), (32,), [memory.add(out)], 0, memory)
    assert np.array_equal(out, data.transpose(0, 2, 1))


# -- control flow and lanes that part ----------------------------------------------------------------------------


def run_words(body: str, words: np.ndarray, threads: int = 32, **options):
    """Run a body whose p0 is ``words`` (also the result)."""
    memory = Memory()
    return run(entry(body), None, options.pop("grid", (1,)), (threads,), [memory.add(words)], options.pop("smem", 0),
               memory, **options)  # fmt: skip


def test_divergent_loops_and_early_exit():
    """Every lane counts its own Collatz steps; lanes at 1 leave at once."""
    body = """
    mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;
    ld.global.u32 %r2, [%rd2]; mov.b32 %r3, 0;
LOOP:
    setp.eq.u32 %p1, %r2, 1; @%p1 bra DONE;
    and.b32 %r4, %r2, 1; setp.eq.u32 %p2, %r4, 0;
    @%p2 bra EVEN;
    mad.lo.u32 %r2, %r2, 3, 1; bra NEXT;
EVEN: shr.u32 %r2, %r2, 1;
NEXT: add.u32 %r3, %r3, 1; bra.uni LOOP;
DONE: st.global.u32 [%rd2], %r3; ret;
    """

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    words = np.arange(1, 33, dtype=np.uint32)
    run_words(body, words)
    assert words.tolist() == [steps(n) for n in range(1, 33)]


def test_lanes_meet_again_at_a_collective():
    """A shuffle after two branches of different length takes all lanes at once."""
    body = """
    mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;
    setp.lt.u32 %p1, %r1, 7; @%p1 bra SHORT;
    add.u32 %r2, %r1, 100; add.u32 %r2, %r2, 0; bra MEET;
SHORT: mov.b32 %r2, 5;
MEET: shfl.sync.idx.b32 %r3, %r2, 20, 31, -1;
    st.global.u32 [%rd2], %r3; ret;
    """
    words = np.zeros(32, np.uint32)
    run_words(body, words)
    assert (words == 120).all()


def test_brx_and_local_memory():
    body = """
    .local .align 8 .b8 depot[16];
    mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;
    mov.b64 %rd3, depot; cvta.local.u64 %rd4, %rd3;
    st.local.u32 [depot+4], %r1; ld.u32 %r2, [%rd4+4];
    and.b32 %r3, %r2, 3;
table: .branchtargets A, B, A, C;
    brx.idx %r3, table;
A: mov.b32 %r4, 10; bra END;
B: mov.b32 %r4, 20; bra END;
C: mov.b32 %r4, 30;
END: st.global.u32 [%rd2], %r4; ret;
    """
    words = np.zeros(32, np.uint32)
    run_words(body, words)
    assert words.tolist() == [(10, 20, 10, 30)[i % 4] for i in range(32)]


def test_a_collective_without_all_its_lanes():
    start = "mov.u32 %r1, %tid.x; setp.gt.u32 %p1, %r1, 3; @%p1 bra X; "
    elsewhere = "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1; ret; X: vote.sync.any.pred %p2, %p1, -1; ret;"
    with pytest.raises(Deadlock, match=r"lanes \[4, 5.*at 'shfl"):
        run_words(start + elsewhere, np.zeros(1, np.uint32))
    with pytest.raises(Divergence, match="not in their member mask 0x7"):
        run_words(start + "shfl.sync.idx.b32 %r2, %r1, 0, 31, 7; X: ret;", np.zeros(1, np.uint32))
    with pytest.raises(Divergence, match="reads a lane that takes no part"):
        run_words(start + "shfl.sync.idx.b32 %r2, %r1, 9, 31, 15; X: ret;", np.zeros(1, np.uint32))


# -- faults ------------------------------------------------------------------------------------------------------

ADDRESS = "mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;"


def test_global_accesses_stay_in_their_buffer():
    with pytest.raises(OutOfBounds, match="offset 124 of 'buffer 0', which has 124 bytes"):
        run_words(ADDRESS + "st.global.u32 [%rd2], %r1; ret;", np.zeros(31, np.uint32))
    with pytest.raises(OutOfBounds, match="misaligned"):
        run_words(ADDRESS + "ld.global.u32 %r2, [%rd2+2]; ret;", np.zeros(40, np.uint32))
    with pytest.raises(OutOfBounds, match="in no buffer"):
        run_words(ADDRESS + "mov.b64 %rd2, 0; ld.global.u32 %r2, [%rd2]; ret;", np.zeros(40, np.uint32))
    memory = Memory()
    constant = memory.add(np.zeros(32, np.uint32), writable=False)
    with pytest.raises(OutOfBounds, match="read-only"):
        run(entry(ADDRESS + "st.global.u32 [%rd2], %r1; ret;"), None, (1,), (32,), [constant], 0, memory)
    unwritten = memory.add(np.zeros(32, np.uint32), initialised=False)
    with pytest.raises(Uninitialised):
        run(entry(ADDRESS + "ld.global.u32 %r2, [%rd2]; ret;"), None, (1,), (32,), [unwritten], 0, memory)


def test_an_error_says_where():
    with pytest.raises(OutOfBounds) as error:
        run_words(ADDRESS + "\n st.global.u32 [%rd2], %r1; ret;", np.zeros(31, np.uint32))
    for part in ("CTA (0, 0, 0)", "warp 0", "line 10", "st.global.u32 [%rd2], %r1"):
        assert part in str(error.value)


EXCHANGE = """
    .shared .align 4 .b8 buffer[256];
    mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;
    mov.b32 %r2, buffer; mad.lo.u32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1;
    BARRIER
    sub.u32 %r4, 63, %r1; mad.lo.u32 %r5, %r4, 4, %r2; ld.shared.u32 %r6, [%r5];
    st.global.u32 [%rd2], %r6; ret;
"""


def test_exchange_through_shared_memory_needs_a_barrier():
    words = np.zeros(64, np.uint32)
    run_words(EXCHANGE.replace("BARRIER", "bar.sync 0;"), words, threads=64)
    assert words.tolist() == list(range(63, -1, -1))
    with pytest.raises((Uninitialised, Race)):
        run_words(EXCHANGE.replace("BARRIER", ""), words, threads=64)


def test_races_are_found_whatever_the_order():
    """The value read happens to be there, and still nothing says so."""
    body = EXCHANGE.replace("BARRIER", "setp.lt.u32 %p1, %r1, 32; @%p1 bra END;").replace("st.global", "END: st.global")
    with pytest.raises(Race, match="read of shared bytes that warp 0 wrote"):
        run_words(body, np.zeros(64, np.uint32), threads=64)
    overwrite = """.shared .align 4 .b8 x[4]; mov.u32 %r1, %tid.x; st.shared.u32 [x], %r1; ret;"""
    with pytest.raises(Race, match="write of shared bytes that warp 0 wrote"):
        run_words(overwrite, np.zeros(1, np.uint32), threads=64)


def test_shared_memory_has_an_end():
    with pytest.raises(OutOfBounds, match="offset 256 of shared memory, which has 256 bytes"):
        run_words(EXCHANGE.replace("sub.u32 %r4, 63", "sub.u32 %r4, 64").replace("BARRIER", "bar.sync 0;"),
                  np.zeros(64, np.uint32), threads=64)  # fmt: skip


def test_barriers_that_nobody_else_reaches():
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra W; bar.sync 2, 96; W: ret;"
    with pytest.raises(Deadlock, match="barrier 2, 32 of 96 threads"):
        run_words(body, np.zeros(1, np.uint32), threads=64)
    with pytest.raises(Divergence, match="elsewhere at an aligned barrier"):
        run_words(body.replace("r1, 32", "r1, 16"), np.zeros(1, np.uint32), threads=64)


def test_endless_loops_end():
    with pytest.raises(StepLimit):
        run_words("L: bra L;", np.zeros(1, np.uint32), max_steps=1000)


def test_unknown_things_are_named():
    with pytest.raises(UnknownInstruction, match=r"line 9: tcgen05"):
        run_words("tcgen05.wait::ld.sync.aligned; ret;", np.zeros(1, np.uint32))
    with pytest.raises(UnknownInstruction, match=r"modifier .rz"):
        run_words("add.rz.f32 %r1, %r2, %r3; ret;", np.zeros(1, np.uint32))
    with pytest.raises(PtxError, match="no label"):
        run_words("bra NOWHERE;", np.zeros(1, np.uint32))
    with pytest.raises(PtxError, match=r"no \.entry"):
        parse(".version 8.8")


# -- mbarriers and asynchronous copies ---------------------------------------------------------------------------

# Warp 0 copies 512 bytes to shared memory, warp 1 adds 1 and stores them back.
BULK = """
    .shared .align 128 .b8 buffer[512];
    .shared .align 8 .b8 full[8];
    mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mov.b32 %r2, full; mov.b32 %r3, buffer;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra INITIALISED;
    mbarrier.init.shared.b64 [%r2], 1;
    fence.mbarrier_init.release.cluster;
INITIALISED:
    bar.sync 0;
    setp.ge.u32 %p2, %r1, 32; @%p2 bra CONSUME;
    @%p1 bra END;
    mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 512, [%r2];
    bra END;
CONSUME:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0;
    @!%p3 bra CONSUME;
    sub.u32 %r4, %r1, 32; shl.b32 %r4, %r4, 4; add.u32 %r5, %r3, %r4; cvt.u64.u32 %rd4, %r4; add.u64 %rd5, %rd1, %rd4;
    ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5];
    add.u32 %r6, %r6, 1; add.u32 %r7, %r7, 1; add.u32 %r8, %r8, 1; add.u32 %r9, %r9, 1;
    st.global.v4.u32 [%rd5], {%r6, %r7, %r8, %r9};
END: ret;
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("async_copies", ["late", "early"])
def test_bulk_copy_with_mbarrier(async_copies, seed):
    words = np.arange(128, dtype=np.uint32)
    statistics = run_words(BULK, words, threads=64, async_copies=async_copies, seed=seed)
    assert np.array_equal(words, np.arange(1, 129))
    assert statistics.instructions["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"] == 1
    assert statistics.max_bulk_bytes_in_flight == 512


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("@!%p3 bra CONSUME;", ""), CopyInFlight),  # does not wait
        (("[%r2], 0;", "[%r2], 1;"), CopyInFlight),  # the phase before: over at once
        (("mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2], 512", "mbarrier.arrive.shared.b64 %rd3, [%r2]"), PtxError),
        ((".expect_tx.shared.b64 %rd3, [%r2], 512", ".expect_tx.shared.b64 %rd3, [%r2], 528"), Deadlock),
        (("[%r2], 1;\n    fence", "[%r2], 2;\n    fence"), Deadlock),  # one arrival missing
        (("bar.sync 0;", ""), PtxError),  # the barrier may not be initialised yet
        (("[%rd1], 512, [%r2]", "[%rd1], 520, [%r2]"), OutOfBounds),  # not a multiple of 16
        (("[%rd1], 512, [%r2]", "[%rd1], 528, [%r2]"), OutOfBounds),  # beyond both ends
        (("[%r3], [%rd1]", "[%r3+8], [%rd1]"), OutOfBounds),
        (("fence.mbarrier_init", "st.shared.u32 [%r2], %r1; fence.mbarrier_init"), BarrierMisuse),
        (("fence.mbarrier_init", "mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init"), BarrierMisuse),
    ],
)
def test_planted_faults_in_a_bulk_copy(change, error):
    assert change[0] in BULK
    with pytest.raises(error):
        run_words(BULK.replace(*change), np.arange(128, dtype=np.uint32), threads=64)


def test_a_missing_wait_is_found_although_the_data_are_there():
    """Copies that land at once: only the vector clocks know."""
    words = np.arange(128, dtype=np.uint32)
    body = BULK.replace("mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0;", "").replace("@!%p3 bra CONSUME;", "")
    with pytest.raises(Race, match="a bulk copy wrote"):
        run_words(body, words, threads=64, async_copies="early")
    with pytest.raises(Deadlock, match="parity 1: phase 1"):
        run_words(BULK.replace("[%r2], 0;", "[%r2], 1;"), words, threads=64, async_copies="early")


def test_a_cta_must_not_end_before_its_copies():
    body = BULK.replace("CONSUME:", "CONSUME: ret;")
    with pytest.raises(CopyInFlight, match="ended with 1 bulk copies in flight"):
        run_words(body, np.arange(128, dtype=np.uint32), threads=64)


# 32 lanes copy 16 bytes each in two groups, then read what a neighbour lane copied.
CP_ASYNC = """
    .shared .align 16 .b8 buffer[1024];
    mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 16, %rd1;
    mov.b32 %r2, buffer; mad.lo.u32 %r3, %r1, 16, %r2;
    cp.async.cg.shared.global [%r3], [%rd2], 16;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r3+512], [%rd2+512], 16, SIZE;
    cp.async.commit_group;
    cp.async.wait_group FIRST;
    ld.shared.u32 %r4, [%r3];
    cp.async.wait_group SECOND;
    ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3+512];
    add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r8;
    st.global.u32 [%rd2], %r4; ret;
"""


def cp_async(first: int, second: int, size: int = 16) -> str:
    return CP_ASYNC.replace("FIRST", str(first)).replace("SECOND", str(second)).replace("SIZE", str(size))


@pytest.mark.parametrize("async_copies", ["late", "early"])
@pytest.mark.parametrize("size", [16, 4, 0])
def test_cp_async_groups_and_zero_fill(async_copies, size):
    words = np.arange(256, dtype=np.uint32)
    run_words(cp_async(1, 0, size), words, async_copies=async_copies)
    lane = np.arange(32)
    expected = 4 * lane + (128 + 4 * lane) * (size >= 4) + (131 + 4 * lane) * (size == 16)
    assert np.array_equal(words[:128:4], expected)


def test_cp_async_that_nobody_waits_for():
    for first, second in ((2, 0), (1, 1)):
        with pytest.raises(CopyInFlight):
            run_words(cp_async(first, second), np.arange(256, dtype=np.uint32))


# -- CTAs that depend on each other ------------------------------------------------------------------------------

# Every CTA (64 threads) stores partial results; the one that arrives last adds them up.
LAST_ARRIVER = """
    .shared .align 4 .b8 flag[4];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; ld.param.b64 %rd1, [p0];
    mad.lo.u32 %r4, %r2, 64, %r1; add.u32 %r5, %r4, 1; mad.wide.u32 %rd2, %r4, 4, %rd1;
    st.global.u32 [%rd2+256], %r5;
    BARRIER
    setp.ne.u32 %p1, %r1, 0; @%p1 bra WAIT;
    ATOMIC %r6, [%rd1], 1;
    sub.u32 %r7, %r3, 1; setp.eq.u32 %p2, %r6, %r7; selp.u32 %r8, 1, 0, %p2; st.shared.u32 [flag], %r8;
WAIT: bar.sync 0;
    ld.shared.u32 %r8, [flag]; setp.eq.u32 %p3, %r8, 0; @%p3 bra END;
    mov.b32 %r9, 0; mov.b32 %r10, 0; mad.wide.u32 %rd4, %r1, 4, %rd1;
SUM: ld.global.cg.u32 %r11, [%rd4+256]; add.u32 %r9, %r9, %r11; add.u64 %rd4, %rd4, 256; add.u32 %r10, %r10, 1;
    setp.lt.u32 %p4, %r10, %r3; @%p4 bra SUM;
    mad.wide.u32 %rd5, %r1, 4, %rd1; st.global.u32 [%rd5+1280], %r9;
END: ret;
"""
ACQ_REL = LAST_ARRIVER.replace("BARRIER", "bar.sync 0;").replace("ATOMIC", "atom.acq_rel.gpu.global.add.u32")
FENCED = LAST_ARRIVER.replace("BARRIER", "bar.sync 0;").replace(
    "ATOMIC %r6, [%rd1], 1;", "fence.acq_rel.gpu; atom.relaxed.gpu.global.add.u32 %r6, [%rd1], 1; fence.acq_rel.gpu;"
)


@pytest.mark.parametrize("order", ["interleaved", "sequential", "reversed", (2, 0, 3, 1)])
@pytest.mark.parametrize("body", [ACQ_REL, FENCED], ids=["acq_rel", "fenced"])
def test_last_arriver_merges(body, order):
    words = np.zeros(64 + 256 + 64, np.uint32)
    run_words(body, words, threads=64, grid=(4,), cta_order=order)
    assert np.array_equal(words[320:], [sum(64 * c + i + 1 for c in range(4)) for i in range(64)])


@pytest.mark.parametrize("order", ["interleaved", "reversed"])
@pytest.mark.parametrize(
    "body",
    [
        LAST_ARRIVER.replace("BARRIER", "bar.sync 0;").replace("ATOMIC", "atom.global.add.u32"),  # relaxed
        LAST_ARRIVER.replace("BARRIER", "").replace("ATOMIC", "atom.acq_rel.gpu.global.add.u32"),  # other warps' stores
        FENCED.replace("fence.acq_rel.gpu;", "", 1),
    ],
    ids=["relaxed", "no barrier", "no fence"],
)
def test_a_merge_without_order_is_a_race(body, order):
    with pytest.raises(Race):
        run_words(body, np.zeros(384, np.uint32), threads=64, grid=(4,), cta_order=order)


def test_one_lane_cannot_release_what_others_did():
    """The arrive of lane 0 does not cover the reads of lanes 1..31 unless the warp met before."""
    body = BULK.replace("END: ret;", "END:").replace(
        "mbarrier.init.shared.b64 [%r2], 1;", "mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [empty], 1;"
    ).replace("buffer[512];", "buffer[512]; .shared .align 8 .b8 empty[8];")  # fmt: skip
    body += """
    setp.ge.u32 %p2, %r1, 32; @%p2 bra HAND_OVER;
    @%p1 bra OUT;
AGAIN: mbarrier.try_wait.parity.shared.b64 %p3, [empty], 0; @!%p3 bra AGAIN;
    st.shared.u32 [%r3+64], %r1;
    bra OUT;
HAND_OVER:
    SYNC
    setp.ne.u32 %p4, %r1, 32; @%p4 bra OUT;
    mbarrier.arrive.shared.b64 %rd7, [empty];
OUT: ret;
    """
    # the first part writes in place what the copy reads: give it its own results to keep to one question
    body = body.replace("st.global.v4.u32 [%rd5], {%r6, %r7, %r8, %r9};", "")
    run_words(body.replace("SYNC", "bar.warp.sync -1;"), np.zeros(128, np.uint32), threads=64)
    with pytest.raises(Race, match="write of shared bytes that warp 1 read"):
        run_words(body.replace("SYNC", ""), np.zeros(128, np.uint32), threads=64)


def test_atomics():
    body = (
        ADDRESS
        + """
    and.b32 %r2, %r1, 1; mad.wide.u32 %rd3, %r2, 4, %rd1;
    atom.global.add.u32 %r3, [%rd3], %r1; red.global.max.u32 [%rd1+8], %r1; atom.global.exch.b32 %r4, [%rd1+12], %r1;
    atom.global.cas.b32 %r5, [%rd1+16], 0, %r1; atom.global.inc.u32 %r6, [%rd1+20], 4;
    ret;
    """
    )
    words = np.zeros(8, np.uint32)
    run_words(body, words)
    # add by parity; the last lane's exchange; the first non-zero value stays; 32 steps modulo 5
    assert words.tolist() == [240, 256, 31, 31, 1, 32 % 5, 0, 0]


def test_bank_conflicts_are_counted():
    body = """.shared .align 16 .b8 x[4096]; mov.u32 %r1, %tid.x; mov.b32 %r2, x; mad.lo.u32 %r3, %r1, STRIDE, %r2;
    st.shared.u32 [%r3], %r1; ret;"""
    for stride, extra in ((4, 0), (8, 1), (128, 31)):
        statistics = run_words(body.replace("STRIDE", str(stride)), np.zeros(1, np.uint32), count_conflicts=True)
        assert list(statistics.shared_wavefronts.values()) == [extra]
