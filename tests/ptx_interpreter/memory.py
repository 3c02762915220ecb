"""Global memory as registered NumPy buffers, shared memory with the state of every byte, mbarriers."""

from __future__ import annotations

import numpy as np

from .errors import BarrierMisuse, CopyInFlight, OutOfBounds, Race, Uninitialised

WINDOW_BITS = 32  # every buffer has an address window of its own, so no overrun can reach another one
SHARED_WINDOW, LOCAL_WINDOW, FIRST_BUFFER = 1, 2, 16
SHARED_BASE = 1024  # shared addresses start here; 0 is no shared address
POISON = 0xFF  # NaN in every float format

UNWRITTEN, VALID, IN_FLIGHT, MBARRIER = range(4)  # state of a byte of shared memory
ALL_VALID = 0x0101010101010101


def views(data: np.ndarray) -> dict[int, np.ndarray]:
    """The bytes as unsigned integers of 1, 2, 4 and 8 bytes."""
    return {1: data, 2: data.view(np.uint16), 4: data.view(np.uint32), 8: data.view(np.uint64)}


class Clocks:
    """Vector clocks: ``now[a, b]`` is the last step of agent b that agent a knows of.

    Agents are the warps of the grid and, per CTA, the bulk copies. A step ends when an agent releases what it did.
    """

    def __init__(self, agents: int):
        self.now = np.zeros((agents, agents), np.int64)
        self.now[np.arange(agents), np.arange(agents)] = 1
        self.fenced = np.zeros((agents, agents), np.int64)  # what a relaxed access of an agent publishes
        self.pending = np.zeros((agents, agents), np.int64)  # what it has read but not fenced

    def time(self, agent: int) -> int:
        return int(self.now[agent, agent])

    def release(self, agent: int) -> np.ndarray:
        """What others may know of an agent from now on; its later accesses are not part of it."""
        clock = self.now[agent].copy()
        self.now[agent, agent] += 1
        return clock

    def acquire(self, agent: int, clock: np.ndarray) -> None:
        np.maximum(self.now[agent], clock, out=self.now[agent])

    def synchronise(self, agent: int, clock: np.ndarray, reads: bool, writes: bool, order: str, release) -> None:
        """An atomic or ordered access to a location whose clock is given; ``release()``: what the agent tells."""
        if reads:
            if order in ("acquire", "acq_rel", "seq_cst"):
                self.acquire(agent, clock)
            else:
                np.maximum(self.pending[agent], clock, out=self.pending[agent])
        if writes:
            strong = order in ("release", "acq_rel", "seq_cst")
            np.maximum(clock, release() if strong else self.fenced[agent], out=clock)


class Buffer:
    """One registered array. ``written`` marks bytes written by the launch, ``valid`` those that may be read."""

    def __init__(self, array: np.ndarray, name: str, writable: bool, initialised: bool):
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: the array must be contiguous")
        self.array, self.name, self.writable = array, name, writable
        self.nbytes = array.nbytes
        self.data = np.full(-(-array.nbytes // 16) * 16, POISON, np.uint8)
        self.data[: self.nbytes] = array.reshape(-1).view(np.uint8)
        self.written = np.zeros(len(self.data), bool)
        self.valid = None if initialised else np.zeros(len(self.data), bool)
        self.views = views(self.data)
        # races: per 2 bytes, who wrote and read it last, and when
        self.writer, self.write_time, self.reader, self.read_time = (
            np.zeros(len(self.data) // 2 if writable else 0, np.int64) for _ in range(4)
        )

    def granules(self, offsets: np.ndarray, nbytes: int) -> np.ndarray:
        first = offsets >> 1
        return first if nbytes <= 2 else first[:, None] + np.arange(nbytes // 2)


class Memory:
    """Global memory: arrays at made-up 64-bit addresses. ``run`` copies results back into writable arrays."""

    def __init__(self):
        self.buffers: dict[int, Buffer] = {}
        self.clocks: Clocks | None = None
        self.sync_clocks: dict[int, np.ndarray] = {}  # of atomics and ordered accesses, by address

    def add(self, array: np.ndarray, name: str = "", *, writable: bool = True, initialised: bool = True) -> int:
        """Register a contiguous array; returns its address.

        ``initialised=False``: reading bytes that no kernel wrote is an error.
        """
        index = FIRST_BUFFER + len(self.buffers)
        self.buffers[index] = Buffer(array, name or f"buffer {len(self.buffers)}", writable, initialised)
        return index << WINDOW_BITS

    def begin(self, clocks: Clocks | None) -> None:
        """A launch starts: take over what the host wrote meanwhile. ``clocks`` None: races do not matter."""
        self.clocks = clocks
        self.sync_clocks.clear()
        for b in self.buffers.values():
            b.data[: b.nbytes] = b.array.reshape(-1).view(np.uint8)
            b.written[:] = False
            b.write_time[:] = b.read_time[:] = 0

    def end(self) -> None:
        for b in self.buffers.values():
            if b.writable and b.written.any():
                b.array.reshape(-1).view(np.uint8)[:] = b.data[: b.nbytes]

    def locate(self, addresses: np.ndarray, nbytes: int, align: int = 0) -> tuple[Buffer, np.ndarray]:
        """The buffer of all addresses (uint64) and the offsets in it; raises where they leave it."""
        addresses = np.asarray(addresses, np.uint64)
        window = int(addresses[0]) >> WINDOW_BITS
        buffer = self.buffers.get(window)
        if buffer is None:
            raise OutOfBounds(f"global address {int(addresses[0]):#x} is in no buffer")
        offsets = addresses.astype(np.int64) - (window << WINDOW_BITS)
        low, high = int(offsets.min()), int(offsets.max()) + nbytes
        if low < 0 or high > buffer.nbytes:
            bad = low if low < 0 else high - nbytes
            raise OutOfBounds(f"{nbytes} bytes at offset {bad} of {buffer.name!r}, which has {buffer.nbytes} bytes")
        if ((offsets & ((align or nbytes) - 1)) != 0).any():
            raise OutOfBounds(f"misaligned access of {nbytes} bytes to {buffer.name!r}")
        return buffer, offsets

    def parts(self, addresses: np.ndarray, nbytes: int, align: int = 0) -> list[tuple]:
        """(which of the addresses, their buffer, offsets in it) for every buffer among lanes' addresses."""
        windows = np.asarray(addresses, np.uint64) >> np.uint64(WINDOW_BITS)
        if (windows == windows[0]).all():
            return [(slice(None), *self.locate(addresses, nbytes, align))]
        which = [np.flatnonzero(windows == window) for window in np.unique(windows)]
        return [(part, *self.locate(addresses[part], nbytes, align)) for part in which]

    def check_race(
        self, buffer: Buffer, offsets: np.ndarray, nbytes: int, agent: int, write: bool, by: int | None = None
    ) -> None:
        """Raise Race where another agent's conflicting access is not known to be over; note this one, as ``by``'s."""
        if self.clocks is None or not buffer.writable:
            return
        granules, known = buffer.granules(offsets, nbytes), self.clocks.now[agent]
        what, by = "write" if write else "read", agent if by is None else by
        if (buffer.write_time[granules] > known[buffer.writer[granules]]).any():
            raise Race(f"{what} of bytes of {buffer.name!r} that another warp wrote with no synchronisation since")
        if not write:
            buffer.reader[granules], buffer.read_time[granules] = by, self.clocks.time(by)
            return
        if (buffer.read_time[granules] > known[buffer.reader[granules]]).any():
            raise Race(f"write of bytes of {buffer.name!r} that another warp read with no synchronisation since")
        buffer.writer[granules], buffer.write_time[granules] = by, self.clocks.time(by)

    def check_read(self, buffer: Buffer, offsets: np.ndarray, nbytes: int, constant: bool = False) -> None:
        if buffer.valid is not None and not buffer.valid[offsets[:, None] + np.arange(nbytes)].all():
            raise Uninitialised(f"read of bytes of {buffer.name!r} that nobody wrote")
        if constant and buffer.writable and buffer.written[offsets[:, None] + np.arange(nbytes)].any():
            raise Race(f"ld.global.nc of bytes of {buffer.name!r} that this launch writes")

    def mark_written(self, buffer: Buffer, offsets: np.ndarray, nbytes: int) -> None:
        if not buffer.writable:
            raise OutOfBounds(f"write to read-only {buffer.name!r}")
        index = offsets[:, None] + np.arange(nbytes)
        buffer.written[index] = True
        if buffer.valid is not None:
            buffer.valid[index] = True

    def read_bytes(self, address: int, nbytes: int) -> np.ndarray:
        buffer, offsets = self.locate(np.array([address], np.uint64), nbytes, align=1)
        self.check_read(buffer, offsets, nbytes)
        return buffer.data[offsets[0] : offsets[0] + nbytes].copy()

    def write_bytes(self, address: int, data: np.ndarray) -> None:
        buffer, offsets = self.locate(np.array([address], np.uint64), len(data), align=1)
        self.mark_written(buffer, offsets, len(data))
        buffer.data[offsets[0] : offsets[0] + len(data)] = data


class Mbarrier:
    """State of one mbarrier object."""

    def __init__(self, count: int, num_clocks: int):
        self.count = self.pending = count
        self.transactions = 0
        self.phase = 0
        self.clock = np.zeros(num_clocks, np.int64)  # what those who arrived had seen
        self.next_clock = np.zeros(num_clocks, np.int64)

    def arrive(self, count: int, clock: np.ndarray) -> None:
        if count > self.pending:
            raise BarrierMisuse(f"{count} arrivals where the phase expects {self.pending} more (of {self.count})")
        self.pending -= count
        np.maximum(self.next_clock, clock, out=self.next_clock)
        self.settle()

    def complete(self, nbytes: int, clock: np.ndarray) -> None:
        self.transactions -= nbytes
        np.maximum(self.next_clock, clock, out=self.next_clock)
        self.settle()

    def settle(self) -> None:
        """End the phase if nothing is missing."""
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            np.maximum(self.clock, self.next_clock, out=self.clock)

    def done(self, parity: int) -> bool:
        return (self.phase & 1) != (parity & 1)

    def __str__(self) -> str:
        return (
            f"phase {self.phase} (parity {self.phase & 1}) open, {self.pending} of {self.count} arrivals and "
            f"{self.transactions} bytes missing"
        )


class SharedMemory:
    """A CTA's shared memory, byte states and mbarriers; ``agent`` names a warp or the bulk copies in the clocks.

    Races are found per 2-byte granule and between warps only; lanes of one warp run in lockstep here.
    """

    def __init__(self, nbytes: int, num_warps: int, clocks: Clocks, first: int, races: bool):
        self.limit = SHARED_BASE + nbytes
        size = -(-self.limit // 16) * 16
        self.data = np.full(size, POISON, np.uint8)
        self.state = np.zeros(size, np.uint8)
        self.views, self.state_views = views(self.data), views(self.state)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.clocks, self.first = clocks, first  # the CTA's warps are agents first, first + 1, ..., then its copies
        self.copies = first + num_warps
        self.races = races
        self.writer = np.zeros(size // 2, np.int64)
        self.write_time = np.zeros(size // 2, np.int64)
        self.read_time = np.zeros((num_warps + 1, size // 2), np.int64)
        self.unfenced = np.zeros(size // 2, bool)  # stored since its writer's last proxy fence

    def check(self, addresses: np.ndarray, nbytes: int, align: int = 0) -> None:
        """Bounds and alignment of addresses (int64)."""
        low, high = int(addresses.min()), int(addresses.max()) + nbytes
        if low < SHARED_BASE or high > self.limit:
            bad = low if low < SHARED_BASE else high - nbytes
            raise OutOfBounds(
                f"{nbytes} bytes at offset {bad - SHARED_BASE} of shared memory, which has "
                f"{self.limit - SHARED_BASE} bytes"
            )
        if ((addresses & ((align or nbytes) - 1)) != 0).any():
            raise OutOfBounds(f"misaligned access of {nbytes} bytes to shared memory")

    def states(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        return self.state[addresses[:, None] + np.arange(nbytes)]

    def check_read(self, addresses: np.ndarray, nbytes: int, agent: int) -> None:
        unit, index = self.pieces(addresses, nbytes)
        if (self.state_views[unit][index] != ALL_VALID >> 64 - 8 * unit).any():
            self.refuse(addresses, nbytes, "read")
        if self.races:
            granules = self.granules(addresses, nbytes)
            self.no_race("read", agent, granules)
            self.read_time[agent - self.first][granules] = self.clocks.time(agent)

    def check_write(self, addresses: np.ndarray, nbytes: int, agent: int, by: int | None = None) -> None:
        """A write by an agent (``by``: whose clock will stand for it)."""
        unit, index = self.pieces(addresses, nbytes)
        states = self.state_views[unit][index]
        valid = ALL_VALID >> 64 - 8 * unit
        if ((states != valid) & (states != 0)).any() and (self.states(addresses, nbytes) >= IN_FLIGHT).any():
            self.refuse(addresses, nbytes, "write")
        if self.races:
            granules = self.granules(addresses, nbytes)
            self.no_race("write", agent, granules)
            flat = granules.reshape(-1)
            known = self.clocks.now[agent, self.first : self.copies + 1, None]
            late = self.read_time[:, flat] > known
            if late.any():
                other = self.first + int(np.argwhere(late)[0, 0])
                raise Race(f"write of shared bytes that {self.who(other)} read with no synchronisation since")
            by = agent if by is None else by
            self.writer[granules] = by
            self.write_time[granules] = self.clocks.time(by)
            self.read_time[:, flat] = 0
            self.unfenced[flat] = by < self.copies
        self.state_views[unit][index] = valid

    def fence_proxy(self, agent: int) -> None:
        """What the agent stored may be read by the tensor core."""
        self.unfenced[self.writer == agent] = False

    def check_operand(self, addresses: np.ndarray, nbytes: int, agent: int) -> None:
        """A read by the tensor core for an agent."""
        self.check(addresses, nbytes)
        self.check_read(addresses, nbytes, agent)
        if self.races and self.unfenced[self.granules(addresses, nbytes)].any():
            raise Race("wgmma reads shared bytes that were stored with no proxy fence since")

    def pieces(self, addresses: np.ndarray, nbytes: int) -> tuple[int, np.ndarray]:
        """Accesses as units of at most 8 bytes: the unit and the indices into its view."""
        unit = min(nbytes, 8)
        index = addresses // unit
        return unit, index if nbytes == unit else index[:, None] + np.arange(nbytes // unit)

    def granules(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        first = addresses >> 1
        return first if nbytes <= 2 else first[:, None] + np.arange(nbytes // 2)

    def no_race(self, what: str, agent: int, granules: np.ndarray) -> None:
        writer = self.writer[granules]
        bad = self.write_time[granules] > self.clocks.now[agent][writer]
        if bad.any():
            who = self.who(int(writer[bad][0]))
            raise Race(f"{what} of shared bytes that {who} wrote with no synchronisation since")

    def who(self, agent: int) -> str:
        return "a bulk copy" if agent == self.copies else f"warp {agent - self.first}"

    def refuse(self, addresses: np.ndarray, nbytes: int, what: str) -> None:
        states = self.states(addresses, nbytes)
        at = int(addresses[(states != VALID).any(1)][0]) - SHARED_BASE
        where = f"{what} of {nbytes} bytes at offset {at} of shared memory"
        if (states == IN_FLIGHT).any():
            raise CopyInFlight(f"{where}: an asynchronous copy to it is in flight")
        if (states == MBARRIER).any():
            raise BarrierMisuse(f"{where}: an mbarrier lies there")
        raise Uninitialised(f"{where}: nobody wrote it")

    # -- mbarriers -----------------------------------------------------------------------------------------

    def mbarrier(self, address: int) -> Mbarrier:
        if address not in self.mbarriers:
            raise BarrierMisuse(f"no mbarrier at offset {address - SHARED_BASE} of shared memory")
        return self.mbarriers[address]

    def mbarrier_init(self, address: int, count: int, agent: int) -> None:
        self.check(np.array([address]), 8)
        if address in self.mbarriers:
            raise BarrierMisuse(f"the mbarrier at offset {address - SHARED_BASE} is initialised twice")
        if not 1 <= count < 1 << 20:
            raise BarrierMisuse(f"mbarrier count {count}")
        self.check_write(np.array([address]), 8, agent)
        self.state[address : address + 8] = MBARRIER
        self.mbarriers[address] = Mbarrier(count, len(self.clocks.now))

    def mbarrier_inval(self, address: int) -> None:
        self.mbarrier(address)
        del self.mbarriers[address]
        self.state[address : address + 8] = UNWRITTEN

    def mbarrier_visible(self, address: int, agent: int) -> Mbarrier:
        """The mbarrier, whose initialisation the agent must know of."""
        barrier = self.mbarrier(address)
        if self.races:
            self.no_race("use", agent, np.array([address >> 1]))
        return barrier

    # -- asynchronous copies -------------------------------------------------------------------------------

    def begin_bulk(self, address: int, nbytes: int, agent: int) -> np.ndarray:
        """A bulk copy may land from now on: the bytes are nobody's. Returns what its arrival tells."""
        pieces = address + 16 * np.arange(nbytes // 16)
        self.check(pieces, 16)
        self.check_write(pieces, 16, agent, by=self.copies)
        self.state[address : address + nbytes] = IN_FLIGHT
        self.data[address : address + nbytes] = POISON
        clock = np.zeros(len(self.clocks.now), np.int64)
        clock[self.copies] = self.clocks.release(self.copies)[self.copies]
        return clock

    def land(self, address: int, data: np.ndarray) -> None:
        self.data[address : address + len(data)] = data
        self.state[address : address + len(data)] = VALID
