"""moe_ffn: two products with a rounding between them; as good as PyTorch's own in the same dtype."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from specs import Args, Bad, Case, Spec

PLAIN = {"act": "silu"}
GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0, "bias": True, "transposed": True}


def _sizes(T: int, K: int, E: int, H: int, I: int) -> dict[str, int]:  # noqa: E741  (I: the letter of the contract)
    return {"T": T, "K": K, "E": E, "H": H, "I": I}


CASES = (
    Case("few", _sizes(5, 2, 4, 64, 48)),
    Case("tails", _sizes(7, 3, 5, 37, 29), {"bias": True}),
    Case("one_token", _sizes(1, 4, 8, 40, 24)),
    Case("two_tokens", _sizes(2, 1, 3, 33, 50)),
    Case("no_tokens", _sizes(0, 2, 4, 16, 8)),
    Case("no_choices", _sizes(3, 0, 4, 16, 8)),
    Case("no_hidden", _sizes(3, 2, 4, 16, 0), {"bias": True}),
    Case("no_input", _sizes(3, 2, 4, 0, 8), {"bias": True}),
    Case("one_expert", _sizes(9, 1, 1, 24, 32), {"act": "gelu"}),
    Case("every_expert", _sizes(6, 4, 4, 20, 25), {"act": "gelu_tanh"}),
    Case("all_to_one", _sizes(70, 2, 6, 24, 28), {"route": "one", "act": "relu"}),
    Case("repeated", _sizes(8, 3, 4, 24, 16), {"route": "repeated"}),
    Case("skipped", _sizes(12, 3, 4, 24, 16), {"route": "skipped", "bias": True}),
    Case("ungated", _sizes(11, 2, 5, 32, 40), {"act": "relu2", "gated": False}),
    Case("gpt_oss", _sizes(9, 2, 4, 48, 32), GPT_OSS),
    Case("interleaved", _sizes(6, 2, 4, 40, 23), {"interleaved": True, "act": "gelu"}),
    Case("lora", _sizes(21, 2, 6, 48, 8), {"act": "identity", "gated": False}),
    Case("clamped", _sizes(17, 2, 4, 48, 32), {"limit": 0.5}),
    Case("transposed", _sizes(33, 2, 5, 50, 70), {"transposed": True}),
    Case("transposed_few", _sizes(4, 2, 3, 201, 345), {"transposed": True, "bias": True}),
    Case("transposed_many", _sizes(230, 1, 1, 151, 90), {"transposed": True, "act": "gelu", "gated": False}),
    Case("gpt_oss_many", _sizes(60, 2, 2, 90, 141), GPT_OSS),
    Case("narrow", _sizes(20, 2, 3, 1, 1), {"bias": True}),
    Case("many_tokens", _sizes(150, 2, 3, 32, 26)),
    Case("sorted", _sizes(420, 3, 7, 8, 8), {"route": "skipped"}),
    Case("tiles", _sizes(100, 2, 2, 64, 64), {"bias": True}),
    Case("two_blocks", _sizes(90, 2, 4, 40, 60), {"bias": True, "act": "gelu"}),
    *(Case(f"qwen3_30b_t{T}", _sizes(T, 8, 128, 2048, 768), bench=True) for T in (1, 4, 16, 64, 256, 1024, 4096)),
    *(Case(f"deepseek_v2_lite_t{T}", _sizes(T, 6, 64, 2048, 1408), bench=True) for T in (1, 16, 1024)),
    *(Case(f"mixtral_t{T}", _sizes(T, 2, 8, 4096, 14336), bench=True) for T in (1, 1024)),
    *(Case(f"gpt_oss_20b_t{T}", _sizes(T, 4, 32, 2880, 2880), GPT_OSS, bench=True) for T in (1, 16, 1024)),
)
_big: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # one set of weights at a time: they are gigabytes


def _route(case: Case, generator: torch.Generator) -> torch.Tensor:
    T, K, E = (case.sizes[k] for k in "TKE")
    route = case.options.get("route")
    if route in ("one", "repeated"):
        low, high = (2, 3) if route == "one" else (0, 2)
        return torch.randint(low, high, (T, K), generator=generator)
    ids = torch.rand(T, E, generator=generator).topk(min(K, E)).indices
    if route == "skipped":
        ids[::3, 0], ids[1::3, 1], ids[4] = -1, E, E
    return ids


def _weights(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    E, H, I = (case.sizes[k] for k in "EHI")  # noqa: E741
    gated, transposed = case.options.get("gated", True), case.options.get("transposed", False)
    key = (E, H, I, gated, transposed, dtype)
    if key in _big:
        return _big[key]
    R = 2 * I if gated else I
    large = E * R * H > 10**7
    fill = torch.empty(E, *((H, R) if transposed else (R, H)), dtype=dtype if large else torch.float32)
    up = fill.normal_(std=max(H, 1) ** -0.5, generator=generator)
    fill = torch.empty(E, *((I, H) if transposed else (H, I)), dtype=dtype if large else torch.float32)
    down = fill.normal_(std=max(I, 1) ** -0.5, generator=generator)
    made = up.to(dtype), down.to(dtype)
    made = (made[0].mT, made[1].mT) if transposed else made
    if large:
        _big.clear()
        _big[key] = made
    return made


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    T, K, H = (case.sizes[k] for k in "TKH")
    options = case.options
    up, down = _weights(case, dtype, generator)
    x = torch.randn(T, H, generator=generator).to(dtype)
    weight = torch.rand(T, K, generator=generator)
    up_bias = torch.randn(up.shape[:2], generator=generator).to(dtype) if options.get("bias") else None
    down_bias = torch.randn(down.shape[:2], generator=generator).to(dtype) if options.get("bias") else None
    gate = [options.get(k, v) for k, v in (("alpha", 1.0), ("limit", math.inf), ("offset", 0.0))]
    layout = (options.get("act", "silu"), options.get("gated", True), options.get("interleaved", False))
    return (x, _route(case, generator), weight, up, up_bias, down, down_bias, *layout, *gate)


def _module(up: torch.Tensor, up_bias: Any, down: torch.Tensor, down_bias: Any, options: tuple[Any, ...]) -> Any:
    """What transformers' expert functions want to know of a module."""
    from effvlm.ops.moe_ffn import gate

    transposed = up.stride(2) != 1
    return SimpleNamespace(
        num_experts=len(up),
        gate_up_proj=up.mT if transposed else up,
        down_proj=down.mT if transposed else down,
        gate_up_proj_bias=up_bias,
        down_proj_bias=down_bias,
        has_gate=True,
        has_bias=up_bias is not None,
        is_transposed=transposed,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        _apply_gate=lambda rows: gate(rows, *options),
    )


def grouped_mm(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """transformers' default on CPU and for prefill on a GPU."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(_module(*rest[:4], rest[4:]), x, ids, weight.to(x.dtype))


def _llama_cpp(*args: Any, quantised: bool = False) -> Any:
    """bench/llama_cpp.py; imported late, since only bench has it on its path and it loads libraries."""
    from llama_cpp import Experts

    return Experts(*args, quantised=quantised)


def _needed(case: Case) -> float:
    """How many experts uniform routing touches, on average."""
    T, K, E = (case.sizes[k] for k in "TKE")
    return E * (1 - (1 - K / E) ** T)


def _per_expert(case: Case) -> int:
    return (3 if case.options.get("gated", True) else 2) * case.sizes["H"] * case.sizes["I"]


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="moe_ffn",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction",),
    flops=lambda c: 2.0 * c.sizes["T"] * c.sizes["K"] * _per_expert(c),
    bytes=lambda c, dtype: float(dtype.itemsize * (_needed(c) * _per_expert(c) + 2 * c.sizes["T"] * c.sizes["H"])),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(T, H)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("ids_dtype", lambda a: a.__setitem__(1, a[1].int()), TypeError, "int64"),
        Bad("ids_shape", lambda a: a.__setitem__(1, a[1][1:]), ValueError, "(5, 2)"),
        Bad("id_too_large", lambda a: a[1].__setitem__((3, 1), 5), ValueError, "got 5 at token 3, choice 1"),
        Bad("id_too_small", lambda a: a[1].__setitem__((0, 0), -2), ValueError, "got -2 at token 0, choice 0"),
        Bad("weight_dtype", lambda a: a.__setitem__(2, a[2].half()), TypeError, "float32"),
        Bad("weight_shape", lambda a: a.__setitem__(2, a[2][:, :1]), ValueError, "(T, K) = (5, 2)"),
        Bad("up_dtype", lambda a: a.__setitem__(3, a[3].half()), TypeError, "float16"),
        Bad("up_rows", lambda a: a.__setitem__(3, a[3][:, 1:]), ValueError, "(E, 2·I, H) = (4, 96, 64)"),
        Bad("experts", lambda a: a.__setitem__(5, a[5][1:]), ValueError, "(E, O, I)"),
        Bad("up_bias", _set(4, torch.zeros(4, 95)), ValueError, "(E, R) = (4, 96)"),
        Bad("down_bias", _set(6, torch.zeros(3, 64)), ValueError, "(E, O) = (4, 64)"),
        Bad("act", _set(7, "tanh"), ValueError, "silu, gelu"),
        Bad("limit", _set(11, 0.0), ValueError, "limit > 0"),
    ),
    peers={"transformers grouped_mm": grouped_mm},
    prepared={"llama.cpp": _llama_cpp, "llama.cpp Q4_K": partial(_llama_cpp, quantised=True)},
    streamed=(3, 4, 5, 6),
)
