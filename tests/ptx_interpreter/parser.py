"""PTX text -> entries with resolved registers, labels, parameters and shared variables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from .errors import PtxError

TYPE_BYTES = {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
TYPE_BYTES |= {"b128": 16, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "pred": 1}


@dataclass(frozen=True)
class Register:
    index: int  # unique in its entry
    name: str
    type: str


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter, label or special register."""

    name: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """``d|p``: two destinations."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True)
class Not:
    """``!p``."""

    operand: Register


@dataclass
class Instruction:
    opcode: str
    operands: list
    guard: Register | None
    guard_negated: bool
    line: int
    text: str
    scopes: tuple[int, ...]

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Statement:
    """An instruction's text, with the blocks around it: their numbers, and the registers that each declares."""

    source: str
    line: int
    blocks: tuple[tuple[int, dict[str, Register]], ...]

    @property
    def text(self) -> str:
        return " ".join(self.source.split())

    def read(self) -> Instruction:
        guard, negated = None, False
        body = self.source
        if match := _GUARD.match(body):
            negated = match.group(1) == "!"
            guard = _name(match.group(2), self.blocks)
            body = body[match.end() :]
        opcode, *rest = body.split(None, 1)
        operands = [_operand(o, self.blocks) for o in _split(*rest)]
        scopes = tuple(number for number, _ in self.blocks)
        return Instruction(opcode, operands, guard, negated, self.line, self.text, scopes)


@dataclass
class Variable:
    name: str
    space: str
    align: int
    nbytes: int
    data: bytes | None = None


@dataclass
class Entry:
    name: str
    params: list[Variable] = field(default_factory=list)
    param_types: list[str] = field(default_factory=list)
    max_threads: int | None = None
    code: list[Statement] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)

    def target(self, name: str, scopes: tuple[int, ...]) -> int:
        """The index of the instruction at a label, searched from the innermost block outwards."""
        for scope in reversed(scopes):
            if (scope, name) in self.labels:
                return self.labels[scope, name]
        raise PtxError(f"no label {name!r}")


@dataclass
class Module:
    version: str
    target: str
    entries: dict[str, Entry]
    variables: list[Variable]

    def entry(self, name: str | None) -> Entry:
        if name is None:
            if len(self.entries) != 1:
                raise PtxError(f"name one of the entries: {', '.join(self.entries)}")
            return next(iter(self.entries.values()))
        return self.entries[name]


_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\b((?:\s*\.(?:align\s+\d+|attribute\([^)]*\)|v[24]|[a-z]+\d+))*)\s+"
    r"([\w$%.]+)\s*((?:\[\s*\w*\s*\])*)\s*(?:=\s*(.+))?$",
    re.S,
)


_SPACE = re.compile(r"\s+")
_GUARD = re.compile(r"@\s*(!?)\s*([\w$%]+)\s+")
_PUNCTUATION = re.compile(r"[,{}\[\]()]")


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def _clean(text: str) -> str:
    """Comments and debug lines become blanks, so that line numbers stay."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", _blank, text, flags=re.S)
    return re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", _blank, text, flags=re.M)


def _integer(text: str) -> int:
    text = text.strip().rstrip("uU")
    negative = text.startswith("-")
    digits = text.lstrip("+-").strip()
    is_octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8) if is_octal else int(digits, 0)
    return -value if negative else value


def _variable(statement: str) -> Variable:
    match = _VARIABLE.search(statement)
    if match is None:
        raise PtxError(f"cannot read the declaration {statement!r}")
    space, attributes, name, dims, init = match.groups()
    align = int(m.group(1)) if (m := re.search(r"\.align\s+(\d+)", attributes)) else 1
    kind = [t for t in re.findall(r"\.([a-z]+\d+)", attributes) if t in TYPE_BYTES][-1]
    size = TYPE_BYTES[kind]
    vector = int(m.group(1)) if (m := re.search(r"\.v([24])\b", attributes)) else 1
    count = vector
    values = [_integer(v) for v in re.findall(r"[-\w]+", init)] if init else []
    for dim in re.findall(r"\[\s*(\w*)\s*\]", dims):
        count *= _integer(dim) if dim else len(values)
    data = b"".join((v % (1 << 8 * size)).to_bytes(size, "little") for v in values) if init else None
    if data is not None:
        data = data.ljust(count * size, b"\0")
    return Variable(name, space, max(align, size), count * size, data)


def _matching(text: str, start: int, opening: str, closing: str) -> int:
    depth = 0
    for match in re.compile(f"[{re.escape(opening + closing)}]").finditer(text, start):
        depth += 1 if match.group() == opening else -1
        if depth == 0:
            return match.start()
    raise PtxError(f"unbalanced {opening}")


@lru_cache(maxsize=32)
def parse(text: str) -> Module:
    """Read a PTX module."""
    text = _clean(text)
    version = re.search(r"\.version\s+([\d.]+)", text)
    target = re.search(r"\.target\s+(\w+)", text)
    entries: dict[str, Entry] = {}
    outside, at = [], 0
    for match in re.finditer(r"\.entry\s+([\w$.]+)\s*", text):
        if match.start() < at:
            continue
        outside.append(text[at : match.start()])
        entry = Entry(match.group(1))
        position = match.end()
        if text[position] == "(":
            end = _matching(text, position, "(", ")")
            _parse_params(entry, text[position + 1 : end])
            position = end + 1
        body = text.index("{", position)
        if m := re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", text[position:body]):
            entry.max_threads = 1
            for n in m.group(1).split(","):
                entry.max_threads *= int(n)
        end = _matching(text, body, "{", "}")
        _parse_body(entry, text[body : end + 1], 1 + text.count("\n", 0, body))
        entries[entry.name] = entry
        at = end + 1
    outside.append(text[at:])
    variables = [
        _variable(s.strip())
        for part in outside
        for s in part.split(";")
        if re.search(r"\.(shared|global|const)\b", s) and ".func" not in s
    ]
    if not entries:
        raise PtxError("no .entry in the module")
    return Module(version.group(1) if version else "", target.group(1) if target else "", entries, variables)


def _parse_params(entry: Entry, text: str) -> None:
    offset = 0
    for item in filter(None, (p.strip() for p in text.split(","))):
        match = re.search(r"([\w$%]+)\s*(?:\[(\d+)\])?\s*$", item)
        types = [t for t in re.findall(r"\.([a-z]+\d+)\b", item) if t in TYPE_BYTES]
        size = TYPE_BYTES[types[0]]
        align = size
        if match.group(2):  # an array: the alignment given is its own, not that of what a .ptr points to
            m = re.search(r"\.align\s+(\d+)", item)
            align = int(m.group(1)) if m else size
            size *= int(match.group(2))
        offset = -(-offset // align) * align
        entry.params.append(Variable(match.group(1), "param", offset, size))  # align holds the offset
        entry.param_types.append(types[0] if not match.group(2) else "bytes")
        offset += size


def _parse_body(entry: Entry, text: str, line: int) -> None:
    blocks: tuple[tuple[int, dict[str, Register]], ...] = ()
    num_blocks = 0
    position = 0
    label = re.compile(r"([\w$%.]+)\s*:(?!:)")
    pending = ""  # the label just read, for .branchtargets
    while position < len(text):
        if match := _SPACE.match(text, position):
            line += match.group().count("\n")
            position = match.end()
            continue
        char = text[position]
        if char == "{":
            blocks = (*blocks, (num_blocks, {}))
            num_blocks += 1
            position += 1
        elif char == "}":
            blocks = blocks[:-1]
            position += 1
        elif match := label.match(text, position):
            pending = match.group(1)
            entry.labels[blocks[-1][0], pending] = len(entry.code)
            position = match.end()
        else:
            end = text.find(";", position)
            if end < 0:
                raise PtxError(f"line {line}: a statement without end")
            statement = text[position:end]
            _parse_statement(entry, statement.strip(), line, blocks, pending)
            line += statement.count("\n")
            position = end + 1


def _parse_statement(entry: Entry, statement: str, line: int, blocks: tuple, pending: str) -> None:
    if not statement:
        return
    if statement[0] != ".":
        entry.code.append(Statement(statement, line, blocks))
    elif statement.startswith(".reg"):
        _declare(entry, statement, blocks[-1][1])
    elif statement.startswith(".branchtargets"):
        entry.branch_targets[pending] = [t.strip() for t in statement.split(None, 1)[1].split(",")]
    elif statement.startswith((".shared", ".local")):
        entry.variables.append(_variable(statement))
    elif not statement.startswith(".pragma"):
        raise PtxError(f"line {line}: cannot read {statement!r}")


def _declare(entry: Entry, statement: str, scope: dict[str, Register]) -> None:
    match = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)$", statement, re.S)
    kind = match.group(1)
    for item in match.group(2).split(","):
        many = re.match(r"\s*([\w$%]+)<(\d+)>\s*$", item)
        names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [item.strip()]
        for name in names:
            register = Register(len(entry.registers), name, kind)
            entry.registers.append(register)
            scope[name] = register


def _name(text: str, blocks: tuple):
    for _, names in reversed(blocks):
        if text in names:
            return names[text]
    return Symbol(text)


def _split(text: str = "") -> list[str]:
    """Operands: split at commas outside braces and brackets."""
    out, depth, start = [], 0, 0
    for match in _PUNCTUATION.finditer(text):
        char = match.group()
        if char != ",":
            depth += 1 if char in "{[(" else -1
        elif depth == 0:
            out.append(text[start : match.start()])
            start = match.end()
    out.append(text[start:])
    return [o.strip() for o in out if o.strip()]


def _operand(text: str, blocks: tuple):
    if text.startswith("{"):
        return Vector(tuple(_operand(o, blocks) for o in _split(text[1:-1])))
    if text.startswith("["):
        inner = text[1:-1].strip()
        match = re.match(r"([\w$%.]+)\s*(?:\+\s*(-?\s*\w+))?$|([\w$%.]+)\s*(-\s*\w+)$", inner)
        if match is None:
            raise PtxError(f"cannot read the address {text!r}")
        base, offset = (match.group(1), match.group(2)) if match.group(1) else (match.group(3), match.group(4))
        return Address(_operand(base, blocks), _integer(offset.replace(" ", "")) if offset else 0)
    if text.startswith("!"):
        return Not(_operand(text[1:].strip(), blocks))
    if "|" in text:
        first, second = (None if t.strip() == "_" else _operand(t.strip(), blocks) for t in text.split("|"))
        return Pair(first, second)
    if re.match(r"[-+]?\d", text):
        return Immediate(text)
    return _name(text, blocks)
