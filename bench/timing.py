"""Interleaved timing: implementations take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the distance between the quartiles."""

    median: float
    spread: float
    samples: int


def tune_malloc() -> None:
    """Keep freed blocks in the process (glibc). By default big ones go back to the kernel and every new tensor pays page faults,
    which makes plain PyTorch up to several times slower than it need be: peers are timed without that handicap."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


def _summary(samples: list[float]) -> Timing:
    quarter = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(statistics.median(samples), quarter[2] - quarter[0], len(samples))


def time_cpu(runs: dict[str, Run], *, budget: float, least: int = 30) -> dict[str, Timing]:
    """Round-robin wall-clock times; at least ``least`` samples each, or as many (3 or more) as ``budget`` seconds allow."""
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while (k := len(next(iter(samples.values())))) < least and (k < 3 or time.perf_counter() - start < budget):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - before)
    return {name: _summary(s) for name, s in samples.items()}


def time_cuda(runs: dict[str, Run], *, budget: float, least: int = 50) -> dict[str, Timing]:
    """Device-event times of CUDA-graph replays, the second-level cache flushed before each. Not yet run on a GPU."""
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # capture wants a warmed-up side stream
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            graphs[name] = graph.replay
        except RuntimeError:  # something that synchronises cannot be captured: timed as it is
            torch.cuda.synchronize()
            graphs[name] = run
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while (k := len(next(iter(samples.values())))) < least and (k < 3 or time.perf_counter() - start < budget):
        for name, run in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()  # also a backlog: the launch below is queued long before the device gets to it
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) / 1e3)
    return {name: _summary(s) for name, s in samples.items()}


def peak_extra_bytes(run: Run, device: str) -> int | None:
    """Most memory that torch held at once during one call beyond what it held before (its allocator's own account)."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in sorted(_allocations(recorded), key=lambda e: e[0]):
        held += event[1]
        peak = max(peak, held)
    return peak


def _allocations(recorded: Any) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation (positive) and release (negative) on the CPU."""
    events = recorded.profiler.kineto_results.events()
    return [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
