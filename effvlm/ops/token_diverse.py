"""``token_diverse``: greedy choice of k diverse tokens, by largest smallest distance or by determinant."""

from __future__ import annotations

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, int k, Tensor? relevance, bool dpp) -> Tensor"
SPENT = 1e-5  # what is left of a token outside the span of those picked, below which float32 cannot tell it from nothing


def check(x: torch.Tensor, k: int, relevance: torch.Tensor | None, dpp: bool) -> None:
    require_tensor("token_diverse", "x", x, dims="BNC", dtypes=FLOATS)
    B, N, _ = x.shape
    if isinstance(k, int) and not 0 <= k <= N:
        raise ValueError(f"token_diverse: expected 0 <= k <= N = {N}, got k = {k}")
    if N >= 2**31:
        raise ValueError(f"token_diverse: expected fewer than 2**31 tokens, got N = {N}")
    if relevance is not None:
        if not dpp:
            raise ValueError("token_diverse: expected relevance only with method 'dpp', got it with 'max_min'")
        require_tensor("token_diverse", "relevance", relevance, dims="BN", dtypes=(torch.float32,))
        if relevance.shape != (B, N):
            raise ValueError(f"token_diverse: expected relevance of shape (B, N) = ({B}, {N}), got {tuple(relevance.shape)}")
        if relevance.device != x.device:
            raise TypeError(f"token_diverse: expected relevance on the device of x, {x.device}, got {relevance.device}")
        if DEBUG and x.is_cuda and not bool(((relevance >= 0) & (relevance <= 1e18)).all()):
            raise ValueError("token_diverse: expected relevance in 0 … 1e18, got one outside")
    if DEBUG and x.is_cuda and not bool(torch.isfinite(x).all()):
        raise ValueError("token_diverse: expected finite x, got NaN or Inf")


def allocate(x: torch.Tensor, k: int, relevance: torch.Tensor | None, dpp: bool) -> Tensors:
    return (x.new_empty((x.shape[0], k), dtype=torch.int32),)


def _max_min(cosine: torch.Tensor, k: int) -> list[int]:
    nearest = cosine.clone().fill_diagonal_(-torch.inf).amax(-1)  # cosine of each token with the nearest other one
    order: list[int] = []
    for _ in range(k):
        order.append(int(nearest.argmin()))  # the lowest index of the minimum
        nearest = cosine[order].amax(0)  # with the nearest one picked
        nearest[order] = torch.inf
    return order


def _dpp(cosine: torch.Tensor, left: torch.Tensor, relevance: torch.Tensor, k: int) -> list[int]:
    order: list[int] = []
    rows = cosine.new_empty((k, cosine.shape[0]))
    while len(order) < k:
        value = relevance * relevance * torch.where(left > SPENT, left, 0.0)
        value[order] = -1
        j, t = int(value.argmax()), len(order)
        if value[j] <= 0:  # nothing is gained any more: the others by relevance
            chosen = set(order)
            others = [i for i in relevance.argsort(descending=True, stable=True).tolist() if i not in chosen]
            return order + others[: k - t]
        rows[t] = (cosine[j] - rows[:t, j] @ rows[:t]) / left[j].sqrt()
        left = left - rows[t] * rows[t]
        order.append(j)
    return order


def reference(x: torch.Tensor, k: int, relevance: torch.Tensor | None, dpp: bool) -> Tensors:
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    B, N, _ = x.shape
    norm = x.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, x / norm, torch.zeros_like(x))
    out = torch.zeros((B, k), dtype=torch.int32, device=x.device)
    for b in range(B if k else 0):
        cosine = unit[b] @ unit[b].mT
        weight = cosine.new_ones(N) if relevance is None else relevance[b].to(cosine.dtype)
        order = _dpp(cosine, (norm[b, :, 0] > 0).to(cosine.dtype), weight, k) if dpp else _max_min(cosine, k)
        out[b] = torch.tensor(order, dtype=torch.int32)
    return (out,)


_op = register("token_diverse", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_diverse(x: torch.Tensor, k: int, *, method: str = "max_min", relevance: torch.Tensor | None = None) -> torch.Tensor:
    """Choose ``k`` tokens that differ from one another, one after the other, without ever storing the N×N cosines on the CPU.

    ``"max_min"`` (DivPrune, arXiv 2503.02175): first the token whose nearest other token is furthest, then always the token
    furthest from its nearest one picked, by the distance 1 − cosine. ``"dpp"`` (CDPruner, arXiv 2506.10967): greedy MAP of
    a determinantal point process (Chen, Zhang and Zhou, NeurIPS 2018) with the kernel
    ``relevance[i] * cosine(i, j) * relevance[j]``: always the token that multiplies the determinant the most; once no token
    adds more than 1e-5 of its own (squared relevance), the rest by relevance. Ties go to the lowest position. A token of
    zeros has cosine 0 with everything.

    Args:
        x: (B, N, C) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        k: how many tokens to pick, 0 … N.
        method: ``"max_min"`` or ``"dpp"``.
        relevance: (B, N) float32 in 0 … 1e18, for ``"dpp"`` only; default all ones.

    Returns:
        (B, k) int32 positions, in the order of picking. No gradient flows through it.

    Raises:
        ValueError: wrong rank or shape, ``k`` out of range, an unknown method, relevance with ``"max_min"``, or (on CPU) a NaN
            or Inf in ``x`` or a relevance outside its range.
        TypeError: wrong dtype, or tensors on different devices.
    """
    if method not in ("max_min", "dpp"):
        raise ValueError(f"token_diverse: expected method 'max_min' or 'dpp', got {method!r}")
    if isinstance(x, torch.Tensor):
        x = x.detach()
    return _op(x, k, relevance if relevance is None else relevance.detach(), method == "dpp")[0]
