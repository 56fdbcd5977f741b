"""``moe_route``: from a router's logits to the experts of each token and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from effvlm._library import FLOATS, Tensors, register, require_tensor

SCORES = ("softmax", "sigmoid", "none")
SCHEMA = (
    "(Tensor logits, int k, str score, Tensor? bias, Tensor? mask, bool renormalize, float scale, int groups, int top_groups, "
    "int? capacity, bool by_expert) -> (Tensor, Tensor)"
)


class MoeRoute(NamedTuple):
    """What :func:`moe_route` returns.

    Attributes:
        weight: (T, K) float32, 0 where ``ids`` is −1.
        ids: (T, K) int64, experts in 0 … E−1, best first; −1 where a choice is not taken.
    """

    weight: torch.Tensor
    ids: torch.Tensor


def check(
    logits: torch.Tensor,
    k: int,
    score: str,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    renormalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    capacity: int | None,
    by_expert: bool,
) -> None:
    require_tensor("moe_route", "logits", logits, dims="TE", dtypes=FLOATS)
    T, E = logits.shape
    others = (("bias", bias, "E", torch.float32, (E,)), ("mask", mask, "T", torch.bool, (T,)))
    for name, tensor, letter, dtype, shape in others:
        if tensor is None:
            continue
        require_tensor("moe_route", name, tensor, dims=letter, dtypes=(dtype,))
        if tensor.shape != shape:
            raise ValueError(f"moe_route: expected {name} of shape ({letter},) = {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != logits.device:
            raise TypeError(f"moe_route: expected {name} on the device of logits, {logits.device}, got {tensor.device}")
    if score not in SCORES:
        raise ValueError(f"moe_route: expected score to be one of {', '.join(SCORES)}, got {score!r}")
    if not 1 <= groups <= 32 or E % groups:
        raise ValueError(f"moe_route: expected 1 to 32 groups of equal size, got groups = {groups} for E = {E}")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"moe_route: expected 1 <= top_groups <= groups = {groups}, got {top_groups}")
    if not 0 <= k <= E // groups * top_groups:
        raise ValueError(f"moe_route: expected 0 <= k <= {E // groups * top_groups} experts to choose from, got k = {k}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"moe_route: expected capacity >= 0 tokens per expert, got {capacity}")
    if by_expert and (capacity is None or bias is not None or groups > 1):
        raise ValueError("moe_route: expected by_expert with a capacity, no bias and one group")
    if T * max(k, 1) >= 2**31:
        raise ValueError(f"moe_route: expected fewer than 2**31 choices, got T·K = {T * k}")


def allocate(logits: torch.Tensor, k: int, *rest: object) -> Tensors:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _open(choice: torch.Tensor, groups: int, top_groups: int, best: int) -> torch.Tensor:
    """(T, E) bool, whether an expert's group is one of the best. ``best``: how many of its choices a group counts."""
    grouped = choice.unflatten(1, (groups, -1))
    value = grouped.sort(-1, descending=True).values[..., :best].sum(-1)
    index = value.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    return torch.zeros_like(value, dtype=torch.bool).scatter(1, index, True).repeat_interleave(grouped.shape[2], 1)


def _taken(ids: torch.Tensor, capacity: int) -> torch.Tensor:
    """(T, K) bool, whether an expert still has room: first choices of all tokens come before second ones."""
    line = ids.T.flatten()
    same = line[:, None] == line
    place = (same & torch.ones_like(same).tril(-1)).sum(1)
    return (place < capacity).view(ids.T.shape).T


def reference(
    logits: torch.Tensor,
    k: int,
    score: str,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    renormalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    capacity: int | None,
    by_expert: bool,
) -> Tensors:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide if score == "none" else wide.sigmoid() if score == "sigmoid" else wide.softmax(-1)
    choice = wide if bias is None else scores + bias  # scores alone have the order of their logits
    valid = torch.ones_like(wide, dtype=torch.bool) if mask is None else mask[:, None].expand(wide.shape)
    if by_expert:
        assert capacity is not None
        rank = scores.masked_fill(~valid, -torch.inf).sort(dim=0, descending=True, stable=True).indices.argsort(0)
        valid, choice = valid & (rank < capacity), scores
    elif top_groups < groups:
        valid = valid & _open(choice, groups, top_groups, 2 if bias is not None else 1)
    order = torch.where(valid, choice, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(1, valid.gather(1, order).sort(dim=-1, descending=True, stable=True).indices)  # −Inf may be a choice
    ids = order[:, :k]
    taken = valid.gather(1, ids)
    weight = torch.where(taken, scores.gather(1, ids), 0)
    if renormalize:
        weight = weight / (weight.sum(1, keepdim=True) + 1e-20)
    if capacity is not None and not by_expert:
        taken = taken & _taken(torch.where(taken, ids, -1), capacity)
    return torch.where(taken, weight * scale, 0).float(), torch.where(taken, ids, -1)


_op = register("moe_route", SCHEMA, check=check, allocate=allocate, reference=reference)


def moe_route(
    logits: torch.Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    capacity: int | None = None,
    by_expert: bool = False,
) -> MoeRoute:
    """Choose each token's experts; what comes out is what :func:`effvlm.moe_ffn` takes.

    ==================================  ==============================================================================
    Mixtral, Qwen3-MoE, gpt-oss         ``moe_route(logits, k, renormalize=True)``
    DeepSeek-V2                         ``moe_route(logits, k, groups=G, top_groups=g, scale=s)``
    DeepSeek-V3, GLM-4.5                ``moe_route(logits, k, score="sigmoid", bias=b, renormalize=True, groups=G, …)``
    Switch Transformers                 ``moe_route(logits, 1, capacity=C)``
    expert choice (Zhou et al. 2022)    ``moe_route(logits, k, by_expert=True, capacity=C)``
    ==================================  ==============================================================================

    Args:
        logits: (T, E) float32, float16 or bfloat16, any strides, on CPU or CUDA. With a router's own bias already added.
        k: K, experts per token. With ``by_expert``: the most a token keeps of those that took it; E keeps all.
        score: ``"softmax"`` over the experts, ``"sigmoid"``, or ``"none"`` when ``logits`` are scores already.
        bias: (E,) float32, added to scores to choose, not to weigh (DeepSeek-V3's ``e_score_correction_bias``).
        mask: (T,) bool; tokens with False go to no expert.
        renormalize: divide a token's weights by their sum.
        scale: factor of all weights.
        groups: experts form so many groups of equal size, at most 32 …
        top_groups: … of which a token chooses among the best so many. A group counts its two best choices with a ``bias``, its
            best one without.
        capacity: most tokens per expert. First choices of all tokens come before second ones, earlier tokens before later ones;
            a choice that finds no room becomes −1, after renormalisation.
        by_expert: experts choose instead: each takes its ``capacity`` tokens of highest score.

    Returns:
        ``MoeRoute(weight, ids)``: (T, K) float32 and (T, K) int64. Ties go to the lower expert; NaN is chosen first.

    Raises:
        ValueError: wrong rank or shape, unknown ``score``, or ``k``, ``groups``, ``top_groups``, ``capacity`` that do not fit.
        TypeError: wrong dtype, or tensors on different devices.
    """
    return MoeRoute(*_op(logits, k, score, bias, mask, renormalize, scale, groups, top_groups, capacity, by_expert))
