"""What the interpreter notices. Every error says where: CTA, warp, lanes, line and text of the instruction."""


class PtxError(Exception):
    """Base of all faults found while parsing or running PTX."""


class UnknownInstruction(PtxError):
    """An instruction or a form of one that the interpreter does not know."""


class OutOfBounds(PtxError):
    """An access outside every buffer, a write to a read-only buffer, or a misaligned address."""


class Uninitialised(PtxError):
    """A read of bytes that nobody wrote."""


class CopyInFlight(PtxError):
    """A read or write of bytes that an asynchronous copy has not delivered yet, or an exit before it did."""


class Race(PtxError):
    """Two warps touch the same shared bytes, one of them writing, with no synchronisation in between."""


class BarrierMisuse(PtxError):
    """An mbarrier or barrier used against its rules."""


class Divergence(PtxError):
    """A collective executed by only some of the lanes it needs."""


class Deadlock(PtxError):
    """No warp can go on."""


class StepLimit(PtxError):
    """More instructions than allowed: most likely an endless loop."""
