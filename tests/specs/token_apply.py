"""token_apply: one rounding at the store for 16-bit types, a plain sum in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specs import Args, Bad, Case, Spec
from specs.data import DATA

# Plans: "random" shares E sources out among M rows; "keep" names M different tokens; "pool" averages 2 × 2 of a square grid.
CASES = (
    Case("merge", {"N": 98, "M": 49, "E": 98, "C": 64}, {"weight": True}),
    Case("sums", {"N": 60, "M": 20, "E": 80, "C": 40}, {"weight": True, "mean": False}),
    Case("counts", {"N": 60, "M": 20, "E": 80, "C": 72}, {"mean": False}),
    Case("tails", {"N": 33, "M": 12, "E": 40, "C": 17}, {"weight": True}),
    Case("below_vector", {"N": 20, "M": 9, "E": 31, "C": 15}, {"weight": True}),
    Case("keep", {"N": 61, "M": 23, "E": 23, "C": 65}, {"plan": "keep", "weight": True}),
    Case("keep_sum", {"N": 61, "M": 23, "E": 23, "C": 24}, {"plan": "keep", "mean": False, "weight": True}),
    Case("pool", {"N": 64, "M": 16, "E": 64, "C": 88}, {"plan": "pool"}),
    Case("one_row", {"N": 130, "M": 1, "E": 130, "C": 33}, {"weight": True}),
    Case("mostly_empty", {"N": 9, "M": 40, "E": 9, "C": 24}),
    Case("zero_weights", {"N": 30, "M": 20, "E": 40, "C": 16}, {"weight": "zeros"}),
    Case("one_channel", {"N": 7, "M": 3, "E": 9, "C": 1}),
    Case("no_tokens", {"N": 0, "M": 3, "E": 0, "C": 8}),
    Case("no_sources", {"N": 5, "M": 3, "E": 0, "C": 8}, {"mean": False}),
    Case("no_rows", {"N": 5, "M": 0, "E": 0, "C": 8}),
    Case("no_channels", {"N": 5, "M": 2, "E": 4, "C": 0}),
    Case("keep_320_of_2880", {"N": 2880, "M": 320, "E": 320, "C": 4096}, {"plan": "keep"}, bench=True),
    Case("pool_576", {"N": 576, "M": 144, "E": 576, "C": 4096}, {"plan": "pool"}, bench=True),
    Case("merge_2880", {"N": 2880, "M": 1440, "E": 2880, "C": 1024}, {"weight": True}, bench=True),
)


def _plan(kind: str, N: int, M: int, E: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "random":
        inner = torch.randint(0, E + 1, (max(M - 1, 0),), generator=g).sort().values
        start = torch.cat([torch.zeros(1), inner, torch.full((1,), E)]) if M else torch.zeros(1)
        return start.int(), torch.randint(0, max(N, 1), (E,), generator=g, dtype=torch.int32)
    if kind == "keep":
        return torch.arange(M + 1, dtype=torch.int32), torch.randperm(N, generator=g)[:M].sort().values.int()
    side = int(N**0.5)
    blocks = torch.arange(N, dtype=torch.int32).view(side // 2, 2, side // 2, 2).transpose(1, 2)
    return torch.arange(0, N + 1, 4, dtype=torch.int32), blocks.reshape(-1).clone()


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    N, M, E, C = (case.sizes[k] for k in "NMEC")
    x = DATA[case.data](1, N, C, generator)[0].to(dtype)
    start, source = _plan(case.options.get("plan", "random"), N, M, E, generator)
    weight = None
    if case.options.get("weight"):
        weight = torch.randint(1, 5, (E,), generator=generator).float()
    if case.options.get("weight") == "zeros":
        weight = weight * (torch.rand(E, generator=generator) < 0.4)
    return x, start, source, weight, case.options.get("mean", True)


def prepare_index_select(x: torch.Tensor, start: torch.Tensor, source: torch.Tensor, *rest: Any) -> Callable[[], Any]:
    if start.shape[0] - 1 != source.shape[0] or bool((start.diff() != 1).any()):
        raise ValueError("torch.index_select: for plans of single sources")
    return lambda: torch.index_select(x, 0, source)


def prepare_index_add(
    x: torch.Tensor, start: torch.Tensor, source: torch.Tensor, weight: torch.Tensor | None, mean: bool
) -> Callable[[], Any]:
    """Segments in x's own dtype, the row of every source known beforehand."""
    M = start.shape[0] - 1
    row = torch.repeat_interleave(torch.arange(M, device=x.device), start.diff())
    w = None if weight is None else weight[:, None].to(x.dtype)
    total = x.new_zeros(M).index_add(0, row, x.new_ones(len(row)) if w is None else w[:, 0])[:, None]

    def run() -> torch.Tensor:
        taken = x.index_select(0, source)
        out = x.new_zeros(M, x.shape[1]).index_add_(0, row, taken if w is None else taken * w)
        return out / total if mean else out

    return run


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


def _put(index: int, at: int, value: int) -> Any:
    return lambda args: args[index].__setitem__(at, value)


SPEC = Spec(
    op="token_apply",
    cases=CASES,
    inputs=inputs,
    tolerance=("one_rounding",),
    flops=lambda c: 2.0 * c.sizes["E"] * c.sizes["C"],
    bytes=lambda c, dtype: float((c.sizes["E"] + c.sizes["M"]) * c.sizes["C"] * dtype.itemsize),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][None]), ValueError, "(N, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("start_dtype", lambda a: a.__setitem__(1, a[1].long()), TypeError, "int32"),
        Bad("start_empty", lambda a: a.__setitem__(1, a[1][:0]), ValueError, "(M+1,)"),
        Bad("start_not_0", _put(1, 0, 1), ValueError, "got 1 at row 0"),
        Bad("start_descends", _put(1, 5, -3), ValueError, "got -3 at row 5"),
        Bad("start_too_large", _put(1, 7, 99), ValueError, "got 99 at row 7"),
        Bad("start_ends_early", _put(1, 49, 97), ValueError, "E = 98, got 97 at row 49"),
        Bad("source_dtype", lambda a: a.__setitem__(2, a[2].long()), TypeError, "int32"),
        Bad("source_too_large", _put(2, 4, 98), ValueError, "got 98 at entry 4"),
        Bad("source_too_small", _put(2, 97, -1), ValueError, "got -1 at entry 97"),
        Bad("weight_shape", _set(3, torch.ones(97)), ValueError, "(97,)"),
        Bad("weight_dtype", _set(3, torch.ones(98, dtype=torch.float16)), TypeError, "float32"),
    ),
    opaque=(1,),  # start of one value repeated is no plan; its strides are in test_token_apply.py
    prepared={"torch index_select": prepare_index_select, "torch index_add": prepare_index_add},
)
