"""ternary_matmul: exact and int8 activations, few tokens and many, one matrix and routed ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from specs import Args, Bad, Case, Spec
from specs.ternary_unpack import packed


def _sizes(T: int, K: int, E: int, R: int, C: int) -> dict[str, int]:
    return {"T": T, "K": K, "E": E, "R": R, "C": C}


def _case(name: str, T: int, K: int, E: int, R: int, C: int, zeros: float = 0.885, bench: bool = False, **options: Any) -> Case:
    return Case(name, _sizes(T, K, E, R, C), {"zeros": zeros, **options}, bench=bench)


CASES = (
    _case("routed", 5, 2, 4, 96, 512),
    _case("tails", 3, 2, 3, 70, 700, 0.85),
    _case("tails_int8", 3, 2, 3, 70, 700, 0.85, int8=True),
    _case("one_token", 1, 1, 1, 130, 512),
    _case("one_token_int8", 1, 2, 2, 130, 512, int8=True),
    _case("crowded_rows_int8", 2, 1, 1, 64, 512, 0.72, int8=True),
    _case("many", 37, 2, 2, 200, 480),
    _case("many_int8", 37, 2, 2, 200, 480, int8=True),
    _case("many_bridges_int8", 9, 1, 1, 130, 300, 0.995, int8=True),
    _case("bridges", 2, 1, 1, 130, 300, 0.995),
    _case("bridges_int8", 2, 1, 1, 130, 300, 0.995, int8=True),
    _case("dense", 2, 1, 1, 65, 260, 0.3),
    _case("dense_int8", 2, 1, 1, 65, 260, 0.3, int8=True),
    _case("dense_many", 20, 1, 1, 65, 260, 0.3),
    _case("five_levels", 2, 2, 3, 70, 700, 0.6, levels=5),
    _case("five_levels_int8", 2, 2, 3, 70, 700, 0.6, levels=5, int8=True),
    _case("five_levels_many", 23, 1, 2, 70, 700, 0.6, levels=5),
    _case("five_levels_many_int8", 23, 1, 2, 70, 700, 0.6, levels=5, int8=True),
    _case("five_levels_dense_int8", 2, 1, 1, 64, 256, 0.1, levels=5, int8=True),
    _case("all_zero", 2, 1, 1, 70, 256, 1.0),
    _case("one", 1, 1, 1, 1, 1, 0.0),
    _case("no_tokens", 0, 2, 2, 70, 64),
    _case("no_rows", 3, 1, 2, 0, 64),
    _case("no_columns", 3, 1, 2, 8, 0),
    _case("no_matrices", 3, 2, 0, 8, 64),
    _case("zero_tokens_int8", 4, 1, 1, 64, 256, int8=True, magnitude=0.0),
    _case("outliers_int8", 6, 1, 1, 64, 1024, int8=True, outliers=True),
    _case("outliers", 2, 1, 1, 64, 1024, outliers=True),
    # all experts for every token, so that what is read is larger than the caches
    _case("expert", 1, 32, 32, 2048, 6144, int8=True, bench=True),
    _case("expert_exact", 1, 32, 32, 2048, 6144, bench=True),
    _case("expert_sparse", 1, 40, 40, 2048, 6144, 0.93, int8=True, bench=True),
    _case("expert_tokens", 16, 12, 12, 2048, 6144, int8=True, bench=True),
    _case("expert_tokens_exact", 16, 12, 12, 2048, 6144, bench=True),
    _case("expert_tokens_exact", 64, 12, 12, 2048, 6144, bench=True),
    _case("expert_tokens_exact", 256, 12, 12, 2048, 6144, bench=True),
    _case("qwen3_up", 1, 8, 128, 1536, 2048, int8=True, bench=True),
    _case("qwen3_down", 8, 1, 128, 2048, 768, int8=True, bench=True),
)


def _ids(case: Case, generator: torch.Generator) -> torch.Tensor:
    T, K, E = (case.sizes[k] for k in "TKE")
    ids = torch.stack([torch.randperm(max(E, 1), generator=generator)[:K] for _ in range(T)]) if T else torch.zeros(0, K)
    if T > 2 and not case.bench:  # some go nowhere
        ids[-1, 0], ids[0, -1] = -1, E
    return ids.long() if E else torch.full((T, K), -1)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    w = packed(case, generator)
    x = torch.randn(case.sizes["T"], case.sizes["C"], generator=generator) * case.options.get("magnitude", 1.0)
    if case.options.get("outliers"):
        x[:, 300] = 1000
    int8 = case.options.get("int8", False)
    return x.to(dtype), _ids(case, generator), w.data, w.tiles, w.base, w.scales, w.levels, int8


PEERS = ("torch bf16", "own bf16", "own 2-bit", "QMoE code", "QMoE code, int8 tokens", "bitsandbytes NF4", "bitsandbytes int8",
         "llama.cpp TQ1_0", "llama.cpp TQ2_0")  # fmt: skip


def _peer(name: str, x: torch.Tensor, ids: torch.Tensor, *weight: Any) -> Callable[[], Any]:
    """A peer of bench/ternary_peers.py, on the weights unpacked."""
    import ternary_peers

    data, tiles, base, scales, levels, _ = weight
    if levels != 3:
        raise ValueError(f"{name}: has three levels only")
    if ((ids < 0) | (ids >= len(scales))).any():
        raise ValueError(f"{name}: needs an expert for each choice")
    trits = torch.ops.effvlm.ternary_unpack(data, tiles, base, scales.shape[1], x.shape[1], levels)
    return ternary_peers.PREPARED[name](x, ids, trits, scales.float())


SPEC = Spec(
    op="ternary_matmul",
    cases=CASES,
    inputs=inputs,
    slow_reference=True,
    opaque=(2, 3, 4),
    tolerance=("reduction",),
    flops=lambda c: 2.0 * c.sizes["T"] * c.sizes["K"] * c.sizes["R"] * c.sizes["C"],
    bytes=lambda c, dtype: float(
        min(c.sizes["E"], c.sizes["T"] * c.sizes["K"]) * c.sizes["R"] * c.sizes["C"] * 0.65 / 8
        + dtype.itemsize * c.sizes["T"] * (c.sizes["C"] + c.sizes["K"] * c.sizes["R"])
    ),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(T, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("ids_dtype", lambda a: a.__setitem__(1, a[1].int()), TypeError, "int64"),
        Bad("ids_shape", lambda a: a.__setitem__(1, a[1][1:]), ValueError, "T = 5"),
        Bad("id_too_large", lambda a: a[1].__setitem__((3, 0), 9), ValueError, "got 9 at token 3"),
        Bad("columns", lambda a: a.__setitem__(0, a[0][:, :250]), ValueError, "tiles of shape"),
        Bad("scales", lambda a: a.__setitem__(5, a[5][:3]), ValueError, "E = 4"),
        Bad("scales_dtype", lambda a: a.__setitem__(5, a[5].float()), TypeError, "bfloat16"),
        Bad("levels", lambda a: a.__setitem__(6, 2), ValueError, "levels 3 or 5"),
    ),
    prepared={name: partial(_peer, name) for name in PEERS},
)
