"""Instructions that branch, end a lane, or wait at a barrier."""

from __future__ import annotations

import numpy as np

from . import operations as ops
from .errors import Divergence, OutOfBounds, PtxError
from .machine import Operation, Wait
from .operations import control


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
