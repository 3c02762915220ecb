"""Warps and the lanes that part and meet in them, CTAs, the scheduler, and a launch."""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from . import memory as mem
from . import operations as ops
from .errors import (
    BarrierMisuse,
    CopyInFlight,
    Deadlock,
    Divergence,
    PtxError,
    StepLimit,
    UnknownInstruction,
)
from .parser import Entry, Immediate, Instruction, parse

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


@dataclass(slots=True)
class Operation:
    """A decoded instruction."""

    run: Callable
    control: bool  # sets the program counter itself
    guard: int | None
    negated: bool
    members: int | None  # slot of the member mask of a collective
    source: Instruction
    plain: bool = field(init=False)  # all lanes that are here execute it, and the next one after it

    def __post_init__(self) -> None:
        self.plain = not self.control and self.guard is None


class Program:
    """An entry, whose instructions are decoded when a warp first comes to them; launches share it."""

    def __init__(self, entry: Entry, symbols: dict[str, int], local_bytes: int):
        self.entry, self.local_bytes = entry, local_bytes
        self.decoder = ops.Decoder(symbols)
        self.operations: list[Operation | None] = [None] * len(entry.code)

    def decode(self, at: int) -> Operation:
        try:
            ins = self.entry.code[at].read()
            modifiers = ops.Modifiers(ins.parts)
            name = modifiers.base
            if name in ops.CONTROL:
                run, control = ops.CONTROL[name](self.decoder, ins, modifiers, self.entry), True
            elif name in ops.BUILDERS:
                run, control = ops.BUILDERS[name](self.decoder, ins, modifiers), False
            else:
                raise UnknownInstruction("no such instruction here")
            members = None
            if name in ops.COLLECTIVES:
                operand = ops.COLLECTIVES[name]
                mask = Immediate("0xffffffff") if operand is None else ins.operands[operand]
                members = self.decoder.source(mask, "b32")
            guard = None if ins.guard is None else self.decoder.source(ins.guard, "pred")
        except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise UnknownInstruction(f"cannot decode ({error})") from error
        operation = self.operations[at] = Operation(run, control, guard, ins.guard_negated, members, ins)
        return operation


@lru_cache(maxsize=32)
def decoded(ptx: str, name: str, symbols: frozenset[tuple[str, int]], local_bytes: int) -> Program:
    return Program(parse(ptx).entry(name), dict(symbols), local_bytes)


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


class Rows(dict[int, np.ndarray]):
    """A warp's operands by slot, made when one is first used: a warp runs a small part of most kernels."""

    def __init__(self, warp: Warp):
        super().__init__()
        self.warp, self.plan = warp, warp.program.decoder.plan
        self.registers: dict[int, np.ndarray] = {}

    def __missing__(self, slot: int) -> np.ndarray:
        kind, what, value = self.plan[slot]
        if kind == "reg":
            row = self.registers.get(what)
            if row is None:
                row = self.registers[what] = value.copy()
            else:
                row = row.view(value.dtype)
        elif kind == "const":
            row = value
        else:
            row = np.broadcast_to(np.asarray(self.warp.special(what)), 32).astype(value)
        self[slot] = row
        return row


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
        self.r = Rows(self)

    def special(self, name: str):
        cta, launch = self.cta, self.cta.launch
        threads = self.index * 32 + ops.LANES
        x, y, _ = launch.block
        one = {
            "%tid.x": threads % x, "%tid.y": threads // x % y, "%tid.z": threads // (x * y),
            "%laneid": ops.LANES, "%warpid": self.index, "%nwarpid": cta.num_warps,
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
        program, counts = self.program, self.cta.launch.counts
        operations = program.operations
        if self.pc is None or self.others:
            if not self.pick():
                return
        try:
            while budget > 0:
                budget -= 1
                self.steps += 1
                at = self.pc
                operation = operations[at] or program.decode(at)
                counts[at] += 1
                if operation.plain and self.full and not self.others:
                    operation.run(self, None)
                    self.pc += 1
                    continue
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
            where = program.entry.code[at]
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
        code = warp.program.entry.code
        fragments = list(warp.others)
        if warp.pc is not None:
            fragments.append(Fragment(warp.pc, warp.mask))
        for f in fragments:
            lanes = "" if f.mask.all() else f" lanes {np.flatnonzero(f.mask).tolist()}"
            line = code[f.pc].line if f.pc < len(code) else "end"
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
    program = decoded(ptx, kernel.name, frozenset(symbols.items()), local_bytes)
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
