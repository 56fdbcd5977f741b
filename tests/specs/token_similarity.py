"""token_similarity: a reduction over channels; the later frames of a video against the earlier ones, as views of one tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from specs import Args, Bad, Case, Spec
from specs.data import DATA

CASES = (
    Case("frames", {"N": 60, "P": 20, "C": 64}),
    Case("tails", {"N": 33, "P": 7, "C": 17}),
    Case("below_vector", {"N": 20, "P": 3, "C": 5}),
    Case("parts", {"N": 21, "P": 4, "C": 600}),
    Case("many_frames", {"N": 160, "P": 3, "C": 40}),
    Case("pairs", {"N": 37, "P": 0, "C": 72}),
    Case("zero_tokens", {"N": 50, "P": 7, "C": 48}, data="norms"),
    Case("alike", {"N": 50, "P": 10, "C": 96}, data="duplicates"),
    Case("one_channel", {"N": 9, "P": 2, "C": 1}),
    Case("no_tokens", {"N": 0, "P": 0, "C": 8}),
    Case("no_channels", {"N": 5, "P": 2, "C": 0}),
    Case("frames_32", {"N": 31 * 196, "P": 196, "C": 3584}, bench=True),
    Case("frames_64", {"N": 63 * 256, "P": 256, "C": 3584}, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    N, P, C = (case.sizes[k] for k in "NPC")
    x = DATA[case.data](1, N + (P or N), C, generator)[0].to(dtype)
    return x[P or N :], x[:N]


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="token_similarity",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction",),
    flops=lambda c: 6.0 * c.sizes["N"] * c.sizes["C"],
    bytes=lambda c, dtype: float((c.sizes["N"] + (c.sizes["P"] or c.sizes["N"])) * c.sizes["C"] * dtype.itemsize),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][None]), ValueError, "(N, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("shape", lambda a: a.__setitem__(1, a[1][1:]), ValueError, "(60, 64), got (59, 64)"),
        Bad("dtypes", lambda a: a.__setitem__(1, a[1].half()), TypeError, "torch.float16"),
        Bad("none", _set(1, None), TypeError, "NoneType"),
    ),
    peers={"torch": lambda a, b: F.cosine_similarity(a, b, dim=1)},
)
