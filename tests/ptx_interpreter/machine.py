"""Warps, CTAs, the scheduler, and the instructions that branch, wait or touch memory."""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import memory as mem
from . import operations as ops
from .errors import (
    BarrierMisuse,
    CopyInFlight,
    Deadlock,
    Divergence,
    OutOfBounds,
    PtxError,
    StepLimit,
    Uninitialised,
    UnknownInstruction,
)
from .parser import TYPE_BYTES, Address, Entry, Immediate, Instruction, Not, Register, Vector, parse

ALL = np.ones(32, bool)
LOCAL_BASE = 16


@dataclass
class Statistics:
    """What a launch executed, counted per warp."""

    instructions: Counter = field(default_factory=Counter)  # opcode -> count
    shared_wavefronts: Counter = field(
        default_factory=Counter
    )  # "line: text" -> (wavefronts beyond the least possible)
    max_bulk_bytes_in_flight: int = 0

    @property
    def total(self) -> int:
        return sum(self.instructions.values())


@dataclass(frozen=True)
class Operation:
    """A decoded instruction."""

    run: Callable
    control: bool  # sets the program counter itself
    guard: int | None
    negated: bool
    members: int | None  # slot of the member mask of a collective
    source: Instruction


class Program:
    """An entry, decoded once per launch."""

    def __init__(self, entry: Entry, symbols: dict[str, int], local_bytes: int):
        self.entry, self.local_bytes = entry, local_bytes
        self.decoder = ops.Decoder(symbols)
        self.operations = [self._decode(i) for i in entry.code]

    def _decode(self, ins: Instruction) -> Operation:
        try:
            modifiers = ops.Modifiers(ins.parts)
            name = modifiers.base
            if name in CONTROL:
                run, control = CONTROL[name](self.decoder, ins, modifiers, self.entry), True
            elif name in ops.BUILDERS:
                run, control = ops.BUILDERS[name](self.decoder, ins, modifiers), False
            else:
                raise UnknownInstruction("no such instruction here")
            members = None
            if name in ops.COLLECTIVES:
                at = ops.COLLECTIVES[name]
                mask = Immediate("0xffffffff") if at is None else ins.operands[at]
                members = self.decoder.source(mask, "b32")
            guard = None if ins.guard is None else self.decoder.source(ins.guard, "pred")
        except PtxError as error:
            raise type(error)(f"{error}: line {ins.line}: {ins.text}") from None
        except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UnknownInstruction(f"cannot decode line {ins.line}: {ins.text} ({error})") from error
        return Operation(run, control, guard, ins.guard_negated, members, ins)


# -- warps -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Wait:
    """Why some lanes do not go on."""

    ready: Callable[[], bool]
    reason: Callable[[], str]
    resume: Callable | None = None  # called with (warp, mask) when they go on
    retry: bool = False  # may also go on unsuccessfully (try_wait, test_wait)
    merge: bool = False  # waits for other lanes to come to the same place


@dataclass(eq=False)
class Fragment:
    """Lanes at one program counter."""

    pc: int
    mask: np.ndarray
    wait: Wait | None = None
    timed_out: bool = False

    def runnable(self) -> bool:
        return self.wait is None or self.timed_out or self.wait.ready()


@dataclass(eq=False)
class AsyncCopy:
    """A ``cp.async`` of some lanes; per lane the number of groups committed before it."""

    lanes: np.ndarray  # bool: not landed yet
    group: np.ndarray
    destination: np.ndarray
    source: np.ndarray
    nbytes: int
    source_bytes: np.ndarray


class Warp:
    def __init__(self, cta: Cta, index: int, program: Program, live: np.ndarray):
        self.cta, self.index, self.program = cta, index, program
        self.agent = cta.shared.first + index
        self.live = live.copy()
        self.pc: int | None = 0
        self.mask = live.copy()
        self.full = bool(live.all())
        self.timed_out = False
        self.refused: set[int] = set()  # waits that failed at their last attempt
        self.others: list[Fragment] = []
        self.limit = 1 << 60  # program counter at which other lanes may join
        self.switch = False
        self.steps = 0
        self.carry = np.zeros(32, bool)
        self.unordered = np.zeros(32, bool)  # lanes with accesses since the warp last met
        self.copies: list[AsyncCopy] = []
        self.committed = np.zeros(32, np.int64)
        self.late_arrivals: list[tuple[np.ndarray, Callable]] = []
        self.bulk_stores: list[list] = [[]]
        self.local = np.full((32, max(program.local_bytes, 1)), mem.POISON, np.uint8)
        self.local_valid = np.zeros(self.local.shape, bool)
        self.r = self._rows()

    def _rows(self) -> list[np.ndarray]:
        registers = self.program.entry.registers
        base: dict[int, np.ndarray] = {}
        for size in {TYPE_BYTES[r.type] for r in registers}:
            same = [r.index for r in registers if TYPE_BYTES[r.type] == size]
            dtype = np.bool_ if size == 1 else ops.UNSIGNED.get(size, np.uint64)
            garbage = False if size == 1 else 0xBAADF00DBAADF00D >> (64 - 8 * min(size, 8))
            base |= zip(same, np.full((len(same), 32), garbage, dtype), strict=True)
        rows = []
        for kind, what, *rest in self.program.decoder.plan:
            if kind == "const":
                rows.append(what)
            elif kind == "special":
                rows.append(np.broadcast_to(np.asarray(self.special(what)), 32).astype(rest[0]))
            else:
                rows.append(base[what.index].view(rest[0]))
        return rows

    def special(self, name: str):
        cta, launch = self.cta, self.cta.launch
        threads = self.index * 32 + ops.LANES
        x, y, _ = launch.block
        one = {
            "%tid.x": threads % x, "%tid.y": threads // x % y, "%tid.z": threads // (x * y),
            "%laneid": ops.LANES, "%warpid": self.index, "%nwarpid": len(cta.warps) or cta.num_warps,
            "%smid": cta.number % launch.num_sms, "%nsmid": launch.num_sms, "%gridid": 1,
            "%lanemask_eq": 1 << ops.LANES, "%lanemask_lt": (1 << ops.LANES) - 1,
            "%lanemask_le": (2 << ops.LANES) - 1, "%lanemask_ge": 0xFFFFFFFF & -(1 << ops.LANES),
            "%lanemask_gt": 0xFFFFFFFF & -(2 << ops.LANES), "%dynamic_smem_size": launch.dynamic_smem,
            "%total_smem_size": cta.shared.limit, "%cluster_ctarank": 0, "%cluster_nctarank": 1,
            "%is_explicit_cluster": 0,
        }  # fmt: skip
        for axis, letter in enumerate("xyz"):
            one |= {
                f"%ntid.{letter}": launch.block[axis], f"%nctaid.{letter}": launch.grid[axis],
                f"%ctaid.{letter}": cta.position[axis], f"%clusterid.{letter}": cta.position[axis],
                f"%nclusterid.{letter}": launch.grid[axis], f"%cluster_ctaid.{letter}": 0,
                f"%cluster_nctaid.{letter}": 1,
            }  # fmt: skip
        if name not in one:
            raise UnknownInstruction(f"special register {name}")
        return one[name]

    # -- lanes that went different ways ------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.pc is None and not self.others

    def runnable(self) -> bool:
        return self.pc is not None or any(f.runnable() for f in self.others)

    def split(self, pc: int, mask: np.ndarray, wait: Wait | None = None) -> None:
        self.others.append(Fragment(pc, mask, wait))
        self.switch = True

    def block(self, pc: int, wait: Wait) -> None:
        """The current lanes stop and go on at ``pc``."""
        self.others.append(Fragment(pc, self.mask, wait))
        self.pc = None
        self.switch = True

    def set_mask(self, mask: np.ndarray) -> None:
        self.mask, self.full = mask, bool(mask.all())

    def pick(self) -> bool:
        """Go on with the lanes of the lowest program counter; False if none can."""
        if self.pc is not None:
            self.others.append(Fragment(self.pc, self.mask))
        runnable = [f for f in self.others if f.runnable()]
        self.switch = False
        self.pc = None
        if not runnable:
            return False
        first = min(runnable, key=lambda f: f.pc)
        group = [f for f in self.others if f.pc == first.pc and (f in runnable or f.wait.merge)]
        if first.timed_out or (first.wait is not None and first.wait.resume):
            group = [first]  # resumes by itself; others join at the next instruction
        self.others = [f for f in self.others if not any(f is g for g in group)]
        mask = np.zeros(32, bool)
        for f in group:
            mask |= f.mask
        self.pc = first.pc
        self.timed_out = first.timed_out
        self.set_mask(mask)
        if first.wait is not None and first.wait.resume and not first.timed_out:
            first.wait.resume(self, mask)
        self.limit = min((f.pc for f in self.others if f.runnable() or f.wait.merge), default=1 << 60)
        if any(f.wait is not None for f in self.others):
            self.limit = min(self.limit, self.pc)  # look again soon
        return True

    def finish(self, mask: np.ndarray) -> None:
        """Lanes exit."""
        self.live &= ~mask
        self.pc = None
        self.switch = True

    def advance(self, budget: int) -> None:
        """Execute up to ``budget`` instructions; returns early where no lane can go on."""
        operations, counts = self.program.operations, self.cta.launch.counts
        if self.pc is None or self.others:
            if not self.pick():
                return
        try:
            while budget > 0:
                budget -= 1
                self.steps += 1
                at = self.pc
                operation = operations[at]
                counts[at] += 1
                active = None if self.full else self.mask
                if operation.guard is not None:
                    guard = self.r[operation.guard]
                    if operation.negated:
                        guard = ~guard
                    active = guard if active is None else guard & active
                    if operation.control:
                        if not self._guarded_control(operation, active):
                            if self.switch and not self.pick():
                                return
                            continue
                        active = None if self.full else self.mask
                    else:
                        count = np.count_nonzero(active)
                        if count == 0:
                            self.pc += 1
                            if (self.others and self.pc >= self.limit) and not self.pick():
                                return
                            continue
                        active = None if count == 32 else active.copy()
                if operation.members is not None and not (active is None and not self.others):
                    if not self._gathered(operation, active):
                        if not self.pick():
                            return
                        continue
                if operation.control:
                    operation.run(self, active)
                    if self.cta.launch.yielding:
                        self.cta.launch.yielding = False
                        budget = 0
                else:
                    operation.run(self, active)
                    self.pc += 1
                if self.switch or (self.others and self.pc >= self.limit):
                    if not self.others and self.pc is None:
                        return
                    if not self.pick():
                        return
        except PtxError as error:
            if getattr(error, "located", False):
                raise
            lanes = "all lanes" if self.full else f"lanes {np.flatnonzero(self.mask).tolist()}"
            where = operations[at].source
            new = type(error)(
                f"{error}\n  CTA {self.cta.position}, warp {self.index}, {lanes}, step {self.steps}, "
                f"instruction {at}, line {where.line}: {where.text}"
            )
            new.located = True
            raise new from error

    def _guarded_control(self, operation: Operation, taken: np.ndarray) -> bool:
        """Let the lanes whose guard is false pass; False if no lane is left for the instruction."""
        count = np.count_nonzero(taken)
        if count == 0:
            self.pc += 1
            self.switch = bool(self.others)
            return False
        if count < np.count_nonzero(self.mask):
            self.split(self.pc + 1, self.mask & ~taken)
            self.set_mask(taken.copy())
        return True

    def _gathered(self, operation: Operation, active: np.ndarray | None) -> bool:
        """Whether all members of a collective are here; otherwise the lanes wait for the others."""
        bits = int(self.r[operation.members][np.argmax(self.mask)])
        needed = ((bits >> ops.LANES) & 1).astype(bool)
        here = ALL if active is None else active
        if not needed[here].all():
            raise Divergence(f"lanes {np.flatnonzero(here & ~needed).tolist()} are not in their member mask {bits:#x}")
        missing = needed & self.live & ~here
        if not missing.any():
            return True
        if not any((f.mask & missing).any() for f in self.others):
            raise Divergence(f"lanes {np.flatnonzero(missing).tolist()} of the member mask take no part")
        mask = self.mask

        self.block(
            self.pc,
            Wait(
                lambda: not (needed & self.live & ~mask).any(),
                lambda: f"lanes {np.flatnonzero(needed & self.live & ~mask).tolist()} at {operation.source.text!r}",
                merge=True,
            ),
        )
        return False

    # -- ordering ------------------------------------------------------------------------------------------------

    def touch(self, mask: np.ndarray | None) -> None:
        """Lanes access memory that others share."""
        self.unordered |= True if mask is None else mask

    def release(self, lanes: np.ndarray) -> np.ndarray:
        """What others may know once these lanes tell them: nothing that other lanes did since the warp last met."""
        clocks = self.cta.launch.clocks
        if (self.unordered & ~lanes).any():
            clock = clocks.now[self.agent].copy()
            clock[self.agent] -= 1
            return clock
        self.unordered[:] = False
        return clocks.release(self.agent)

    # -- cp.async ------------------------------------------------------------------------------------------------

    def land(self, ready: Callable[[AsyncCopy], np.ndarray]) -> None:
        """Deliver the copies of the lanes that ``ready`` names, in order of issue."""
        launch, shared = self.cta.launch, self.cta.shared
        for copy in self.copies:
            lanes = copy.lanes & ready(copy)
            for lane in np.flatnonzero(lanes):
                deliver(launch, shared, copy, lane)
            copy.lanes &= ~lanes
        self.copies = [c for c in self.copies if c.lanes.any()]


def deliver(launch: Launch, shared: mem.SharedMemory, copy: AsyncCopy, lane: int) -> None:
    data = np.zeros(copy.nbytes, np.uint8)
    if n := int(copy.source_bytes[lane]):
        data[:n] = launch.memory.read_bytes(int(copy.source[lane]), n)
    shared.land(int(copy.destination[lane]), data)


# -- CTAs and the launch -----------------------------------------------------------------------------------------


class Round:
    """One use of a named barrier."""

    def __init__(self, num_clocks: int):
        self.arrived = 0
        self.expected: int | None = None
        self.done = False
        self.clock = np.zeros(num_clocks, np.int64)
        self.votes: list[np.ndarray] = []


@dataclass
class BulkCopy:
    destination: int
    source: int
    nbytes: int
    barrier: mem.Mbarrier
    clock: np.ndarray


class Cta:
    def __init__(self, launch: Launch, number: int):
        self.launch, self.number = launch, number
        gx, gy, _ = launch.grid
        self.position = (number % gx, number // gx % gy, number // (gx * gy))
        x, y, z = launch.block
        threads = x * y * z
        self.num_warps = -(-threads // 32)
        self.warps: list[Warp] = []
        first = number * (self.num_warps + 1)
        self.shared = mem.SharedMemory(launch.shared_bytes, self.num_warps, launch.clocks, first, launch.races)
        self.rounds: dict[int, Round] = {}
        self.bulk: deque[BulkCopy] = deque()
        self.sync_clocks: dict[int, np.ndarray] = {}  # of atomics and volatile accesses, by address
        for w in range(self.num_warps):
            self.warps.append(Warp(self, w, launch.program, w * 32 + ops.LANES < threads))

    @property
    def done(self) -> bool:
        return all(w.done for w in self.warps)

    def live_threads(self) -> int:
        return sum(int(np.count_nonzero(w.live)) for w in self.warps)

    def round(self, barrier: int) -> Round:
        if barrier not in self.rounds or self.rounds[barrier].done:
            self.rounds[barrier] = Round(len(self.launch.clocks.now))
        return self.rounds[barrier]

    def arrive(self, barrier: int, warp: Warp, threads: int, count: int | None) -> Round:
        """``threads`` of a warp arrive at a named barrier that waits for ``count`` (None: all of the CTA)."""
        if not 0 <= barrier < 16:
            raise BarrierMisuse(f"barrier {barrier}")
        if count is not None and (count % 32 or count <= 0):
            raise BarrierMisuse(f"barrier {barrier} for {count} threads: not a multiple of 32")
        current = self.round(barrier)
        if current.arrived and current.expected != count:
            raise BarrierMisuse(f"barrier {barrier} expects {current.expected} threads, a warp says {count}")
        current.expected = count
        current.arrived += threads
        np.maximum(current.clock, warp.release(warp.mask), out=current.clock)
        self.launch.events += 1
        self.settle(barrier)
        if current.arrived > (self.live_threads() if count is None else count):
            raise BarrierMisuse(f"{current.arrived} threads at barrier {barrier}, which expects {count}")
        return current

    def settle(self, barrier: int) -> None:
        current = self.rounds[barrier]
        expected = self.live_threads() if current.expected is None else current.expected
        if not current.done and current.arrived and current.arrived == expected:
            current.done = True

    def land_bulk(self) -> None:
        """Deliver the oldest bulk copy."""
        copy = self.bulk.popleft()
        self.shared.land(copy.destination, self.launch.memory.read_bytes(copy.source, copy.nbytes))
        copy.barrier.complete(copy.nbytes, copy.clock)
        self.launch.events += 1

    def land_one(self) -> bool:
        """Something asynchronous arrives; False if nothing is under way."""
        if self.bulk:
            self.land_bulk()
            return True
        for warp in self.warps:
            if warp.late_arrivals:
                lanes, action = warp.late_arrivals.pop(0)
                warp.land(lambda copy, lanes=lanes: lanes)
                action()
                self.launch.events += 1
                return True
        return False

    def check_end(self) -> None:
        if self.bulk:
            raise CopyInFlight(f"CTA {self.position} ended with {len(self.bulk)} bulk copies in flight")


@dataclass
class Launch:
    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    memory: mem.Memory
    shared_bytes: int
    dynamic_smem: int
    late: bool
    races: bool
    clocks: mem.Clocks
    params: np.ndarray
    count_conflicts: bool
    statistics: Statistics
    counts: list[int]
    num_sms: int = 132
    events: int = 0  # whatever may let another warp go on
    yielding: bool = False


def schedule(launch: Launch, ctas: list[Cta], quantum: int, rng: np.random.Generator | None, max_steps: int) -> None:
    """Run CTAs that are resident together until all have ended."""
    warps = [w for c in ctas for w in c.warps]
    idle_rounds, last_retry = 0, -1
    while warps:
        if rng is not None:
            warps = [warps[i] for i in rng.permutation(len(warps))]
        before, ran = launch.events, False
        for warp in warps:
            if warp.runnable():
                warp.advance(quantum if rng is None else int(rng.integers(1, quantum + 1)))
                ran = True
                if warp.done:
                    launch.events += 1
                    for barrier in warp.cta.rounds:
                        warp.cta.settle(barrier)
                    if warp.cta.done:
                        warp.cta.check_end()
        warps = [w for w in warps if not w.done]
        if sum(launch.counts) > max_steps:
            raise StepLimit(f"more than {max_steps} instructions; " + _states(warps))
        idle_rounds = 0 if launch.events != before else idle_rounds + 1
        if (ran and idle_rounds < 64) or not warps:
            continue
        if any(c.land_one() for c in ctas):
            continue
        if ran:
            continue
        retry = [f for w in warps for f in w.others if f.wait is not None and f.wait.retry]
        if not retry or launch.events == last_retry:
            raise Deadlock("no warp can go on:\n" + _states(warps))
        last_retry = launch.events
        for fragment in retry:
            fragment.timed_out = True


def _states(warps: list[Warp]) -> str:
    lines = []
    for warp in warps:
        operations = warp.program.operations
        fragments = list(warp.others)
        if warp.pc is not None:
            fragments.append(Fragment(warp.pc, warp.mask))
        for f in fragments:
            lanes = "" if f.mask.all() else f" lanes {np.flatnonzero(f.mask).tolist()}"
            line = operations[f.pc].source.line if f.pc < len(operations) else "end"
            reason = f.wait.reason() if f.wait is not None else "runs"
            lines.append(f"  CTA {warp.cta.position} warp {warp.index}{lanes}, line {line}: {reason}")
    return "\n".join(lines)


def run(
    ptx: str,
    entry: str | None,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence,
    dynamic_smem: int,
    memory: mem.Memory,
    async_copies: str = "late",
    *,
    cta_order: str | Sequence[int] = "interleaved",
    seed: int | None = None,
    quantum: int = 256,
    races: bool = True,
    count_conflicts: bool = False,
    max_steps: int = 50_000_000,
) -> Statistics:
    """Execute one entry of a PTX module over a grid.

    args: one per kernel parameter: int, float, or bytes for an array parameter. Results go to the arrays of ``memory``.
    async_copies: "late": an asynchronous copy lands when a lane waits for it and nothing else can run, and poisons its
        destination until then; "early": it lands at issue.
    cta_order: "interleaved" (all CTAs resident, warps take turns), "sequential", "reversed", or the CTA numbers in
        order (one after another).
    seed: warps take turns in random order for random numbers of instructions.
    Raises the errors of this package.
    """
    if async_copies not in ("late", "early"):
        raise ValueError(f"async_copies={async_copies!r}")
    module = parse(ptx)
    kernel = module.entry(entry)
    grid, block = (tuple(int(n) for n in (*x, 1, 1)[:3]) for x in (grid, block))
    threads = block[0] * block[1] * block[2]
    if kernel.max_threads is not None and threads > kernel.max_threads:
        raise ValueError(f"{threads} threads, but {kernel.name} allows {kernel.max_threads}")

    symbols, local_bytes, shared_bytes = {"WARP_SZ": 32}, 0, 0
    dynamic = [v for v in module.variables if v.space == "shared" and v.nbytes == 0]
    for v in [*module.variables, *kernel.variables]:
        if v.space == "shared" and v.nbytes:
            start = -(-shared_bytes // v.align) * v.align
            symbols[v.name], shared_bytes = mem.SHARED_BASE + start, start + v.nbytes
        elif v.space == "local":
            start = -(-max(local_bytes, LOCAL_BASE) // v.align) * v.align
            symbols[v.name], local_bytes = start, start + v.nbytes
        elif v.space in ("global", "const"):
            data = np.frombuffer(v.data or bytes(v.nbytes), np.uint8).copy()
            symbols[v.name] = memory.add(data, v.name, writable=v.space == "global")
    for v in dynamic:
        symbols[v.name] = mem.SHARED_BASE + -(-shared_bytes // max(v.align, 16)) * max(v.align, 16)
    if dynamic:
        shared_bytes = max(symbols[v.name] for v in dynamic) - mem.SHARED_BASE
    shared_bytes += dynamic_smem
    params = _params(kernel, args, symbols)

    count = grid[0] * grid[1] * grid[2]
    clocks = mem.Clocks(count * (-(-threads // 32) + 1))
    memory.begin(clocks if races else None)
    program = Program(kernel, symbols, local_bytes)
    statistics = Statistics()
    launch = Launch(
        program, grid, block, memory, shared_bytes, dynamic_smem, async_copies == "late", races, clocks, params,
        count_conflicts, statistics, [0] * len(program.operations),
    )  # fmt: skip
    rng = None if seed is None else np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        if cta_order == "interleaved":
            schedule(launch, [Cta(launch, i) for i in range(count)], quantum, rng, max_steps)
        else:
            named = {"sequential": range(count), "reversed": range(count)[::-1]}
            order = named[cta_order] if isinstance(cta_order, str) else cta_order
            if sorted(order) != list(range(count)):
                raise ValueError("cta_order must name every CTA once")
            for i in order:
                schedule(launch, [Cta(launch, i)], quantum, rng, max_steps)
    memory.end()
    for operation, n in zip(program.operations, launch.counts, strict=True):
        if n:
            statistics.instructions[operation.source.opcode] += n
    return statistics


def _params(kernel: Entry, args: Sequence, symbols: dict[str, int]) -> np.ndarray:
    if len(args) != len(kernel.params):
        raise ValueError(f"{kernel.name} has {len(kernel.params)} parameters, got {len(args)} arguments")
    size = max((p.align + p.nbytes for p in kernel.params), default=0)
    data = bytearray(-(-size // 16) * 16)
    for value, param, kind in zip(args, kernel.params, kernel.param_types, strict=True):
        symbols[param.name] = param.align
        if kind == "bytes":
            raw = bytes(value)
        elif kind in ("f32", "f64"):
            raw = struct.pack("<f" if kind == "f32" else "<d", value)
        else:
            raw = (int(value) & ((1 << 8 * param.nbytes) - 1)).to_bytes(param.nbytes, "little")
        if len(raw) != param.nbytes:
            raise ValueError(f"parameter {param.name} takes {param.nbytes} bytes, got {len(raw)}")
        data[param.align : param.align + param.nbytes] = raw
    return np.frombuffer(bytes(data), np.uint8)


# -- control -----------------------------------------------------------------------------------------------------

CONTROL: dict[str, Callable] = {}


def control(*names: str):
    def register(f):
        for name in names:
            CONTROL[name] = f
        return f

    return register


@control("bra")
def _bra(d, ins, m, entry):
    m.flag("uni")
    m.finish()
    target = entry.target(ins.operands[0].name, ins.scopes)

    def run(w, mask):
        w.pc = target
        if w.others:
            w.switch = True

    return run


@control("brx")
def _brx(d, ins, m, entry):
    m.flag("idx", "uni")
    m.finish()
    index = d.source(ins.operands[0], "u32")
    targets = [entry.target(t, ins.scopes) for t in entry.branch_targets[ins.operands[1].name]]

    def run(w, mask):
        chosen, here = w.r[index], w.mask
        if int(chosen[here].max()) >= len(targets):
            raise OutOfBounds(f"brx.idx to entry {int(chosen[here].max())} of {len(targets)}")
        w.pc = None
        for i in np.unique(chosen[here]):
            w.split(targets[int(i)], here & (chosen == i))

    return run


@control("ret", "exit")
def _ret(d, ins, m, entry):
    m.flag("uni")
    m.finish()
    return lambda w, mask: w.finish(w.mask)


@control("trap")
def _trap(d, ins, m, entry):
    def run(w, mask):
        raise PtxError("trap")

    return run


@control("nanosleep")
def _nanosleep(d, ins, m, entry):
    def run(w, mask):
        w.pc += 1
        w.cta.launch.yielding = True

    return run


@control("bar", "barrier")
def _bar(d, ins, m, entry):
    if m.rest[:1] == ["warp"]:
        members = d.source(ins.operands[0], "b32")

        def run_warp(w, mask):
            fake = Operation(None, True, None, False, members, ins)
            if w._gathered(fake, mask):
                w.release(w.mask)
                w.pc += 1

        return run_warp
    aligned = m.flag("aligned") or m.base == "bar"
    m.flag("cta")
    action = m.one_of(("sync", "arrive", "red"))
    operands, target, votes, combine = list(ins.operands), None, None, ""
    if action == "red":
        combine = m.one_of(("popc", "and", "or"))
        target = d.destination(operands.pop(0), m.type())
        votes = ops._predicate(d, operands.pop())
    m.finish()
    number = d.source(operands[0], "u32")
    count = d.source(operands[1], "u32") if len(operands) > 1 else None

    def run(w, mask):
        if aligned and (w.live & ~w.mask).any():
            missing = np.flatnonzero(w.live & ~w.mask).tolist()
            raise Divergence(f"lanes {missing} are elsewhere at an aligned barrier")
        here = w.mask
        lane = int(np.argmax(here))
        index = int(w.r[number][lane])
        expected = None if count is None else int(w.r[count][lane])
        threads = 32 if aligned and expected is not None else int(np.count_nonzero(here))
        if votes is not None:
            w.cta.round(index).votes.append(votes(w.r)[here])
        current = w.cta.arrive(index, w, threads, expected)
        if action == "arrive":
            w.pc += 1
            return

        def resume(w, mask):
            w.cta.launch.clocks.acquire(w.agent, current.clock)
            if target is not None:
                all_votes = np.concatenate(current.votes)
                value = {"popc": all_votes.sum, "and": all_votes.all, "or": all_votes.any}[combine]()
                ops.store(w.r[target], value, mask)

        def reason():
            expects = w.cta.live_threads() if current.expected is None else current.expected
            return f"barrier {index}, {current.arrived} of {expects} threads are there"

        w.block(w.pc + 1, Wait(lambda: current.done, reason, resume))
        w.cta.launch.yielding = True  # or the last to arrive would always go on first

    return run


# -- memory ------------------------------------------------------------------------------------------------------

_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param", "local", "const")
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "evict_first", "evict_last", "unified")
_ORDER = ("volatile", "relaxed", "acquire", "release", "acq_rel", "seq_cst", "mmio")
_SCOPES = ("cta", "cluster", "gpu", "sys")


def _address(d: ops.Decoder, operand) -> Callable[[list], np.ndarray]:
    """r -> addresses of all lanes, int64."""
    if not isinstance(operand, Address):
        raise UnknownInstruction(f"address {operand}")
    offset = operand.offset
    if isinstance(operand.base, Register):
        wide = TYPE_BYTES[operand.base.type]
        slot = d.source(operand.base, f"u{8 * wide}")
        return lambda r: r[slot].astype(np.int64) + offset
    slot = d.source(operand.base, "s64")
    return lambda r: r[slot] + offset


def _memory_modifiers(m: ops.Modifiers) -> tuple[str, str, bool, int]:
    """(space, order or "" for a plain access, non-coherent, vector length)."""
    space = m.one_of(_SPACES, "generic").split("::")[0]
    order = m.one_of(_ORDER) if set(m.rest) & set(_ORDER) else ""
    m.flag("weak")
    m.flag(*_SCOPES)
    m.flag(*_CACHE)
    nc = m.flag("nc")
    vector = {"v2": 2, "v4": 4, "v8": 8, "": 1}[
        m.one_of(("v2", "v4", "v8"), "") if set(m.rest) & {"v2", "v4", "v8"} else ""
    ]
    m.rest = [p for p in m.rest if not p.startswith(("L1::", "L2::", "level::"))]
    return space, order, nc, vector


def resolve(space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """Generic addresses -> (space, addresses in it)."""
    if space != "generic":
        return space, addresses
    window = int(addresses[0]) >> mem.WINDOW_BITS
    spaces = {mem.SHARED_WINDOW: "shared", mem.LOCAL_WINDOW: "local"}
    if window not in spaces:
        return "global", addresses
    if ((addresses >> mem.WINDOW_BITS) != window).any():
        raise UnknownInstruction("generic addresses of several spaces in one access")
    return spaces[window], addresses - (window << mem.WINDOW_BITS)


def count_wavefronts(w: Warp, at: np.ndarray, nbytes: int, ins: Instruction) -> None:
    """Bank conflicts: a phase moves 128 bytes: 32 lanes of 4 bytes, 16 of 8, 8 of 16."""
    if w.cta.launch.count_conflicts and nbytes >= 4:
        lanes = 128 // nbytes
        extra = 0
        for phase in range(0, len(at), lanes):
            words = np.unique((at[phase : phase + lanes, None] // 4 + np.arange(nbytes // 4)).reshape(-1))
            extra += int(np.bincount(words % 32).max()) - 1
        w.cta.launch.statistics.shared_wavefronts[f"{ins.line}: {ins.text}"] += extra


def synchronise(
    w: Warp, where: str, addresses: np.ndarray, mask: np.ndarray | None, reads: bool, writes: bool, order: str
) -> None:
    """Ordered accesses: whoever reads the location may learn what its writers knew. Shared: always in order."""
    launch = w.cta.launch
    if not launch.races:
        return
    release = lambda: w.release(ALL if mask is None else mask)  # noqa: E731
    for address in {int(a) for a in addresses}:
        if where == "shared":
            clock = w.cta.sync_clocks.setdefault(address, np.zeros(len(launch.clocks.now), np.int64))
            launch.clocks.synchronise(w.agent, clock, reads, writes, "acq_rel", release)
        else:
            launch.clocks.synchronise(w.agent, launch.memory.sync_clock(address), reads, writes, order, release)


@ops.builder("ld", "ldu")
def _ld(d, ins, m):
    kind = m.type()
    space, order, nc, vector = _memory_modifiers(m)
    m.finish()
    size = TYPE_BYTES[kind]
    total = size * vector
    targets = ins.operands[0].items if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    if len(targets) != vector:
        raise UnknownInstruction("vector length")
    outs = [d.destination(t, kind) for t in targets]
    address = _address(d, ins.operands[1])
    element, dtype = np.arange(vector), ops.DTYPES[kind]
    several = vector > 1

    def run(w, mask):
        at = address(w.r)
        if mask is not None:
            at = at[mask]
        where, at = resolve(space, at)
        if where in ("global", "const"):
            memory = w.cta.launch.memory
            if order:
                synchronise(w, where, at, mask, True, False, order)
            buffer, at = memory.locate(at, total)
            memory.check_read(buffer, at, total, nc)
            if not order and buffer.writable:
                memory.check_race(buffer, at, total, w.agent, write=False)
                w.touch(mask)
            view = buffer.views[size]
        elif where == "shared":
            shared = w.cta.shared
            shared.check(at, total)
            if order:
                synchronise(w, where, at, mask, True, False, order)
            shared.check_read(at, total, w.agent)
            w.touch(mask)
            count_wavefronts(w, at, total, ins)
            view = shared.views[size]
        elif where == "param":
            view = w.cta.launch.params
            if int(at.min()) < 0 or int(at.max()) + total > len(view):
                raise OutOfBounds("parameter space")
            view = view.view(ops.UNSIGNED[size])
        else:
            lanes = np.flatnonzero(ALL if mask is None else mask)[:, None]
            index = local_index(w, at, total)
            if not w.local_valid[lanes, index].all():
                raise Uninitialised("read of local memory that nobody wrote")
            data = np.ascontiguousarray(w.local[lanes, index]).view(ops.UNSIGNED[size])
            view, at = data.reshape(-1), np.arange(len(lanes)) * total
        index = at // size
        data = (view[index[:, None] + element] if several else view[index][:, None]).view(dtype)
        for i, out in enumerate(outs):
            if out is None:
                continue
            if mask is None:
                w.r[out][...] = data[:, i]
            else:
                w.r[out][mask] = data[:, i]

    return run


def local_index(w: Warp, at: np.ndarray, nbytes: int) -> np.ndarray:
    if int(at.min()) < LOCAL_BASE or int(at.max()) + nbytes > w.local.shape[1]:
        raise OutOfBounds(f"{nbytes} bytes at {int(at[0])} of local memory")
    return at[:, None] + np.arange(nbytes)


@ops.builder("st")
def _st(d, ins, m):
    kind = m.type()
    space, order, _, vector = _memory_modifiers(m)
    m.finish()
    size = TYPE_BYTES[kind]
    total = size * vector
    items = ins.operands[1].items if isinstance(ins.operands[1], Vector) else (ins.operands[1],)
    if len(items) != vector:
        raise UnknownInstruction("vector length")
    unsigned = ops.UNSIGNED[size]
    values = [d.truncated(v, f"b{8 * size}") for v in items]
    address = _address(d, ins.operands[0])
    element = np.arange(vector)

    def run(w, mask):
        r = w.r
        at = address(r)
        data = np.stack([v(r).view(unsigned) for v in values], 1)
        if mask is not None:
            at, data = at[mask], data[mask]
        where, at = resolve(space, at)
        if where == "global":
            memory = w.cta.launch.memory
            if order:
                synchronise(w, where, at, mask, False, True, order)
            buffer, at = memory.locate(at, total)
            memory.mark_written(buffer, at, total)
            if not order:
                memory.check_race(buffer, at, total, w.agent, write=True)
                w.touch(mask)
            view = buffer.views[size]
        elif where == "shared":
            shared = w.cta.shared
            shared.check(at, total)
            shared.check_write(at, total, w.agent)
            w.touch(mask)
            if order:
                synchronise(w, where, at, mask, False, True, order)
            count_wavefronts(w, at, total, ins)
            view = shared.views[size]
        elif where == "local":
            lanes = np.flatnonzero(ALL if mask is None else mask)[:, None]
            index = local_index(w, at, total)
            w.local[lanes, index] = np.ascontiguousarray(data).view(np.uint8).reshape(len(lanes), total)
            w.local_valid[lanes, index] = True
            return
        else:
            raise UnknownInstruction(f"store to .{where}")
        w.cta.launch.events += 1
        view[(at // size)[:, None] + element] = data

    return run


def _atomic_function(op: str, kind: str) -> Callable:
    """(old, b, c) -> new."""
    return {
        "add": lambda old, b, c: old + b,
        "min": lambda old, b, c: min(old, b),
        "max": lambda old, b, c: max(old, b),
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
        "exch": lambda old, b, c: b,
        "cas": lambda old, b, c: c if old == b else old,
        "inc": lambda old, b, c: type(old)(0) if old >= b else old + type(old)(1),
        "dec": lambda old, b, c: b if old == 0 or old > b else old - type(old)(1),
    }[op]


@ops.builder("atom", "red")
def _atom(d, ins, m):
    op = m.one_of(("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
    kind = m.type()
    space, order, _, vector = _memory_modifiers(m)
    m.flag("noftz")
    m.finish()
    if vector > 1 or kind.startswith("bf16"):
        raise UnknownInstruction("form of an atomic")
    packed = kind.endswith("x2")
    dtype, size = ops.DTYPES[kind], TYPE_BYTES[kind]
    operands = list(ins.operands)
    out = d.destination(operands.pop(0), kind) if m.base == "atom" else None
    address = _address(d, operands[0])
    b = d.source(operands[1], kind)
    c = d.source(operands[2], kind) if op == "cas" else b
    f = _atomic_function(op, kind)

    def run(w, mask):
        lanes = np.flatnonzero(ALL if mask is None else mask)
        where, at = resolve(space, address(w.r)[lanes])
        if where == "global":
            memory = w.cta.launch.memory
            synchronise(w, where, at, mask, True, True, order)
            buffer, at = memory.locate(at, size)
            memory.check_read(buffer, at, size)
            memory.mark_written(buffer, at, size)
            view = buffer.data.view(dtype)
        elif where == "shared":
            shared = w.cta.shared
            shared.check(at, size)
            if (shared.states(at, size) != mem.VALID).any():
                shared.refuse(at, size, "atomic")
            synchronise(w, where, at, mask, True, True, order)
            view = shared.data.view(dtype)
        else:
            raise UnknownInstruction(f"atomic in .{where}")
        w.cta.launch.events += 1
        for lane, index in zip(lanes, at // view.itemsize, strict=True):
            for half in range(2 if packed else 1):
                old = view[index + half]
                at_operand = 2 * lane + half if packed else lane
                view[index + half] = f(old, w.r[b][at_operand], w.r[c][at_operand])
                if out is not None:
                    target = w.r[out].view(dtype) if packed else w.r[out]
                    target[at_operand] = old

    return run


def no_operation(*names: str):
    for name in names:
        ops.BUILDERS[name] = lambda d, ins, m: lambda w, mask: None


# hints and limits
no_operation("prefetch", "prefetchu", "discard", "griddepcontrol", "setmaxnreg", "applypriority")


@ops.builder("fence", "membar")
def _fence(d, ins, m):
    if m.rest[:1] == ["proxy"] or m.rest[:1] == ["mbarrier_init"]:
        return lambda w, mask: None

    def run(w, mask):
        clocks = w.cta.launch.clocks
        clocks.acquire(w.agent, clocks.pending[w.agent])
        clocks.fenced[w.agent] = w.release(ALL if mask is None else mask)

    return run


@ops.builder("createpolicy")
def _createpolicy(d, ins, m):
    slot = d.destination(ins.operands[0], "b64")
    return lambda w, mask: ops.store(w.r[slot], 0, mask)


@ops.builder("isspacep")
def _isspacep(d, ins, m):
    space = m.one_of(_SPACES).split("::")[0]
    a, slot = d.source(ins.operands[1], "u64"), d.destination(ins.operands[0], "pred")
    window = {"shared": mem.SHARED_WINDOW, "local": mem.LOCAL_WINDOW}.get(space)

    def compute(r):
        windows = r[a] >> np.uint64(mem.WINDOW_BITS)
        return windows >= mem.FIRST_BUFFER if window is None else windows == window

    return ops.assign(slot, compute)


@ops.collective("ldmatrix", "stmatrix")
def _ldmatrix(d, ins, m):
    if not (m.flag("sync") and m.flag("aligned") and m.flag("m8n8") and m.flag("b16")):
        raise UnknownInstruction("form of ldmatrix or stmatrix")
    count = {"x1": 1, "x2": 2, "x4": 4}[m.one_of(("x1", "x2", "x4"))]
    trans = m.flag("trans")
    space = m.one_of(_SPACES, "generic").split("::")[0]
    m.finish()
    load = m.base == "ldmatrix"
    registers, place = ins.operands if load else ins.operands[::-1]
    items = registers.items if isinstance(registers, Vector) else (registers,)
    if len(items) != count:
        raise UnknownInstruction("number of registers")
    slots = [(d.destination if load else d.source)(o, "b32") for o in items]
    address = _address(d, place)

    def run(w, mask):
        if mask is not None:
            raise Divergence("ldmatrix or stmatrix with lanes missing")
        shared = w.cta.shared
        where, at = resolve(space, address(w.r)[: 8 * count])
        if where != "shared":
            raise UnknownInstruction(f"address in .{where}")
        shared.check(at, 16)
        count_wavefronts(w, at, 16, ins)
        index = (at // 2)[:, None] + np.arange(8)
        if load:
            shared.check_read(at, 16, w.agent)
            w.touch(mask)
            rows = shared.views[2][index].reshape(count, 8, 8)
            for slot, matrix in zip(slots, rows, strict=True):
                matrix = np.ascontiguousarray(matrix.T if trans else matrix)
                w.r[slot][...] = matrix.view(np.uint32).reshape(-1)
        else:
            shared.check_write(at, 16, w.agent)
            w.touch(mask)
            w.cta.launch.events += 1
            for slot, rows in zip(slots, index.reshape(count, 8, 8), strict=True):
                matrix = w.r[slot].view(np.uint16).reshape(8, 8)
                shared.views[2][rows] = matrix.T if trans else matrix

    return run


# -- asynchronous copies -------------------------------------------------------------------------------------------


@ops.builder("cp")
def _cp(d, ins, m):
    if m.rest[:2] == ["async", "bulk"]:
        return _bulk(d, ins, m.rest[2:])
    if m.rest[:1] != ["async"]:
        raise UnknownInstruction("form of cp")
    rest = m.rest[1:]
    if rest == ["commit_group"]:

        def commit(w, mask):
            w.committed[ALL if mask is None else mask] += 1

        return commit
    if rest in (["wait_group"], ["wait_all"]):
        keep = int(ins.operands[0].text) if rest == ["wait_group"] else None

        def wait(w, mask):
            here = ALL if mask is None else mask
            last = w.committed - keep if keep is not None else np.full(32, 1 << 60)  # groups below this are done
            w.land(lambda copy: here & (copy.group < last))

        return wait
    if rest[:2] == ["mbarrier", "arrive"]:
        return _cp_arrive(d, ins, "noinc" in rest)

    if rest[0] not in ("ca", "cg") or rest[1].split("::")[0] != "shared" or rest[2] != "global":
        raise UnknownInstruction("form of cp.async")
    destination, source = (_address(d, o) for o in ins.operands[:2])
    nbytes = int(ins.operands[2].text)
    if nbytes not in (4, 8, 16) or (rest[0] == "cg" and nbytes != 16):
        raise UnknownInstruction(f"cp.async.{rest[0]} of {nbytes} bytes")
    size = None
    if len(ins.operands) > 3:
        if isinstance(ins.operands[3], Not) or getattr(ins.operands[3], "type", "") == "pred":
            ignore = ops._predicate(d, ins.operands[3])
            size = lambda r: np.where(ignore(r), 0, nbytes)  # noqa: E731
        else:
            slot = d.source(ins.operands[3], "u32")
            size = lambda r: r[slot]  # noqa: E731

    def run(w, mask):
        shared, launch = w.cta.shared, w.cta.launch
        lanes = (ALL if mask is None else mask).copy()
        dst, src = destination(w.r), source(w.r)
        sizes = np.broadcast_to(size(w.r) if size else nbytes, 32).astype(np.int64)
        if (sizes[lanes] > nbytes).any():
            raise OutOfBounds(f"source size {int(sizes[lanes].max())} of a cp.async of {nbytes} bytes")
        shared.check(dst[lanes], nbytes)
        reading = lanes & (sizes > 0)
        if (src[lanes] % nbytes).any():
            raise OutOfBounds(f"misaligned source of a cp.async of {nbytes} bytes")
        for n in np.unique(sizes[reading]):
            buffer, offsets = launch.memory.locate(src[reading & (sizes == n)], int(n), align=1)
            launch.memory.check_race(buffer, offsets, int(n), w.agent, write=False)
        shared.check_write(dst[lanes], nbytes, w.agent)
        w.touch(mask)
        index = dst[lanes][:, None] + np.arange(nbytes)
        shared.state[index] = mem.IN_FLIGHT
        shared.data[index] = mem.POISON
        copy = AsyncCopy(lanes, w.committed.copy(), dst, src, nbytes, sizes)
        w.copies.append(copy)
        launch.events += 1
        if not launch.late:
            w.land(lambda c: ALL)

    return run


def _cp_arrive(d, ins, noinc: bool) -> Callable:
    address = _address(d, ins.operands[0])

    def run(w, mask):
        shared, launch = w.cta.shared, w.cta.launch
        lanes = (ALL if mask is None else mask).copy()
        barriers = [shared.mbarrier_visible(int(a), w.agent) for a in address(w.r)[lanes]]
        if not noinc:
            for barrier in barriers:
                barrier.pending += 1
        clock = w.release(lanes)

        def arrive():
            for barrier in barriers:
                barrier.arrive(1, clock)

        launch.events += 1
        if launch.late and any((c.lanes & lanes).any() for c in w.copies):
            w.late_arrivals.append((lanes, arrive))
        else:
            arrive()

    return run


def _bulk(d, ins, rest: list[str]) -> Callable:
    if rest[:1] == ["prefetch"]:
        return lambda w, mask: None
    if rest == ["commit_group"]:
        return lambda w, mask: w.bulk_stores.append([])
    if rest[:1] == ["wait_group"]:
        keep = int(ins.operands[0].text)

        def wait(w, mask):
            ready, w.bulk_stores = w.bulk_stores[: -1 - keep], w.bulk_stores[max(len(w.bulk_stores) - 1 - keep, 0) :]
            for store in (s for group in ready for s in group):
                store()

        return wait
    rest = [p for p in rest if not p.startswith("L2::")]
    if rest == ["shared::cluster", "global", "mbarrier::complete_tx::bytes"] or rest == [
        "shared::cta", "global", "mbarrier::complete_tx::bytes"
    ]:  # fmt: skip
        return _bulk_load(d, ins)
    if rest == ["global", "shared::cta", "bulk_group"]:
        return _bulk_store(d, ins)
    raise UnknownInstruction("form of cp.async.bulk")


def _bulk_load(d, ins) -> Callable:
    destination, source, barrier = (_address(d, ins.operands[i]) for i in (0, 1, 3))
    size = d.source(ins.operands[2], "u32")

    def run(w, mask):
        cta, shared, launch = w.cta, w.cta.shared, w.cta.launch
        for lane in np.flatnonzero(ALL if mask is None else mask):
            dst, src, nbytes = int(destination(w.r)[lane]), int(source(w.r)[lane]), int(w.r[size][lane])
            if nbytes % 16 or dst % 16 or src % 16:
                raise OutOfBounds(f"bulk copy of {nbytes} bytes from {src:#x} to {dst:#x}: not multiples of 16")
            if nbytes == 0:
                continue
            buffer, _ = launch.memory.locate(np.array([src]), nbytes, align=16)
            pieces = src % (1 << mem.WINDOW_BITS) + 16 * np.arange(nbytes // 16)
            launch.memory.check_race(buffer, pieces, 16, w.agent, write=False, by=shared.copies)
            target = shared.mbarrier_visible(int(barrier(w.r)[lane]), w.agent)
            clock = shared.begin_bulk(dst, nbytes, w.agent)
            cta.bulk.append(BulkCopy(dst, src, nbytes, target, clock))
            launch.events += 1
            flying = sum(c.nbytes for c in cta.bulk)
            statistics = launch.statistics
            statistics.max_bulk_bytes_in_flight = max(statistics.max_bulk_bytes_in_flight, flying)
            if not launch.late:
                cta.land_bulk()

    return run


def _bulk_store(d, ins) -> Callable:
    destination, source = (_address(d, o) for o in ins.operands[:2])
    size = d.source(ins.operands[2], "u32")

    def run(w, mask):
        shared, launch = w.cta.shared, w.cta.launch
        for lane in np.flatnonzero(ALL if mask is None else mask):
            dst, src, nbytes = int(destination(w.r)[lane]), int(source(w.r)[lane]), int(w.r[size][lane])
            if nbytes % 16 or dst % 16 or src % 16:
                raise OutOfBounds(f"bulk copy of {nbytes} bytes from {src:#x} to {dst:#x}: not multiples of 16")
            pieces = src + 16 * np.arange(nbytes // 16)
            shared.check(pieces, 16)
            shared.check_read(pieces, 16, w.agent)
            launch.memory.locate(np.array([dst]), nbytes, align=16)

            def deliver(dst=dst, src=src, nbytes=nbytes):
                launch.memory.write_bytes(dst, shared.data[src : src + nbytes])

            launch.events += 1
            if launch.late:
                w.bulk_stores[-1].append(deliver)
            else:
                deliver()

    return run


# -- mbarriers -----------------------------------------------------------------------------------------------------


@control("mbarrier")
def _mbarrier(d, ins, m, entry):
    action = m.rest.pop(0)
    m.flag("b64")
    m.flag("shared", "shared::cta", "shared::cluster")
    m.flag(*_ORDER)
    m.flag(*_SCOPES)
    if action in ("try_wait", "test_wait"):
        return _mbarrier_wait(d, ins, m)
    expects = m.flag("expect_tx") or action == "expect_tx"
    m.flag("noComplete")
    m.finish()
    operands = list(ins.operands)
    state = None
    if not isinstance(operands[0], Address):
        state = d.destination(operands.pop(0), "b64")
    address = _address(d, operands[0])
    number = d.source(operands[1], "u32") if len(operands) > 1 else None
    if action not in ("init", "inval", "arrive", "expect_tx", "arrive_drop"):
        raise UnknownInstruction(f"mbarrier.{action}")

    def run(w, mask):
        shared = w.cta.shared
        for lane in np.flatnonzero(w.mask):
            at = int(address(w.r)[lane])
            n = int(w.r[number][lane]) if number is not None else 1
            if action == "init":
                shared.mbarrier_init(at, n, w.agent)
                continue
            if action == "inval":
                shared.mbarrier_inval(at)
                continue
            barrier = shared.mbarrier_visible(at, w.agent)
            if state is not None:
                w.r[state][lane] = barrier.phase
            if expects:
                barrier.transactions += n
                if abs(barrier.transactions) >= 1 << 20:
                    raise BarrierMisuse(f"{barrier.transactions} bytes expected by one mbarrier: the limit is 2^20 - 1")
            if action.startswith("arrive"):
                if action == "arrive_drop":
                    barrier.count -= 1
                barrier.arrive(1 if expects else n, w.release(w.mask))
        w.cta.launch.events += 1
        w.pc += 1

    return run


def _mbarrier_wait(d, ins, m) -> Callable:
    parity = m.flag("parity")
    m.finish()
    target = d.destination(ins.operands[0], "pred")
    address = _address(d, ins.operands[1])
    token = d.source(ins.operands[2], "u32" if parity else "b64")

    def run(w, mask):
        shared, here = w.cta.shared, w.mask
        at, tokens = address(w.r), w.r[token]
        waits = {(int(at[i]), int(tokens[i])) for i in np.flatnonzero(here)}
        barriers = {a: shared.mbarrier_visible(a, w.agent) for a, _ in waits}

        def complete(a: int, t: int) -> bool:
            return barriers[a].done(t) if parity else barriers[a].phase != t

        def ready() -> bool:
            return all(complete(a, t) for a, t in waits)

        if not ready() and not w.timed_out and w.pc in w.refused:

            def reason() -> str:
                a, t = next(x for x in waits if not complete(*x))
                return f"mbarrier at offset {a - mem.SHARED_BASE}, parity {t}: {barriers[a]}"

            w.block(w.pc, Wait(ready, reason, retry=True))
            return
        w.timed_out = False
        if ready():
            w.refused.discard(w.pc)
        else:
            w.refused.add(w.pc)  # a first attempt fails at once: who ignores the answer is found out
        result = np.array([here[i] and complete(int(at[i]), int(tokens[i])) for i in range(32)])
        for a, t in waits:
            if complete(a, t):
                w.cta.launch.clocks.acquire(w.agent, barriers[a].clock)
        ops.store(w.r[target], result, here)
        w.pc += 1

    return run
