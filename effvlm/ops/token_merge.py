"""``token_merge``: weighted mean of groups of tokens, sizes tracked."""

from __future__ import annotations

from typing import NamedTuple

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, Tensor group, int num_groups, Tensor? weight) -> (Tensor, Tensor)"


class TokenMerge(NamedTuple):
    """What :func:`token_merge` returns.

    Attributes:
        out: (B, M, C) in the dtype of ``x``, the weighted mean of each group.
        weight: (B, M) float32, the total weight of each group (its size, when all weights are 1).
    """

    out: torch.Tensor
    weight: torch.Tensor


def check(x: torch.Tensor, group: torch.Tensor, num_groups: int, weight: torch.Tensor | None) -> None:
    require_tensor("token_merge", "x", x, dims="BNC", dtypes=FLOATS)
    require_tensor("token_merge", "group", group, dims="BN", dtypes=(torch.int32,))
    B, N, _ = x.shape
    if group.shape != (B, N):
        raise ValueError(f"token_merge: expected group of shape (B, N) = ({B}, {N}), got {tuple(group.shape)}")
    if weight is not None:
        require_tensor("token_merge", "weight", weight, dims="BN", dtypes=(torch.float32,))
        if weight.shape != (B, N):
            raise ValueError(f"token_merge: expected weight of shape (B, N) = ({B}, {N}), got {tuple(weight.shape)}")
    for name, t in (("group", group), ("weight", weight)):
        if t is not None and t.device != x.device:
            raise TypeError(f"token_merge: expected {name} on the device of x, {x.device}, got {t.device}")
    if isinstance(num_groups, int) and not 0 <= num_groups < 2**31:
        raise ValueError(f"token_merge: expected 0 <= num_groups < 2**31, got {num_groups}")
    if N >= 2**31:
        raise ValueError(f"token_merge: expected fewer than 2**31 tokens, got N = {N}")
    if DEBUG and x.is_cuda and bool(((group < -1) | (group >= num_groups)).any()):
        raise ValueError(f"token_merge: expected group ids in -1 … {num_groups - 1}, got one outside")


def allocate(x: torch.Tensor, group: torch.Tensor, num_groups: int, weight: torch.Tensor | None) -> Tensors:
    B, _, C = x.shape
    return x.new_empty((B, num_groups, C)), x.new_empty((B, num_groups), dtype=torch.float32)


def reference(x: torch.Tensor, group: torch.Tensor, num_groups: int, weight: torch.Tensor | None) -> Tensors:
    B, N, C = x.shape
    sums = torch.promote_types(x.dtype, torch.float32)
    w = x.new_ones((B, N), dtype=sums) if weight is None else weight.to(sums)
    kept = group >= 0
    index = torch.where(kept, group, num_groups).long()  # dropped tokens go to a group of their own, cut off below
    total = w.new_zeros((B, num_groups + 1)).scatter_add(1, index, w)[:, :num_groups]
    out = w.new_zeros((B, num_groups + 1, C)).scatter_add(1, index[..., None].expand(B, N, C), w[..., None] * x.to(sums))
    out = torch.where(total[..., None] != 0, out[:, :num_groups] / total[..., None], 0.0)
    return out.to(x.dtype), total


_op = register("token_merge", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_merge(x: torch.Tensor, group: torch.Tensor, num_groups: int, *, weight: torch.Tensor | None = None) -> TokenMerge:
    """Weighted mean of each group of tokens: drop, gather, merge and pool are all this one call.

    Equivalent to, for every group ``m``: ``out[b, m] = (w[b, n] * x[b, n]).sum(n) / w[b, n].sum(n)`` over ``group[b, n] == m``.

    Args:
        x: (B, N, C) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        group: (B, N) int32, the group of each token in 0 … num_groups−1; −1 drops the token.
        num_groups: M, how many tokens come out; a group without members is zeros of weight 0.
        weight: (B, N) float32, for instance how many tokens each one already stands for; default all ones.

    Returns:
        ``TokenMerge(out, weight)``: (B, M, C) in the dtype of ``x``, and (B, M) float32 totals.

    Raises:
        ValueError: wrong rank or shape, ``num_groups`` negative, or (on CPU) a group id outside −1 … M−1.
        TypeError: wrong dtype, or tensors on different devices.
    """
    return TokenMerge(*_op(x, group, num_groups, weight))
