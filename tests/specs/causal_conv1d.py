"""causal_conv1d: one rounding at the store for 16-bit types; the state is moved, not computed."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import assert_close

from specs import Args, Bad, Case, Spec, Tensors

CASES = (
    Case("plain", {"B": 2, "D": 24, "L": 40, "W": 4, "M": 3}, {"state": True, "bias": True}),
    Case("tails", {"B": 2, "D": 37, "L": 19, "W": 4, "M": 4}, {"state": True, "bias": True, "silu": True}),
    Case("tails_side_by_side", {"B": 2, "D": 37, "L": 19, "W": 3, "M": 5}, {"state": True, "channels_last": True}),
    Case("packed", {"B": 1, "D": 21, "L": 40, "W": 4, "M": 6}, {"state": True, "starts": (0, 2, 2, 17, 18, 40)}),
    Case("packed_side_by_side", {"B": 1, "D": 21, "L": 40, "W": 5, "M": 4},
         {"state": True, "starts": (0, 2, 2, 17, 18, 40), "channels_last": True, "silu": True}),
    Case("packed_without_state", {"B": 1, "D": 3, "L": 9, "W": 7, "M": 0}, {"starts": (0, 3, 9)}),
    Case("no_sequences", {"B": 1, "D": 4, "L": 0, "W": 4, "M": 3}, {"state": True, "starts": (0,)}),
    Case("no_inputs", {"B": 2, "D": 5, "L": 0, "W": 4, "M": 4}, {"state": True}),
    Case("no_channels", {"B": 2, "D": 0, "L": 5, "W": 4, "M": 4}, {"state": True}),
    Case("no_batch", {"B": 0, "D": 5, "L": 5, "W": 4, "M": 4}, {"state": True, "silu": True}),
    Case("step", {"B": 3, "D": 70, "L": 1, "W": 4, "M": 4}, {"state": True, "bias": True, "silu": True}),
    Case("step_narrow", {"B": 1, "D": 33, "L": 1, "W": 4, "M": 3}, {"state": True, "bias": True, "silu": True}),
    Case("step_f32", {"B": 1, "D": 50, "L": 1, "W": 4, "M": 4}, {"state": True, "bias": True, "f32": True}),
    Case("steps", {"B": 2, "D": 18, "L": 3, "W": 6, "M": 8}, {"state": True, "f32": True, "channels_last": True}),
    Case("widest", {"B": 1, "D": 5, "L": 70, "W": 16, "M": 15}, {"state": True, "bias": True, "silu": True}),
    Case("narrowest", {"B": 1, "D": 5, "L": 33, "W": 2, "M": 1}, {"state": True, "channels_last": True}),
    Case("pieces", {"B": 1, "D": 2, "L": 2100, "W": 4, "M": 0}, {"bias": True, "silu": True}),
    Case("blocks", {"B": 1, "D": 530, "L": 40, "W": 4, "M": 0}, {"bias": True, "silu": True, "channels_last": True}),
    Case("mamba_130m", {"B": 1, "D": 1536, "L": 1024, "W": 4, "M": 0}, {"bias": True, "silu": True}, bench=True),
    Case("mamba_2_8b", {"B": 1, "D": 5120, "L": 1024, "W": 4, "M": 0}, {"bias": True, "silu": True}, bench=True),
    Case("falcon_mamba", {"B": 1, "D": 8192, "L": 1024, "W": 4, "M": 0}, {"bias": True, "silu": True}, bench=True),
    Case("mamba_2_8b_side_by_side", {"B": 1, "D": 5120, "L": 1024, "W": 4, "M": 0},
         {"bias": True, "silu": True, "channels_last": True}, bench=True),
    Case("lfm3", {"B": 1, "D": 2048, "L": 1024, "W": 7, "M": 0}, bench=True),
    Case("mamba_130m_step", {"B": 1, "D": 1536, "L": 1, "W": 4, "M": 4}, {"state": True, "bias": True, "silu": True}, bench=True),
    Case("mamba_2_8b_step", {"B": 1, "D": 5120, "L": 1, "W": 4, "M": 4}, {"state": True, "bias": True, "silu": True}, bench=True),
    Case("lfm3_step", {"B": 1, "D": 2048, "L": 1, "W": 7, "M": 7}, {"state": True}, bench=True),
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    B, D, L, W, M = (case.sizes[k] for k in "BDLWM")
    other = torch.float32 if case.options.get("f32") else dtype
    x = torch.randn(B, D, L, generator=generator).to(dtype)
    weight = torch.randn(D, W, generator=generator).to(other)
    bias = torch.randn(D, generator=generator).to(other) if case.options.get("bias") else None
    starts = case.options.get("starts")
    cu_seqlens = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    S = B if starts is None else len(starts) - 1
    state = torch.randn(S, D, M, generator=generator).to(other) if case.options.get("state") else None
    if case.options.get("channels_last"):
        x = x.mT.contiguous().mT
    return x, weight, bias, state, cu_seqlens, bool(case.options.get("silu"))


def compare(args: Args, got: Tensors, oracle: Tensors, same: Tensors) -> None:
    """The state, where there is one, is moved: its bits are the inputs' own."""
    for i, kind in zip(range(len(got)), ("one_rounding", "exact"), strict=False):
        assert_close(f"causal_conv1d[{i}]", got[i].cpu(), oracle[i], same[i], kind)


def transformers_conv(x: Any, weight: Any, bias: Any, state: Any, cu_seqlens: Any, silu: bool) -> Any:
    """What transformers runs without the causal-conv1d package."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn, causal_conv1d_update

    activation = "silu" if silu else None
    if state is None:
        return causal_conv1d_fn(x, weight, bias, activation)
    return causal_conv1d_update(x, state, weight, bias, activation)


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


def _starts(*starts: int) -> Any:
    def change(args: list[Any]) -> None:
        args[0], args[3], args[4] = args[0][:1], None, torch.tensor(starts, dtype=torch.int32)

    return change


SPEC = Spec(
    op="causal_conv1d",
    cases=CASES,
    inputs=inputs,
    compare=compare,
    slow_reference=True,
    flops=lambda c: 2.0 * c.sizes["B"] * c.sizes["D"] * c.sizes["L"] * c.sizes["W"],
    bytes=lambda c, dtype: (
        2.0 * c.sizes["B"] * c.sizes["D"] * (c.sizes["L"] + c.sizes["M"]) + c.sizes["D"] * (c.sizes["W"] + 1)
    ) * dtype.itemsize,
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(B, D, L)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("weight_shape", _set(1, torch.ones(23, 4)), ValueError, "(24, 2 … 16), got (23, 4)"),
        Bad("weight_width", _set(1, torch.ones(24, 17)), ValueError, "(24, 17)"),
        Bad("weight_dtype", _set(1, torch.ones(24, 4, dtype=torch.float16)), TypeError, "float16"),
        Bad("bias_shape", _set(2, torch.ones(25)), ValueError, "(25,)"),
        Bad("state_width", _set(3, torch.ones(2, 24, 2)), ValueError, "3 or more"),
        Bad("state_dtype", _set(3, torch.ones(2, 24, 3).half()), TypeError, "float16"),
        Bad("state_count", _set(3, torch.ones(1, 24, 3)), ValueError, "(1, 24, 3)"),
        Bad("batch_of_packed", _set(4, torch.tensor([0, 40], dtype=torch.int32)), ValueError, "B = 1"),
        Bad("starts_dtype", _set(4, torch.tensor([0, 40])), TypeError, "int64"),
        Bad("descending", _starts(0, 30, 20, 40), ValueError, "got 20 at 2"),
        Bad("not_all", _starts(0, 30, 39), ValueError, "L = 40, got 39"),
        Bad("not_from_0", _starts(1, 40), ValueError, "got 1 at 0"),
        Bad("none", _starts(), ValueError, "(S+1,)"),
    ),
    peers={"transformers": transformers_conv},
)  # fmt: skip
