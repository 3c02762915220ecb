"""Instructions that touch memory: loads, stores, atomics, matrices, asynchronous copies, mbarriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import memory as mem
from . import operations as ops
from .errors import BarrierMisuse, Divergence, OutOfBounds, Uninitialised, UnknownInstruction
from .machine import ALL, LOCAL_BASE, AsyncCopy, BulkCopy, Wait, Warp
from .operations import control
from .parser import TYPE_BYTES, Address, Instruction, Not, Register, Vector

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
    shared = where == "shared"
    clocks = (w.cta if shared else launch.memory).sync_clocks
    for address in set(addresses.tolist()):
        if address not in clocks:
            if not writes:
                continue  # nobody told anything there
            clocks[address] = np.zeros(len(launch.clocks.now), np.int64)
        launch.clocks.synchronise(w.agent, clocks[address], reads, writes, "acq_rel" if shared else order, release)


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
            data = np.empty((len(at), vector), ops.UNSIGNED[size])
            for part, buffer, offsets in memory.parts(at, total):
                memory.check_read(buffer, offsets, total, nc)
                if not order and buffer.writable:
                    memory.check_race(buffer, offsets, total, w.agent, write=False)
                    w.touch(mask)
                data[part] = buffer.views[size][(offsets // size)[:, None] + element]
            view, at = data.reshape(-1), np.arange(len(at)) * total
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
            for part, buffer, offsets in memory.parts(at, total):
                memory.mark_written(buffer, offsets, total)
                if not order:
                    memory.check_race(buffer, offsets, total, w.agent, write=True)
                    w.touch(mask)
                buffer.views[size][(offsets // size)[:, None] + element] = data[part]
            w.cta.launch.events += 1
            return
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
    if m.rest[:2] == ["proxy", "async"]:
        return lambda w, mask: w.cta.shared.fence_proxy(w.agent)
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
            for _, buffer, offsets in launch.memory.parts(src[reading & (sizes == n)], int(n), align=1):
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
    if rest == ["prefetch", "L2", "global"]:
        return _bulk_prefetch(d, ins)
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


def _bulk_prefetch(d, ins) -> Callable:
    """Nothing changes, but the memory must be there."""
    source, size = _address(d, ins.operands[0]), d.source(ins.operands[1], "u32")

    def run(w, mask):
        launch = w.cta.launch
        for lane in np.flatnonzero(ALL if mask is None else mask):
            at, nbytes = int(source(w.r)[lane]), int(w.r[size][lane])
            if nbytes % 16:
                raise OutOfBounds(f"prefetch of {nbytes} bytes: not a multiple of 16")
            launch.memory.locate(np.array([at]), nbytes, align=16)

    return run


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
