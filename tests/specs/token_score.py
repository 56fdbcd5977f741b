"""token_score: float32 exponentials and sums, whatever the dtype of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effvlm.ops.token_score import reference, visible
from specs import Args, Bad, Case, Spec
from specs.data import DATA


def _case(name: str, sizes: tuple[int, ...], options: Mapping[str, Any] = {}, data: str = "gauss", bench: bool = False) -> Case:
    return Case(name, dict(zip("BHGLSD", sizes, strict=True)), options, data, bench)


CASES = (
    _case("siglip", (2, 2, 2, 49, 49, 36), {"weight": "some"}),
    _case("no_batch", (0, 2, 1, 5, 7, 8)),
    _case("no_rows", (2, 2, 1, 0, 5, 8), {"heads": "max"}),
    _case("no_keys", (1, 2, 2, 4, 0, 8), {"heads": "none"}),
    _case("one_channel", (1, 1, 1, 7, 18, 1), {"heads": "sum"}),
    _case("tails", (2, 6, 2, 37, 67, 19), {"causal": True, "weight": "some", "heads": "max"}),
    _case("tails_lse", (1, 3, 1, 75, 65, 21), {"lse": True, "heads": "none"}),
    _case("causal_long_keys", (1, 2, 1, 21, 90, 16), {"causal": True, "lse": True}),
    _case("causal_long_rows", (1, 2, 1, 90, 21, 16), {"causal": True, "heads": "none"}),
    _case("decode", (2, 4, 1, 1, 130, 64), {"causal": True, "lse": True, "heads": "sum"}),
    _case("packed", (2, 2, 1, 70, 70, 24), {"start": (0, 0, 1, 9, 9, 41, 70, 70), "heads": "none"}),
    _case("packed_causal", (1, 2, 2, 70, 70, 24), {"start": (0, 30, 31, 70), "causal": True, "weight": "last", "lse": True}),
    _case("packed_nothing", (1, 1, 1, 0, 0, 8), {"start": (0,)}),
    _case("no_weight", (1, 2, 2, 40, 33, 8), {"weight": "none", "heads": "max"}),
    _case("head_80", (1, 1, 1, 33, 50, 80), {"heads": "sum"}),
    _case("head_130", (1, 2, 1, 20, 49, 130), {"lse": True}),
    _case("large_scores", (1, 2, 2, 60, 60, 16), {"scale": 8.0, "causal": True, "heads": "none"}),
    _case("blocks", (1, 2, 1, 300, 450, 16), {"causal": True, "weight": "some"}),
    _case("clip", (1, 2, 2, 577, 577, 64), {"heads": "none"}, "image"),
    _case("strips", (1, 1, 1, 40, 400, 8)),
    _case("clip_l_336", (1, 16, 16, 577, 577, 64), {"lse": True}, "image", bench=True),
    _case("clip_l_336_alone", (1, 16, 16, 577, 577, 64), {}, "image", bench=True),
    _case("llava_next", (1, 32, 32, 2944, 2944, 128), {"causal": True, "lse": True}, bench=True),
    _case("llava_next_last", (1, 32, 32, 2944, 2944, 128), {"causal": True, "weight": "last"}, bench=True),
    _case("qwen_vl_windows", (1, 16, 16, 4096, 4096, 80), {"start": tuple(range(0, 4097, 64))}, bench=True),
)


def _weight(kind: str | None, B: int, L: int, generator: torch.Generator) -> torch.Tensor | None:
    if kind is None:
        return None
    weight = torch.rand(B, L, generator=generator) * torch.randint(0, 2, (B, L), generator=generator)
    if kind == "none":
        weight.zero_()
    if kind == "last":
        weight[:, : L - 37] = 0
    return weight


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    B, H, G, L, S, D = (case.sizes[k] for k in "BHGLSD")
    query = DATA[case.data](B * H, L, D, generator).view(B, H, L, D).to(dtype)
    key = DATA[case.data](B * G, S, D, generator).view(B, G, S, D).to(dtype)
    places, causal = case.options.get("start"), case.options.get("causal", False)
    start = None if places is None else torch.tensor(places, dtype=torch.int32)
    scale, lse = case.options.get("scale", D**-0.5), None
    if case.options.get("lse"):
        seen = visible(L, S, start, causal, query.device)
        lse = torch.empty(B, H, L)
        for h in range(H):  # one at a time: of benchmarks the matrix is a gigabyte
            x = scale * query[:, h].float() @ key[:, h // (H // G)].float().mT
            lse[:, h] = x.masked_fill(~seen, -torch.inf).logsumexp(-1)
    weight = _weight(case.options.get("weight"), B, L, generator)
    return query, key, lse, weight, start, causal, scale, case.options.get("heads", "mean")


def eager(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The attention matrix in the dtype of the model, its softmax, then the sums."""
    _, weight, start, causal, scale, heads = rest
    (_, H, L, _), (G, S) = query.shape, key.shape[1:3]
    x = query @ key.repeat_interleave(H // G, dim=1).mT * scale
    if causal or start is not None:
        x = x.masked_fill(~visible(L, S, start, causal, query.device), -torch.inf)
    p = x.softmax(dim=-1, dtype=torch.float32)
    c = p.sum(dim=2) if weight is None else (weight[:, None, None] @ p)[:, :, 0]
    return c if heads == "none" else c.amax(1) if heads == "max" else c.sum(1) if heads == "sum" else c.mean(1)


def _work(case: Case) -> float:
    """Pairs of a row and a key that it sees, and that counts."""
    B, H, L, S = (float(case.sizes[k]) for k in "BHLS")
    if "start" in case.options:
        L *= max((b - a for a, b in zip(case.options["start"], case.options["start"][1:], strict=False)), default=0) / max(S, 1)
    rows = min(L, 37.0) if case.options.get("weight") == "last" else L
    return B * H * rows * S * (0.5 if case.options.get("causal") and L == S and rows == L else 1.0)


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="token_score",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction",),
    flops=lambda c: 2.0 * _work(c) * c.sizes["D"] * (1 if c.options.get("lse") else 2),
    bytes=lambda c, dtype: float(
        c.sizes["B"] * c.sizes["D"] * dtype.itemsize * (c.sizes["H"] * c.sizes["L"] + c.sizes["G"] * c.sizes["S"])
        + 4 * c.sizes["B"] * (c.sizes["S"] + c.sizes["H"] * c.sizes["L"] * bool(c.options.get("lse")))
    ),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(B, H, L, D)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("key_dtype", lambda a: a.__setitem__(1, a[1].half()), TypeError, "float16"),
        Bad("key_shape", lambda a: a.__setitem__(1, a[1][..., 1:]), ValueError, "(2, G, S, 36)"),
        Bad("groups", lambda a: a.__setitem__(1, a[1].repeat(1, 2, 1, 1)), ValueError, "G = 4"),
        Bad("lse_shape", _set(2, torch.zeros(2, 2, 48)), ValueError, "(2, 2, 49)"),
        Bad("lse_dtype", _set(2, torch.zeros(2, 2, 49).half()), TypeError, "float32"),
        Bad("weight_shape", _set(3, torch.ones(2, 48)), ValueError, "(2, 49)"),
        Bad("start_dtype", _set(4, torch.tensor([0, 49])), TypeError, "int32"),
        Bad("start_empty", _set(4, torch.tensor([], dtype=torch.int32)), ValueError, "at least one"),
        Bad("start_short", _set(4, torch.tensor([0, 48], dtype=torch.int32)), ValueError, "got 48 at place 1"),
        Bad("start_late", _set(4, torch.tensor([1, 49], dtype=torch.int32)), ValueError, "got 1 at place 0"),
        Bad("start_back", _set(4, torch.tensor([0, 9, 8, 49], dtype=torch.int32)), ValueError, "got 8 at place 2"),
        Bad("heads", _set(7, "median"), ValueError, "median"),
    ),
    peers={"torch": eager, "float32": lambda *a: reference(*a)[0]},
)
