"""moe_route: the experts are exact, their weights as good as PyTorch's."""

from __future__ import annotations

from typing import Any

import torch

from specs import Args, Bad, Case, Spec

DEEPSEEK_V3 = {"score": "sigmoid", "bias": True, "renormalize": True, "groups": 8, "top_groups": 4, "scale": 2.5}
DEFAULTS = {"renormalize": False, "scale": 1.0, "groups": 1, "top_groups": 1, "capacity": None, "by_expert": False}


def _sizes(T: int, E: int, K: int) -> dict[str, int]:
    return {"T": T, "E": E, "K": K}


CASES = (
    Case("mixtral", _sizes(9, 8, 2), {"renormalize": True}),
    Case("tails", _sizes(13, 37, 5)),
    Case("one_token", _sizes(1, 60, 4)),
    Case("no_tokens", _sizes(0, 8, 2)),
    Case("no_choices", _sizes(3, 8, 0)),
    Case("no_experts", _sizes(3, 0, 0)),
    Case("every_expert", _sizes(6, 5, 5), {"renormalize": True}),
    Case("scores", _sizes(10, 12, 3), {"score": "none", "scale": 0.5}),
    Case("ties", _sizes(20, 16, 4), {"integers": True, "score": "sigmoid"}),
    Case("deepseek_v2", _sizes(11, 32, 6), {"groups": 8, "top_groups": 3, "scale": 16.0}),
    Case("deepseek_v3", _sizes(11, 64, 8), DEEPSEEK_V3),
    Case("group_of_one", _sizes(7, 8, 3), {**DEEPSEEK_V3, "groups": 8, "top_groups": 5}),
    Case("biased", _sizes(30, 40, 4), {"score": "sigmoid", "bias": True}),
    Case("masked", _sizes(25, 12, 2), {"mask": True, "renormalize": True}),
    Case("capacity", _sizes(90, 6, 2), {"capacity": 20, "mask": True, "renormalize": True}),
    Case("no_room", _sizes(9, 4, 2), {"capacity": 0}),
    Case("switch", _sizes(300, 4, 1), {"capacity": 64}),
    Case("by_expert", _sizes(50, 8, 8), {"capacity": 12, "by_expert": True}),
    Case("by_expert_two", _sizes(300, 8, 2), {"capacity": 90, "by_expert": True, "mask": True, "renormalize": True}),
    Case("by_expert_ties", _sizes(40, 4, 4), {"capacity": 9, "by_expert": True, "integers": True, "score": "sigmoid"}),
    Case("by_expert_none", _sizes(5, 4, 2), {"capacity": 0, "by_expert": True}),
    Case("by_expert_all", _sizes(5, 4, 4), {"capacity": 9, "by_expert": True}),
    Case("qwen3_30b", _sizes(1, 128, 8), {"renormalize": True}, bench=True),
    Case("qwen3_30b", _sizes(4096, 128, 8), {"renormalize": True}, bench=True),
    Case("deepseek_v3", _sizes(1024, 256, 8), DEEPSEEK_V3, bench=True),
    Case("expert_choice", _sizes(1024, 64, 8), {"capacity": 128, "by_expert": True}, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    T, E, K = (case.sizes[k] for k in "TEK")
    logits = torch.randn(T, E, generator=generator) * 2
    if case.options.get("integers"):
        logits = logits.round()
    bias = torch.randn(E, generator=generator) * 0.3 if case.options.get("bias") else None
    mask = torch.rand(T, generator=generator) < 0.8 if case.options.get("mask") else None
    rest = [case.options.get(name, value) for name, value in DEFAULTS.items()]
    return (logits.to(dtype), K, case.options.get("score", "softmax"), bias, mask, *rest)


def as_transformers(logits: torch.Tensor, k: int, score: str, bias: Any, mask: Any, *rest: Any) -> Any:
    """The lines of Mixtral's and DeepSeek-V3's routers."""
    renormalize, scale, groups, top_groups, capacity, by_expert = rest
    scores = logits.float().sigmoid() if score == "sigmoid" else logits.float().softmax(-1)
    if by_expert:
        weight, tokens = scores.topk(capacity, dim=0)
        return weight, tokens
    choice = scores if bias is None else scores + bias
    if top_groups < groups:
        grouped = choice.unflatten(1, (groups, -1))
        index = grouped.topk(2, dim=-1)[0].sum(-1).topk(top_groups, dim=-1)[1]
        open_groups = torch.zeros(len(logits), groups, dtype=torch.bool).scatter_(1, index, True)
        choice = choice.masked_fill(~open_groups.repeat_interleave(grouped.shape[2], 1), float("-inf"))
    ids = choice.topk(k, dim=-1)[1]
    weight = scores.gather(1, ids)
    return (weight / (weight.sum(-1, keepdim=True) + 1e-20) if renormalize else weight) * scale, ids


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


SPEC = Spec(
    op="moe_route",
    cases=CASES,
    inputs=inputs,
    tolerance=("reduction", "exact"),
    flops=lambda c: 20.0 * c.sizes["T"] * c.sizes["E"],
    bytes=lambda c, dtype: float(c.sizes["T"] * (c.sizes["E"] * dtype.itemsize + 12 * c.sizes["K"])),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(T, E)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("too_many", _set(1, 9), ValueError, "k = 9"),
        Bad("score", _set(2, "tanh"), ValueError, "softmax, sigmoid, none"),
        Bad("bias_shape", _set(3, torch.zeros(7)), ValueError, "(E,) = (8,)"),
        Bad("bias_dtype", _set(3, torch.zeros(8, dtype=torch.float16)), TypeError, "float16"),
        Bad("mask_shape", _set(4, torch.ones(8, dtype=torch.bool)), ValueError, "(T,) = (9,)"),
        Bad("groups", _set(7, 3), ValueError, "groups = 3 for E = 8"),
        Bad("top_groups", _set(8, 2), ValueError, "got 2"),
        Bad("capacity", _set(9, -1), ValueError, "capacity >= 0"),
        Bad("by_expert", _set(10, True), ValueError, "by_expert with a capacity"),
    ),
    peers={"transformers' lines": as_transformers},
)
