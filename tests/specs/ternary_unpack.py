"""ternary_unpack: packed weights of every kind of tile."""

from __future__ import annotations

import torch

from effvlm.ops import TernaryWeight, ternary_pack
from specs import Args, Bad, Case, Spec


def _sizes(E: int, R: int, C: int) -> dict[str, int]:
    return {"E": E, "R": R, "C": C}


CASES = (
    Case("gaps", _sizes(2, 96, 512), {"zeros": 0.885}),
    Case("tails", _sizes(3, 70, 700), {"zeros": 0.85}),
    Case("narrow", _sizes(1, 64, 480), {"zeros": 0.93}),
    Case("bridges", _sizes(2, 130, 300), {"zeros": 0.995}),
    Case("dense", _sizes(1, 65, 260), {"zeros": 0.3}),
    Case("all_zero", _sizes(2, 70, 256), {"zeros": 1.0}),
    Case("no_zero", _sizes(1, 70, 96), {"zeros": 0.0}),
    Case("one_sided", _sizes(1, 64, 256), {"zeros": 0.9, "sided": True}),
    Case("five_levels", _sizes(2, 70, 700), {"zeros": 0.6, "levels": 5}),
    Case("five_levels_sparse", _sizes(1, 130, 512), {"zeros": 0.99, "levels": 5}),
    Case("many_strips", _sizes(1, 3, 33 * 256), {"zeros": 0.9}),
    Case("one", _sizes(1, 1, 1), {"zeros": 0.0}),
    Case("no_rows", _sizes(2, 0, 64), {"zeros": 0.9}),
    Case("no_columns", _sizes(2, 5, 0), {"zeros": 0.9}),
    Case("no_matrices", _sizes(0, 5, 64), {"zeros": 0.9}),
    Case("expert", _sizes(8, 2048, 6144), {"zeros": 0.885}, bench=True),
)


def trits(shape: tuple[int, ...], zeros: float, levels: int, generator: torch.Generator, *, sided: bool = False) -> torch.Tensor:
    """i.i.d. weights, a share of ``zeros``; the others of either sign, and of five levels three in ten large."""
    negative = torch.rand(shape, generator=generator) < (0.0 if sided else 0.5)
    large = torch.rand(shape, generator=generator) < (0.3 if levels == 5 else 0.0)
    set_ = torch.rand(shape, generator=generator) >= zeros
    return set_.to(torch.int8) * (1 + large.to(torch.int8)) * (1 - 2 * negative.to(torch.int8))


def packed(case: Case, generator: torch.Generator) -> TernaryWeight:
    """A stack of the case's sizes with scales around one."""
    E, R, C = (case.sizes[k] for k in "ERC")
    levels = case.options.get("levels", 3)
    weights = trits((E, R, C), case.options["zeros"], levels, generator, sided=case.options.get("sided", False))
    return ternary_pack(weights, torch.rand(E, R, generator=generator) + 0.5, levels=levels)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    w = packed(case, generator)
    return w.data, w.tiles, w.base, case.sizes["R"], case.sizes["C"], w.levels


SPEC = Spec(
    op="ternary_unpack",
    cases=CASES,
    inputs=inputs,
    slow_reference=True,
    opaque=(0, 1, 2),
    tolerance=("exact",),
    dtypes=(torch.float32,),
    flops=lambda c: float(c.sizes["E"] * c.sizes["R"] * c.sizes["C"]),
    bytes=lambda c, dtype: 1.08 * c.sizes["E"] * c.sizes["R"] * c.sizes["C"],
    bad=(
        Bad("dtype", lambda a: a.__setitem__(0, a[0].to(torch.int64)), TypeError, "uint32"),
        Bad("tiles_shape", lambda a: a.__setitem__(1, a[1][:, :1].contiguous()), ValueError, "(2, 2, 2, 2)"),
        Bad("base_shape", lambda a: a.__setitem__(2, a[2][1:]), ValueError, "(5,)"),
        Bad("not_contiguous", lambda a: a.__setitem__(1, a[1].mT.contiguous().mT), ValueError, "contiguous tiles"),
        Bad("levels", lambda a: a.__setitem__(5, 4), ValueError, "levels 3 or 5"),
    ),
)
