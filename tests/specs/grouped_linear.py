"""grouped_linear: as good as one matrix product per layer."""

from __future__ import annotations

from typing import Any

import torch

from effvlm.ops.grouped_linear import reference
from specs import Args, Bad, Case, Spec


def _sizes(T: int, E: int, C: int, out: int) -> dict[str, int]:
    return {"T": T, "E": E, "C": C, "O": out}


CASES = (
    Case("modalities", _sizes(40, 3, 64, 48)),
    Case("tails", _sizes(7, 5, 37, 29), {"bias": True}),
    Case("one_token", _sizes(1, 4, 40, 24)),
    Case("no_tokens", _sizes(0, 4, 16, 8)),
    Case("no_layers", _sizes(3, 0, 16, 8)),
    Case("no_input", _sizes(3, 2, 0, 8), {"bias": True}),
    Case("no_output", _sizes(3, 2, 8, 0)),
    Case("one_layer", _sizes(33, 1, 24, 100), {"bias": True}),
    Case("few_of_long_rows", _sizes(5, 1, 3000, 100), {"bias": True}),
    Case("skipped", _sizes(30, 4, 24, 16), {"route": "skipped", "bias": True}),
    Case("runs", _sizes(220, 2, 40, 30), {"route": "runs"}),
    Case("transposed", _sizes(50, 3, 50, 70), {"transposed": True, "bias": True}),
    Case("transposed_many", _sizes(210, 1, 141, 530), {"transposed": True, "bias": True}),
    Case("sorted", _sizes(1100, 6, 8, 8), {"route": "skipped"}),
    Case("tiles", _sizes(130, 2, 64, 128)),
    Case("text_and_image_q", _sizes(1024, 2, 2048, 2048), {"route": "runs"}, bench=True),
    Case("text_and_image_q", _sizes(8, 2, 2048, 2048), {"route": "runs"}, bench=True),
    *(Case("decode", _sizes(T, 1, 4096, 11008), bench=True) for T in (1, 2, 8, 16)),
    Case("heads", _sizes(64, 32, 2048, 128), bench=True),
    Case("dbrx_down", _sizes(64, 16, 1536, 2048), {"transposed": True}, bench=True),
)


def _ids(case: Case, generator: torch.Generator) -> torch.Tensor:
    T, E = case.sizes["T"], case.sizes["E"]
    if case.options.get("route") == "runs":  # text, an image, text
        return (torch.arange(T) * 4 // max(T, 1) % 3 > 0).long()
    ids = torch.randint(max(E, 1), (T,), generator=generator) if E else torch.full((T,), -1)
    if case.options.get("route") == "skipped":
        ids[::3], ids[1::5] = -1, E
    return ids


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    T, E, C, out = (case.sizes[k] for k in "TECO")
    transposed = case.options.get("transposed", False)
    weight = torch.randn(E, *((C, out) if transposed else (out, C)), generator=generator) * max(C, 1) ** -0.5
    bias = torch.randn(E, out, generator=generator).to(dtype) if case.options.get("bias") else None
    weight = weight.to(dtype)
    x = torch.randn(T, C, generator=generator).to(dtype)
    return x, _ids(case, generator), weight.mT if transposed else weight, bias


def per_layer(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """One GEMM per layer on the rows that are its own."""
    return reference(x, ids, weight, bias)


def all_layers(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Every layer on every token and a choice among them, as masks do it."""
    out = x @ weight[0].T
    for e in range(1, len(weight)):
        out = torch.where((ids == e)[:, None], x @ weight[e].T, out)
    return out


SPEC = Spec(
    op="grouped_linear",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction",),
    flops=lambda c: 2.0 * c.sizes["T"] * c.sizes["C"] * c.sizes["O"],
    bytes=lambda c, dtype: float(
        dtype.itemsize
        * (min(c.sizes["E"], c.sizes["T"]) * c.sizes["C"] * c.sizes["O"] + c.sizes["T"] * (c.sizes["C"] + c.sizes["O"]))
    ),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(T, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("ids_dtype", lambda a: a.__setitem__(1, a[1].int()), TypeError, "int64"),
        Bad("ids_shape", lambda a: a.__setitem__(1, a[1][1:]), ValueError, "(T,) = (40,)"),
        Bad("id_too_large", lambda a: a[1].__setitem__(3, 4), ValueError, "got 4 at token 3"),
        Bad("weight_dtype", lambda a: a.__setitem__(2, a[2].half()), TypeError, "float16"),
        Bad("weight_shape", lambda a: a.__setitem__(2, a[2][..., 1:]), ValueError, "(E, O, C) = (3, 48, 64)"),
        Bad("bias_shape", lambda a: a.__setitem__(3, torch.zeros(3, 47)), ValueError, "(E, O) = (3, 48)"),
    ),
    peers={"torch, a GEMM per layer": per_layer, "torch, all layers and a choice": all_layers},
)
