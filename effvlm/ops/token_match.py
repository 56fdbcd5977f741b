"""``token_match``: for each source token its most similar destination token, and the grouping that merges the best pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, int r, bool cosine, Tensor? role) -> (Tensor, Tensor, Tensor)"


class TokenMatch(NamedTuple):
    """What :func:`token_match` returns; without roles W = ⌈N/2⌉, of the source at position ``2i`` at ``i``; with roles W = N.

    Attributes:
        score: (B, W) float32, similarity of a source to its partner (with roles: −inf where there is none).
        partner: (B, W) int32, position of the partner in 0 … N−1 (−1 where there is none).
        group: (B, N) int32, the group of each token in 0 … N−r−1, numbered by position of the group's anchor.
    """

    score: torch.Tensor
    partner: torch.Tensor
    group: torch.Tensor


def check(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> None:
    require_tensor("token_match", "x", x, dims="BNC", dtypes=FLOATS)
    N = x.shape[1]
    if role is not None:
        _check_role(x, r, role)
    elif isinstance(r, int) and not 0 <= r <= N // 2:
        raise ValueError(f"token_match: expected 0 <= r <= N // 2 = {N // 2} for N = {N} tokens, got r = {r}")
    if N >= 2**31:
        raise ValueError(f"token_match: expected fewer than 2**31 tokens, got N = {N}")
    if DEBUG and x.is_cuda and not bool(torch.isfinite(x).all()):
        raise ValueError("token_match: expected finite x, got NaN or Inf")


def _check_role(x: torch.Tensor, r: int, role: torch.Tensor) -> None:
    B, N, _ = x.shape
    require_tensor("token_match", "role", role, dims="BN", dtypes=(torch.uint8, torch.int8))
    if role.shape != (B, N) or role.device != x.device:
        raise ValueError(f"token_match: expected role of shape {(B, N)} on {x.device}, got {tuple(role.shape)} on {role.device}")
    if isinstance(r, int) and not 0 <= r <= max(N - 1, 0):  # what is no source is known only where the values are
        raise ValueError(f"token_match: expected 0 <= r < N = {N} with roles, got r = {r}")
    if DEBUG and x.is_cuda:
        able = torch.where((role == 2).any(1), (role == 1).sum(1), 0)
        if bool((role > 2).any() | (role < 0).any() | (able < r).any()):
            raise ValueError(
                f"token_match: expected roles of 0, 1 and 2 and r = {r} or more sources with a destination in each entry"
            )


def allocate(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> Tensors:
    B, N, _ = x.shape
    W = (N + 1) // 2 if role is None else N
    return (
        x.new_empty((B, W), dtype=torch.float32),
        x.new_empty((B, W), dtype=torch.int32),
        x.new_empty((B, N), dtype=torch.int32),
    )


def groups_of(score: torch.Tensor, partner: torch.Tensor, r: int, N: int) -> torch.Tensor:
    """The grouping that merges the ``r`` best sources into their partners, from (B, W) scores and partners → (B, N) int32."""
    B, W = score.shape
    step = 1 if W == N else 2  # between sources
    own = torch.arange(N, device=score.device).expand(B, N)
    best = score.argsort(dim=-1, descending=True, stable=True)[:, :r]  # stable: ties go to the lowest position
    anchor = own.scatter(1, step * best, partner.long().gather(1, best))
    anchor = torch.where(anchor < 0, own, anchor)
    is_anchor = anchor == own
    number = is_anchor.cumsum(dim=1) - 1
    return number.gather(1, anchor).to(torch.int32)


def reference(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> Tensors:
    B, N, _ = x.shape
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if cosine:
        norm = x.norm(dim=-1, keepdim=True)
        x = torch.where(norm > 0, x / norm, torch.zeros_like(x))
    W = (N + 1) // 2 if role is None else N
    if N == 0 or B == 0 or (role is None and N == 1):
        score = x.new_zeros((B, W)) if role is None else x.new_full((B, W), -torch.inf)
        partner = torch.full((B, W), -1, dtype=torch.long, device=x.device)
    elif role is None:
        score, partner = (x[:, ::2] @ x[:, 1::2].transpose(1, 2)).max(dim=-1)
        partner = 2 * partner + 1
    else:
        pairs = (role == 1)[:, :, None] & (role == 2)[:, None]
        score, partner = (x @ x.transpose(1, 2)).masked_fill(~pairs, -torch.inf).max(dim=-1)
        partner = torch.where(pairs.any(-1), partner, -1)
    group = groups_of(score, partner, r, N)
    return score, partner.to(torch.int32), group


_op = register("token_match", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_match(x: torch.Tensor, r: int, *, metric: str = "cosine", role: torch.Tensor | None = None) -> TokenMatch:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, §3) without ever storing the N×N similarities.

    Even positions are sources, odd ones destinations, unless ``role`` says otherwise. Every source finds its most similar
    destination (ties: the lowest position); the ``r`` sources with the highest score (ties: the lowest position) join the group
    of their partner. Feed ``group`` to :func:`effvlm.token_merge`. Equivalent to::

        a, b = F.normalize(x[:, ::2], dim=-1), F.normalize(x[:, 1::2], dim=-1)
        score, partner = (a @ b.mT).max(-1)

    Args:
        x: (B, N, C) float32, float16 or bfloat16, any strides, on CPU or CUDA; what to compare, for instance attention keys.
        r: pairs to merge in each batch entry: 0 … N // 2; with ``role`` no more than any entry has sources that have a
            destination. On CUDA, where that is not counted first, all of them merge, and groups are more than N − r.
        metric: ``"cosine"`` or ``"dot"``.
        role: (N,) or (B, N) int8 or uint8: 1 a source, 2 a destination, 0 neither (padding, say: it is a group of its own and
            may hold anything). Scores and partners are then (B, N), −inf and −1 where a token has no partner.

    Returns:
        ``TokenMatch(score, partner, group)``. No gradient flows through it: which pairs match is a discrete choice.

    Raises:
        ValueError: wrong rank or shape, ``r`` out of range, an unknown metric, or (on CPU) a NaN or Inf in a source or
            destination, a role other than 0, 1 and 2, or an ``r`` beyond the sources of an entry.
        TypeError: wrong dtype or device.
    """
    if metric not in ("cosine", "dot"):
        raise ValueError(f"token_match: expected metric 'cosine' or 'dot', got {metric!r}")
    if isinstance(x, torch.Tensor):
        x = x.detach()
        if isinstance(role, torch.Tensor) and role.dim() == 1 and x.dim() == 3:
            role = role.expand(x.shape[0], -1)
    return TokenMatch(*_op(x, r, metric == "cosine", role))
