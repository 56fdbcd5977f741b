"""token_select: exact, but that a running sum may reach its share a token earlier or later where it all but does."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from effvlm.ops.token_select import RULES
from specs import Args, Bad, Case, Spec, Tensors

CASES = (
    *(Case(rule, {"N": 400, "S": 7}, {"rule": rule}) for rule in RULES),
    *(Case(f"{rule}_tails", {"N": 77, "S": 5}, {"rule": rule, "infinite": True}) for rule in RULES),
    Case("tails", {"N": 33, "S": 3}, {"rule": "top", "ties": True}),
    *(Case(f"{rule}_ties", {"N": 300, "S": 4}, {"rule": rule, "ties": True, "infinite": True}) for rule in RULES),
    *(Case(f"{rule}_single", {"N": 9, "S": 9}, {"rule": rule, "equal": True}) for rule in RULES),
    *(Case(f"{rule}_mostly_empty", {"N": 5, "S": 12}, {"rule": rule}) for rule in RULES),
    *(Case(f"{rule}_no_tokens", {"N": 0, "S": 2}, {"rule": rule}) for rule in RULES),
    Case("no_segments", {"N": 0, "S": 0}, {"rule": "top"}),
    Case("keep_320", {"N": 2880, "S": 1}, {"rule": "top", "limit": 320.0}, bench=True),
    Case("keep_64_each", {"N": 16384, "S": 64}, {"rule": "top", "limit": 64.0, "equal": True}, bench=True),
    Case("keep_tenth", {"N": 16384, "S": 1}, {"rule": "top", "limit": 1638.0}, bench=True),
    Case("iqr", {"N": 2880, "S": 1}, {"rule": "iqr", "limit": 1.5}, bench=True),
    Case("top_p", {"N": 2880, "S": 1}, {"rule": "top_p", "limit": 0.9}, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    (N, S), rule = case.sizes.values(), case.options["rule"]
    score = torch.randn(N, generator=generator)
    if case.options.get("ties"):
        score = (2 * score).round() / 2
    if rule == "top_p":
        score = score.abs()
    if case.options.get("infinite"):
        score[torch.randperm(N, generator=generator)[: N // 8]] = math.inf
        score[torch.randperm(N, generator=generator)[: N // 8]] = -math.inf
    inner = torch.randint(0, N + 1, (max(S - 1, 0),), generator=generator).sort().values
    start = torch.cat([torch.zeros(1), inner, torch.full((min(S, 1),), N)]).int()
    if case.options.get("equal"):
        start = torch.arange(S + 1, dtype=torch.int32) * (N // S)
    scale, shift = {"top": (2.0 * N / max(S, 1), -1.0), "above": (2.0, -1.0), "iqr": (2.0, 0.0), "top_p": (1.2, -0.1)}[rule]
    limit = torch.rand(S, generator=generator) * scale + shift
    if "limit" in case.options:
        limit = torch.full((S,), case.options["limit"])
    return score, start, limit, rule


def compare(args: Args, got: Tensors, oracle: Tensors, same: Tensors) -> None:
    score, start, limit, rule = args
    kept, count = (t.cpu() for t in got)
    first = start.tolist()
    for s, (a, b) in enumerate(pairwise(first)):
        x, k = score[a:b].double(), kept[a:b]
        assert count[s] == k.sum(), f"count of segment {s}: got {count[s]}, kept are {k.sum()}"
        if rule != "top_p":
            assert torch.equal(k, oracle[0][a:b]), f"segment {s}: kept are not those of the reference"
            continue
        assert torch.equal(k[x.isinf()], x[x.isinf()] > 0), f"segment {s}: -inf was kept, or +inf was not"
        x, k = x[x.isfinite()], k[x.isfinite()]
        order = x.argsort(descending=True, stable=True)
        r, sums, total = int(k.sum()), x[order].cumsum(0), x.sum().item()
        assert k[order[:r]].all(), f"segment {s}: kept are not the highest, ties by index"
        assert (r > 0) == (total > 0), f"segment {s}: {r} kept of a total of {total}"
        wanted, slack = min(max(limit[s].item(), 0), 1) * total, 1e-9 * total
        assert r == 0 or sums[r - 1] >= wanted - slack, f"segment {s}: {r} tokens do not reach {wanted}"
        assert r <= 1 or sums[r - 2] <= wanted + slack, f"segment {s}: {r} tokens are more than reach {wanted}"


def prepare_topk(score: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, rule: str) -> Callable[[], Any]:
    S, k = len(limit), int(limit[0])
    if rule != "top" or bool((limit != k).any()) or bool((start.diff() != len(score) // S).any()):
        raise ValueError("torch.topk: for rule top and equal segments")
    rows = score.view(S, -1)
    return lambda: torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.topk(k, dim=1).indices, True)


def prepare_quantile(score: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, rule: str) -> Callable[[], Any]:
    if rule != "iqr" or len(limit) != 1:
        raise ValueError("torch.quantile: for rule iqr and one segment")
    quartiles = torch.tensor([0.25, 0.75], device=score.device)

    def run() -> torch.Tensor:
        low, high = score.quantile(quartiles)
        return score > high + limit * (high - low)

    return run


def prepare_sort(score: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, rule: str) -> Callable[[], Any]:
    if rule != "top_p" or len(limit) != 1:
        raise ValueError("torch.sort: for rule top_p and one segment")

    def run() -> torch.Tensor:
        x, order = score.sort(descending=True, stable=True)
        sums = x.cumsum(0)
        return torch.zeros_like(score, dtype=torch.bool).scatter_(0, order, sums - x < limit * sums[-1])

    return run


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


def _put(index: int, at: int, value: float) -> Any:
    return lambda args: args[index].__setitem__(at, value)


def _negative(args: list[Any]) -> None:
    args[0], args[3] = args[0].abs(), "top_p"
    args[0][int(args[1][2]) + 3] = -0.5


def _nan(args: list[Any]) -> None:
    args[0][int(args[1][1]) + 3] = math.nan


SPEC = Spec(
    op="token_select",
    cases=CASES,
    inputs=inputs,
    dtypes=(torch.float32,),
    compare=compare,
    flops=lambda c: float(c.sizes["N"]),
    bytes=lambda c, dtype: 5.0 * c.sizes["N"],
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][None]), ValueError, "(N)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("rule", _set(3, "best"), ValueError, "'best'"),
        Bad("start_dtype", lambda a: a.__setitem__(1, a[1].long()), TypeError, "int32"),
        Bad("start_shape", lambda a: a.__setitem__(1, a[1][1:]), ValueError, "(8,) for S = 7, got (7,)"),
        Bad("start_not_0", _put(1, 0, 1), ValueError, "got 1 at segment 0"),
        Bad("start_descends", _put(1, 5, -3), ValueError, "got -3 at segment 5"),
        Bad("start_ends_early", _put(1, 7, 399), ValueError, "N = 400, got 399 at segment 7"),
        Bad("limit_dtype", lambda a: a.__setitem__(2, a[2].double()), TypeError, "float64"),
        Bad("limit_nan", _put(2, 4, math.nan), ValueError, "segment 4"),
        Bad("nan", _nan, ValueError, "segment 1, token 3"),
        Bad("negative", _negative, ValueError, "-0.5 at segment 2, token 3"),
    ),
    opaque=(1,),  # start of one value repeated is no partition; its strides are in test_token_select.py
    prepared={"torch topk": prepare_topk, "torch quantile": prepare_quantile, "torch sort": prepare_sort},
)
