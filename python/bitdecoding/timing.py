"""Timing of calls that read a cache, candidates taking turns: CUDA-graph replays, plain calls, the read bandwidth.

On a GPU every candidate has copies of its cache, as many as it takes to exceed the L2 cache, and successive calls use
successive copies: all data come from memory, as between the layers of a model.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

COLD_BYTES = 300 << 20  # of cache copies in rotation: six times the L2 cache of an H100
MAX_COPIES = 2048  # a graph holds a call per copy
MIN_CALLS = 8  # per graph
HOST_CALLS = 200  # few enough that the launch queue does not fill
READ_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # of the buffer whose sum stands for the read bandwidth
COPY_BYTES = {"cuda": 340 << 20, "cpu": 128 << 20}  # of the buffer that is copied; a larger one copies more slowly
READ_ROUNDS = 5


@dataclass
class Candidate:
    """One way to do a problem: ``call(i)`` works on copy ``i % copies`` of a cache of ``cache_bytes``.

    ``reset``: what undoes the calls; before every measurement, outside its time.
    """

    name: str
    call: Callable[[int], object]
    copies: int
    cache_bytes: int
    reset: Callable[[], None] = lambda: None

    @property
    def cold(self) -> bool:
        """Whether the copies exceed the L2 cache, so that every call reads memory."""
        return self.copies * self.cache_bytes >= COLD_BYTES


class Times(NamedTuple):
    """Microseconds per call, medians.

    us: by CUDA-graph replays; on the CPU a plain call. plain_us: a plain call, from the call until its result is there.
    host_us: of the caller's time for a plain call that nobody waits for (GPU only).
    """

    us: float
    plain_us: float
    host_us: float | None


def copies_of(cache_bytes: int, device: torch.device) -> int:
    """How many copies of a cache to rotate."""
    return min(MAX_COPIES, COLD_BYTES // cache_bytes + 1) if device.type == "cuda" else 1


def memory_bytes(device: torch.device) -> int:
    """Of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(candidates: Sequence[Candidate], rounds: int, device: torch.device) -> list[Times]:
    """Time candidates that take turns, ``rounds`` measurements of each."""
    plain = plain_times(candidates, rounds, device)
    if device.type != "cuda":
        return [Times(us, us, None) for us in plain]
    hosts = [host_time(candidate) for candidate in candidates]
    return list(map(Times, graph_times(candidates, rounds), plain, hosts))


def call_times(candidates: Sequence[Candidate], rounds: int, device: torch.device) -> list[float]:
    """Times.us alone."""
    return graph_times(candidates, rounds) if device.type == "cuda" else plain_times(candidates, rounds, device)


def graph_times(candidates: Sequence[Candidate], rounds: int) -> list[float]:
    """Microseconds per call in a CUDA graph of one call per copy of the cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be making what the candidates read
    graphs = []
    with torch.cuda.stream(stream):
        for candidate in candidates:
            calls = max(candidate.copies, MIN_CALLS)
            candidate.call(0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(calls):
                    candidate.call(i)
            graph.replay()
            graphs.append((graph, calls))
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(rounds):
            for taken, candidate, (graph, calls) in zip(times, candidates, graphs, strict=True):
                candidate.reset()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                taken.append(start.elapsed_time(end) / calls * 1e3)
    return [statistics.median(taken) for taken in times]


def plain_times(candidates: Sequence[Candidate], rounds: int, device: torch.device) -> list[float]:
    """Microseconds from a plain call until its result is there."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: list[list[float]] = [[] for _ in candidates]
    for candidate in candidates:
        candidate.call(0)
    for i in range(rounds):
        for taken, candidate in zip(times, candidates, strict=True):
            candidate.reset()
            wait()
            start = time.perf_counter()
            candidate.call(i)
            wait()
            taken.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(taken) for taken in times]


def host_time(candidate: Candidate) -> float:
    """Microseconds of the caller per plain call that it does not wait for."""
    for timed in (False, True):
        candidate.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(HOST_CALLS):
            candidate.call(i)
        if timed:
            taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / HOST_CALLS * 1e6


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of copying a large buffer, bytes read plus bytes written, the best of several."""
    size = COPY_BYTES[device.type]
    source, target = torch.ones(2, size // 4, device=device)
    copying = Candidate("copy", lambda _: target.copy_(source), 1, size)
    return 2 * size / min(call_times([copying], 1, device)[0] for _ in range(READ_ROUNDS)) / 1e3


def read_bandwidth(device: torch.device) -> float:
    """GB/s of torch.sum over a large buffer, the best of several; a plain read kernel may be a little faster."""
    size = READ_BYTES[device.type]
    buffer = torch.ones(size // 4, device=device)
    reading = Candidate("read", lambda _: buffer.sum(), 1, size)
    return size / min(call_times([reading], 1, device)[0] for _ in range(READ_ROUNDS)) / 1e3
