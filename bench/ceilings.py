"""What this machine can do at most, measured: read bandwidth by working set, and matrix products by type."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def _best(run: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of the fastest call: a ceiling is what the machine does when nothing disturbs it."""
    run()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - before)
    return best


def measure(device: str, *, seconds: float = 0.4) -> dict[str, Any]:
    """``read_gb_s`` by working set in MB, and ``gemm_gflop_s`` by dtype, with all of torch's threads."""
    sizes = (1, 8, 24, 256) if device == "cpu" else (16, 1024)
    read = {}
    for mb in sizes:
        x = torch.ones(mb << 18, device=device)
        read[mb] = round((mb << 20) / _best(x.sum, device, seconds) / 1e9, 1)
    gemm = {}
    n = 1536 if device == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=device).to(dtype)
        gemm[str(dtype).removeprefix("torch.")] = round(2 * n**3 / _best(lambda a=a: a @ a, device, 2 * seconds) / 1e9)
    if device == "cpu":
        a = torch.randint(-100, 100, (n, n), dtype=torch.int8)
        gemm["int8"] = round(2 * n**3 / _best(lambda: torch._int_mm(a, a), device, 2 * seconds) / 1e9)
    return {"read_gb_s": read, "gemm_gflop_s": gemm}


def seconds_at_least(ceilings: dict[str, Any], dtype: torch.dtype, flops: float, moved: float) -> float:
    """The roofline: no call can take less than its bytes at read bandwidth, or its products at the rate of its type's GEMM."""
    read = ceilings["read_gb_s"]
    fits = [mb for mb in sorted(read) if moved <= mb << 20]
    bandwidth = read[fits[0] if fits else max(read)] * 1e9
    rates = ceilings["gemm_gflop_s"]
    rate = rates.get(str(dtype).removeprefix("torch."), rates["float32"]) * 1e9
    return max(moved / bandwidth, flops / rate)
