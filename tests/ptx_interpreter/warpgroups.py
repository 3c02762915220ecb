"""wgmma with A in registers or shared memory and B in shared memory, without swizzle: ``mma_async``, ``fence``, groups.

With late copies a wgmma happens when its group is waited for: until then its accumulators hold NaN, A and B are read at
the end, so a register or an operand that is touched too early gives wrong numbers or a Race.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import numerics as nm
from . import operations as ops
from .errors import BarrierMisuse, Divergence, UnknownInstruction
from .parser import Vector

DESCRIPTOR_UNIT = 16
CORE_ROWS = 8
GROUP_WARPS, WARP_ROWS = 4, 16


@dataclass
class Wgmma:
    """A warp's share of a wgmma under way."""

    d: tuple[int, ...]  # slots of the accumulators
    a: list[int]  # registers, or a descriptor
    descriptor: int
    accumulate: bool
    columns: int


@dataclass
class Pending:
    """What a warp has issued and not waited for."""

    open: list[Wgmma] = field(default_factory=list)  # in no group yet
    groups: list[list[Wgmma]] = field(default_factory=list)
    accumulators: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)
    fenced: bool = False


def _pending(w) -> Pending:
    if not hasattr(w, "wgmma"):
        w.wgmma = Pending()
    return w.wgmma


def operand(w, descriptor: int, columns: int) -> np.ndarray:
    """B, or A transposed, [16, columns] in fp64."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) * DESCRIPTOR_UNIT for shift in (0, 16, 32))
    if descriptor >> 62:
        raise UnknownInstruction("a swizzled operand")
    n = np.arange(columns)
    rows = start + n // CORE_ROWS * stride + n % CORE_ROWS * DESCRIPTOR_UNIT
    shared = w.cta.shared
    b = np.empty((16, columns))
    for half in range(2):
        at = rows + half * leading
        shared.check_operand(at, DESCRIPTOR_UNIT, w.agent)
        halves = shared.views[2][(at // 2)[:, None] + np.arange(CORE_ROWS)].view(np.float16)
        b[8 * half : 8 * half + 8] = halves.astype(np.float64).T
    return b


def execute(w, step: Wgmma, acc: np.ndarray) -> None:
    """Add the product to accumulators [columns / 2, 32]."""
    if len(step.a) == 1:
        first = w.index % GROUP_WARPS * WARP_ROWS
        a = operand(w, step.a[0], GROUP_WARPS * WARP_ROWS)[:, first : first + WARP_ROWS].T
    else:
        a = nm.mma_operand(np.array([w.r[s] for s in step.a]), nm.A_INDEX[16], "f16")
    product = a @ operand(w, step.descriptor, step.columns)
    for n in range(step.columns // 8):
        tile = product[nm.C_ROWS, nm.C_COLS + 8 * n]
        old = acc[4 * n : 4 * n + 4] if step.accumulate else np.float32(0)
        acc[4 * n : 4 * n + 4] = (tile + old).astype(np.float32)


def finish(w, groups: list[list[Wgmma]]) -> None:
    pending = _pending(w)
    for step in (s for group in groups for s in group):
        execute(w, step, pending.accumulators[step.d])
    left = {s.d for group in pending.groups for s in group} | {s.d for s in pending.open}
    for d in [d for d in pending.accumulators if d not in left]:
        for slot, row in zip(d, pending.accumulators.pop(d), strict=True):
            w.r[slot][...] = row


@ops.collective("wgmma")
def _wgmma(d, ins, m):
    action = m.rest.pop(0)
    if not (m.flag("sync") and m.flag("aligned")):
        raise UnknownInstruction(f"wgmma.{action} without .sync.aligned")
    if action == "fence":

        def fence(w, mask):
            _pending(w).fenced = True

        return fence
    if action == "commit_group":

        def commit(w, mask):
            pending = _pending(w)
            pending.groups.append(pending.open)
            pending.open = []

        return commit
    if action == "wait_group":
        keep = int(ins.operands[0].text)

        def wait(w, mask):
            pending = _pending(w)
            count = max(len(pending.groups) - keep, 0)
            done, pending.groups = pending.groups[:count], pending.groups[count:]
            finish(w, done)
            pending.fenced = False

        return wait
    if action != "mma_async":
        raise UnknownInstruction(f"wgmma.{action}")
    shape = m.rest.pop(0)
    if not shape.startswith("m64n") or not shape.endswith("k16") or m.rest != ["f32", "f16", "f16"]:
        raise UnknownInstruction("form of wgmma")
    columns = int(shape[4:-3])
    accumulators, left, descriptor, scale, *rest = ins.operands
    in_registers = isinstance(left, Vector)
    flags = ["1", "1", "0"] if in_registers else ["1", "1", "0", "0"]
    if [o.text for o in rest] != flags or 2 * len(accumulators.items) != columns:
        raise UnknownInstruction("operands of wgmma")
    if in_registers and len(left.items) != 4:
        raise UnknownInstruction("A of wgmma")
    slots = tuple(d.destination(o, "f32") for o in accumulators.items)
    registers = [d.source(o, "b32") for o in left.items] if in_registers else []
    left_address = None if in_registers else d.source(left, "b64")
    address = d.source(descriptor, "b64")
    accumulate = ops._predicate(d, scale)

    def run(w, mask):
        if mask is not None:
            raise Divergence("wgmma with lanes missing")
        pending = _pending(w)
        if not pending.fenced:
            raise BarrierMisuse("wgmma with no wgmma.fence since the last wait")
        descriptors = w.r[address]
        lefts = descriptors if in_registers else w.r[left_address]
        if (descriptors != descriptors[0]).any() or (lefts != lefts[0]).any():
            raise Divergence("lanes disagree about the descriptor of a wgmma")
        step = Wgmma(slots, registers or [int(lefts[0])], int(descriptors[0]), bool(accumulate(w.r)[0]), columns)
        if slots not in pending.accumulators:
            if any(set(slots) & set(other) for other in pending.accumulators):
                raise BarrierMisuse("accumulators overlap with those of a wgmma under way")
            pending.accumulators[slots] = np.array([w.r[s] for s in slots])
            if w.cta.launch.late:
                for slot in slots:
                    w.r[slot][...] = np.nan
        if w.cta.launch.late:
            pending.open.append(step)
            return
        execute(w, step, pending.accumulators[slots])
        for slot, row in zip(slots, pending.accumulators.pop(slots), strict=True):
            w.r[slot][...] = row

    return run
