"""Instructions that touch only registers: each builder decodes once and returns ``f(warp, mask)``.

Operands become slots, indices into ``warp.r``: typed NumPy views of register rows (one element per lane, two for
packed halves), constants and special registers. ``mask`` is None when all 32 lanes take part.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from . import numerics as nm
from .errors import Divergence, PtxError, UnknownInstruction
from .parser import TYPE_BYTES, Immediate, Instruction, Not, Pair, Register, Symbol, Vector

DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64,
    "f16x2": np.float16, "bf16x2": np.uint16,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
LANES = np.arange(32)
GARBAGE = {
    n: np.full(32, 0xBAADF00DBAADF00D >> (64 - 8 * min(n, 8)), UNSIGNED.get(n, np.uint64)) for n in (2, 4, 8, 16)
}
GARBAGE[1] = np.zeros(32, bool)  # of a register of n bytes that nobody wrote

Run = Callable[["object", "np.ndarray | None"], None]
BUILDERS: dict[str, Callable[[Decoder, Instruction, Modifiers], Run]] = {}
CONTROL: dict[str, Callable] = {}  # those that set the program counter: (decoder, instruction, modifiers, entry) -> f
COLLECTIVES: dict[str, int | None] = {}  # opcode -> operand with the member mask; None: all lanes


class Modifiers:
    """The parts of an opcode; what no one takes is an unknown instruction."""

    def __init__(self, parts: list[str]):
        self.base, self.rest = parts[0], parts[1:]

    def flag(self, *names: str) -> bool:
        found = [n for n in names if n in self.rest]
        for n in found:
            self.rest.remove(n)
        return bool(found)

    def one_of(self, names, default: str | None = None) -> str:
        for n in self.rest:
            if n in names:
                self.rest.remove(n)
                return n
        if default is None:
            raise UnknownInstruction(f"one of {', '.join(names)} expected")
        return default

    def type(self) -> str:
        """The last type of those that are left."""
        for i in reversed(range(len(self.rest))):
            if self.rest[i] in DTYPES:
                return self.rest.pop(i)
        raise UnknownInstruction("no type")

    def finish(self) -> None:
        if self.rest:
            raise UnknownInstruction(f"modifier {', '.join('.' + r for r in self.rest)}")


class Decoder:
    """Assigns slots to operands; a warp has a row for each that it comes to."""

    def __init__(self, symbols: dict[str, int]):
        self.symbols = symbols  # addresses of variables and parameters
        self.slots: dict[tuple, int] = {}
        # per slot: ("reg", its index, row before the first write) | ("const", None, row) | ("special", name, dtype)
        self.plan: list[tuple] = []

    def _slot(self, key: tuple, plan: tuple) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.plan)
            self.plan.append(plan)
        return self.slots[key]

    def register(self, register: Register, dtype) -> int:
        dtype = np.dtype(dtype)
        key = ("reg", register.index, dtype)
        if key in self.slots:
            return self.slots[key]
        return self._slot(key, ("reg", register.index, GARBAGE[TYPE_BYTES[register.type]].view(dtype)))

    def constant(self, value: int, dtype, packed: bool = False) -> int:
        """A row of one bit pattern, seen as ``dtype``."""
        dtype = np.dtype(dtype)
        if dtype == np.bool_:
            return self._slot(("const", bool(value), dtype), ("const", None, np.full(32, bool(value))))
        size = 4 if packed else dtype.itemsize
        row = np.full(32, value & ((1 << 8 * size) - 1), UNSIGNED[size]).view(dtype)
        row.flags.writeable = False
        return self._slot(("const", value, dtype, packed), ("const", None, row))

    def source(self, operand, kind: str) -> int:
        """Slot of a source operand of a type."""
        dtype, packed = np.dtype(DTYPES[kind]), kind.endswith("x2")
        if isinstance(operand, Register):
            wide = TYPE_BYTES[operand.type]
            if wide != TYPE_BYTES[kind]:
                raise UnknownInstruction(f"register {operand.name} (.{operand.type}) read as .{kind}")
            return self.register(operand, dtype)
        if isinstance(operand, Immediate):
            return self.constant(immediate_bits(operand.text, kind), dtype, packed)
        if isinstance(operand, Symbol):
            if operand.name in self.symbols:
                return self.constant(self.symbols[operand.name], dtype)
            if operand.name.startswith("%"):
                return self._slot(("special", operand.name, dtype), ("special", operand.name, dtype))
            raise PtxError(f"unknown name {operand.name!r}")
        raise UnknownInstruction(f"operand {operand}")

    def destination(self, operand, kind: str) -> int | None:
        """Slot to assign values of a type to; wider registers are extended; None for ``_``."""
        if operand is None or (isinstance(operand, Symbol) and operand.name == "_"):
            return None
        if not isinstance(operand, Register):
            raise UnknownInstruction(f"destination {operand}")
        wide = TYPE_BYTES[operand.type]
        if kind.endswith("x2"):
            return self.register(operand, np.uint32)
        if wide == TYPE_BYTES[kind]:
            return self.register(operand, DTYPES[kind])
        if wide < TYPE_BYTES[kind] or kind in ("pred", "f16", "bf16", "f32"):
            raise UnknownInstruction(f"register {operand.name} (.{operand.type}) written as .{kind}")
        return self.register(operand, (SIGNED if kind[0] == "s" else UNSIGNED)[wide])

    def truncated(self, operand, kind: str) -> Callable:
        """r -> values of a type; the register may be wider (cvt, st)."""
        if isinstance(operand, Register) and TYPE_BYTES[operand.type] > TYPE_BYTES[kind]:
            slot, dtype = self.register(operand, UNSIGNED[TYPE_BYTES[operand.type]]), DTYPES[kind]
            unsigned = UNSIGNED[TYPE_BYTES[kind]]
            return lambda r: r[slot].astype(unsigned).view(dtype)
        slot = self.source(operand, kind)
        return lambda r: r[slot]


def immediate_bits(text: str, kind: str) -> int:
    """The bit pattern of an immediate in a type."""
    size = TYPE_BYTES[kind]
    negative, digits = text.startswith("-"), text.lstrip("+-")
    if digits[:2] in ("0f", "0F") and len(digits) == 10:
        bits = int(digits[2:], 16) ^ (1 << 31 if negative else 0)
        if kind == "f64":
            value = struct.unpack("<f", struct.pack("<I", bits))[0]
            return int.from_bytes(struct.pack("<d", value), "little")
        return bits
    if digits[:2] in ("0d", "0D") and len(digits) == 18:
        bits = int(digits[2:], 16) ^ (1 << 63 if negative else 0)
        if kind == "f32":
            value = struct.unpack("<d", struct.pack("<Q", bits))[0]
            return int(np.float32(value).view(np.uint32))
        return bits
    if kind in ("f32", "f64"):
        return int.from_bytes(struct.pack("<f" if size == 4 else "<d", float(text)), "little")
    digits = digits.rstrip("uU")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8) if octal else int(digits, 0)
    value = -value if negative else value
    return value & ((1 << 8 * max(size, 1)) - 1) if kind != "pred" else value


def store(row: np.ndarray, value, mask: np.ndarray | None) -> None:
    if mask is None:
        row[...] = value
    else:
        np.copyto(row, value, where=mask, casting="unsafe")


def assign(slot: int | None, compute: Callable) -> Run:
    """``r[slot] = compute(r)`` for the lanes of the mask."""
    if slot is None:
        return lambda w, m: None

    def run(w, m):
        r = w.r
        if m is None:
            r[slot][...] = compute(r)
        else:
            np.copyto(r[slot], compute(r), where=m, casting="unsafe")

    return run


def elementwise(slot: int | None, f: np.ufunc, a: int, b: int) -> Run:
    """``assign`` of a ufunc of two rows, which writes its result itself where all lanes take part."""
    if slot is None:
        return lambda w, m: None

    def run(w, m):
        r = w.r
        if m is None:
            f(r[a], r[b], out=r[slot])
        else:
            np.copyto(r[slot], f(r[a], r[b]), where=m, casting="unsafe")

    return run


def builder(*names: str):
    def register(f):
        for name in names:
            BUILDERS[name] = f
        return f

    return register


def control(*names: str):
    """As ``builder``, for instructions that set the program counter; they also get the entry."""

    def register(f):
        for name in names:
            CONTROL[name] = f
        return f

    return register


def collective(*names: str, members: int | None = None):
    """As ``builder``, for instructions that need all their lanes at once."""

    def register(f):
        for name in names:
            BUILDERS[name] = f
            COLLECTIVES[name] = members
        return f

    return register


def is_float(kind: str) -> bool:
    return "f" in kind


def is_half(kind: str) -> bool:
    return kind in ("f16", "bf16", "f16x2", "bf16x2")


def _float_result(kind: str, ftz: bool, sat: bool, relu: bool = False) -> Callable:
    """The exact or odd-rounded fp64/fp32 result -> what the destination of a type takes."""

    def finish(x):
        if kind in ("bf16", "bf16x2"):
            y = nm.f64_to_bf16(np.asarray(x, np.float64))
            if relu:
                y = np.where(nm.bf16_to_f32(y) > 0, y, np.uint16(0))
        else:
            y = x.astype(DTYPES[kind])
            if relu:
                y = np.where(np.isnan(y), y, np.maximum(y, DTYPES[kind](0)))
        if ftz and kind == "f32":
            y = nm.flush(y)
        if sat:
            y = np.where(np.isnan(y), DTYPES[kind](0), np.clip(y, DTYPES[kind](0), DTYPES[kind](1)))
        return y.view(np.uint32) if kind.endswith("x2") else y

    return finish


def _float_source(d: Decoder, operand, kind: str, ftz: bool) -> Callable:
    """r -> operand as floating-point numbers."""
    slot = d.source(operand, kind)
    if kind in ("bf16", "bf16x2"):
        return lambda r: nm.bf16_to_f32(r[slot])
    if ftz and kind == "f32":
        return lambda r: nm.flush(r[slot])
    return lambda r: r[slot]


def _float_op(d: Decoder, ins: Instruction, m: Modifiers, f: Callable, exact_in_f64: bool = False) -> Run:
    """Elementwise f in the type's own precision (halves: exactly, then rounded once)."""
    kind = m.type()
    m.one_of(("rn", "approx", "full"), "rn")
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    m.flag("noftz")
    m.finish()
    sources = [_float_source(d, o, kind, ftz) for o in ins.operands[1:]]
    finish = _float_result(kind, ftz, sat, relu)
    wide = exact_in_f64 or is_half(kind)

    def compute(r):
        x = [s(r) for s in sources]
        return finish(f(*(v.astype(np.float64) for v in x)) if wide else f(*x))

    plain = kind in ("f32", "f64") and not (ftz or sat or relu or exact_in_f64)
    slot = d.destination(ins.operands[0], kind)
    if plain and len(ins.operands) == 3 and isinstance(f, np.ufunc):
        a, b = (d.source(o, kind) for o in ins.operands[1:])
        return elementwise(slot, f, a, b)
    return assign(slot, compute)


def _integer_op(d: Decoder, ins: Instruction, m: Modifiers, f: Callable, kind: str) -> Run:
    m.finish()
    slots = [d.source(o, kind) for o in ins.operands[1:]]
    slot = d.destination(ins.operands[0], kind)
    if len(slots) == 2 and isinstance(f, np.ufunc):
        return elementwise(slot, f, *slots)
    return assign(slot, lambda r: f(*(r[s] for s in slots)))


def _peek_type(m: Modifiers) -> str:
    return [p for p in m.rest if p in DTYPES][-1]


def _wide(kind: str) -> np.dtype:
    return np.dtype((SIGNED if kind[0] == "s" else UNSIGNED)[2 * TYPE_BYTES[kind]])


def multiply(kind: str, part: str) -> Callable:
    """Integer product: "lo", "hi" or "wide"."""
    bits = 8 * TYPE_BYTES[kind]
    if part == "lo":
        return np.multiply
    if bits == 64:
        signed = kind[0] == "s"

        def high(a, b):
            product = (a.astype(object) * b.astype(object)) >> 64  # Python integers
            return product.astype(np.int64 if signed else np.uint64)

        return high
    wide = _wide(kind)
    if part == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide)
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)


@builder("add", "sub")
def _add(d, ins, m):
    kind, f = _peek_type(m), np.add if m.base == "add" else np.subtract
    if is_float(kind):
        return _float_op(d, ins, m, f)
    m.type()
    if m.flag("cc"):
        return _carry(d, ins, kind, subtract=m.base == "sub", carry_in=False, carry_out=True)
    if m.flag("sat"):
        info = np.iinfo(np.int32)
        return _integer_op(d, ins, m, lambda a, b: np.clip(f(a, b, dtype=np.int64), info.min, info.max), kind)
    return _integer_op(d, ins, m, f, kind)


@builder("addc", "subc")
def _addc(d, ins, m):
    kind, out = m.type(), m.flag("cc")
    m.finish()
    return _carry(d, ins, kind, subtract=m.base == "subc", carry_in=True, carry_out=out)


def _carry(d, ins, kind, subtract: bool, carry_in: bool, carry_out: bool) -> Run:
    kind = "u" + kind[1:]
    a, b = (d.source(o, kind) for o in ins.operands[1:3])
    slot = d.destination(ins.operands[0], kind)

    def run(w, m):
        x, y = w.r[a], w.r[b]
        y = ~y if subtract else y  # x - y = x + ~y + 1
        carry = w.carry if carry_in else np.full(32, subtract)
        first = x + y
        total = first + carry.astype(x.dtype)
        if carry_out:
            store(w.carry, (first < x) | (total < first), m)
        store(w.r[slot], total, m)

    return run


@builder("mul", "mul24")
def _mul(d, ins, m):
    kind = _peek_type(m)
    if is_float(kind):
        return _float_op(d, ins, m, np.multiply)
    m.type()
    part = m.one_of(("lo", "hi", "wide"))
    m.finish()
    f = multiply(kind, part)
    a, b = (d.source(o, kind) for o in ins.operands[1:])
    out = kind if part != "wide" else f"{kind[0]}{16 * TYPE_BYTES[kind]}"
    return assign(d.destination(ins.operands[0], out), lambda r: f(r[a], r[b]))


@builder("mad")
def _mad(d, ins, m):
    kind = m.type()
    if is_float(kind):
        m.rest.append(kind)
        return _fma(d, ins, m)
    part = m.one_of(("lo", "hi", "wide"))
    m.finish()
    f = multiply(kind, part)
    out = kind if part != "wide" else f"{kind[0]}{16 * TYPE_BYTES[kind]}"
    a, b = (d.source(o, kind) for o in ins.operands[1:3])
    c = d.source(ins.operands[3], out)
    return assign(d.destination(ins.operands[0], out), lambda r: f(r[a], r[b]) + r[c])


@builder("fma")
def _fma(d, ins, m):
    if _peek_type(m) == "f64":
        return _float_op(d, ins, m, lambda a, b, c: a * b + c)
    return _float_op(d, ins, m, nm.fma, exact_in_f64=True)


@builder("div", "rem")
def _div(d, ins, m):
    kind = _peek_type(m)
    if is_float(kind):
        return _float_op(d, ins, m, np.divide)
    m.type()

    def quotient(a, b):  # towards zero; by zero: all ones
        safe = np.where(b == 0, 1, b)
        q = a // safe
        if kind[0] == "s":
            q = q + ((a % safe != 0) & ((a < 0) != (safe < 0)))
        return np.where(b == 0, a.dtype.type(-1) if kind[0] == "s" else np.iinfo(a.dtype).max, q).astype(a.dtype)

    if m.base == "div":
        return _integer_op(d, ins, m, quotient, kind)
    return _integer_op(d, ins, m, lambda a, b: np.where(b == 0, a, a - quotient(a, b) * b), kind)


@builder("min", "max")
def _minmax(d, ins, m):
    kind = _peek_type(m)
    if is_float(kind):
        if m.flag("NaN"):
            f = np.minimum if m.base == "min" else np.maximum
        else:
            f = np.fmin if m.base == "min" else np.fmax
        return _float_op(d, ins, m, f if len(ins.operands) == 3 else lambda *x: f(f(x[0], x[1]), x[2]))
    f = np.minimum if m.base == "min" else np.maximum
    relu = m.flag("relu")  # negative results become 0
    m.type()
    return _integer_op(d, ins, m, (lambda a, b: np.maximum(f(a, b), 0)) if relu else f, kind)


@builder("neg", "abs")
def _neg(d, ins, m):
    kind, f = _peek_type(m), np.negative if m.base == "neg" else np.abs
    if is_float(kind):
        return _float_op(d, ins, m, f)
    m.type()
    return _integer_op(d, ins, m, f, kind)


def _unary(name: str, f: Callable):
    @builder(name)
    def build(d, ins, m):
        return _float_op(d, ins, m, lambda x: f(x.astype(np.float64)))


_unary("ex2", np.exp2)
_unary("lg2", np.log2)
_unary("rcp", np.reciprocal)
_unary("sqrt", np.sqrt)
_unary("rsqrt", lambda x: 1 / np.sqrt(x))
_unary("tanh", np.tanh)
_unary("sin", np.sin)
_unary("cos", np.cos)


@builder("copysign")
def _copysign(d, ins, m):
    return _float_op(d, ins, m, lambda a, b: np.copysign(b, a))


@builder("and", "or", "xor", "not", "cnot")
def _logic(d, ins, m):
    kind = m.type()
    if m.base == "cnot":
        return _integer_op(d, ins, m, lambda a: (a == 0).astype(a.dtype), kind)
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[m.base]
    return _integer_op(d, ins, m, f, kind)


@builder("shl", "shr")
def _shift(d, ins, m):
    kind = m.type()
    m.finish()
    width = 8 * TYPE_BYTES[kind]
    a, n = d.source(ins.operands[1], kind), d.source(ins.operands[2], "u32")
    slot = d.destination(ins.operands[0], kind)
    left, signed = m.base == "shl", kind[0] == "s"
    count = ins.operands[2]
    if isinstance(count, Immediate) and immediate_bits(count.text, "u32") < width:
        amount = d.constant(immediate_bits(count.text, "u32"), DTYPES[kind])
        return elementwise(slot, np.left_shift if left else np.right_shift, a, amount)

    def compute(r):
        x, count = r[a], r[n]
        amount = np.minimum(count, width - 1).astype(x.dtype)
        y = (x << amount) if left else (x >> amount)
        if signed and not left:
            return y
        return np.where(count >= width, x.dtype.type(0), y)

    return assign(slot, compute)


@builder("shf")
def _shf(d, ins, m):
    m.type()
    left, wrap = m.one_of(("l", "r")) == "l", m.one_of(("wrap", "clamp")) == "wrap"
    m.finish()
    a, b, c = (d.source(o, "u32") for o in ins.operands[1:])

    def compute(r):
        count = (r[c] & np.uint32(31) if wrap else np.minimum(r[c], 32)).astype(np.uint64)
        both = (r[b].astype(np.uint64) << np.uint64(32)) | r[a]
        if left:
            return ((both << count) >> np.uint64(32)).astype(np.uint32)  # bits above 63 fall off
        return (both >> count).astype(np.uint32)

    return assign(d.destination(ins.operands[0], "b32"), compute)


@builder("lop3")
def _lop3(d, ins, m):
    m.type()
    m.finish()
    a, b, c = (d.source(o, "b32") for o in ins.operands[1:4])
    f = nm.lop3(immediate_bits(ins.operands[4].text, "b32"))
    return assign(d.destination(ins.operands[0], "b32"), lambda r: f(r[a], r[b], r[c]))


@builder("prmt")
def _prmt(d, ins, m):
    m.type()
    m.finish()
    a, b, c = (d.source(o, "b32") for o in ins.operands[1:])
    return assign(d.destination(ins.operands[0], "b32"), lambda r: nm.prmt(r[a], r[b], r[c]))


@builder("bfe")
def _bfe(d, ins, m):
    kind = m.type()
    m.finish()
    width = 8 * TYPE_BYTES[kind]
    a = d.source(ins.operands[1], kind)
    start, count = (d.source(o, "u32") for o in ins.operands[2:])

    def compute(r):
        x = r[a].astype(object)  # Python integers: any length
        out = []
        for value, p, n in zip(x, r[start] & 255, r[count] & 255, strict=True):
            p, n = int(p), int(n)
            field = (
                (int(value) >> min(p, 2 * width)) & ((1 << n) - 1)
                if kind[0] == "s"
                else ((int(value) & ((1 << width) - 1)) >> p) & ((1 << n) - 1)
            )
            if kind[0] == "s" and n and (field >> (n - 1)) & 1:
                field -= 1 << n
            out.append(field)
        return np.array(out, object).astype(r[a].dtype)

    return assign(d.destination(ins.operands[0], kind), compute)


@builder("bfi")
def _bfi(d, ins, m):
    kind = m.type()
    m.finish()
    width = 8 * TYPE_BYTES[kind]
    a, b = (d.source(o, kind) for o in ins.operands[1:3])
    start, count = (d.source(o, "u32") for o in ins.operands[3:])

    def compute(r):
        one, x = r[a].dtype.type(1), r[b]
        p, n = np.minimum(r[start] & 255, width), np.minimum(r[count] & 255, width)
        ones = np.where(n >= width, ~x.dtype.type(0), (one << np.minimum(n, width - 1).astype(x.dtype)) - one)
        shift = np.minimum(p, width - 1).astype(x.dtype)
        field = np.where(p >= width, x.dtype.type(0), ones << shift)
        return (x & ~field) | ((r[a] << shift) & field)

    return assign(d.destination(ins.operands[0], kind), compute)


@builder("brev")
def _brev(d, ins, m):
    kind = m.type()
    return _integer_op(d, ins, m, nm.reverse_bits, kind)


@builder("popc", "clz")
def _popc(d, ins, m):
    kind = m.type()
    m.finish()
    a, width = d.source(ins.operands[1], kind), 8 * TYPE_BYTES[kind]
    slot = d.destination(ins.operands[0], "u32")
    if m.base == "popc":
        return assign(slot, lambda r: np.unpackbits(r[a].view(np.uint8)).reshape(32, -1).sum(1))
    return assign(slot, lambda r: np.uint32(width - 1) - nm.highest_bit(r[a]))


@builder("bfind")
def _bfind(d, ins, m):
    kind = m.type()
    shift = m.flag("shiftamt")
    m.finish()
    a, width = d.source(ins.operands[1], kind), 8 * TYPE_BYTES[kind]

    def compute(r):
        x = r[a]
        if kind[0] == "s":
            x = np.where(x < 0, ~x, x).view(UNSIGNED[TYPE_BYTES[kind]])
        top = nm.highest_bit(x)
        return np.where(top == 0xFFFFFFFF, top, np.uint32(width - 1) - top) if shift else top

    return assign(d.destination(ins.operands[0], "u32"), compute)


@builder("dp4a")
def _dp4a(d, ins, m):
    kinds = [p for p in m.rest if p in ("u32", "s32")]
    a, b = (d.source(o, "b32") for o in ins.operands[1:3])
    c = d.source(ins.operands[3], kinds[0])
    bytes_of = [np.int8 if k == "s32" else np.uint8 for k in kinds]

    def compute(r):
        x, y = (r[s].view(t).reshape(32, 4).astype(np.int64) for s, t in zip((a, b), bytes_of, strict=True))
        return (x * y).sum(1) + r[c]

    return assign(d.destination(ins.operands[0], kinds[0]), compute)


# -- comparisons and selection ---------------------------------------------------------------------------------

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def comparison(name: str, kind: str) -> Callable:
    """(a, b) -> bool; unordered forms are true and ordered ones false where an operand is NaN."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _UNORDERED:
        f = _COMPARE[_UNORDERED[name]]
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne" and is_float(kind):
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARE[name]


@builder("setp", "set")
def _setp(d, ins, m):
    kinds = [p for p in m.rest if p in DTYPES]
    kind = kinds[-1]
    m.rest = [p for p in m.rest if p not in kinds]
    ftz = m.flag("ftz")
    name = m.one_of({*_COMPARE, *_UNORDERED, "num", "nan"})
    combine = m.one_of(("and", "or", "xor"), "none")
    m.finish()
    compare = comparison(name, kind)
    if is_float(kind):
        x, y = (_float_source(d, o, kind, ftz) for o in ins.operands[1:3])
    else:
        a, b = (d.source(o, kind) for o in ins.operands[1:3])
        x, y = (lambda r: r[a]), (lambda r: r[b])
        if m.base == "setp" and combine == "none" and not isinstance(ins.operands[0], Pair):
            return elementwise(d.destination(ins.operands[0], "pred"), compare, a, b)
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "none": None}[combine]
    predicate = _predicate(d, ins.operands[3]) if join else None

    if m.base == "set":
        out = kinds[0]
        true = (
            np.array(-1, DTYPES[out])
            if not is_float(out) and out[0] == "s"
            else (DTYPES[out](1) if is_float(out) else np.iinfo(DTYPES[out]).max)
        )
        return assign(
            d.destination(ins.operands[0], out),
            lambda r: np.where(join(compare(x(r), y(r)), predicate(r)) if join else compare(x(r), y(r)), true, 0),
        )
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    if kind in ("f16x2", "bf16x2"):
        p, q = d.destination(first, "pred"), d.destination(second, "pred")

        def run_packed(w, mask):
            both = compare(x(w.r), y(w.r)).reshape(32, 2)
            for slot, i in ((p, 0), (q, 1)):
                if slot is not None:
                    store(w.r[slot], join(both[:, i], predicate(w.r)) if join else both[:, i], mask)

        return run_packed
    p = d.destination(first, "pred")
    if second is None and join is None:
        return assign(p, lambda r: compare(x(r), y(r)))
    q = d.destination(second, "pred")

    def run(w, mask):
        truth = compare(x(w.r), y(w.r))
        other = predicate(w.r) if join else True
        yes, no = (join(truth, other), join(~truth, other)) if join else (truth, ~truth)
        for slot, value in ((p, yes), (q, no)):
            if slot is not None:
                store(w.r[slot], value, mask)

    return run


def _predicate(d: Decoder, operand) -> Callable:
    if isinstance(operand, Not):
        slot = d.source(operand.operand, "pred")
        return lambda r: ~r[slot]
    slot = d.source(operand, "pred")
    return lambda r: r[slot]


@builder("selp")
def _selp(d, ins, m):
    kind = m.type()
    m.finish()
    a, b = (d.source(o, kind) for o in ins.operands[1:3])
    predicate = _predicate(d, ins.operands[3])
    return assign(d.destination(ins.operands[0], kind), lambda r: np.where(predicate(r), r[a], r[b]))


@builder("slct")
def _slct(d, ins, m):
    by, kind = m.type(), m.type()
    m.flag("ftz")
    m.finish()
    a, b = (d.source(o, kind) for o in ins.operands[1:3])
    c = d.source(ins.operands[3], by)
    return assign(d.destination(ins.operands[0], kind), lambda r: np.where(r[c] >= 0, r[a], r[b]))


@builder("testp")
def _testp(d, ins, m):
    kind = m.type()
    test = m.one_of(("finite", "infinite", "number", "notanumber", "normal", "subnormal"))
    m.finish()
    a = d.source(ins.operands[1], kind)
    tiny = np.finfo(DTYPES[kind]).tiny
    f = {
        "finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[test]  # fmt: skip
    return assign(d.destination(ins.operands[0], "pred"), lambda r: f(r[a]))


# -- moves and conversions -------------------------------------------------------------------------------------


@builder("mov")
def _mov(d, ins, m):
    kind = m.type()
    m.finish()
    target, value = ins.operands
    size = TYPE_BYTES[kind]
    if isinstance(target, Vector):  # unpack, lowest element first
        part = size // len(target.items)
        slot = d.source(value, f"b{8 * size}")
        outs = [d.destination(o, f"b{8 * part}") for o in target.items]

        def unpack(w, mask):
            parts = w.r[slot].view(UNSIGNED[part]).reshape(32, -1).copy()
            for i, out in enumerate(outs):
                if out is not None:
                    store(w.r[out], parts[:, i], mask)

        return unpack
    if isinstance(value, Vector):
        part = size // len(value.items)
        slots = [d.source(o, f"b{8 * part}") for o in value.items]
        pack = lambda r: np.stack([r[s] for s in slots], 1).view(UNSIGNED[size]).reshape(-1)  # noqa: E731
        return assign(d.destination(target, f"b{8 * size}"), pack)
    if isinstance(value, Symbol) and value.name in ("%clock", "%clock64", "%globaltimer", "%clock_hi"):
        slot = d.destination(target, kind)
        return lambda w, mask: store(w.r[slot], w.steps, mask)
    if isinstance(value, Immediate) or kind == "pred":
        a = d.source(value, kind)
        return assign(d.destination(target, kind), lambda r: r[a])
    raw = f"b{8 * size}"
    a = d.source(value, raw)
    return assign(d.destination(target, raw), lambda r: r[a])


@builder("cvta")
def _cvta(d, ins, m):
    kind = m.type()
    to = m.flag("to")
    space = m.one_of(("global", "shared", "local", "param", "const", "shared::cta"))
    m.finish()
    from .memory import LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BITS

    windows = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}
    base = windows.get(space, 0) << WINDOW_BITS
    a = d.source(ins.operands[1], kind)
    dtype = np.dtype(DTYPES[kind]).type
    offset = dtype(-base % (1 << 64)) if to else dtype(base)
    return assign(d.destination(ins.operands[0], kind), lambda r: r[a] + offset)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt_pack(d, ins, m):
    """d = {c << 2 size, a, b}, a and b saturated."""
    if not m.flag("sat") or m.rest[1:] != ["s32", "b32"] or m.rest[0] not in ("u2", "u4", "u8"):
        raise UnknownInstruction("types of cvt.pack")
    size = int(m.rest[0][1:])
    a, b = (d.source(o, "s32") for o in ins.operands[1:3])
    c = d.source(ins.operands[3], "b32")

    def pack(r):
        high, low = (np.clip(r[x], 0, (1 << size) - 1).astype(np.uint32) for x in (a, b))
        return r[c] << np.uint32(2 * size) | high << np.uint32(size) | low

    return assign(d.destination(ins.operands[0], "b32"), pack)


@builder("cvt")
def _cvt(d, ins, m):
    if m.flag("pack"):
        return _cvt_pack(d, ins, m)
    source, target = m.type(), m.type()
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    rounding = m.one_of(("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"), "none")
    m.finish()
    slot = d.destination(ins.operands[0], target)
    if target in ("f16x2", "bf16x2") and len(ins.operands) == 3:  # d = {b, a}
        if rounding not in ("rn", "rz") or source != "f32":
            raise UnknownInstruction("rounding or source type")
        narrow = nm.f32_to_f16 if target == "f16x2" else nm.f32_to_bf16
        high, low = (_float_source(d, o, "f32", ftz) for o in ins.operands[1:])

        def pack(r):
            both = np.stack([narrow(low(r), rounding), narrow(high(r), rounding)], 1)
            both = both.view(np.uint16)
            if relu:  # negative values and -0 become 0
                both = np.where(both & 0x8000, 0, both).astype(np.uint16)
            return both.view(np.uint32).reshape(-1)

        return assign(slot, pack)
    if target.endswith("x2") or source.endswith("x2"):
        raise UnknownInstruction("packed conversion")

    read = d.truncated(ins.operands[1], source)
    if source == "bf16":
        bits = read
        read = lambda r: nm.bf16_to_f32(bits(r))  # noqa: E731
    dtype = np.dtype(DTYPES[target])
    from_float, to_float = is_float(source), is_float(target)

    def to_integer(x):
        info = np.iinfo(dtype)
        y = _ROUND[rounding](np.where(np.isnan(x), 0, x).astype(np.float64))
        too_big = y >= float(info.max)
        return np.where(too_big, info.max, np.clip(np.where(too_big, 0, y), info.min, None).astype(dtype))

    def narrow_float(x):
        if rounding in _ROUND:
            x = _ROUND[rounding](x)
        if target == "bf16":
            return nm.f32_to_bf16(x, "rz" if rounding == "rz" else "rn")
        if target == "f16":
            y = nm.f32_to_f16(x, "rz" if rounding == "rz" else "rn")
        elif target == "f32" and source == "f64" and rounding not in ("rn", "none"):
            raise UnknownInstruction(f"rounding .{rounding}")
        else:
            y = x.astype(dtype)
        if ftz and target == "f32":
            y = nm.flush(y)
        if sat:
            y = np.where(np.isnan(y), dtype.type(0), np.clip(y, dtype.type(0), dtype.type(1)))
        if relu:
            y = np.where(y > 0, y, np.where(np.isnan(y), y, dtype.type(0)))
        return y

    def saturate(x):
        info = np.iinfo(dtype)
        return np.clip(x.astype(object), info.min, info.max).astype(dtype)

    if rounding in ("rm", "rp", "rna"):
        raise UnknownInstruction(f"rounding .{rounding}")
    if from_float and to_float:
        convert = narrow_float
    elif from_float:
        flush = (lambda x: nm.flush(x)) if ftz and source == "f32" else (lambda x: x)
        convert = lambda x: to_integer(flush(x))  # noqa: E731
    elif to_float:
        if rounding not in ("rn", "none"):
            raise UnknownInstruction(f"rounding .{rounding}")
        convert = (lambda x: nm.f64_to_bf16(x.astype(np.float64))) if target == "bf16" else (lambda x: x.astype(dtype))
    elif sat:
        convert = saturate
    else:
        convert = lambda x: x.astype(dtype)  # noqa: E731
    return assign(slot, lambda r: convert(read(r)))


# -- warp collectives ------------------------------------------------------------------------------------------


def _active(mask: np.ndarray | None) -> np.ndarray:
    return np.ones(32, bool) if mask is None else mask


@collective("shfl", members=4)
def _shfl(d, ins, m):
    kind = m.type()
    m.flag("sync")
    mode = m.one_of(("up", "down", "bfly", "idx"))
    m.finish()
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    out, p = d.destination(first, kind), d.destination(second, "pred")
    a = d.source(ins.operands[1], kind)
    b, c = (d.source(o, "u32") for o in ins.operands[2:4])

    def run(w, mask):
        r = w.r
        by, clamp = (r[b] & 31).astype(np.int64), (r[c] & 31).astype(np.int64)
        segment = ((r[c] >> 8) & 31).astype(np.int64)
        low, high = LANES & segment, (LANES & segment) | (clamp & ~segment)
        if mode == "up":
            lane = LANES - by
            valid = lane >= high
        elif mode == "down":
            lane = LANES + by
            valid = lane <= high
        elif mode == "bfly":
            lane = LANES ^ by
            valid = lane <= high
        else:
            lane = low | (by & ~segment)
            valid = lane <= high
        lane = np.where(valid, lane, LANES)
        active = _active(mask)
        if not active[lane[active]].all():
            raise Divergence("shfl.sync reads a lane that takes no part")
        if out is not None:
            store(r[out], r[a][lane], mask)
        if p is not None:
            store(r[p], valid, mask)

    return run


@collective("vote", members=2)
def _vote(d, ins, m):
    m.flag("sync")
    mode = m.one_of(("all", "any", "uni", "ballot"))
    kind = m.type()
    m.finish()
    predicate = _predicate(d, ins.operands[1])
    slot = d.destination(ins.operands[0], kind)

    def run(w, mask):
        active = _active(mask)
        votes = predicate(w.r)[active]
        if mode == "ballot":
            value = _bits(active, predicate(w.r))
        else:
            value = {"all": votes.all(), "any": votes.any(), "uni": votes.all() or not votes.any()}[mode]
        store(w.r[slot], value, mask)

    return run


def _bits(active: np.ndarray, value: np.ndarray) -> int:
    """Lane bits where both hold."""
    return int.from_bytes(np.packbits(active & value, bitorder="little").tobytes(), "little")


@collective("match", members=2)
def _match(d, ins, m):
    kind = m.type()
    m.flag("sync")
    mode = m.one_of(("any", "all"))
    m.finish()
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    out, p = d.destination(first, "b32"), d.destination(second, "pred")
    a = d.source(ins.operands[1], kind)

    def run(w, mask):
        active, value = _active(mask), w.r[a]
        same = np.array([_bits(active, value == v) for v in value], np.uint32)
        if mode == "all":
            agree = len(np.unique(value[active])) == 1
            same = np.where(agree, same, np.uint32(0))
            if p is not None:
                store(w.r[p], agree, mask)
        if out is not None:
            store(w.r[out], same, mask)

    return run


@collective("redux", members=2)
def _redux(d, ins, m):
    kind = m.type()
    m.flag("sync")
    op = m.one_of(("add", "min", "max", "and", "or", "xor"))
    m.finish()
    a, slot = d.source(ins.operands[1], kind), d.destination(ins.operands[0], kind)
    f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
         "xor": np.bitwise_xor}[op]  # fmt: skip
    return lambda w, mask: store(w.r[slot], f.reduce(w.r[a][_active(mask)]), mask)


@collective("elect", members=1)
def _elect(d, ins, m):
    m.flag("sync")
    m.finish()
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (None, target)
    out, p = d.destination(first, "b32"), d.destination(second, "pred")

    def run(w, mask):
        leader = int(np.argmax(_active(mask)))
        if out is not None:
            store(w.r[out], leader, mask)
        store(w.r[p], LANES == leader, mask)

    return run


@builder("activemask")
def _activemask(d, ins, m):
    m.type()
    slot = d.destination(ins.operands[0], "b32")
    return lambda w, mask: store(w.r[slot], _bits(_active(mask), np.ones(32, bool)), mask)


@collective("movmatrix")
def _movmatrix(d, ins, m):
    if m.rest != ["sync", "aligned", "m8n8", "trans", "b16"]:
        raise UnknownInstruction("form of movmatrix")
    a = d.source(ins.operands[1], "b32")
    compute = lambda r: np.ascontiguousarray(nm.matrix_8x8(r[a]).T).view(np.uint32).reshape(-1)  # noqa: E731
    return assign(d.destination(ins.operands[0], "b32"), compute)


@collective("mma")
def _mma(d, ins, m):
    for flag in ("sync", "aligned", "row", "col"):
        if not m.flag(flag):
            raise UnknownInstruction(f"mma without .{flag}")
    shape = m.one_of(("m16n8k16", "m16n8k8"))
    kinds = list(m.rest)
    if len(kinds) != 4 or kinds[1] != kinds[2] or kinds[1] not in ("f16", "bf16") or kinds[0] != kinds[3]:
        raise UnknownInstruction(f"types {kinds}")
    if kinds[0] not in ("f32", "f16"):
        raise UnknownInstruction(f"accumulator {kinds[0]}")
    depth = 16 if shape == "m16n8k16" else 8
    a, b = ([d.source(o, "b32") for o in v.items] for v in ins.operands[1:3])
    if (len(a), len(b)) != (depth // 4, depth // 8):
        raise UnknownInstruction("number of registers")
    a_index, b_index = nm.A_INDEX[depth], nm.B_INDEX[depth]
    kind = kinds[1]
    if kinds[0] == "f32":
        c = [d.source(o, "f32") for o in ins.operands[3].items]
        out = [d.destination(o, "f32") for o in ins.operands[0].items]
        rows, cols = nm.C_ROWS, nm.C_COLS
    else:
        c = [d.source(o, "b32") for o in ins.operands[3].items]
        out = [d.destination(o, "b32") for o in ins.operands[0].items]

    def run(w, mask):
        if mask is not None:
            raise Divergence("mma with lanes missing")
        r = w.r
        left = nm.mma_operand(np.array([r[s] for s in a]), a_index, kind)
        right = nm.mma_operand(np.array([r[s] for s in b]), b_index, kind)
        product = left @ right  # fp64: every product is exact, the sum nearly
        if kinds[0] == "f32":
            total = (product[rows, cols] + np.array([r[s] for s in c])).astype(np.float32)
            for i, slot in enumerate(out):
                r[slot][...] = total[i]
        else:
            addend = np.stack([r[s] for s in c]).view(np.float16).reshape(2, 32, 2)
            for i, slot in enumerate(out):
                picked = np.stack([product[nm.C_ROWS[2 * i + e], nm.C_COLS[2 * i + e]] for e in range(2)], 1)
                r[slot][...] = (picked + addend[i]).astype(np.float16).view(np.uint32).reshape(-1)

    return run
