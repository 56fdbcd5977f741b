"""``token_select``: which tokens of each segment to keep, by score."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from effvlm._library import DEBUG, Tensors, register, require_tensor

SCHEMA = "(Tensor score, Tensor start, Tensor limit, str rule) -> (Tensor, Tensor)"
RULES = ("top", "above", "iqr", "top_p")


class TokenSelect(NamedTuple):
    """What :func:`token_select` returns.

    Attributes:
        kept: (N,) bool, whether each token is kept.
        count: (S,) int32, how many of each segment are.
    """

    kept: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count


def check(score: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, rule: str) -> None:
    require_tensor("token_select", "score", score, dims="N", dtypes=(torch.float32,))
    require_tensor("token_select", "start", start, dims="S", dtypes=(torch.int32,))
    require_tensor("token_select", "limit", limit, dims="S", dtypes=(torch.float32,))
    N, S = score.shape[0], limit.shape[0]
    if rule not in RULES:
        raise ValueError(f"token_select: expected rule to be one of {', '.join(RULES)}, got {rule!r}")
    if start.shape[0] != S + 1:
        raise ValueError(f"token_select: expected start of shape (S+1,) = ({S + 1},) for S = {S}, got {tuple(start.shape)}")
    for name, t in (("start", start), ("limit", limit)):
        if t.device != score.device:
            raise TypeError(f"token_select: expected {name} on the device of score, {score.device}, got {t.device}")
    if N >= 2**31:
        raise ValueError(f"token_select: expected fewer than 2**31 tokens, got N = {N}")
    if DEBUG and score.is_cuda:
        if int(start[0]) != 0 or int(start[-1]) != N or bool((start.diff() < 0).any()):
            raise ValueError(f"token_select: expected start to ascend from 0 to N = {N}, got one that does not")
        if bool(score.isnan().any()) or bool(limit.isnan().any()):
            raise ValueError("token_select: expected score and limit without NaN, got one")
        if rule == "top_p" and bool(((score < 0) & (score != -math.inf)).any()):
            raise ValueError("token_select: expected scores >= 0 (or -inf) for top_p, got one below")


def allocate(score: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, rule: str) -> Tensors:
    return score.new_empty(score.shape, dtype=torch.bool), score.new_empty(limit.shape, dtype=torch.int32)


def _kept(score: torch.Tensor, limit: float, rule: str) -> torch.Tensor:
    """One segment."""
    finite = score[score.isfinite()].double()
    order = score.argsort(descending=True, stable=True)  # stable: ties go to the lowest index
    kept = torch.zeros_like(score, dtype=torch.bool)
    if rule == "top":
        kept[order[: int(min(max(limit, 0), len(score)))]] = True
    elif rule == "above":
        kept = score >= limit
    elif rule == "iqr" and len(finite):
        quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64, device=score.device)
        low, high = torch.quantile(finite, quartiles).tolist()
        kept = score > high + limit * (high - low)
    elif rule == "top_p":
        order = order[score[order].isfinite()]
        before = score[order].double().cumsum(0) - score[order]
        kept[order[(score[order] > 0) & ((before < limit * finite.sum()) | (before == 0))]] = True
    return (kept | (score == math.inf)) & (score != -math.inf)


def reference(score: torch.Tensor, start: torch.Tensor, limit: torch.Tensor, rule: str) -> Tensors:
    score = score.detach()
    first = start.tolist()
    segments = [_kept(score[a:b], t, rule) for a, b, t in zip(first[:-1], first[1:], limit.tolist(), strict=True)]
    count = torch.tensor([int(s.sum()) for s in segments], dtype=torch.int32, device=score.device)
    return torch.cat([score[:0].bool(), *segments]), count


_op = register("token_select", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_select(
    score: torch.Tensor, limit: float | torch.Tensor, *, rule: str = "top", start: torch.Tensor | None = None
) -> TokenSelect:
    """Which tokens of each segment to keep, by score: without a sort, and the same bits on every machine.

    ==========  =====================================================================================================
    rule        keeps, with ``t`` the segment's limit
    ==========  =====================================================================================================
    ``top``     the ⌊t⌋ highest scores (ties: the lowest index)
    ``above``   scores >= t
    ``iqr``     scores > Q3 + t * (Q3 - Q1), with ``torch.quantile``'s quartiles of the segment's finite scores
    ``top_p``   the highest scores until their running sum first reaches t * total, t in 0 … 1; at least one token
                if any score is positive
    ==========  =====================================================================================================

    In every rule a score of -inf is never kept and +inf always: it counts among the ⌊t⌋, but not in quartiles and sums.

    Args:
        score: (N,) float32, any stride, on CPU or CUDA. ``top_p`` wants scores >= 0 (or -inf).
        limit: (S,) float32, or one number for all segments.
        rule: one of the above.
        start: (S+1,) int32, ascending from 0 to N: segment ``s`` is ``score[start[s]:start[s + 1]]``. Default: one segment.

    Returns:
        ``TokenSelect(kept, count)``: (N,) bool and (S,) int32. No gradient flows through them.

    Raises:
        ValueError: wrong rank or shape, an unknown rule, or (on CPU) NaN, a negative score in ``top_p``, a ``start`` that does
            not ascend from 0 to N.
        TypeError: wrong dtype, or tensors on different devices.
    """
    require_tensor("token_select", "score", score, dims="N", dtypes=(torch.float32,))
    if start is None:
        start = torch.tensor([0, score.shape[0]], dtype=torch.int32, device=score.device)
    if not isinstance(limit, torch.Tensor):
        limit = torch.full((max(start.shape[0] - 1, 0),), float(limit), dtype=torch.float32, device=score.device)
    return TokenSelect(*_op(score.detach(), start, limit.detach(), rule))
