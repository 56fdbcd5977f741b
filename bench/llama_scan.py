"""llama.cpp's ``ssm_scan`` against ``selective_scan``, ``chunk_scan`` and ``state_update``, float32, taking turns.

python bench/llama_scan.py [--save]              # needs llama-cpp-python; --save appends to bench/results/mixers.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llama_cpp import F32, I32, Graph, why_not
from machine import record
from timing import tune_malloc

import effvlm

# d_inner and heads: Mamba-1 has a head per channel and a decay per state, Mamba-2 heads of 64 channels and a decay each.
SHAPES = {
    "mamba 2048": (2048, 2048, 16),
    "mamba 5120": (5120, 5120, 16),
    "mamba-2 2048": (2048, 32, 128),
    "mamba-2 5120": (5120, 80, 128),
}


class Scan(Graph):
    """One ``ssm_scan`` over L tokens of one sequence; returns (L, d_inner), in memory that the next call overwrites."""

    def __init__(self, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> None:
        super().__init__()
        (L, inner), heads, N = x.shape, dt.shape[1], B.shape[1]
        size = inner // heads
        state = torch.zeros(heads, size, N)
        inputs = [
            self._in_place(state, F32, N, size, heads, 1),
            self._in_place(x, F32, size, heads, L, 1),
            self._in_place(dt, F32, heads, L, 1),
            self._in_place(A, F32, A.shape[1], heads, 1),
            self._in_place(B, F32, N, 1, L, 1),
            self._in_place(C, F32, N, 1, L, 1),
            self._in_place(torch.zeros(1, dtype=torch.int32), I32, 1, 1, 1),
        ]
        context = self._context(1, graph=True)
        self._graph = self._ggml.ggml_new_graph(context)
        result = self._ggml.ggml_ssm_scan(context, *inputs, 1)  # one snapshot of the state
        self._ggml.ggml_build_forward_expand(self._graph, result)
        allocator = self._own("ggml_gallocr_free", self._ggml.ggml_gallocr_new(self._default))
        if not self._ggml.ggml_gallocr_alloc_graph(allocator, self._graph):
            raise MemoryError("llama.cpp: no memory for the graph")
        memory = (ctypes.c_float * (L * inner)).from_address(self._ggml.ggml_get_data(result))
        self._result = torch.frombuffer(memory, dtype=torch.float32).view(L, inner)


def ours(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> Any:
    """A function without arguments that does the same, in some shape."""
    (L, inner), heads, N = x.shape, dt.shape[1], B.shape[1]
    if L == 1:
        if heads == inner:
            state = torch.zeros(1, inner, N)
            return lambda: effvlm.state_update(state, x, dt, A, B, C, dt_softplus=True)
        state = torch.zeros(1, heads, inner // heads, N)
        wide = (dt[..., None].expand(1, heads, inner // heads), A[:, :, None].expand(heads, inner // heads, N))
        rows, b, c = x.view(1, heads, -1), B[None], C[None]  # llama.cpp's graph has its views before it is timed, too
        return lambda: effvlm.state_update(state, rows, *wide, b, c, dt_softplus=True)
    if heads == inner:
        return lambda: effvlm.selective_scan(x.mT[None], dt.mT[None], A, B.mT[None], C.mT[None], delta_softplus=True).out[0].mT

    def chunks() -> torch.Tensor:
        decay, gain = effvlm.ops.discretize(dt[None], A[:, 0], dt_softplus=True)
        q, k, v = C[None, :, None], B[None, :, None], x.view(1, L, heads, -1)
        return effvlm.chunk_scan(q, k, v, decay, gain=gain).out.view(L, inner)

    return chunks


@torch.no_grad()
def measure(name: str, L: int) -> dict[str, Any]:
    """Medians of both, and how far apart their first results are."""
    inner, heads, N = SHAPES[name]
    x, dt, B, C = torch.randn(L, inner), torch.randn(L, heads) - 2, torch.randn(L, N), torch.randn(L, N)
    A = -torch.rand(heads, N if heads == inner else 1) - 0.1
    runs = {"llama.cpp": Scan(x, dt, A, B, C), "effvlm": ours(x, dt, A, B, C)}
    first = [run().flatten().clone() for run in runs.values()]
    error = ((first[0] - first[1]).abs().max() / first[1].abs().max()).item()
    assert error < 1e-4, f"{name}: the two are {error} apart"
    times: dict[str, list[float]] = {who: [] for who in runs}
    # Steps by turns of a hundred: the threads that one library keeps awake must not be in the way of the other's every call.
    turns, calls = (30, 1) if L > 1 else (40, 100)
    for _ in range(turns):
        for who, run in runs.items():
            for _ in range(calls):
                start = time.perf_counter()
                run()
                times[who].append(time.perf_counter() - start)
    us = {who: statistics.median(t) * 1e6 for who, t in times.items()}
    return {"what": "llama.cpp", "op": name, "tokens": L, "us": us, "ratio": us["llama.cpp"] / us["effvlm"], "apart": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(f"llama.cpp: {reason}")
    tune_malloc()
    torch.manual_seed(0)
    rows = [measure(name, L) for L in (2048, 1) for name in SHAPES]
    for row in rows:
        print(json.dumps(row))
    if args.save:
        with (Path(__file__).parent / "results" / "mixers.jsonl").open("a") as file:
            file.writelines(json.dumps(row | {"machine": record("cpu")}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
