"""state_update: sums over n in f32; cases are the ways in which models expand dt, A and dt_bias."""

from __future__ import annotations

from typing import Any

import torch

from specs import Args, Bad, Case, Spec

_MAMBA = {"dt": "p", "A": "pn", "D": True, "z": True, "bias": True, "softplus": True}
_MAMBA2 = {"dt": "", "A": "", "D": True, "bias": True, "softplus": True, "f32": True}
_DELTA = {"dt": "", "A": "", "beta": True, "l2norm": True, "f32": True, "side_by_side": True}

CASES = (
    Case("plain", {"S": 2, "H": 3, "P": 8, "N": 16, "G": 1}, {"dt": "pn", "A": "pn", "D": True}),
    Case("tails", {"S": 3, "H": 4, "P": 13, "N": 19, "G": 2}, {"dt": "pn", "A": "pn", "z": True, "bias": True, "softplus": True}),
    Case("mamba", {"S": 2, "H": 1, "P": 70, "N": 16, "G": 1}, _MAMBA),
    Case("mamba_one_state", {"S": 1, "H": 1, "P": 21, "N": 1, "G": 1}, _MAMBA),
    Case("mamba_2", {"S": 2, "H": 6, "P": 17, "N": 32, "G": 3}, _MAMBA2),
    Case("delta", {"S": 2, "H": 4, "P": 24, "N": 32, "G": 2}, _DELTA),
    Case("delta_tails", {"S": 1, "H": 2, "P": 83, "N": 19, "G": 1}, {**_DELTA, "f32": False}),
    Case("delta_rows", {"S": 3, "H": 2, "P": 9, "N": 37, "G": 2}, {**_DELTA, "side_by_side": False, "z": True}),
    Case("kda", {"S": 1, "H": 3, "P": 40, "N": 33, "G": 3}, {**_DELTA, "dt": "n"}),
    Case("delta_full", {"S": 1, "H": 2, "P": 10, "N": 18, "G": 1}, {**_DELTA, "dt": "pn", "A": "pn"}),
    Case("delta_per_row", {"S": 1, "H": 2, "P": 10, "N": 18, "G": 1}, {**_DELTA, "dt": "p", "A": "n", "bias": True}),
    Case("one", {"S": 1, "H": 1, "P": 1, "N": 1, "G": 1}, _MAMBA2),
    Case("no_states", {"S": 2, "H": 2, "P": 5, "N": 0, "G": 1}, _MAMBA2),
    Case("no_rows", {"S": 2, "H": 2, "P": 0, "N": 4, "G": 1}, _MAMBA),
    Case("no_heads", {"S": 2, "H": 0, "P": 3, "N": 4, "G": 0}, _DELTA),
    Case("no_sequences", {"S": 0, "H": 2, "P": 3, "N": 4, "G": 2}, _MAMBA),
    Case("threads", {"S": 1, "H": 1, "P": 2600, "N": 16, "G": 1}, _MAMBA),
    Case("mamba_130m", {"S": 1, "H": 1, "P": 1536, "N": 16, "G": 1}, _MAMBA, bench=True),
    Case("mamba_2_8b", {"S": 1, "H": 1, "P": 5120, "N": 16, "G": 1}, _MAMBA, bench=True),
    Case("mamba2_130m", {"S": 1, "H": 24, "P": 64, "N": 128, "G": 1}, _MAMBA2, bench=True),
    Case("mamba_codestral", {"S": 1, "H": 128, "P": 64, "N": 128, "G": 8}, _MAMBA2, bench=True),
    Case("qwen3_5", {"S": 1, "H": 32, "P": 128, "N": 128, "G": 16}, _DELTA, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    S, H, P, N, G = (case.sizes[k] for k in "SHPNG")
    options = case.options
    other = torch.float32 if options.get("f32") else dtype

    def expanded(dims: str, *front: int, factor: float = 0) -> torch.Tensor:  # varies along these of p and n only
        sizes = [size if d in dims else 1 for d, size in (("p", P), ("n", N))]
        values = torch.randn(*front, *sizes, generator=generator)
        return (factor * values.abs() if factor else values).to(other).expand(*front, P, N)

    def normal(wanted: bool, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype) if wanted else None  # type: ignore[return-value]

    shape = (S, H, N, P) if options.get("side_by_side") else (S, H, P, N)
    state = torch.randn(shape, generator=generator).to(other)
    state = state.mT if options.get("side_by_side") else state
    softplus = bool(options.get("softplus"))
    dt = expanded(options["dt"], S, H, factor=0 if softplus else 0.25)  # a decay: neither negative nor all too strong
    A = expanded(options["A"], H, factor=-1)
    bias = expanded(options["dt"], H, factor=1) if options.get("bias") else None
    beta = torch.rand(S, H, generator=generator).to(other) if options.get("beta") else None
    x, B, C = normal(True, S, H, P), normal(True, S, G, N), normal(True, S, G, N)
    D, z = normal(bool(options.get("D")), H, P), normal(bool(options.get("z")), S, H, P)
    return state, x, dt, A, B, C, D, z, bias, beta, softplus, bool(options.get("l2norm")), N**-0.5 if beta is not None else 1.0


def transformers_step(*args: Any) -> Any:
    """What transformers runs without mamba_ssm and flash-linear-attention; the state is left as it is."""
    state, x, dt, A, B, C, D, z, bias, beta, softplus, l2norm, _ = args
    if beta is not None:
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule as delta

        decay = (dt * A)[:, :, 0, 0]
        return delta(C[:, None], B[:, None], x[:, None], decay[:, None], beta[:, None], state.mT, True, l2norm)[0][:, 0]
    if state.shape[1] == 1:
        from transformers.models.mamba.modeling_mamba import mamba_selective_state_update as step

        one = (v[:, 0] for v in (state, x, dt[..., 0]))
        bias = None if bias is None else bias[0, :, 0]
        return step(*one, A[0], B[:, 0], C[:, 0], D[0], bias, softplus, z if z is None else z[:, 0])[:, None]
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update as step2

    return step2(state, x, dt[..., 0], A, B, C, D, bias if bias is None else bias[..., 0], softplus, z)


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="state_update",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction", "reduction"),
    flops=lambda c: 6.0 * c.sizes["S"] * c.sizes["H"] * c.sizes["P"] * c.sizes["N"],
    bytes=lambda c, dtype: (
        2.0 * c.sizes["S"] * c.sizes["H"] * c.sizes["P"] * c.sizes["N"] * (4 if c.options.get("f32") else dtype.itemsize)
    ),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0, 0]), ValueError, "(S, P, N)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("too_many_states", lambda a: a.__setitem__(0, a[0][..., :1].expand(2, 3, 8, 1025)), ValueError, "1024, got 1025"),
        Bad("x_shape", _set(1, torch.ones(2, 3, 7)), ValueError, "(2, 3, 8), got (2, 3, 7)"),
        Bad("x_dtype", lambda a: a.__setitem__(1, a[1].double()), TypeError, "float64"),
        Bad("dt_shape", _set(2, torch.ones(2, 3, 8, 1)), ValueError, "(2, 3, 8, 16)"),
        Bad("dt_dtype", lambda a: a.__setitem__(2, a[2].half()), TypeError, "float16"),
        Bad("A_shape", _set(3, torch.ones(2, 8, 16)), ValueError, "(3, 8, 16)"),
        Bad("groups", _set(4, torch.ones(2, 2, 16)), ValueError, "divisor of H = 3"),
        Bad("B_shape", _set(4, torch.ones(2, 1, 15)), ValueError, "(2, 1, 16)"),
        Bad("C_dtype", lambda a: a.__setitem__(5, a[5].half()), TypeError, "float16"),
        Bad("D_shape", _set(6, torch.ones(3, 9)), ValueError, "(3, 8)"),
        Bad("z_shape", _set(7, torch.ones(2, 3)), ValueError, "(S, H, P)"),
        Bad("bias_shape", _set(8, torch.ones(3, 8, 15)), ValueError, "(3, 8, 16)"),
        Bad("beta_shape", _set(9, torch.ones(3, 3)), ValueError, "(2, 3)"),
    ),
    peers={"transformers": transformers_step},
)
