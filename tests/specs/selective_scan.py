"""selective_scan: a scan is a long reduction; what PyTorch's own arithmetic in float32 achieves is the measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effvlm.ops.traversals import bidirectional, cross_scan, multi_scale_scan
from specs import Args, Bad, Case, Spec


def _sizes(B: int, D: int, L: int, N: int) -> dict[str, int]:
    return {"B": B, "D": D, "L": L, "N": N}


MAMBA = {"skip": True, "z": True, "bias": True, "softplus": True}
VMAMBA = {"skip": True, "bias": True, "softplus": True, "layout": "contiguous"}

CASES = (
    Case("mamba", _sizes(2, 40, 37, 16), MAMBA),
    Case("tails", _sizes(2, 21, 19, 7), MAMBA | {"initial": True}),
    Case("vmamba", _sizes(2, 24, 30, 1), VMAMBA | {"paths": cross_scan(5, 6)}),
    Case("bare", _sizes(1, 16, 20, 16)),
    Case("tiles", _sizes(1, 33, 150, 16), MAMBA | {"layout": "contiguous", "initial": True}),
    Case("turned", _sizes(1, 20, 70, 5), MAMBA | {"layout": "contiguous"}),
    Case("one_step", _sizes(3, 17, 1, 16), MAMBA | {"initial": True}),
    Case("no_steps", _sizes(2, 5, 0, 4), MAMBA | {"initial": True}),
    Case("no_state", _sizes(2, 5, 0, 4)),
    Case("no_batch", _sizes(0, 5, 6, 4), MAMBA),
    Case("no_channels", _sizes(2, 0, 6, 4), MAMBA),
    Case("one_state", _sizes(1, 50, 80, 1), MAMBA),
    Case("odd_states", _sizes(1, 18, 12, 33), MAMBA),
    Case("most_states", _sizes(1, 17, 9, 256), MAMBA | {"initial": True}),
    Case("float_delta", _sizes(1, 19, 40, 8), MAMBA | {"float": ("delta", "b", "c", "z")}),
    Case("packed", _sizes(1, 23, 90, 16), MAMBA | {"cuts": (0, 20, 20, 85, 90), "initial": True}),
    Case("packed_alone", _sizes(1, 23, 9, 4), MAMBA | {"cuts": (0, 9)}),
    Case("packed_none", _sizes(1, 23, 0, 4), {"cuts": (0,)}),
    Case("vim", _sizes(1, 20, 66, 16), MAMBA | {"paths": bidirectional(66)}),
    Case("cross", _sizes(1, 18, 63, 4), MAMBA | {"paths": cross_scan(7, 9), "initial": True}),
    Case("long_rows", _sizes(1, 16, 2 * 70, 1), VMAMBA | {"paths": cross_scan(2, 70)}),
    Case("msvmamba", _sizes(1, 17, 48 + 12, 1), VMAMBA | {"paths": multi_scale_scan(6, 8, 3, 4)}),
    Case("gaps", _sizes(1, 9, 30, 3), MAMBA | {"paths": ((3, 2, 29, -10, -4),), "initial": True}),
    Case("no_path", _sizes(1, 9, 6, 3), MAMBA | {"paths": ((0, 2, 0, 1, 1), (6, 1, 5, -1, 7)), "initial": True}),
    Case("mamba_130m", _sizes(1, 1536, 1024, 16), MAMBA, bench=True),
    Case("mamba_2_8b", _sizes(1, 5120, 1024, 16), MAMBA, bench=True),
    Case("vmamba_one_way", _sizes(1, 768, 3136, 1), VMAMBA, bench=True),
    Case("vmamba_cross", _sizes(1, 768, 3136, 1), VMAMBA | {"paths": cross_scan(56, 56)}, bench=True),
    Case("llama_cpp_small", _sizes(1, 2048, 2048, 16), MAMBA, bench=True),
    Case("llama_cpp_large", _sizes(1, 5120, 2048, 16), MAMBA, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    """Strides as Mamba's mixer has them (u and delta with L together, z, B and C with channels together), or all contiguous."""
    B, D, L, N = (case.sizes[k] for k in "BDLN")
    option = case.options.get
    K, wide, plain = len(option("paths") or (0,)), option("float", ()), option("layout") == "contiguous"

    def random(*shape: int, name: str = "u", scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(torch.float32 if name in wide else dtype)

    def by_token(*shape: int, name: str) -> torch.Tensor:
        return random(*shape, name=name) if plain else random(*shape[:-2], shape[-1], shape[-2], name=name).mT

    S = len(option("cuts")) - 1 if option("cuts") else B
    bias = torch.randn(K, D, generator=generator) * 0.5 - 1 if option("bias") else None
    delta = random(B, K, D, L, name="delta", scale=0.5)
    return (
        random(B, D, L),
        delta if option("softplus") else delta.abs(),
        -torch.exp(torch.rand(K, D, N, generator=generator) * 2.8),
        by_token(B, K, N, L, name="b"),
        by_token(B, K, N, L, name="c"),
        torch.randn(K, D, generator=generator) if option("skip") else None,
        by_token(B, D, L, name="z") if option("z") else None,
        bias,
        torch.randn(S, K, D, N, generator=generator) if option("initial") else None,
        torch.tensor(option("cuts"), dtype=torch.int32) if option("cuts") else None,
        bool(option("softplus")),
        [number for path in option("paths") for number in path] if option("paths") else None,
    )


def transformers_scan(*args: Any) -> Any:
    """transformers' function, once per direction of a cross-scan, with VMamba's permuted copies around it."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    u, delta, A, B, C, D, z, bias, _, _, softplus, paths = args

    def one(u: torch.Tensor, delta: torch.Tensor, k: int, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        skip, offset = (None if x is None else x[k] for x in (D, bias))
        y: torch.Tensor = mamba_selective_scan(u, delta, A[k], B, C, skip, z, offset, softplus)
        return y

    if paths is None:
        return one(u, delta[:, 0], 0, B[:, 0], C[:, 0])
    return _four_ways(u, delta, B, C, paths[1], one)


def own_scans(*args: Any) -> Callable[[], Any]:
    """The same copies around our own op, called once per direction."""
    import effvlm

    u, delta, A, B, C, D, z, bias, _, _, softplus, paths = args
    if paths is None or z is not None:
        raise ValueError("one call per direction: for several directions only")

    def one(u: torch.Tensor, delta: torch.Tensor, k: int, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        return effvlm.selective_scan(u, delta, A[k], B, C, D[k], None, bias[k], softplus).out

    return lambda: _four_ways(u, delta, B, C, paths[1], one)


def _four_ways(u: torch.Tensor, delta: torch.Tensor, B: torch.Tensor, C: torch.Tensor, width: int, one: Any) -> torch.Tensor:
    """VMamba's cross-scan and cross-merge: rows, columns, and both flipped; delta, B and C are taken as permuted already."""

    def turned(x: torch.Tensor, rows: int) -> torch.Tensor:
        return x.unflatten(-1, (rows, -1)).mT.flatten(-2)

    height = u.shape[2] // width
    ways = torch.stack([u, turned(u, height)], 1)
    ways = torch.cat([ways, ways.flip(-1)], 1)
    y = torch.stack([one(ways[:, k], delta[:, k], k, B[:, k], C[:, k]) for k in range(4)], 1)
    y = y[:, :2] + y[:, 2:].flip(-1)
    return y[:, 0] + turned(y[:, 1], width)


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


def _cut(*cuts: int) -> Any:
    def change(args: list[Any]) -> None:
        args[:] = [x[:1] if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(args)]
        args[9] = torch.tensor(cuts, dtype=torch.int32)

    return change


SPEC = Spec(
    op="selective_scan",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction", "reduction"),
    flops=lambda c: 7.0 * len(c.options.get("paths", (0,))) * c.sizes["B"] * c.sizes["D"] * c.sizes["L"] * c.sizes["N"],
    bytes=lambda c, dtype: float(
        dtype.itemsize
        * c.sizes["B"]
        * c.sizes["L"]
        * (
            c.sizes["D"] * (2 + ("z" in c.options) + len(c.options.get("paths", (0,))))
            + 2 * c.sizes["N"] * len(c.options.get("paths", (0,)))
        )
    ),
    slow_reference=True,
    bad=(
        Bad("rank", _set(0, torch.zeros(4, 5)), ValueError, "(B, D, L)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("delta_shape", lambda a: a.__setitem__(1, a[1][..., 1:]), ValueError, "(2, 1, 40, 37)"),
        Bad("complex", lambda a: a.__setitem__(2, a[2].to(torch.complex64)), TypeError, "complex"),
        Bad("A_dtype", lambda a: a.__setitem__(2, a[2].half()), TypeError, "float32"),
        Bad("B_shape", lambda a: a.__setitem__(3, a[3][:, :, :3]), ValueError, "(B, K, N, L) = (2, 1, 16, 37)"),
        Bad("D_shape", lambda a: a.__setitem__(5, a[5][0]), ValueError, "(K, D)"),
        Bad("z_shape", lambda a: a.__setitem__(6, a[6][:1]), ValueError, "z of shape"),
        Bad("state", _set(8, torch.zeros(3, 1, 40, 16)), ValueError, "initial_state"),
        Bad("state_dtype", _set(8, torch.zeros(2, 1, 40, 16).half()), TypeError, "float32"),
        Bad("packed_batch", _set(9, torch.tensor([0, 37], dtype=torch.int32)), ValueError, "B = 1"),
        Bad("packed_dtype", _set(9, torch.tensor([0, 37])), TypeError, "int32"),
        Bad("packed_start", _cut(1, 37), ValueError, "got 1 at 0"),
        Bad("packed_end", _cut(0, 9, 36), ValueError, "got 36 at 2"),
        Bad("packed_descends", _cut(0, 9, 8, 37), ValueError, "got 8 at 2"),
        Bad("path_numbers", _set(11, [1, 37, 0, 0]), ValueError, "5 numbers"),
        Bad("path_end", _set(11, [1, 37, 1, 0, 1]), ValueError, "1 … 37"),
        Bad("path_start", _set(11, [1, 37, 35, 0, -1]), ValueError, "-1 … 35"),
        Bad("path_twice", _set(11, [6, 6, 0, 2, 3]), ValueError, "at most once"),
        Bad("path_stands", _set(11, [1, 3, 0, 0, 0]), ValueError, "at most once"),
        Bad("path_count", _set(11, [-1, 3, 0, 1, 1]), ValueError, "at least 0"),
    ),
    peers={"transformers": transformers_scan},
    prepared={"one call per direction": own_scans},
)
