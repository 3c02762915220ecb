"""Executes the PTX of our kernels with NumPy, to test them on machines without a GPU.

    memory = Memory()
    x = memory.add(array)                       # a fake 64-bit address
    run(ptx, None, grid=(4, 1, 1), block=(128, 1, 1), args=[x, 17], dynamic_smem=0, memory=memory)

It is a test tool, not a simulator: timing, caches and memory ordering are not modelled, approximate functions
give the correctly rounded result, and lanes of a warp run in lockstep (lowest program counter first), so
that a missing ``bar.warp.sync`` goes unnoticed. It does notice: accesses out of bounds, misaligned, of bytes nobody
wrote or that an asynchronous copy has yet to deliver; shared-memory races between warps; mbarrier misuse;
divergent collectives; deadlocks.
"""

from . import accesses, control, warpgroups  # noqa: F401  (they register their instructions)
from .errors import (
    BarrierMisuse,
    CopyInFlight,
    Deadlock,
    Divergence,
    OutOfBounds,
    PtxError,
    Race,
    StepLimit,
    Uninitialised,
    UnknownInstruction,
)
from .machine import Statistics, run
from .memory import Memory
from .parser import parse

__all__ = [
    "BarrierMisuse",
    "CopyInFlight",
    "Deadlock",
    "Divergence",
    "Memory",
    "OutOfBounds",
    "PtxError",
    "Race",
    "Statistics",
    "StepLimit",
    "Uninitialised",
    "UnknownInstruction",
    "parse",
    "run",
]
