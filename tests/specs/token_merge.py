"""token_merge: one rounding at the store for 16-bit types, a plain sum in float32."""

from __future__ import annotations

from typing import Any

import torch

from specs import Args, Bad, Case, Spec
from specs.data import DATA

CASES = (
    Case("halve", {"B": 2, "N": 98, "M": 49, "C": 64}),
    Case("no_tokens", {"B": 2, "N": 0, "M": 3, "C": 8}),
    Case("no_groups", {"B": 1, "N": 5, "M": 0, "C": 8}, {"groups": "dropped"}),
    Case("no_channels", {"B": 2, "N": 5, "M": 2, "C": 0}),
    Case("no_batch", {"B": 0, "N": 5, "M": 2, "C": 8}),
    Case("one_channel", {"B": 1, "N": 7, "M": 3, "C": 1}),
    Case("tails", {"B": 3, "N": 33, "M": 12, "C": 17}, {"weight": True}),
    Case("below_vector", {"B": 2, "N": 20, "M": 9, "C": 15}, {"weight": True}),
    Case("one_group", {"B": 1, "N": 130, "M": 1, "C": 33}, {"weight": True}),
    Case("more_groups", {"B": 1, "N": 9, "M": 40, "C": 24}),
    Case("drop", {"B": 2, "N": 60, "M": 20, "C": 40}, {"groups": "some_dropped", "weight": True}),
    Case("zero_weights", {"B": 1, "N": 30, "M": 10, "C": 16}, {"weight": "zeros"}),
    Case("singles", {"B": 2, "N": 31, "M": 31, "C": 29}, {"groups": "identity", "weight": True}),
    Case("clip_l_336", {"B": 1, "N": 577, "M": 289, "C": 1024}, {"weight": True}, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "M": 1440, "C": 1024}, {"weight": True}, bench=True),
    Case("clip_l_batch", {"B": 8, "N": 577, "M": 561, "C": 1024}, {"weight": True}, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    B, N, M, C = (case.sizes[k] for k in "BNMC")
    x = DATA[case.data](B, N, C, generator).to(dtype)
    low = -1 if case.options.get("groups") == "some_dropped" else 0
    group = torch.randint(low, max(M, 1), (B, N), generator=generator, dtype=torch.int32)
    if case.options.get("groups") == "identity":
        group = torch.arange(N, dtype=torch.int32).expand(B, N)
    if case.options.get("groups") == "dropped":
        group = torch.full((B, N), -1, dtype=torch.int32)
    weight = None
    if case.options.get("weight"):
        weight = torch.randint(1, 5, (B, N), generator=generator).float()
    if case.options.get("weight") == "zeros":
        weight = weight * (group % 2)
    return x, group, M, weight


def torch_merge(x: torch.Tensor, group: torch.Tensor, M: int, weight: torch.Tensor | None) -> Any:
    """Scatter in x's own dtype, as token-merging code does it."""
    B, N, C = x.shape
    w = x.new_ones((B, N, 1)) if weight is None else weight[..., None].to(x.dtype)
    index = group.long()[..., None]
    out = x.new_zeros((B, M, C)).scatter_reduce(1, index.expand(B, N, C), x * w, "sum")
    total = w.new_zeros((B, M, 1)).scatter_reduce(1, index, w, "sum")
    return out / total, total


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="token_merge",
    cases=CASES,
    inputs=inputs,
    tolerance=("one_rounding", "reduction"),
    flops=lambda c: 2.0 * c.sizes["B"] * c.sizes["N"] * c.sizes["C"],
    bytes=lambda c, dtype: float(c.sizes["B"] * (c.sizes["N"] + c.sizes["M"]) * c.sizes["C"] * dtype.itemsize),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(B, N, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("group_dtype", lambda a: a.__setitem__(1, a[1].long()), TypeError, "int32"),
        Bad("group_shape", lambda a: a.__setitem__(1, a[1][:, 1:]), ValueError, "(B, N) = (2, 98)"),
        Bad("group_too_large", lambda a: a[1].__setitem__((1, 4), 49), ValueError, "batch 1, token 4"),
        Bad("group_too_small", lambda a: a[1].__setitem__((0, 2), -2), ValueError, "got -2"),
        Bad("no_count", _set(2, -1), ValueError, "num_groups"),
        Bad("weight_shape", _set(3, torch.ones(2, 97)), ValueError, "(2, 97)"),
        Bad("weight_dtype", _set(3, torch.ones(2, 98, dtype=torch.float16)), TypeError, "float32"),
    ),
    peers={"torch": torch_merge},
)
