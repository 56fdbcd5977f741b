"""``token_match``: for each source token its most similar destination token, and the grouping that merges the best pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, int r, bool cosine) -> (Tensor, Tensor, Tensor)"


class TokenMatch(NamedTuple):
    """What :func:`token_match` returns; S = ⌈N/2⌉ sources.

    Attributes:
        score: (B, S) float32, similarity of source ``i`` (position ``2i``) to its partner.
        partner: (B, S) int32, position of the partner in 0 … N−1 (−1 when N = 1).
        group: (B, N) int32, the group of each token in 0 … N−r−1, numbered by position of the group's anchor.
    """

    score: torch.Tensor
    partner: torch.Tensor
    group: torch.Tensor


def check(x: torch.Tensor, r: int, cosine: bool) -> None:
    require_tensor("token_match", "x", x, dims="BNC", dtypes=FLOATS)
    N = x.shape[1]
    if isinstance(r, int) and not 0 <= r <= N // 2:
        raise ValueError(f"token_match: expected 0 <= r <= N // 2 = {N // 2} for N = {N} tokens, got r = {r}")
    if N >= 2**31:
        raise ValueError(f"token_match: expected fewer than 2**31 tokens, got N = {N}")
    if DEBUG and x.is_cuda and not bool(torch.isfinite(x).all()):
        raise ValueError("token_match: expected finite x, got NaN or Inf")


def allocate(x: torch.Tensor, r: int, cosine: bool) -> Tensors:
    B, N, _ = x.shape
    S = (N + 1) // 2
    return (
        x.new_empty((B, S), dtype=torch.float32),
        x.new_empty((B, S), dtype=torch.int32),
        x.new_empty((B, N), dtype=torch.int32),
    )


def groups_of(score: torch.Tensor, partner: torch.Tensor, r: int, N: int) -> torch.Tensor:
    """The grouping that merges the ``r`` best sources into their partners, from (B, S) scores and partners → (B, N) int32."""
    B = score.shape[0]
    best = score.argsort(dim=-1, descending=True, stable=True)[:, :r]  # stable: ties go to the lowest position
    anchor = torch.arange(N, device=score.device).expand(B, N).clone()
    anchor.scatter_(1, 2 * best, partner.long().gather(1, best))
    is_anchor = anchor == torch.arange(N, device=score.device)
    number = is_anchor.cumsum(dim=1) - 1
    return number.gather(1, anchor).to(torch.int32)


def reference(x: torch.Tensor, r: int, cosine: bool) -> Tensors:
    B, N, _ = x.shape
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if cosine:
        norm = x.norm(dim=-1, keepdim=True)
        x = torch.where(norm > 0, x / norm, torch.zeros_like(x))
    source, destination = x[:, ::2], x[:, 1::2]
    S = source.shape[1]
    if N < 2 or B == 0:
        score = x.new_zeros((B, S))
        partner = torch.full((B, S), -1, dtype=torch.long, device=x.device)
    else:
        score, partner = (source @ destination.transpose(1, 2)).max(dim=-1)
        partner = 2 * partner + 1
    group = groups_of(score, partner, r, N)
    return score, partner.to(torch.int32), group


_op = register("token_match", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_match(x: torch.Tensor, r: int, *, metric: str = "cosine") -> TokenMatch:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, §3) without ever storing the N×N similarities.

    Even positions are sources, odd ones destinations. Every source finds its most similar destination (ties: the lowest
    position); the ``r`` sources with the highest score (ties: the lowest position) join the group of their partner.
    Feed ``group`` to :func:`effvlm.token_merge`. Equivalent to::

        a, b = F.normalize(x[:, ::2], dim=-1), F.normalize(x[:, 1::2], dim=-1)
        score, partner = (a @ b.mT).max(-1)

    Args:
        x: (B, N, C) float32, float16 or bfloat16, any strides, on CPU or CUDA; what to compare, for instance attention keys.
        r: pairs to merge in each batch entry, 0 … N // 2.
        metric: ``"cosine"`` or ``"dot"``.

    Returns:
        ``TokenMatch(score, partner, group)``. No gradient flows through it: which pairs match is a discrete choice.

    Raises:
        ValueError: wrong rank, ``r`` out of range, an unknown metric, or (on CPU) a NaN or Inf in ``x``.
        TypeError: wrong dtype or device.
    """
    if metric not in ("cosine", "dot"):
        raise ValueError(f"token_match: expected metric 'cosine' or 'dot', got {metric!r}")
    if isinstance(x, torch.Tensor):
        x = x.detach()
    return TokenMatch(*_op(x, r, metric == "cosine"))
